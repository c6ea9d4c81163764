"""Fréchet and kernel distances, intervals, embeddings and their cache (chapter 9a)."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn

from pianodiff.audio import SpectrogramConfig
from pianodiff.distance import (
    Embedding,
    LogMel,
    Moments,
    VGGish,
    distances,
    embed,
    farther,
    floors,
    frechet_distance,
    frechet_infinity,
    interval,
    kernel_distance,
    kernel_distance_to,
    load_embedding,
    median_distance,
    ranks_rightly,
    vggish_examples,
)
from pianodiff.pieces import Piece, Pieces, Row, make_rows, noise_like, read_pieces, retrieved
from pianodiff.synth import example_performance


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(mean: Tensor, cov: Tensor) -> Moments:
    """Moments that are exact: of the 2 D points at mean ± sqrt(D) times the columns of the covariance's root."""
    values, vectors = torch.linalg.eigh(cov)
    n = 2 * len(mean)
    columns = (vectors * values.clamp(min=0).sqrt()).T * math.sqrt((n - 1) / 2)
    return Moments.of(torch.cat([mean + columns, mean - columns]))


@pytest.fixture(autouse=True)
def no_warnings_unasked(request):
    with warnings.catch_warnings():
        if not request.node.get_closest_marker("filterwarnings"):
            warnings.simplefilter("error", UserWarning)
        yield


# Moments


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_moments_in_any_batches_are_numpys(offset):
    x = offset + normal(500, 7) @ normal(7, 7, seed=1)
    whole, parts = Moments.of(x), Moments(7)
    for batch in x.split([1, 2, 400, 97]):
        assert parts.update(batch) is parts
    for moments in (whole, parts):
        assert moments.n == 500 and moments.mean.dtype == moments.cov.dtype == torch.float64
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(moments.cov, torch.from_numpy(np.cov(x.numpy().T)), rtol=1e-8, atol=1e-8)


def test_float32_points_are_summed_in_float64():
    x = 1000 + normal(4000, 3).float()
    torch.testing.assert_close(Moments.of(x).cov, x.double().T.cov(), rtol=1e-11, atol=1e-12)


def test_shrinkage_is_oracle_approximating():
    x = normal(20, 50)
    moments, shrunk = Moments.of(x), Moments.of(x).shrunk()
    s, p, n = moments.cov, 50, 19
    trace, squares = float(s.trace()), float((s @ s).trace())
    rho = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))  # Chen et al., Eq. (23)
    expected = (1 - min(rho, 1)) * s + min(rho, 1) * trace / p * torch.eye(p)
    torch.testing.assert_close(shrunk.cov, expected)
    torch.testing.assert_close(shrunk.mean, moments.mean)
    assert shrunk.n == 20 and torch.linalg.eigvalsh(shrunk.cov).min() > 0
    assert (shrunk.cov - torch.eye(p)).norm() < 0.3 * (s - torch.eye(p)).norm()
    torch.testing.assert_close(moments.cov, s)  # a copy: the original stays


def test_shrinkage_vanishes_with_many_points_and_survives_a_ball():
    x = normal(20000, 4) * torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(Moments.of(x).shrunk().cov, Moments.of(x).cov, atol=0.01, rtol=0)
    ball = gaussian(torch.zeros(3), torch.eye(3))
    torch.testing.assert_close(ball.shrunk().cov, ball.cov)


# Fréchet


@pytest.mark.parametrize("dim", [1, 2, 16, 100])
def test_frechet_is_scipys(dim):
    a, b = Moments.of(normal(300, dim)), Moments.of(normal(250, dim, seed=1) @ normal(dim, dim, seed=2) + 0.3)
    root = sqrtm((a.cov @ b.cov).numpy())
    expected = (a.mean - b.mean).square().sum() + (a.cov + b.cov).trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_moments_that_grow_are_measured_anew():
    x, y = normal(40, 3), normal(50, 3, seed=1) + 1
    growing = Moments.of(x[:20])
    assert frechet_distance(growing, Moments.of(y)) != frechet_distance(growing.update(x[20:]), Moments.of(y))
    assert frechet_distance(growing, Moments.of(y)) == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)))


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mu, nu, s, t = normal(4, 9)
    a, b = gaussian(mu, torch.diag(s**2)), gaussian(nu, torch.diag(t**2))
    expected = (mu - nu).square().sum() + (s.abs() - t.abs()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_does_not_change_under_rotation():
    x, y, turn = normal(200, 12), 2 + normal(300, 12, seed=1) * 3, torch.linalg.qr(normal(12, 12, seed=2)).Q
    expected = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(Moments.of(x @ turn), Moments.of(y @ turn)) == pytest.approx(expected, rel=1e-9)


def test_equal_clouds_are_at_no_distance_even_without_full_rank():
    for n in (40, 1000):
        x = normal(n, 60) @ normal(60, 60, seed=1)
        with warnings.catch_warnings(action="ignore"):
            found = frechet_distance(Moments.of(x), Moments.of(x))
        assert 0 <= found < 1e-9 * Moments.of(x).cov.trace()


def test_flat_clouds_are_exact_too():
    """Of rank 1: tr sqrt(AB) = |u.v| for A = uu', B = vv'. A root of zeros that are rounded loses half the digits."""
    u, v = normal(2, 50)
    with warnings.catch_warnings(action="ignore"):
        a, b = (Moments.of(torch.stack([w, -w]) / math.sqrt(2)) for w in (u, v))
        found = frechet_distance(a, b)
    assert found == pytest.approx(float(u @ u + v @ v - 2 * abs(u @ v)), rel=1e-6)


def test_the_bias_falls_with_clips_and_extrapolation_removes_most_of_it():
    scale = torch.linspace(1, 0.1, 24)
    reference = gaussian(torch.zeros(24), torch.diag(scale**2))
    plain, infinite = [], []
    for seed in range(20):
        x = scale * normal(160, 24, seed=seed)
        plain.append([frechet_distance(Moments.of(part), reference) for part in (x[:80], x)])
        infinite.append(frechet_infinity(x, reference, repeats=4, seed=seed).value)
    small, large = np.mean(plain, axis=0)
    assert 1.7 < small / large < 2.3  # 1/N
    assert abs(np.mean(infinite)) < 0.15 * large


def test_extrapolation_is_the_line_through_its_own_points():
    x, reference = normal(120, 5) + 1, Moments.of(normal(500, 5, seed=1))
    line = frechet_infinity(x, reference, num_sizes=4, repeats=3, seed=5)
    slope, value = np.polyfit([1 / n for n in line.sizes], line.distances, 1)
    assert (line.value, line.slope) == pytest.approx((value, slope))
    assert line.sizes[0] == 60 and line.sizes[-1] == 120 and len(line.sizes) == len(line.distances) == 4
    assert line.distances[-1] == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    assert line == frechet_infinity(x, reference, num_sizes=4, repeats=3, seed=5)
    assert line != frechet_infinity(x, reference, num_sizes=4, repeats=3, seed=6)
    assert slope > 0


# Kernel distance


def naive_mmd(x: Tensor, y: Tensor, h: float) -> float:
    def k(a, b):
        return math.exp(-float((a - b).square().sum()) / (2 * h * h))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_double_sum():
    x, y = normal(13, 3), 0.5 + normal(9, 3, seed=1)
    pairs = sorted(float((y[i] - y[j]).norm()) for i in range(9) for j in range(i))
    assert median_distance(y) == pytest.approx(pairs[(len(pairs) - 1) // 2])
    assert kernel_distance(x, y) == pytest.approx(naive_mmd(x, y, median_distance(y)), rel=1e-9)
    assert kernel_distance(x, y, bandwidth=0.7) == pytest.approx(naive_mmd(x, y, 0.7), rel=1e-9)
    assert kernel_distance_to(y, bandwidth=0.7)(x) == kernel_distance(x, y, bandwidth=0.7)
    assert kernel_distance(100 * x, 100 * y) == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_kernel_distance_in_chunks_is_the_same():
    x, y = normal(2100, 2), normal(30, 2, seed=1)
    k = torch.exp(-torch.cdist(x, x).square() / 2)
    within = float((k.sum() - 2100) / (2100 * 2099))
    cross = float(torch.exp(-torch.cdist(x, y).square() / 2).mean())
    ky = torch.exp(-torch.cdist(y, y).square() / 2)
    expected = within + float((ky.sum() - 30) / (30 * 29)) - 2 * cross
    assert kernel_distance(x, y, bandwidth=1.0) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_has_no_bias_and_falls_below_zero():
    found = np.array([kernel_distance(normal(30, 6, seed=s), normal(40, 6, seed=s + 500)) for s in range(100)])
    assert abs(found.mean()) < 4 * found.std() / 10 and 0.2 < (found < 0).mean() < 0.9
    assert kernel_distance(normal(30, 6) + 1, normal(40, 6, seed=1)) > found.max()


# Intervals


def test_interval_holds_the_truth_about_as_often_as_it_says():
    scale, shift = torch.linspace(1, 0.3, 10), 0.5 * torch.eye(10)[0]
    reference, held, middles, plain = gaussian(torch.zeros(10), torch.diag(scale**2)), 0, [], []
    truth = 0.25 + float((0.2 * scale).square().sum())
    for seed in range(50):
        x = shift + 1.2 * scale * normal(80, 10, seed=seed)
        low, high = interval(lambda z: frechet_distance(Moments.of(z), reference), x, resamples=30, seed=seed)
        held += low <= truth <= high
        middles.append((low + high) / 2)
        plain.append(frechet_distance(Moments.of(x), reference))
    assert held >= 42
    assert abs(np.mean(middles) - truth) < 0.4 * (np.mean(plain) - truth)


def test_interval_of_a_mean_is_the_textbooks():
    x = normal(400, 1)
    low, high = interval(lambda z: float(z.mean()), x, resamples=2000)
    assert (low + high) / 2 == pytest.approx(float(x.mean()), abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.06)
    narrow = interval(lambda z: float(z.mean()), x, resamples=2000, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.67448975 / 1.95996398, rel=1e-7)
    assert interval(lambda z: float(z.mean()), x, seed=1) == interval(lambda z: float(z.mean()), x, seed=1)


def test_interval_draws_groups():
    """Ten near copies of each tell no more than one of each: the interval of the mean is that of the 40, not of 400."""
    single = normal(40, 1)
    copies, groups = single.repeat_interleave(10, 0), torch.arange(40).repeat_interleave(10)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    expected = interval(lambda z: float(z.mean()), single, resamples=200)
    found = interval(lambda z: float(z.mean()), copies[order], groups=7 * groups[order], resamples=200)
    assert found == pytest.approx(expected, rel=1e-5)


# What is refused


@pytest.mark.parametrize("call, words", [
    (lambda x: Moments.of(x / 0), "NaN or infinite"),
    (lambda x: Moments(3).update(x), "4 dimensions"),
    (lambda x: Moments.of(x[0]), "shape"),
    (lambda x: Moments.of(x[:0]), "shape"),
    (lambda x: Moments.of(x[:1]).cov, "at least 2 clips"),
    (lambda x: Moments.of(x[:1]).shrunk(), "at least 2 clips"),
    (lambda x: frechet_distance(Moments.of(x[:1]), Moments.of(x)), "at least 2 clips"),
    (lambda x: frechet_distance(Moments.of(x), Moments(4)), "at least 2 clips"),
    (lambda x: frechet_distance(Moments.of(x), Moments.of(x[:, :2])), "4 and 2 dimensions"),
    (lambda x: frechet_infinity(x[:3], Moments.of(x)), "4 clips"),
    (lambda x: frechet_infinity(x, Moments.of(x[:, :2])), "4 and 2 dimensions"),
    (lambda x: frechet_infinity(x, Moments.of(x), num_sizes=1), "2 sizes"),
    (lambda x: kernel_distance(x[:1], x), "at least 2 clips"),
    (lambda x: kernel_distance(x, x[:, :3]), "4 and 3 dimensions"),
    (lambda x: kernel_distance(x, x * math.nan), "NaN"),
    (lambda x: kernel_distance(x, x[:1].expand(5, 4)), "the same"),
    (lambda x: kernel_distance(x, x, bandwidth=0.0), "bandwidth"),
    (lambda x: interval(lambda z: 0.0, x[:3]), "4 clips"),
    (lambda x: interval(lambda z: 0.0, x, groups=torch.arange(len(x)) % 3), "4 clips or groups"),
    (lambda x: interval(lambda z: 0.0, x, groups=torch.arange(3)), "each of the"),
    (lambda x: interval(lambda z: 0.0, x, resamples=1), "2 resamples"),
    (lambda x: interval(lambda z: 0.0, x, level=1.0), "level"),
])
def test_bad_points_are_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(normal(10, 4))
    assert "\n" not in str(caught.value)


def test_few_clips_are_warned_of():
    few, many = Moments.of(normal(10, 12)), Moments.of(normal(100, 12))
    for pair in ((few, many), (many, few)):
        with pytest.warns(UserWarning, match=r"10 clips in 12 dimensions.*trust the kernel distance"):
            frechet_distance(*pair)
    with pytest.warns(UserWarning, match="8 clips in 12"):
        frechet_infinity(normal(16, 12), many)
    frechet_distance(few.shrunk(), many)  # no warning: the fixture makes it an error
    frechet_distance(many, few.shrunk())


# logmel


def tones(n: int = 6, seconds: float = 1.024, rate: int = 8000) -> Tensor:
    """Struck tones with a decay: different clips of notes."""
    t = torch.arange(round(seconds * rate)) / rate
    rng = torch.Generator().manual_seed(0)
    clips = []
    for _ in range(n):
        onset, pitch = torch.rand(2, generator=rng)
        s = (t - 0.5 * onset).clamp(min=0)
        partials = [0.3 / k * torch.sin(440 * torch.pi * 4**pitch * k * s) for k in (1, 2, 3)]
        clips.append(torch.stack(partials).sum(0) * torch.exp(-5 * s))
    return torch.stack(clips)


def test_logmel_levels_are_bels():
    t = torch.arange(16384) / 8000
    loud = torch.sin(2 * torch.pi * 1000 * t)[None] + 0.1 * normal(1, 16384).float()
    a, b = (LogMel()(wave, 8000) for wave in (loud, loud * 10**-0.5))
    assert a.shape == (1, 96) and a.dtype == torch.float32
    torch.testing.assert_close(a[:, :24] - b[:, :24], torch.ones(1, 24), atol=0.02, rtol=0)  # 10 dB is 1 bel
    torch.testing.assert_close(a[:, 24:], b[:, 24:], atol=0.05, rtol=0)
    assert a[0, :24].argmax() == 10  # mel(1 kHz) = 1000, bands every 84 from 43


def test_logmel_hears_what_it_should():
    clips = tones(8)
    x, order = LogMel()(clips, 8000), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    changed = {
        "backwards": clips.flip(1), "shuffled": clips.reshape(8, 32, -1)[:, order].flatten(1), "quieter": clips / 2,
        "noise": 0.1 * normal(8, 8192).float(),
    }
    distances = {name: float((LogMel()(wave, 8000) - x).norm(dim=1).mean()) for name, wave in changed.items()}
    assert min(distances.values()) > 0.5 and max(distances, key=distances.get) == "noise"
    mean = LogMel()(clips.flip(1), 8000)[:, :24] - x[:, :24]
    assert mean.abs().mean() < 0.1 * distances["backwards"]  # told from rises and falls, not from levels
    torch.testing.assert_close(LogMel()(clips, 8000), x, rtol=0, atol=0)
    torch.testing.assert_close(LogMel()(clips[2:3], 8000), x[2:3], atol=1e-4, rtol=1e-4)


def test_levelled_is_logmel_without_loudness():
    clips = tones(4) + 0.01 * normal(4, 8192).float()    # well above the floor of -80 dB
    levelled = load_embedding("levelled")
    x = levelled(clips, 8000)
    assert levelled.name != LogMel().name and x.shape == (4, 96)
    torch.testing.assert_close(levelled(clips / 4, 8000), x, atol=0.03, rtol=0)
    assert (LogMel()(clips / 4, 8000) - LogMel()(clips, 8000)).abs().max() > 1
    torch.testing.assert_close(x[:, :24].mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 24:], LogMel()(clips, 8000)[:, 24:])
    assert levelled(torch.zeros(1, 8192), 8000).isfinite().all()


def test_logmel_resamples():
    slow, fast = tones(2, rate=8000), tones(2, rate=24000)
    torch.testing.assert_close(LogMel()(fast, 24000)[:, :16], LogMel()(slow, 8000)[:, :16], atol=0.3, rtol=0)


def test_silence_has_a_level():
    assert LogMel()(torch.zeros(1, 8192), 8000).isfinite().all()


@pytest.mark.parametrize("waves", [torch.zeros(8192), torch.zeros(2, 0), torch.zeros(0, 9000), torch.zeros(2, 100),
                                   torch.full((2, 8192), math.nan), torch.zeros(2, 8192, dtype=torch.int16)])
def test_bad_waves_are_refused(waves):
    for call in (LogMel(), vggish_examples):
        with pytest.raises(ValueError) as caught:
            call(waves, 8000)
        assert "\n" not in str(caught.value)


# VGGish


def test_vggish_front_end_is_as_published():
    sine = torch.sin(2000 * torch.pi * torch.arange(48000, dtype=torch.float64) / 16000)[None]
    examples = vggish_examples(sine, 16000)
    assert examples.shape == (1, 3, 96, 64) and examples.dtype == torch.float32
    # what the published smoke test prints for this sound
    first, last = [-4.48313252, -4.27083405, -4.17064267], [-4.60069383, -4.60098887, -4.60116305]
    for column, value in zip([0, 1, 2, 61, 62, 63], first + last, strict=True):
        torch.testing.assert_close(examples[..., column], torch.full((1, 3, 96), value), atol=2e-4, rtol=0)


def test_vggish_front_end_by_hand():
    wave = 0.3 * normal(1, 16000).float()
    found = vggish_examples(wave, 16000)
    assert found.shape == (1, 1, 96, 64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)  # periodic
    edges = np.linspace(*(1127 * np.log(1 + f / 700) for f in (125, 7500)), 66)
    mel = 1127 * np.log(1 + np.arange(257) * 31.25 / 700)
    for frame in (0, 1, 95):
        magnitude = np.abs(np.fft.rfft(wave[0, 160 * frame : 160 * frame + 400].double().numpy() * window, 512))
        for band in (0, 30, 63):
            low, centre, high = edges[band : band + 3]
            weight = np.interp(mel, [low, centre, high], [0, 1, 0])
            assert float(found[0, 0, frame, band]) == pytest.approx(math.log(weight @ magnitude + 0.01), abs=1e-4)


def test_vggish_of_a_block_is_two_examples_and_the_rest_is_dropped():
    wave = 0.1 * normal(1, 16384).float()
    a = vggish_examples(wave, 8000)
    assert a.shape == (1, 2, 96, 64)
    changed = wave.clone()
    changed[:, 15600:] = 0  # after 1.95 s
    torch.testing.assert_close(vggish_examples(changed, 8000), a, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match=r"0\.975 s"):
        vggish_examples(wave[:, :7700], 8000)


LAYOUT = {  # the public file's names and shapes
    **{f"features.{i}": shape for i, shape in zip((0, 3, 6, 8, 11, 13), (
        (64, 1, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3)),
        strict=True)},
    "embeddings.0": (4096, 12288), "embeddings.2": (4096, 4096), "embeddings.4": (128, 4096),
}


def vggish_state(scale: float = 1.0) -> dict[str, Tensor]:
    """Weights of the published layout that are one number expanded, so that a file of them is tiny; biases differ."""
    state = {}
    for name, shape in LAYOUT.items():
        fan = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.tensor(scale / fan).expand(shape)
        state[f"{name}.bias"] = torch.linspace(-0.1, 0.1, shape[0])
    return state


def test_vggish_loads_the_public_layout_from_either_kind_of_file(tmp_path):
    with torch.device("meta"):
        net = VGGish()
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in vggish_state().items()}
    assert sum(p.numel() for p in net.parameters()) == 72_141_184
    wave = 0.3 * normal(3, 16000).float()
    torch.save(vggish_state(), tmp_path / "new.pth")
    assert (tmp_path / "new.pth").stat().st_size < 1e6
    loaded = load_embedding(f"vggish={tmp_path / 'new.pth'}", device="cpu")
    points = loaded(wave, 16000)
    assert points.shape == (3, 128) and points.dtype == torch.float32 and loaded.sample_rate == 16000
    assert loaded.name.startswith("vggish-") and len(loaded.name) == 15
    torch.save(vggish_state(2.0), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    other = load_embedding(f"vggish={tmp_path / 'old.pth'}", device="cpu")
    assert other.name != loaded.name and not torch.allclose(other(wave, 16000), points)


def test_vggish_computes_what_its_layers_say(tmp_path):
    """By hand, with other means: functional convolutions, and a flattening in TensorFlow's order."""
    rng = torch.Generator().manual_seed(0)
    state = vggish_state()
    state["features.0.weight"] = torch.randn(64, 1, 3, 3, generator=rng) / 3
    state["embeddings.4.bias"] = state["embeddings.4.bias"] - 1
    state["embeddings.0.weight"] = torch.linspace(-1, 1, 12288).expand(4096, -1) / 500
    torch.save(state, tmp_path / "vggish.pth")
    wave = 0.3 * normal(1, 32000).float()
    found = load_embedding(f"vggish={tmp_path / 'vggish.pth'}", device="cpu")(wave, 16000)
    x = vggish_examples(wave, 16000)[0, :, None]
    for layer, pool in ((0, 1), (3, 1), (6, 0), (8, 1), (11, 0), (13, 1)):
        weight, bias = (state[f"features.{layer}.{kind}"] for kind in ("weight", "bias"))
        x = nn.functional.conv2d(x, weight, bias, padding=1).relu()
        x = nn.functional.max_pool2d(x, 2) if pool else x
    x = torch.stack([x[:, :, i, j] for i in range(6) for j in range(4)], dim=1).reshape(2, -1)  # time, band, channel
    x = (x @ state["embeddings.0.weight"].T + state["embeddings.0.bias"]).relu()
    x = (x @ state["embeddings.2.weight"].T + state["embeddings.2.bias"]).relu()
    x = x @ state["embeddings.4.weight"].T + state["embeddings.4.bias"]
    torch.testing.assert_close(found[0], x.mean(0), rtol=1e-3, atol=1e-5)
    assert (found < 0).any()  # no ReLU at the end


def test_vggish_warns_once_of_empty_bands(tmp_path):
    torch.save(vggish_state(), tmp_path / "vggish.pth")
    net, wave = VGGish.load(tmp_path / "vggish.pth", device="cpu"), 0.1 * normal(1, 8192).float()
    with pytest.warns(UserWarning, match="8000 Hz leaves VGGish's bands 50 to 63"):
        net(wave, 8000)
    net(wave, 8000)  # no second time: the fixture would make it an error
    VGGish.load(tmp_path / "vggish.pth", device="cpu")(normal(1, 16000).float(), 16000)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (f"{os.environ['PAYLOAD']}",)


def test_vggish_refuses_other_files_and_never_unpickles_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save({"features.0.weight": Payload()}, tmp_path / "evil.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("evil", "other", "list", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}.pth holds no weights of VGGish") as caught:
            load_embedding(f"vggish={tmp_path / name}.pth")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vggish-10086976\.pth does not exist; fetch https"):
        load_embedding("vggish")


def test_vggish_public_weights_pass_the_published_smoke_test():
    path = Path(torch.hub.get_dir()) / "checkpoints" / "vggish-10086976.pth"
    if not path.is_file():
        pytest.skip("the public weights are not in torch.hub's cache")
    net = load_embedding("vggish", device="cpu")
    sine = torch.sin(2000 * torch.pi * torch.arange(48000, dtype=torch.float64) / 16000)[None].float()
    points = torch.cat([net(sine[:, start : start + 15600], 16000) for start in (0, 15360, 30720)])
    assert net.name == "vggish-10086976"
    assert float(points.mean()) == pytest.approx(0.000657, rel=0.1)
    assert float(points.std(correction=0)) == pytest.approx(0.343, rel=0.1)


# Hugging Face


HUBERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
          "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 4], "num_feat_extract_layers": 2}


@pytest.fixture
def hubert(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.HubertModel(transformers.HubertConfig(**HUBERT)).eval()
    model.save_pretrained(tmp_path / "tiny")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=24000, do_normalize=False).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", model


def test_encoder_is_the_models_mean_over_time(hubert):
    folder, model = hubert
    encoder: Embedding = load_embedding(str(folder), device="cpu")
    waves = 0.1 * normal(2, 24000).float()
    with torch.no_grad():
        expected = model(waves).last_hidden_state.mean(1)
    found = encoder(waves, 24000)
    assert found.dtype == torch.float32 and encoder.sample_rate == 24000
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert encoder(waves[:, :8000], 8000).shape == (2, 16)
    assert encoder.name.startswith("tiny-") and encoder.name == load_embedding(str(folder), device="cpu").name


def test_other_weights_have_another_name(hubert):
    folder, model = hubert
    name = load_embedding(str(folder), device="cpu").name
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.save_pretrained(folder)
    assert load_embedding(str(folder), device="cpu").name != name


def test_weights_that_are_missing_are_no_weights(hubert):
    """Transformers fills them with random numbers; only the mask, which training alone uses, may be missing."""
    folder, _ = hubert
    state = load_file(folder / "model.safetensors")
    names = []
    for lacking in ("masked_spec_embed", "feature_projection.projection.weight"):
        del state[lacking]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if lacking == "masked_spec_embed":
            names = [load_embedding(str(folder), device="cpu").name for _ in range(2)]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match=r"its weights lack feature_projection\.projection\.weight"):
        load_embedding(str(folder))


def test_mert_loads_as_a_hubert_and_its_code_is_not_run(hubert):
    folder, model = hubert
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mert_model", "architectures": ["MERTModel"], "feature_extractor_cqt": False,
               "auto_map": {"AutoConfig": "evil.MERTConfig", "AutoModel": "evil.MERTModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    waves = 0.1 * normal(2, 24000).float()
    with torch.no_grad():
        expected = model(waves).last_hidden_state.mean(1)
    torch.testing.assert_close(load_embedding(str(folder), device="cpu")(waves, 24000), expected, atol=1e-5, rtol=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"feature_extractor_cqt": True}))
    with pytest.raises(ValueError, match="can't be loaded as an audio encoder"):
        load_embedding(str(folder))
    assert not (folder / "ran").exists()


def test_clap_gives_its_audio_embedding(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ClapConfig(
        projection_dim=12,
        text_config={"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 8},
        audio_config={"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
                      "num_hidden_layers": 2, "spec_size": 256, "num_mel_bins": 64, "window_size": 8})
    model = transformers.ClapModel(config).eval()
    model.save_pretrained(tmp_path)
    extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    extractor.save_pretrained(tmp_path)
    encoder, waves = load_embedding(str(tmp_path), device="cpu"), 0.1 * normal(2, 48000).float()
    with torch.no_grad():
        inputs = extractor(list(waves.numpy()), sampling_rate=48000, return_tensors="pt")
        expected = model.get_audio_features(**inputs).pooler_output
    assert encoder.sample_rate == 48000
    torch.testing.assert_close(encoder(waves, 48000), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (2, 12)
    with pytest.raises(ValueError, match="hears 10 s at most"):  # its extractor would cut at random
        encoder(torch.zeros(1, 11 * 8000), 8000)


def test_what_is_no_encoder_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "no-such/model"):
        with pytest.raises(ValueError, match="can't be loaded as an audio encoder") as caught:
            load_embedding(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ValueError, match="no embedding 'logmell'; give logmel, levelled, "):
        load_embedding("logmell")


def test_without_transformers_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers"):
        load_embedding("m-a-p/MERT-v1-95M")


# The cache


class Counting:
    """Two numbers a clip, and a count of the clips it was asked for."""

    name, sample_rate = "counting", 8000

    def __init__(self) -> None:
        self.heard: list[int] = []

    def __call__(self, waves: Tensor, sample_rate: int) -> Tensor:
        self.heard.append(len(waves))
        return torch.stack([waves.mean(1), waves.abs().amax(1) + sample_rate], dim=1)


def test_embed_asks_for_each_clip_once(tmp_path):
    waves, counting = normal(10, 50).float(), Counting()
    expected = counting(waves, 8000)
    for order in (torch.arange(10), torch.arange(9, -1, -1), torch.tensor([3, 3, 3])):
        found = embed(counting, waves[order], 8000, cache=tmp_path / "a/b", batch_size=4)
        torch.testing.assert_close(found, expected[order])
    assert counting.heard == [10, 4, 4, 2]
    more = torch.cat([waves, normal(2, 50, seed=1).float()])
    assert embed(counting, more, 8000, cache=tmp_path / "a/b").shape == (12, 2) and counting.heard[-1] == 2
    embed(counting, waves[:1], 16000, cache=tmp_path / "a/b")  # another rate is another sound
    assert counting.heard[-1] == 1 and len(counting.heard) == 6
    assert not list((tmp_path / "a/b").glob(".*"))


def test_embed_without_a_cache_leaves_nothing_and_shares_duplicates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    waves, counting = normal(3, 50).float(), Counting()
    found = embed(counting, waves[[0, 1, 0, 2, 2]], 8000, progress=True)
    torch.testing.assert_close(found, counting(waves[[0, 1, 0, 2, 2]], 8000))
    assert counting.heard[0] == 3 and not list(tmp_path.iterdir())
    assert "5/5" in capsys.readouterr().err


def test_a_folder_belongs_to_one_embedding(tmp_path):
    waves, other = normal(3, 50).float(), Counting()
    embed(Counting(), waves, 8000, cache=tmp_path / "cache")
    other.name = "another"
    with pytest.raises(ValueError, match="holds points by counting, not by another"):
        embed(other, waves, 8000, cache=tmp_path / "cache")
    assert other.heard == []


def test_bad_caches_are_refused(tmp_path):
    waves, counting = normal(3, 50).float(), Counting()
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    embed(counting, waves, 8000, cache=tmp_path / "unread")
    (tmp_path / "unread" / "embedding.json").write_text("[]")
    for name, words in (("file", "no folder"), ("full", "other things"),
                        ("unread", "can't be read")):
        with pytest.raises(ValueError, match=words) as caught:
            embed(counting, waves, 8000, cache=tmp_path / name)
        assert name in str(caught.value)
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear" and len(list((tmp_path / "full").iterdir())) == 1


def test_a_damaged_file_of_points_is_made_anew(tmp_path):
    waves, counting = normal(8, 50).float(), Counting()
    expected = embed(counting, waves, 8000, cache=tmp_path, batch_size=4)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    for damaged in (b"x" * 9, file.read_bytes()[:-1] + b"!"):
        file.write_bytes(damaged)
        assert torch.equal(embed(counting, waves, 8000, cache=tmp_path, batch_size=4), expected)
    assert counting.heard == [4] * 4


def test_bad_clips_and_bad_points_are_refused(tmp_path):
    waves, counting = normal(3, 50).float(), Counting()
    for bad in (waves * math.nan, waves[0], waves[:0]):
        with pytest.raises(ValueError):
            embed(counting, bad, 8000)
    with pytest.raises(ValueError, match="batch_size"):
        embed(counting, waves, 8000, batch_size=0)
    for answer in (torch.full((3, 2), math.nan), torch.zeros(2, 2), torch.zeros(3)):
        counting.__class__ = type("Broken", (Counting,), {"__call__": lambda self, w, r, a=answer: a})
        with pytest.raises(ValueError, match="counting gave"):
            embed(counting, waves, 8000, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import pianodiff.distance as distance

write, count = Path.write_bytes, 0

def write_bytes(path, data):
    global count
    count += 1
    if count == 4:  # killed with the third file after the record half written
        write(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, data)

Path.write_bytes = write_bytes
waves = torch.load(sys.argv[1], weights_only=True)
distance.embed(distance.LogMel(), waves, 8000, cache=sys.argv[2], batch_size=4)
"""


def test_a_killed_run_loses_one_batch(tmp_path):
    waves = 0.1 * normal(20, 512).float()
    torch.save(waves, tmp_path / "waves.pt")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "waves.pt", tmp_path / "cache"], timeout=3600)
    assert done.returncode == -signal.SIGKILL
    files = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 2 and sum(len(load_file(file)) for file in files) == 8

    class Counted(LogMel):
        heard = 0

        def __call__(self, waves, sample_rate):
            self.heard += len(waves)
            return super().__call__(waves, sample_rate)

    counted = Counted()
    found = embed(counted, waves, 8000, cache=tmp_path / "cache", batch_size=4)
    torch.testing.assert_close(found, LogMel()(waves, 8000), atol=1e-5, rtol=1e-5)
    assert counted.heard == 12


# between floor and noise


CFG = SpectrogramConfig()


def piece(blocks: int, title: str, seed: int = 0) -> Piece:
    return Piece(f"{title}-{seed}.wav", title, example_performance(blocks * CFG.block_seconds, seed))


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_the_order_of_the_rows(music):
    real = read_pieces(music / "real", CFG)
    reference, others = real.split(12)
    hiss = {p.name: torch.randn(p.wave.shape, generator=torch.Generator().manual_seed(0)) for p in others}
    model = Pieces([p._replace(wave=p.wave + 0.05 * hiss[p.name]) for p in others], CFG)
    rows = make_rows(model, others, retrieved(others))
    assert all(row.clips.shape == (12, CFG.block_samples) for row in rows.values())
    assert all(torch.equal(row.pieces, rows["real"].pieces) for row in rows.values())
    table = distances(rows, reference, load_embedding("logmel"))
    assert all(found["clips"] == 12 and found["pieces"] == len(others) for found in table.values())
    for measure in ("frechet", "frechet_infinity", "kernel"):
        assert table["real"][measure] < table["model"][measure] < table["noise"][measure]
        assert abs(table["retrieved"][measure] / table["real"][measure] - 1) < 0.2
    assert all(found["kernel_interval"][0] < found["kernel_interval"][1] for found in table.values())


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_intervals_are_over_pieces_where_these_are_enough(music):
    real = read_pieces(music / "real", CFG)
    row = Row.of(real[:6])
    assert row.pieces.unique().tolist() == [0, 1, 2, 3, 4, 5] and len(row.pieces) == len(row.clips)
    logmel, reference = load_embedding("logmel"), real[6:]
    x = embed(logmel, row.clips, CFG.sample_rate)
    distance = kernel_distance_to(embed(logmel, reference.clips, CFG.sample_rate))
    few = Row(row.clips, (row.pieces > 2).long())
    table = distances({"many": row, "few": few}, reference, logmel)
    assert table["many"]["kernel_interval"] == interval(distance, x, groups=row.pieces)
    assert table["few"]["kernel_interval"] == interval(distance, x)


def test_a_measure_that_ranks_wrongly_is_told():
    def ranked(floor: float, ceiling: float, model: float, noise: float, split: tuple[float, float] = (2, 2.5)) -> bool:
        rows = {"real": floor, "retrieved": ceiling, "model": model, "noise": noise}
        table = {row: {"frechet": d, "frechet_infinity": d, "frechet_interval": (d - 0.5, d + 0.5)}
                 for row, d in rows.items()}
        return ranks_rightly(table, {"real": [1, split[0], 9], "model": [1.5, split[1], 3]})

    assert ranked(1, 2, 3, 4) and ranked(1.2, 1, 3, 4)  # a tie
    assert ranked(3.1, 3, 2, 4)  # an unlucky floor is not that of most splits
    assert not any(ranked(*d) for d in ((2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 4, 4)))
    assert not ranked(1, 2, 3, 4, split=(2.5, 2)) and not ranked(1, 2, 3, 4, split=(2, 2))


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_floors_are_those_of_the_table_split_by_split(music, tmp_path):
    real, logmel = read_pieces(music / "real", CFG), load_embedding("logmel")
    made = read_pieces(music / "made", CFG).clips
    found = floors(real, made, logmel, count=3, seed=5, cache=tmp_path / "kept")
    assert found == floors(real, made, logmel, count=3, seed=5, cache=tmp_path / "kept")
    assert len(set(found["real"])) == len(set(found["model"])) == 3
    for n in range(3):
        reference, others = real.split(len(made), 5 + n)
        rows = {"real": Row.of(others), "model": Row(made, torch.arange(len(made)))}
        table = distances(rows, reference, logmel)
        for row in table:
            assert found[row][n] == pytest.approx(table[row]["frechet"], rel=1e-4)
    far = floors(real, noise_like(made, torch.Generator().manual_seed(0)), logmel, count=3)
    assert farther(far) == 3 and min(far["model"]) > max(far["real"])
    assert farther({"real": [1, 2, 3], "model": [2, 2, 2]}) == 1


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_splits_that_cannot_be_are_left_out():
    pieces = Pieces([piece(4, "A", 1), piece(4, "B", 2), piece(1, "C", 3)], CFG)
    made = Pieces([piece(5, "made", 9)], CFG).clips
    found = floors(pieces, made, load_embedding("logmel"), count=12)
    assert 0 < len(found["real"]) == len(found["model"]) < 12  # where A and B are the others, C is too short
