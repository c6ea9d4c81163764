"""Files, folders and tensors: whole or not at all, kept and checked; sound files that were cut off."""

import io
import itertools
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save

from pianodiff.files import (
    Cache,
    _make_room,
    _mpeg_frames,
    ahead,
    cached,
    check_complete,
    load_tensors,
    locked,
    save_tensors,
    whole_file,
    whole_folder,
    whole_sounds,
    write_whole,
)

# ---- files

def test_errors_name_the_file_and_not_its_part(tmp_path):
    def told(number, *name):
        with pytest.raises(OSError) as error, whole_file(tmp_path / "x"):
            raise OSError(number, "why", *name)
        return error.value

    full = told(28)
    assert full.errno == 28 and full.strerror == f"{tmp_path / 'x'} can't be written (why); choose another place"
    assert told(2, "prompt").filename == "prompt"  # it is about something else
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder can't be written") as error:
        write_whole(tmp_path / "folder", b"data")
    assert ".part" not in str(error.value)


def test_a_file_is_whole_whoever_else_writes_it(tmp_path):
    """Many writers at once: each time somebody's whole file is there, and no part of one is left."""
    contents = [bytes([i]) * 300_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda data: write_whole(tmp_path / "x", data), 10 * contents):
            assert (tmp_path / "x").read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_fails_changes_nothing(tmp_path, old):
    path = tmp_path / "x"
    if old:
        path.write_bytes(old)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    with whole_file(path):
        pass  # no part is written
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [old] * bool(old)


def test_parts_lie_beside_the_file_and_have_names_of_their_own(tmp_path):
    with whole_file(tmp_path / "x") as one, whole_file(tmp_path / "x") as two:
        assert one.parent == two.parent == tmp_path and one != two
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert (tmp_path / "x").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1  # the last to end


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / ("x" * 250), b"data")  # a name almost as long as may be
    finally:
        os.umask(before)
    if os.name == "posix":
        assert (tmp_path / ("x" * 250)).stat().st_mode & 0o777 == 0o666 & ~umask


# ---- folders

def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, data: bytes) -> None:
    """A folder with a file, and another in a folder within."""
    with whole_folder(folder) as part:
        (part / "a").write_bytes(data)
        (part / "in").mkdir()
        (part / "in" / "b").write_bytes(data)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "deep" / "er" / "x"
    for data in (b"old", b"new"):
        fill(folder, data)
        assert (folder / "a").read_bytes() == (folder / "in" / "b").read_bytes() == data
        assert names(folder.parent) == ["x"]
    with whole_folder(folder) as part:
        (part / "c").touch()
    assert names(folder) == ["c"]    # nothing of the old one is left in it


def test_what_a_folder_holds_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("synced"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    fill(tmp_path / "x", b"data")
    assert done == ["synced", "synced", "renamed"]


@pytest.mark.parametrize("failure", [OSError(28, "full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch, call, failure):
    """In the block, and at the first and at the second renaming; without an old folder there is but one."""
    fill(tmp_path / "old", b"old")
    replace = os.replace
    for name in ("old", "new") if call < 2 else ("old",):
        calls = []

        def stop(*places, calls=calls):
            calls.append(places)
            if len(calls) == call:
                raise failure
            replace(*places)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(type(failure)), whole_folder(tmp_path / name) as part:
            (part / "a").write_bytes(b"new")
            if call == 0:
                raise failure
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == ["a", "in"]
    assert (tmp_path / "old" / "a").read_bytes() == b"old"


def test_what_a_kill_left_of_a_folder(tmp_path):
    fill(tmp_path / "x", b"old")
    (tmp_path / ".x.part").mkdir()
    (tmp_path / ".x.part" / "half").touch()
    (tmp_path / "x").rename(tmp_path / ".x.old")    # killed between the two renamings
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "x"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a").read_bytes() == b"old"    # it comes back
    (tmp_path / ".x.old").mkdir()
    fill(tmp_path / "x", b"new")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["a", "in"]


# ---- tensors

def test_tensors_of_every_kind_are_kept(tmp_path):
    tensors = {"b": torch.randn(3, 4).mT, "a": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(2.5),
               "half": torch.randn(7, dtype=torch.bfloat16), "none": torch.zeros(0, 3), "flag": torch.tensor([True])}
    save_tensors(tmp_path / "new" / "x.safetensors", tensors)
    kept = load_tensors(tmp_path / "new" / "x.safetensors")
    assert kept.keys() == tensors.keys() and names(tmp_path / "new") == ["x.safetensors"]
    for name, tensor in tensors.items():
        assert kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor)


def test_a_result_is_made_once_and_again_when_its_file_is_damaged(tmp_path):
    path, made = tmp_path / "x.safetensors", []

    def make():
        made.append(path)
        return {"x": torch.arange(100.0)}

    whole = None
    for damage in (lambda data: data, lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:50],
                   lambda data: b"", lambda data: b"x" * 500):
        if whole:
            path.write_bytes(damage(whole))
        count = len(made)
        assert torch.equal(cached(path, make)["x"], torch.arange(100.0)) and len(made) == count + 1
        assert torch.equal(cached(path, make)["x"], torch.arange(100.0)) and len(made) == count + 1
        whole = path.read_bytes()
    assert names(tmp_path) == ["x.safetensors"]
    assert cached(None, make)["x"].shape == (100,) and len(made) == 6


def test_files_of_0_1_0_are_read(tmp_path):
    (tmp_path / "x").write_bytes(save({"x": torch.ones(3)}))
    assert torch.equal(load_tensors(tmp_path / "x")["x"], torch.ones(3))
    crc = zlib.crc32(torch.ones(3).numpy().tobytes())
    for kept, expected in ((crc, True), (crc + 1, False)):    # as 0.1.0 wrote it
        (tmp_path / "x").write_bytes(save({"x": torch.ones(3)}, {"checksum": str(kept)}))
        assert (load_tensors(tmp_path / "x") is not None) == expected
    assert load_tensors(tmp_path / "missing") is None and load_tensors(tmp_path) is None


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the cache .*file can't be written \(File exists\); make room, or give another"):
        save_tensors(tmp_path / "file" / "x", {"x": torch.ones(3)})


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder can't be written \(Is a directory\); choose another place"), \
            locked(tmp_path / "folder"):
        pass


# ---- a cache

def test_a_cache_gives_back_what_is_whole(tmp_path):
    cache = Cache(tmp_path / "new/cache", 0.1)
    assert cache.get("a") is None
    for data in (b"music", b"", bytes(10**6)):
        cache.put("a", data)
        assert cache.get("a") == data == Cache(tmp_path / "new/cache", 5).get("a")
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert cache.get("a") is None
    path.write_bytes(b"")    # as a lost current leaves it
    assert cache.get("a") is None
    cache.put("a", bytes(2 * 10**6))  # more than a drawer holds
    assert cache.get("a") is None
    for size in (0, 0.05, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="GB is no use; give 0.1 GB or more"):
            Cache(tmp_path, size)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the cache .*file can't be made .* give another folder"):
        Cache(tmp_path / "file", 1)


def test_the_oldest_make_room(tmp_path):
    for age, name in enumerate("dcba"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert _make_room(tmp_path, 5, most=45) and {path.name for path in tmp_path.iterdir()} == set("abcd")
    assert _make_room(tmp_path, 15, most=35) and {path.name for path in tmp_path.iterdir()} == set("cd")
    assert not _make_room(tmp_path, 36, most=35)


# ---- sound files, whole or refused

NOISE = np.random.default_rng(0).normal(0, 0.1, 6000)


def encoded(kind: str, samples: np.ndarray = NOISE, rate: int = 8000, **how: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **how)
    return file.getvalue()


def poked(data: bytes, at: int, size: int, order: str, value: int) -> bytes:
    return data[:at] + value.to_bytes(size, order) + data[at + size :]


CONTAINERS = {  # a file, where the size of its samples lies, and that size's bytes and order
    "WAV": (wav := encoded("WAV"), wav.find(b"data") + 4, 4, "little"),
    "RIFX": (rifx := encoded("WAV", endian="BIG"), rifx.find(b"data") + 4, 4, "big"),
    "RF64": (encoded("RF64"), 28, 8, "little"),
    "W64": (w64 := encoded("W64"), w64.find(b"data") + 16, 8, "little"),
    "AIFF": (aiff := encoded("AIFF"), aiff.find(b"SSND") + 4, 4, "big"),
    "SVX": (svx := encoded("SVX"), svx.find(b"BODY") + 4, 4, "big"),
    "AU": (encoded("AU"), 8, 4, "big"),
    "AU little": (encoded("AU", endian="LITTLE"), 8, 4, "little"),
    "CAF": (caf := encoded("CAF"), caf.find(b"data") + 4, 8, "big"),
    "ALAC": (alac := encoded("CAF", subtype="ALAC_16"), alac.find(b"data") + 4, 8, "big"),
    "GSM": (gsm := encoded("WAV", subtype="GSM610"), gsm.find(b"data") + 4, 4, "little"),
    "ADPCM": (ms := encoded("WAV", subtype="MS_ADPCM"), ms.find(b"data") + 4, 4, "little"),
    "DOUBLE": (f64 := encoded("WAV", subtype="DOUBLE"), f64.find(b"data") + 4, 4, "little"),
}

OGG = encoded("OGG")


def samples_end(kind: str) -> int:
    """All of a container, but for what follows the samples in two of them."""
    data, at, width, order = CONTAINERS[kind]
    size = int.from_bytes(data[at : at + width], order)
    return at + width + size if kind in ("ALAC", "GSM") else len(data)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_size_of_the_samples_counts(kind):
    data, at, width, order = CONTAINERS[kind]
    size = int.from_bytes(data[at : at + width], order)
    assert whole_sounds(data, "x") == [data]
    missing = 2 + len(data) - samples_end(kind)
    for more in (-size // 2, -2, missing - 1):    # a last byte may be missing
        check_complete(poked(data, at, width, order, size + more), "x")
    for more in (missing, missing + size, 0x7C << (8 * width - 8)):
        needed = samples_end(kind) + more
        with pytest.raises(ValueError, match=f"^x is truncated: {len(data):,} of at least {needed:,} bytes; "):
            whole_sounds(poked(data, at, width, order, size + more), "x")
    for value in (0x7E000100 << (8 * width - 32), 0x7FFFF000 << (8 * width - 32), 256**width - 1):
        check_complete(poked(data, at, width, order, value), "x")    # written to a pipe


@pytest.mark.parametrize("kind", ["WAV", "RIFX", "RF64", "W64", "AIFF", "SVX"])
@pytest.mark.parametrize("size", [0, 100, 2**24, 2**31 - 1, 2**32 - 1])
def test_the_size_of_the_whole_may_be_wrong(kind, size):
    data, _, width, order = CONTAINERS[kind]
    wrong = poked(data, 16 if kind == "W64" else 4, width if kind == "W64" else 4, order, size)
    assert whole_sounds(wrong, "x") == [wrong]


@pytest.mark.parametrize("kind", [*CONTAINERS, "OGG"])
def test_every_cut_is_seen(kind):
    whole, end = (OGG, len(OGG)) if kind == "OGG" else (CONTAINERS[kind][0], samples_end(kind))
    for size in [*range(8, 120), *range(120, end - 1, 61), end - 2]:
        with pytest.raises(ValueError, match=f"^x is truncated: {size:,} of at least"):
            check_complete(whole[:size], "x")


def test_chunks_without_end_are_left():
    """Sizes of less than a chunk's own header, and chunks of which none holds samples."""
    for data in (b"riff" + bytes(1000), b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 1000):
        with pytest.raises(ValueError, match="^x is truncated"):
            whole_sounds(data, "x")


@pytest.mark.parametrize("data", [b"", b"RI", b"words and more words", bytes(100), b"ID3\4\0\0\0\0\0\x10"])
def test_what_announces_no_size_passes(data):
    check_complete(data, "x")
    assert whole_sounds(data, "x") == [data]


def streamed(flac: bytes) -> bytes:
    """A FLAC file as an encoder writes it to a pipe: it doesn't know its length."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_S8"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_cut_flac_of_unknown_length_is_seen(subtype, channels):
    stream = np.random.default_rng(0).normal(0, 0.1, (10_000, channels))
    data = streamed(encoded("FLAC", stream, subtype=subtype))
    tag = b"ID3\4\0\0\0\0\0\x10" + bytes(16)
    for whole in (data, tag + data):
        assert whole_sounds(whole, "x") == [whole] == whole_sounds(whole + b"TAG" + bytes(125), "x")
    for size in (len(data) - 1, len(data) - 2, len(data) - 200, len(data) // 2, len(data) // 3, 100):
        with pytest.raises(ValueError, match=f"^x is truncated: {size:,} of at least"):
            whole_sounds(data[:size], "x")


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 8000), ("OPUS", 24_000), ("VORBIS", 44_100)])
def test_ogg_streams_that_follow_one_another(subtype, rate):
    one, two = (encoded("OGG", NOISE[:size], rate, subtype=subtype) for size in (6000, 5000))
    assert whole_sounds(one + two + one, "x") == [one, two, one] and whole_sounds(one, "x") == [one]
    for data in (one + two[:-10], one[:-300] + two, one + two[: len(two) // 2]):
        with pytest.raises(ValueError, match="^x is truncated"):
            whole_sounds(data, "x")


def mp3(seed: int = 0, rate: int = 44_100, channels: int = 1, mode: str = "CONSTANT") -> bytes:
    """A second of noise that grows, so that a variable rate does."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (rate, channels)) * np.linspace(0, 1, rate)[:, None] ** 4
    return encoded("MP3", noise, rate, bitrate_mode=mode, compression_level=0.5)


def frames(data: bytes) -> list[bytes]:
    """An MP3 file's frames: the first is its header."""
    return [data[begin:end] for _, begin, end in _mpeg_frames(data)]


ART = b"ID3\4\0\0\0\0\x20\0" + np.random.default_rng(1).bytes(4096)
ID3V1 = b"TAG" + bytes(125)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_an_mp3_file_is_its_frames(rate, channels, mode):
    data = mp3(0, rate, channels, mode)
    header, *sound = frames(data)
    assert header + b"".join(sound) == data and len(sound) >= rate / (1152 if rate >= 32_000 else 576)
    for whole in (data, ART + data, data + ID3V1, b"junk" * 50 + data, ART + data + bytes(3000)):
        assert whole_sounds(whole, "x") == [data]
    for lost in (1, 3, len(sound[-1]) // 2, len(sound[-1]) - 4):
        for cut in (data[:-lost], data[len(header) : -lost]):
            with pytest.raises(ValueError, match=f"^x is truncated: {len(cut):,} of at least {len(cut) + lost:,} b"):
                whole_sounds(cut, "x")
    with pytest.raises(ValueError, match=rf"^x is truncated: {len(sound) - 1} of at least {len(sound)} frames; copy"):
        whole_sounds(header + b"".join(sound[:-1]), "x")


def test_mp3_files_that_were_joined():
    one, two, other = mp3(0), mp3(1), mp3(2, 22_050)
    for data in (one + two + other, ART + one + ID3V1 + ART + two + bytes(2000) + other + ID3V1):
        assert whole_sounds(data, "x") == [one, two, other]
    without = b"".join(frames(other)[1:])
    (first, second), lengthened = whole_sounds(one + without, "x"), b"ID3\4"
    assert first == one and second.startswith(without + lengthened)
    for data in (one + two[:-100], one + b"".join(frames(two)[:-1])):
        with pytest.raises(ValueError, match="^x is truncated"):
            whole_sounds(data, "x")


@pytest.mark.parametrize("told", [0, 1, 10])
def test_a_wrong_mp3_header_is_dropped(told):
    header, *sound = frames(mp3())
    at = max(header.find(b"Info"), header.find(b"Xing")) + 8
    wrong, = whole_sounds(poked(header, at, 4, "big", told) + b"".join(sound), "x")
    assert wrong.startswith(b"".join(sound) + b"ID3")


@pytest.mark.parametrize(("version", "layer", "rate", "size"), [
    (3, 1, 0, 172), (3, 2, 0, 261), (3, 2, 1, 240), (2, 2, 1, 240), (2, 1, 2, 240), (0, 3, 2, 360),
])
def test_frames_of_other_layers_and_versions(version, layer, rate, size):
    """Sizes by hand, from ISO 11172-3 and 13818-3: index 5 is 160, 80, 80, 40, 80 and 40 kbit/s."""
    word = 0x7FF << 21 | version << 19 | (4 - layer) << 17 | 1 << 16 | 5 << 12 | rate << 10 | 3 << 6
    frame = word.to_bytes(4, "big").ljust(size, b"\0")
    file, = whole_sounds(10 * frame, "x")
    assert file.startswith(10 * frame + b"ID3")
    with pytest.raises(ValueError, match=f"^x is truncated: {10 * size - 5:,} of at least {10 * size:,} bytes"):
        whole_sounds((10 * frame)[:-5], "x")


def test_an_mp3_file_in_a_wav_file():
    data = mp3()
    for kept in (data, data + data, b"".join(frames(data)[1:])):
        about = b"\x55\0\1\0" + (44_100).to_bytes(4, "little") + bytes(22)
        wave = b"RIFF\0\0\0\0WAVEfmt \x1e\0\0\0" + about + b"data" + len(kept).to_bytes(4, "little") + kept
        assert whole_sounds(wave, "x") == whole_sounds(kept, "x")
        with pytest.raises(ValueError, match="^x is truncated"):
            whole_sounds(wave[:-500], "x")


def test_what_only_looks_like_mp3():
    with pytest.raises(ValueError, match="^x can't be read as MP3 .*; give a longer one"):
        whole_sounds(b"\xff\xfb\x00\x64" * 1000, "x")    # of a free bit rate
    noise = np.random.default_rng(0).bytes(2**20)
    assert whole_sounds(b"x" + noise, "x") == [b"x" + noise]


# ---- work ahead

def test_ahead_keeps_the_order_and_fails_in_place():
    taken: list[int] = []

    def items():
        for n in itertools.count():
            taken.append(n)
            yield n

    def work(n: int) -> int:
        if n == 3:
            raise ValueError("item 3")
        time.sleep(0.02 * max(0, 3 - n))    # the first take longest
        return n

    results = ahead(work, items(), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2] and taken == list(range(3 + 4))
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    assert list(results) == [] and len(taken) == 8


def test_who_stops_early_waits_for_nothing():
    begun, ended, gate, before = [], [], threading.Event(), set(threading.enumerate())

    def work(n: int) -> None:
        begun.append(n)
        ended.append(n == 0 or gate.wait(600))

    results = ahead(work, range(100), workers=1)
    next(results)
    results.close()
    assert ended == [True]    # had it waited, for the gate that nobody opened, there would be a False
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(600)
    assert begun in ([0], [0, 1])
