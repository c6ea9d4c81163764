"""What is found in a data set, whatever its layout and its damage; and MIDI, played."""

import csv
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy
import soundfile
import torch
import zarr

import pianodiff
from pianodiff import recordings
from pianodiff.audio import AUDIO_FORMATS, SpectrogramConfig, save_audio
from pianodiff.cli import main
from pianodiff.data import open_store, prepare
from pianodiff.recordings import ROOMS, SPLITS, find_recordings, find_soundfont, render_midi

CFG = SpectrogramConfig(n_fft=64, hop_length=32, n_frames=32)    # a block is 1024 samples, an eighth of a second
SECONDS = {"a": 0.5, "b": 0.7, "c": 0.4, "d": 0.3}
SPLIT = {"a": "train", "b": "train", "c": "validation", "d": "test"}
COLUMNS = ["canonical_composer", "canonical_title", "split", "midi_filename", "audio_filename", "duration"]


def sound(seed: int, seconds: float) -> torch.Tensor:
    """Three decaying tones and a little noise."""
    generator, time = torch.Generator().manual_seed(seed), torch.arange(round(seconds * 8000)) / 8000
    pitches = 200 * 8 ** torch.rand(3, 1, generator=generator)
    tones = (2 * torch.pi * pitches * time).sin().mean(0) * torch.exp(-4 * (time % 0.3))
    return 0.5 * tones + 0.01 * torch.randn(len(time), generator=generator)


def write_index(folder: Path, splits: dict[str, str], kind: str = "csv") -> None:
    rows = [["Somebody", f"piece {name}", split, f"2004/{name}.midi", f"2004/{name}.wav", SECONDS.get(name, 1)]
            for name, split in splits.items()]
    if kind == "rows":    # as in MAESTRO's first two versions
        (folder / "maestro-v9.json").write_text(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows]))
    elif kind == "csv":
        with open(folder / "maestro-v9.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    else:
        columns = {name: {str(i): row[k] for i, row in enumerate(rows)} for k, name in enumerate(COLUMNS)}
        (folder / "maestro-v9.json").write_text(json.dumps(columns))


def maestro(folder: Path, kind: str = "csv") -> Path:
    """Four short recordings in MAESTRO's layout."""
    (folder / "2004").mkdir(parents=True)
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        save_audio(folder / "2004" / f"{name}.wav", sound(seed, seconds))
    write_index(folder, SPLIT, kind)
    return folder


def zipped(folder: Path, archive: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, Path(inside, path.relative_to(folder)))
    return archive


# MIDI

SOUNDFONT = b"RIFF\4\0\0\0sfbk"    # as one begins


def midi_file(*pitches: int) -> bytes:
    """One note after another, each of two seconds."""
    events = b"".join(bytes([0, 0x90, pitch, 90, 0x83, 0x00, 0x80, pitch, 0]) for pitch in pitches) + b"\0\xff\x2f\0"
    return b"MThd\0\0\0\6\0\0\0\1\0\x60" + b"MTrk" + len(events).to_bytes(4, "big") + events


def midi_of(events: bytes, division: int = 96) -> bytes:
    track = events + b"\0\xff\x2f\0"
    return b"MThd\0\0\0\6\0\0\0\1" + division.to_bytes(2, "big") + b"MTrk" + len(track).to_bytes(4, "big") + track


NOTE = b"\0\x90\x3c\x50\x60\x80\x3c\0"
ENDLESS = [midi_of(NOTE + b"\xff\xff\xff\x7f" + NOTE[1:]),                     # the time of one event
           midi_of(NOTE + b"\xff\xff\xff\x7f\xff\1\0"),     # of an event without a sound
           midi_of(b"\0\xff\x51\3\xff\xff\xff" + 99 * (b"\x87\x00" + NOTE[1:]), 1)], midi_of(NOTE[:4])


def test_midi_stands_in_for_missing_audio(fluidsynth, shared_data, tmp_path):
    source = maestro(tmp_path / "music")
    for name, pitch in [("a", 57), ("b", 69)]:    # of a the audio is there too
        (source / f"2004/{name}.midi").write_bytes(midi_file(pitch))
    (source / "2004/b.wav").unlink()
    cfg = SpectrogramConfig(n_frames=16)
    report = prepare(source, tmp_path / "store", cfg, jobs=1, soundfont=shared_data / "fluidr3-piano.sf2")
    assert report["recordings"] == 4 and report["skipped"] == {}
    group = zarr.open_group(tmp_path / "store", mode="r")
    assert sorted(group) == ["2004--a.wav", "2004--b.midi", "2004--c.wav", "2004--d.wav"]
    played = group["2004--b.midi"][:]
    assert 2 * 62.5 < len(played) < 8 * 62.5
    assert abs(int(played[20:80].mean(axis=0).argmax()) * 8000 / 512 - 440) < 16    # A4


def test_real_performances(fluidsynth, shared_data, tmp_path, monkeypatch):
    archive = shared_data / "asap-maestro-midi.zip"
    found = find_recordings(archive)
    assert len(found) == 944 and {r.path[-4:] for r in found} == {".mid"}
    hours = {split: sum(r.duration for r in found if r.split == split) / 3600 for split in SPLITS}
    assert hours == pytest.approx({"train": 66.6, "validation": 10.0, "test": 9.1}, abs=0.05)
    short = min(found, key=lambda r: r.duration)
    with zipfile.ZipFile(archive) as file, zipfile.ZipFile(tmp_path / "one.zip", "w") as one:
        one.writestr(f"{short.title}.mid", file.read(short.path))
        assert short.duration <= recordings._midi_seconds(file.read(short.path)) < short.duration + 2
    monkeypatch.setenv("PIANODIFF_SOUNDFONT", str(shared_data / "fluidr3-piano.sf2"))
    report = prepare(tmp_path / "one.zip", tmp_path / "store", SpectrogramConfig(), jobs=1)
    assert short.duration <= 3600 * report["hours"]["train"] < short.duration + 10    # the last notes die away
    assert 0.1 < open_store(tmp_path / "store").mean < 0.6


def test_midi_that_cannot_be_played(fluidsynth, shared_data, tmp_path):
    piano = shared_data / "fluidr3-piano.sf2"
    for midi, reason in [(midi_file(60)[:-7], "end of file"), (b"RIFF", "not a MIDI file"), (b"", "not a MIDI file")]:
        with pytest.raises(ValueError, match=reason):
            render_midi(midi, piano)
    (tmp_path / "damaged.sf2").write_bytes(piano.read_bytes()[:50_000])    # FluidSynth would go on with another
    (tmp_path / "no.sf2").write_text("no soundfont")
    for name in ("damaged.sf2", "no.sf2"):
        with pytest.raises(ValueError, match="FluidSynth can't play it.*soundfont again"):
            render_midi(midi_file(60), tmp_path / name)


def test_midi_without_an_end(fluidsynth, shared_data, tmp_path, monkeypatch):
    """A few bytes that ask for days, or for a note that is never released."""
    piano, (days, never) = shared_data / "fluidr3-piano.sf2", ENDLESS
    for midi in days:
        with pytest.raises(ValueError, match=r"its events last [\d.]+ hours, more than 2; shorten a rest, or"):
            render_midi(midi, piano)
    assert 60 > len(render_midi(never, piano)) / 8000 > 20    # a piano's string dies away
    monkeypatch.setattr(recordings, "_RINGING", 10)
    for name, midi in {"never": never, "days": days[0], "good": midi_file(60)}.items():
        (tmp_path / f"{name}.mid").write_bytes(midi)
    report = prepare(tmp_path, tmp_path / "store", CFG, jobs=1, soundfont=piano)
    assert report["recordings"] == 1 and report["skipped"].keys() == {"never.mid", "days.mid"}
    assert "it still sounds 10 s after its last event; release its notes there" in report["skipped"]["never.mid"]
    with pytest.raises(ValueError, match=r"FluidSynth took more than 0 s"):
        recordings._errors([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "none", 1, 0)


def test_a_missing_soundfont_or_fluidsynth_is_named(tmp_path, monkeypatch):
    (tmp_path / "music").mkdir()
    (tmp_path / "music/a.mid").write_bytes(midi_file(60))
    with pytest.raises(FileNotFoundError, match=r"no soundfont .*gone\.sf2; name one.*--soundfont"):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1, soundfont=tmp_path / "gone.sf2")
    monkeypatch.setenv("PIANODIFF_SOUNDFONT", "elsewhere.sf2")
    with pytest.raises(FileNotFoundError, match=r"no soundfont elsewhere\.sf2"):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)
    assert not (tmp_path / "store").exists()
    (tmp_path / "any.sf2").write_bytes(SOUNDFONT)
    monkeypatch.setenv("PIANODIFF_SOUNDFONT", str(tmp_path / "any.sf2"))
    assert find_soundfont() == str(tmp_path / "any.sf2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"none of the 1 recordings .* a\.mid: FluidSynth is not installed; install"):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)


@pytest.mark.parametrize("data, message", [
    (b"", "is not a soundfont; name an .sf2 or .sf3 file"), (b"no soundfont", "is not a soundfont"),
    (b"RIFF\4\0\0\0WAVE", "is not a soundfont"), (b"RIFF\5\0\0\0sfbk", "is cut off; copy it again")])
def test_what_is_no_soundfont(data, message, tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music/a.mid").write_bytes(midi_file(60))
    for name, content in (("good", SOUNDFONT), ("bad", data)):
        (tmp_path / f"{name}.sf2").write_bytes(content)
    fonts = [tmp_path / "good.sf2", tmp_path / "bad.sf2"]
    with pytest.raises(ValueError, match=f"bad.sf2 {message}"):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1, soundfont=fonts)
    assert not (tmp_path / "store").exists()


# Rooms

@pytest.mark.parametrize("rate", [8000, 22_050])
@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_the_reverberation_it_is_said_to_have(name, rate):
    response = recordings.room_response(name, rate)
    wet, seconds = recordings.reverberation(response, rate)
    assert response[0] == 1 and torch.equal(response, recordings.room_response(ROOMS[name], rate))
    assert seconds == pytest.approx(ROOMS[name].seconds, rel=0.1)
    assert wet == pytest.approx(1 - 1 / float(response.double().square().sum())) and 0.1 < wet < 0.7
    late = response[rate // 10 :]
    levels = [scipy.signal.spectrogram(part.numpy(), rate)[2].mean(1) for part in late.tensor_split(2)]
    fall = levels[1] / levels[0]
    assert fall[2:16].mean() > 3 * fall[64:].mean()    # high frequencies die away faster


def test_dry_is_no_room():
    assert torch.equal(recordings.reverberate_(sound(0, 0.5), recordings.room_response("dry")), sound(0, 0.5))
    assert recordings.reverberation(recordings.room_response("dry")) == (0, 0)


@pytest.mark.parametrize("samples", [1, 5000, 65_536, 150_000])
@pytest.mark.parametrize("taps", [1, 2, 19_000])
def test_a_wave_in_a_room_is_a_convolution(samples, taps):
    wave, response = sound(0, samples / 8000), recordings.room_response("hall")[:taps]
    whole = scipy.signal.oaconvolve(wave.double().numpy(), response.double().numpy())[:samples]
    assert np.abs(recordings.reverberate_(wave.clone(), response).numpy() - whole).max() < 1e-6


def burst(seconds: float, decay: float, rate: int) -> np.ndarray:
    """A click after 50 ms, and noise that dies away."""
    time = np.arange(round(seconds * rate)) / rate
    noise = 0.02 * np.random.default_rng(0).normal(size=len(time)) * 10 ** (-3 * time / decay)
    return np.concatenate([np.zeros(rate // 20), [-0.9], np.zeros(rate // 100), noise])


def test_a_measured_room(tmp_path):
    soundfile.write(tmp_path / "hall", np.stack([burst(2, 1.3, 8000)] * 2, 1), 8000, format="WAV", subtype="FLOAT")
    response = recordings.room_response(tmp_path / "hall")
    assert len(response) == len(burst(2, 1.3, 8000)) - 400 + 20 and response[20] == 1 == response.abs().max()
    wet, seconds = recordings.reverberation(response)
    tail = np.square(burst(2, 1.3, 8000)[481:]).sum()
    assert wet == pytest.approx(tail / (tail + 0.81), rel=1e-3) and seconds == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("name, message", [
    ("hal", "there is no room 'hal'; did you mean 'hall'? choose of dry, studio, chamber, hall, church, or"),
    ("gone.wav", "there is no room 'gone.wav'; choose of dry"), ("folder", "the room folder is a folder; give a sound"),
    ("text.wav", "text.wav can't be read as sound"), ("empty.wav", "empty.wav holds no sound (it is empty or cut off)"),
    ("silent.wav", "the room silent.wav is silent; give an impulse response that can be heard"),
    ("nan.wav", "nan.wav holds NaN or infinite values; repair it first"),
    ("long.wav", "the room long.wav lasts 10.5 s; give an impulse response of at most 10 s")])
def test_what_is_no_room(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.wav").write_text("no sound, whatever its name says")
    waves = {"empty": [], "silent": np.zeros(800), "nan": [0.1, np.nan], "long": burst(10.4, 1, 8000)}
    for kind, wave in waves.items():
        soundfile.write(f"{kind}.wav", wave, 8000, subtype="FLOAT")
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/a.wav", sound(0, 3))
    assert main(["prepare", "music", "store", "--rooms", "dry", name]) == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith(f"pianodiff: {message}") and not (tmp_path / "store").exists()


# Indexes

INDEX = "split,audio_filename,duration\ntrain,a.wav,1\ntest,b.wav,2\n"
COLUMNWISE = {"canonical_composer": {"0": "Bach", "1": "Satie"}, "split": {"0": "train", "1": "test"},
              "audio_filename": {"0": "a.wav", "1": "b.wav"}}


@pytest.mark.parametrize("name, text, reason", [
    ("index.json", json.dumps(COLUMNWISE)[:-20], "Unterminated string"),
    ("maestro-v3.json", json.dumps(COLUMNWISE)[:30], "Unterminated string"),
    ("index.json", json.dumps(COLUMNWISE | {"split": {"0": "train"}}), "row 2 does not have one value for each column"),
    ("index.json", json.dumps(COLUMNWISE | {"split": ["train", "test"]}), "it needs one {row: value} mapping"),
    ("index.json", json.dumps([COLUMNWISE, ["split"]]), "it needs one {row: value} mapping for each column, or a list"),
    ("index.json", json.dumps([{"split": "train", "audio_filename": "a.wav"}, {}]), "row 2 does not have one value"),
    ("maestro-v2.json", "[" * 100_000, "recursion"),
    ("index.csv", INDEX.encode("utf-16"), "utf-8"),
    ("index.csv", INDEX[:-3], "row 2 does not have one value for each column"),
    ("index.csv", INDEX.replace("a.wav", "a,1.wav"), "row 1 does not have one value for each column"),
    ("index.csv", INDEX.splitlines()[0], "no rows"),
    ("index.csv", INDEX.replace("split", "part"), "no column split"),
    ("index.csv", INDEX.replace("audio_filename", "audio_file"), "no column audio_filename or midi_filename"),
    ("deeper/maestro-v3.0.0.csv", "", "no column split"),
])
def test_an_index_that_cannot_be_used_is_not_passed_over(name, text, reason, tmp_path):
    music = tmp_path / "music"
    (music / name).parent.mkdir(parents=True)
    (music / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for seed, audio in enumerate("abcd"):
        save_audio(music / f"{audio}.wav", sound(seed, 0.2))
    with pytest.raises(ValueError, match=rf"the index {name} can't be used \(.*{reason}.*\); mend or remove it"):
        prepare(music, tmp_path / "store", CFG, jobs=1)
    assert not (tmp_path / "store").exists()


def test_the_settings_of_a_model_are_no_index(tmp_path):
    """They name a split, too; and a run lies beside its samples."""
    shutil.copy(Path(pianodiff.__file__).parent / "weights/nano/config.json", tmp_path)
    save_audio(tmp_path / "a.wav", sound(0, 0.2))
    assert [r.path for r in find_recordings(tmp_path)] == ["a.wav"]


def test_one_file_is_no_folder(tmp_path):
    save_audio(tmp_path / "a.wav", sound(0, 0.2))
    with pytest.raises(ValueError, match=r"a\.wav is one file; give the folder that it lies in, or a zip file"):
        find_recordings(tmp_path / "a.wav")


@pytest.mark.parametrize("changes, message", [
    ({"duration": {"0": 1, "1": "inf"}}, "row 2 has the duration 'inf'; give seconds"),
    ({"duration": {"0": 1, "1": float("nan")}}, "row 2 has the duration nan; give seconds"),
    ({"duration": {"0": 1, "1": [1, 2]}}, r"row 2 has the duration \[1, 2\]; give seconds"),
    ({"duration": {"0": 1, "1": 10**400}}, "row 2 has the duration 1000"),
    ({"duration": {"0": 1, "1": -1}}, "row 2 has the duration -1; give seconds"),
    ({"audio_filename": {"0": "a.wav", "1": 5}}, r"row 2 names the file \[5\]; give a name"),
    ({"split": {"0": "train", "1": ["test"]}}, "row 2 has the split"),
])
def test_an_index_with_a_value_of_another_kind(changes, message, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps(COLUMNWISE | changes))
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
        find_recordings(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(COLUMNWISE | {"canonical_title": {"0": 1812, "1": None}}))
    assert [r.title for r in find_recordings(tmp_path)] == ["Bach: 1812", "Satie"]


def test_an_index_with_a_bad_row(tmp_path):
    for row, message in [("train,,", "row 2 names no file"), ("valid,x.wav,", "row 2 has the split 'valid'; choose"),
                         ("test,x.wav,3:25", "row 2 .*'3:25'"), ("train,a.wav,1", "a.wav twice")]:
        (tmp_path / "index.csv").write_text(f"split,audio_filename,duration\ntrain,a.wav,1\n{row}\n")
        with pytest.raises(ValueError, match=message):
            find_recordings(tmp_path)


# What people keep

def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def rows(*names: str) -> str:
    return "split,audio_filename\n" + "".join(f"train,{name}\n" for name in names)


def told(source: Path) -> tuple[list[str], list[str]]:
    """The paths that are found, and the remarks."""
    found, _, remarks = recordings.scan_source(source)
    return [r.path for r in found], remarks


@pytest.mark.parametrize("name, there, found", [
    ("2004/a.wav", ["2004/a.flac", "2004/a.midi"], "2004/a.flac"),
    ("2004/a.wav", ["2004/a.FLAC"], "2004/a.FLAC"),
    ("2004/a.wav", ["2004/a.wav", "2004/a.flac"], "2004/a.wav"),
    ("2004/a.wav", ["2005/a.wav"], "2004/a.wav"),    # which is missing
    ("2004/No. 1.wav", ["2004/No. 1.opus", "2004/No. 2.wav"], "2004/No. 1.opus"),
    ("./2004/a.wav", ["2004/a.wav"], "./2004/a.wav"),    # as older stores have it
    ("./2004/a.wav", ["2004/a.flac"], "2004/a.flac"),
    ("2004\\a.wav", ["2004/a.wav"], "2004/a.wav"),
    ("\u00e9.wav", ["e\u0301.wav"], "e\u0301.wav"),
])
def test_a_row_finds_its_recording(name, there, found, tmp_path):
    (touch(tmp_path, *there) / "index.csv").write_text(rows(name), encoding="utf-8")
    assert told(tmp_path)[0] == [found]


def test_what_is_replaced_or_passed_over_is_told(tmp_path):
    folder = touch(tmp_path, "a.flac", "b.mid", "c.wav", "d.wav", "e.opus", "e.mid", "1.jpg", "._a.flac", "Thumbs.db")
    assert told(folder) == (["a.flac", "b.mid", "c.wav", "d.wav", "e.opus"],
                            ["passed over, being MIDI beside sound of the same name: 1",
                             "passed over, being no sound that is read: 1 .jpg"])
    index = "split,audio_filename,midi_filename\ntrain,a.wav,a.mid\ntrain,b.wav,b.mid\ntrain,c.wav,c.mid\n"
    (folder / "index.csv").write_text(index)
    assert told(folder) == (["a.flac", "b.mid", "c.wav"], [
        "played from MIDI, for want of the sound that index.csv names: 1 (b.mid)",
        "read with another ending than index.csv names: 1 (a.flac)",
        "passed over, since index.csv does not list them: 3 (d.wav, ...)"])
    (folder / "index.csv").write_text(rows("a.wav", "a.mp3"))    # one file for both
    with pytest.raises(ValueError, match="lists a.flac twice"):
        find_recordings(folder)


def test_all_endings_of_sound(tmp_path):
    touch(tmp_path, *(f"{ending[1:]}{ending.upper()}" for ending in recordings.AUDIO_ENDINGS), "x.m4a", "y.m4a", "z")
    paths, remarks = told(tmp_path)
    assert len(paths) == len(recordings.AUDIO_ENDINGS) and set(AUDIO_FORMATS) <= set(recordings.AUDIO_ENDINGS)
    assert remarks == ["passed over, being no sound that is read: 1 z",
                       "passed over; convert such sound to FLAC or WAV: 2 .m4a"]
    with pytest.raises(ValueError, match=r"no sound file \(passed over; .* 1 \.wma\); give another folder"):
        find_recordings(touch(tmp_path / "none", "a.wma"))


def test_linked_folders_are_followed_once(tmp_path):
    music, disk = tmp_path / "music", touch(tmp_path / "disk", "2004/a.wav", "2006/b.wav")
    touch(music, "z.wav", "real/c.wav")
    touch(tmp_path, "d.wav")
    for link, target in [("2004", disk / "2004"), ("all", disk), ("again", disk), ("real/up", music), ("loop", music),
                         ("outside", tmp_path), ("0", music / "real"), ("gone", tmp_path / "gone")]:
        (music / link).symlink_to(target)
    (disk / "2006/back").symlink_to(disk)
    paths = told(music)[0]
    assert paths == [r.path for r in find_recordings(str(music) + "/")] and len(paths) == 4
    assert {"z.wav", "real/c.wav"} < set(paths) and sorted(Path(p).name for p in paths) == ["a.wav", "b.wav", "c.wav",
                                                                                            "z.wav"]
    (tmp_path / "linked").symlink_to(music)
    assert told(tmp_path / "linked")[0] == paths


class Unflagged(zipfile.ZipInfo):
    """An entry of a zip file that does not tell its name's encoding."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), 0


@pytest.mark.parametrize("encoding", ["utf-8", "cp437", "cp850", "cp932"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_zip_files_of_other_systems(encoding, separator, tmp_path):
    """Names without a note of their encoding, folders as Windows writes them."""
    name = "音楽" if encoding == "cp932" else "été"
    names = [f"data/{name}/a.wav", f"data/{name}/b.flac", "data/index.csv", "__MACOSX/data/._index.csv"]
    with zipfile.ZipFile(tmp_path / "music.zip", "w") as file:
        for path in names:
            info = Unflagged(path.replace("/", separator).encode(encoding).decode("cp437"))
            file.writestr(info, rows(f"{name}/a.wav", f"{name}/b.wav") if path.endswith(".csv") else path.encode())
    found, remarks = told(tmp_path / "music.zip")
    opened = recordings._open_source(str(tmp_path / "music.zip"))
    assert [opened.read(path).decode() for path in found] == names[:2]
    assert len(remarks) == 1 and "another ending" in remarks[0]


def test_a_dot_in_the_names_of_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "music.zip", "w") as file:
        for path in ("./a.wav", "./.hidden/b.wav", "./c/d.wav"):
            file.writestr(path, path)
    assert told(tmp_path / "music.zip")[0] == ["./a.wav", "./c/d.wav"]
    with zipfile.ZipFile(tmp_path / "music.zip", "a") as file:
        file.writestr("./index.csv", rows("a.wav", "./c/d.wav"))
    opened = recordings._open_source(str(tmp_path / "music.zip"))
    assert [opened.read(path) for path in told(tmp_path / "music.zip")[0]] == [b"./a.wav", b"./c/d.wav"]


def test_a_zip_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "_LARGE", 100_000)
    for name in ("index.csv", "a.wav"):
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, bytes(200_000))
        with pytest.raises(ValueError, match=rf"{name} .*would grow from 0\.0 to 0 MB; unpack it by another program"):
            for recording in find_recordings(tmp_path / "bomb.zip"):
                recordings.read_recording(recording, str(tmp_path / "bomb.zip"))


def test_a_zip_whose_index_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "music.zip", "w") as file:
        file.writestr("maestro-v9.csv", "split,audio_filename\ntrain,a.wav\n")
    data = (tmp_path / "music.zip").read_bytes()
    (tmp_path / "music.zip").write_bytes(data.replace(b"train,a", b"train,b"))
    with pytest.raises(ValueError, match=r"maestro-v9.csv in .*zip can't be read \(Bad CRC-32 .*\); mend"):
        find_recordings(tmp_path / "music.zip")


@pytest.mark.parametrize("name", ["../secret.wav", "2004/../../secret.wav", "..\\secret.wav"])
def test_a_row_that_leaves_the_data_set(name, tmp_path):
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "secret.wav", sound(0, 0.5))
    (tmp_path / "music/maestro-v9.csv").write_text(f"split,audio_filename\ntrain,{name}\n")
    with pytest.raises(ValueError, match="row 1 names .*secret.wav, outside of the data set; put it inside"):
        find_recordings(tmp_path / "music")


class Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


@pytest.mark.parametrize("errors, tries", [([], 1), ([ConnectionResetError("reset"), Answer(503), TimeoutError()], 4)])
def test_patience(errors, tries, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(recordings.time, "sleep", slept.append)
    answers = iter([*errors, "music"])

    def read() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert recordings.patiently(read) == "music"
    assert len(slept) == tries - 1 and slept == sorted(slept)


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr(recordings.time, "sleep", lambda seconds: None)

    def fail(error: Exception) -> None:
        tried.append(error)
        raise error

    for error, expected in ((Answer(500), ConnectionError), (TimeoutError(), ConnectionError), (Answer(403), Answer),
                            (FileNotFoundError(), FileNotFoundError), (ValueError(), ValueError)):
        tried: list[Exception] = []
        with pytest.raises(expected):
            recordings.patiently(lambda error=error: fail(error))
        assert len(tried) == (6 if expected is ConnectionError else 1)


def test_two_paths_of_one_id(tmp_path):
    touch(tmp_path, "a/b.wav", "a--b.wav", "a/c.wav")
    ids = {r.path: r.id for r in find_recordings(tmp_path)}
    assert ids == {"a/b.wav": "a%2Fb.wav", "a--b.wav": "a%2D%2Db.wav", "a/c.wav": "a--c.wav"}
