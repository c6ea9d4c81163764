"""What a kill at any moment leaves behind: a store and a run that go on as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from chapters import PROCESSES
from test_recordings import CFG, sound
from test_train import CONFIG, assert_same_end, chords

from pianodiff.audio import save_audio
from pianodiff.data import open_store, prepare
from pianodiff.train import train

KILLS = 30
pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform == "win32", reason="POSIX's signals")]


def in_a_process(work: Callable[..., object], *args: object) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=quietly, args=(work, *args))
    process.start()
    return process


def quietly(work: Callable[..., object], *args: object) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work(*args)


def killed_and_resumed(work: Callable[..., object], home: Path) -> Iterator[Path]:
    """Folders of `home` in which the work was killed at random moments and went on to its end, once each.

    A kill that comes too late shows nothing: it is tried again, in less time.
    """
    moments, longest = random.Random(0), took(work, home / "whole")
    numbers = iter(range(10 * KILLS))
    for _ in range(KILLS):
        killed = False
        while not killed:
            begun = home / str(next(numbers))
            process = in_a_process(work, begun)
            while not begun.exists() and process.is_alive():
                time.sleep(0.001)
            process.join(moments.uniform(0, longest))
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            longest *= 1.1 if killed else 0.8
        again = in_a_process(work, begun)
        again.join()
        assert again.exitcode == 0
        yield begun


def took(work: Callable[..., object], begun: Path) -> float:
    """The seconds from the first trace of the work to its end."""
    process = in_a_process(work, begun)
    while not begun.exists() and process.is_alive():
        time.sleep(0.001)
    begin = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def trained(run: Path) -> None:
    train(run.parent / "store", run, CONFIG)


def prepared(store: Path) -> None:
    prepare(store.parent / "music", store, CFG, jobs=1)


def test_a_training_killed_at_any_moment_ends_with_the_same_weights(tmp_path):
    """The last bit of a weight may hang on what a process has loaded: all of these load the same."""
    prepare(chords(tmp_path / "wav", 4), tmp_path / "store", CFG, jobs=1)
    for run in killed_and_resumed(trained, tmp_path):
        assert_same_end(run, tmp_path / "whole")
        assert not list(run.glob("*.tmp"))


def test_a_preparation_killed_at_any_moment_ends_with_the_same_store(tmp_path):
    (tmp_path / "music").mkdir()
    for seed in range(40):
        save_audio(tmp_path / f"music/{seed:02}.wav", sound(seed, 0.5 + 0.1 * (seed % 7)))
    for path in killed_and_resumed(prepared, tmp_path):
        (store, found), (facts, whole) = ((open_store(p), contents(p)) for p in (path, tmp_path / "whole"))
        assert (store.mean, store.std, store.recordings) == (facts.mean, facts.std, facts.recordings)
        assert found.keys() == whole.keys() and len(whole) == 40
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def contents(store: Path) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(store, mode="r").arrays()}
