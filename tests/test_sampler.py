"""The samplers against closed forms and against a plain second writing of Algorithm 2 (chapter 7)."""

import math

import pytest
import torch
from torch import Tensor, nn

from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.sampler import euler_sample, heun_sample

MEAN, STD = 0.3, 0.5
SAMPLERS = [heun_sample, euler_sample]


def gaussian(x, sigma, cond=None):
    """The ideal denoiser of Gaussian data."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact(z, sigma_max=80.0):
    """Where the probability-flow ODE takes sigma_max * z."""
    return MEAN + STD * (z * sigma_max - MEAN) / math.sqrt(STD**2 + sigma_max**2)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_from(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


class Net(nn.Module):
    """Nonlinear, with a condition."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x, c_noise, cond):
        return torch.sin(self.conv(torch.cat([x, cond], 1)) + c_noise[:, None, None, None])


def reference(net, latents, cond, num_steps, noise, S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, heun=True):
    """Algorithm 2 in plain floats; asks the network as NVlabs' sampler does, in the corrector as k-diffusion's."""
    high, low = min(80.0, net.sigma_max) ** (1 / 7), max(0.002, net.sigma_min) ** (1 / 7)
    t = [float(net.round_sigma((high + i * (low - high) / (num_steps - 1)) ** 7)) for i in range(num_steps)] + [0.0]
    x = latents.double() * t[0]
    for i in range(num_steps):
        drawn = S_noise * noise(x) if S_churn else torch.zeros_like(x)
        raised = t[i] * (1 + (min(S_churn / num_steps, 2**0.5 - 1) if S_min <= t[i] <= S_max else 0))
        x = x + math.sqrt(max(raised**2 - t[i] ** 2, 0)) * drawn
        slope = (x - net(x, torch.tensor(raised, dtype=torch.float64), cond)) / raised
        there = x + (t[i + 1] - raised) * slope
        if heun and i + 1 < num_steps:
            sigma = torch.full((len(x),), t[i + 1], dtype=torch.float64)  # one for each item, as k-diffusion gives it
            slope = 0.5 * slope + 0.5 * (there - net(there, sigma, cond)) / t[i + 1]
            there = x + (t[i + 1] - raised) * slope
        x = there
    return x


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("options", [
    {}, {"S_churn": 3.0}, {"S_churn": 100.0, "S_noise": 1.01},
    {"S_churn": 5.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 0.9},
])
def test_agrees_with_a_plain_writing_of_algorithm_2(sample, options):
    denoiser, latents, cond = Denoiser(Net().double()), normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    found = sample(denoiser, latents, cond, num_steps=12, randn_like=noise_from(7), **options)
    with torch.no_grad():
        expected = reference(denoiser, latents, cond, 12, noise_from(7), heun=sample is heun_sample, **options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_agrees_over_forty_steps():
    denoiser = Denoiser(lambda x, c_noise, cond: torch.tanh(x + c_noise[:, None]))
    z = normal(50, 3)
    found = heun_sample(denoiser, z, num_steps=40)
    torch.testing.assert_close(found, reference(denoiser, z, None, 40, None), atol=1e-12, rtol=1e-12)


def test_forty_heun_steps_follow_the_closed_form():
    z = torch.linspace(-4, 4, 801, dtype=torch.float64)
    assert (heun_sample(gaussian, z, num_steps=40) - exact(z)).abs().max() < 0.02
    assert (heun_sample(gaussian, z, num_steps=320) - exact(z)).abs().max() < 0.0003


@pytest.mark.parametrize("sample, order", [(euler_sample, 1), (heun_sample, 2)])
def test_order_of_convergence(sample, order):
    """Without the corrector Heun's error would fall with order 1."""
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)
    coarse, fine = ((sample(gaussian, z, num_steps=n) - exact(z)).abs().max() for n in (100, 200))
    assert float(torch.log2(coarse / fine)) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_one_step_is_the_first_guess(sample):
    z = normal(5)
    torch.testing.assert_close(sample(gaussian, z, num_steps=1), gaussian(80 * z, 80.0), atol=1e-12, rtol=1e-12)


def test_what_the_denoiser_is_asked():
    asked = []

    def spy(x, sigma, cond):
        asked.append((x.dtype, sigma.dtype, sigma.shape, float(sigma), cond, torch.is_grad_enabled()))
        return gaussian(x, sigma)

    t = karras_sigmas(3).tolist()
    for sample, levels in ((heun_sample, [t[0], t[1], t[1], t[2], t[2]]), (euler_sample, t[:3])):
        asked.clear()
        sample(spy, normal(2, 1, 4, 4), "condition", num_steps=3)
        assert [a[3] for a in asked] == levels
        assert {(*a[:3], *a[4:]) for a in asked} == {(torch.float64, torch.float64, (), "condition", False)}
    heun_sample(spy, normal(2), num_steps=3, dtype=torch.float32)
    assert asked[-1][:2] == (torch.float32, torch.float32)


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_latents_keep_shape_dtype_and_values(sample, dtype):
    latents = normal(2, 1, 4, 6).to(dtype)
    before = latents.clone()
    found = sample(gaussian, latents, num_steps=5)
    assert found.dtype == dtype and found.shape == latents.shape and torch.equal(latents, before)
    torch.testing.assert_close(found, sample(gaussian, latents.double(), num_steps=5).to(dtype))


@pytest.mark.parametrize("sample", SAMPLERS)
def test_schedule_may_be_given(sample):
    z, sigmas = normal(4), karras_sigmas(7, 0.01, 20.0, 5.0)
    expected = sample(gaussian, z, num_steps=7, sigma_min=0.01, sigma_max=20.0, rho=5.0, S_churn=2.0,
                      randn_like=noise_from(1))
    for given in (sigmas, sigmas.tolist(), tuple(sigmas.tolist())):
        found = sample(gaussian, z, sigmas=given, S_churn=2.0, randn_like=noise_from(1))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    stopped = sample(gaussian, z, sigmas=karras_sigmas(2000, sigma_min=1.0)[:-1])  # not at 0: noise of level 1 is left
    left = MEAN + (80 * z - MEAN) * math.sqrt((STD**2 + 1) / (STD**2 + 6400))
    torch.testing.assert_close(stopped, left, atol=0.01, rtol=0)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_callback_sees_every_step(sample):
    steps, z = [], normal(6)
    sample(gaussian, z, num_steps=4, S_churn=1.0, randn_like=noise_from(0), callback=steps.append)
    assert [s["i"] for s in steps] == [0, 1, 2, 3]
    assert [float(s["sigma"]) for s in steps] == karras_sigmas(4)[:-1].tolist()
    for step in steps:
        assert float(step["sigma_hat"]) == pytest.approx(1.25 * float(step["sigma"]))
        torch.testing.assert_close(step["denoised"], gaussian(step["x"], step["sigma_hat"]))
    noise = (steps[0]["x"] - 80 * z) / (80 * 0.75)  # sqrt(1.25^2 - 1) = 0.75
    torch.testing.assert_close(noise, noise_from(0)(z))


@pytest.mark.parametrize("sample", SAMPLERS)
def test_only_churn_draws_noise(sample):
    z = normal(3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = sample(gaussian, z, num_steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, sample(gaussian, z, num_steps=4))
    draws = [sample(gaussian, z, num_steps=4, S_churn=9.0, randn_like=noise_from(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("S_churn", [0.5, 10, 100])
def test_churn_keeps_the_distribution(S_churn):
    z = normal(40_000)
    found = heun_sample(gaussian, z, num_steps=100, S_churn=S_churn, randn_like=noise_from(1))
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01) and float(found.std()) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("options, words", [
    ({"num_steps": 0}, "num_steps"),
    ({"sigma_min": 90.0}, "sigma_min"),
    ({"sigmas": [1.0, 2.0, 0.0]}, "fall at every step"),
    ({"sigmas": [1.0, 1.0, 0.0]}, "fall at every step"),
    ({"sigmas": [2.0, 0.0, -1.0]}, "0 or above"),
    ({"sigmas": [math.inf, 1.0, 0.0]}, "finite"),
    ({"sigmas": [math.nan, 1.0, 0.0]}, "finite"),
    ({"sigmas": [1.0]}, "at least two"),
    ({"sigmas": [[1.0, 0.0]]}, "at least two"),
    ({"S_churn": -1.0}, "S_churn"),
    ({"S_churn": math.nan}, "S_churn"),
    ({"S_noise": math.inf}, "S_noise"),
    ({"S_min": 2.0, "S_max": 1.0}, "S_min"),
    ({"latents": torch.tensor([math.nan])}, "latents"),
    ({"latents": torch.tensor([1, 2])}, "latents"),
    ({"latents": torch.tensor(1.0)}, "latents"),
    ({"denoise": lambda x, sigma, cond: x[:1]}, r"step 0: the denoiser returned shape \[1, 3\] for x of \[2, 3\]"),
    ({"denoise": lambda x, sigma, cond: x / (sigma > 1.0)}, "the denoiser returned NaN or infinity at sigma = 0.47"),
])
def test_bad_input_is_refused_in_one_line(sample, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        sample(**{"denoise": gaussian, "latents": normal(2, 3), "num_steps": 4, **options})
    assert "\n" not in str(caught.value)


def test_nan_in_the_corrector_is_reported_at_its_step():
    calls = []

    def broken(x, sigma, cond):
        calls.append(sigma)
        return gaussian(x, sigma) * (math.nan if len(calls) == 4 else 1)

    with pytest.raises(ValueError, match="step 1: the denoiser returned NaN"):
        heun_sample(broken, normal(3), num_steps=5)
