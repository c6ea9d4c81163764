"""How fast one trains and prepares: blocks a second through the network, hours of sound a minute into a store."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, append, compare, devices, peer, seconds

from pianodiff.audio import SPECTROGRAMS, save_audio
from pianodiff.data import prepare
from pianodiff.edm import Denoiser, edm_loss
from pianodiff.model import PRESETS
from pianodiff.recipe import Way, fastest, native_bf16, ways_to_try
from pianodiff.synth import example_performance
from pianodiff.unet import UNet, UNetConfig


def steps(config: UNetConfig, device: str, batch_size: int, num_steps: int, compiled: bool) -> Callable[[], float]:
    """Blocks a second through loss, gradient and AdamW's step, computed in the way that `train` would choose."""
    net = UNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        net.compile()
    denoiser, optimizer = Denoiser(net), torch.optim.AdamW(net.parameters())
    y = torch.randn(batch_size, 1, config.n_bins, config.n_frames, device=device)
    cond = (y.flip(0), torch.rand(batch_size, device=device) > 0.15)

    def gradient(way: Way) -> None:
        optimizer.zero_grad(set_to_none=True)
        with way.on(y.device):
            loss = edm_loss(denoiser, y, cond).mean()
        loss.backward()

    way = Way("bf16" if native_bf16(y.device) else "no")
    if device == "cpu":
        way = fastest(lambda way: seconds(partial(gradient, way)), ways_to_try(compiled), compiled=compiled)

    def work() -> None:
        for _ in range(num_steps):
            gradient(way)
            optimizer.step()

    return lambda: batch_size * num_steps / seconds(work, device)


def training(name: str, config: UNetConfig, device: str = "cpu", *, batch_size: int = 16, num_steps: int = 5,
             compiled: bool = True, runs: int = 5) -> Record:
    """Blocks a second, eager and compiled."""
    ways = {"eager": False, "compiled": True} if compiled else {"eager": False}
    contenders = {way: steps(config, device, batch_size, num_steps, is_compiled) for way, is_compiled in ways.items()}
    return compare(f"training {name}", "blocks/s", contenders, runs=runs, device=device, batch_size=batch_size)


def preparation(*, minutes: float = 4.0, count: int = 8, jobs: int | None = None, runs: int = 5) -> Record:
    """Hours of sound (WAV, 8 kHz) that `prepare` puts into a store in one minute, the start of its jobs included."""
    def hours_a_minute(folder: Path) -> float:
        with tempfile.TemporaryDirectory() as store:
            work = partial(prepare, folder, Path(store, "store"), SPECTROGRAMS["nano"], jobs=jobs)
            return count * minutes / seconds(work)

    with tempfile.TemporaryDirectory() as name:
        for seed in range(count):
            save_audio(Path(name, f"take {seed}.wav"), example_performance(60 * minutes, seed))
        return compare("preparation of WAV files", "hours/min", {"pianodiff": partial(hours_a_minute, Path(name))},
                       runs=runs)


def engines(*, minutes: float = 10.0, count: int = 8, runs: int = 5) -> Record:
    """Hours of sound a minute by one process, by two, and by a Dask cluster of two workers on this machine, if there is
    Dask. The start of the two processes counts, and that of the cluster does not: a cluster is there before.
    """
    distributed = peer("distributed", "distributed")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        ways: dict[str, dict[str, Any]] = {"one process": {"jobs": 1}, "two processes": {"jobs": 2}}
        if distributed:
            cluster = stack.enter_context(distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None))
            ways["Dask, two workers"] = {"cluster": cluster.scheduler_address}
        for seed in range(count):
            save_audio(Path(name, f"take {seed}.wav"), example_performance(60 * minutes, seed))

        def hours_a_minute(how: dict[str, Any]) -> float:
            with tempfile.TemporaryDirectory() as store:
                work = partial(prepare, name, Path(store, "store"), SPECTROGRAMS["nano"], **how)
                return count * minutes / seconds(work)

        return compare("preparation by engine", "hours/min", {way: partial(hours_a_minute, how)
                                                              for way, how in ways.items()}, runs=runs)


def records() -> Iterator[Record]:
    yield preparation()
    yield engines()
    for device in devices():
        yield training("nano", PRESETS["nano"], device, batch_size=16 if device == "cpu" else 64)


if __name__ == "__main__":
    append(records())
