"""Piano: what a seed, a prompt, a length and a piece of a stream promise. The network is tiny and untrained."""

import base64
import gc
import inspect
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pianodiff
from pianodiff import GUIDANCE, GUIDANCE_INTERVAL, NUM_STEPS, SAMPLER, generate
from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, Wave, load_audio, save_audio, to_spectrogram
from pianodiff.cli import main
from pianodiff.edm import karras_sigmas
from pianodiff.generate import SAMPLERS, Piano, Progress, Sampling, companions
from pianodiff.sampler import heun_sample
from pianodiff.synth import example_performance
from pianodiff.unet import Past, UNet, UNetConfig

CFG = SpectrogramConfig(n_fft=64, hop_length=16, n_frames=32)
SHAPE = UNetConfig(n_bins=32, n_frames=32, patch=2, channels=(8, 16), blocks=(1, 1), attention=("", "f"),
                   emb_channels=16, cond_channels=(8, 8), adaptive=True, coordinates=True, context=8)
LARGE = replace(SHAPE, n_bins=256, n_frames=128, patch=8, context=16)  # for blocks of nano's size
FEW = {"num_steps": 2}
BLOCK = CFG.block_samples
GALLERY = Path(__file__).resolve().parent.parent / "nbs" / "20_gallery.ipynb"


def tiny_piano(cfg: SpectrogramConfig = CFG, shape: UNetConfig = SHAPE, seed: int = 0) -> Piano:
    torch.manual_seed(seed)
    net = UNet(shape)
    for parameter in net.parameters():  # the layers that start at zero would hide the condition
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return Piano(net, {"format": 1, "name": "tiny", "preset": "tiny", "spectrogram": asdict(cfg), "unet": asdict(shape),
                       "mean": 0.4, "std": 0.2, "sigma_data": 0.5, "training": {}}, "cpu")


@pytest.fixture(scope="module")
def piano() -> Piano:
    return tiny_piano()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return 0.25 * example_performance(1.3, seed=1)


def bend(wave: torch.Tensor, at: int) -> float:
    """Second difference across a join before sample `at`, in units of the largest one elsewhere within 500 samples."""
    around = wave[max(at - 500, 0) : at + 500].diff(n=2).abs()
    at = min(at, 500)
    return float(around[at - 2 : at].max() / torch.cat([around[: at - 2], around[at:]]).max())


@pytest.mark.parametrize("seconds", [1 / 8000, 0.0317, BLOCK / 8000, 0.1, 0.29])
def test_length(piano, prompt, seconds):
    total = round(seconds * 8000)
    for start in (None, prompt):
        wave = piano.generate(seconds, seed=1, prompt=start, **FEW)
        pieces = list(piano.stream(seconds, seed=1, prompt=start, **FEW))
        assert wave.shape == torch.cat(pieces).shape == (total,)
        assert wave.isfinite().all() and torch.cat(pieces).isfinite().all()
        assert len(pieces) <= math.ceil(total / BLOCK) + 1 and all(len(piece) for piece in pieces)
        frames = math.ceil(total / CFG.hop_length)
        assert piano.spectrogram(seconds, seed=1, prompt=start, **FEW).shape == (CFG.n_bins, frames)


def test_a_piano_is_sampled_from_its_models_own_noise(piano, monkeypatch):
    own = Piano(piano.net, piano.config | {"sigma_max": 300.0, "rho": 5.0}, "cpu")
    assert own.denoiser.sigma_max == 300 and piano.denoiser.sigma_max == 80
    asked = []
    monkeypatch.setitem(SAMPLERS, "heun", lambda *args, **how: asked.append(how) or heun_sample(*args, **how))
    assert not torch.allclose(own.spectrogram(0.2, seed=5, sampler="heun", **FEW),
                              piano.spectrogram(0.2, seed=5, sampler="heun", **FEW))
    assert [(how["sigma_max"], how["rho"]) for how in asked[:: len(asked) - 1]] == [(300, 5), (80, 7)]


def test_seed_fixes_everything(piano):
    state = torch.get_rng_state()
    one, two, other = (piano.generate(0.2, seed=seed, **FEW) for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.allclose(one, other)
    one, two = (torch.cat(list(piano.stream(0.2, seed=5, **FEW))) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(piano.generate(0.1, **FEW), piano.generate(0.1, **FEW))  # without a seed, one is drawn
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone


def test_a_longer_piece_begins_with_the_shorter(piano, prompt):
    for start in (None, prompt):
        long = piano.spectrogram(0.4, seed=3, prompt=start, **FEW)
        assert torch.equal(long[:, :125], piano.spectrogram(0.25, seed=3, prompt=start, **FEW))
        assert 0 <= long.min() and long.max() <= 1 and long.std() > 0.05


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_pieces_made_side_by_side_are_those_made_one_by_one(piano, prompt, sampler):
    how = {"sampler": sampler, "num_steps": 4, "guidance": 3.0}
    steps = []
    together = piano.spectrograms(0.3, [3, 5, 8], **how, callback=steps.append)
    assert len(steps) == 4 * math.ceil(0.3 / CFG.block_seconds)
    for seed, made in zip((3, 5, 8), together, strict=True):
        torch.testing.assert_close(made, piano.spectrogram(0.3, seed=seed, **how), atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    waves = piano.waves(0.3, [3, 5], prompt=prompt, **how)
    assert [(wave.seed, len(wave)) for wave in waves] == [(3, 2400), (5, 2400)]
    for wave in waves:
        alone = piano.generate(0.3, seed=wave.seed, prompt=prompt, **how)
        assert (wave - alone).norm() < 0.02 * alone.norm()  # phase retrieval enlarges what rounding changes
    assert not torch.allclose(*waves, atol=1e-2)
    with pytest.raises(ValueError, match="seed must be a whole number from 0, not -1"):
        piano.spectrograms(0.3, [3, -1], **how)


def test_each_block_follows_its_predecessor(piano, monkeypatch):
    seen = []
    monkeypatch.setattr(piano.denoiser, "forward", lambda x, sigma, cond: seen.append(cond) or torch.full_like(x, 0.25))
    spec = piano.spectrogram(2 * CFG.block_seconds, seed=0, sampler="euler", num_steps=2)
    torch.testing.assert_close(spec, torch.full_like(spec, 0.4 + 0.25 * 0.2 / 0.5))  # Eq. (standardise), backwards
    assert len(seen) == 4 and all(isinstance(past, Past) for past in seen)
    assert seen[0] is seen[1] and seen[2] is seen[3]  # encoded once for all steps
    assert not seen[0].has_prev.any() and not seen[0].columns.any() and torch.equal(seen[0].vector[0], piano.net.null)
    assert seen[2].has_prev.all()
    torch.testing.assert_close(seen[2].columns, torch.full((1, 1, 32, 8), 0.25))


def test_a_guide_is_asked_at_the_levels_of_the_interval_and_from_the_first_block(monkeypatch):
    piano, guide, asked = tiny_piano(seed=0), tiny_piano(seed=1), []
    plain = guide.denoiser.forward
    monkeypatch.setattr(piano, "guide", guide)
    monkeypatch.setattr(guide.denoiser, "forward",
                        lambda x, s, past: asked.append((float(s), bool(past.has_prev))) or plain(x, s, past))
    how = {"seed": 1, "num_steps": 4, "sampler": "euler", "guidance_interval": (0.1, 10.0)}
    made = piano.spectrogram(2 * CFG.block_seconds, guidance=2.0, **how)
    inside = [float(s) for s in karras_sigmas(4, **piano.noise_levels)[:-1].float() if 0.1 < s <= 10]
    assert inside and asked == [(s, has_prev) for has_prev in (False, True) for s in inside]
    unguided = piano.spectrogram(2 * CFG.block_seconds, guidance=1.0, **how)
    assert len(asked) == 2 * len(inside) and not torch.allclose(made, unguided, atol=1e-3)
    torch.testing.assert_close(piano.spectrogram(2 * CFG.block_seconds, guidance=0.0, **how | {
        "guidance_interval": (0.0, math.inf)}), guide.spectrogram(2 * CFG.block_seconds, guidance=1.0, **how))


def test_a_model_says_which_guidance_suits_it():
    piano = tiny_piano(seed=3)
    own = Piano(piano.net, piano.config | {"guidance": 3.0, "guidance_interval": [0.1, 10.0]})
    assert own.sampling == Sampling(guidance=3.0, guidance_interval=(0.1, 10.0)) and piano.sampling == Sampling()
    seconds, how = 2 * CFG.block_seconds, {"seed": 1, "num_steps": 4, "sampler": "euler"}
    asked = {"guidance": 3.0, "guidance_interval": (0.1, 10.0)}
    assert torch.equal(own.spectrogram(seconds, **how), piano.spectrogram(seconds, **how, **asked))
    assert torch.equal(own.spectrogram(seconds, **how, guidance=1.0), piano.spectrogram(seconds, **how, guidance=1.0))
    assert not torch.equal(own.spectrogram(seconds, **how), piano.spectrogram(seconds, **how))


def test_a_model_names_its_guide(tmp_path, monkeypatch):
    piano = tiny_piano()
    tiny_piano(seed=1).save_pretrained(tmp_path / "coarse")
    monkeypatch.chdir(tmp_path)
    guided_one = Piano(piano.net, piano.config | {"guide": "coarse"})
    assert guided_one.guide.denoiser.sigma_data == 0.5 and piano.guide is None
    assert Piano(piano.net, piano.config | {"guide": "coarse", "mean": 0.4 + 1e-12}).guide
    with pytest.raises(ValueError, match="'coarse' can't be the guide of this one: its mean is 0.4, not 0.3; take"):
        Piano(piano.net, piano.config | {"guide": "coarse", "mean": 0.3})
    for name in ("../coarse", "user/repo", 3):
        piano.save_pretrained(tmp_path / "mine")
        config = json.loads((tmp_path / "mine/config.json").read_text()) | {"guide": name}
        (tmp_path / "mine/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="guide is .*, not the name of a model"):
            Piano(tmp_path / "mine")


def test_an_expert_answers_above_its_level(tmp_path, monkeypatch):
    """Its own past is encoded, and its own guide asked, as the settings tell."""
    piano, expert, asked = tiny_piano(seed=0), tiny_piano(seed=1), []
    tiny_piano(seed=2).save_pretrained(tmp_path / "coarse")
    expert.config["guide"] = "coarse"
    expert.save_pretrained(tmp_path / "strong")
    monkeypatch.chdir(tmp_path)
    both = Piano(piano.net, piano.config | {"expert": "strong", "expert_above": 1.0})
    assert companions(both) == ["strong", "coarse"] and both.guide is None and both.expert.guide is not None

    def noted(name, denoiser):
        plain = denoiser.forward
        monkeypatch.setattr(denoiser, "forward", lambda x, s, past: asked.append((name, float(s))) or plain(x, s, past))

    for name, denoiser in (("mine", both.denoiser), ("expert", both.expert.denoiser),
                           ("guide", both.expert.guide.denoiser)):
        noted(name, denoiser)
    how = {"seed": 1, "num_steps": 6, "sampler": "euler", "guidance_interval": (0.0, math.inf)}
    both.spectrogram(CFG.block_seconds, guidance=2.0, **how)
    levels = [float(s) for s in karras_sigmas(6, **both.noise_levels)[:-1].float()]
    strong = [s for s in levels if s > 1]
    assert 0 < len(strong) < 6
    mine = [("mine", s) for s in levels if s <= 1]
    assert asked == [(name, s) for s in strong for name in ("expert", "guide")] + mine
    for level, alone in ((1e9, piano), (1e-9, Piano("strong"))):  # one of them does all
        one = Piano(piano.net, piano.config | {"expert": "strong", "expert_above": level})
        torch.testing.assert_close(one.spectrogram(2 * CFG.block_seconds, guidance=1.0, **how),
                                   alone.spectrogram(2 * CFG.block_seconds, guidance=1.0, **how))


@pytest.mark.parametrize("facts, told", [
    ({"expert": "../strong", "expert_above": 1.0}, "expert is '../strong', not the name of a model"),
    ({"expert": "strong"}, "expert_above is None, not a noise level"),
    ({"expert": "strong", "expert_above": 0}, "expert_above is 0, not a noise level"),
    ({"expert": "strong", "expert_above": "1"}, "expert_above is '1', not a noise level"),
    ({"expert_above": math.inf}, "expert_above is inf, not a noise level")])
def test_an_expert_that_is_none(tmp_path, facts, told):
    tiny_piano().save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine/config.json").read_text()) | facts
    (tmp_path / "mine/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(told)):
        Piano(tmp_path / "mine")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_labels_say_that_nothing_was_changed_and_of_a_prompt_that_it_is_unknown(prompt, monkeypatch, guidance):
    piano, seen = tiny_piano(shape=replace(SHAPE, labels=3)), []
    plain = piano.denoiser.forward
    monkeypatch.setattr(piano.denoiser, "forward", lambda x, s, past: seen.append(past.labels) or plain(x, s, past))
    how = {"seed": 1, "guidance": guidance, "guidance_interval": (0, math.inf), "num_steps": 1, "sampler": "euler"}
    new = piano.spectrogram(2 * CFG.block_seconds, **how)
    told = piano.spectrogram(2 * CFG.block_seconds, prompt=prompt, **how)
    both = 1 + (guidance != 1)  # with the predecessor and without
    assert [labels.tolist() for labels in seen] == (1 + both) * [[[0, 0, 0]]] + 2 * both * [[[0, 0, 1]]]
    torch.nn.init.zeros_(piano.net.labels.weight)
    assert torch.equal(piano.spectrogram(2 * CFG.block_seconds, **how), new)
    assert not torch.allclose(piano.spectrogram(2 * CFG.block_seconds, prompt=prompt, **how), told, atol=1e-3)


def test_what_is_out_of_range_is_clipped_before_it_conditions(piano, monkeypatch):
    seen = []
    monkeypatch.setattr(piano.denoiser, "forward", lambda x, sigma, cond: seen.append(cond) or torch.full_like(x, 9.0))
    assert (piano.spectrogram(2 * CFG.block_seconds, seed=0, sampler="euler", num_steps=1) == 1).all()
    torch.testing.assert_close(seen[1].columns, torch.full((1, 1, 32, 8), (1 - 0.4) / 0.2 * 0.5))


def test_each_block_has_its_own_noise(piano, monkeypatch):
    drawn = []
    monkeypatch.setitem(generate.SAMPLERS, SAMPLER, lambda denoise, z, cond, **how: drawn.append(z) or z)
    piano.spectrogram(3 * CFG.block_seconds, seed=1)
    list(piano.stream(2 * CFG.block_seconds, seed=1))
    assert torch.equal(drawn[0], drawn[3]) and torch.equal(drawn[1], drawn[4])
    shared = torch.corrcoef(torch.stack(drawn[:3]).flatten(1)) - torch.eye(3)
    assert shared.abs().max() < 0.2  # 1024 numbers: six standard errors
    assert abs(torch.stack(drawn).std() - 1) < 0.05


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance(piano, prompt, guidance, monkeypatch):
    batches, plain = [], piano.denoiser.forward
    monkeypatch.setattr(piano.denoiser, "forward", lambda x, s, c=None: batches.append(len(x)) or plain(x, s, c))
    made = piano.spectrogram(CFG.block_seconds, seed=2, prompt=prompt, sampler="euler", num_steps=1, guidance=guidance,
                             guidance_interval=(0, math.inf))
    assert batches == ([1] if guidance == 1 else [1, 1])
    prev = generate.continue_from(prompt, CFG, piano.device).prev
    latents = torch.randn(1, 1, 32, 32, generator=generate.generator(2, 0, 0))
    x, cond = 80 * latents.double(), (prev - 0.4)[None, None] / 0.4
    null, conditional = plain(x, torch.tensor(80.0)), plain(x, torch.tensor(80.0), cond)
    assert (conditional - null).std() > 1e-3
    expected = 0.4 + 0.4 * (null + guidance * (conditional - null))  # one Euler step, to 0, ends at what is denoised
    torch.testing.assert_close(made, expected[0, 0].clamp(0, 1).float(), atol=1e-4, rtol=0)


def test_guidance_on_an_interval(piano, prompt, monkeypatch):
    """Two evaluations at low < sigma <= high alone; the past is encoded once a block."""
    seen, encoded, plain = [], [], (piano.denoiser.forward, piano.net.embedding.forward)
    monkeypatch.setattr(piano.denoiser, "forward", lambda x, s, c: seen.append(float(s)) or plain[0](x, s, c))
    monkeypatch.setattr(piano.net.embedding, "forward", lambda x: encoded.append(len(x)) or plain[1](x))
    settings = {"seed": 2, "prompt": prompt, "sampler": "euler", "num_steps": 8, "guidance": 3.0}
    levels = [float(sigma) for sigma in karras_sigmas(8)[:-1]]
    part = piano.spectrogram(2 * CFG.block_seconds, guidance_interval=(levels[5], levels[2]), **settings)
    twice = [level for i, level in enumerate(levels) for _ in range(2 if 2 <= i < 5 else 1)]
    assert seen == pytest.approx(2 * twice) and encoded == [1, 1, 1, 1]
    everywhere = piano.spectrogram(2 * CFG.block_seconds, guidance_interval=(0, math.inf), **settings)
    nowhere = piano.spectrogram(2 * CFG.block_seconds, guidance_interval=(100.0, math.inf), **settings)
    none = piano.spectrogram(2 * CFG.block_seconds, **{**settings, "guidance": 1.0})
    torch.testing.assert_close(nowhere, none, atol=1e-4, rtol=0)
    default = piano.spectrogram(2 * CFG.block_seconds, **{**settings, "guidance": GUIDANCE})
    same = piano.spectrogram(2 * CFG.block_seconds, **{**settings, "guidance": GUIDANCE},
                             guidance_interval=GUIDANCE_INTERVAL)
    assert torch.equal(default, same) and (default - none).abs().max() > 1e-3
    assert (part - everywhere).abs().max() > 1e-3 and (part - nowhere).abs().max() > 1e-3


def test_without_predecessor_there_is_nothing_to_guide(piano):
    one = piano.spectrogram(CFG.block_seconds, seed=2, guidance=3.0, **FEW)
    assert torch.equal(one, piano.spectrogram(CFG.block_seconds, seed=2, **FEW))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(piano, prompt, sampler, monkeypatch):
    """Its noise, too, depends on the seed and the block alone, and is drawn on the CPU."""
    settings, drawn = {"prompt": prompt, "sampler": sampler, "num_steps": 3}, []
    plain = SAMPLERS[sampler]

    def spy(denoise, latents, past, *, randn_like=None, **how):
        if randn_like is None:
            return plain(denoise, latents, past, **how)
        return plain(denoise, latents, past, randn_like=lambda x: drawn.append(randn_like(x)) or drawn[-1], **how)

    monkeypatch.setitem(SAMPLERS, sampler, spy)
    torch.manual_seed(1)
    long = piano.spectrogram(3 * CFG.block_seconds, seed=4, **settings)
    torch.manual_seed(2)
    short, other = (piano.spectrogram(CFG.block_seconds, seed=seed, **settings) for seed in (4, 5))
    assert torch.equal(long[:, :32], short) and not torch.allclose(short, other)
    assert piano.spectrogram(CFG.block_seconds, seed=4, **{**settings, "num_steps": 1}).isfinite().all()
    assert len(drawn) == (5 * 2 if sampler in ("euler_ancestral", "dpmpp_3m_sde") else 0)
    if drawn:
        shared = torch.corrcoef(torch.stack(drawn[:6]).flatten(1)) - torch.eye(6)  # three blocks, two steps each
        assert shared.abs().max() < 0.2 and abs(torch.stack(drawn).std() - 1) < 0.05
        latents = torch.randn(1, 1, 32, 32, generator=generate.generator(4, 0, 0))
        assert abs(torch.corrcoef(torch.stack([latents, drawn[0]]).flatten(1))[0, 1]) < 0.2


def test_progress(piano):
    seen: list[Progress] = []
    piano.generate(2 * CFG.block_seconds, seed=0, num_steps=3, callback=seen.append)
    assert seen == [Progress(block, 2, step, 3) for block in (0, 1) for step in (1, 2, 3)]
    stream, seen = piano.stream(seed=0, num_steps=2, callback=lambda p: seen.append(p)), []
    next(stream)
    assert seen == [(0, None, 1, 2), (0, None, 2, 2)]


def test_results_are_ordinary_tensors(piano, prompt):
    for result in (piano.generate(0.1, seed=0, prompt=prompt, **FEW), piano.spectrogram(0.05, seed=0, **FEW),
                   next(piano.stream(0.2, seed=0, **FEW))):
        result *= 0.5  # inference tensors would refuse
        (torch.ones(1, requires_grad=True) * result).sum().backward()


def test_an_endless_stream_begins_like_a_long_one(piano):
    endless, pieces = piano.stream(seed=4, **FEW), list(piano.stream(20 * CFG.block_seconds, seed=4, **FEW))
    for piece in pieces[:-1]:
        assert torch.equal(next(endless), piece)


def test_prompt_frames_end_where_the_prompt_ends(piano):
    whole = example_performance(1.3, seed=0)
    hop = CFG.hop_length
    for end in (8000, 8000 - 5):  # a whole number of hops, and not
        prompt = whole[:end]
        start = generate.continue_from(prompt, CFG, piano.device)
        truth = to_spectrogram(whole[end % hop :] / prompt.abs().max(), CFG)[:, : end // hop]  # they see a future
        assert start.prev.shape == (CFG.n_bins, CFG.n_frames)
        torch.testing.assert_close(start.prev[:, :-1], truth[:, -CFG.n_frames : -1], atol=1e-4, rtol=0)
        assert torch.equal(start.prev[:, -1], start.prev[:, -2])  # the last window would reach beyond the end
        torch.testing.assert_close(start.wave * start.peak, prompt[-len(start.wave) :])
        assert len(start.wave) == start.spec.shape[1] * hop


def test_a_prompts_level_is_its_continuations(piano, prompt):
    loud, quiet = (piano.generate(0.2, seed=1, prompt=level * prompt, **FEW) for level in (1, 0.125))
    torch.testing.assert_close(quiet, 0.125 * loud)
    loud, quiet = (next(piano.stream(0.2, seed=1, prompt=level * prompt, **FEW)) for level in (1, 0.125))
    torch.testing.assert_close(quiet, 0.125 * loud)


def test_the_prompt_is_left_as_it_was(piano, prompt):
    before = prompt.clone()
    piano.generate(0.1, seed=1, prompt=prompt, **FEW)
    assert torch.equal(before, prompt)


def test_no_click_at_joins():
    piano, prompt = tiny_piano(SPECTROGRAMS["nano"], LARGE), 0.25 * example_performance(3, seed=1)
    assert bend(torch.cat([prompt, piano.generate(1, seed=1, prompt=prompt, **FEW)]), len(prompt)) < 1.5
    pieces = [prompt, *piano.stream(8, seed=1, prompt=prompt, **FEW)]
    joins = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()[:-1]
    bends = [bend(torch.cat(pieces), at) for at in joins]
    assert len(bends) == 5 and max(bends) < 1.5


def ruler(wave: torch.Tensor) -> torch.Tensor:
    """Magnitudes of an STFT that no model's spectrogram is made with."""
    return torch.stft(wave, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()


def test_a_stream_is_as_good_as_a_single_inversion(monkeypatch):
    cfg, piano = SPECTROGRAMS["nano"], tiny_piano(SPECTROGRAMS["nano"], LARGE)
    music = example_performance(6 * cfg.block_seconds, seed=0)
    prompt, known = music[: cfg.block_samples] / 2, music[: cfg.block_samples].abs().max()
    spec = to_spectrogram(music / known, cfg)[:, cfg.n_frames :]  # in place of a good model's
    monkeypatch.setattr(generate, "blocks", lambda *how: iter(spec[None].split(cfg.n_frames, dim=2)))
    for start in (None, prompt):
        target, quality = ruler(music[cfg.block_samples :] * (0.5 if start is not None else 1 / known))[:, :-10], []
        for wave in (piano.generate(10, seed=0, prompt=start), torch.cat(list(piano.stream(10, seed=0, prompt=start)))):
            error = ruler(wave)[:, : target.shape[1] - 10] - target[:, :-10]
            quality.append(20 * torch.log10(error.norm() / target[:, :-10].norm()))
        assert quality[0] < -18 and quality[1] < quality[0] + 1, quality  # decibels of spectral convergence


def test_save_and_load(piano, tmp_path):
    piano.save_pretrained(tmp_path / "one")
    one = Piano.from_pretrained(tmp_path / "one")
    one.save_pretrained(tmp_path / "two")
    two = Piano.from_pretrained(str(tmp_path / "two"), device="cpu")
    assert one.config == two.config and one.cfg == CFG
    assert torch.equal(one.generate(0.1, seed=0, **FEW), two.generate(0.1, seed=0, **FEW))
    for stored, weight in zip(one.net.parameters(), piano.net.parameters(), strict=True):
        assert torch.equal(stored, weight.half().float())


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9, 86_401, 1e-6])
def test_impossible_lengths(piano, seconds):
    for call in (piano.generate, piano.stream, piano.spectrogram):
        with pytest.raises(ValueError, match="seconds must be more than 0 and at most 86400"):
            call(seconds)


@pytest.mark.parametrize(("settings", "message"), [
    ({"prompt": torch.ones(BLOCK - 1)}, "the prompt lasts 0.064 s; give at least 0.064 s"),
    ({"prompt": torch.zeros(BLOCK)}, "silent"),
    ({"prompt": torch.ones(BLOCK).index_fill(0, torch.tensor([3]), torch.nan)}, "NaN"),
    ({"prompt": torch.ones(2, BLOCK)}, "must be a wave"),
    ({"seed": -1}, "seed must be a whole number from 0, not -1"),
    *(({"seed": seed}, "seed must be a whole number") for seed in (1.5, float("inf"), float("nan"))),
    ({"sampler": "hein"}, "no sampler 'hein'; choose of heun"),
    ({"num_steps": 0}, "num_steps"),
    ({"num_steps": 10**12}, "num_steps"),
    ({"guidance": float("nan")}, "guidance must be finite"),
    ({"guidance_interval": (2, 1)}, "guidance_interval must be noise levels low < high from 0, not 2 and 1"),
    ({"guidance_interval": (-1, 1)}, "guidance_interval must be"),
    ({"guidance_interval": (0, float("nan"))}, "guidance_interval must be"),
])
def test_bad_input_is_told_at_once(piano, settings, message):
    for call in (piano.generate, piano.stream, piano.spectrogram):  # a stream too, before its first piece
        with pytest.raises(ValueError, match=message):
            call(1, **settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"seconds": "6"}, "seconds must be a number, not str"),
    ({"seconds": None}, "seconds must be a number, not NoneType"),
    ({"seed": "7"}, "seed must be a number, not str"),
    ({"seed": [1, 2]}, "seed must be one number; several are for `waves` and `spectrograms`"),
    ({"num_steps": "15"}, "num_steps must be a number, not str"),
    ({"guidance": "2"}, "guidance must be a number, not str"),
    ({"guidance_interval": 2.0}, r"guidance_interval must be two noise levels \(low, high\)"),
    ({"guidance_interval": ("0", "1")}, "a level of guidance_interval must be a number, not str"),
    ({"prompt": 7}, r"the prompt must be a wave \[T\] or the path of a sound file, not int"),
    ({"steps": 20}, "takes no 'steps'; did you mean num_steps\\?"),
    ({"zzz": 20}, "takes no 'zzz'$"),
])
def test_another_type_gets_one_line(piano, settings, message):
    for call in (piano.generate, piano.spectrogram, piano.stream):
        if call == piano.stream and settings == {"seconds": None}:
            continue  # a stream without end
        with pytest.raises(TypeError, match=message) as caught:
            call(**{"seconds": 1, **settings})
        assert "\n" not in str(caught.value)


def test_all_settings_are_seen_in_the_signature(piano):
    for call in (piano.generate, piano.stream, piano.spectrogram, piano.spectrograms, piano.waves):
        shown = inspect.signature(call).parameters
        own = dict.fromkeys(("sampler", "num_steps", "guidance", "guidance_interval"))
        assert own.items() <= {name: value.default for name, value in shown.items()}.items()
        assert {"prompt", "callback"} <= shown.keys()


def test_a_sampling_is_checked_when_it_is_made():
    assert asdict(Sampling()) == {"sampler": SAMPLER, "num_steps": NUM_STEPS, "guidance": GUIDANCE,
                                  "guidance_interval": GUIDANCE_INTERVAL}
    with pytest.raises(ValueError, match="num_steps must be a whole number"):
        replace(Sampling(), num_steps=0)
    with pytest.raises(FrozenInstanceError):
        Sampling().num_steps = 20


def test_a_model_may_have_its_own_steps_and_levels(piano):
    own = {"sampler": "euler", "num_steps": 3, "sigma_min": 0.1, "sigma_max": 20.0, "rho": 3.0, "guidance": 1.0}
    mine = Piano(piano.net, piano.config | own)
    assert mine.sampling == Sampling("euler", 3, 1.0)
    made, seen = mine.spectrogram(CFG.block_seconds, seed=2), []
    levels = karras_sigmas(3, 0.1, 20.0, 3.0)
    told = Piano(piano.net, piano.config | {"guidance": 1.0, "sigma_min": 0.1, "sigma_max": 20.0, "rho": 3.0})
    assert torch.equal(made, told.spectrogram(CFG.block_seconds, seed=2, num_steps=3, sampler="euler"))
    plain = mine.denoiser.forward
    mine.denoiser.forward = lambda x, s, past: seen.append(float(s)) or plain(x, s, past)
    mine.spectrogram(CFG.block_seconds, seed=2)
    assert seen == levels[:-1].float().tolist()


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_student_is_asked_once_at_each_of_its_levels(piano, prompt, with_prompt):
    student = Piano(piano.net, piano.config | {"sigmas": [50, 2.0, 0.3], "sigma_max": 400.0, "guidance": 3.0})
    assert student.sampling == Sampling("euler", 3, 1.0) and student.denoiser.sigma_max == 50
    asked, plain = [], student.denoiser.forward
    student.denoiser.forward = lambda x, s, past: asked.append(round(float(s), 6)) or plain(x, s, past)
    steps, how = [], {"prompt": prompt} if with_prompt else {}
    made = student.spectrogram(2 * CFG.block_seconds, seed=3, callback=steps.append, **how)
    assert asked == [50, 2, 0.3] * 2 and [(p.step, p.num_steps) for p in steps] == [(1, 3), (2, 3), (3, 3)] * 2
    same = {"sampler": "euler", "num_steps": 3, "guidance": 1.0}  # what it does may also be said
    assert torch.equal(made, student.spectrogram(2 * CFG.block_seconds, seed=3, **how, **same))


@pytest.mark.parametrize("asked, told", [
    ({"num_steps": 4}, "drawn with num_steps 3, not 4"), ({"guidance": 1.3}, "drawn with guidance 1.0, not 1.3"),
    ({"sampler": "heun"}, "drawn with sampler euler, not heun")])
def test_a_student_refuses_what_it_has_not_learnt(piano, asked, told):
    student = Piano(piano.net, piano.config | {"sigmas": [50, 2.0, 0.3]})
    with pytest.raises(ValueError, match=f"is a student, {told}; ask its teacher, or leave ") as error:
        student.generate(1, seed=0, **asked)
    assert "\n" not in str(error.value)


def test_what_is_made_knows_its_seed(piano):
    drawn = piano.generate(0.1, **FEW)
    assert type(drawn) is Wave and drawn.sample_rate == CFG.sample_rate
    assert torch.equal(drawn, piano.generate(0.1, seed=drawn.seed, **FEW))
    pieces = list(piano.stream(0.2, **FEW))
    assert len({piece.seed for piece in pieces}) == 1 and {type(piece) for piece in pieces} == {Wave}
    assert torch.equal(torch.cat(pieces), torch.cat(list(piano.stream(0.2, seed=pieces[0].seed, **FEW))))
    assert len({wave.seed for wave in piano.waves(0.1, [None, None, 3], **FEW)} - {3}) == 2
    with pytest.raises(ValueError, match="no seeds; give at least one"):
        piano.waves(0.1, [], **FEW)


def test_a_prompt_may_be_an_array_or_a_file(piano, prompt, tmp_path):
    save_audio(tmp_path / "prompt.flac", prompt)
    heard = load_audio(tmp_path / "prompt.flac")
    wanted = piano.generate(0.1, seed=1, prompt=heard, **FEW)
    for same in (tmp_path / "prompt.flac", str(tmp_path / "prompt.flac"), heard.numpy(), heard.double().numpy(),
                 Wave(heard, CFG.sample_rate)):
        assert torch.equal(piano.generate(0.1, seed=1, prompt=same, **FEW), wanted)
    with pytest.raises(FileNotFoundError, match="is not a file; give the path of a sound file"):
        piano.generate(0.1, prompt="nowhere.wav", **FEW)
    with pytest.raises(ValueError, match="the prompt has 16000 Hz, the model 8000; save it, and give its path"):
        piano.generate(0.1, prompt=Wave(prompt.clone(), 16_000), **FEW)


def test_a_piano_is_opened_by_name(piano, tmp_path):
    piano.save_pretrained(tmp_path / "tiny")
    opened = pianodiff.Piano(tmp_path / "tiny", device="cpu")
    assert opened.config == Piano.from_pretrained(tmp_path / "tiny").config
    count = sum(parameter.numel() for parameter in piano.net.parameters())
    assert repr(opened) == (f"Piano('tiny': {count / 1e6:.3g} million parameters, blocks of 0.064 s at 8000 Hz, "
                            "on cpu)")
    for wrong in ((piano.net,), ("nano", "cpu"), (3,)):
        with pytest.raises(TypeError, match="give a model's name, as in Piano\\('nano', device='cpu'\\), or a network"):
            Piano(*wrong)


def test_the_package_hands_out_a_piano_and_loads_torch_no_sooner():
    done = """import sys, pianodiff
assert "torch" not in sys.modules and not hasattr(pianodiff, "Pianoo")
from pianodiff import Piano
assert Piano is sys.modules["pianodiff.generate"].Piano and "torch" in sys.modules"""
    subprocess.run([sys.executable, "-c", done], check=True)


def test_a_notebook_shows_a_bar_for_what_takes_long(piano, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **how):
            self.how, self.steps = how, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

        def update(self):
            self.steps += 1

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    piano.generate(2 * CFG.block_seconds, seed=0, **FEW)
    assert not bars
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    piano.generate(2 * CFG.block_seconds, seed=0, **FEW)
    [bar] = bars
    assert bar.how["total"] == bar.steps == 4 and bar.how["delay"] == 1 and bar.closed
    seen = []
    piano.generate(2 * CFG.block_seconds, seed=0, callback=seen.append, **FEW)  # whoever watches needs no bar
    assert len(seen) == 4 and len(bars) == 1


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_here(piano, device):
    with pytest.raises(ValueError, match=f"the device '{device}' can't be used .*; 'cpu' always can") as caught:
        Piano(piano.net, piano.config, device)
    assert "\n" not in str(caught.value)


def test_memory_of_a_stream_does_not_grow(piano):
    def held() -> int:
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))

    stream = piano.stream(seed=0, num_steps=1, sampler="euler")
    for _ in range(3):
        next(stream)
    before = held()
    for _ in range(20):
        next(stream)
    assert held() == before


def gallery() -> dict[str, str]:
    """{command: the player below it} of the gallery's cells, the program's name left out."""
    found = {}
    for cell in json.loads(GALLERY.read_text())["cells"]:
        for command in re.findall(r'^listen\("pianodiff (.+)"\)$', "".join(cell["source"]), re.M):
            found[command] = "".join(cell["outputs"][0]["data"]["text/html"]) if cell["outputs"] else ""
    return found


def test_the_gallery_is_unpicked():
    words = [command.split() for command in gallery() if command.startswith("generate")]
    played = [("base" if "base" in command else "nano", command[command.index("--seed") + 1]) for command in words]
    assert played == [(model, str(seed)) for seed in (0, 1, 2, 3, 7) for model in ("nano", "base")]
    assert [command for command in gallery() if command.startswith("continue")]


@pytest.mark.parametrize("command", gallery())
def test_a_command_of_the_gallery_is_the_librarys_call(command, tmp_path, monkeypatch):
    """In fewer steps, and shorter: `listen` in the gallery plays the file that the command writes."""
    monkeypatch.chdir(tmp_path)
    save_audio("minuet.wav", 0.3 * example_performance(4.1, seed=0))
    words = re.sub(r"--seconds \S+", "--seconds 2.1 --steps 2", command).split()
    assert main(words) == 0
    options = {flag: value for flag, value in zip(words, words[1:], strict=False) if flag.startswith("--")}
    prompt = load_audio(words[1]) if words[0] == "continue" else torch.zeros(0)
    piano = Piano.from_pretrained(options.get("--model", "nano"))
    made = piano.stream(2.1, seed=int(options["--seed"]), num_steps=2, prompt=prompt if len(prompt) else None,
                        guidance=float(options.get("--guidance", GUIDANCE)))
    wave = torch.cat([prompt, *made]).clamp(-1, 1)
    torch.testing.assert_close(load_audio(options["--out"]), wave, atol=2**-14, rtol=0)


@pytest.mark.parametrize("command", gallery())
def test_the_gallery_plays_what_its_commands_make(command):
    """The sound below a command has the length that the command asks for, and the command for a title."""
    html = gallery()[command]
    sound = load_audio(io.BytesIO(base64.b64decode(re.search(r"data:audio/mpeg;base64,([^\"]+)", html)[1])))
    seconds = float(re.search(r"--seconds (\S+)", command)[1]) + (4.1 if command.startswith("continue") else 0)
    assert len(sound) == round(8000 * seconds) and sound.abs().max() > 0.01
    assert f"pianodiff {command}" in html
