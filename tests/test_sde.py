"""The processes and samplers of chapter 1 against closed forms, on points in a plane whose score is known."""

import math
from itertools import pairwise

import pytest
import torch

from pianodiff.edm import Denoiser
from pianodiff.sampler import heun_sample
from pianodiff.sde import (
    VESDE,
    VPSDE,
    SubVPSDE,
    dsm_loss,
    euler_maruyama_sample,
    log_likelihood,
    ode_sample,
    score_from_denoiser,
    score_from_noise,
)

PROCESSES = [VPSDE(), VPSDE(0.5, 12.0), VPSDE(3.0, 3.0), SubVPSDE(), VESDE(), VESDE(0.1, 30.0)]
DEFAULTS = [VPSDE(), SubVPSDE(), VESDE()]
SAMPLERS = [euler_maruyama_sample, ode_sample]
CENTRES = torch.tensor([[-1.0, -0.7], [1.0, -0.7], [0.0, 1.2]], dtype=torch.float64)
SPREAD = torch.tensor([0.2, 0.3, 0.15], dtype=torch.float64)
SHARE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEAN = SHARE @ CENTRES
COVARIANCE = (SHARE * SPREAD**2).sum() * torch.eye(2) + (CENTRES - MEAN).T @ (SHARE[:, None] * (CENTRES - MEAN))
each = pytest.mark.parametrize("sde", PROCESSES, ids=str)
default = pytest.mark.parametrize("sde", DEFAULTS, ids=lambda sde: type(sde).__name__)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_from(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def log_density(x, s, sigma):
    """Of the three clouds, scaled by s after noise sigma, at x [B, 2]; in torch's own distributions."""
    mixing = torch.distributions.Categorical(SHARE)
    std = (s * (SPREAD**2 + sigma**2).sqrt())[:, None].expand(3, 2)
    parts = torch.distributions.Independent(torch.distributions.Normal(s * CENTRES, std), 1)
    return torch.distributions.MixtureSameFamily(mixing, parts).log_prob(x)


def known(sde):
    """The clouds' score, by automatic differentiation."""

    def score(x, t):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            density = log_density(y, *sde.schedule(t)).sum()
            return torch.autograd.grad(density, y, create_graph=x.requires_grad)[0]

    return score


def denoise(x, sigma, cond=None):
    """The clouds' ideal denoiser."""
    variance = SPREAD**2 + sigma**2
    chance = (SHARE.log() - (x[:, None] - CENTRES).square().sum(2) / (2 * variance) - variance.log()).softmax(1)
    ends = (SPREAD[:, None] ** 2 * x[:, None] + sigma**2 * CENTRES) / variance[:, None]
    return (chance[..., None] * ends).sum(1)


def assert_is_the_clouds(x, slack=0.0):
    """Mean and covariance within four standard errors, and each cloud's share of the points likewise."""
    n = len(x)
    assert ((x.mean(0) - MEAN).abs() < slack + 4 * (COVARIANCE.diag() / n).sqrt()).all()
    error = ((x - MEAN)[:, :, None] * (x - MEAN)[:, None]).std(0) / n**0.5
    assert ((torch.cov(x.T) - COVARIANCE).abs() < slack + 4 * error).all()
    nearest = torch.cdist(x, CENTRES).argmin(1)
    share, error = torch.bincount(nearest, minlength=3) / n, (SHARE * (1 - SHARE) / n).sqrt()
    assert ((share - SHARE).abs() < slack + 4 * error).all()


@each
@pytest.mark.parametrize("t_end", [0.01, 0.4, 1.0])
def test_marginals_solve_the_moments_equations(sde, t_end):
    """m' = a m and v' = 2 a v + g², from drift and diffusion, by Runge and Kutta's method."""
    one = torch.ones(1, dtype=torch.float64)

    def rates(state, t):
        a, g = sde.drift_diffusion(one, max(t, 1e-300))
        return torch.cat([a * state[:1], 2 * a * state[1:] + g**2])

    steps, state = 400, f64([1.0, 0.0])
    dt = t_end / steps
    for i in range(steps):
        k1 = rates(state, i * dt)
        k2 = rates(state + dt / 2 * k1, (i + 0.5) * dt)
        k3 = rates(state + dt / 2 * k2, (i + 0.5) * dt)
        k4 = rates(state + dt * k3, min((i + 1) * dt, 1.0))
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    mean, std = sde.marginal(one, t_end)
    torch.testing.assert_close(state, torch.cat([mean, std**2]), rtol=1e-6, atol=1e-12)


def test_vp_marginal_is_equation_10():
    t, x0 = torch.linspace(0.01, 1, 50, dtype=torch.float64), normal(50, 3)
    integral = 0.1 * t + 19.9 * t**2 / 2
    mean, std = VPSDE().marginal(x0, t)
    torch.testing.assert_close(mean, (-integral / 2).exp()[:, None] * x0)
    torch.testing.assert_close(std, (1 - (-integral).exp()).sqrt()[:, None])
    torch.testing.assert_close(VPSDE().drift_diffusion(x0, t)[0], -(0.1 + 19.9 * t)[:, None] / 2 * x0)


def test_the_chain_ends_at_the_marginal():
    """Eq. (3) step after step, as one product."""
    steps, t = 20_000, 0.5
    beta = 0.1 + 19.9 * t * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    scale = (1 - beta * t / steps).sqrt().prod()
    mean, std = VPSDE().marginal(torch.ones(1, dtype=torch.float64), t)
    torch.testing.assert_close(torch.stack([scale, (1 - scale**2).sqrt()]), torch.cat([mean, std]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sde, expected", [(VPSDE(), 0.1**0.5 * 1e-5), (SubVPSDE(), 0.1 * 1e-10),
                                           (VESDE(), 0.01 * (2 * math.log(5000)) ** 0.5 * 1e-5)])
def test_no_digits_are_lost_near_zero(sde, expected):
    """In float32, where 1 - exp(-1e-11) is 0."""
    std = sde.marginal(torch.ones(1), 1e-10)[1]
    torch.testing.assert_close(std, torch.full((1,), expected), rtol=1e-5, atol=0)


@each
def test_time_is_the_inverse_of_sigma(sde):
    t = torch.cat([torch.logspace(-8, -2, 7), torch.linspace(0.02, 1, 50)]).double()
    torch.testing.assert_close(sde.time(sde.schedule(t)[1]), t, rtol=1e-9, atol=0)


@each
def test_schedule_and_rates_are_one_process(sde):
    """Eq. (20): f = s'/s x and g = s sqrt(2 sigma' sigma)."""
    t = torch.linspace(0.01, 1, 40, dtype=torch.float64, requires_grad=True)
    s, sigma = sde.schedule(t)
    s_dot, sigma_dot = (torch.autograd.grad((v + 0 * t).sum(), t, retain_graph=True)[0] for v in (s, sigma))
    drift, diffusion = sde.drift_diffusion(torch.full_like(t, 3.0), t)
    torch.testing.assert_close(drift, 3 * s_dot / s)
    torch.testing.assert_close(diffusion, s * (2 * sigma_dot * sigma).sqrt())


def test_reverse_drifts_of_vp():
    """Eqs. (8) and (19), written out."""
    sde, x, t = VPSDE(), normal(5, 2), f64(0.3)
    beta, score = 0.1 + 19.9 * 0.3, known(VPSDE())(x, t)
    drift, diffusion = sde.reverse(known(sde))(x, t)
    torch.testing.assert_close(drift, -0.5 * beta * x - beta * score)
    torch.testing.assert_close(diffusion.item(), beta**0.5)
    drift, diffusion = sde.reverse(known(sde), noise=0.0)(x, t)
    torch.testing.assert_close(drift, -0.5 * beta * x - 0.5 * beta * score)
    assert diffusion == 0


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 1.7])
def test_noise_is_karras_beta(noise):
    """Eq. (22) going back, with beta = noise² sigma'/sigma."""
    sde, x, t = VESDE(), normal(5, 2), f64(0.6).requires_grad_()
    sigma = sde.schedule(t)[1]
    (sigma_dot,) = torch.autograd.grad(sigma, t, retain_graph=True)
    beta, score = noise**2 * sigma_dot / sigma, known(sde)(x, t)
    drift, diffusion = sde.reverse(known(sde), noise)(x, t)
    torch.testing.assert_close(drift, -(sigma_dot * sigma + beta * sigma**2) * score)
    torch.testing.assert_close(diffusion.squeeze(), (2 * beta).sqrt() * sigma)


@default
def test_prior_is_noise_of_the_last_marginal(sde):
    x = sde.prior((40_000, 2), torch.Generator().manual_seed(0), torch.float64)
    assert x.dtype == torch.float64 and x.shape == (40_000, 2)
    std = sde.marginal(x, 1.0)[1].item()
    assert sde.prior_std == pytest.approx(std, rel=1e-4)
    assert abs(x.std() / std - 1) < 0.012 and abs(x.mean() / std) < 0.015


def test_an_euler_maruyama_step_is_equation_18():
    """With the sign that holds for a positive step: the paper's minus is an error."""
    sde, x, z = VPSDE(), normal(6, 2), normal(6, 2, seed=1)
    found = euler_maruyama_sample(sde, known(sde), x, times=[0.8, 0.77], randn_like=lambda x: z)
    beta, dt = 0.1 + 19.9 * 0.8, 0.03
    expected = x + 0.5 * beta * (x + 2 * known(sde)(x, f64(0.8))) * dt + math.sqrt(beta * dt) * z
    torch.testing.assert_close(found, expected)


@default
@pytest.mark.parametrize("noise", [0.5, 1.0, 1.5])
def test_every_sde_reaches_the_data(sde, noise):
    x = sde.prior((3000, 2), torch.Generator().manual_seed(1), torch.float64)
    x = euler_maruyama_sample(sde, known(sde), x, noise=noise, num_steps=300, randn_like=noise_from(2))
    assert_is_the_clouds(x, slack=0.015)  # 300 steps leave a bias of that size


@default
def test_the_ode_reaches_the_data(sde):
    x = sde.prior((6000, 2), torch.Generator().manual_seed(1), torch.float64)
    assert_is_the_clouds(ode_sample(sde, known(sde), x))


def test_edms_ode_reaches_the_data():
    assert_is_the_clouds(heun_sample(denoise, normal(6000, 2), num_steps=40))


@default
def test_the_ode_is_edms_ode(sde):
    """Point by point: the same noise, through the same noise levels, in other variables."""
    levels = torch.logspace(1.5, -1.5, 401, dtype=torch.float64)
    times = sde.time(levels)
    s, sigma = sde.schedule(times)
    z = normal(100, 2)
    x = ode_sample(sde, score_from_denoiser(sde, denoise), s[0] * sigma[0] * z, times=times)
    torch.testing.assert_close(x / s[-1], heun_sample(denoise, z, sigmas=levels), atol=2e-3, rtol=0)


@each
def test_ode_takes_gaussian_data_to_the_closed_form(sde):
    """x(t) - mean scales with the standard deviation."""
    t, end = f64(0.8), f64(0.05)

    def moments(t):
        s, sigma = sde.schedule(t)
        return 0.3 * s, s * (0.25 + sigma**2).sqrt()

    x = moments(t)[0] + moments(t)[1] * normal(50, 1)
    found = ode_sample(sde, lambda x, t: (moments(t)[0] - x) / moments(t)[1] ** 2, x,
                       times=torch.linspace(0.8, 0.05, 301, dtype=torch.float64))
    expected = moments(end)[0] + moments(end)[1] * (x - moments(t)[0]) / moments(t)[1]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_ode_sample_is_of_second_order_and_euler_of_first():
    sde, x = VPSDE(), normal(20, 2)
    score = lambda x, t: -x / (0.25 * sde.schedule(t)[0] ** 2 + sde.marginal(x, t)[1] ** 2)  # noqa: E731
    euler = lambda n: euler_maruyama_sample(sde, score, x, noise=0.0, num_steps=n, t_min=0.1)  # noqa: E731
    heun = lambda n: ode_sample(sde, score, x, num_steps=n, t_min=0.1)  # noqa: E731
    end = heun(600)
    for sample, order in ((euler, 1), (heun, 2)):
        ratio = (sample(40) - end).abs().max() / (sample(80) - end).abs().max()
        assert math.log2(ratio) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_scores_of_denoiser_and_noise_are_the_known_one(shape):
    sde, x, t = SubVPSDE(), normal(4, 2), torch.full(shape, 0.3, dtype=torch.float64)
    s, sigma = sde.schedule(f64(0.3))
    expected = known(sde)(x, f64(0.3))
    found = score_from_denoiser(sde, lambda y, level, cond: denoise(y, level.reshape(-1)[0], cond))(x, t)
    torch.testing.assert_close(found, expected)
    predict = score_from_noise(sde, lambda x, t: -s * sigma * expected)
    torch.testing.assert_close(predict(x, t), expected)


def test_a_denoiser_of_the_library_gets_sigma_and_condition():
    asked = []

    def net(x, c_noise, cond):
        asked.append((c_noise, cond))
        return torch.zeros_like(x)

    sde, t = VPSDE(), f64([0.2, 0.5])
    score_from_denoiser(sde, Denoiser(net), "cond")(normal(2, 1, 4, 4), t)
    torch.testing.assert_close(asked[0][0], sde.schedule(t)[1].log() / 4)
    assert asked[0][1] == "cond"


def test_dsm_loss_is_equation_16():
    sde, x0, noise = VPSDE(), normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    t = f64([0.01, 0.3, 1.0])
    integral = 0.1 * t + 19.9 * t**2 / 2
    gamma, std = ((v.reshape(3, 1, 1, 1)) for v in ((-integral / 2).exp(), (1 - (-integral).exp()).sqrt()))
    predict = lambda x, t: torch.sin(x) + t.reshape(-1, 1, 1, 1)  # noqa: E731
    error = noise - predict(gamma * x0 + std * noise, t)
    expected = (error.square() / std**2).mean((1, 2, 3))
    torch.testing.assert_close(dsm_loss(sde, score_from_noise(sde, predict), x0, t, noise), expected)


def test_the_known_score_has_the_least_dsm_loss():
    """Eqs. (9) and (12) differ by a constant: a worse score loses by what it is wrong."""
    sde, n = VPSDE(), 50_000
    which = torch.multinomial(SHARE, n, replacement=True, generator=torch.Generator().manual_seed(0))
    x0, noise, t = CENTRES[which] + SPREAD[which, None] * normal(n, 2), normal(n, 2, seed=1), f64(0.2)
    mean, std = sde.marginal(x0, t)
    x = mean + std * noise
    score = known(sde)
    best = dsm_loss(sde, score, x0, t, noise)
    for factor in (0.8, 1.2):
        worse = dsm_loss(sde, lambda x, t, f=factor: f * score(x, t), x0, t, noise) - best
        gap = ((factor - 1) * score(x, t)).square().mean(1)
        assert abs((worse - gap).mean()) < 4 * (worse - gap).std() / n**0.5
        assert gap.mean() > 10 * (worse - gap).std() / n**0.5


def test_dsm_loss_teaches():
    """Gradients reach the network: a scale that starts wrong is found by descent."""
    sde, scale = VPSDE(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x0, noise, t = normal(2000, 1), normal(2000, 1, seed=1), torch.full((2000,), 0.4, dtype=torch.float64)
    optimizer = torch.optim.SGD([scale], 0.2)
    for _ in range(40):
        optimizer.zero_grad()
        dsm_loss(sde, lambda x, t: scale * x, x0, t, noise).mean().backward()
        optimizer.step()
    assert scale.item() == pytest.approx(-1, abs=0.05)  # data of unit variance keep it, and their score is -x


@default
def test_log_likelihood_is_the_formula(sde):
    x = torch.cat([normal(20, 2) * 0.8, CENTRES])
    found = log_likelihood(sde, known(sde), x, probes=None, num_steps=200, t_min=0.002)
    expected = log_density(x, *sde.schedule(f64(0.002))) / (2 * math.log(2))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)
    assert abs((found - expected).mean()) < 0.01 * expected.abs().mean()


def test_log_likelihood_of_many_dimensions():
    """Independent Gaussian pixels, in an item's own shape; for a diagonal matrix signs give the trace exactly."""
    sde, x = VPSDE(), 0.5 * normal(3, 1, 2, 4)
    score = lambda x, t: -x / (0.25 * sde.schedule(t)[0] ** 2 + sde.marginal(x, t)[1] ** 2)  # noqa: E731
    found = log_likelihood(sde, score, x, num_steps=80, generator=torch.Generator().manual_seed(0))
    s, sigma = sde.schedule(f64(1e-3))
    expected = torch.distributions.Normal(0, s * (0.25 + sigma**2).sqrt()).log_prob(x).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(log_likelihood(sde, score, x, probes=None, num_steps=80), found)


def test_hutchinsons_estimate_is_unbiased():
    sde, score, x = VPSDE(), known(VPSDE()), 0.5 * normal(4, 2)
    exact = log_likelihood(sde, score, x, probes=None, num_steps=20)
    many = log_likelihood(sde, score, x.repeat(200, 1), num_steps=20, generator=torch.Generator().manual_seed(0))
    many = many.reshape(200, 4)
    assert ((many.mean(0) - exact).abs() < 4 * many.std(0) / 200**0.5 + 1e-9).all() and (many.std(0) > 0.01).any()
    averaged = log_likelihood(sde, score, x.repeat(50, 1), probes=16, num_steps=20,
                              generator=torch.Generator().manual_seed(1)).reshape(50, 4)
    assert averaged.std(0).mean() < 0.4 * many.std(0).mean()


@pytest.mark.parametrize("sample", SAMPLERS)
def test_samples_keep_shape_dtype_and_seed(sample):
    sde = VPSDE()
    x = sde.prior((2, 1, 4, 4), torch.Generator().manual_seed(0))
    score = lambda x, t: -x  # noqa: E731
    options = [{"randn_like": noise_from(5)} if sample is euler_maruyama_sample else {} for _ in range(2)]
    first, again = (sample(sde, score, x, num_steps=5, **o) for o in options)
    assert first.shape == x.shape and first.dtype == torch.float32 and torch.equal(first, again)
    assert not first.requires_grad


@pytest.mark.parametrize("sample", SAMPLERS)
def test_what_the_score_and_the_callback_see(sample):
    sde, x, asked, seen = VPSDE(), normal(3, 2), [], []

    def score(x, t):
        asked.append(float(t))
        assert t.ndim == 0 and t.dtype == x.dtype and not torch.is_grad_enabled()
        return -x

    sample(sde, score, x, num_steps=4, t_min=0.2, callback=seen.append)
    times = [1, 0.8, 0.6, 0.4, 0.2]
    both = [t for step in pairwise(times) for t in step]
    expected = times[:4] if sample is euler_maruyama_sample else both
    assert asked == pytest.approx(expected)
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    assert [float(step["t"]) for step in seen] == pytest.approx(times[:4])
    torch.testing.assert_close(seen[0]["x"], x)


@pytest.mark.parametrize("t", [0.0, -0.1, 1.001, math.nan, torch.tensor([0.5, 0.0, 1.0])])
def test_times_out_of_range(t):
    x = torch.zeros(3, 2)
    for call in (lambda: VPSDE().marginal(x, t), lambda: SubVPSDE().drift_diffusion(x, t),
                 lambda: VESDE().schedule(torch.as_tensor(t)), lambda: dsm_loss(VPSDE(), lambda x, t: x, x, t, x)):
        with pytest.raises(ValueError, match=r"t must lie in \(0, 1\]"):
            call()


def test_shapes_that_do_not_fit():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="one time or one for each of the 3 items"):
        VPSDE().marginal(x, torch.rand(2))
    with pytest.raises(ValueError, match="noise has shape"):
        dsm_loss(VPSDE(), lambda x, t: x, x, torch.full((3,), 0.5), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must be floats"):
        VPSDE().marginal(x.long(), 0.5)


@pytest.mark.parametrize("method", [*SAMPLERS, log_likelihood])
@pytest.mark.parametrize("change, message", [
    ({"num_steps": 0}, "num_steps"), ({"num_steps": 2.5}, "num_steps"), ({"t_min": 0.0}, "t_min"),
    ({"t_min": 1.0}, "t_min"), ({"times": [0.5]}, "times"), ({"times": [0.2, 0.5]}, "times"),
    ({"times": [1.2, 0.5]}, "times"), ({"times": [0.5, 0.0]}, "times"), ({"times": [1.0, math.nan]}, "times"),
    ({"x": torch.full((3, 2), math.nan)}, "x must be finite"),
    ({"x": torch.zeros(3, 2, dtype=torch.long)}, "finite floats"),
    ({"score": lambda x, t: x[:1]}, "the score has shape"), ({"score": lambda x, t: x * math.nan}, "the score is NaN"),
])
def test_bad_input(method, change, message):
    with pytest.raises(ValueError, match=message) as error:
        method(**{"sde": VPSDE(), "score": lambda x, t: -x, "x": torch.ones(3, 2), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [
    lambda: VPSDE(0.0, 1.0), lambda: VPSDE(2.0, 1.0), lambda: SubVPSDE(beta_max=math.inf), lambda: VESDE(0.0, 1.0),
    lambda: VESDE(2.0, 1.0), lambda: VESDE(sigma_max=math.nan), lambda: VPSDE().reverse(lambda x, t: x, noise=-1.0),
    lambda: VPSDE().reverse(lambda x, t: x, noise=math.nan),
    lambda: log_likelihood(VPSDE(), lambda x, t: x, torch.ones(3, 2), probes=0),
    lambda: log_likelihood(VPSDE(), lambda x, t: x, torch.ones(3, 2), probes=1.5),
])
def test_settings_that_cannot_be(make):
    with pytest.raises(ValueError):
        make()
