"""How fast the spine is here: hours prepared per minute, images per second in training, generation against real time.

Prints median, minimum and maximum of each, and appends them as a JSON line to bench/results.jsonl.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pianodiff.audio import SPECTROGRAMS, save_audio
from pianodiff.data import example_performance, prepare
from pianodiff.edm import Denoiser, edm_loss
from pianodiff.generate import Piano
from pianodiff.unet import PRESETS, UNet


def repeat(measure: Callable[[], float], times: int = 5) -> dict[str, float]:
    """Median, minimum and maximum of a figure, after one run to warm up."""
    measure()
    values = [measure() for _ in range(times)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def real_time_factor(seconds: float = 10.24, num_steps: int = 40) -> float:
    """Seconds of work for one second of music, with the shipped model."""
    piano = Piano.from_pretrained("nano")
    begin = time.perf_counter()
    piano.generate(seconds, seed=0, num_steps=num_steps)
    return (time.perf_counter() - begin) / seconds


def training_speed(compiled: bool, batch_size: int = 16, steps: int = 10) -> Callable[[], float]:
    """Blocks a second through loss, gradient and AdamW's step."""
    net = UNet(PRESETS["nano"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        net.compile()
    denoiser, optimizer = Denoiser(net), torch.optim.AdamW(net.parameters())
    y = torch.randn(batch_size, 1, net.config.n_bins, net.config.n_frames)
    cond = (y.flip(0), torch.rand(batch_size) > 0.15)

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            edm_loss(denoiser, y, cond).mean().backward()
            optimizer.step()
        return batch_size * steps / (time.perf_counter() - begin)

    return measure


def hours_per_minute(folder: Path, minutes: float = 4.0, count: int = 8) -> Callable[[], float]:
    """Hours of sound (WAV, 8 kHz) that `prepare` puts into a store in one minute, the processes' start included."""
    for seed in range(count):
        save_audio(folder / f"take {seed}.wav", example_performance(60 * minutes, seed))

    def measure() -> float:
        with tempfile.TemporaryDirectory() as store:
            begin = time.perf_counter()
            prepare(folder, Path(store, "store"), SPECTROGRAMS["nano"])
            return count * minutes / (time.perf_counter() - begin)

    return measure


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "generation, seconds a second (40 Heun steps)": repeat(real_time_factor),
            "generation, seconds a second (18 Heun steps)": repeat(lambda: real_time_factor(num_steps=18)),
            "training, blocks a second (eager)": repeat(training_speed(False)),
            "training, blocks a second (compiled)": repeat(training_speed(True)),
            "preparation, hours a minute (WAV)": repeat(hours_per_minute(Path(folder)), 3),
        }
    for name, figures in results.items():
        print(f"{name:<48}" + "   ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
               "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    with open(Path(__file__).with_name("results.jsonl"), "a") as file:
        file.write(json.dumps({"bench": "spine", "time": time.strftime("%Y-%m-%d"), **machine, **results}) + "\n")


if __name__ == "__main__":
    main()
