"""From how much noise to sample, in how many steps, and with how much guidance: quality by setting.

    python bench/quality.py ../shared/data/asap-maestro-midi.zip --soundfont piano.sf2

Each setting makes the same pieces, from the same seeds. They are set against real music of other titles as
`pianodiff evaluate` does it: by the distances of its report (Fréchet, of shrunk moments since the clips are few, and
kernel), by the statistics' mean distance in standard deviations, and by how surely the joins can be told. Where the
reference is MIDI, the ruler of chapter 15 tells how much of the sound is not made of notes, and of how many the rest
is.
Controls are other real music, the same through phase retrieval, and white noise at its level.

First sigma_max, the noise that sampling starts from. A block's loudness is an average over all its pixels, which
survives much noise; so the levels of many short pieces are compared here, as they come. The rule: the lowest sigma_max
whose blocks are surely as loud, and as unlike in loudness, as those from the highest. No distance may be both more than
five per cent above that at the lowest and beyond that of other real music. Surely means that the 95 % interval of the
difference, over pieces of equal seeds, lies within half a decibel for the median, and within one for the spread (10 to
90 %): less than an ear would tell. (The interval of one setting alone is far wider than what the start changes.)

Then the steps, rho, by which they are spread, and sigma_min, from which the last of them goes to 0. From here on all
is compared at one level: a gain for each setting brings the median level of its clips to the reference's. Coarse
steps make louder music, and a model that plays too softly comes nearer to real music by that. A solver's error that
cancels a model's is no quality.

The rule: of the settings without guidance that are surely within five per cent of 40 Heun steps (79 evaluations), the
cheapest. Surely means that for both distances, for what is left over beside notes and for their number, the upper end
of the ratio's 95 % interval is at most 1.05. The interval is that of random halves of the pieces, the same of both
settings, so that few pieces tell. The ratios of all dearer settings that differ in the steps alone have to be within
five per cent, too, so that no lucky draw is chosen. Of two that are as cheap, the one is taken that goes down
farther, and smooths less. Where a measure is no larger than that of other real music, its ratio does not count: so
near, it ranks nothing.

With this sampler, rho and sigma_min, and no fewer steps than the model's own, pieces are made under guidance, at the
noise levels of the default. Of the weights that surely keep all measures within five per cent, again, that is chosen
whose joins are the hardest to tell, by whichever measure tells them best.

A model that has a guide is guided by that one, and differently: less far, and at other noise levels. This is to leave
less over beside the notes, and it makes the music louder. So of the settings whose Fréchet distance is no larger than
that of other real music, and whose level as it comes is at most a decibel beyond that of both sets of real music,
that is chosen which leaves the least over. Notes a second are told, and choose nothing: what plays more of them in
these short pieces fades in long ones.

Writes steps.json beside the model's weights. Pieces and embeddings are kept in `--cache`: what was interrupted goes on.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import pianodiff
from pianodiff import GUIDANCE_INTERVAL
from pianodiff.distance import LogMel, Moments, embed, frechet_distance, interval, kernel_distance_to
from pianodiff.files import plain, write_whole
from pianodiff.generate import Piano, Sampling
from pianodiff.joins import seams
from pianodiff.model import find_model
from pianodiff.music import NoteSpectra, compare_statistics, measure, not_notes, note_spectra
from pianodiff.pieces import Pieces, make_pieces, noise_like, read_pieces, retrieved

SIGMA_MAX = 80.0, 150.0, 250.0, 400.0, 600.0
TOLERANCE = {"level": 0.5, "spread": 1.0}  # dB
STARTING = "dpmpp_2m", 20, 7.0, 0.002  # what these are compared with
LADDER = [*(("heun", n, 7.0, 0.002) for n in (3, 5, 9, 18, 40)),
          *(("dpmpp_2m", n, 7.0, 0.002) for n in (9, 15, 20)), *(("dpmpp_2m", n, 12.0, 0.002) for n in (15, 20, 25)),
          *(("dpmpp_2m", n, 30.0, low) for low in (0.002, 0.04, 0.1) for n in (8, 10, 12, 15, 20))]
BASELINE = "heun", 40, 7.0, 0.002
SOLUTION = "heun", 200, 7.0, 0.002  # of the ODE, as near as it matters
GUIDANCE = 2.0, 3.0, 4.0
GUIDES = [(w, (0.05, high)) for high, weights in ((3.0, (1.2, 1.3, 1.4, 1.5, 1.6)), (10.0, (1.2, 1.3)))
          for w in weights]
LIMIT = 1.05
MEASURES = "frechet", "kernel", "left_over", "notes"


def evaluations(sampler: str, num_steps: int) -> int:
    """Calls of the network for one block."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def variant(model: Path, home: Path, **levels: float) -> Path:
    """The same weights, sampled at other noise levels: a folder of their own."""
    folder = home / "-".join([model.name, *(f"{level:g}" for level in levels.values())])
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text()) | levels
    write_whole(folder / "config.json", json.dumps(config).encode())
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to((model / "model.safetensors").resolve())
    return folder


def levels_of(clips: Tensor) -> Tensor:
    """Levels in dBFS `[N]` of clips `[N, T]`."""
    return 10 * clips.square().mean(1).clamp(min=1e-12).log10()


def level_of(clips: Tensor) -> float:
    """Their median."""
    return float(levels_of(clips).median())


def spread_of(levels: Tensor) -> float:
    """From the tenth to the ninetieth percentile."""
    low, high = levels.flatten().quantile(torch.tensor([0.1, 0.9]))
    return float(high - low)


def loudness(levels: Tensor, highest: Tensor, seed: int) -> dict[str, Any]:
    """Median and spread of levels `[P, K]` of P pieces, and the intervals of their differences from the highest's."""
    pair, row = torch.stack([levels, highest], 1), {}
    for name, summary in (("level", lambda x: float(x.median())), ("spread", spread_of)):
        def difference(pair: Tensor, summary: Any = summary) -> float:
            return summary(pair[:, 0]) - summary(pair[:, 1])

        row |= {name: summary(levels), f"{name}_difference_interval": interval(difference, pair, seed=seed)}
    return row


def lowest_start(rows: list[dict[str, Any]], real: dict[str, Any]) -> dict[str, Any]:
    """Of settings that differ in sigma_max alone, in rising order, the one that the first rule chooses.

    `real` is the row of other real music.
    """
    def keeps(row: dict[str, Any]) -> bool:
        near = all(-most <= end <= most
                   for name, most in TOLERANCE.items() for end in row[f"{name}_difference_interval"])
        return near and all(row[name] <= max(LIMIT * rows[0][name], real[name]) for name in ("frechet", "kernel"))

    return next(filter(keeps, rows), rows[-1])


def distance_ratios(points: Tensor, baseline: Tensor, reference: Tensor, seed: int) -> dict[str, Any]:
    """Both distances of `points` `[P, K, D]`, of P pieces with K clips, and their ratios to the baseline's, with
    paired intervals over the pieces."""
    moments, kernel = Moments.of(reference), kernel_distance_to(reference)
    measures = {"frechet": lambda x: frechet_distance(Moments.of(x.flatten(0, 1)).shrunk(), moments),
                "kernel": lambda x: kernel(x.flatten(0, 1))}
    return {key: value for name, measure in measures.items()
            for key, value in ratio_of(name, measure, points, baseline, seed).items()}


def note_ratios(found: Tensor, baseline: Tensor, seed: int) -> dict[str, Any]:
    """Medians over pieces of `found` `[P, 2]`, what is left over and the notes, and their ratios to the baseline's."""
    return {key: value for i, name in enumerate(("left_over", "notes"))
            for key, value in ratio_of(name, lambda x, i=i: float(x[:, i].nanmedian()), found, baseline, seed).items()}


def ratio_of(name: str, measure: Any, found: Tensor, baseline: Tensor, seed: int) -> dict[str, Any]:
    def ratio(pair: Tensor) -> float:
        return measure(pair[:, 0]) / measure(pair[:, 1])

    pair = torch.stack([found, baseline], 1)
    return {name: measure(found), f"{name}_ratio": ratio(pair),
            f"{name}_ratio_interval": interval(ratio, pair, seed=seed)}


def from_solution(made: Pieces, solution: Pieces) -> float:
    """Root mean square distance in dB of the first blocks from those of the ODE's solution."""
    frames = made.cfg.n_frames
    firsts, ends = (torch.stack([piece.spec[:, :frames] for piece in pieces[: len(solution)]])
                    for pieces in (made, solution))
    return made.cfg.top_db * float((firsts - ends).square().mean().sqrt())


def within(setting: dict[str, Any], surely: bool, real: dict[str, Any] | None = None) -> bool:
    """Whether no measure is more than five per cent above the baseline's and larger than in `real` music."""
    return all((setting[f"{name}_ratio_interval"][1] if surely else setting[f"{name}_ratio"]) <= LIMIT
               or (real is not None and setting[name] <= real[name])
               for name in MEASURES if f"{name}_ratio_interval" in setting)


def cheapest(settings: list[dict[str, Any]], real: dict[str, Any] | None = None) -> dict[str, Any]:
    """The setting that the rule above chooses; the baseline always keeps it. `real` is the row of other real music."""
    def keeps(setting: dict[str, Any]) -> bool:
        return within(setting, True, real) and all(
            within(other, False, real) for other in settings
            if all(other[key] == setting[key] for key in ("sampler", "rho", "sigma_min"))
            and other["evaluations"] > setting["evaluations"])

    return min(filter(keeps, settings), key=lambda setting: (setting["evaluations"], setting["sigma_min"]))


def told(setting: dict[str, Any]) -> float:
    """The probability of telling a join from the inside of a block by the measure that tells them best."""
    return max(max(auc, 1 - auc) for auc in setting["joins"].values())


def smoothest(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Of settings that differ in guidance, the first without, the one that the rule above chooses."""
    kept = [setting for setting in settings if within(setting, True)]
    return min(kept or settings[:1], key=told)


def cleanest(settings: list[dict[str, Any]], real: dict[str, Any], levels: list[float]) -> dict[str, Any]:
    """Of settings that differ in how far a guide leads, the first without, the one that the rule above chooses.

    `real` is the row of other real music, and `levels` are those of real music in dBFS.
    """
    kept = [setting for setting in settings if setting["frechet"] <= real["frechet"]
            and min(levels) - 1 <= setting["level"] <= max(levels) + 1]
    return min(kept or settings[:1], key=lambda setting: setting.get("left_over", math.inf))


def show(rows: list[dict[str, Any]], controls: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    columns = {"sampler": "", "num_steps": "g", "evaluations": "g", "sigma_max": "g", "rho": "g", "sigma_min": "g",
               "guidance": "g", "between": "", "level": ".1f", "spread": ".1f", "frechet": ".2f",
               "frechet_ratio": ".3f",
               "kernel": ".4f", "kernel_ratio": ".3f", "left_over": ".4f", "left_over_ratio": ".3f", "notes": ".1f",
               "notes_ratio": ".3f", "notes_a_second": ".2f", "statistics": ".3f", "flux": ".2f", "rms_db": ".2f"}
    print("".join(f"{name.replace('_ratio', '/'):>12}" for name in columns))
    for name, row in [*(("", row) for row in rows), *controls.items()]:
        between = {"between": "{:g}-{:g}".format(*row["interval"])} if "interval" in row else {}
        cells = {"sampler": name, **row, **row.get("joins", {}), **between}
        print("".join(f"{cells.get(key, ''):>12{kind if key in cells else ''}}" for key, kind in columns.items()))
        print(" " * 24 + ", ".join(f"{key} {row[f'{key}_ratio_interval'][0]:.2f}-{row[f'{key}_ratio_interval'][1]:.2f}"
                                   for key in MEASURES if f"{key}_ratio_interval" in row))


class Bench:
    """The reference, and all that is measured against it."""

    def __init__(self, folder: Path, cache: Path, pieces: int, seconds: float, seed: int) -> None:
        self.folder, self.cache, self.pieces, self.seconds, self.seed = folder, cache, pieces, seconds, seed
        model = Piano.from_pretrained(folder)
        self.cfg, self.has_guide, self.num_steps = model.cfg, model.guide is not None, model.sampling.num_steps
        self.length = int(seconds * self.cfg.sample_rate) // self.cfg.block_samples
        self.piano: NoteSpectra | None = None

    def read(self, reference: Path, splits: tuple[str, ...], blocks: int, most: int, soundfont: Path | None) -> None:
        real = read_pieces(reference, self.cfg, splits=splits, blocks=blocks, most=most, normalize=True,
                           seed=self.seed, soundfont=soundfont)
        self.known, self.others = real.split(self.pieces * self.length, self.seed)
        clips = self.known.clips
        self.target, self.typical, self.level = self.points(clips), measure(clips, self.cfg), level_of(clips)
        self.typically = {"level": self.level, "spread": spread_of(levels_of(clips)),
                         "notes_a_second": float(self.typical["notes_per_second"].nanmean())}
        self.piano = note_spectra(soundfont) if soundfont else None

    def points(self, clips: Tensor) -> Tensor:
        return embed(LogMel(), clips, self.cfg.sample_rate, cache=self.cache / "logmel")

    def levelled(self, clips: Tensor) -> Tensor:
        return clips * 10 ** ((self.level - level_of(clips)) / 20)

    def make(self, sampler: str, steps: int, rho: float, sigma_min: float, *, sigma_max: float, guidance: float = 1.0,
             interval: tuple[float, float] = GUIDANCE_INTERVAL, **how: Any) -> Pieces:
        how = {"pieces": self.pieces, "seconds": self.seconds, **how}
        model = variant(self.folder, self.cache / "models", sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        return make_pieces(model, self.cache / "pieces", sampling=Sampling(sampler, steps, guidance, interval),
                           seed=self.seed, **how)

    def solution(self, sigma_max: float) -> Pieces:
        """The first blocks of four pieces."""
        return self.make(*SOLUTION, sigma_max=sigma_max, pieces=min(self.pieces, 4), seconds=self.cfg.block_seconds)

    def by_piece(self, clips: Tensor) -> Tensor:
        return self.points(self.levelled(clips)).unflatten(0, (-1, self.length))

    def notes_of(self, waves: list[Tensor]) -> Tensor:
        """Both figures of each wave `[P, 2]`; a third of the frames tell."""
        assert self.piano is not None
        return torch.tensor([not_notes(wave, self.piano, every=3) for wave in waves])

    def quality(self, clips: Tensor) -> dict[str, Any]:
        """What needs no pieces: level, distances, statistics."""
        levelled, moments = self.levelled(clips), Moments.of(self.target)
        found = measure(levelled, self.cfg)
        table = compare_statistics({"clips": found}, self.typical)
        points = self.points(levelled)
        return {"level": level_of(clips), "spread": spread_of(levels_of(clips)),
                "frechet": frechet_distance(Moments.of(points).shrunk(), moments),
                "kernel": kernel_distance_to(self.target)(points),
                "notes_a_second": float(found["notes_per_second"].nanmean()),
                "statistics": sum(row["clips"]["distance"] for row in table.values()) / len(table)}

    def measured(self, sampler: str, steps: int, rho: float, sigma_min: float, *, sigma_max: float,
                 baseline: tuple[Tensor, Tensor], guidance: float = 1.0,
                 interval: tuple[float, float] = GUIDANCE_INTERVAL) -> dict[str, Any]:
        """A setting, and its quality beside the baseline's at that sigma_max."""
        made = self.make(sampler, steps, rho, sigma_min, sigma_max=sigma_max, guidance=guidance, interval=interval)
        row = {"sampler": sampler, "num_steps": steps, "evaluations": evaluations(sampler, steps), "rho": rho,
               "sigma_min": sigma_min, "sigma_max": sigma_max, "guidance": guidance, "interval": interval,
               **self.quality(made.clips),
               **distance_ratios(self.by_piece(made.clips), baseline[0], self.target, self.seed),
               "rms_db": from_solution(made, self.solution(sigma_max)),
               "joins": {name: found["auc"] for name, found in seams(made, self.seed).items()}}
        if self.piano is not None:
            row |= note_ratios(self.notes_of([piece.wave for piece in made]), baseline[1], self.seed)
        return row

    def baseline(self, sigma_max: float) -> tuple[Tensor, Tensor]:
        """The baseline's points and notes, with which every setting is compared."""
        made = self.make(*BASELINE, sigma_max=sigma_max)
        notes = torch.empty(0) if self.piano is None else self.notes_of([piece.wave for piece in made])
        return self.by_piece(made.clips), notes

    def starts(self, pieces: int) -> list[dict[str, Any]]:
        """From each sigma_max, so many pieces of two blocks: their levels, and their distances."""
        made = {sigma_max: self.make(*STARTING, sigma_max=sigma_max, pieces=pieces,
                                     seconds=2 * self.cfg.block_seconds).clips for sigma_max in SIGMA_MAX}
        levels = {sigma_max: levels_of(clips).reshape(pieces, -1) for sigma_max, clips in made.items()}
        return [{"sigma_max": sigma_max, **self.quality(clips),
                 **loudness(levels[sigma_max], levels[SIGMA_MAX[-1]], self.seed)} for sigma_max, clips in made.items()]

    def controls(self) -> dict[str, dict[str, Any]]:
        """Other real music, the same through phase retrieval, and noise at its level."""
        again = retrieved(self.others, self.seed)
        floor = self.others.clips
        noise = noise_like(floor, torch.Generator().manual_seed(self.seed))
        found = {"real": (floor, [piece.wave for piece in self.others]),
                 "retrieved": (again.clips, [piece.wave for piece in again]),
                 "noise": (noise, [*noise[:32]])}
        rows = {name: self.quality(clips) for name, (clips, _) in found.items()}
        for name, (_, waves) in found.items():
            if self.piano is not None:
                left, notes = self.notes_of(waves).nanmedian(0).values.tolist()
                rows[name] |= {"left_over": left, "notes": notes}
        return rows


def main(reference: Annotated[Path, tyro.conf.Positional], *, model: str = "nano", pieces: int = 64,
         seconds: float = 8.192, splits: tuple[str, ...] = ("validation", "test"), blocks: int = 2000, most: int = 15,
         seed: int = 0, soundfont: Path | None = None, cache: Path = Path("runs/quality"),
         ladder: tuple[str, ...] = (), out: Path | None = None) -> None:
    """Measure all settings, write the table, and name what the rules choose.

    Args:
        reference: a data set, or a folder of music, as `pianodiff evaluate` takes it.
        model: a shipped name, or a model's folder.
        pieces: how many each setting makes, at least 4; three times as many short ones tell sigma_max.
        seconds: of each piece.
        splits: of the reference; none for a folder without splits.
        blocks: of real music that are read.
        most: of them from one recording.
        seed: of the first piece, and of all that is drawn.
        soundfont: for MIDI, and for the ruler of notes, which is left out without it.
        cache: a folder for what has been made.
        ladder: the settings to compare, each as sampler:steps:rho:sigma_min, in place of the usual ones; the baseline
            is added.
        out: what to write, by default steps.json beside the weights.
    """
    begin, folder = time.perf_counter(), find_model(model)
    steps = [(sampler, int(n), float(rho), float(low))
             for sampler, n, rho, low in (text.split(":") for text in ladder)]
    steps = [*dict.fromkeys([BASELINE, *steps])] if ladder else LADDER
    bench = Bench(folder, cache, pieces, seconds, seed)
    bench.read(reference, splits, blocks, most, soundfont)

    starts, controls = bench.starts(3 * pieces), bench.controls()
    sigma_max = lowest_start(starts, controls["real"])["sigma_max"]
    kept = {"sigma_max": sigma_max, "baseline": bench.baseline(sigma_max)}
    settings = [bench.measured(*setting, **kept) for setting in tqdm(steps, "settings")]
    choice = cheapest(settings, controls["real"])
    used = choice["sampler"], max(choice["num_steps"], bench.num_steps), choice["rho"], choice["sigma_min"]
    leads = GUIDES if bench.has_guide else [(w, GUIDANCE_INTERVAL) for w in GUIDANCE]
    guided = [bench.measured(*used, **kept), *(bench.measured(*used, **kept, guidance=w, interval=levels)
                                               for w, levels in tqdm(leads, "guidance"))]
    best = (cleanest(guided, controls["real"], [bench.typically["level"], controls["real"]["level"]])
            if bench.has_guide else smoothest(guided))
    show([*starts, *settings, *guided[1:]], controls)
    print(f"sigma_max {sigma_max:g}; the cheapest that keeps the rule: {choice['sampler']}, {choice['num_steps']} "
          f"steps, rho {choice['rho']:g}, down to {choice['sigma_min']:g}, {choice['evaluations']} evaluations; "
          f"then guidance {best['guidance']:g} "
          "from {:g} to {:g}".format(*best["interval"]))
    results = {
        "command": shlex.join(["python", "bench/quality.py", *sys.argv[1:]]), "model": folder.name,
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), "seed": seed,
        "seconds": round(time.perf_counter() - begin), "pieces": pieces, "blocks": pieces * bench.length,
        "reference": {"source": reference.name, "splits": splits, "pieces": len(bench.known),
                      "blocks": len(bench.target), **bench.typically},
        "solution": SOLUTION, "limit": LIMIT, "sigma_max": {"choice": sigma_max, "settings": starts},
        "choice": {key: choice[key] for key in ("sampler", "num_steps", "rho", "sigma_min", "evaluations")},
        "guidance": {"choice": best["guidance"], "interval": best["interval"], "settings": guided},
        "versions": {"pianodiff": pianodiff.__version__, "torch": torch.__version__,
                     "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        "settings": settings, "controls": controls}
    write_whole(out or folder / "steps.json", (json.dumps(plain(results), indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
