"""Writes what was measured of the shipped model into README, its card and the book, between `<!-- nano -->` marks.

All of it is read from what training (config.json) and `pianodiff evaluate` (report.json) left beside the weights.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from table import update

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "pianodiff" / "weights" / "nano"
ROWS = {"real": "other real music: the floor",
        "retrieved": "the same through spectrogram and phase retrieval: the ceiling",
        "model": "**nano**", "noise": "white noise"}
STATISTICS = {"notes_per_second": ("notes a second", 1), "polyphony": ("notes that sound at once", 1),
              "register": ("register, median MIDI pitch", 0), "key_clarity": ("clarity of the key", 2),
              "level": ("level, dBFS", 1), "flatness": ("spectral flatness, dB", 1)}
GPU_WATTS = 700    # an H200's limit, by its datasheet
WATTS = (5, 15)    # a busy core of a server, its share of memory, supplies and cooling included: an assumption


def runs(training: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's trainings, the last one first."""
    yield training
    if ancestor := training.get("ancestor"):
        yield from runs(ancestor)


def seen(training: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Blocks and hours of all its trainings, by the device that they ran on."""
    found: dict[str, tuple[int, float]] = {}
    for run in reversed([*runs(training)]):
        blocks, hours = found.get(device := run.get("device", "cpu"), (0, 0.0))
        found[device] = blocks + run["images"], hours + run["seconds"] / 3600
    return found


def told(training: dict[str, Any]) -> str:
    """How much it has seen, where and in what time."""
    goes = seen(training)
    parts = [f"{blocks:,} in " + (f"{hours:.1f} hours on one core of a shared CPU" if device == "cpu" else
                                  f"{60 * hours:.0f} minutes on one {device}")
             for device, (blocks, hours) in goes.items()]
    return f"{sum(blocks for blocks, _ in goes.values()):,} blocks: {', then '.join(parts)}"


def between(low: float, high: float, digits: int) -> str:
    """An interval, with signs that can't be taken for its dash."""
    return f"{low:.{digits}f} – {high:.{digits}f}".replace("-", "−")


def table(header: str, rows: list[str]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|---" * columns + "|", *rows]) + "\n"


def distances(report: dict[str, Any]) -> str:
    """The four rows under the first embedding."""
    name, found = next(iter(report["distances"].items()))
    rows = [f"| {label} | {row['frechet']:.2f} | {between(*row['frechet_interval'], 1)} | {row['kernel']:.3f} "
            f"| {between(*row['kernel_interval'], 3)} |" for key, label in ROWS.items() for row in [found[key]]]
    clips, reference, floors = found["model"]["clips"], report["reference"], report["floors"][name]
    real, model = (f"{min(row):.1f} to {max(row):.1f} (median {median(row):.1f})"
                   for row in (floors["real"], floors["model"]))
    return (f"Distance of {clips} blocks from {reference['blocks']:,} blocks of {reference['pieces']} "
            f"performances that it was not trained on, to the built-in embedding `{name.partition('-')[0]}`:\n\n"
            + table(f"| {clips} blocks of | Fréchet | 95 % | kernel | 95 % |", rows)
            + f"\nThe intervals are over pieces, {found['model']['pieces']} by the model and {found['real']['pieces']} "
            "real ones, and about infinitely many of them: so few real\npieces tell little of real music. Over "
            f"{len(floors['real'])} random splits by title, the Fréchet distance of other real music from the rest is\n"
            f"{real}, that of the model from the same references {model}.\n")


def music(report: dict[str, Any]) -> str:
    """The medians of the model's blocks beside those of real music and noise, and how surely its joins can be told."""
    rows = ["| " + " | ".join([label, *(f"{report['statistics'][key][whose]['median']:.{digits}f}"
                                        for whose in ("model", "reference", "noise"))]) + " |"
            for key, (label, digits) in STATISTICS.items()]
    flux = {name: f"{row['flux']['auc']:.2f}" for name, row in report["joins"].items()}
    rows += ["| probability that a join shows more flux than a block's middle "
             f"| {flux['model']} | {flux['real neighbours']} | |"]
    copies = report["novelty"]["spectrogram"]["verdict"]["share"]
    rows += ["| blocks as near to a training passage as the nearest 1 % of held-out music "
             f"| {copies:.1%} | 1 % | |"]
    return ("Medians of its blocks, its joins, and copies. The noise is white, at the levels of real blocks: where it "
            "comes near\nmusic, a median says little.\n\n" + table("| | nano | real music | white noise |", rows))


def losses(training: dict[str, Any]) -> str:
    validation = training["validation"]
    rows = [f"| {sigma} | {loss:.3f} |" for sigma, loss in validation["loss"].items()]
    return (f"Weighted loss (Eqs. 25 and 33) on {validation['blocks']} blocks of the {validation['split']} split, with "
            "their predecessors. A network\nthat answers nothing has loss 1 at every noise level.\n\n"
            + table("| sigma | loss |", rows))


def cost(training: dict[str, Any]) -> str:
    """Hours, and the energy that these may have taken."""
    energy = [sum((watts if device == "cpu" else GPU_WATTS) * hours for device, (_, hours) in seen(training).items())
              for watts in WATTS]
    litres = [watt_hours * 3600 / (4186 * 80) for watt_hours in energy]    # from 20 °C
    return (f"`nano` has seen {told(training)}.\nAt {between(*WATTS, 0)} W for the core, and {GPU_WATTS} W for the GPU "
            f"(what it may draw at most), that took {between(*energy, 0)} Wh: as much as it takes\nto boil "
            f"{between(*litres, 1)} litres of water.\n")


def parts(config: dict[str, Any], report: dict[str, Any]) -> dict[Path, str]:
    """Each file's part between its marks."""
    training = config["training"]
    age = f"It has seen {told(training)}.\n"
    measured = f"{distances(report)}\n{music(report)}"
    return {ROOT / "README.md": f"{age}\n{measured}",
            MODEL / "README.md": f"{age}\n{losses(training)}\n{measured}",
            ROOT / "book" / "related.md": cost(training)}


if __name__ == "__main__":
    found = parts(*(json.loads((MODEL / name).read_text()) for name in ("config.json", "report.json")))
    for path, made in found.items():
        path.write_text(update(path.read_text(), made, "nano"))
