"""Writes what was measured of the shipped models into README, cards and book, between `<!-- models -->` marks.

All of it is read from what training (config.json) and `pianodiff evaluate` (report.json) left beside the weights.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from table import update

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "pianodiff" / "weights"
CONTROLS = {"real": "other real music: the floor",
            "retrieved": "the same through spectrogram and phase retrieval: the ceiling"}
STATISTICS = {"notes_per_second": ("notes a second", 1), "polyphony": ("notes that sound at once", 1),
              "register": ("register, median MIDI pitch", 0), "key_clarity": ("clarity of the key", 2),
              "level": ("level, dBFS", 1), "flatness": ("spectral flatness, dB", 1)}
GPU_WATTS = 700    # an H100's or H200's limit, by their datasheets
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
    times = [f"in {hours:.1f} hours on one core of a shared CPU" if device == "cpu" else
             f"in {60 * hours:.0f} minutes on one {device}" for device, (_, hours) in goes.items()]
    counts = [blocks for blocks, _ in goes.values()]
    if len(goes) == 1:
        return f"{counts[0]:,} blocks {times[0]}"
    return f"{sum(counts):,} blocks: " + ", then ".join(f"{n:,} {time}" for n, time in zip(counts, times, strict=True))


def between(low: float, high: float, digits: int) -> str:
    """An interval, with signs that can't be taken for its dash; or the one figure that both its ends are."""
    ends = dict.fromkeys(f"{end:.{digits}f}" for end in (low, high))
    return " – ".join(ends).replace("-", "−")


def table(header: str, rows: list[str]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|---" * columns + "|", *rows]) + "\n"


def distances(reports: dict[str, dict[str, Any]]) -> str:
    """The rows under the first embedding: the controls, which all models share, and each model's."""
    report = next(iter(reports.values()))
    name, controls = next(iter(report["distances"].items()))
    found = ({label: controls[key] for key, label in CONTROLS.items()}
             | {f"**{model}**": report["distances"][name]["model"] for model, report in reports.items()}
             | {"white noise": controls["noise"]})
    rows = [f"| {label} | {row['frechet']:.2f} | {between(*row['frechet_interval'], 1)} | {row['kernel']:.3f} "
            f"| {between(*row['kernel_interval'], 3)} |" for label, row in found.items()]
    clips, pieces, floor = controls["model"]["clips"], controls["model"]["pieces"], report["floors"][name]["real"]
    reference = report["reference"]
    away = ", ".join(f"`{model}` {spread(report['floors'][name]['model'])}" for model, report in reports.items())
    return (f"Distance of {clips} blocks from {reference['blocks']:,} blocks of {reference['pieces']} "
            f"performances that no model was trained on, to the built-in embedding `{name.partition('-')[0]}`:\n\n"
            + table(f"| {clips} blocks of | Fréchet | 95 % | kernel | 95 % |", rows)
            + f"\nThe intervals are over pieces, {pieces} by a model and {controls['real']['pieces']} "
            "real ones, and about infinitely many of them: so few real\npieces tell little of real music. Over "
            f"{len(floor)} random splits by title, the Fréchet distance of other real music from the rest is\n"
            f"{spread(floor)}. From the same references lies {away}.\n")


def spread(values: list[float]) -> str:
    """The least, the most, and the median."""
    return f"{min(values):.1f} to {max(values):.1f} (median {median(values):.1f})"


def music(reports: dict[str, dict[str, Any]]) -> str:
    """The medians of models' blocks beside those of real music and noise, and how surely their joins can be told."""
    report = next(iter(reports.values()))
    columns = [(found, "model") for found in reports.values()] + [(report, "reference"), (report, "noise")]
    rows = ["| " + " | ".join([label, *(f"{found['statistics'][key][whose]['median']:.{digits}f}"
                                        for found, whose in columns)]) + " |"
            for key, (label, digits) in STATISTICS.items()]
    flux = [found["joins"]["model"]["flux"]["auc"] for found in reports.values()]
    real = report["joins"]["real neighbours"]["flux"]["auc"]
    rows += ["| probability that a join shows more flux than a block's middle | "
             + " | ".join(f"{auc:.2f}" for auc in [*flux, real]) + " | |"]
    copies = [found["novelty"]["spectrogram"]["verdict"]["share"] for found in reports.values()]
    rows += ["| blocks as near to a training passage as the nearest 1 % of held-out music | "
             + " | ".join([*(f"{share:.1%}" for share in copies), "1 %"]) + " | |"]
    return ("Medians of blocks, joins, and copies. The noise is white, at the levels of real blocks: where it "
            "comes near\nmusic, a median says little.\n\n"
            + table(f"| | {' | '.join(reports)} | real music | white noise |", rows))


def losses(training: dict[str, Any]) -> str:
    validation = training["validation"]
    rows = [f"| {sigma} | {loss:.3f} |" for sigma, loss in validation["loss"].items()]
    return (f"Weighted loss (Eqs. 25 and 33) on {validation['blocks']} blocks of the {validation['split']} split, with "
            "their predecessors. A network\nthat answers nothing has loss 1 at every noise level.\n\n"
            + table("| sigma | loss |", rows))


def cost(trainings: dict[str, dict[str, Any]]) -> str:
    """Hours, and the energy that these may have taken."""
    text = ""
    for model, training in trainings.items():
        energy = [sum((watts if device == "cpu" else GPU_WATTS) * hours
                      for device, (_, hours) in seen(training).items()) for watts in WATTS]
        litres = [watt_hours * 3600 / (4186 * 80) for watt_hours in energy]    # from 20 °C
        text += (f"`{model}` has seen {told(training)}.\nThat took {between(*energy, 0)} Wh, as much as it takes "
                 f"to boil {between(*litres, 1)} litres of water.\n")
    return text + f"A core is taken to draw {between(*WATTS, 0)} W, and the GPU {GPU_WATTS} W, the most that it may.\n"


def models() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Configuration and report of each model that ships, the smallest first."""
    folders = sorted(MODELS.iterdir(), key=lambda folder: (folder / "model.safetensors").stat().st_size)
    return {folder.name: tuple(json.loads((folder / name).read_text()) for name in ("config.json", "report.json"))
            for folder in folders}


def parts(found: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[Path, str]:
    """Each file's part between its marks."""
    trainings = {model: config["training"] for model, (config, _) in found.items()}
    reports = {model: report for model, (_, report) in found.items()}
    ages = "".join(f"`{model}` has seen {told(training)}.\n" for model, training in trainings.items())
    cards = {MODELS / model / "README.md": f"It has seen {told(training)}.\n\n{losses(training)}\n"
             + "\n".join(measure({model: reports[model]}) for measure in (distances, music))
             for model, training in trainings.items()}
    return cards | {ROOT / "README.md": f"{ages}\n{distances(reports)}\n{music(reports)}",
                    ROOT / "book" / "related.md": cost(trainings)}


if __name__ == "__main__":
    for path, made in parts(models()).items():
        path.write_text(update(path.read_text(), made, "models"))
