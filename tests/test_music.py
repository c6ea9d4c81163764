"""Notes, statistics and drift on sounds whose answers are known."""

import math

import librosa
import numpy as np
import pytest
import soxr
import torch
from conftest import BLOCK, CFG, seed
from scipy.stats import t as student
from scipy.stats import wasserstein_distance
from torch import Tensor

from pianodiff import music as pianodiff_music
from pianodiff.audio import SPECTROGRAMS, to_spectrogram
from pianodiff.music import (
    STATISTICS,
    NoteSpectra,
    NotNotes,
    course,
    drift,
    explain,
    find_onsets,
    known_pianos,
    measure,
    not_notes,
    note_salience,
    note_spectra,
    note_templates,
    notes_section,
    pitch_profile,
    plot_not_notes,
    sounding_notes,
    statistic_distance,
    trend,
)
from pianodiff.phases import to_wave
from pianodiff.pieces import Comparison, Pieces, read_pieces
from pianodiff.recordings import render_midi
from pianodiff.synth import _tone, example_performance


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


# what is not made of notes


@pytest.fixture(scope="module")
def piano() -> NoteSpectra:
    """That of `example_performance`."""
    scales = torch.zeros(2, 88 * 24_000)
    for scale, force in zip(scales, (0.4, 0.7), strict=True):
        for key in range(88):
            struck = _tone(21 + key, force, 2.4)[:24_000]
            scale[24_000 * key : 24_000 * key + len(struck)] = struck
    return NoteSpectra("synth", pianodiff_music._spectra_of(scales))


def frames_of(wave: np.ndarray) -> np.ndarray:
    return np.abs(librosa.stft(wave, n_fft=512, hop_length=128))


def by_formula(wave: Tensor, spectra: Tensor, every: int = 1) -> NotNotes:
    """As it was first written, with NumPy and librosa."""
    W, V = spectra.numpy(), frames_of(wave.numpy())
    V = V[:, V.sum(0) > 3e-3 * V.sum(0).max()]
    V = V / V.sum(0).mean()
    V = (V + V.max() * 10 ** (-70 / 20))[:, ::every]
    H = np.full((704, V.shape[1]), 1 / 704, "f") * V.sum(0)
    for _ in range(60):
        H *= (W.T @ (V / (W @ H + 1e-9))) / np.maximum(W.sum(0), 1e-9)[:, None]
    P = W @ H
    left = (V * np.log(V / P) - V + P).sum(0) / V.sum(0)
    share = H.reshape(2, 88, 4, -1).sum((0, 2)) / V.sum(0)
    return NotNotes(float(np.median(left)), float(np.median(np.exp(-(share * np.log(share + 1e-9)).sum(0)))))


def test_the_ruler_of_notes_is_its_formula(piano):
    played = example_performance(2, 1)
    noisy = played + 0.01 * torch.randn(len(played), generator=seed())
    one, other = known_pianos()
    for sound, each, every in ((played[:6000], piano, 1), (played, one, 5), (noisy, other, 3)):
        expected = by_formula(sound, each.spectra, every)
        assert tuple(not_notes(sound, each, every=every)) == pytest.approx(tuple(expected), rel=1e-3)


def test_notes_are_told_from_noise_and_counted(piano):
    lone = not_notes(_tone(50, 0.5, 1.0), piano)
    chord = torch.stack([_tone(pitch, 0.5, 1.0)[:8000] for pitch in (41, 48, 57)]).sum(0)
    three, hiss = not_notes(chord, piano), torch.randn(8000, generator=seed())
    between, noise = not_notes(chord + 0.1 * chord.std() * hiss, piano), not_notes(hiss, piano)
    assert lone.left_over < 0.01 and lone.notes == pytest.approx(1.2, abs=0.2)
    assert three.left_over < 0.06 and three.notes == pytest.approx(3, abs=0.8)
    assert 1.5 * three.left_over < between.left_over < noise.left_over / 1.5
    assert three.notes < between.notes < noise.notes / 1.5


def test_both_pianos_explain_their_own_notes_and_no_noise():
    pianos = known_pianos()
    assert [each.name for each in pianos] == ["fluidr3-piano", "salamander"]
    hiss = torch.randn(4000, generator=seed())
    for own, other in (pianos, pianos[::-1]):
        assert own.spectra.shape == (257, 704) and own.spectra.dtype == torch.float32
        torch.testing.assert_close(own.spectra.sum(0), torch.ones(704), atol=1e-3, rtol=0)
        notes = own.spectra.reshape(257, 2, 88, 4)[:, :, 12:60, 1].flatten(1)
        left, count = pianodiff_music._by_frame(notes, own)
        assert left.median() < 0.01 and count.median() < 2
        key = explain(notes, own).reshape(2, 88, 4, -1).sum((0, 2)).argmax(0)
        assert (key == torch.arange(12, 60).repeat(2)).float().mean() > 0.9
        assert pianodiff_music._by_frame(notes, other)[0].median() > 5 * left.median()
        assert not_notes(hiss, own).left_over > 0.2


@pytest.mark.parametrize("gain", [1e-6, 0.01, 300.0])
def test_the_level_makes_no_difference_to_the_ruler_of_notes(piano, gain):
    wave = example_performance(2, 1)
    assert tuple(not_notes(gain * wave, piano)) == pytest.approx(tuple(not_notes(wave, piano)), rel=1e-3)
    wave[8000:] = 0  # nor does silence beside it
    assert not_notes(wave, piano).left_over < 0.05


def test_silence_is_no_notes(piano):
    assert all(math.isnan(x) for x in not_notes(torch.zeros(8000), piano))


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100])
def test_other_rates_are_resampled_for_the_ruler_of_notes(piano, rate):
    wave = example_performance(2, 2)
    other = torch.from_numpy(soxr.resample(wave.double().numpy(), 8000, rate))
    found, expected = not_notes(other, piano, rate), not_notes(wave, piano)
    assert found.left_over == pytest.approx(expected.left_over, abs=0.002)
    assert found.notes == pytest.approx(expected.notes, abs=0.2)


def test_a_piece_is_measured_by_the_piano_that_leaves_least():
    found = torch.tensor([[[0.1, 3.0], [0.2, 5.0]], [[0.3, 4.0], [0.05, 6.0]], [[math.nan] * 2] * 2,
                          [[0.2, 9.0], [0.3, 1.0]], [[0.4, 2.0], [0.5, 2.0]]])
    row = pianodiff_music._row_of_notes(found, 0)
    assert row["pieces"] == 4 and row["pianos"] == {"fluidr3-piano": 0.75, "salamander": 0.25}
    assert row["left_over"] == pytest.approx(0.15) and row["notes"] == pytest.approx(4.5)
    low, high = row["left_over_interval"]
    assert low < 0.15 < high
    few = pianodiff_music._row_of_notes(found[:2], 0)
    assert few["notes"] == pytest.approx(4.5) and all(map(math.isnan, few["notes_interval"]))
    none = pianodiff_music._row_of_notes(found[2:3], 0)
    assert none["pieces"] == 0 and math.isnan(none["left_over"]) and set(none["pianos"].values()) == {0}


def test_the_section_of_notes_has_all_rows_and_passes_over_silence(music):
    made, real = (read_pieces(music / folder, CFG) for folder in ("made", "real"))
    silent = made[0]._replace(wave=torch.zeros_like(made[0].wave))
    made = Pieces([silent, *made[1:]], CFG)
    section = notes_section(Comparison.of(made, real))
    table = section.results["not_notes"]
    assert list(table) == ["real", "retrieved", "model", "noise"] and list(section.figures) == ["not_notes"]
    assert table["model"]["pieces"] == 3 and table["noise"]["left_over"] > table["real"]["left_over"]
    assert all(sum(row["pianos"].values()) == pytest.approx(1) for row in table.values())
    as_json = {"model": {**table["model"], "left_over": None, "notes_interval": [None, None]}}
    assert len(plot_not_notes(as_json).axes) == 1


def test_spectra_that_are_damaged_are_told(monkeypatch):
    monkeypatch.setattr(pianodiff_music, "load_tensors", lambda path: None)
    known_pianos.cache_clear()
    with pytest.raises(OSError, match="notes.safetensors is missing or damaged; install pianodiff again"):
        known_pianos()
    monkeypatch.undo()
    assert len(known_pianos()) == 2


@pytest.mark.long    # two renderings of four minutes
def test_the_spectra_of_notes_are_those_that_fluidsynth_plays(fluidsynth, shared_data):
    from test_recordings import midi_of

    font, columns = shared_data / "fluidr3-piano.sf2", []
    for force in (50, 95):
        struck = b"".join(bytes([0x84 if key > 21 else 0x80, 0x58 if key > 21 else 0, 0x90, key, force,
                                 0x92, 0x60, 0x80, key, 0]) for key in range(21, 109))    # 600 and 2400 ticks
        wave = render_midi(midi_of(struck, division=500), font).numpy()
        for key in range(88):
            V = frames_of(wave[3 * key * 8000 : int((3 * key + 2.9) * 8000)])
            columns += [V[:, a:b].mean(1) for a, b in ((0, 4), (6, 16), (30, 60), (110, 145))]
    expected = torch.from_numpy(np.stack([c / (c.sum() + 1e-9) for c in columns], 1) + 1e-7).float()
    made = note_spectra(font)
    assert made.name == "fluidr3-piano" == known_pianos()[0].name
    torch.testing.assert_close(made.spectra, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(known_pianos()[0].spectra, expected, rtol=1e-3, atol=1e-6)


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
    (lambda: not_notes(WAVE, known_pianos()[0]), r"a finite floating-point wave \[T\] is needed"),
    (lambda: not_notes(WAVE[0].int(), known_pianos()[0]), "not one of torch.int32"),
    (lambda: not_notes(WAVE[0] / 0, known_pianos()[0]), "a finite"),
    (lambda: not_notes(WAVE[0], known_pianos()[0], 0), "at 0 Hz"),
    (lambda: not_notes(WAVE[0, :0], known_pianos()[0]), "0 samples at 8000 Hz are too few"),
    (lambda: not_notes(WAVE[0, :2000], known_pianos()[0], 44_100), "give at least 64 ms"),
    (lambda: statistic_distance(torch.zeros(5), torch.tensor([1.0, torch.nan])), "at least 2"),
    (lambda: trend(torch.ones(9)), r"\[pieces, blocks\]"),
    (lambda: trend(torch.ones(1, 9)), "at least 2 pieces"),
])
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
