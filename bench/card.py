"""Writes what was measured of the shipped models into README, cards and book, between `<!-- models -->` marks.

All of it is read from the files that training (config.json) and `pianodiff evaluate` (report.json) left beside the
weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from table import update

from pianodiff.evaluate import drawn
from pianodiff.files import plain
from pianodiff.generate import Piano
from pianodiff.model import trainings

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "pianodiff" / "weights"
CONTROLS = {"real": "other real music", "retrieved": "the same music, through spectrogram and phase retrieval"}
STATISTICS = {"notes_per_second": ("notes a second", 1), "polyphony": ("notes that sound at once", 1),
              "register": ("register, median MIDI pitch", 0), "key_clarity": ("clarity of the key", 2),
              "level": ("level, dBFS", 1), "flatness": ("spectral flatness, dB", 1)}
NOTES = {"left_over": ("share of a piece that is not made of a piano's notes", 3),
         "notes": ("notes that explain the rest of a frame", 1)}
GPU_WATTS = 700    # an H100's or H200's limit, by their datasheets
WATTS = (5, 15)    # a busy core of a server, its share of memory, supplies and cooling included: an assumption


def seen(training: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Blocks and hours of all its trainings, by the device that they ran on."""
    totals: dict[str, tuple[int, float]] = {}
    for run in reversed([*trainings({"training": training})]):
        blocks, hours = totals.get(device := run.get("device", "cpu"), (0, 0.0))
        totals[device] = blocks + run["images"], hours + run["seconds"] / 3600
    return totals


def history(training: dict[str, Any]) -> str:
    """How much it has seen, where and in what time."""
    totals = seen(training)
    times = [f"in {hours:.1f} hours on one core of a shared CPU" if device == "cpu" else
             f"in {60 * hours:.0f} minutes on one {device}" for device, (_, hours) in totals.items()]
    counts = [blocks for blocks, _ in totals.values()]
    if len(totals) == 1:
        return f"{counts[0]:,} blocks {times[0]}"
    return f"{sum(counts):,} blocks: " + ", and ".join(f"{n:,} {time}" for n, time in zip(counts, times, strict=True))


def between(low: float, high: float, digits: int) -> str:
    """An interval, with signs that can't be taken for its dash; or the one figure that both its ends are."""
    ends = dict.fromkeys(f"{end:.{digits}f}" for end in (low, high))
    return " – ".join(ends).replace("-", "−")


def table(header: str, rows: list[str]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|---" * columns + "|", *rows]) + "\n"


def sampled(reports: dict[str, dict[str, Any]]) -> str:
    """Says so if the reports' music was sampled otherwise than the models are today; nothing if it was not."""
    old = [f"`{model}`" for model, report in reports.items()
           if report.get("sampling") != plain(drawn(piano := Piano(model), piano.sampling))]
    if not old:
        return ""
    return (f"In these figures, the music of {' and '.join(old)} was sampled by settings of an earlier version, which "
            "report.json names.\n")


def distances(reports: dict[str, dict[str, Any]]) -> str:
    """The rows under the first embedding: the controls, which all models share, and each model's."""
    report = next(iter(reports.values()))
    name, controls = next(iter(report["distances"].items()))
    compared = ({label: controls[key] for key, label in CONTROLS.items()}
                | {f"**{model}**": report["distances"][name]["model"] for model, report in reports.items()}
                | {"white noise": controls["noise"]})
    rows = [f"| {label} | {row['frechet']:.2f} | {between(*row['frechet_interval'], 1)} | {row['kernel']:.3f} "
            f"| {between(*row['kernel_interval'], 3)} |" for label, row in compared.items()]
    clips, pieces, floor = controls["model"]["clips"], controls["model"]["pieces"], report["floors"][name]["real"]
    reference = report["reference"]
    away = ", ".join(f"`{model}` lies {spread(report['floors'][name]['model'])} away"
                     for model, report in reports.items())
    return (f"Distance of {clips} blocks from {reference['blocks']:,} blocks of {reference['pieces']} "
            f"performances that no model was trained on, by the built-in embedding `{name.partition('-')[0]}`:\n\n"
            + table(f"| {clips} blocks of | Fréchet | 95 % | kernel | 95 % |", rows)
            + "\nThe intervals hold for the mean over infinitely many pieces. They were estimated from "
            f"{pieces} by a model and {controls['real']['pieces']} real ones;\nso few real pieces say little about "
            f"real music. Over {len(floor)} random splits by title, other real music lies {spread(floor)}\n"
            f"from the rest, by the Fréchet distance. Against the same references, {away}.\n"
            "A model can lie nearer than other real music: its pieces are alike, and real pieces differ.\n"
            + levelled(reports))


def levelled(reports: dict[str, dict[str, Any]]) -> str:
    """The same of clips at one level, from the reports that have it; nothing if none does."""
    splits = {model: found for model, own in reports.items() for name, found in own["floors"].items()
              if name.startswith("levelled")}
    away = ", ".join(f"`{model}` {spread(found['model'])}" for model, found in splits.items())
    return "" if not splits else ("Without loudness (`levelled`), other real music lies "
                                  f"{spread(next(iter(splits.values()))['real'])} from the rest,\nand {away}.\n")


def spread(values: list[float]) -> str:
    """The least, the most, and the median."""
    return f"{min(values):.1f} to {max(values):.1f} (median {median(values):.1f})"


def music(reports: dict[str, dict[str, Any]]) -> str:
    """The medians of models' blocks beside those of real music and noise, and how surely their joins can be told."""
    report = next(iter(reports.values()))
    columns = [(own, "model") for own in reports.values()] + [(report, "reference"), (report, "noise")]
    rows = ["| " + " | ".join([label, *(f"{own['statistics'][key][whose]['median']:.{digits}f}"
                                        for own, whose in columns)]) + " |"
            for key, (label, digits) in STATISTICS.items()]
    rows += beside_notes(reports)
    flux = [own["joins"]["model"]["flux"]["auc"] for own in reports.values()]
    real = report["joins"]["real neighbours"]["flux"]["auc"]
    rows += ["| probability that a join shows more flux than a block's middle | "
             + " | ".join(f"{auc:.2f}" for auc in [*flux, real]) + " | |"]
    rows += told_apart(reports)
    rows += ["| suspected copies: blocks as near to a training passage as the nearest 1 % of held-out music | "
             + " | ".join([*(f"{copies(own):.1%}" for own in reports.values()), "1 %"]) + " | |"]
    return ("Medians over blocks, then joins and copies. The white noise has the levels of real blocks. Where it comes "
            "near\nmusic, a median says little.\n\n"
            + table(f"| | {' | '.join(reports)} | real music | white noise |", rows))


def beside_notes(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of that table about what is not made of notes; none if a report is older than this ruler."""
    columns = columns_of(reports, "not_notes")
    return ["| " + " | ".join([label, *(f"{row[key]:.{digits}f}" for row in columns)]) + " |"
            for key, (label, digits) in NOTES.items() if columns]


def told_apart(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The row of that table about the network that listens; none if a report is older than it, or lacks the row."""
    label = "AUC of a small network that tells blocks from real ones (0.5 if it can't)"
    columns = columns_of(reports, "told_apart")
    return ["| " + " | ".join([label, *(f"{row['auc']:.2f}" for row in columns)]) + " |"] if columns else []


def columns_of(reports: dict[str, dict[str, Any]], section: str) -> list[dict[str, float]]:
    """A section's figures, column by column of that table; none if a report lacks one of them."""
    tables = [own.get(section, {}) for own in reports.values()]
    if not all({"real", "model", "noise"} <= found.keys() for found in tables):
        return []
    return [*(found["model"] for found in tables), tables[0]["real"], tables[0]["noise"]]


def copies(report: dict[str, Any]) -> float:
    """The share of a model's blocks that are as near to a training passage as 1 % of held-out music is."""
    return report["novelty"]["spectrogram"]["verdict"]["share"]


def in_short(trainings: dict[str, dict[str, Any]], reports: dict[str, dict[str, Any]]) -> str:
    """README's figures: training, distance, notes, copies."""
    report = next(iter(reports.values()))
    name, controls = next(iter(report["distances"].items()))

    def of_each(figure: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(f"{figure(own)} for `{model}`" for model, own in reports.items())

    lines = [f"`{model}` has seen {history(training)}." for model, training in trainings.items()]
    lines += ["Fréchet distance from held-out music: "
              f"{of_each(lambda own: _frechet(own['distances'][name]['model']))}, "
              f"{_frechet(controls['real'])} for other real music, {_frechet(controls['noise'])} for white noise.",
              f"Notes a second: {of_each(lambda own: _notes(own, 'model'))}, {_notes(report, 'reference')} "
              "for real music.",
              *_left_over(reports),
              f"Blocks suspected of being copies: {of_each(lambda own: f'{copies(own):.1%}')}, 1 % for held-out music."]
    return "".join(f"- {line}\n" for line in lines)


def _left_over(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What is not made of notes, from the reports that have this ruler."""
    tables = {model: own["not_notes"] for model, own in reports.items() if "not_notes" in own}
    if not tables:
        return []
    figures = ", ".join(f"{table['model']['left_over']:.1%} for `{model}`" for model, table in tables.items())
    real = next(iter(tables.values()))["real"]["left_over"]    # the reports share their controls
    return [f"What is not made of a piano's notes: {figures}, {real:.1%} for real music."]


def _frechet(row: dict[str, Any]) -> str:
    return f"{row['frechet']:.2f}"


def _notes(report: dict[str, Any], whose: str) -> str:
    return f"{report['statistics']['notes_per_second'][whose]['median']:.1f}"


def losses(training: dict[str, Any]) -> str:
    validation = training["validation"]
    rows = [f"| {sigma} | {loss:.3f} |" for sigma, loss in validation["loss"].items()]
    return (f"Weighted loss (Eqs. 25 and 33) on {validation['blocks']} blocks of the {validation['split']} split, with "
            "their predecessors. A network\nthat always answers 0 has a loss of 1 at every noise level.\n\n"
            + table("| sigma | loss |", rows))


def cost(trainings: dict[str, dict[str, Any]]) -> str:
    """Hours, and the energy that these may have taken."""
    text = ""
    for model, training in trainings.items():
        energy = [sum((watts if device == "cpu" else GPU_WATTS) * hours
                      for device, (_, hours) in seen(training).items()) for watts in WATTS]
        litres = [watt_hours * 3600 / (4186 * 80) for watt_hours in energy]    # from 20 °C
        text += (f"`{model}` has seen {history(training)}.\nThat took {between(*energy, 0)} Wh, enough to boil "
                 f"{between(*litres, 1)} litres of water.\n")
    return text + (f"We assume that a core draws {between(*WATTS, 0)} W, and that the GPU draws its limit of "
                   f"{GPU_WATTS} W.\n")


def models() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Configuration and report of each model that ships to be played, the smallest first."""
    folders = sorted((path.parent for path in MODELS.glob("*/report.json")),
                     key=lambda folder: (folder / "model.safetensors").stat().st_size)
    return {folder.name: tuple(json.loads((folder / name).read_text()) for name in ("config.json", "report.json"))
            for folder in folders}


def guides() -> dict[str, dict[str, Any]]:
    """The training of each model that ships without a report: it guides others."""
    return {path.parent.name: json.loads(path.read_text())["training"] for path in sorted(MODELS.glob("*/config.json"))
            if not path.with_name("report.json").is_file()}


def parts(shipped: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[Path, str]:
    """Each file's part between its marks."""
    trainings = {model: config["training"] for model, (config, _) in shipped.items()}
    reports = {model: report for model, (_, report) in shipped.items()}
    ages = "".join(f"`{model}` has seen {history(training)}.\n" for model, training in trainings.items())
    cards = {MODELS / model / "README.md": f"It has seen {history(training)}.\n\n{losses(training)}\n"
             + "\n".join(measure({model: reports[model]}) for measure in (distances, music, sampled))
             for model, training in trainings.items()}
    cards |= {MODELS / guide / "README.md": f"It has seen {history(training)}.\n\n{losses(training)}\n"
              for guide, training in guides().items()}
    return cards | {ROOT / "README.md": f"{in_short(trainings, reports)}\n{sampled(reports)}",
                    ROOT / "book" / "bench.md": f"{ages}\n{distances(reports)}\n{music(reports)}\n{sampled(reports)}",
                    ROOT / "book" / "related.md": cost(trainings)}


if __name__ == "__main__":
    for path, made in parts(models()).items():
        path.write_text(update(path.read_text(), made, "models"))
