"""How many evaluations a block is worth, and how much guidance: quality by setting, and the cheapest that will do.

    python bench/quality.py ../shared/data/asap-maestro-midi.zip

Each setting makes the same pieces, from the same seeds, and these are set against real music of other titles as
`pianodiff evaluate` does it: by the distances of chapter 9 (Fréchet, of shrunk moments since the clips are few, and
kernel), by the statistics' mean distance in standard deviations, and by how surely the joins can be told. Controls are
other real music and white noise at its level. Beside that stands how far each first block is from the ODE's solution.

All is compared at one level: a gain for each setting brings the median level of its clips to the reference's. Coarse
steps make louder music, and a model that plays too softly comes nearer to real music by that. A solver's error that
cancels a model's is no quality, and a gain would do it for nothing.

The rule: of the settings without guidance that are surely within five per cent of 40 Heun steps (79 evaluations), the
cheapest. Surely means that for both distances the upper end of the ratio's 95 % interval is at most 1.05; the interval
is that of random halves of the pieces, the same of both settings, so that few pieces tell. The ratios of all dearer
settings of that sampler have to be within five per cent, too, so that no lucky draw is chosen.

With this setting pieces are made under guidance, at the noise levels of the default. Of the weights that surely keep
both distances within five per cent, again, that is chosen whose joins are the hardest to tell, by whichever measure
tells them best.

Writes steps.json beside the model's weights. Pieces and embeddings are kept in `--cache`: what was interrupted goes on.
"""

import hashlib
import json
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
from pianodiff.audio import SpectrogramConfig, write_whole
from pianodiff.distance import LogMel, Moments, embed, frechet_distance, interval, kernel_distance_to
from pianodiff.evaluate import (
    Piece,
    clips_of,
    compare_statistics,
    make_pieces,
    noise_like,
    read_pieces,
    seams,
    split_pieces,
)
from pianodiff.generate import Piano, find_model
from pianodiff.music import measure

LADDER = [("heun", n) for n in (3, 5, 9, 18, 40)] + [("dpmpp_2m", n) for n in (5, 9, 12, 15, 17, 20, 25, 35)]
BASELINE = ("heun", 40)
SOLUTION = ("heun", 200)
GUIDANCE = (2.0, 3.0, 4.0)
LIMIT = 1.05


def evaluations(sampler: str, num_steps: int) -> int:
    """Calls of the network for one block."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def level_of(clips: Tensor) -> float:
    """Median level in dBFS of clips `[N, T]`."""
    return float(10 * clips.square().mean(1).clamp(min=1e-12).log10().median())


def distance_ratios(points: Tensor, baseline: Tensor, reference: Tensor, seed: int) -> dict[str, Any]:
    """Both distances of `points` `[P, K, D]`, of P pieces with K clips, and their ratios to the baseline's, with
    paired intervals over the pieces."""
    moments = Moments.of(reference)
    measures = {"frechet": lambda x: frechet_distance(Moments.of(x).shrunk(), moments),
                "kernel": kernel_distance_to(reference)}
    found: dict[str, Any] = {}
    for name, distance in measures.items():
        def ratio(pair: Tensor, distance: Any = distance) -> float:
            return distance(pair[:, 0].flatten(0, 1)) / distance(pair[:, 1].flatten(0, 1))

        pair = torch.stack([points, baseline], 1)
        found |= {name: distance(points.flatten(0, 1)), f"{name}_ratio": ratio(pair),
                  f"{name}_ratio_interval": interval(ratio, pair, seed=seed)}
    return found


def from_solution(made: list[Piece], solution: list[Piece], cfg: SpectrogramConfig) -> float:
    """Root mean square distance in dB of the first blocks from those of the ODE's solution."""
    firsts, ends = (torch.stack([piece.spec[:, : cfg.n_frames] for piece in pieces[: len(solution)]
                                 if piece.spec is not None]) for pieces in (made, solution))
    return cfg.top_db * float((firsts - ends).square().mean().sqrt())


def within(setting: dict[str, Any], surely: bool) -> bool:
    """Whether both distances are at most five per cent above the baseline's."""
    return max(setting[f"{name}_ratio_interval"][1] if surely else setting[f"{name}_ratio"]
               for name in ("frechet", "kernel")) <= LIMIT


def cheapest(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting that the rule above chooses; the baseline always keeps it."""
    def keeps(setting: dict[str, Any]) -> bool:
        return within(setting, surely=True) and all(
            within(other, surely=False) for other in settings
            if other["sampler"] == setting["sampler"] and other["evaluations"] > setting["evaluations"])

    return min(filter(keeps, settings), key=lambda setting: int(setting["evaluations"]))


def told(setting: dict[str, Any]) -> float:
    """The probability of telling a join from the inside of a block by the measure that tells them best."""
    return max(max(auc, 1 - auc) for auc in setting["joins"].values())


def smoothest(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Of settings that differ in guidance, the first without, the one that the rule above chooses."""
    kept = [setting for setting in settings if within(setting, surely=True)]
    return min(kept or settings[:1], key=told)


def show(settings: list[dict[str, Any]], controls: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':<10}{'steps':>6}{'NFE':>5}{'w':>3}{'level':>7}{'Fréchet':>9}{'ratio':>21}{'kernel':>8}{'ratio':>21}{'stat.':>7}{'flux':>6}"
          f"{'residue':>8}{'from ODE':>10}")
    for row in settings:
        ratios = [f"{row[f'{name}_ratio']:.3f} ({low:.2f} - {high:.2f})" for name in ("frechet", "kernel")
                  for low, high in [row[f"{name}_ratio_interval"]]]
        joins = [row["joins"].get(name, float("nan")) for name in ("flux", "residue")]
        print(f"{row['sampler']:<10}{row['num_steps']:>6}{row['evaluations']:>5}{row['guidance']:>3g}{row['level']:>7.1f}{row['frechet']:>9.2f}"
              f"{ratios[0]:>21}{row['kernel']:>8.4f}{ratios[1]:>21}{row['statistics']:>7.3f}{joins[0]:>6.2f}"
              f"{joins[1]:>8.2f}{row['rms_db']:>7.2f} dB")
    for name, row in controls.items():
        print(f"{name:<24}{row['level']:>7.1f}{row['frechet']:>9.2f}{'':>21}{row['kernel']:>8.4f}{'':>21}{row['statistics']:>7.3f}")


def main(reference: Annotated[Path, tyro.conf.Positional], *, model: str = "nano", pieces: int = 24,
         seconds: float = 30.72, splits: tuple[str, ...] = ("validation", "test"), blocks: int = 2000, seed: int = 0,
         soundfont: Path | None = None, cache: Path = Path("runs/quality"), out: Path | None = None) -> None:
    """Measure all settings, write the table, and name the cheapest that will do.

    Args:
        reference: a data set, or a folder of music, as `pianodiff evaluate` takes it.
        model: a shipped name, or a model's folder.
        pieces: how many each setting makes; at least 4.
        seconds: of each piece.
        splits: of the reference; none for a folder without splits.
        blocks: of real music that are read.
        seed: of the first piece, and of all that is drawn.
        soundfont: for MIDI.
        cache: a folder for what has been made.
        out: what to write, by default steps.json beside the weights.
    """
    begin, folder = time.perf_counter(), find_model(model)
    cfg, home = Piano.from_pretrained(folder).cfg, cache / "pieces"

    def make(sampler: str, steps: int, guidance: float = 1.0) -> list[Piece]:
        return make_pieces(folder, home, pieces=pieces, seconds=seconds, steps=steps, sampler=sampler, seed=seed,
                           guidance=guidance, guidance_interval=GUIDANCE_INTERVAL)

    made = {(sampler, steps): make(sampler, steps) for sampler, steps in LADDER}
    solution = make_pieces(folder, home, pieces=min(pieces, 4), seconds=cfg.block_seconds, sampler=SOLUTION[0],
                           steps=SOLUTION[1], seed=seed, guidance=1.0)
    length = len(made[BASELINE][0].wave) // cfg.block_samples
    real, _ = read_pieces(reference, cfg, splits=splits, blocks=blocks, most=length, normalize=True, seed=seed,
                          soundfont=soundfont)
    known, others = split_pieces(real, pieces * length, cfg, seed)

    def points(clips: Tensor) -> Tensor:
        return embed(LogMel(), clips, cfg.sample_rate, cache=cache / "logmel")

    target, typical = points(clips_of(known, cfg)), measure(clips_of(known, cfg), cfg)
    level = level_of(clips_of(known, cfg))

    def levelled(clips: Tensor) -> Tensor:
        return clips * 10 ** ((level - level_of(clips)) / 20)

    def by_piece(clips: Tensor) -> Tensor:
        return points(levelled(clips)).unflatten(0, (-1, length))

    baseline = by_piece(clips_of(made[BASELINE], cfg))

    def quality(clips: Tensor) -> dict[str, Any]:
        table = compare_statistics({"clips": measure(levelled(clips), cfg)}, typical)
        return {"level": level_of(clips), **distance_ratios(by_piece(clips), baseline, target, seed),
                "statistics": sum(row["clips"]["distance"] for row in table.values()) / len(table)}

    def measured(found: list[Piece], sampler: str, steps: int, guidance: float = 1.0) -> dict[str, Any]:
        return {"sampler": sampler, "num_steps": steps, "evaluations": evaluations(sampler, steps),
                "guidance": guidance, **quality(clips_of(found, cfg)),
                "joins": {name: row["auc"] for name, row in seams(found, cfg, seed).items()},
                "rms_db": from_solution(found, solution, cfg)}

    settings = [measured(made[setting], *setting) for setting in tqdm(LADDER, "settings")]
    choice = cheapest(settings)
    setting = choice["sampler"], choice["num_steps"]
    guided = [choice, *(measured(make(*setting, w), *setting, w) for w in tqdm(GUIDANCE, "guidance"))]
    floor = clips_of(others, cfg)
    controls = {"real": quality(floor), "noise": quality(noise_like(floor, torch.Generator().manual_seed(seed)))}
    show(settings + guided[1:], controls)
    weight = smoothest(guided)["guidance"]
    print(f"the cheapest that keeps the rule: {choice['sampler']}, {choice['num_steps']} steps, "
          f"{choice['evaluations']} evaluations; then guidance {weight:g}")
    results = {
        "command": shlex.join(["python", "bench/quality.py", *sys.argv[1:]]), "model": folder.name,
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), "seed": seed,
        "seconds": round(time.perf_counter() - begin), "pieces": pieces, "blocks": pieces * length,
        "reference": {"source": reference.name, "splits": splits, "pieces": len(known), "blocks": len(target),
                      "level": level},
        "solution": SOLUTION, "limit": LIMIT,
        "choice": {key: choice[key] for key in ("sampler", "num_steps", "evaluations")},
        "guidance": {"choice": weight, "interval": GUIDANCE_INTERVAL, "settings": guided},
        "versions": {"pianodiff": pianodiff.__version__, "torch": torch.__version__,
                     "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        "settings": settings, "controls": controls}
    write_whole(out or folder / "steps.json", (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
