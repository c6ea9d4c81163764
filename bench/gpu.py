"""What a GPU does for this package, in one command of less than six minutes, without a network.

    python bench/gpu.py              # on a GPU; appends to bench/results.jsonl, then: python bench/table.py
    python bench/gpu.py --small      # tiny, in seconds, as it is without a GPU; keeps nothing

Data loading, training with each preset, eager and compiled, its share of the rate that a large product of bfloat16
matrices has there, and generation at several batch sizes. Figures are printed as they come, so that a run that is cut
off has told what it measured. Every part has its own time: what would exceed it is left out, with a line that says so.
The compiled networks come from the smallest to the largest, so the largest is the first to be left out.
"""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from common import RESULTS, Record, append, compare, seconds
from torch.utils.flop_counter import FlopCounterMode
from training import steps

from pianodiff.audio import SpectrogramConfig, save_audio
from pianodiff.data import BlockDataset, prepare
from pianodiff.files import ahead
from pianodiff.generate import Piano
from pianodiff.model import PRESETS, count
from pianodiff.phases import to_wave
from pianodiff.recipe import TrainConfig, draw_batch
from pianodiff.synth import example_performance
from pianodiff.unet import UNet, UNetConfig

TINY = UNetConfig(n_bins=16, n_frames=8, channels=(8, 16), blocks=(1, 1), attention=("", "ft"), emb_channels=16,
                  cond_channels=(8, 8))
BATCHES = {"nano": 256, "base": 128, "paper-128": 32, "paper-256": 8}
# Seconds that the parts may take: 330 in all
BUDGETS = {"loading": 40.0, "eager": 80.0, "compiled": 140.0, "generation": 70.0}


def operations(config: UNetConfig) -> int:
    """Floating-point operations of a step of training for one block: convolutions and products, there and back."""
    with torch.device("meta"):
        net, x = UNet(config), torch.empty(1, 1, config.n_bins, config.n_frames)
    with FlopCounterMode(display=False) as counter:
        net(x, x.new_empty(1), x).sum().backward()
    return counter.get_total_flops()


def product(device: str, size: int) -> float:
    """Operations a second of a product of two bfloat16 matrices `[size, size]`, the best of five."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))


def peak(device: str) -> float | None:
    """The most memory that tensors have had on the GPU, in GB."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.startswith("cuda") else None


def training(name: str, config: UNetConfig, device: str, batch: int, compiled: bool, rate: float) -> Record:
    """Blocks a second, with the memory and the share of the `rate` of a product."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    contender = steps(config, device, batch, 10 if on_gpu else 1, compiled)
    record = compare(f"training {name}, {'compiled' if compiled else 'eager'}", "blocks/s", {"pianodiff": contender},
                     runs=5, device=device, batch_size=batch)
    share = record["results"]["pianodiff"]["median"] * operations(config) / rate
    record["facts"] |= {"share": float(f"{share:.3g}"), "peak_gb": peak(device)}
    print("  batch {batch_size}, {share:.1%} of the product's rate, peak {peak_gb} GB".format_map(record["facts"]),
          flush=True)
    return record


def _send(made: Any, make: Callable[[], Record]) -> None:
    made.send(make())


def within(limit: float, make: Callable[[], Record]) -> Record | None:
    """`make()` in a process that is ended after `limit` seconds; None where it was, or failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()
    record = None
    with contextlib.suppress(EOFError):
        record = ours.recv() if ours.poll(limit) else None
    process.kill()
    process.join()
    return record


def here(limit: float, make: Callable[[], Record]) -> Record | None:
    """`make()` in this process, whose end nobody forces; None where the GPU's memory does not hold it."""
    try:
        return make()
    except torch.OutOfMemoryError:
        return None


def while_time_lasts(budget: float, makes: Mapping[str, Callable[[], Record]],
                     run: Callable[[float, Callable[[], Record]], Record | None] = here) -> Iterator[Record]:
    """The records of what is begun within `budget` seconds, and a line for each that is left out."""
    end = time.monotonic() + budget
    for name, make in makes.items():
        left = end - time.monotonic()
        if record := run(left, make) if left > 0 else None:
            yield record
        else:
            print(f"\n{name}: left out, as {budget:g} s were too few for all of these, or as it failed", flush=True)


def trainings(device: str, rate: float, compiled: bool) -> dict[str, Callable[[], Record]]:
    """Every preset's training, the smallest first."""
    names = sorted(PRESETS, key=lambda name: count(PRESETS[name])[1])
    return {f"training {name}, {'compiled' if compiled else 'eager'}":
            partial(training, name, PRESETS[name], device, BATCHES[name], compiled, rate) for name in names}


def loading(device: str, *, minutes: float, count: int, batch: int, batches: int) -> Record:
    """Blocks a second that `train`'s threads read, from the disk and from memory; the store's sound is made here."""
    cfg, config = SpectrogramConfig(), TrainConfig(preset="nano", batch_size=batch, images=batch * batches)
    with tempfile.TemporaryDirectory() as name:
        music, store = Path(name, "music"), Path(name, "store")
        music.mkdir()
        for seed in range(count):
            save_audio(music / f"{seed}.wav", example_performance(60 * minutes, seed))
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(music, store, cfg, splits=["train"], jobs=1)

        def blocks_a_second(data: BlockDataset) -> float:
            def read(step: int) -> None:
                drawn = draw_batch(data, len(data), config, step)
                for tensor in drawn.values():
                    (tensor.pin_memory() if device.startswith("cuda") else tensor).to(device)

            return batch * batches / seconds(lambda: [*ahead(read, range(batches), config.workers)], device)

        ways = {"from memory": True, "from the disk": False}
        contenders = {way: partial(blocks_a_second, BlockDataset(store, "train", random_offset=True, in_memory=memory))
                      for way, memory in ways.items()}
        return compare("loading of blocks", "blocks/s", contenders, runs=5, device=device, batch_size=batch,
                       workers=config.workers)


def generation(name: str, device: str, *, batch: int, blocks: int, **setting: Any) -> Record:
    """Seconds of music a second, of pieces side by side, phase retrieval included."""
    piano = Piano.from_pretrained(name, device)
    length = blocks * piano.cfg.block_seconds

    def play() -> None:
        for spec in piano.spectrograms(length, range(batch), **setting):
            to_wave(spec, piano.cfg)

    return compare(f"generation with {name}, {batch} side by side", "s of music a second",
                   {"pianodiff": lambda: batch * length / seconds(play, device)}, runs=5, device=device, blocks=blocks)


def records(device: str) -> Iterator[Record]:
    """The whole measurement on a GPU."""
    rate = product(device, 8192)
    print(f"a product of bfloat16 matrices: {rate / 1e12:.4g} TFLOP/s", flush=True)
    load = {"loading": partial(loading, device, minutes=4, count=8, batch=256, batches=20)}
    play = {f"generation with {name}, {batch} side by side": partial(generation, name, device, batch=batch, blocks=3)
            for name, batch in (("nano", 1), ("nano", 8), ("base", 1), ("base", 64), ("nano", 64))}
    yield from while_time_lasts(BUDGETS["loading"], load)
    yield from while_time_lasts(BUDGETS["eager"], trainings(device, rate, False))
    yield from while_time_lasts(BUDGETS["generation"], play)
    yield from while_time_lasts(BUDGETS["compiled"], trainings(device, rate, True), within)


def small(device: str = "cpu") -> Iterator[Record]:
    """The same paths in seconds: a tiny network, and nothing compiled."""
    rate = product(device, 128)
    yield loading(device, minutes=0.1, count=1, batch=2, batches=2)
    yield training("tiny", TINY, device, 2, False, rate)
    print("\ntraining tiny, compiled: left out, since compiling takes a minute")
    yield generation("nano", device, batch=2, blocks=1, num_steps=1)


def main(small_: Annotated[bool, tyro.conf.arg(name="small")] = False) -> None:
    """Measure; keep what was measured on a GPU."""
    begin = time.monotonic()
    if small_ or not torch.cuda.is_available():
        for _ in small():
            pass
    else:
        append(records("cuda"), RESULTS)
    print(f"\n{time.monotonic() - begin:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main)
