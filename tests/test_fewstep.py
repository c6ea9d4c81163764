"""Chapter 20: losses and sampling of a student that needs a few steps."""

import math
from dataclasses import replace

import pytest
import torch
from test_generate import tiny_piano
from test_train import CONFIG, NETWORK, SPECTROGRAM, rows, store
from torch import nn

from pianodiff.edm import Denoiser, karras_sigmas
from pianodiff.fewstep import (
    StudentConfig,
    answer_for,
    consistency_loss,
    copying,
    distill,
    distillation_loss,
    fewstep_sample,
    jump,
    levels_between,
    walk,
)
from pianodiff.generate import Piano
from pianodiff.model import load_model
from pianodiff.recipe import TrainConfig
from pianodiff.sampler import dpmpp_2m_sample

assert store  # a fixture

SHAPE = 3, 1, 4, 6
LEVELS = 20.0, 2.0, 0.4


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


def test_the_last_walk_stops_where_its_teacher_does():
    student, y, n = Denoiser(Net()), noise(0), noise(1)
    losses = [distillation_loss(student, gaussian, y, n, sigma=2.0, lower=0.0, num_steps=2, sigma_min=low)
              for low in (0.002, 0.5)]
    end = dpmpp_2m_sample(gaussian, (y + 2 * n) / 2, sigmas=(2.0, 0.5, 0.0), dtype=torch.float32)
    error = student(y + 2 * n, torch.full((3,), 2.0)) - end
    torch.testing.assert_close(losses[1], 4.25 * error.square().flatten(1).mean(1))
    assert not torch.allclose(*losses)


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


# students of music

@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Piano:
    """It has labels, a guide and an expert, stops early, and lies in a folder with both."""
    home = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        tiny_piano(SPECTROGRAM, NETWORK, seed=5).save_pretrained("coarse")  # without labels
        strong = tiny_piano(SPECTROGRAM, replace(NETWORK, labels=16), seed=6)
        strong.config["guide"] = "coarse"
        strong.save_pretrained("strong")
        mine = tiny_piano(SPECTROGRAM, replace(NETWORK, labels=16))
        mine.config |= {"guide": "coarse", "guidance": 1.5, "guidance_interval": [0.1, 5.0], "sigma_min": 0.1,
                        "rho": 9.0, "expert": "strong", "expert_above": 3.0}
        mine.save_pretrained("mine")
        yield Piano("mine", device="cpu")


class Deaf(nn.Module):
    """A student without labels."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.student = Denoiser(tiny_piano(SPECTROGRAM, NETWORK, seed=1).net)

    def forward(self, x, sigma, cond):
        return self.student(x, sigma, cond[:2])


def a_batch(n: int = 3) -> tuple:
    """Blocks, noise, and a condition: changed and known, unchanged and known, changed and without predecessor."""
    y, prev, drawn = (0.5 * noise(seed, (n, 1, 32, 32)) for seed in range(3))
    labels = torch.zeros(n, 16)
    labels[::2, 0] = 1.0
    return y, drawn, (prev, torch.arange(n) < n - 1, labels)


@pytest.mark.parametrize("level", LEVELS)
def test_a_student_of_music_copies_its_guided_teacher(teacher, level):
    y, drawn, cond = a_batch()
    found = copying(teacher, LEVELS, 3).loss(student := Deaf(), y, torch.full((3,), level), drawn, cond)

    def guided(x, s, past=None):
        strong, weak = (teacher.expert if s > 3 else teacher).denoiser, teacher.guide.denoiser
        answer = strong(x, s, cond)
        return weak(x, s, cond[:2]) + 1.5 * (answer - weak(x, s, cond[:2])) if 0.1 < s <= 5 else answer

    lower = {20.0: 2.0, 2.0: 0.4, 0.4: 0.0}[level]
    expected = distillation_loss(student, guided, y, drawn, cond, sigma=level, lower=lower, num_steps=3, rho=9.0,
                                 sigma_min=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_without_a_guide_the_teacher_is_led_away_from_itself_with_the_same_labels(teacher):
    alone = {key: teacher.config[key] for key in teacher.config.keys() - {"guide", "expert", "expert_above"}}
    y, drawn, cond = a_batch()
    prev, has_prev, labels = cond
    losses = {}
    for weight in (1.0, 3.0):
        piano = Piano(teacher.net, alone | {"guidance": weight, "guidance_interval": [0.0, 100.0]}, "cpu")
        losses[weight] = copying(piano, LEVELS, 3).loss(student := Deaf(), y, torch.full((3,), 2.0), drawn, cond)

    def guided(x, s, past=None):
        answer = piano.denoiser(x, s, cond)
        null = piano.denoiser(x, s, (prev, torch.zeros(3, dtype=torch.bool), labels))
        return null + 3 * (answer - null)

    expected = distillation_loss(student, guided, y, drawn, cond, sigma=2.0, lower=0.4, num_steps=3, rho=9.0,
                                 sigma_min=0.1)
    torch.testing.assert_close(losses[3.0], expected, rtol=1e-4, atol=1e-6)
    assert losses[1.0][0] != losses[3.0][0] and losses[1.0][1] != losses[3.0][1]
    torch.testing.assert_close(losses[1.0][2], losses[3.0][2])  # no predecessor, nothing to be led by


@pytest.mark.parametrize("levels, steps", [
    ((), 4), ((81.0, 1.0), 4), ((2.0, 2.0), 4), ((2.0, 3.0), 4), ((2.0, 0.1), 4), ((2.0, -1.0), 4), ((2.0,), 0),
    ((math.nan,), 4), ((math.inf, 1.0), 4), ((2.0,), 2.5), ((2.0,), "4")])
def test_levels_that_no_student_can_have(teacher, levels, steps):
    with pytest.raises(ValueError, match="a student's levels fall, from at most 80 to above 0.1, ") as caught:
        copying(teacher, levels, steps)
    assert "\n" not in str(caught.value)


def test_no_student_of_a_student(teacher):
    config = {key: teacher.config[key] for key in teacher.config.keys() - {"guide", "expert", "expert_above"}}
    with pytest.raises(ValueError, match="tiny is a student itself; take another teacher"):
        copying(Piano(teacher.net, config | {"sigmas": [2.0]}, "cpu"), (2.0,))


FEW = StudentConfig(images=32, batch_size=4, accumulate=2, warmup_images=4, eval_blocks=4, eval_images=16,
                    mixed_precision="no", workers=1, recolour=0.5)


def test_a_student_is_trained_and_plays(store, teacher, tmp_path):  # noqa: F811
    model = distill(store, tmp_path / "run", "mine", LEVELS, 2, FEW)
    config = load_model(model)[1]
    assert {"name": "tiny-3", "sigmas": list(LEVELS), "mean": 0.4}.items() <= config.items()
    about = {"name": "tiny", "steps": 2, "guidance": 1.5, "guidance_interval": [0.1, 5.0], "sigma_min": 0.1,
             "guide": "coarse", "expert": "strong"}
    assert about.items() <= config["teacher"].items() and config["training"]["ancestor"]["name"] == "tiny"
    assert not {"guide", "expert", "expert_above"} & config.keys()
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert {"val_20", "val_2", "val_0.4"} <= first.keys() and float(last["val_2"]) > 0
    made = Piano(model, device="cpu")
    assert made.sampling.num_steps == 3 and made.net.config == teacher.net.config
    assert len(made.generate(0.3, seed=1)) == 2400
    with pytest.raises(ValueError, match="tiny-3 is a student itself"):
        distill(store, tmp_path / "again", model, LEVELS)


def test_a_student_s_training_goes_on_wherever_its_teacher_lies(store, teacher, tmp_path, capsys):  # noqa: F811
    distill(store, tmp_path / "run", "mine", LEVELS, 2, replace(FEW, images=16))
    moved = tmp_path / "moved"
    teacher.save_pretrained(moved)
    model = distill(store, tmp_path / "run", moved, LEVELS, 2, FEW)
    assert load_model(model)[1]["training"]["images"] == 32 and "goes on from" in capsys.readouterr().err
    whole = distill(store, tmp_path / "whole", "mine", LEVELS, 2, FEW)
    for name, weights in load_model(whole)[0].state_dict().items():  # the decay began earlier in the shorter one
        torch.testing.assert_close(load_model(model)[0].state_dict()[name], weights, rtol=0.1, atol=0.05)
    other = Piano(teacher.net, teacher.config | {"guidance": 2.0}, "cpu")
    other.save_pretrained(moved)
    with pytest.raises(ValueError, match="was begun otherwise: objective was "):
        distill(store, tmp_path / "run", moved, LEVELS, 2, replace(FEW, images=48))


@pytest.mark.parametrize("other", [{"unet": CONFIG.unet}, {"preset": "base"}])
def test_a_student_has_its_teacher_s_network(store, teacher, tmp_path, other):  # noqa: F811
    with pytest.raises(ValueError, match="a student has its teacher's network; leave out preset and unet"):
        distill(store, tmp_path / "run", "mine", LEVELS, config=TrainConfig(**other))
    assert not (tmp_path / "run").exists()
