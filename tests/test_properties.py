"""What must hold for any input, not for examples that somebody chose: hypothesis makes them, and a model knows the
right answer. Few of them are tried always, and many with the long tests."""

import csv
import io
import itertools
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_recordings import CFG, sound

from pianodiff import recordings
from pianodiff.audio import load_audio, normalize_peak, save_audio, to_spectrogram
from pianodiff.data import BlockDataset, prepare
from pianodiff.files import Cache, load_tensors, save_tensors
from pianodiff.recordings import AUDIO_ENDINGS, SPLITS, find_recordings
from pianodiff.terminal import discreet
from pianodiff.train import load_checkpoint, save_checkpoint

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is missing: pip install -e '.[dev]'")
from hypothesis import Phase, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def holds(few: int, many: int, **drawn: st.SearchStrategy) -> Callable:
    """A property, tried on so many examples: always the same ones, however long they take."""

    def test_of(check: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            once = settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                            phases=[Phase.generate, Phase.shrink],
                            suppress_health_check=list(hypothesis.HealthCheck))
            once(given(**drawn)(check))()

        return test

    return test_of


def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="pianodiff")


# MIDI

def number(value: int) -> bytes:
    """A number of a track: seven bits a byte, the last without the eighth."""
    rest = bytes([value & 0x7F])
    while value := value >> 7:
        rest = bytes([value & 0x7F | 0x80]) + rest
    return rest


value = st.integers(0, 127)
channel = st.integers(0, 15)
some_bytes = st.binary(max_size=200)
EVENTS = st.one_of(
    st.tuples(st.just("voice"), st.sampled_from([0x80, 0x90, 0xA0, 0xB0, 0xE0]), channel, value, value),
    st.tuples(st.just("voice"), st.sampled_from([0xC0, 0xD0]), channel, value),
    st.tuples(st.just("tempo"), st.integers(1, 2**24 - 1)),
    st.tuples(st.just("meta"), st.integers(0, 127).filter(lambda kind: kind not in (0x2F, 0x51)), some_bytes),
    st.tuples(st.just("system"), st.sampled_from([0xF0, 0xF7]), some_bytes))
WAITS = st.one_of(st.integers(0, 300), st.integers(0, 2**28 - 1))
TRACKS = st.lists(st.tuples(st.lists(st.tuples(WAITS, EVENTS), max_size=12), WAITS, some_bytes), max_size=4)


def track_bytes(events: list, rest: int, beyond: bytes, running: bool) -> bytes:
    """A chunk of a track: with `running`, a status that is that of the event before is left out."""
    data, last = b"", 0
    for wait, (kind, *about) in events:
        data += number(wait)
        if kind == "voice":
            status = about[0] | about[1]
            data += bytes([status] * (not running or status != last) + about[2:])
            last = status
        else:
            last = 0    # these end a running status
            if kind == "tempo":
                data += b"\xff\x51\3" + about[0].to_bytes(3, "big")
            else:
                data += bytes([0xFF] * (kind == "meta") + [about[0]]) + number(len(about[1])) + about[1]
    data += number(rest) + b"\xff\x2f\0" + beyond
    return b"MTrk" + len(data).to_bytes(4, "big") + data


def seconds(tracks: list, division: int) -> Fraction:
    """How long the tracks last, as they are played: all at once, at the tempo that was set last."""
    ends, changes = [0], []
    for events, rest, _ in tracks:
        tick = 0
        for wait, (kind, *about) in events:
            tick += wait
            if kind == "tempo":
                changes.append((tick, about[0]))
        ends.append(tick + rest)
    now, tempo, total = 0, 500_000, 0
    for tick, next_tempo in sorted(changes, key=lambda change: change[0]):
        total, now, tempo = total + (tick - now) * tempo, tick, next_tempo
    return Fraction(total + (max(ends) - now) * tempo, 1_000_000 * division)


@holds(60, 2000, tracks=TRACKS, division=st.integers(1, 0x7FFF), kind=st.integers(0, 2), running=st.booleans(),
       other=some_bytes)
def test_a_midi_file_is_as_long_as_its_events(tracks, division, kind, running, other):
    head = b"MThd\0\0\0\6" + b"".join(n.to_bytes(2, "big") for n in (kind, len(tracks), division))
    unknown = b"XFIH" + len(other).to_bytes(4, "big") + other
    midi = head + unknown + b"".join(track_bytes(*track, running) for track in tracks)
    assert recordings._midi_seconds(midi) == pytest.approx(float(seconds(tracks, division)), rel=1e-12)


# Names and titles

def visible(name: str) -> bool:
    """Whether a name is no hidden file's, and none that desktops or stores have for theirs."""
    return not re.match(r"(?i)[.\s]*$|\.|__MACOSX|zarr\.json|thumbs\.db|desktop\.ini", name)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="/\0\\")
words = st.one_of(st.text(letters, min_size=1, max_size=55), st.text("ab-%é ", min_size=1, max_size=4)).filter(visible)
endings = st.sampled_from([ending for e in AUDIO_ENDINGS for ending in (e, e.upper())])
paths = st.builds(lambda folders, stem, ending: "".join(f"{name}_/" for name in folders) + stem + ending,
                  st.lists(words, max_size=4), words, endings)
titles = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(st.tuples(paths, st.sampled_from(SPLITS), titles, titles, st.floats(0, 1e5)), min_size=1, max_size=8,
                unique_by=lambda row: row[0])
COLUMNS = ["audio_filename", "split", "canonical_composer", "canonical_title", "duration"]


def index_of(rows: list[tuple], form: str) -> tuple[str, bytes]:
    """An index in one of its three forms: its name, and what it holds."""
    if form == "csv":
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *rows])
        return "maestro-v9.csv", text.getvalue().encode()
    if form == "rows":
        return "maestro-v9.json", json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows]).encode()
    columns = {name: {str(i): row[k] for i, row in enumerate(rows)} for k, name in enumerate(COLUMNS)}
    return "maestro-v9.json", json.dumps(columns, ensure_ascii=False).encode()


def laid(home: Path, files: dict[str, bytes], zipped: bool) -> Path:
    """The files in a folder or a zip file."""
    if zipped:
        with zipfile.ZipFile(home / "music.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return home / "music.zip"
    for name, data in files.items():
        place = home / "music" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return home / "music"


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid some names")


@on_linux
@holds(30, 1000, rows=ROWS, form=st.sampled_from(["csv", "rows", "columns"]), zipped=st.booleans())
def test_an_index_of_any_names_and_titles(rows, form, zipped):
    files = {row[0]: str(i).encode() for i, row in enumerate(rows)}
    name, index = index_of(rows, form)
    with folder() as home:
        source = laid(Path(home), files | {name: index}, zipped)
        found = find_recordings(source)
        opened = recordings._open_source(str(source))
        assert [opened.read(r.path) for r in found] == list(files.values())
    expected = [(path, split, ": ".join(filter(None, title)), pytest.approx(length))
                for path, split, *title, length in rows]
    assert [(r.path, r.split, r.title, r.duration) for r in found] == expected
    ids = [r.id for r in found]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"(?!\.)[\w.~%-]{1,200}", word, re.ASCII) for word in ids)


raw_words = st.binary(min_size=1, max_size=40).map(lambda name: name.translate(None, b"/\0\\")).filter(
    lambda name: name and visible(os.fsdecode(name)))


@on_linux
@holds(30, 1000, names=st.sets(st.tuples(st.lists(raw_words, max_size=2).map(tuple), raw_words), min_size=1,
                               max_size=8))
def test_a_folder_of_any_bytes_for_names(names):
    files = {os.fsdecode(b"".join(name + b"_/" for name in folders) + stem + b".wav") for folders, stem in names}
    with folder() as home:
        source = laid(Path(home), dict.fromkeys(files, b""), zipped=False)
        found = find_recordings(source)
    assert [r.path for r in found] == sorted(files) and len({r.id for r in found}) == len(files)
    splits = [r.split for r in found]
    assert all(splits.count(split) == max(len(files) // 10, len(files) >= 3) for split in SPLITS[1:])
    for r in found:
        assert re.fullmatch(r"(?!\.)[\w.~%-]{1,200}", r.id, re.ASCII) and r.title.encode()


# Sound

def writable() -> list[tuple[str, str]]:
    """The formats and subtypes that soundfile writes and reads, without being told more than the file does."""
    return [(kind, subtype) for kind in soundfile.available_formats() for subtype in soundfile.available_subtypes(kind)
            if kind not in ("RAW", "SD2")]


RATES = [8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]
SOUND = {"kind": st.sampled_from(writable()), "channels": st.integers(1, 8), "rate": st.sampled_from(RATES),
         "length": st.integers(0, 3000), "seed": st.integers(0, 99)}


def written(kind: tuple[str, str], channels: int, rate: int, length: int, seed: int) -> bytes:
    """A file of noise; an assumption fails where the format has no such sound."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (length, channels))
    file = io.BytesIO()
    try:
        soundfile.write(file, noise, rate, kind[1], format=kind[0])
    except (soundfile.LibsndfileError, ValueError):
        assume(False)
    return file.getvalue()


def wave_of(data: bytes) -> tuple[np.ndarray, int]:
    """What soundfile alone reads: the channels' mean, and the rate."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return samples.mean(1), rate


@holds(60, 3000, **SOUND)
def test_a_whole_sound_is_what_soundfile_reads(**about):
    data = written(**about)
    try:
        expected, rate = wave_of(data)
    except soundfile.LibsndfileError:
        return    # what it can write, it can't always read
    if len(expected):
        found = load_audio(io.BytesIO(data), rate).numpy()
        assert found.shape == expected.shape and np.allclose(found, expected, atol=1e-6)


# Formats that tell how long they are
TELLING = [kind for kind in writable() if kind[0] in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "SVX", "FLAC",
                                                      "OGG", "MP3")]


@holds(100, 3000, **SOUND | {"kind": st.sampled_from(TELLING), "length": st.integers(1, 3000)}, part=st.floats(0, 1))
def test_a_cut_sound_is_refused_unless_nothing_of_it_is_lost(part, **about):
    data = written(**about)
    try:
        expected = load_audio(io.BytesIO(data), about["rate"])
    except ValueError:
        assume(False)
    cut = data[: int(part * (len(data) - 3))]    # the last bytes may be padding
    try:
        found = load_audio(io.BytesIO(cut), about["rate"])
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(found, expected)


@holds(30, 800, kind=st.sampled_from(["VORBIS", "OPUS", "MPEG_LAYER_III"]), rate=st.sampled_from(RATES),
       parts=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3000)), min_size=2, max_size=4))
def test_sounds_that_follow_one_another_are_all_heard(kind, rate, parts):
    format = "MP3" if kind[0] == "M" else "OGG"
    files = [written((format, kind), channels, rate, length, n) for n, (channels, length) in enumerate(parts)]
    waves = [load_audio(io.BytesIO(file), rate) for file in files]
    assert torch.equal(load_audio(io.BytesIO(b"".join(files)), rate), torch.cat(waves))


# What is kept

def neighbours(cache: Cache, count: int) -> list[str]:
    """Keys of one drawer."""
    keys = (str(n) for n in itertools.count())
    return list(itertools.islice((key for key in keys if cache._path(key).parent.name == "07"), count))


STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "spoil", "cut"]), st.integers(0, 5), st.binary(max_size=60),
                           st.floats(0, 1, exclude_max=True)), max_size=25)


@holds(25, 1000, steps=STEPS, share=st.integers(0, 130))
def test_a_cache_keeps_its_bound_and_gives_what_was_put_last(steps, share):
    with folder() as home:
        cache, last = Cache(home, 0.1), {}
        keys, cache.share = neighbours(cache, 6), share
        for what, key, data, part in steps:
            path = cache._path(keys[key])
            if what == "put":
                cache.put(keys[key], data)
                if 4 + len(data) <= share:    # else what was there may stay
                    last[key] = data
                    assert cache.get(keys[key]) == data
            elif what == "get":
                assert cache.get(keys[key]) in (None, last.get(key))
            elif key in last and path.exists():
                old = path.read_bytes()
                at = int(part * len(old))
                path.write_bytes(old[:at] + (bytes([old[at] ^ 1]) + old[at + 1 :] if what == "spoil" else b""))
                assert cache.get(keys[key]) is None
                last.pop(key)
            there = [p.stat().st_size for p in Path(home).rglob("*") if p.is_file() and p.name != ".lock"]
            assert sum(there) <= share


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64]
TENSORS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 99)), max_size=4)


def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values > 0 if dtype == torch.bool else 100 * values).to(dtype)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        and torch.equal(one[name], other[name]) for name in one)


@holds(25, 800, about=TENSORS, changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
                                                 min_size=20, max_size=20))
def test_kept_tensors_come_back_whole_or_not_at_all(about, changes):
    tensors = {name: tensor(*how) for name, how in about.items()}
    with folder() as home:
        path = Path(home, "x.safetensors")
        save_tensors(path, tensors)
        assert same(load_tensors(path), tensors)
        whole = path.read_bytes()
        for part, change in changes:
            at = int(part * len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            found = load_tensors(path)
            assert found is None or same(found, tensors)


@holds(15, 500, about=TENSORS, changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
                                                min_size=20, max_size=20), step=st.integers(0, 10**6))
def test_a_checkpoint_comes_back_whole_or_is_refused(about, changes, step):
    tensors, facts = {name: tensor(*how) for name, how in about.items()}, {"step": step, "mean": 0.25}
    with folder() as home:
        path = Path(home, "checkpoint.safetensors")
        save_checkpoint(path, tensors, facts)
        whole = path.read_bytes()
        for part, change in [(0, 0), *changes]:
            at = int(part * len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            try:
                found, told = load_checkpoint(path)
            except ValueError as error:
                assert change and "truncated or no checkpoint" in str(error)
            else:
                assert same(found, tensors) and told == facts

# Stores

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@holds(8, 120, lengths=LENGTHS, width=st.integers(1, 40), hop=st.sampled_from([16, 32]),
       offset=st.integers(0, 40), in_memory=st.booleans())
def test_blocks_tile_and_know_what_is_before_them(lengths, width, hop, offset, in_memory):
    cfg = type(CFG)(n_fft=64, hop_length=hop, n_frames=width)
    assume(any(length >= cfg.block_samples for length in lengths))
    with folder() as home:
        (Path(home) / "music").mkdir()
        for n, length in enumerate(lengths):
            save_audio(Path(home) / f"music/{n}.wav", sound(n, 1.0)[:length])
        report = prepare(Path(home) / "music", Path(home) / "store", cfg, jobs=1)
        used = [n for n, length in enumerate(lengths) if length >= cfg.block_samples]
        assert report["recordings"] == len(used) and len(report["skipped"]) == len(lengths) - len(used)
        for split in {r.split for r in find_recordings(Path(home) / "music") if int(r.path[:-4]) in used}:
            check_blocks(Path(home), split, cfg, offset, in_memory)


def check_blocks(home: Path, split: str, cfg: type(CFG), offset: int, in_memory: bool) -> None:
    """The blocks of a split are those of the spectrograms, made anew."""
    blocks = BlockDataset(home / "store", split, random_offset=False, in_memory=in_memory)
    index = 0
    for about in blocks.info.of(split):
        wave = normalize_peak(load_audio(home / "music" / about["id"]))[0]
        whole = (to_spectrogram(wave, cfg) * 255).round() / 255
        assert whole.shape[1] == about["frames"]
        for start in range(0, about["frames"] - cfg.n_frames + 1, cfg.n_frames):
            begin = min(start + offset, about["frames"] - cfg.n_frames)
            block = blocks.block(index, offset)
            before = whole[None, :, begin - cfg.n_frames : begin] if begin >= cfg.n_frames else None
            assert torch.equal(block["spec"], whole[None, :, begin : begin + cfg.n_frames])
            assert block["has_prev"] == (before is not None)
            assert torch.equal(block["prev"], torch.zeros_like(block["spec"]) if before is None else before)
            index += 1
    assert index == len(blocks)

# Secrets

plain_text = st.text("abcXYZ0189-._~", min_size=1, max_size=10)
SECRET = "open-sesame"
user_text = st.text("abcXYZ019-._~!$&'()*+,;=:@%", max_size=8)
query_text = st.text("abcXYZ019-._~+/=%", max_size=8)
KEYS = ["sig", "token", "access_token", "X-Amz-Signature", "X-Amz-Security-Token", "X-Amz-Credential", "AWSAccessKeyId",
        "api_key", "password", "client-secret", "Key-Pair-Id"]


@holds(60, 3000, scheme=st.sampled_from(["https", "ftp", "s3", "sftp", "hf"]), host=plain_text,
       user=st.none() | st.tuples(user_text, user_text), path=st.lists(plain_text, max_size=3).map("/".join),
       query=st.lists(st.tuples(st.sampled_from(KEYS), query_text, query_text), max_size=3),
       around=st.sampled_from(["{}", "no {}; check it", "'{}'", "({})", '"{}", {}', "{} and {}"]))
def test_no_secret_of_an_address_is_told(scheme, host, user, path, query, around):
    login = f"{user[0]}{SECRET}{user[1]}@" if user else ""
    asked = "&".join(f"{key}={before}{SECRET}{after}" for key, before, after in query)
    told = discreet(around.format(*[f"{scheme}://{login}{host}/{path}?{asked}"] * 2))
    assert SECRET not in told and f"{scheme}://" in told and f"{host}/{path}" in told
