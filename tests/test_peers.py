"""The samplers against others' of the same name (chapter 7): k-diffusion's, and the schedulers of diffusers.

The same noise levels, latents, denoiser and noise, in float64; their samplers on our `Denoiser`, and ours on their
wrappers. Without these packages the tests skip, except in CI (where the variable CI is set): there they fail.
"""

import importlib
import importlib.util
import inspect
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pianodiff.sampler
from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.generate import Piano
from pianodiff.sampler import dpmpp_2m_sample, dpmpp_3m_sde_sample, euler_ancestral_sample, euler_sample, heun_sample
from pianodiff.unet import UNet, UNetConfig

CENTRES = torch.tensor([[-0.6, -0.4, 0.1], [0.6, -0.4, 0.0], [0.0, 0.7, -0.3]], dtype=torch.float64)
SPREADS = torch.tensor([0.08, 0.2, 0.4], dtype=torch.float64)
exactly = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)


def needed(package: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is missing: pip install {install}")


@pytest.fixture(scope="module")
def k():
    """k-diffusion's modules `sampling`, `external` and `layers`, as the bench loads them."""
    needed("k_diffusion", "--no-deps k-diffusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
        return importlib.import_module("common").k_diffusion()


@pytest.fixture(scope="module")
def diffusers():
    needed("diffusers", "diffusers")
    return importlib.import_module("diffusers")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_from(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def clouds(x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
    """The ideal denoiser of a mixture of Gaussian clouds in space: x [B, 3], sigma 0-d or [B]."""
    sigma = sigma.reshape(-1, 1)
    total = SPREADS**2 + sigma**2  # [B or 1, clouds]
    square = (x[:, None] - CENTRES).square().sum(2)
    chance = (-square / (2 * total) - 1.5 * total.log()).softmax(1)
    means = (SPREADS[:, None] ** 2 * x[:, None] + sigma[..., None] ** 2 * CENTRES) / total[..., None]
    return (chance[..., None] * means).sum(1)


@pytest.fixture(scope="module")
def network() -> Denoiser:
    """Our `Denoiser` around our UNet, small and with random weights in all its layers."""
    net = UNet(UNetConfig(n_bins=16, n_frames=8, channels=(8, 16), blocks=(1, 1), attention=("", "ft"),
                          emb_channels=16, cond_channels=(8, 8), adaptive=True, coordinates=True)).double().eval()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = parameter.data + 0.1 * normal(*parameter.shape, seed=i)
    return Denoiser(net)


@pytest.fixture(params=["clouds", "network"])
def problem(request, network):
    """A denoiser, latents for it, and a condition."""
    if request.param == "clouds":
        return clouds, normal(20, 3), None
    return network, normal(2, 1, 16, 8), normal(2, 1, 16, 8, seed=1)


SCHEDULES = {"into 0": karras_sigmas(12), "not into 0": karras_sigmas(12)[:-1], "one step": karras_sigmas(1),
             "two steps": torch.tensor([20.0, 0.3, 0.0], dtype=torch.float64),
             "nano's own": karras_sigmas(12, **Piano.from_pretrained("nano", "cpu").noise_levels)}
OURS = {"heun": heun_sample, "euler": euler_sample, "dpmpp_2m": dpmpp_2m_sample, "dpmpp_3m_sde": dpmpp_3m_sde_sample,
        "euler_ancestral": euler_ancestral_sample}
CASES = [("heun", {}), ("euler", {}), ("dpmpp_2m", {}),
         ("dpmpp_3m_sde", {"eta": 0.0}), ("dpmpp_3m_sde", {"eta": 0.4}), ("dpmpp_3m_sde", {"eta": 1.0, "S_noise": 0.9}),
         ("euler_ancestral", {"eta": 0.0}), ("euler_ancestral", {"eta": 0.4}),
         ("euler_ancestral", {"eta": 1.0, "S_noise": 1.1})]


def compare_with_k_diffusion(k, name, options, problem, sigmas, ours=None):
    """Both from start to end, and all that their callbacks see."""
    denoise, z, cond = problem
    seen, theirs_seen, theirs = [], [], {key.lower(): value for key, value in options.items()}
    if "eta" in options:
        options, draw = {**options, "randn_like": noise_from(5)}, noise_from(5)
        theirs["noise_sampler"] = lambda sigma, sigma_next: draw(z)
    found = (ours or OURS[name])(denoise, z, cond, sigmas=sigmas, callback=seen.append, **options)
    expected = getattr(k.sampling, f"sample_{name}")(denoise, z * sigmas[0], sigmas, extra_args={"cond": cond},
                                                     callback=theirs_seen.append, disable=True, **theirs)
    for mine, other in zip(seen, theirs_seen, strict=True):
        assert mine.keys() == other.keys() and mine["i"] == other["i"]
        for key in ("sigma", "sigma_hat", "x", "denoised"):
            exactly(mine[key], other[key])
    exactly(found, expected)


@pytest.mark.parametrize("schedule, name, options", [
    (schedule, *case) for schedule in SCHEDULES for case in CASES
    if (schedule, case[0]) != ("one step", "dpmpp_3m_sde")  # theirs fails where the first step is the last
])
def test_k_diffusion(k, problem, name, options, schedule):
    """Their samplers on our `Denoiser` and ours on it, step by step."""
    compare_with_k_diffusion(k, name, options, problem, SCHEDULES[schedule])


@pytest.mark.parametrize("name", ["heun", "euler"])
@pytest.mark.parametrize("options", [
    {"S_churn": 3.0}, {"S_churn": 100.0, "S_noise": 1.007}, {"S_churn": 4.0, "S_min": 0.05, "S_max": 50.0},
])
def test_k_diffusion_with_churn_and_the_same_seed(k, problem, name, options):
    denoise, z, cond = problem
    sigmas = karras_sigmas(12)
    theirs = {{"S_min": "s_tmin", "S_max": "s_tmax"}.get(key, key.lower()): value for key, value in options.items()}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = OURS[name](denoise, z, cond, sigmas=sigmas, **options)
        torch.manual_seed(3)
        expected = getattr(k.sampling, f"sample_{name}")(denoise, z * sigmas[0], sigmas, extra_args={"cond": cond},
                                                         disable=True, **theirs)
    exactly(found, expected)


def test_forty_steps(k, problem):
    for name in ("heun", "dpmpp_2m"):
        compare_with_k_diffusion(k, name, {}, problem, karras_sigmas(40))


def mutated(function, old: str, new: str):
    """The function with a part of its source replaced."""
    source = inspect.getsource(function)
    assert source.count(old) == 1
    namespace = dict(vars(pianodiff.sampler))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


@pytest.mark.parametrize("name, options, old, new", [
    ("heun", {}, "if t_next > 0:", "if False:"),  # no corrector
    ("heun", {}, "/ 2 * (d_cur + d_prime)", "* d_prime"),
    ("dpmpp_2m", {}, "(2 * h[i - 1])", "(2.001 * h[i - 1])"),
    ("dpmpp_3m_sde", {"eta": 1.0}, "w_2 / 2", "w_2"),  # the whole parabola: chapter 7 shows what it does
    ("euler_ancestral", {"eta": 1.0}, "t_up = eta", "t_up = 0.999 * eta"),
])
def test_a_changed_solver_is_noticed(k, problem, name, options, old, new):
    """The comparisons above fail for these, and for their right cause: with its source unchanged the solver passes."""
    compare_with_k_diffusion(k, name, options, problem, karras_sigmas(12), mutated(OURS[name], old, old))
    with pytest.raises(AssertionError, match="not close"):
        compare_with_k_diffusion(k, name, options, problem, karras_sigmas(12), mutated(OURS[name], old, new))


def test_k_diffusion_noise_levels(k):
    """Theirs are made in float32, so their own schedule can't serve for a comparison in float64."""
    torch.testing.assert_close(k.sampling.get_sigmas_karras(18, 0.002, 80.0).double(), karras_sigmas(18),
                               atol=1e-9, rtol=2e-5)


def inner(x: Tensor, t: Tensor, **_) -> Tensor:
    """A network that does not care whether its noise level is 0-d or [B]."""
    return torch.sin(2 * x + t.reshape(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("name, options", CASES[:4] + CASES[-1:])
def test_on_the_wrappers_of_k_diffusion(k, name, options):
    """Ours on their v-prediction and on their preconditioning, where sigma comes 0-d instead of [B]."""
    for wrapper in (k.external.VDenoiser(inner), k.layers.Denoiser(inner, sigma_data=0.5)):
        def denoise(x: Tensor, sigma: Tensor, cond: None, wrapper=wrapper) -> Tensor:
            return wrapper(x, sigma)

        compare_with_k_diffusion(k, name, options, (denoise, normal(4, 1, 5, 3), None), karras_sigmas(12))


def test_the_denoiser_of_k_diffusion_is_ours(k):
    """Karras et al.'s preconditioning, but theirs hands sigma itself to the network."""
    ours = Denoiser(lambda x, c_noise, cond: inner(x, (4 * c_noise).exp()))
    x, sigma = normal(6, 2, 3), karras_sigmas(6)[:-1]
    exactly(k.layers.Denoiser(inner, sigma_data=0.5)(x, sigma), ours(x, sigma))


def run_scheduler(scheduler, sigmas: Tensor, z: Tensor, model, **options) -> Tensor:
    """A pipeline's loop in float64: the scheduler's own levels are float32, so ours take their place.

    `model(x, sigma, timestep)` is asked at each of them but the last.
    """
    scheduler.set_timesteps(len(sigmas) - 1)
    if "Heun" in type(scheduler).__name__:  # every level twice, but for the first and the last
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    else:
        scheduler.timesteps = scheduler.precondition_noise(sigmas[:-1])
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    x = z * sigmas[0]
    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(model(x, sigma, timestep), timestep, x, **options).prev_sample
    return x


def raw(denoiser: Denoiser, scheduler, cond: Tensor):
    """What a pipeline asks of a network: preconditioning is the scheduler's part, not our `Denoiser`'s."""
    return lambda x, sigma, t: denoiser.net(scheduler.scale_model_input(x, t), t.expand(len(x)), cond)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own use of numpy
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_diffusers_heun(diffusers, problem, steps):
    denoise, z, cond = problem
    sigmas = karras_sigmas(steps)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    with torch.no_grad():
        expected = run_scheduler(scheduler, sigmas, z, lambda x, sigma, _: denoise(x, sigma, cond))
    exactly(heun_sample(denoise, z, cond, sigmas=sigmas), expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 12])
@pytest.mark.parametrize("ours, scheduler_options", [
    (euler_sample, {"solver_order": 1}),
    (dpmpp_2m_sample, {"solver_order": 2}),
    (partial(dpmpp_3m_sde_sample, eta=0.0), {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}),
    (euler_ancestral_sample, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
])
def test_diffusers_dpm_solver(diffusers, network, ours, scheduler_options, steps):
    """Their scheduler with the bare network, ours with the `Denoiser` around it; the noise from equal generators."""
    z, cond, sigmas = normal(2, 1, 16, 8), normal(2, 1, 16, 8, seed=1), karras_sigmas(steps)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(**scheduler_options)
    with torch.no_grad():
        expected = run_scheduler(scheduler, sigmas, z, raw(network, scheduler, cond),
                                 generator=torch.Generator().manual_seed(9))
    own = {"randn_like": noise_from(9)} if ours is euler_ancestral_sample else {}
    exactly(ours(network, z, cond, sigmas=sigmas, **own), expected)


def test_diffusers_euler(diffusers, network):
    """It rounds each x to float32. Its churn is no peer: it adds the noise after the network has been asked."""
    z, cond, sigmas = normal(2, 1, 16, 8), normal(2, 1, 16, 8, seed=1), karras_sigmas(12)
    scheduler = diffusers.EDMEulerScheduler()
    with torch.no_grad():
        expected = run_scheduler(scheduler, sigmas, z, raw(network, scheduler, cond))
    torch.testing.assert_close(euler_sample(network, z, cond, sigmas=sigmas), expected, atol=1e-5, rtol=1e-5)


def test_diffusers_noise_levels(diffusers):
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0, rho=5.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(scheduler.sigmas.double(), karras_sigmas(18, 0.01, 20.0, 5.0), atol=1e-9, rtol=1e-6)


def test_on_a_network_of_diffusers(diffusers):
    """Our `Denoiser` around their UNet, their preconditioning around it, and their scheduler: all the same."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
                                 norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    unet = unet.double().eval()
    denoiser, z = Denoiser(lambda x, c_noise, cond: unet(x, c_noise).sample), normal(2, 1, 8, 8)
    sigmas = karras_sigmas(8)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()

    def theirs(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        model_output = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        return scheduler.precondition_outputs(x, model_output, sigma)

    for sample in (heun_sample, dpmpp_2m_sample):
        exactly(sample(theirs, z, sigmas=sigmas), sample(denoiser, z, sigmas=sigmas))
    with torch.no_grad():
        expected = run_scheduler(scheduler, sigmas, z,
                                 lambda x, sigma, t: unet(scheduler.scale_model_input(x, t), t).sample)
    exactly(dpmpp_2m_sample(denoiser, z, sigmas=sigmas), expected)
    assert expected.std() > 0.1
