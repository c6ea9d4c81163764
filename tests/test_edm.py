"""Schedule, preconditioning, denoiser and loss (chapter 5)."""

import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pianodiff.edm import Denoiser, denoising_loss, edm_loss, karras_sigmas, loss_weight, preconditioning


class Conv(nn.Module):
    """A small network with parameters, which keeps what it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise, cond=None):
        self.seen = x, c_noise, cond
        return self.conv(x).tanh() + c_noise[:, None, None, None]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n, low, high, rho", [(2, 0.002, 80, 7), (18, 0.002, 80, 7), (40, 0.01, 5, 3), (5, 0.1, 1, 1)])
def test_sigmas_are_equation_27(n, low, high, rho):
    a, b = high ** (1 / rho), low ** (1 / rho)
    expected = [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)] + [0.0]
    sigmas = karras_sigmas(n, low, high, rho)
    assert sigmas.dtype == torch.float64 and sigmas.tolist() == pytest.approx(expected, rel=1e-13)
    assert (sigmas.diff() < 0).all()


def test_one_step_goes_from_sigma_max_to_zero():
    assert karras_sigmas(1).tolist() == [80, 0]
    assert karras_sigmas(1, 0.1, 3.0).tolist() == pytest.approx([3, 0])


@pytest.mark.parametrize("options", [
    {"num_steps": 0}, {"num_steps": -3}, {"num_steps": 1.5}, {"num_steps": math.nan}, {"num_steps": math.inf},
    {"num_steps": 10_001}, {"num_steps": 10**12},
    {"sigma_min": 0}, {"sigma_min": -1}, {"sigma_min": math.nan}, {"sigma_min": 80.0}, {"sigma_min": 100},
    {"sigma_max": math.inf}, {"sigma_max": math.nan}, {"rho": 0}, {"rho": -7}, {"rho": math.nan}, {"rho": math.inf},
])
def test_impossible_schedules_are_refused_in_one_line(options):
    with pytest.raises(ValueError, match=next(iter(options))) as caught:
        karras_sigmas(**{"num_steps": 10, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_is_equations_28_to_31(sigma_data):
    sigma = torch.logspace(-3, 2, 11, dtype=torch.float64)
    for s, *found in zip(sigma.tolist(), *preconditioning(sigma, sigma_data), strict=True):
        total = s * s + sigma_data**2
        expected = [sigma_data**2 / total, s * sigma_data / math.sqrt(total), 1 / math.sqrt(total), math.log(s) / 4]
        assert [float(c) for c in found] == pytest.approx(expected, rel=1e-12)
    c_out = preconditioning(sigma, sigma_data)[1]
    torch.testing.assert_close(loss_weight(sigma, sigma_data) * c_out**2, torch.ones_like(sigma))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_comes_back_and_the_network_keeps_its_own(dtype):
    denoiser, x = Denoiser(Conv()), normal(3, 1, 8, 8).to(dtype)
    denoised = denoiser(x, torch.tensor(2.0))
    assert denoised.dtype == dtype and all(t.dtype == torch.float32 for t in denoiser.net.seen[:2])
    torch.testing.assert_close(denoised, denoiser(x.float(), 2.0).to(dtype))


def test_every_form_of_sigma():
    denoiser, x = Denoiser(Conv()), normal(3, 1, 8, 8)
    expected = denoiser(x, 2.0)
    for sigma in (torch.tensor(2.0), torch.tensor([2.0]), torch.full((3,), 2.0), torch.full((3, 1, 1, 1), 2.0)):
        torch.testing.assert_close(denoiser(x, sigma), expected, rtol=0, atol=0)
        assert denoiser.net.seen[1].shape == (3,)  # c_noise, one for each item
    each = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    alone = torch.cat([denoiser(x[i : i + 1], each[i]) for i in range(3)])
    torch.testing.assert_close(denoiser(x, each), alone, rtol=1e-6, atol=1e-6)


def test_skip_keeps_float64_around_a_float32_network():
    net = Conv()
    nn.init.zeros_(net.conv.weight)
    nn.init.zeros_(net.conv.bias)
    x = normal(2, 1, 4, 4)
    torch.testing.assert_close(Denoiser(net)(x, 1.0), x * 0.2, rtol=1e-14, atol=0)  # ln 1 = 0: F = 0, c_skip = 1/5


def test_equation_24_with_a_network_that_has_no_parameters():
    x, sigma = normal(2, 3), torch.tensor([0.3, 4.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = (c[:, None] for c in preconditioning(sigma, 0.7))
    expected = c_skip * x + c_out * torch.sin(c_in * x + c_noise)
    denoiser = Denoiser(lambda x, c_noise, cond: torch.sin(x + c_noise[:, None]), sigma_data=0.7)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-14, atol=0)


class Named(NamedTuple):
    prev: torch.Tensor
    has_prev: torch.Tensor


def test_condition_is_cast_and_otherwise_untouched():
    denoiser, x, prev = Denoiser(Conv()), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    has_prev, labels = torch.tensor([True, False]), torch.tensor([3, 4])

    def passed(cond):
        denoiser(x, 1.0, cond)
        return denoiser.net.seen[2]

    assert passed(None) is None and passed(labels) is labels
    torch.testing.assert_close(passed(prev), prev.float())
    cast, flag = passed((prev, has_prev))
    torch.testing.assert_close(cast, prev.float())
    assert flag is has_prev
    named = passed(Named(prev, has_prev))
    assert isinstance(named, Named) and named.has_prev is has_prev and named.prev.dtype == torch.float32


def test_autocast_and_compile():
    denoiser, x, sigma = Denoiser(Conv()), normal(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0.1, 5.0])
    expected = denoiser(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        half = denoiser(x, sigma)
    assert half.dtype == torch.float32 and not torch.equal(half, expected)
    torch.testing.assert_close(half, expected, atol=0.03, rtol=0)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sigma), expected)


def test_what_edm_sampler_asks_of_a_network():
    denoiser = Denoiser(Conv())
    assert (denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data) == (0.002, 80, 0.5)
    sigmas = karras_sigmas(4)
    assert denoiser.round_sigma(sigmas) is sigmas and float(denoiser.round_sigma(0.1)) == 0.1
    assert Denoiser(Conv(), sigma_max=400.0).sigma_max == 400  # a model's own, to which edm_sampler clips


def test_wrong_shapes_are_refused():
    x = normal(3, 1, 4, 4)
    with pytest.raises(ValueError, match="sigma must hold 1 value or one for each of the 3 items, not 2"):
        Denoiser(Conv())(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"returned shape \(3, 1, 1, 4\) for an input of \(3, 1, 4, 4\)"):
        Denoiser(lambda x, c_noise, cond: x.mean(2, keepdim=True))(x, 1.0)
    for noise in (x[:1], x[0], x[..., :1]):  # all of which would broadcast
        with pytest.raises(ValueError, match=re.escape(f"noise has shape {list(noise.shape)} for y of [3, 1, 4, 4]")):
            denoising_loss(Denoiser(Conv()), x, torch.ones(3), noise)


def test_loss_is_equation_25_with_its_square():
    y, noise, net = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1), Conv().double()
    sigma = torch.tensor([0.01, 0.3, 2, 60], dtype=torch.float64)
    for i, s in enumerate(sigma.tolist()):
        x, total = y[i : i + 1] + s * noise[i : i + 1], math.sqrt(s * s + 0.25)
        c_out = s * 0.5 / total
        target = (y[i] - 0.25 / total**2 * x[0]) / c_out
        F_x = net(x / total, torch.tensor([math.log(s) / 4], dtype=torch.float64))[0]
        norm = (F_x - target).square().sum().sqrt()
        expected = total**2 / (s * 0.5) ** 2 * c_out**2 * norm**2 / 64  # lambda c_out^2 ||F - target||^2, a pixel
        found = denoising_loss(Denoiser(net), y[i : i + 1], sigma[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(found, expected.reshape(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma", [0.02, 0.4, 10.0])
def test_least_loss_of_gaussian_data(sigma):
    std, sigma_data = 0.8, 0.5

    def optimal(x_in, c_noise, cond):
        c_skip, c_out, c_in, _ = preconditioning(torch.tensor(sigma, dtype=torch.float64), sigma_data)
        return (std**2 / (std**2 + sigma**2) - c_skip) * x_in / (c_in * c_out)

    y = std * normal(2, 200_000)
    found = denoising_loss(Denoiser(optimal), y, torch.full((2,), sigma), normal(2, 200_000, seed=1))
    least = (sigma**2 + sigma_data**2) / sigma_data**2 * std**2 / (std**2 + sigma**2)
    torch.testing.assert_close(found, torch.full_like(found, least), rtol=0.02, atol=0)


def test_training_noise_is_log_normal_and_reproducible():
    asked = []

    def spy(x, c_noise, cond):
        asked.append((4 * c_noise, x))
        return torch.zeros_like(x)

    y = torch.zeros(40_000, 1)
    losses = [edm_loss(Denoiser(spy), y, P_mean=-0.4, P_std=1.6, generator=torch.Generator().manual_seed(seed))
              for seed in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    log_sigma, x_in = asked[0]
    assert float(log_sigma.mean()) == pytest.approx(-0.4, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.6, abs=0.03)
    noise = x_in[:, 0] * (log_sigma.exp() ** 2 + 0.25).sqrt() / log_sigma.exp()
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([noise, log_sigma]))[0, 1])) < 0.02


def test_loss_defaults_gradients_and_condition():
    denoiser, (y, cond) = Denoiser(Conv()), normal(2, 4, 1, 8, 8, dtype=torch.float32)
    losses = [edm_loss(denoiser, y, cond, generator=torch.Generator().manual_seed(5), **options)
              for options in ({}, {"P_mean": -1.2, "P_std": 1.2})]
    assert torch.equal(*losses) and losses[0].shape == (4,) and losses[0].dtype == torch.float32
    assert torch.equal(denoiser.net.seen[2], cond)
    losses[0].mean().backward()
    assert denoiser.net.conv.weight.grad.abs().sum() > 0
