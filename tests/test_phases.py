"""Phases: Griffin-Lim against librosa and the book, the phase gradient against the heap, waves of blocks, streams."""

import heapq

import librosa
import numpy as np
import pytest
import torch
from conftest import SHAPES, level, seed, shapes, sine

from pianodiff import phases
from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, _istft, _stft, to_magnitude, to_spectrogram
from pianodiff.phases import _floor, _gradient_phases, griffin_lim, stream_wave, to_wave
from pianodiff.synth import example_performance

# ---- Griffin and Lim

def convergence(wave: torch.Tensor, target: torch.Tensor, cfg: SpectrogramConfig) -> float:
    """Spectral convergence in decibels."""
    return float(20 * torch.log10((_stft(wave[None], cfg)[0].abs() - target).norm() / target.norm()))


class OurPhases(np.random.RandomState):
    """For librosa: the phases that griffin_lim draws from seed 0 for a magnitude of this dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__(0)
        self.dtype = dtype

    def random(self, size=None):
        return torch.rand(size, generator=seed(), dtype=self.dtype).numpy()


@shapes
@pytest.mark.parametrize("momentum", [0.99, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_griffin_lim_is_librosas(cfg, momentum, dtype, struck_notes):
    target = to_magnitude(to_spectrogram(struck_notes[:8192], cfg), cfg).to(dtype)
    ours = griffin_lim(target, cfg, momentum=momentum, init="random", generator=seed())
    theirs = torch.from_numpy(
        librosa.griffinlim(target.numpy(), hop_length=cfg.hop_length, momentum=momentum, random_state=OurPhases(dtype))
    ).to(dtype)
    assert abs(convergence(ours, target, cfg) - convergence(theirs, target, cfg)) < 0.5
    if dtype == torch.float64:  # the same phases, the same wave
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_phase_retrieval_gets_better_with_iterations_and_momentum(struck_notes):
    cfg = SHAPES[2]
    target = to_magnitude(to_spectrogram(struck_notes[:16_384], cfg), cfg)
    for init in ("random", "gradient"):
        def found(n, momentum=0.99, init=init):
            wave = griffin_lim(target, cfg, n_iter=n, momentum=momentum, init=init, generator=seed())
            return convergence(wave, target, cfg)

        by_steps = [found(n) for n in (0, 4, 16, 64)]
        assert by_steps == sorted(by_steps, reverse=True) and by_steps[-1] < -20
        assert by_steps[-1] < found(64, momentum=0) - 1


@shapes
def test_loudness_survives_the_round_trip(cfg, struck_notes):
    """In each half second, for loud and quiet passages alike, and up to the last hop."""
    waves = torch.stack([struck_notes, 0.1 * struck_notes])
    back = to_wave(to_spectrogram(waves, cfg), cfg, generator=seed())
    for before, after in zip(waves, back, strict=True):
        for a, b in zip(before.split(4096), after.split(4096), strict=True):
            if level(a) > -50:
                assert abs(level(a) - level(b)) < 1.5


def test_the_end_is_as_loud_as_the_middle():
    """A steady tone's block, cut from a longer sound, comes back steady: the last samples are not pumped up."""
    for cfg in SHAPES[1:]:
        long = to_spectrogram(torch.from_numpy(sine(437, 3 * 16_384) + sine(1111, 3 * 16_384)), cfg)
        wave = to_wave(long[:, cfg.n_frames : 2 * cfg.n_frames], cfg, n_iter=64, generator=seed())
        assert abs(level(wave[-256:]) - level(wave[8000:8256])) < 1


def test_the_seed_fixes_the_wave(struck_notes):
    cfg, spec = SHAPES[2], to_spectrogram(struck_notes[:16_384], SHAPES[2])
    first, again, other = (to_wave(spec, cfg, n_iter=3, generator=seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


RULER = SpectrogramConfig(n_fft=1024, hop_length=256)  # nothing here is fitted to it


def distance(wave: torch.Tensor, struck_notes: torch.Tensor) -> float:
    """Spectral convergence to the struck_notes by the ruler."""
    return convergence(wave, _stft(struck_notes[None, : len(wave)], RULER)[0].abs(), RULER)


def by_the_book(target: torch.Tensor, cfg: SpectrogramConfig, n_iter: int, phases: torch.Tensor,
                known: torch.Tensor) -> torch.Tensor:
    """Fast Griffin-Lim as Eq. (fast-griffin-lim) has it, with the known samples put back before each STFT."""
    z, last, length = torch.polar(target, phases)[None], 0, (target.shape[1] - 1) * cfg.hop_length
    for _ in range(n_iter):
        wave = _istft(z, cfg, length)
        wave[0, : len(known)] = known
        c = _stft(wave, cfg)
        z, last = target * torch.sgn(c + 0.99 * (c - last)), c
    return _istft(z, cfg, length)[0]


@pytest.mark.parametrize("cfg", [*SHAPES, SpectrogramConfig(n_fft=500, hop_length=128)],
                         ids=["paper-128", "paper-256", "nano", "no whole number of hops"])
@pytest.mark.parametrize("count", [0, 2048])
@pytest.mark.parametrize("init", ["random", "gradient"])
def test_the_loop_in_place_is_that_of_the_book(cfg, count, init, struck_notes):
    target = _stft(struck_notes[None, :8192], cfg)[0].abs()
    known, whole = struck_notes[:count], max(0, 1 + (count - cfg.n_fft // 2) // cfg.hop_length)
    phases = 2 * torch.pi * torch.rand(target.shape, generator=seed(), dtype=torch.float64)
    if init == "gradient":
        begin = torch.nn.functional.pad(known, (0, 8192 - count))
        seen = _stft(begin[None], cfg)[:, :, :whole].angle().mT
        found = _gradient_phases(target.T[None], cfg, seen)[0].T
        phases = torch.where(target > 1.001 * _floor(cfg), found, phases)
    ours = griffin_lim(target, cfg, n_iter=9, init=init, generator=seed(), known=known if count else None)
    theirs = by_the_book(target, cfg, 9, phases, known)
    assert torch.equal(ours[:count], known)
    after = count + (cfg.n_fft // 2 if count else 0)  # where what was missed of the known has faded out
    torch.testing.assert_close(ours[after:], theirs[after:], atol=1e-9, rtol=0)


def heap_integration(magnitude: np.ndarray, advance: np.ndarray, rise: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Real-time phase-gradient heap integration as published: always on from the loudest bin that was reached."""
    phases = [start]
    for k in range(1, len(magnitude)):
        new = np.full(len(start), np.nan)
        heap = [(-value, "last frame", i) for i, value in enumerate(magnitude[k - 1])]
        heapq.heapify(heap)
        while np.isnan(new).any():
            _, where, i = heapq.heappop(heap)
            if where == "last frame":
                reached = [(i, phases[-1][i] + (advance[k - 1, i] + advance[k, i]) / 2)]
            else:
                near = [j for j in (i - 1, i + 1) if 0 <= j < len(new)]
                reached = [(j, new[i] + (j - i) * (rise[k, i] + rise[k, j]) / 2) for j in near]
            for j, phase in reached:
                if np.isnan(new[j]):
                    new[j] = phase
                    heapq.heappush(heap, (-magnitude[k, j], "this frame", j))
        phases.append(new)
    return np.stack(phases)


@shapes
def test_sweeps_find_the_phases_of_the_heap(cfg):
    magnitude = 100 * torch.rand(12, cfg.n_bins + 1, generator=seed(), dtype=torch.float64) ** 6 + _floor(cfg)
    start = 6 * torch.rand(cfg.n_bins + 1, generator=seed(1), dtype=torch.float64)
    spread, level = 0.25645 * cfg.n_fft**2 / (2 * np.pi), magnitude.log().numpy()
    step, by_time, by_row = 2 * np.pi / cfg.n_fft, *np.gradient(level)
    advance = cfg.hop_length * (step * np.arange(cfg.n_bins + 1) + by_row / (spread * step))
    rise = -np.pi - spread * step / cfg.hop_length * by_time
    expected = heap_integration(magnitude.numpy(), advance, rise, start.numpy())
    found = _gradient_phases(torch.stack([magnitude.flip(1), magnitude]), cfg, start.expand(2, 1, -1))[1]
    off = torch.exp(1j * (found - torch.from_numpy(expected)))
    torch.testing.assert_close(off, torch.ones_like(off), atol=1e-8, rtol=0)


def test_the_phases_turn_at_the_pitch():
    cfg, n = SHAPES[2], torch.arange(16_384, dtype=torch.float64)
    for frequency in (0.21, 0.5, 1.7):  # radians a sample
        stft = _stft(torch.sin(frequency * n)[None], cfg)[:, :-1, 2:-2].mT
        found = _gradient_phases(stft.abs(), cfg, stft[:, :1].angle())[0]
        row = stft[0, 0].abs().argmax()
        turned = torch.exp(1j * (found[1:, row] - found[:-1, row] - cfg.hop_length * frequency)).angle()
        assert turned.abs().max() < 0.05


@pytest.mark.parametrize("name", ["paper-256", "nano"])
def test_slopes_are_a_better_start_than_random_phases(name, struck_notes):
    cfg = SPECTROGRAMS[name]
    target = to_magnitude(to_spectrogram(struck_notes, cfg), cfg)
    at = {(init, n): distance(griffin_lim(target, cfg, n_iter=n, init=init, generator=seed()), struck_notes)
          for init, n in (("gradient", 0), ("gradient", 5), ("random", 5), ("random", 64))}
    assert at["gradient", 0] < -14 and at["gradient", 5] < at["random", 5] - 8, at
    assert at["gradient", 5] < at["random", 64] + 1, at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("init", ["random", "gradient"])
def test_types_devices_graphs_and_inputs(dtype, device, init, struck_notes):
    spec = to_spectrogram(struck_notes[:16_384], SHAPES[2]).to(device, dtype).requires_grad_()
    known, before = struck_notes[:1024].to(device, dtype), spec.detach().clone()
    wave = to_wave(spec, SHAPES[2], n_iter=2, init=init, generator=seed(), known=known)
    assert wave.dtype == dtype and wave.device.type == device and not wave.requires_grad and wave.isfinite().all()
    assert torch.equal(spec, before) and torch.equal(known, struck_notes[:1024].to(device, dtype))
    assert torch.equal(wave, to_wave(spec, SHAPES[2], n_iter=2, init=init, generator=seed(), known=known))
    with torch.inference_mode():
        inside = to_wave(spec, SHAPES[2], n_iter=2, init=init, generator=seed(), known=known)
    torch.testing.assert_close(inside, wave)


def test_silence_is_a_hiss_and_no_click():
    wave = to_wave(torch.zeros(256, 128), SHAPES[2], n_iter=0, generator=seed())
    assert -65 < level(wave) < -50 and wave.abs().max() < 6 * wave.std()


def test_bad_starts_and_known_samples(struck_notes):
    cfg, spec = SHAPES[2], torch.zeros(2, 256, 20)
    with pytest.raises(ValueError, match="'gradient' or 'random'"):
        to_wave(spec, cfg, init="zero")
    notes = struck_notes[None]
    for known in (notes[0, :256], notes[:, :256].expand(3, -1), notes[:, : 22 * 128].expand(2, -1)):
        with pytest.raises(ValueError, match=r"known samples must be \[2\] by at most 2688"):
            to_wave(spec, cfg, known=known)
    with pytest.raises(ValueError, match="200 known samples are no whole number of hops"):
        next(stream_wave([spec[0]], cfg, known=struck_notes[:200]))
    with pytest.raises(ValueError, match="256, frames"):
        next(stream_wave([spec[0, :128]], cfg))
    assert list(stream_wave([], cfg)) == []


def test_known_samples_lead_on(struck_notes):
    """What follows is the struck_notes itself, of which the spectrogram told no phase."""
    cfg = SHAPES[2]
    wave = to_wave(to_spectrogram(struck_notes[:8192], cfg), cfg, n_iter=8, generator=seed(), known=struck_notes[:4096])
    assert torch.cosine_similarity(wave[4096:4608], struck_notes[4096:4608], dim=0) > 0.9
    assert wave.diff().abs()[4090:4102].max() < 1.5 * struck_notes.diff().abs()[4000:4200].max()  # and no click


# ---- streams

@pytest.fixture(scope="module")
def performance() -> torch.Tensor:
    return example_performance(10.5 * 2.048, seed=0)


@pytest.mark.parametrize("sizes", [[128] * 10 + [64], [32] * 42, [20, 100, 1, 7] * 10 + [64]],
                         ids=["blocks", "quarters", "any"])
@pytest.mark.parametrize("n_iter", [10, 32])
def test_a_stream_is_as_good_as_one_inversion(sizes, n_iter, performance):
    cfg = SHAPES[2]
    spec = to_spectrogram(performance, cfg)
    offline = distance(to_wave(spec, cfg, n_iter=n_iter, generator=seed()), performance)
    pieces = list(stream_wave(spec.split(sizes, dim=1), cfg, n_iter=n_iter, generator=seed()))
    assert sum(map(len, pieces)) == spec.shape[1] * cfg.hop_length == 172_032
    assert offline < -18 and distance(torch.cat(pieces), performance) < offline + 1


@shapes
def test_a_stream_keeps_little_and_changes_nothing(cfg, performance, monkeypatch):
    window, asked, given = -(-cfg.n_fft // cfg.hop_length), [], []

    def spy(spec, *args, known, **how):
        asked.append((spec.shape[-1], known.shape[-1] // cfg.hop_length))
        return to_wave(spec, *args, known=known, **how)

    monkeypatch.setattr(phases, "to_wave", spy)
    spec = to_spectrogram(performance, cfg)[:, : 5 * cfg.n_frames]
    received = 0
    for piece in stream_wave(spec.split(40, dim=1), cfg, n_iter=1, generator=seed()):
        given.append((piece, piece.clone()))
        received += len(piece)
        frames = min(40 * len(asked), spec.shape[1])
        if received < spec.shape[1] * cfg.hop_length:
            assert received == (frames - 4 * window) * cfg.hop_length  # the latency
    assert max(frames for frames, _ in asked) == 40 + 6 * window and max(known for _, known in asked) == 2 * window
    assert all(torch.equal(piece, copy) for piece, copy in given)


def test_what_a_listener_does_to_a_piece_stays_with_him(performance):
    cfg, spec = SHAPES[2], to_spectrogram(performance[: 3 * 16_384], SHAPES[2])
    clean, again = (stream_wave(spec.split(128, dim=1), cfg, n_iter=1, generator=seed()) for _ in range(2))
    for piece, expected in zip(again, list(clean), strict=True):
        assert torch.equal(piece, expected)
        piece.zero_()


def test_a_stream_goes_on_from_known_samples(performance):
    cfg, cut = SHAPES[2], 16_384
    spec, known = to_spectrogram(performance, cfg), performance[cut - 1024 : cut]
    pieces = [spec[:, 120:128], *spec[:, 128:512].split(128, dim=1)]
    new = torch.cat(list(stream_wave(pieces, cfg, generator=seed(), known=known)))
    assert len(new) == 3 * 16_384
    assert torch.cosine_similarity(new[:256], performance[cut : cut + 256], dim=0) > 0.8
    offline = to_wave(torch.cat(pieces, 1), cfg, generator=seed(), known=known)[1024:]
    assert distance(new, performance[cut:]) < distance(offline, performance[cut:]) + 1


def test_a_stream_of_a_batch_and_of_single_frames(struck_notes):
    cfg, both = SHAPES[2], torch.stack([struck_notes, struck_notes.flip(0)])[:, : 60 * 128]
    spec = to_spectrogram(both, cfg)
    waves = torch.cat(list(stream_wave(spec.split(25, dim=-1), cfg, n_iter=4, generator=seed())), dim=-1)
    assert waves.shape == both.shape and waves.dtype == torch.float64
    assert max(distance(wave, clean) for wave, clean in zip(waves, both, strict=True)) < -10
    single = torch.cat(list(stream_wave(spec[0].split(1, dim=-1), cfg, n_iter=2, generator=seed())))
    assert single.shape == both[0].shape and distance(single, both[0]) < -10
