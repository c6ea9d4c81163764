"""Chapter 20: losses and sampling of a student that needs a few steps."""

import pytest
import torch
from torch import nn

from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.fewstep import (
    answer_for,
    consistency_loss,
    distillation_loss,
    fewstep_sample,
    jump,
    levels_between,
    walk,
)
from pianodiff.sampler import dpmpp_2m_sample

SHAPE = 3, 1, 4, 6


class Net(nn.Module):
    """A network with one weight; it keeps what it was given as condition."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(weight)), []

    def forward(self, x, c_noise, cond=None):
        self.seen.append(cond)
        return self.weight * x * (1 + c_noise.reshape(-1, 1, 1, 1))


def gaussian(x, sigma, cond=None):
    """The ideal denoiser of Gaussian data of standard deviation 0.5."""
    return x * 0.25 / (0.25 + sigma**2)


def noise(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lower", [0.0, 0.3, 1.9])
def test_an_answer_is_where_a_step_has_to_aim(lower):
    x, end = noise(0).double(), noise(1).double()
    torch.testing.assert_close(jump(x, answer_for(x, end, 2.0, lower), 2.0, lower), end)


@pytest.mark.parametrize("sigma, lower", [(1.0, 1.0), (0.5, 1.0), (1.0, -0.1), (float("nan"), 0.0)])
def test_a_step_goes_down(sigma, lower):
    with pytest.raises(ValueError, match="a step goes down, not from sigma"):
        answer_for(noise(0), noise(1), sigma, lower)


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_levels_are_those_of_the_paper(num_steps):
    levels = levels_between(80, 0, num_steps)
    torch.testing.assert_close(levels, karras_sigmas(num_steps))
    down = levels_between(80, 3.0, num_steps, 30.0)
    assert len(down) == num_steps + 1 and down[0] == 80 and (down.diff() < 0).all()
    torch.testing.assert_close(down[-1].item(), 3.0)


def test_a_walk_is_the_sampler_s():
    z, levels = noise(0), karras_sigmas(12)
    torch.testing.assert_close(walk(gaussian, 80 * z, None, levels), dpmpp_2m_sample(gaussian, z, sigmas=levels))


def test_the_loss_is_that_of_its_equation():
    student, y, n = Denoiser(Net()), noise(0), noise(1)
    found = distillation_loss(student, gaussian, y, n, "mine", sigma=2.0, lower=0.3, num_steps=3, rho=5.0)
    x = y + 2 * n
    end = dpmpp_2m_sample(gaussian, x / 2, sigmas=levels_between(2.0, 0.3, 3, 5.0), dtype=torch.float32)
    error = student(x, torch.full((3,), 2.0), "mine") - answer_for(x, end, 2.0, 0.3)
    weight = (4 + 0.25) / (2 * 0.5) ** 2
    torch.testing.assert_close(found, weight * error.square().flatten(1).mean(1))
    assert found.shape == (3,)


def test_only_the_student_learns_and_each_gets_its_own_condition():
    student, teacher = Denoiser(Net()), Denoiser(Net(0.3))
    loss = distillation_loss(student, teacher, noise(0), noise(1), "mine", sigma=2.0, lower=0.0, num_steps=4,
                             teacher_cond="theirs")
    loss.mean().backward()
    assert student.net.weight.grad is not None and teacher.net.weight.grad is None
    assert student.net.seen == ["mine"] and teacher.net.seen == ["theirs"] * 4


def test_a_student_that_copies_one_step_has_no_loss():
    teacher = Denoiser(Net())
    loss = distillation_loss(teacher, teacher, noise(0), noise(1), sigma=2.0, lower=0.5, num_steps=1)
    assert loss.max() < 1e-10


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_no_gradient_goes_through_the_lower_point(ratio):
    student, y, sigma = Denoiser(Net()), noise(0), torch.tensor([0.1, 1.0, 9.0])
    consistency_loss(student, y, sigma, noise(1), ratio=ratio).mean().backward()
    with torch.no_grad():
        target = student(y + ratio * sigma.reshape(-1, 1, 1, 1) * noise(1), ratio * sigma) if ratio else y
    mine = student.net.weight.grad.clone()
    student.net.weight.grad = None
    error = student(y + sigma.reshape(-1, 1, 1, 1) * noise(1), sigma) - target
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    (weight * error.square().flatten(1).mean(1)).mean().backward()
    torch.testing.assert_close(mine, student.net.weight.grad)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0, float("nan")])
def test_a_ratio_that_is_none(ratio):
    with pytest.raises(ValueError, match="ratio must be from 0 to below 1"):
        consistency_loss(Denoiser(Net()), noise(0), torch.ones(3), noise(1), ratio=ratio)


def test_fresh_noise_comes_after_each_answer_but_the_last():
    seen, drawn = [], []

    def denoise(x, sigma, cond):
        assert cond == "past"
        seen.append((float(sigma), x))
        return x / 2

    def randn_like(x):
        drawn.append(torch.ones_like(x))
        return drawn[-1]

    states = []
    made = fewstep_sample(denoise, noise(0), "past", sigmas=(8, 2.0, 0.5), randn_like=randn_like,
                          callback=states.append)
    assert [level for level, _ in seen] == [8.0, 2.0, 0.5] and len(drawn) == 2
    torch.testing.assert_close(made, ((8 * noise(0) / 2 + 2) / 2 + 0.5) / 2)
    assert made.dtype == torch.float32 and seen[0][1].dtype == torch.float64
    assert [(state["i"], float(state["sigma"])) for state in states] == [(0, 8.0), (1, 2.0), (2, 0.5)]
    torch.testing.assert_close(states[1]["x"], seen[1][1])
    assert all(torch.equal(state["denoised"], state["x"] / 2) for state in states)


@pytest.mark.parametrize("sigmas", [(), (0.0,), (1.0, 1.0), (1.0, 2.0), (-1.0,), (2.0, 0.0), (float("nan"),)])
def test_levels_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall and stay above 0"):
        fewstep_sample(gaussian, noise(0), sigmas=sigmas)


def test_a_bad_answer_is_told():
    with pytest.raises(ValueError, match="NaN or infinity at sigma = 0.8"):
        fewstep_sample(lambda x, sigma, cond: x / (sigma > 1), noise(0), sigmas=(80, 0.8))


def test_latents_are_floats():
    with pytest.raises(ValueError, match="latents must be finite floats, not torch.int64"):
        fewstep_sample(gaussian, torch.ones(1, 2, dtype=torch.int64))


def test_noise_has_the_shape_of_the_data():
    for loss in (lambda y, n: distillation_loss(Denoiser(Net()), gaussian, y, n, sigma=1.0, lower=0.0),
                 lambda y, n: consistency_loss(Denoiser(Net()), y, torch.ones(3), n, ratio=0.5)):
        with pytest.raises(ValueError, match=r"noise has shape \[3, 1, 1, 1\] for y of"):
            loss(noise(0), noise(1, (3, 1, 1, 1)))
