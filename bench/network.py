"""The network alone: one evaluation by memory layout and back end, its share of the machine's peak, blocks a second."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from common import Record, append, compare, devices, seconds

from pianodiff import NUM_STEPS, SAMPLER
from pianodiff.edm import Denoiser
from pianodiff.generate import SAMPLERS
from pianodiff.model import PRESETS, count
from pianodiff.unet import UNet, UNetConfig

NETWORKS = {name: PRESETS[name] for name in ("nano", "base")}


def build(config: UNetConfig, device: str = "cpu", layout: torch.memory_format = torch.channels_last) -> UNet:
    """A network for inference, of random weights: they take the same time."""
    net = UNet(config).eval().requires_grad_(False).to(device)
    return net.to(memory_format=layout)  # type: ignore[call-overload]


def inputs(config: UNetConfig, batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy blocks, their noise levels, the blocks before them."""
    x = torch.randn(batch, 1, config.n_bins, config.n_frames, device=device)
    return x, torch.zeros(batch, device=device), x.flip(2)


@torch.inference_mode()
def evaluation(name: str, config: UNetConfig, *, runs: int = 15) -> Record:
    """Milliseconds for one evaluation at batch 1 as `generate` asks for it, the block before encoded beforehand."""
    x, c_noise, prev = inputs(config, 1)
    nets = {"eager, channels last": build(config), "eager, contiguous": build(config, layout=torch.contiguous_format)}
    pasts = {way: net.encode(prev) for way, net in nets.items()}

    def milliseconds(way: str) -> float:
        return 1000 * seconds(lambda: nets[way](x, c_noise, pasts[way]))

    return compare(f"one evaluation of {name}", "ms", {way: partial(milliseconds, way) for way in nets}, runs=runs)


@torch.inference_mode()
def arithmetic(name: str, config: UNetConfig, device: str = "cpu", *, batches: Sequence[int] = (1, 8), size: int = 2048,
               runs: int = 7) -> Record:
    """GFLOP/s of the network at some batch sizes, beside a product of two float32 matrices `[size, size]`.

    On a GPU the product may use TF32, as convolutions do there unasked.
    """
    net, matrix = build(config, device), torch.randn(size, size, device=device)
    work = 2e-9 * count(config)[1]

    def gflops(batch: int) -> float:
        return work * batch / seconds(lambda: net(*given[batch]), device)

    def product() -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if device.startswith("cuda") else before)
        try:
            return 2e-9 * size**3 / seconds(lambda: matrix @ matrix, device)
        finally:
            torch.set_float32_matmul_precision(before)

    given = {batch: inputs(config, batch, device) for batch in batches}
    contenders: dict[str, Callable[[], float]] = {f"matrix product, {size}": product}
    contenders |= {f"{name}, batch {batch}": partial(gflops, batch) for batch in batches}
    return compare(f"arithmetic of {name}", "GFLOP/s", contenders, runs=runs, device=device)


@torch.inference_mode()
def sampling(name: str, config: UNetConfig, device: str = "cpu", *, batches: Sequence[int] = (1, 8),
             runs: int = 5) -> Record:
    """Blocks sampled a second, at the sampler and steps that `generate` has by default."""
    net = build(config, device)

    def blocks_a_second(batch: int) -> float:
        x, _, prev = inputs(config, batch, device)
        past = net.encode(prev)
        return batch / seconds(lambda: SAMPLERS[SAMPLER](Denoiser(net), x, past, num_steps=NUM_STEPS), device)

    contenders = {f"batch {batch}": partial(blocks_a_second, batch) for batch in batches}
    return compare(f"sampling with {name}", "blocks/s", contenders, runs=runs, device=device,
                   sampler=SAMPLER, num_steps=NUM_STEPS)


def records() -> Iterator[Record]:
    for name, config in NETWORKS.items():
        yield evaluation(name, config)
    for device in devices():
        for name, config in NETWORKS.items():
            if device == "cpu":  # here bench/generation.py tells how fast one samples
                yield arithmetic(name, config)
            else:
                yield arithmetic(name, config, device, batches=(1, 64), size=8192)
                yield sampling(name, config, device, batches=(1, 64))


if __name__ == "__main__":
    append(records())
