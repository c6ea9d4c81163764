"""Notes, statistics and drift on sounds whose answers are known."""

import math

import pytest
import torch
from conftest import BLOCK, CFG, seed
from scipy.stats import t as student
from scipy.stats import wasserstein_distance
from torch import Tensor

from pianodiff.audio import SPECTROGRAMS, to_spectrogram
from pianodiff.music import (
    STATISTICS,
    course,
    drift,
    find_onsets,
    measure,
    note_salience,
    note_templates,
    pitch_profile,
    sounding_notes,
    statistic_distance,
    trend,
)
from pianodiff.phases import to_wave
from pianodiff.pieces import Pieces, read_pieces
from pianodiff.synth import example_performance


def tone(pitch: float, seconds: float = 0.5, decay: float = 4.0) -> Tensor:
    """A struck string: stretched partials that fall as 1/n, damped within the last 60 ms."""
    t, f0 = torch.arange(round(seconds * 8000)) / 8000, 440 * 2 ** ((pitch - 69) / 12)
    B = math.exp(0.0926 * pitch - 13.64) + math.exp(-0.0847 * pitch - 5.82)
    f = [n * f0 * math.sqrt(1 + B * n**2) for n in range(1, 31)]
    wave = sum(torch.sin(2 * torch.pi * g * t) / n for n, g in enumerate(f, 1) if g < 3900)
    return 0.1 * wave * (-decay * t).exp() * (t * 200).clamp(max=1) * ((seconds - t) / 0.06).clamp(max=1) ** 2


def melody(pitches, seconds: float = 0.5) -> Tensor:
    return torch.cat([tone(pitch, seconds) for pitch in pitches])


# notes


@pytest.mark.parametrize("preset", SPECTROGRAMS)
@pytest.mark.parametrize("pitch", [48, 57, 64, 69, 81, 93])
def test_a_single_note_is_the_most_salient(preset, pitch):
    """Its octave, twelfth and sub-octave share partials with it, and stay 10 dB below."""
    cfg = SPECTROGRAMS[preset]
    salience = note_salience(to_spectrogram(tone(pitch, 1.0, decay=1.0), cfg), cfg)
    frame = salience[:, salience.shape[1] // 2]
    assert abs(int(frame.argmax()) + 21 - pitch) <= (preset == "paper-128")  # its rows are 31 Hz wide
    if preset != "paper-128":
        ghosts = [frame[pitch + shift - 21] for shift in (-24, -19, -12, 12, 19, 24) if 21 <= pitch + shift <= 108]
        assert max(ghosts) < frame.max() / 3


def test_salience_is_an_amplitude():
    for gain in (1.0, 0.1):
        salience = note_salience(to_spectrogram(gain * tone(69, 1.0, decay=0), CFG), CFG)[:, 20:40]
        assert float(salience[69 - 21].mean()) == pytest.approx(0.1 * gain, rel=0.2)


def test_competition_sharpens_harmonic_summation():
    spec = to_spectrogram(torch.stack([tone(p, 1.0, 1.0) for p in (60, 64, 67)]).sum(0), CFG)
    ghosts = []
    for n_iter in (0, 20):
        frame = note_salience(spec, CFG, n_iter=n_iter)[:, 30]
        ghosts.append(float(frame[[72 - 21, 79 - 21, 84 - 21]].max() / frame[[60 - 21, 64 - 21, 67 - 21]].min()))
    assert ghosts[0] > 0.6 and ghosts[1] < 0.25


def test_updates_never_raise_the_divergence():
    """Lee and Seung's rule is monotone."""
    spec = to_spectrogram(example_performance(2, 1), CFG)
    v = (10 ** ((spec - 1) * 4) - 1e-4).clamp(min=0).sqrt().double()
    w, losses = note_templates(CFG).sqrt().double(), []
    for n_iter in (1, 2, 4, 8, 16, 32):
        model = (w @ note_salience(spec.double(), CFG, n_iter=n_iter).sqrt()).clamp(min=1e-9)
        losses.append(float((v * (v.clamp(min=1e-9) / model).log() - v + model).sum()))
    assert losses == sorted(losses, reverse=True)


def test_salience_keeps_leading_dimensions():
    specs = torch.rand(2, 3, CFG.n_bins, 7, generator=seed())
    salience = note_salience(specs, CFG)
    assert salience.shape == (2, 3, 88, 7) and salience.dtype == torch.float32 and not salience[..., 87, :].any()
    torch.testing.assert_close(salience[1, 2], note_salience(specs[1, 2], CFG))
    assert not sounding_notes(torch.zeros(CFG.n_bins, 9), CFG).any()


def test_chord_is_heard():
    sounding = sounding_notes(to_spectrogram(sum(tone(p, 1.0, 1.0) for p in (60, 64, 67)), CFG), CFG)
    assert (sounding[:, 10:50].float().mean(1) > 0.9).nonzero()[:, 0].tolist() == [60 - 21, 64 - 21, 67 - 21]


@pytest.mark.parametrize("preset", SPECTROGRAMS)
def test_onsets_are_found_to_the_frame(preset):
    cfg = SPECTROGRAMS[preset]
    wave = torch.cat([torch.zeros(800), melody([60, 64, 67, 72, 71, 60], 0.3), torch.zeros(4000)])
    truth = 0.1 + 0.3 * torch.arange(6)
    for gain in (1.0, 0.1):  # soft notes count too
        found = find_onsets(to_spectrogram(gain * wave + 1e-4 * torch.randn(len(wave), generator=seed()), cfg), cfg)
        assert len(found) == 6 and (found - truth).abs().max() < 0.03


def test_noise_and_silence_have_no_onsets_to_speak_of():
    noise = 0.1 * torch.randn(80_000, generator=seed())
    assert len(find_onsets(to_spectrogram(noise, CFG), CFG)) < 10
    assert not len(find_onsets(torch.zeros(CFG.n_bins, 100), CFG))
    assert not len(find_onsets(torch.full((CFG.n_bins, 100), 0.5), CFG))


# statistics


def test_statistics_of_known_sounds():
    scale = melody([60, 62, 64, 65, 67, 69, 71, 72])
    thirds = scale + melody([64, 65, 67, 69, 71, 72, 74, 76])
    values = measure(torch.stack([scale, scale / 10, thirds, torch.zeros(32_000)]), CFG)
    assert list(values) == [*STATISTICS, "pitch_classes"] and all(values[name].shape == (4,) for name in STATISTICS)
    assert values["pitch_classes"].shape == (4, 12) and not values["pitch_classes"][3].any()
    get = {name: v.tolist() for name, v in values.items()}
    assert get["notes_per_second"][:2] == pytest.approx([1.75, 1.75])  # the first is the edge of the clip
    assert get["inter_onset"][:3] == pytest.approx([0.5] * 3, abs=0.02)
    assert get["polyphony"][0] == pytest.approx(1, abs=0.3) and get["polyphony"][2] == pytest.approx(2, abs=0.4)
    assert get["register"][0] in (65, 66, 67) and get["register"][2] > get["register"][0]
    assert get["level"][0] - get["level"][1] == pytest.approx(20, abs=1e-3)
    assert get["level"][0] == pytest.approx(10 * math.log10(scale.square().mean()), abs=1e-4)
    assert min(get["key_clarity"][::2]) > 0.75
    assert get["silence"][3] == 1 and get["level"][3] == -80 and get["notes_per_second"][3] == 0
    assert all(math.isnan(get[n][3]) for n in ("inter_onset", "polyphony", "register", "key_clarity", "flatness"))


@pytest.mark.parametrize("pitch", [55, 70])
def test_register_is_a_midi_number(pitch):
    assert measure(melody([pitch] * 4 + [pitch + 12])[None], CFG)["register"] == pitch


def test_levels_of_a_sine_that_stops():
    """A full-scale sine lies at -3 dBFS, in the frames too; after it, silence."""
    wave = torch.sin(2 * torch.pi * 500 * torch.arange(2 * BLOCK) / 8000)
    wave[BLOCK:] *= 0.01
    values = measure(wave[None], CFG)
    assert float(values["dynamic_range"]) == pytest.approx(40, abs=0.5) and float(values["silence"]) == 0
    wave[BLOCK:] *= 0.1
    assert float(measure(wave[None], CFG)["silence"]) == pytest.approx(0.5, abs=0.02)


def test_flatness_orders_tone_music_and_noise():
    waves = torch.stack([melody([60] * 5), example_performance(2.5, 0), 0.1 * torch.randn(20_000, generator=seed())])
    flatness = measure(waves, CFG)["flatness"]
    assert flatness[2] == pytest.approx(-2.5, abs=0.3) and flatness[:2].max() < -15  # -2.5 dB: Euler's gamma


def test_statistics_do_not_depend_on_the_batch():
    waves = 0.1 * torch.randn(18, BLOCK, generator=seed())
    waves[::3] = example_performance(BLOCK / 8000, 3)
    together = measure(waves, CFG)
    alone = [measure(wave[None], CFG) for wave in waves[14:]]
    for name, values in together.items():
        torch.testing.assert_close(values[14:], torch.cat([a[name] for a in alone]), equal_nan=True,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shift", [0, 5, 10])
def test_pitch_classes_and_key_follow_transposition(shift):
    wave = melody([p + shift for p in (60, 64, 67, 72, 60, 62, 67, 64)])[None]
    profile = pitch_profile(measure(wave, CFG)["pitch_classes"])
    assert float(profile.sum()) == pytest.approx(1) and profile.shape == (12,)
    assert set(profile.topk(3).indices.tolist()) == {shift % 12, (shift + 4) % 12, (shift + 7) % 12}
    assert measure(wave, CFG)["key_clarity"] > 0.8


def test_wasserstein_is_scipys():
    for start, (n, m) in enumerate(((50, 50), (7, 300), (1, 2))):
        x, y = (torch.randn(k, generator=seed(start + k)).round(decimals=1).double() for k in (n, m))  # with ties
        assert statistic_distance(x, y) == pytest.approx(wasserstein_distance(x, y) / float(y.std()), abs=1e-12)
    y = torch.arange(10.0)
    assert statistic_distance(y + 3 * y.std(), y) == pytest.approx(3)
    assert statistic_distance(torch.cat([y, torch.tensor([torch.nan])]), y) == 0
    assert math.isnan(statistic_distance(torch.tensor([torch.nan]), y))
    assert statistic_distance(torch.ones(3), torch.ones(4)) == 0 and statistic_distance(y, torch.ones(4)) == math.inf


def test_white_noise_is_the_worst(pieces):
    def cut(waves):
        return torch.cat([wave.reshape(-1, BLOCK) for wave in waves])

    reference, level = measure(cut(pieces[:4]), CFG), torch.stack(pieces).square().mean().sqrt()
    trip = [to_wave(to_spectrogram(w, CFG), CFG, n_iter=8, generator=seed()) for w in pieces[4:]]
    rows = {"other": cut(pieces[4:]), "trip": cut(trip), "backwards": cut(pieces[4:]).flip(-1),
            "noise": level * torch.randn(36, BLOCK, generator=seed())}
    mean = {}
    for row, waves in rows.items():
        values = measure(waves, CFG)
        distances = torch.tensor([statistic_distance(values[name], reference[name]) for name in STATISTICS])
        mean[row] = float(distances[distances.isfinite()].mean())
    assert max(mean, key=mean.get) == "noise" and mean["noise"] > 2 * max(v for k, v in mean.items() if k != "noise")
    assert abs(mean["trip"] - mean["other"]) < 0.25


# drift


def test_trend_is_a_t_interval():
    slopes = torch.tensor([0.1, 0.3, 0.35, 0.6])
    found = trend(5 + slopes[:, None] * torch.arange(7) + torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    low, high = student.interval(0.95, 3, loc=float(slopes.mean()), scale=float(slopes.std()) / 2)
    assert found == pytest.approx((float(slopes.mean()), low, high), abs=1e-5)


def test_trend_leaves_out_nan():
    values = 0.5 * torch.arange(8).expand(3, 8).clone()
    values[0, [0, 3, 7]] = torch.nan
    assert trend(values) == pytest.approx((0.5, 0.5, 0.5))
    values[1] = torch.nan
    assert trend(values).slope == pytest.approx(0.5)
    values[2, 1:] = torch.nan
    with pytest.raises(ValueError, match="1 pieces have a slope"):
        trend(values)


def test_drift_is_measured_block_by_block(pieces):
    waves = torch.stack(pieces[:3])
    found = drift(waves[:, : 4 * BLOCK + 77], CFG)
    assert list(found) == list(STATISTICS) and all(v.shape == (3, 4) for v in found.values())
    alone = measure(waves[1:2, 2 * BLOCK : 3 * BLOCK], CFG)
    for name, values in found.items():
        torch.testing.assert_close(values[1, 2], alone[name][0], equal_nan=True)


def test_a_fading_piece_drifts(music):
    pieces = read_pieces(music / "real", CFG)
    fading = [p._replace(wave=p.wave * torch.logspace(0, -1, len(p.wave))) for p in pieces]
    level = course(Pieces(fading, CFG))["level"]
    assert level.shape == (10, 4) and (level[:, -1] < level[:, 0] - 5).all()


# bad input


WAVE = torch.zeros(1, 3 * BLOCK)


@pytest.mark.parametrize("call, words", [
    (lambda: measure(WAVE[0], CFG), r"waves \[N, T\] are needed"),
    (lambda: measure(WAVE.int(), CFG), r"torch.int32"),
    (lambda: measure(WAVE[:0], CFG), r"\[N, T\]"),
    (lambda: measure(WAVE[:, : BLOCK - 1], CFG), "at least one block"),
    (lambda: measure(WAVE / 0, CFG), "1 of 1 waves hold NaN"),
    (lambda: drift(WAVE / 0, CFG), "1 of 1 waves hold NaN"),
    (lambda: drift(WAVE[:, :99], CFG), "at least one block"),
    (lambda: pitch_profile(measure(WAVE, CFG)["pitch_classes"]), "no note sounds"),
    (lambda: note_salience(torch.zeros(99, 9), CFG), r"\[..., 256, frames\]"),
    (lambda: find_onsets(torch.zeros(2, 256, 9), CFG), r"\[256, frames\]"),
    (lambda: find_onsets(torch.full((256, 9), torch.nan), CFG), "finite"),
    (lambda: find_onsets(torch.zeros(256, 3), CFG), "at least 0.1 s"),
    (lambda: statistic_distance(torch.zeros(5), torch.tensor([1.0, torch.nan])), "at least 2"),
    (lambda: trend(torch.ones(9)), r"\[pieces, blocks\]"),
    (lambda: trend(torch.ones(1, 9)), "at least 2 pieces"),
])
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
