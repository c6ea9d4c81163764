"""The samplers against closed forms and against a plain second writing of Algorithm 2 (chapter 7)."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.sampler import dpmpp_2m_sample, dpmpp_3m_sde_sample, euler_ancestral_sample, euler_sample, heun_sample

MEAN, STD = 0.3, 0.5
CHURNING, NOISY = [heun_sample, euler_sample], [euler_ancestral_sample, dpmpp_3m_sde_sample]
SAMPLERS = [*CHURNING, dpmpp_2m_sample, *NOISY]
STILL = [*CHURNING, dpmpp_2m_sample, *(partial(sample, eta=0.0) for sample in NOISY)]  # no noise on the way


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


def seeded(sample, seed: int = 3) -> dict:
    """The keyword that makes a noisy solver repeatable, for those that have it."""
    return {} if sample is dpmpp_2m_sample else {"randn_like": noise_from(seed)}


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
    high, low = net.sigma_max ** (1 / 7), max(0.002, net.sigma_min) ** (1 / 7)
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


@pytest.mark.parametrize("sample", CHURNING)
@pytest.mark.parametrize("options", [
    {}, {"S_churn": 3.0}, {"S_churn": 100.0, "S_noise": 1.01},
    {"S_churn": 5.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 0.9},
])
@pytest.mark.parametrize("sigma_max", [80.0, 400.0])
def test_agrees_with_a_plain_writing_of_algorithm_2(sample, options, sigma_max):
    denoiser = Denoiser(Net().double(), sigma_max=sigma_max)
    latents, cond = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    found = sample(denoiser, latents, cond, num_steps=12, sigma_max=sigma_max, randn_like=noise_from(7), **options)
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


def test_dpmpp_2m_follows_the_closed_form_with_half_of_heuns_evaluations():
    z = torch.linspace(-4, 4, 801, dtype=torch.float64)
    assert (dpmpp_2m_sample(gaussian, z, num_steps=40) - exact(z)).abs().max() < 0.022
    assert (dpmpp_2m_sample(gaussian, z, num_steps=320) - exact(z)).abs().max() < 0.0003


def test_dpmpp_3m_without_noise_is_nearer_still():
    """The parabola makes the error a ninth of 2M's; with w_2 whole it would be a fifth."""
    z = torch.linspace(-4, 4, 801, dtype=torch.float64)
    assert (dpmpp_3m_sde_sample(gaussian, z, num_steps=40, eta=0.0) - exact(z)).abs().max() < 0.0025


@pytest.mark.parametrize("sample, order", list(zip(STILL, [2, 1, 2, 1, 2], strict=True)))
def test_order_of_convergence(sample, order):
    """Without the corrector Heun's error would fall with order 1, and without a memory 2M's and 3M's."""
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)
    coarse, fine = ((sample(gaussian, z, num_steps=n) - exact(z)).abs().max() for n in (100, 200))
    assert float(torch.log2(coarse / fine)) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("sample", STILL)
def test_a_constant_answer_is_followed_exactly(sample):
    """x - D shrinks with sigma, whatever the steps, where D stays the same."""
    z, sigmas = normal(7), [50.0, 3.0, 2.0, 0.4, 0.1]
    answer = normal(7, seed=1)
    found = sample(lambda x, sigma, cond: answer, z, sigmas=sigmas)
    torch.testing.assert_close(found, answer + 0.1 / 50 * (50 * z - answer), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9])
def test_the_last_step_is_what_the_denoiser_says(sample, num_steps):
    steps = []
    found = sample(gaussian, normal(6), num_steps=num_steps, callback=steps.append)
    torch.testing.assert_close(found, steps[-1]["denoised"], atol=1e-13, rtol=0)


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
    for sample in SAMPLERS:
        levels = [t[0], t[1], t[1], t[2], t[2]] if sample is heun_sample else t[:3]
        asked.clear()
        sample(spy, normal(2, 1, 4, 4), "condition", num_steps=3)
        assert [a[3] for a in asked] == levels
        assert {(*a[:3], *a[4:]) for a in asked} == {(torch.float64, torch.float64, (), "condition", False)}
        sample(spy, normal(2), num_steps=3, dtype=torch.float32)
        assert asked[-1][:2] == (torch.float32, torch.float32)


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_latents_keep_shape_dtype_and_values(sample, dtype):
    latents = normal(2, 1, 4, 6).to(dtype)
    before = latents.clone()
    found = sample(gaussian, latents, num_steps=5, **seeded(sample))
    assert found.dtype == dtype and found.shape == latents.shape and torch.equal(latents, before)
    torch.testing.assert_close(found, sample(gaussian, latents.double(), num_steps=5, **seeded(sample)).to(dtype))


@pytest.mark.parametrize("sample", SAMPLERS)
def test_schedule_may_be_given(sample):
    z, sigmas, churn = normal(4), karras_sigmas(7, 0.01, 20.0, 5.0), {"S_churn": 2.0} if sample in CHURNING else {}
    expected = sample(gaussian, z, num_steps=7, sigma_min=0.01, sigma_max=20.0, rho=5.0, **churn, **seeded(sample))
    for given in (sigmas, sigmas.tolist(), tuple(sigmas.tolist())):
        found = sample(gaussian, z, sigmas=given, **churn, **seeded(sample))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sample", STILL)
def test_schedule_need_not_reach_zero(sample):
    z = normal(4)
    stopped = sample(gaussian, z, sigmas=karras_sigmas(2000, sigma_min=1.0)[:-1])  # not at 0: noise of level 1 is left
    left = MEAN + (80 * z - MEAN) * math.sqrt((STD**2 + 1) / (STD**2 + 6400))
    torch.testing.assert_close(stopped, left, atol=0.01, rtol=0)


@pytest.mark.parametrize("sample", NOISY)
def test_noise_may_stay(sample):
    """Stopped at noise of level 1, the distribution is that of data and noise."""
    found = sample(gaussian, normal(40_000), sigmas=karras_sigmas(200, sigma_min=1.0)[:-1], **seeded(sample))
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(math.sqrt(STD**2 + 1), abs=0.02)


@pytest.mark.parametrize("sample", CHURNING)
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


@pytest.mark.parametrize("sample", [dpmpp_2m_sample, *NOISY])
def test_callback_without_churn(sample):
    steps, z, t = [], normal(6), karras_sigmas(4)
    found = sample(gaussian, z, num_steps=4, callback=steps.append)
    assert [s["i"] for s in steps] == [0, 1, 2, 3]
    assert all(float(s["sigma"]) == float(s["sigma_hat"]) == float(level) for s, level in zip(steps, t, strict=False))
    torch.testing.assert_close(steps[0]["x"], 80 * z)
    for step in steps:
        torch.testing.assert_close(step["denoised"], gaussian(step["x"], step["sigma"]))
    assert len({float(s["x"][0]) for s in steps} | {float(found[0])}) == 5


@pytest.mark.parametrize("sample", STILL)
def test_without_noise_nothing_is_drawn(sample):
    z = normal(3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = sample(gaussian, z, num_steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, sample(gaussian, z, num_steps=4))


@pytest.mark.parametrize("sample, options, draws", [
    (heun_sample, {"S_churn": 9.0}, 4), (euler_sample, {"S_churn": 9.0, "S_max": 1.0}, 4),
    (euler_ancestral_sample, {}, 3), (dpmpp_3m_sde_sample, {"eta": 0.1}, 3),
    (dpmpp_3m_sde_sample, {"sigmas": [9.0, 4.0, 1.0]}, 2),  # not into 0
])
def test_noise_is_the_callers(sample, options, draws):
    z, asked = normal(3), []

    def counted(noise):
        return lambda x: asked.append(x.shape) or noise(x)

    a, b, c = (sample(gaussian, z, num_steps=4, randn_like=counted(noise_from(seed)), **options) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and asked == [z.shape] * 3 * draws


@pytest.mark.parametrize("sample", NOISY)
def test_noise_is_scaled(sample):
    z = normal(5)
    torch.testing.assert_close(sample(gaussian, z, sigmas=[5.0, 1.0], S_noise=0.0, **seeded(sample)),
                               sample(gaussian, z, sigmas=[5.0, 1.0], randn_like=torch.zeros_like))
    one, two, none = (sample(gaussian, z, sigmas=[5.0, 1.0], S_noise=s, **seeded(sample)) for s in (1.0, 2.0, 0.0))
    torch.testing.assert_close(two - none, 2 * (one - none))
    torch.testing.assert_close(one - none, math.sqrt(1 - 1 / 25) * noise_from(3)(z))  # the noise of Eq. (down-up)


def test_solvers_that_coincide():
    z, two = normal(50), {"sigmas": [30.0, 0.7, 0.0]}
    equal = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
    equal(euler_ancestral_sample(gaussian, z, eta=0.0), euler_sample(gaussian, z))
    for still in STILL[2:]:  # no step but the first and the last: nothing to remember
        equal(still(gaussian, z, **two), euler_sample(gaussian, z, **two))
    found, expected = (sample(gaussian, z, **two, **seeded(sample)) for sample in NOISY)
    equal(found, expected)


@pytest.mark.parametrize("sample, options", [
    (euler_ancestral_sample, {"num_steps": 400}), (euler_ancestral_sample, {"num_steps": 400, "eta": 0.3}),
    (dpmpp_3m_sde_sample, {"num_steps": 100}), (dpmpp_3m_sde_sample, {"num_steps": 100, "eta": 0.3}),
    (dpmpp_3m_sde_sample, {"num_steps": 200, "eta": 2.0}),
])
def test_noise_keeps_the_distribution(sample, options):
    z = normal(40_000)
    found = sample(gaussian, z, randn_like=noise_from(1), **options)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.std()) == pytest.approx(STD, abs=0.012)
    if options.get("eta", 1) >= 1:  # the latents are forgotten
        assert abs(torch.corrcoef(torch.stack([found, z]))[0, 1]) < 0.02


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
    ({"sigmas": [0.0, 0.0]}, "fall at every step"),
    ({"num_steps": 2.5}, "num_steps"),
    ({"latents": torch.tensor([math.nan])}, "latents"),
    ({"latents": torch.tensor([1, 2])}, "latents"),
    ({"latents": torch.tensor(1.0)}, "latents"),
    ({"latents": normal(0, 3)}, r"latents must be .* B > 0; .*\[0, 3\]"),
    ({"denoise": lambda x, sigma, cond: x + 0j}, "step 0: the denoiser returned torch.complex128; real"),
    ({"denoise": lambda x, sigma, cond: x[:1]}, r"step 0: the denoiser returned shape \[1, 3\] for x of \[2, 3\]"),
    ({"denoise": lambda x, sigma, cond: x / (sigma > 1.0)}, "the denoiser returned NaN or infinity at sigma = 0.47"),
])
def test_bad_input_is_refused_in_one_line(sample, options, words):
    refused(sample, options, words)


@pytest.mark.parametrize("sample, options, words", [
    *((sample, *case) for sample in CHURNING for case in [
        ({"S_churn": -1.0}, "S_churn"), ({"S_churn": math.nan}, "S_churn"), ({"S_noise": math.inf}, "S_noise"),
        ({"S_min": 2.0, "S_max": 1.0}, "S_min")]),
    *((sample, *case) for sample in NOISY for case in [
        ({"eta": -0.1}, "eta"), ({"eta": math.nan}, "eta"), ({"eta": math.inf}, "eta"), ({"S_noise": -1.0}, "S_noise"),
        ({"S_noise": math.inf}, "S_noise")]),
    (euler_ancestral_sample, {"eta": 1.1}, "eta must be from 0 to 1, "),
])
def test_bad_settings_are_refused_in_one_line(sample, options, words):
    refused(sample, options, words)


def refused(sample, options, words):
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
    for sample in SAMPLERS[1:]:
        calls.clear()
        with pytest.raises(ValueError, match="step 3: the denoiser returned NaN"):
            sample(broken, normal(3), num_steps=5)
