"""What the samplers cost beyond the network, beside k-diffusion's and diffusers': equal evaluations, equal results.

All of a call counts but the time within the network: noise levels, preconditioning, checks, the solver's sums.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import Record, append, compare, k_diffusion, peer, seconds
from torch import Tensor, nn

from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.model import PRESETS
from pianodiff.sampler import dpmpp_2m_sample, euler_sample, heun_sample
from pianodiff.unet import UNet

Contender = Callable[[nn.Module, Tensor, int], Tensor]  # (network, latents, num_steps) -> samples
OURS = {"heun": heun_sample, "euler": euler_sample, "dpmpp_2m": dpmpp_2m_sample}
EDM_SCHEDULERS = {"euler": "EDMEulerScheduler", "dpmpp_2m": "EDMDPMSolverMultistepScheduler"}


class Idle(nn.Module):
    """A network that returns its input and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # float32, like a network's

    def forward(self, x: Tensor, c_noise: Tensor, cond: None = None) -> Tensor:
        return x


class Meter(nn.Module):
    """A network that counts its evaluations and the seconds that they take."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.evaluations, self.seconds = net, 0, 0.0

    def forward(self, x: Tensor, c_noise: Tensor, cond: None = None) -> Tensor:
        begin = time.perf_counter()
        out = self.net(x, c_noise, cond)
        self.seconds += time.perf_counter() - begin
        self.evaluations += 1
        return out


def ours(name: str, net: nn.Module, z: Tensor, num_steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return OURS[name](Denoiser(net), z, num_steps=num_steps, dtype=dtype)


def contenders(name: str) -> dict[str, Contender]:
    """Ours in float32, as the others compute, and in float64, its default; and what is installed of the others."""
    found: dict[str, Contender] = {"pianodiff": partial(ours, name),
                                   "pianodiff in float64": partial(ours, name, dtype=torch.float64)}
    if k := k_diffusion():
        @torch.no_grad()
        def theirs(net: nn.Module, z: Tensor, num_steps: int) -> Tensor:
            sigmas = k.sampling.get_sigmas_karras(num_steps, 0.002, 80.0)
            return getattr(k.sampling, f"sample_{name}")(Denoiser(net), z * sigmas[0], sigmas, disable=True)

        found["k-diffusion"] = theirs
    if diffusers := peer("diffusers", "diffusers"):
        if name == "heun":
            found["diffusers"] = partial(heun_of_diffusers, diffusers.HeunDiscreteScheduler(prediction_type="sample"))
        else:
            found["diffusers"] = partial(edm_of_diffusers, getattr(diffusers, EDM_SCHEDULERS[name])())
    return found


@torch.no_grad()
def edm_of_diffusers(scheduler: Any, net: nn.Module, z: Tensor, num_steps: int) -> Tensor:
    """A pipeline's loop: the preconditioning is the scheduler's, the network is bare."""
    scheduler.set_timesteps(num_steps)
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
    return x


@torch.no_grad()
def heun_of_diffusers(scheduler: Any, net: nn.Module, z: Tensor, num_steps: int) -> Tensor:
    """Its preconditioning and noise levels are others, so `Denoiser` does the one, and Eq. (27)'s replace the other."""
    denoise, levels = Denoiser(net), karras_sigmas(num_steps).float()
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    scheduler.set_begin_index(0)
    x = z * levels[0]
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(denoise(x, sigma), t, x).prev_sample
    return x


def metered(sample: Contender, net: nn.Module, z: Tensor, num_steps: int) -> tuple[Meter, float]:
    """The network's meter after one call, and the seconds that were spent outside of the network."""
    meter = Meter(net)
    total = seconds(lambda: sample(meter, z, num_steps))
    return meter, total - meter.seconds


def microseconds(*call: Any) -> float:
    """Beyond the network, for one evaluation of it."""
    meter, beyond = metered(*call)
    return 1e6 * beyond / meter.evaluations


def percent(*call: Any) -> float:
    """Beyond the network, of the time within it."""
    meter, beyond = metered(*call)
    return 100 * beyond / meter.seconds


def overhead(name: str, net: nn.Module | None = None, *, shape: tuple[int, ...] = (1, 1, 256, 128),
             evaluations: int = 17, runs: int = 15) -> Record:
    """One sampler and its peers on the same latents: microseconds an evaluation, or per cent of the network's time.

    Without a network they ask one that takes no time. Raises AssertionError where results or evaluations differ.
    """
    num_steps, z = (evaluations + 1) // 2 if name == "heun" else evaluations, torch.randn(shape)
    calls = {who: (sample, net or Idle(), z, num_steps) for who, sample in contenders(name).items()}
    wanted = calls["pianodiff"][0](*calls["pianodiff"][1:])
    for call in calls.values():
        torch.testing.assert_close(call[0](*call[1:]), wanted, atol=0.01, rtol=0.01)
        assert metered(*call)[0].evaluations == evaluations
    what, unit, measure = ("idle", "µs an evaluation", microseconds) if net is None else ("nano", "%", percent)
    measures = {who: partial(measure, *call) for who, call in calls.items()}
    peers = [who for who in calls if "pianodiff" not in who]
    return compare(f"sampler beyond the network: {name}, {what}", unit, measures, runs=runs, peers=peers,
                   evaluations=evaluations, shape=list(shape))


def records() -> Iterator[Record]:
    nano = UNet(PRESETS["nano"]).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name in OURS:
        yield overhead(name)
        yield overhead(name, nano, runs=7)


if __name__ == "__main__":
    append(records())
