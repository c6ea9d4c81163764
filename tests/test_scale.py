"""Many processes: the losses, the validation and the music of one. `accelerate launch` starts them, as on GPUs."""

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, prose
from test_pieces import made_by_nano
from test_train import CONFIG, NETWORK, SPECTROGRAM, chords, launch, rows

from pianodiff.data import prepare
from pianodiff.train import load_checkpoint, train

pytestmark = pytest.mark.long

FIFTY = replace(CONFIG, images=400, batch_size=8, log_images=8, eval_images=80, eval_blocks=5,
                checkpoint_images=400, snapshot_images=200, recolour=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare(chords(folder / "wav", 4), folder / "store", SPECTROGRAM, jobs=1)
    return folder / "store"


def half(store: Path, run: Path) -> None:
    """The first 25 steps of FIFTY."""
    def stop(model: Path, images: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(store, run, FIFTY, on_snapshot=stop)


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory) -> Path:
    """A folder of runs of fifty steps, by their names: in one process, in two, and in both."""
    folder = tmp_path_factory.mktemp("runs")
    train(store, folder / "one", FIFTY)
    half(store, folder / "one, then two")
    script = folder / "two.py"
    script.write_text(f"""
import os, signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from pianodiff.train import TrainConfig, train
from pianodiff.unet import UNetConfig

def stop(model, images):
    os.kill(os.getpid(), signal.SIGTERM)

config, runs = {FIFTY!r}, Path({str(folder)!r})
train({str(store)!r}, runs / "two", config)
train({str(store)!r}, runs / "two, in parts", replace(config, accumulate=2))
train({str(store)!r}, runs / "one, then two", config)
with suppress(SystemExit):
    train({str(store)!r}, runs / "two, then one", config, on_snapshot=stop)
""")
    done = launch(2, script)
    assert done.returncode == 0, done.stderr
    stopped = load_checkpoint(folder / "two, then one/checkpoint.safetensors")[1]["step"]
    assert 25 <= stopped < 50
    train(store, folder / "two, then one", FIFTY)
    return folder


def assert_same_losses(run: Path, other: Path) -> None:
    """To 1e-5, and what is one in the last of the log's six digits."""
    mine, theirs = rows(run), rows(other)
    assert len(mine) == len(theirs)
    for row, same in zip(mine, theirs, strict=True):
        for name in ("images", "loss", *(key for key in row if key.startswith("val_"))):
            assert bool(row[name]) == bool(same[name])
            assert float(row[name] or 0) == pytest.approx(float(same[name] or 0), rel=1e-5, abs=1e-5), (name, row)


@pytest.mark.parametrize("name", ["two", "two, in parts", "one, then two", "two, then one"])
def test_processes_share_a_batch_and_have_the_losses_of_one(runs, name):
    assert len(rows(runs / name)) == 50
    assert_same_losses(runs / name, runs / "one")


def test_eight_processes_start_by_the_command_that_is_told(store, tmp_path):
    """A small network and few blocks, not compiled; all else is as the chapter has it."""
    [told] = re.findall(r"^(accelerate launch .*--num_processes 8 (?:.*\\\n)*.*)$", prose(ROOT / "nbs/10_train.ipynb"),
                        re.M)
    words = shlex.split(told.replace("\\\n", " "))
    place = words.index("-m")
    assert words[place : place + 3] == ["-m", "pianodiff.cli", "train"]
    script = tmp_path / "small.py"
    script.write_text(f"""
import sys
from accelerate import PartialState
from pianodiff.cli import main
from pianodiff.model import PRESETS
from pianodiff.unet import UNetConfig
PRESETS["base"] = {NETWORK!r}
main(["train", *sys.argv[1:]])
sys.stdout.write(f"one of {{PartialState().num_processes}}\\n")    # in one go
""")
    flags = [word for word in words[place + 5 :] if word != "--compile"]
    flags += shlex.split("--images 48 --batch-size 16 --warmup-images 8 --log-images 16 --eval-images 48 "
                         "--eval-blocks 9 --mixed-precision no --workers 1")
    done = launch(8, script, store, tmp_path / "eight", *flags, options=words[2:place])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one of 8") == 8
    alone = [sys.executable, script, store, tmp_path / "alone", *flags]
    subprocess.run([str(word) for word in alone], check=True, timeout=3600)
    assert len(rows(tmp_path / "alone")) == 3
    assert_same_losses(tmp_path / "eight", tmp_path / "alone")


@pytest.mark.skipif(sys.platform == "win32", reason="batches aren't claimed there")
def test_what_a_killed_process_had_begun_is_made_by_another(tmp_path):
    """Kill -9 while it has a claim, and another process waits for it."""
    settings = {"pieces": 12, "seconds": 2.1}
    script = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pianodiff.generate import Piano
from test_pieces import made_by_nano

spectrograms = Piano.spectrograms

def noted(self, seconds, seeds, **kwargs):
    print(*seeds, flush=True)
    if sys.argv[1] == "stuck":
        time.sleep(3600)
    return spectrograms(self, seconds, seeds, **kwargs)

Piano.spectrograms = noted
os.cpu_count = lambda: 1    # one batch at a time
made_by_nano(Path({str(tmp_path / "made")!r}), **{settings!r})
"""
    def started(kind: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, kind], stdout=subprocess.PIPE, text=True)

    stuck = started("stuck")
    assert stuck.stdout.readline() == "3 4 5 6 7\n"
    other = started("other")
    assert [other.stdout.readline() for _ in range(2)] == ["8 9 10 11 12\n", "13 14\n"]
    os.kill(stuck.pid, signal.SIGKILL)
    assert other.communicate(timeout=3600)[0] == "3 4 5 6 7\n"
    assert (stuck.wait(), stuck.stdout.read(), other.returncode) == (-signal.SIGKILL, "", 0)
    whole = made_by_nano(tmp_path / "alone", **settings)
    for piece, same in zip(made_by_nano(tmp_path / "made", **settings), whole, strict=True):
        assert torch.equal(piece.wave, same.wave) and torch.equal(piece.spec, same.spec)
    assert not list(tmp_path.rglob("*.claim"))
