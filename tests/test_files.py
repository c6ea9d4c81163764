"""Files, folders and tensors: whole or not at all, kept and checked; sound files that were cut off."""

import io
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save

from pianodiff.files import (
    ahead,
    cached,
    check_complete,
    load_tensors,
    save_tensors,
    whole_file,
    whole_folder,
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


def test_a_file_without_a_checksum_is_read(tmp_path):
    (tmp_path / "x").write_bytes(save({"x": torch.ones(3)}))
    assert torch.equal(load_tensors(tmp_path / "x")["x"], torch.ones(3))
    assert load_tensors(tmp_path / "missing") is None and load_tensors(tmp_path) is None


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the cache .*file can't be written .*; give another folder"):
        save_tensors(tmp_path / "file" / "x", {"x": torch.ones(3)})


# ---- sound files that were cut off

@pytest.mark.parametrize("kind", ["WAV", "AIFF", "OGG"])
def test_every_cut_is_seen(kind):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 2000), 8000, format=kind)
    whole = file.getvalue()
    check_complete(whole, "x")
    for size in [*range(8, 120), *range(120, len(whole) - 1, 61), len(whole) - 2]:
        with pytest.raises(ValueError, match=f"^x is truncated: {size:,} of at least"):
            check_complete(whole[:size], "x")


@pytest.mark.parametrize("data", [b"", b"RI", b"RIFF", b"fLaC" + bytes(50), b"words and more words"])
def test_what_announces_no_size_passes(data):
    check_complete(data, "x")


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
