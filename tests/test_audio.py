"""Audio: formats, rates and bad files; the STFT against librosa; blocks that tile; loudness."""

import base64
import copy
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import SHAPES, level, resolve, seed, shapes, sine

from pianodiff import audio, phases
from pianodiff.audio import (
    AUDIO_FORMATS,
    Wave,
    _istft,
    _stft,
    load_audio,
    normalize_peak,
    save_audio,
    sound_facts,
    sound_file,
    to_flac,
    to_magnitude,
    to_mp3,
    to_spectrogram,
)
from pianodiff.files import _mpeg_frames
from pianodiff.phases import griffin_lim, to_wave
from pianodiff.show import player

# ---- reading

KINDS = [
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
    ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"), ("AIFF", "PCM_24"), ("AIFF", "FLOAT"),
]  # fmt: skip


@pytest.mark.parametrize("rate", [44_100, 48_000, 16_000, 8000])
@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_every_format_and_rate_gives_the_same_sound(tmp_path, kind, subtype, rate):
    left = sine(440, rate, rate)
    soundfile.write(tmp_path / "sound", np.stack([left, left / 2], axis=1), rate, format=kind, subtype=subtype)
    wave = load_audio(tmp_path / "sound")
    assert wave.dtype == torch.float32 and wave.ndim == 1 and abs(len(wave) - 8000) <= 1
    middle = wave[2000:6000] * torch.hann_window(4000)
    assert torch.fft.rfft(middle).abs().argmax() == 220
    assert abs(level(wave[2000:6000]) - level(torch.from_numpy(0.75 * left))) < 0.15  # the channels' mean


def test_one_channel_at_8_khz_is_read_as_it_is(tmp_path):
    expected = sine(440, 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", expected, 8000, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "a.wav").numpy(), expected)
    assert np.array_equal(load_audio(io.BytesIO((tmp_path / "a.wav").read_bytes())).numpy(), expected)


def test_other_rates_can_be_asked_for(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(440, 16_000, 16_000), 16_000)
    assert len(load_audio(tmp_path / "a.wav", 22_050)) == 22_050


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_the_low_pass_is_real(rate):
    def heard(frequency):
        file = io.BytesIO()
        soundfile.write(file, sine(frequency, rate, rate, 1.0), rate, format="WAV", subtype="FLOAT")
        return level(load_audio(file)[1000:7000])

    assert abs(heard(1000)) < 0.1 and abs(heard(3500)) < 0.1
    assert heard(5000) < -60 and heard(7000) < -60


def wav_bytes(samples: np.ndarray, kind: str = "WAV", subtype: str | None = "PCM_16", rate: int = 44_100) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 250
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "can't be read as sound"),
        (b"These are words, not sound.\n" * 100, "can't be read as sound"),
        (bytes(5000), "can't be read as sound"),
        (wav_bytes(np.zeros(0)), "holds no sound"),
        (wav_bytes(np.full(2, 0.5)), "holds no sound"),  # less than one sample at 8 kHz
        (wav_bytes(np.array([0.1, np.nan] * 5000), subtype="FLOAT"), "NaN"),
        (wav_bytes(np.array([0.1, np.inf] * 5000), subtype="FLOAT"), "NaN or infinite"),
    ],
    ids=["empty", "text", "zeros", "no samples", "too short", "nan", "inf"],
)
def test_bad_content_is_named_in_one_line(tmp_path, content, words):
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_audio(tmp_path / "bad.wav")
    assert words in one_line(error) and "bad.wav" in str(error.value) and ";" in str(error.value)


class Interrupted(io.BytesIO):
    """A file in memory; Ctrl-C comes while it is read, or written, for the n-th time."""

    left = 0

    def counted(self) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def readinto(self, buffer) -> int:
        self.counted()
        return super().readinto(buffer)

    def write(self, data) -> int:
        self.counted()
        return super().write(data)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_libsndfile_does_not_take_ctrl_c_for_the_end_of_a_file(kind):
    """Its callbacks swallow all that is raised in them: the file would be cut off, or shortened without a word."""
    whole = io.BytesIO()
    soundfile.write(whole, sine(440, 8000 * 20), 8000, format=kind)
    reads = 0
    for reads in range(1, 1000):
        file = Interrupted(whole.getvalue())
        file.left = reads
        try:
            load_audio(file)
            break
        except KeyboardInterrupt:
            continue
    assert reads > 2 and file.left > 0


def test_nor_while_it_writes(monkeypatch):
    for writes in (1, 2):
        monkeypatch.setattr(Interrupted, "left", writes)
        monkeypatch.setattr(audio.io, "BytesIO", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            to_flac(torch.from_numpy(sine(440, 8000 * 20)))


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "MP3", "OGG"])
def test_a_truncated_file_is_not_taken_for_a_whole_one(tmp_path, kind, part):
    whole = wav_bytes(sine(440, 44_100, 44_100), kind, None)
    (tmp_path / "cut").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match="cut") as error:
        load_audio(tmp_path / "cut")
    one_line(error)


def test_an_ogg_stream_needs_its_last_page(tmp_path):
    whole = wav_bytes(np.random.default_rng(0).normal(0, 0.1, 100_000), "OGG", None)
    assert len(load_audio(io.BytesIO(whole))) == 18_141
    last = whole.rfind(b"OggS")
    assert whole.count(b"OggS") > 5
    for size in (last, last + 4, last + 20, last + 30, len(whole) - 2, whole.rfind(b"OggS", 0, last)):
        (tmp_path / "cut.ogg").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.ogg is truncated") as error:
            load_audio(tmp_path / "cut.ogg")
        one_line(error)


@pytest.mark.parametrize("kind, mark, order", [("WAV", b"data", "little"), ("AIFF", b"SSND", "big")])
def test_samples_that_go_on_beyond_the_file(kind, mark, order):
    whole = bytearray(wav_bytes(sine(440, 44_100, 44_100), kind))
    at = whole.find(mark) + 4
    size = int.from_bytes(whole[at : at + 4], order)
    whole[at : at + 4] = (2 * size).to_bytes(4, order)  # what the whole file's chunk says is true
    with pytest.raises(ValueError, match="the sound is truncated: 88,.* of at least 176,"):
        load_audio(io.BytesIO(bytes(whole)))


def test_what_follows_the_samples_may_be_wrong():
    odd = wav_bytes(np.full(4001, 0.5), subtype="PCM_U8", rate=8000)[: 44 + 4001]  # no byte fills it up
    assert len(load_audio(io.BytesIO(odd + b"LIST\4\0\0\0INFO"))) == 4001


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0, -8000, 0.5, 8000.5])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match="sample_rate must be a whole number of at least 1, not ") as error:
        load_audio(io.BytesIO(wav_bytes(np.full(100, 0.5))), rate)
    one_line(error)


def test_a_recording_is_not_made_a_hundred_times_as_long(tmp_path):
    (tmp_path / "slow.wav").write_bytes(wav_bytes(np.full(20_000, 0.5), rate=1))
    with pytest.raises(ValueError, match="slow.wav has 1 samples a second, too few for 8,000") as error:
        load_audio(tmp_path / "slow.wav")
    one_line(error)
    assert len(load_audio(tmp_path / "slow.wav", 100)) == 2_000_000


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF024])
def test_a_wav_from_a_pipe_has_no_size_and_is_read(size):
    whole = bytearray(wav_bytes(sine(440, 44_100, 44_100)))
    data = whole.find(b"data") + 4
    whole[4:8] = size.to_bytes(4, "little")
    whole[data : data + 4] = min(size, 0x7FFFF000 if size < 2**31 else size).to_bytes(4, "little")
    assert len(load_audio(io.BytesIO(bytes(whole)))) == 8000


def heard(data: bytes, rate: int = 8000) -> torch.Tensor:
    return load_audio(io.BytesIO(data), rate)


UNSEEKABLE = [("WAV", "GSM610"), ("AIFF", "GSM610"), ("W64", "GSM610"), ("WAV", "G721_32"), ("WAV", "NMS_ADPCM_32"),
              ("AU", "G723_40"), ("XI", "DPCM_16"), ("AIFF", "DWVW_16")]


@pytest.mark.parametrize(("kind", "subtype"), UNSEEKABLE)
def test_codecs_that_cannot_seek_are_read(kind, subtype):
    rate = 44_100 if kind == "XI" else 8000    # the one that XI has
    expected = sine(220, 2 * rate, rate, 0.3)
    wave = heard(wav_bytes(expected, kind, subtype, rate), rate)
    assert 0 <= len(wave) - 2 * rate < 400    # the last block is filled up
    assert level(wave[: 2 * rate] - torch.from_numpy(expected).float()) < level(wave) - 10


@pytest.mark.parametrize(("kind", "subtype"), [
    ("WAV", "PCM_16"), ("WAV", "GSM610"), ("WAV", "MS_ADPCM"), ("WAV", "ALAW"), ("RF64", "FLOAT"), ("W64", "PCM_24"),
    ("AIFF", "IMA_ADPCM"), ("AU", "ULAW"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("SVX", "PCM_S8"),
])
def test_half_a_file_is_found_in_every_container(kind, subtype):
    whole = wav_bytes(sine(440, 8000), kind, subtype, 8000)
    assert 8000 <= len(heard(whole)) < 8400
    with pytest.raises(ValueError, match="^the sound is truncated: .* bytes; copy or record it again"):
        heard(whole[: len(whole) // 2])


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
def test_an_mp3_without_a_header_is_read_to_its_end(rate, mode):
    """The sound is quiet at first, so the first frames tell nothing of the others' size."""
    noise = np.random.default_rng(0).normal(0, 0.1, rate) * np.linspace(0, 1, rate) ** 4
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    wave = heard(file.getvalue(), rate)
    _, *frames = _mpeg_frames(file.getvalue())
    longer = heard(file.getvalue()[frames[0][1] :], rate)    # the header also tells what to cut off at both ends
    assert len(wave) == rate and len(longer) == len(frames) * (1152 if rate >= 32_000 else 576)
    torch.testing.assert_close(longer[1105 : 1105 + rate], wave, atol=1e-6, rtol=0)


def test_mp3_files_that_were_joined_are_read_one_after_the_other():
    one, two, other = (to_mp3(torch.from_numpy(sine(220, 12_000)), 8000 * n) for n in (1, 2, 3))
    tag = b"ID3\4\0\0\0\0\x20\0" + bytes(4096)
    expected = torch.cat([heard(one), heard(one), heard(two), heard(other)])
    assert len(expected) == 12_000 * 2 + 6000 + 4000
    assert torch.equal(heard(tag + one + b"TAG" + bytes(125) + tag + one + two + other), expected)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_streams_that_follow_one_another_are_read(subtype):
    one, two, other = (wav_bytes(sine(440, size), "OGG", subtype, 8000) for size in (8000, 6000, 4000))
    stereo = wav_bytes(np.zeros((4000, 2)), "OGG", subtype, 16_000)
    assert torch.equal(heard(one + two + other), torch.cat([heard(one), heard(two), heard(other)]))
    assert len(heard(one + stereo + other)) == 8000 + 2000 + 4000


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path, subtype):
    noise = np.random.default_rng(0).normal(0, 0.1, (20_000, 2))
    whole = wav_bytes(noise, "FLAC", subtype)
    unknown = whole[:21] + bytes([whole[21] & 0xF0]) + bytes(4) + whole[26:]
    for data in (unknown, unknown + b"TAG" + bytes(125)):
        assert torch.equal(heard(data, 44_100), heard(whole, 44_100))
    (tmp_path / "x.flac").write_bytes(unknown)
    assert sound_facts(tmp_path / "x.flac").seconds == 20_000 / 44_100


def test_a_header_may_promise_more_than_memory_holds():
    flac = wav_bytes(np.full(8000, 0.5), "FLAC", rate=8000)
    with pytest.raises(ValueError, match="the sound is truncated: 8,000 of 68,719,476,735 samples"):
        heard(flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:])    # 36 ones
    rf64 = wav_bytes(np.full(8000, 0.5), "RF64", rate=8000)
    with pytest.raises(ValueError, match="the sound is truncated: 16,104 of at least 1,152,921,504,606,847,080 bytes"):
        heard(rf64[:28] + (2**60).to_bytes(8, "little") + rf64[36:])


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "missing.wav", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name) as error:
            load_audio(path)
        one_line(error)


# ---- writing

@pytest.mark.parametrize("ending", AUDIO_FORMATS)
def test_what_is_written_is_read(tmp_path, ending, struck_notes):
    save_audio(tmp_path / f"x{ending}", 0.5 * struck_notes)  # float64 in
    back = load_audio(tmp_path / f"x{ending}").double()
    assert [file.name for file in tmp_path.iterdir()] == [f"x{ending}"]
    assert len(back) == len(struck_notes)
    if ending in (".wav", ".flac", ".aiff", ".aif"):
        assert soundfile.info(tmp_path / f"x{ending}").subtype == "PCM_16"
        torch.testing.assert_close(back, 0.5 * struck_notes, atol=2**-15, rtol=0)
    else:  # lossy: nine tenths of the energy at least
        assert (back - 0.5 * struck_notes).square().sum() < 0.1 * (0.5 * struck_notes).square().sum()


def test_writing_clips_and_never_rescales(tmp_path):
    save_audio(tmp_path / "x.wav", torch.tensor([-3.0, -1.0, -0.25, 0.0, 0.25, 1.0, 3.0]))
    back = load_audio(tmp_path / "x.wav")
    torch.testing.assert_close(back, torch.tensor([-1, -1, -0.25, 0, 0.25, 1, 1]), atol=2**-15, rtol=0)


def test_any_float_dtype_and_graph_can_be_written(tmp_path):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        save_audio(tmp_path / "x.wav", torch.full((100,), 0.5, dtype=dtype, requires_grad=True))
        torch.testing.assert_close(load_audio(tmp_path / "x.wav"), torch.full((100,), 0.5), atol=2**-15, rtol=0)


@pytest.mark.parametrize("wave", [np.full(100, 0.5), [0.5] * 100])
def test_an_array_and_a_list_are_waves_too(tmp_path, wave):
    save_audio(tmp_path / "x.wav", wave)
    torch.testing.assert_close(load_audio(tmp_path / "x.wav"), torch.full((100,), 0.5), atol=2**-15, rtol=0)


@pytest.mark.parametrize("wave", ["piano.wav", None, [[0.5], [0.5, 0.5]]])
def test_what_is_no_wave_is_named(tmp_path, wave):
    with pytest.raises(TypeError, match=rf"x.wav needs a wave \[T\] to write, not a {type(wave).__name__}"):
        save_audio(tmp_path / "x.wav", wave)


def test_a_written_wav_has_the_same_bytes_each_time(tmp_path, struck_notes):
    for name in ("a.wav", "b.wav"):
        save_audio(tmp_path / name, struck_notes)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize(
    ("name", "wave", "words"),
    [
        ("x.wav", torch.zeros(0), "T > 0"),
        ("x.wav", torch.zeros(2, 100), "[2, 100]"),
        ("x.wav", torch.ones(100, dtype=torch.int16), "int16"),
        ("x.wav", torch.tensor([0.0, float("nan")]), "NaN"),
        ("x.wav", torch.tensor([0.0, float("inf")]), "infinite"),
        ("x.txt", torch.zeros(100), ".flac"),
        ("x", torch.zeros(100), ".flac"),
    ],
)
def test_a_bad_wave_or_name_writes_nothing(tmp_path, name, wave, words):
    with pytest.raises(ValueError) as error:
        save_audio(tmp_path / name, wave)
    assert words in one_line(error) and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        save_audio(tmp_path / "nowhere" / "x.wav", torch.zeros(100))
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ValueError, match="folder.wav can't be written"):
        save_audio(tmp_path / "folder.wav", torch.zeros(100))
    with pytest.raises(ValueError, match="x.mp3 can't be written"):  # no such rate in MP3
        save_audio(tmp_path / "x.mp3", torch.zeros(100), 7000)

    def full(self, samples):
        raise OSError(28, "No space left on device")

    save_audio(tmp_path / "kept.wav", torch.full((100,), 0.5))
    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    for name in ("kept.wav", "new.wav"):
        with pytest.raises(ValueError, match=rf"{name} can't be written \(No space left on device\)") as error:
            save_audio(tmp_path / name, torch.zeros(100))
        one_line(error)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.wav", "kept.wav"]
    assert load_audio(tmp_path / "kept.wav").max() > 0.4


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="limits of a process are POSIX's")
def test_libsndfiles_system_error_is_given_its_name(tmp_path):
    code = """import resource, sys, torch
from pianodiff.audio import save_audio
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for path in sys.argv[1:]:
    for samples in 50_000, 3_000:    # of which all, but in WAV and AIFF, are written with the end
        try:
            save_audio(path, torch.rand(samples))
        except ValueError as error:
            print(error)"""
    paths = [tmp_path / f"new{ending}" for ending in AUDIO_FORMATS]
    told = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=3600)
    lines = [f"{path} can't be written (File too large); choose another place" for path in paths]
    assert told.stdout.splitlines() == [line for line in lines for _ in range(2)], told.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", AUDIO_FORMATS)
def test_long_sounds_and_pieces(tmp_path, ending):
    """libsndfile's Vorbis lays the first write on the stack: of more than 2**21 samples it crashed."""
    long = torch.sin(torch.arange(2_500_000) / 10)
    save_audio(tmp_path / f"a{ending}", long)
    with sound_file(tmp_path / f"b{ending}", 8000) as write:
        write(long[:2_300_000])
        write(long[2_300_000:])
    assert soundfile.info(tmp_path / f"a{ending}").frames == soundfile.info(tmp_path / f"b{ending}").frames == len(long)
    assert (load_audio(tmp_path / f"a{ending}") - 0.999 * long).abs().max() < 0.2


def test_without_pieces_there_is_no_file(tmp_path):
    with sound_file(tmp_path / "x.wav", 8000):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written():
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc here, where nobody can write")
    with pytest.raises(ValueError, match="can't be written") as error:
        save_audio("/proc/x.wav", torch.zeros(100))
    one_line(error)


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_flac_is_the_wave_at_its_own_level(rate):
    wave = 1.5 * torch.sin(torch.arange(40_000) * 0.1)
    data = to_flac(wave.double().requires_grad_(), rate)
    found, heard = soundfile.read(io.BytesIO(data), dtype="float32")
    assert heard == rate and data[:4] == b"fLaC"
    torch.testing.assert_close(torch.from_numpy(found), wave.clamp(-1, 1), atol=2**-15, rtol=0)


def test_flac_frames_are_short():
    """Chromium can't find a place in short sounds of libFLAC's usual 4096 samples a frame: it gives up playing."""
    assert int.from_bytes(to_flac(torch.zeros(40_000))[10:12]) <= 1152  # STREAMINFO's largest block


@pytest.mark.parametrize("samples", [1000, 8192, 12_345])
def test_mp3_is_the_wave_at_its_own_level_in_its_own_place(samples):
    wave = 0.5 * torch.sin(torch.arange(samples) * 0.1) * (torch.arange(samples) >= samples // 2)
    found, heard = soundfile.read(io.BytesIO(to_mp3(wave.double().requires_grad_())), dtype="float32")
    assert heard == 8000 and len(found) == samples
    assert (torch.from_numpy(found) - wave).std() < 0.1 * wave.std()
    assert abs(int((abs(found) > 0.05).argmax()) - samples // 2) <= 4


def test_mp3_is_half_of_flac_at_most(struck_notes):
    assert 2 * len(to_mp3(struck_notes)) < len(to_flac(struck_notes))


@pytest.mark.parametrize("rate", [10_000, 96_000])
def test_mp3_of_another_rate(rate):
    with pytest.raises(ValueError, match=f"MP3 has no sample rate of {rate} Hz; use one of 8000, ") as error:
        to_mp3(torch.zeros(100), rate)
    one_line(error)


@pytest.mark.parametrize("encode", [to_flac, to_mp3])
@pytest.mark.parametrize("bad, message", [
    (torch.zeros(0), r"not one of shape \[0\]"),
    (torch.zeros(2, 100), r"not one of shape \[2, 100\]"),
    (torch.tensor([0.0, torch.nan]), "NaN or infinite"),
    (torch.tensor([0.0, torch.inf]), "NaN or infinite"),
])
def test_a_file_of_no_wave(bad, message, encode):
    with pytest.raises(ValueError, match=message) as error:
        encode(bad)
    one_line(error)


def test_normalize_peak(struck_notes):
    scaled, peak = normalize_peak(-0.3 * struck_notes)
    assert scaled.abs().max() == 1 and abs(peak - 0.27) < 1e-12
    torch.testing.assert_close(scaled * peak, -0.3 * struck_notes)
    for bad, words in ((torch.zeros(100), "silent"), (torch.zeros(0), "silent"), (torch.full((9,), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=words):
            normalize_peak(bad)


# ---- spectrograms

@shapes
def test_stft_and_decibels_are_librosas(cfg, struck_notes):
    theirs = librosa.stft(struck_notes.numpy(), n_fft=cfg.n_fft, hop_length=cfg.hop_length)
    ours = _stft(struck_notes[None], cfg)
    torch.testing.assert_close(ours[0], torch.from_numpy(theirs), atol=1e-9, rtol=0)
    torch.testing.assert_close(_istft(ours, cfg, len(struck_notes))[0], struck_notes, atol=1e-9, rtol=0)
    decibels = librosa.amplitude_to_db(np.abs(theirs), ref=cfg.reference, amin=1e-9, top_db=None)
    spec = to_spectrogram(struck_notes, cfg)
    expected = torch.from_numpy(decibels[:-1, : spec.shape[-1]].clip(-80, 0))
    torch.testing.assert_close(80 * (spec - 1), expected, atol=1e-4, rtol=0)  # float64: decibels
    single = to_spectrogram(struck_notes.float(), cfg)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), spec, atol=1e-4, rtol=0)  # float32: of the range [0, 1]


@shapes
def test_one_block_is_one_picture(cfg):
    assert cfg.block_samples == 16_384 and cfg.block_seconds == 2.048
    for samples in (16_384, 16_384 + cfg.hop_length - 1):
        assert to_spectrogram(torch.zeros(samples), cfg).shape == (cfg.n_bins, cfg.n_frames)
    assert to_spectrogram(torch.zeros(16_383), cfg).shape[-1] == cfg.n_frames - 1
    assert to_wave(torch.zeros(cfg.n_bins, cfg.n_frames), cfg, n_iter=0).shape == (16_384,)


@shapes
def test_blocks_tile(cfg, struck_notes):
    """A column depends on no sample further off than half a window, so a block is that of its own part with context."""
    whole = to_spectrogram(struck_notes, cfg)
    blocks = whole.split(cfg.n_frames, dim=-1)
    assert len(blocks) == 2 and torch.equal(torch.cat(blocks, dim=-1), whole)
    context = cfg.n_fft  # samples on each side, a whole number of hops
    second = to_spectrogram(struck_notes[16_384 - context :], cfg)[:, context // cfg.hop_length :]
    torch.testing.assert_close(second, blocks[1], atol=1e-9, rtol=0)
    joined = to_spectrogram(torch.cat([struck_notes, struck_notes]), cfg)
    edge = cfg.n_fft // (2 * cfg.hop_length)
    torch.testing.assert_close(joined[:, : 2 * cfg.n_frames - edge], whole[:, : 2 * cfg.n_frames - edge])


@shapes
def test_the_reference_is_a_full_scale_sine(cfg):
    for amplitude, value in ((1.0, 1.0), (0.1, 0.75), (0.01, 0.5), (1e-6, 0.0)):
        wave = torch.from_numpy(sine(1000, 16_384, amplitude=amplitude))
        row = to_spectrogram(wave, cfg)[cfg.n_fft // 8, 4:-4]
        torch.testing.assert_close(row, torch.full_like(row, value), atol=1e-6, rtol=0)


@shapes
def test_nothing_is_normalised(cfg, struck_notes):
    loud, quiet = to_spectrogram(struck_notes, cfg), to_spectrogram(0.1 * struck_notes, cfg)
    both = (quiet > 0) & (loud < 1)
    torch.testing.assert_close(quiet[both], loud[both] - 0.25)
    assert (to_spectrogram(torch.zeros(16_384), cfg) == 0).all()


@shapes
def test_magnitude_comes_back(cfg, struck_notes):
    stft = _stft(struck_notes[None], cfg)[0].abs()
    magnitude = to_magnitude(to_spectrogram(struck_notes, cfg), cfg)
    assert (magnitude[-1] == 0).all() and magnitude.shape[0] == cfg.n_bins + 1
    expected = stft[:-1, : magnitude.shape[1]].clamp(1e-4 * cfg.reference, cfg.reference)
    torch.testing.assert_close(magnitude[:-1], expected)


def test_a_batch_is_its_items(struck_notes):
    cfg = SHAPES[2]
    batch = torch.stack([struck_notes, 0.1 * struck_notes, struck_notes.flip(0), -struck_notes]).reshape(2, 2, -1)
    spec = to_spectrogram(batch, cfg)
    assert spec.shape == (2, 2, 256, 256)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(spec[i, j], to_spectrogram(batch[i, j], cfg))
    one, many = seed(), seed()  # the phases of a batch are drawn item by item
    singles = [to_wave(s, cfg, n_iter=4, generator=one) for s in spec.flatten(0, 1)[..., :64]]
    waves = to_wave(spec[..., :64], cfg, n_iter=4, generator=many)
    assert waves.shape == (2, 2, 64 * 128)
    torch.testing.assert_close(waves.flatten(0, 1), torch.stack(singles))


def test_bad_spectrograms_and_waves(struck_notes):
    cfg = SHAPES[2]
    with pytest.raises(ValueError, match="less than one hop"):
        to_spectrogram(torch.zeros(127), cfg)
    with pytest.raises(ValueError, match="NaN"):
        to_spectrogram(torch.full((1000,), torch.nan), cfg)
    for bad in (torch.zeros(128, 128), torch.zeros(256), torch.zeros(257, 128)):
        with pytest.raises(ValueError, match="256, frames"):
            to_wave(bad, cfg)
    with pytest.raises(ValueError, match="at least 2"):
        to_wave(torch.zeros(256, 0), cfg)
    with pytest.raises(ValueError, match="NaN"):
        to_wave(torch.full((256, 8), torch.nan), cfg)
    for bad in (torch.ones(257, 1), torch.ones(256, 10)):
        with pytest.raises(ValueError, match="257, at least 2"):
            griffin_lim(bad, cfg)


# ---- what the book's errata say of section III-B

def test_the_paper_sizes_come_from_no_piece_of_2096_ms():
    """A centred STFT has 1 + T // hop columns; both widths of Table I come from 16,320 to 16,383 samples alone."""
    def columns(samples, cfg, center):
        window = torch.hann_window(cfg.n_fft)
        stft = torch.stft(torch.zeros(samples), cfg.n_fft, cfg.hop_length, window=window, center=center,
                          pad_mode="constant", return_complex=True)
        return stft.shape[-1]

    small, large = SHAPES[:2]
    assert [columns(16_768, cfg, True) for cfg in (small, large)] == [132, 263]
    assert [columns(16_768, cfg, False) for cfg in (small, large)] == [130, 255]
    assert [columns(t, small, True) for t in (16_319, 16_320, 16_383, 16_384)] == [128, 128, 128, 129]
    assert [columns(t, large, True) for t in (16_319, 16_320, 16_383, 16_384)] == [255, 256, 256, 257]


def test_normalising_by_itself_makes_silence_the_loudest_block():
    silent = librosa.amplitude_to_db(np.zeros((256, 128)), ref=np.max)
    assert (silent == 0).all()  # 0 dB: 1 after scaling to [0, 1]
    assert to_spectrogram(torch.zeros(16_384), SHAPES[2]).max() == 0


def test_zero_decibels_in_the_nyquist_row_is_a_whistle(struck_notes):
    cfg = SHAPES[2]
    magnitude = to_magnitude(to_spectrogram(struck_notes[:16_384], cfg), cfg)
    padded = magnitude.clone()
    padded[-1] = cfg.reference  # what padding the decibels with zeros means
    right, wrong = (griffin_lim(m, cfg, generator=seed()) for m in (magnitude, padded))
    high = [_stft(w[None], cfg)[0, -4:].abs().mean() / cfg.reference for w in (right, wrong)]
    assert 20 * torch.log10(high[0]) < -50 and 20 * torch.log10(high[1]) > -20


@pytest.mark.parametrize("rate", [16_000, 8001])  # with MP3, and where FLAC has to do
def test_a_wave_knows_its_rate_and_its_seed(struck_notes, tmp_path, rate):
    wave = Wave(struck_notes.clone(), rate, seed=7)
    assert (wave.sample_rate, wave.seed) == (rate, 7) and torch.equal(wave, struck_notes)
    assert repr(wave) == f"Wave({len(struck_notes) / rate:.3f} s at {rate} Hz, seed 7)"
    page = r'<audio controls aria-label="sound of seed 7" src="data:audio/(\w+);base64,(.+)"></audio>'
    kind, sound = re.fullmatch(page, wave._repr_html_()).groups()
    with soundfile.SoundFile(io.BytesIO(base64.b64decode(sound))) as file:
        assert (kind, file.samplerate, file.frames) == ("mpeg" if rate == 16_000 else "flac", rate, len(struck_notes))
    save_audio(tmp_path / "own.wav", wave)
    save_audio(tmp_path / "other.wav", wave, 8000)
    assert [soundfile.info(tmp_path / f"{name}.wav").samplerate for name in ("own", "other")] == [rate, 8000]
    assert f'seconds="{len(struck_notes) / rate:.6g}"' in player(wave).data
    assert f'seconds="{len(struck_notes) / 8000:.6g}"' in player(wave, 8000).data


def test_what_comes_of_a_wave_is_a_plain_tensor(struck_notes, tmp_path):
    wave = Wave(struck_notes.clone(), 8000, seed=7)
    torch.save(wave, tmp_path / "wave.pt")
    loaded = torch.load(tmp_path / "wave.pt", weights_only=True)
    stored = safetensors.torch.load(safetensors.torch.save({"wave": wave}))["wave"]
    for result in (wave[:-1], 0.5 * wave, torch.cat([wave, wave]), wave.clone(), wave.abs().cumsum(0), wave.float() + 0,
                   copy.copy(wave), copy.deepcopy(wave), loaded, stored):
        assert type(result) is torch.Tensor
    assert torch.equal(loaded, struck_notes) and np.array_equal(wave.numpy(), struck_notes.numpy())
    with pytest.raises(ValueError, match=r"a wave \[T\] is needed, not one of shape \[1, "):
        Wave(struck_notes[None])
# ---- what has moved

def test_the_names_of_version_0_1_are_still_here():
    for name in ("griffin_lim", "to_wave", "stream_wave"):
        assert getattr(audio, name) is getattr(phases, name)
    with pytest.raises(AttributeError, match="pianodiff.audio' has no attribute 'vocode'"):
        resolve("audio.vocode")
