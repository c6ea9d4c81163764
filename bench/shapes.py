"""Which shape suits `nano`: networks of about its cost, each trained for equal minutes on the same blocks.

    python bench/shapes.py recordings.zarr runs --minutes 10 --cores 1

The noise between the partials is decided at sigma from 0.3 to 3, so that is where the losses are told, on blocks held
out. Costs are milliseconds of an evaluation at batch 2 on all cores, in turn, as `generate` asks for it under
guidance. Prints a table, and keeps it as runs/shapes.json. What was interrupted goes on.
"""

import csv
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from common import seconds
from network import build, inputs
from training import steps

from pianodiff.files import write_whole
from pianodiff.model import PRESETS, count
from pianodiff.recipe import TrainConfig
from pianodiff.train import train
from pianodiff.unet import UNetConfig

BATCH = 32
SIGMAS = ("val_0.1", "val_0.3", "val_1", "val_3", "val_10")


def shapes() -> dict[str, UNetConfig]:
    """`nano`; more work at the coarse levels; fewer channels where pixels are many; attention to pitch early."""
    nano = PRESETS["nano"]
    return {
        "nano: 32, 64, 128; 1, 1, 1": nano,
        "blocks 1, 1, 2": replace(nano, blocks=(1, 1, 2)),
        "channels 32, 64, 192": replace(nano, channels=(32, 64, 192)),
        "channels 24, 48, 128; blocks 1, 1, 2": replace(nano, channels=(24, 48, 128), blocks=(1, 1, 2)),
        "a fourth level of 128": replace(nano, channels=(32, 64, 128, 128), blocks=(1, 1, 1, 1), context=32,
                                         attention=("", "f+t", "ft", "ft")),
        "attention along frequency at the finest": replace(nano, attention=("f", "f+t", "ft")),
    }


@torch.inference_mode()
def costs(networks: dict[str, UNetConfig], runs: int = 15) -> dict[str, float]:
    """Milliseconds of one evaluation at batch 2, the past encoded beforehand: the median of runs taken in turn."""
    nets = {name: build(config) for name, config in networks.items()}
    given = {name: inputs(config, 2) for name, config in networks.items()}
    pasts = {name: net.encode(given[name][2]) for name, net in nets.items()}
    rounds = [{name: seconds(lambda: net(*given[name][:2], pasts[name])) for name, net in nets.items()}  # noqa: B023
              for _ in range(runs + 1)][1:]
    return {name: 1000 * statistics.median(figures[name] for figures in rounds) for name in nets}


def speeds(networks: dict[str, UNetConfig], runs: int = 3) -> dict[str, float]:
    """Blocks a second through loss, gradient and step: the median of runs taken in turn."""
    contenders = {name: steps(shape, "cpu", BATCH, 4, compiled=False) for name, shape in networks.items()}
    rounds = [{name: speed() for name, speed in contenders.items()} for _ in range(runs)]
    return {name: statistics.median(figures[name] for figures in rounds) for name in networks}


def losses(store: Path, run: Path, shape: UNetConfig, images: int, batch: int = BATCH) -> dict[str, float]:
    """The losses on blocks held out, after so many blocks."""
    config = TrainConfig(unet=shape, images=images, batch_size=batch, lr=1e-3, warmup_images=images // 10,
                         decay_fraction=0.6, ema_std=0.1, eval_images=images, snapshot_images=images, workers=1)
    train(store, run, config)
    with open(run / "log.csv") as file:
        last = [row for row in csv.DictReader(file) if row["val_1"]][-1]
    return {name: float(last[name]) for name in SIGMAS}


def main(store: Path, runs: Path, /, minutes: float = 10.0, cores: Annotated[int, tyro.conf.arg(
        help="threads of a training; the costs are measured on all")] = 1) -> None:
    """Train each shape for equal minutes; print the table."""
    runs.mkdir(parents=True, exist_ok=True)
    networks, kept = shapes(), runs / "shapes.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    if not done:    # all at first, so that they meet the same machine
        for name, speed in speeds(networks).items():
            done[name] = {"blocks": int(60 * minutes * speed / BATCH) * BATCH}
        write_whole(kept, json.dumps(done, indent=1).encode())
    for number, (name, shape) in enumerate(networks.items()):
        if SIGMAS[0] not in done[name]:
            done[name] |= losses(store, runs / f"shape{number}", shape, done[name]["blocks"])
            write_whole(kept, json.dumps(done, indent=1).encode())
    torch.set_num_threads(threads)
    for name, milliseconds in costs(networks).items():
        parameters, macs = count(networks[name])
        done[name] |= {"ms": milliseconds, "parameters": parameters, "GMAC": macs / 1e9}
    write_whole(kept, json.dumps(done, indent=1).encode())
    columns = [*next(iter(done.values()))]
    print("| " + " | ".join(["shape", *columns]) + " |\n|" + "---|" * (len(columns) + 1))
    for name, figures in done.items():
        print("| " + " | ".join([name, *(f"{figures[column]:.4g}" for column in columns)]) + " |")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (OSError, ValueError) as error:
        sys.exit(f"shapes: {error}")
