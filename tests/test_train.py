"""What a training run survives: kill -9, a full disk, signals, other settings, damaged files, loss of sense."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pianodiff.audio import SpectrogramConfig, save_audio
from pianodiff.data import BlockDataset, prepare
from pianodiff.files import seed_of
from pianodiff.model import load_model, noise_levels
from pianodiff.recipe import (
    DENOISING,
    EVAL_SIGMAS,
    WAYS,
    Objective,
    TrainConfig,
    Way,
    draw_batch,
    draw_noise,
    learning_rate,
)
from pianodiff.train import _parts, _Progress, _tell_of_start, load_checkpoint, save_checkpoint, train
from pianodiff.unet import UNetConfig

SPECTROGRAM = SpectrogramConfig(n_fft=64, hop_length=32, n_frames=32)
NETWORK = UNetConfig(n_bins=32, n_frames=32, patch=4, channels=(8, 16), blocks=(1, 1), attention=("", "ft"),
                     emb_channels=16, cond_channels=(8, 8))
CONFIG = TrainConfig(unet=NETWORK, images=96, batch_size=4, lr=3e-3, warmup_images=8, eval_blocks=4, eval_images=32,
                     log_images=16, checkpoint_images=16, snapshot_images=48, workers=1,
                     mixed_precision="no")

IDENTITY = {"preset", "batch_size", "lr", "betas", "weight_decay", "warmup_images", "decay_fraction", "ema_std",
            "P_mean", "P_std", "cond_dropout", "cond_noise", "recolour", "label_dropout", "grad_clip", "seed",
            "eval_blocks", "source",
            "training blocks", "init", "objective"}


def chords(folder: Path, files: int) -> Path:
    """Decaying chords of a second and a half."""
    folder.mkdir()
    time = torch.arange(12_000) / 8000
    for seed in range(files):
        pitches = 110 * 2 ** (torch.randint(48, (4, 1), generator=torch.Generator().manual_seed(seed)) / 12)
        tones = (2 * torch.pi * pitches * time).sin() * torch.exp(-6 * (time % 0.25))
        save_audio(folder / f"{seed}.wav", tones.mean(0))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare(chords(folder / "wav", 4), folder / "store", SPECTROGRAM, jobs=1)
    return folder / "store"


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    train(store, run, CONFIG)
    return run


def train_afresh(store: Path, run: Path, patch: str = "") -> subprocess.CompletedProcess:
    """Train in a process of its own: what other tests have loaded into this one may change a sum's last bit."""
    script = f"""
from pianodiff.train import TrainConfig, train
from pianodiff.unet import UNetConfig
{patch}
train({str(store)!r}, {str(run)!r}, {CONFIG!r})
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=3600)


@pytest.fixture(scope="module")
def whole_afresh(store, tmp_path_factory) -> Path:
    """The same, from a process of its own."""
    run = tmp_path_factory.mktemp("whole-afresh")
    assert train_afresh(store, run).returncode == 0
    return run


def assert_same_end(run: Path, other: Path) -> None:
    (tensors, about), (others, _) = (load_checkpoint(r / "checkpoint.safetensors") for r in (run, other))
    assert about["step"] == CONFIG.steps and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert (run / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    mine, theirs = rows(run), rows(other)
    timeless = [name for name in mine[0] if name not in ("seconds", "images_per_second")]
    assert [[row[name] for name in timeless] for row in mine] == [[row[name] for name in timeless] for row in theirs]


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_log_its_model_and_how_it_came_about(store, whole):
    images = [int(row["images"]) for row in rows(whole)]
    assert images == list(range(16, 97, 16))
    assert [row["images"] for row in rows(whole) if row["val_0.01"]] == ["32", "64", "96"]
    net, config = load_model(whole / "model")
    info = BlockDataset(store, "train", random_offset=False).info
    assert (config["mean"], config["std"], config["sigma_data"]) == (info.mean, info.std, 0.5)
    facts = config["training"]
    assert facts["images"] == 96 and facts["data"] == "wav" and facts["hours"].keys() == {"train", "validation", "test"}
    assert facts["validation"]["loss"].keys() == {f"{sigma:g}" for sigma in EVAL_SIGMAS}
    tensors = load_checkpoint(whole / "checkpoint.safetensors")[0]
    assert all(torch.equal(t, tensors[f"ema.{name}"].half().float()) for name, t in net.state_dict().items())
    assert list((whole / "tensorboard").glob("events*"))


def test_the_loss_falls(store, tmp_path):
    train(store, tmp_path, replace(CONFIG, images=480, eval_images=240, checkpoint_images=480, snapshot_images=480))
    last = rows(tmp_path)[-1]
    # a network that knows nothing has loss 1: it guesses the mean of unit-variance targets
    assert all(float(last[f"val_{sigma}"]) < 0.8 for sigma in (1, 3, 10)), last


@pytest.mark.long
@pytest.mark.parametrize("moment", ["torn", "written", "renamed"])
def test_a_run_killed_while_it_writes_a_checkpoint_ends_with_the_same_weights(store, whole_afresh, tmp_path, moment):
    """kill -9 with the second checkpoint half-written, written but not renamed, just renamed."""
    patch = f"""
import os, signal
sync, rename, seen = os.fsync, os.replace, []

def fsync(fd):
    if os.readlink(f"/proc/self/fd/{{fd}}").endswith("checkpoint.safetensors.tmp"):
        seen.append(fd)
        if len(seen) == 2 and {moment!r} == "torn":
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    sync(fd)

def replace(source, target):
    fatal = len(seen) == 2 and str(target).endswith("checkpoint.safetensors")
    if fatal and {moment!r} == "written":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if fatal:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync, os.replace = fsync, replace
"""
    done = train_afresh(store, tmp_path, patch)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == (8 if moment == "renamed" else 4)
    assert train_afresh(store, tmp_path).returncode == 0
    assert_same_end(tmp_path, whole_afresh)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_last_checkpoint(store, whole, tmp_path):
    def fill_disk(model, images):
        (tmp_path / "checkpoint.safetensors.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match="full; the last complete checkpoint is kept") as error:
        train(store, tmp_path, CONFIG, on_snapshot=fill_disk)
    assert error.value.errno == errno.ENOSPC
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 12
    assert not list(tmp_path.glob("*.tmp"))
    train(store, tmp_path, CONFIG)
    assert_same_end(tmp_path, whole)


def test_a_run_says_after_a_minute_what_is_left(tmp_path, capfd):
    """One line; the first step, which may compile the network, tells nothing of the rate."""
    with closing(_Progress(tmp_path, replace(CONFIG, images=86_440), 20, 300.0, main=True)) as progress:
        for step in range(20):
            progress.step(24 + 40 * step, 400.0 + 10 * step, loss=0.5, norm=1.0)
    told = [line for line in capfd.readouterr().err.splitlines() if "blocks a second" in line]
    assert told == ["4 blocks a second: the rest of 86,440 blocks takes 6.0 hours; --images N asks for fewer"]


@pytest.mark.parametrize("settings, pause, steps", [
    ({"checkpoint_seconds": 1e-9}, 0.0, list(range(1, 25))),    # each time
    ({"checkpoint_images": 96}, 70.0, [5, 10, 12, 17, 22, 24]),  # 300 seconds are five steps; 12 and 24 are snapshots
    ({"checkpoint_images": 96}, 0.0, [12, 24]),
])
def test_a_checkpoint_is_due_by_the_clock_too(store, whole, tmp_path, monkeypatch, settings, pause, steps):
    seconds, written = count(), []
    clock = SimpleNamespace(perf_counter=time.perf_counter,
                            monotonic=lambda: pause * next(seconds) if pause else time.monotonic())
    monkeypatch.setattr("pianodiff.train.time", clock)

    def save(path, tensors, about):
        written.append(about["step"])
        save_checkpoint(path, tensors, about)

    monkeypatch.setattr("pianodiff.train.save_checkpoint", save)
    train(store, tmp_path, replace(CONFIG, **settings))
    assert written == steps
    mine, theirs = (load_checkpoint(run / "checkpoint.safetensors")[0] for run in (tmp_path, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(store, whole, tmp_path, capfd, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(store, tmp_path, CONFIG, on_snapshot=lambda model, images: os.kill(os.getpid(), number))
    assert stop.value.code == 128 + number
    assert "stopped after 52 blocks; the same command goes on" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    train(store, tmp_path, CONFIG)
    assert f"goes on from {tmp_path / 'checkpoint.safetensors'}, after 52 of 96 blocks\n" in capfd.readouterr().err
    timeless = [row for row in rows(tmp_path) if row["images"] != "52"]  # the stop has a row of its own
    assert [row["images"] for row in timeless] == [row["images"] for row in rows(whole)]
    mine, theirs = (load_checkpoint(run / "checkpoint.safetensors")[0] for run in (tmp_path, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("at", [46, 94])
def test_a_stop_loses_no_snapshot(store, tmp_path, monkeypatch, at):
    """It comes in the step whose snapshot is due: the resumed run begins after it."""
    def rate(config, images):
        if images == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return config.lr

    monkeypatch.setattr("pianodiff.train.learning_rate", rate)
    drawn = []
    with pytest.raises(SystemExit):
        train(store, tmp_path, CONFIG, on_snapshot=lambda model, images: drawn.append(images))
    train(store, tmp_path, CONFIG, on_snapshot=lambda model, images: drawn.append(images))
    assert drawn == [48, 96]


def test_a_run_goes_on_only_as_it_was_begun(store, whole):
    with pytest.raises(ValueError, match="lr was 0.003, is 0.001; use its settings, or another run folder"):
        train(store, whole, replace(CONFIG, lr=1e-3))
    with pytest.raises(ValueError, match=r"unet.channels was \[8, 16\], is \[8, 8\]"):
        train(store, whole, replace(CONFIG, unet=replace(NETWORK, channels=(8, 8))))
    with pytest.raises(ValueError, match="init was None, is "):
        train(store, whole, CONFIG, init=whole / "model")


def test_a_run_of_before_goes_on_without_labels(store, whole, tmp_path):
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    for name in ("recolour", "label_dropout", "unet.labels"):
        del about["identity"][name]
    save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, about)
    train(store, tmp_path, replace(CONFIG, images=100))
    with pytest.raises(ValueError, match=r"recolour was 0.0, is 0.5, unet.labels was 0, is 16; use its settings"):
        train(store, tmp_path, replace(CONFIG, recolour=0.5))


def test_a_run_with_labels_is_resumed_bit_for_bit(store, tmp_path):
    def stop(model, images):
        raise InterruptedError

    config = replace(CONFIG, recolour=0.5)
    train(store, tmp_path / "whole", config)
    with pytest.raises(InterruptedError):
        train(store, tmp_path / "again", config, on_snapshot=stop)
    train(store, tmp_path / "again", replace(config, workers=2))
    assert_same_end(tmp_path / "again", tmp_path / "whole")
    net, about = load_model(tmp_path / "whole/model")
    assert about["unet"]["labels"] == 16 and net.labels.weight.any() and about["name"] == "custom"


def test_a_finished_run_returns_and_can_be_prolonged(store, whole, tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes((whole / "checkpoint.safetensors").read_bytes())
    train(store, tmp_path, CONFIG)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".json")}
    train(store, tmp_path, replace(CONFIG, images=8))
    assert "has seen 96 blocks, and no more are asked for: nothing is left to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    longer = replace(CONFIG, images=112)
    assert learning_rate(longer, 96) > learning_rate(CONFIG, 95)
    train(store, tmp_path, longer)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 28


def test_a_damaged_checkpoint_is_named(store, whole, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    complete = (whole / "checkpoint.safetensors").read_bytes()
    model = (whole / "model/model.safetensors").read_bytes()
    for content in (complete[: len(complete) // 2], b"", b"not a checkpoint", model):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.safetensors is truncated or no checkpoint .*move it away"):
            train(store, tmp_path, CONFIG)
        assert path.read_bytes() == content


@pytest.mark.parametrize("missing", ["net.out.weight", "ema.out.weight", "exp_avg.out.weight", "step", "exp_avg_sq",
                                     "identity", "seconds", "ancestor"])
def test_a_checkpoint_that_lacks_a_part_is_named(store, whole, tmp_path, missing):
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    save_checkpoint(tmp_path / "checkpoint.safetensors",
                    {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)},
                    {key: value for key, value in about.items() if key != missing})
    with pytest.raises(ValueError, match="checkpoint.safetensors is truncated or no checkpoint .*move it away"):
        train(store, tmp_path, CONFIG)


def test_a_checkpoint_is_that_of_0_1_0(whole):
    """Its names are a format: what 0.1.0 wrote, all but "computing", is resumed, bit for bit."""
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    assert list(about) == ["step", "seconds", "validation", "mean", "std", "ancestor", "computing", "identity"]
    assert about["identity"].keys() == IDENTITY | {f"unet.{field.name}" for field in fields(UNetConfig)}
    weights = {name.removeprefix("net.") for name in tensors if name.startswith("net.")}
    state = {f"{key}.{name}" for key in ("ema", "exp_avg", "exp_avg_sq", "step") for name in weights}
    assert weights == set(load_model(whole / "model")[0].state_dict())
    assert tensors.keys() == state | {f"net.{name}" for name in weights}


@pytest.mark.parametrize("content", [b"", b"time,loss\n1,2\n", b"\xff\xfe\x00", None])
def test_a_spoilt_log_does_not_end_a_run(store, whole, tmp_path, capsys, content):
    shutil.copy(whole / "checkpoint.safetensors", tmp_path)
    spoilt = (whole / "log.csv").read_bytes().replace(b"\n32,", b"\nsome,") if content is None else content
    (tmp_path / "log.csv").write_bytes(spoilt)
    train(store, tmp_path, replace(CONFIG, images=112))
    assert re.search(r"log.csv is no log of pianodiff \(.*\); it is log.csv.bad now", capsys.readouterr().err)
    assert (tmp_path / "log.csv.bad").read_bytes() == spoilt
    assert [row["images"] for row in rows(tmp_path)] == ["112"]


def test_a_log_with_fewer_noise_levels_goes_on(store, whole, tmp_path, capsys):
    """Releases up to 0.2 did not validate at the highest one."""
    shutil.copy(whole / "checkpoint.safetensors", tmp_path)
    with open(tmp_path / "log.csv", "w", newline="") as file:
        columns = ("images", "seconds", "loss", "lr", "grad_norm", "images_per_second",
                   *(f"val_{sigma:g}" for sigma in EVAL_SIGMAS))
        writer = csv.DictWriter(file, columns[:-1], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(whole))
    train(store, tmp_path, replace(CONFIG, images=112))
    assert "is no log" not in capsys.readouterr().err
    last = columns[-1]
    assert rows(tmp_path)[:-1] == [row | {last: ""} for row in rows(whole)]
    assert float(rows(tmp_path)[-1][last]) > 0


@pytest.mark.parametrize("name", ["model", "model/README.md", "samples"])
def test_what_stands_in_the_way_of_a_run_is_told_before_its_first_step(store, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name.split('/')[0]} is .*(give another folder|move it away)"):
        train(store, tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]]
    assert (tmp_path / name).read_text() == "mine"


def test_no_run_lies_in_its_store(store):
    before = sorted(store.rglob("*"))
    for run in (store, store / "run", store / "deep/er"):
        with pytest.raises(ValueError, match="is the store .* or lies in it; train in another folder"):
            train(store, run, CONFIG)
    assert sorted(store.rglob("*")) == before


def test_a_folder_of_other_things_is_no_run(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("Chapter 1")
    with pytest.raises(ValueError, match="holds other files than a run's; give a new folder"):
        train(store, tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / ".thesis.tex")
    train(store, tmp_path, replace(CONFIG, images=4))  # hidden files are nobody's thesis


@pytest.mark.parametrize("images, warmup, told", [(96, 68, 1), (96, 67, 0), (4, 8, 1)])
def test_a_run_that_never_leaves_its_warm_up_says_so(capfd, images, warmup, told):
    """The rate falls over the last 30 %: where the warm-up reaches into that, the full rate is never reached."""
    config = replace(CONFIG, images=images, warmup_images=warmup)
    assert (max(learning_rate(config, x / 10) for x in range(10 * images)) < config.lr) == told
    _tell_of_start(SimpleNamespace(config=config, images=0))
    words = (f"{images} blocks are too few for a warm-up of {warmup}: the learning rate stays below 0.003; "
             "ask for more, or for a shorter warm-up (--warmup-images)\n")
    assert capfd.readouterr().err == words * told


def test_a_file_system_without_locks_or_synced_folders(store, whole, tmp_path, monkeypatch, capsys):
    """As Lustre, and as some that live in a network or in user space."""
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def fsync(number, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(number)

    monkeypatch.setattr("pianodiff.files.fcntl.flock", flock)
    monkeypatch.setattr("os.fsync", fsync)
    train(store, tmp_path, CONFIG)
    assert_same_end(tmp_path, whole)
    told = f"{tmp_path} is in a file system without locks: let no other process train in it\n"
    assert capsys.readouterr().err.count(told) == 1


def test_one_process_trains_in_a_folder(store, whole, tmp_path):
    def another(model, images):
        with pytest.raises(ValueError, match="another process trains in .*; wait for it or use another folder"):
            train(store, tmp_path, CONFIG)

    train(store, tmp_path, CONFIG, on_snapshot=another)
    assert_same_end(tmp_path, whole)


def test_fine_tuning_starts_from_a_model_and_keeps_its_scale(store, whole, tmp_path, capsys):
    other = tmp_path / "store"
    prepare(chords(tmp_path / "wav", 1), other, SPECTROGRAM, jobs=1)
    still = replace(CONFIG, images=4, lr=1e-9, snapshot_images=4)
    model = train(other, tmp_path / "run", still, init=whole / "model")
    assert re.search("store has no validation split; .* will do instead$", capsys.readouterr().err, re.M)
    (net, config), (old, old_config) = load_model(model), load_model(whole / "model")
    assert (config["mean"], config["std"]) == (old_config["mean"], old_config["std"])
    assert config["mean"] != BlockDataset(other, "train", random_offset=False).info.mean
    assert config["training"]["ancestor"]["images"] == 96 and config["training"]["validation"]["split"] == "train"
    paper = {"sigma_min": 0.002, "sigma_max": 80, "rho": 7}
    assert noise_levels(config) == noise_levels(old_config) == paper  # the ancestor's go on
    about = whole / "model" / "config.json"
    louder = shutil.copytree(whole / "model", tmp_path / "louder")
    changed = json.loads(about.read_text()) | {"sigma_max": 300.0, "licence": "A", "num_steps": 9, "sigmas": [9, 1],
                                               "sampler": "heun"}
    (louder / "config.json").write_text(json.dumps(changed))
    kept = load_model(train(other, tmp_path / "run2", still, init=louder))[1]
    assert noise_levels(kept)["sigma_max"] == 300 and kept["licence"] == "A" and "licence" not in config
    assert (kept["num_steps"], kept["sampler"]) == (9, "heun") and "sigmas" not in kept  # it learns to denoise again
    torch.testing.assert_close(net.state_dict(), old.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("files, warned", [(3, True), (4, False), (1, False)])
def test_a_store_that_keeps_most_of_its_music_back_is_warned_of(tmp_path, capfd, files, warned):
    prepare(chords(tmp_path / "wav", files), tmp_path / "store", SPECTROGRAM, jobs=1)
    capfd.readouterr()
    train(tmp_path / "store", tmp_path / "run", replace(CONFIG, images=4))
    told = [line for line in capfd.readouterr().err.splitlines() if line.endswith("prepare more recordings")]
    expected = f"{tmp_path / 'store'} has one recording to train on, beside 2 for validation and test"
    assert told == [f"{expected}; prepare more recordings"] * warned


def test_fine_tuning_needs_the_same_network(store, whole, tmp_path):
    with pytest.raises(ValueError, match=r"model \(custom\) and this run \(nano\) differ in unet: patch was 4, is 2"):
        train(store, tmp_path / "run", replace(CONFIG, unet=replace(NETWORK, patch=2)), init=whole / "model")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(store, tmp_path / "run", CONFIG, init=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_model_gets_labels(store, whole, tmp_path):
    """Their weights start as nothing; a run without labels can't take them over."""
    still = replace(CONFIG, images=4, lr=1e-9, snapshot_images=4, recolour=1.0)
    model = train(store, tmp_path / "run", still, init=whole / "model")
    weights, old = load_model(model)[0].state_dict(), load_model(whole / "model")[0].state_dict()
    assert weights.pop("labels.weight").shape == (16, 16)
    torch.testing.assert_close(weights, old, rtol=0, atol=1e-6)
    train(store, tmp_path / "more", still, init=model)
    with pytest.raises(ValueError, match="differ in unet: labels was 16, is 0; .* and set recolour: it has labels$"):
        train(store, tmp_path / "less", CONFIG, init=model)
    with pytest.raises(ValueError, match="differ in unet: patch was 4, is 2; choose the model's preset$"):
        train(store, tmp_path / "other", replace(still, unet=replace(NETWORK, patch=2)), init=whole / "model")


def test_a_model_gets_a_seam(store, tmp_path):
    still, network = replace(CONFIG, images=4, lr=1e-9, snapshot_images=4), replace(NETWORK, context=8)
    first = train(store, tmp_path / "first", replace(still, unet=network))
    model = train(store, tmp_path / "run", replace(still, unet=replace(network, seam=8)), init=first)
    weights, old = load_model(model)[0].state_dict(), load_model(first)[0].state_dict()
    assert weights["seam.conv0.weight"].any() and weights["seam.conv2.weight"].abs().max() < 1e-6
    torch.testing.assert_close({name: weights[name] for name in old}, old, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="differ in unet: seam was 8, is 0; choose the model's preset$"):
        train(store, tmp_path / "less", replace(still, unet=network), init=model)


def test_a_loss_that_is_no_number_stops_the_run(store, tmp_path):
    config = replace(CONFIG, lr=1e30, warmup_images=0, checkpoint_images=4)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) .* at step 1 \(after 4 blocks\): lower lr"):
        train(store, tmp_path, config)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 1


def test_what_does_not_fit_is_told_before_the_run_has_a_folder(store, tmp_path):
    with pytest.raises(ValueError, match="spectrograms of 32x32, nano is for 256x128: choose a preset"):
        train(store, tmp_path / "run", replace(CONFIG, unet=None))
    with pytest.raises(FileNotFoundError, match="not a spectrogram store"):
        train(tmp_path / "nothing", tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run can't be made"):
        train(store, tmp_path / "file/run", CONFIG)


AUTO = replace(CONFIG, mixed_precision="auto")


def choose(monkeypatch: pytest.MonkeyPatch, way: Way) -> list[Way]:
    """Let every trial choose `way`, after a step in each; the list gets the ways that were tried."""
    tried: list[Way] = []

    def fastest(seconds, ways, compiled):
        tried.extend(way for way in ways if seconds(way) > 0)
        return way

    monkeypatch.setattr("pianodiff.train.fastest", fastest)
    return tried


def test_a_trial_changes_nothing_but_the_way(store, whole, tmp_path, monkeypatch, capfd):
    tried = choose(monkeypatch, Way("no", "default"))
    train(store, tmp_path, AUTO)
    assert tried == list(WAYS)
    assert "a trial of 4 ways to compute chose float32 and the default kernel of attention\n" in capfd.readouterr().err
    mine, theirs = (load_checkpoint(run / "checkpoint.safetensors")[0] for run in (tmp_path, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_keeps_the_way_that_its_trial_chose(store, whole, tmp_path, monkeypatch):
    def stop(model, images):
        raise RuntimeError

    choose(monkeypatch, Way("no", "math"))
    train(store, tmp_path / "run", AUTO)
    with pytest.raises(RuntimeError):
        train(store, tmp_path / "again", AUTO, on_snapshot=stop)
    tried = choose(monkeypatch, Way("bf16", "default"))
    train(store, tmp_path / "again", AUTO)
    assert tried == []
    assert_same_end(tmp_path / "again", tmp_path / "run")
    tensors, about = load_checkpoint(tmp_path / "run/checkpoint.safetensors")
    assert about["computing"] == {"precision": "no", "attention": "math", "compile": False}
    card = load_model(tmp_path / "run/model")[1]["training"]
    assert card["computing"] == {"precision": "no", "attention": "math"}
    theirs = load_checkpoint(whole / "checkpoint.safetensors")[0]
    assert not all(torch.equal(tensors[name], theirs[name]) for name in theirs)  # the kernel was another


def test_a_trial_is_repeated_where_the_network_is_no_longer_compiled(store, whole, tmp_path, monkeypatch):
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    computing = {"precision": "bf16", "attention": "default", "compile": True}
    save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, about | {"computing": computing})
    tried = choose(monkeypatch, Way("no", "math"))
    train(store, tmp_path, replace(AUTO, images=100))
    assert tried == list(WAYS)
    about = load_checkpoint(tmp_path / "checkpoint.safetensors")[1]
    assert about["computing"] == {"precision": "no", "attention": "math", "compile": False}


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "no")])
def test_a_run_of_0_1_0_goes_on_by_the_processors_abilities(store, whole, tmp_path, monkeypatch, native, precision):
    tried = choose(monkeypatch, Way("no", "math"))
    monkeypatch.setattr("pianodiff.recipe.native_bf16", lambda device: native)
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    del about["computing"]
    for run, config in (("auto", AUTO), ("set", replace(CONFIG, mixed_precision=precision))):
        (tmp_path / run).mkdir()
        save_checkpoint(tmp_path / run / "checkpoint.safetensors", tensors, about)
        train(store, tmp_path / run, replace(config, images=112))
    assert tried == []
    mine, theirs = (load_checkpoint(tmp_path / run / "checkpoint.safetensors")[0] for run in ("auto", "set"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_bf16_trains(store, tmp_path):
    train(store, tmp_path, replace(CONFIG, images=32, mixed_precision="bf16"))
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[0]["net.out.weight"].dtype == torch.float32


def launch(processes: int, script: Path, *words: object,
           options: tuple[str, ...] = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
                                       "--dynamo_backend", "no")) -> subprocess.CompletedProcess:
    """Run a script by `accelerate launch`, as on GPUs; its processes then use the CPU.

    With Accelerate's own `--cpu` there would be one process, whatever the number.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", processes,
               "--main_process_port", 0, script, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, timeout=3600)


@pytest.mark.long
def test_two_processes_train_one_network(store, whole, tmp_path):
    """Under `accelerate launch`: the same blocks as one process sees, shared out, and one set of weights."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
from accelerate import PartialState
from pianodiff.train import TrainConfig, train
from pianodiff.unet import UNetConfig
train({str(store)!r}, {str(tmp_path / "run")!r}, {AUTO!r})
sys.stdout.write(f"one of {{PartialState().num_processes}}\\n")    # in one go
""")
    done = launch(2, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one of 2") == 2
    assert [row["images"] for row in rows(tmp_path / "run")] == [row["images"] for row in rows(whole)]
    facts = load_model(tmp_path / "run/model")[1]["training"]
    assert facts["images"] == 96 and facts["validation"]["blocks"] == 4
    assert Way(**facts["computing"]) in WAYS and done.stderr.count("a trial of 4 ways") == 1


# something else to learn

def halved(denoiser, y, sigma, noise, cond):
    """A loss that is none of ours: the answer should be half of the block."""
    x = y + sigma.reshape(-1, 1, 1, 1) * noise
    return (denoiser(x, sigma, cond) - y / 2).square().flatten(1).mean(1)


HALVED = Objective(halved, (2.0, 0.25), {"sigmas": [2.0, 0.25], "teacher": "nobody"})


def test_a_run_may_learn_something_else(store, tmp_path):
    seen = []

    def spy(net, y, sigma, *rest):
        if torch.is_grad_enabled():  # not in validation, which takes each level
            seen.append(sigma)
        return halved(net, y, sigma, *rest)

    spied = HALVED._replace(loss=spy)
    model = train(store, tmp_path / "run", replace(CONFIG, images=32, eval_images=16), objective=spied)
    assert all((sigma == sigma[0]).all() for sigma in seen) and {float(s[0]) for s in seen} == {2.0, 0.25}
    config = load_model(model)[1]
    assert config["sigmas"] == [2.0, 0.25] and config["teacher"] == "nobody"
    log = rows(tmp_path / "run")
    assert {name for name in log[0] if name.startswith("val_")} == {"val_2", "val_0.25"}
    assert config["training"]["validation"]["loss"].keys() == {"2", "0.25"}
    assert float(log[-1]["val_2"]) == pytest.approx(config["training"]["validation"]["loss"]["2"], rel=1e-5)
    for other in (DENOISING, HALVED._replace(facts={"teacher": "somebody"}), HALVED._replace(levels=(2.0, 0.5))):
        with pytest.raises(ValueError, match="was begun otherwise: objective was "):
            train(store, tmp_path / "run", replace(CONFIG, images=64), objective=other)
    train(store, tmp_path / "run", replace(CONFIG, images=48, eval_images=16), objective=HALVED)  # it goes on
    assert rows(tmp_path / "run")[-1]["images"] == "48"


def test_a_run_of_an_older_release_has_no_objective(store, whole, tmp_path):
    tensors, about = load_checkpoint(whole / "checkpoint.safetensors")
    assert about["identity"].pop("objective") == {}
    save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, about)
    train(store, tmp_path, replace(CONFIG, images=112))
    with pytest.raises(ValueError, match="was begun otherwise: objective was {}"):
        train(store, tmp_path, replace(CONFIG, images=128), objective=HALVED)


# a step in parts

@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 4), (4, 1), (2, 2)])
def test_parts_of_a_step_make_up_the_whole(store, world, accumulate):
    data = BlockDataset(store, "train", random_offset=True)
    config, facts = replace(CONFIG, accumulate=accumulate, recolour=0.5), SimpleNamespace(step=5)
    found = []
    for rank in range(world):
        batch = draw_batch(data, len(data), config, facts.step, rank, world)
        run = SimpleNamespace(config=config, place=(rank, world), device=torch.device("cpu"), objective=DENOISING,
                              state=SimpleNamespace(facts=facts))
        found += _parts(run, batch)
    assert len(found) == world * accumulate
    whole = draw_batch(data, len(data), config, facts.step)
    torch.manual_seed(seed_of(5, CONFIG.seed, facts.step, 0))
    whole |= draw_noise(config)
    assert all(part.keys() == whole.keys() for part in found)
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in found]), value)


def test_a_batch_in_parts_has_the_losses_of_the_whole(store, whole, tmp_path, monkeypatch):
    """Also where the number of parts changes on the way. Processes would exchange gradients once a step."""
    alone: list[object] = []

    def no_sync(self, model):
        alone.append(model)
        return nullcontext()

    def stop(model, images):
        raise InterruptedError

    monkeypatch.setattr("pianodiff.train.Accelerator.no_sync", no_sync)
    with pytest.raises(InterruptedError):
        train(store, tmp_path, replace(CONFIG, accumulate=4), on_snapshot=stop)
    assert len(alone) == 3 * 12
    train(store, tmp_path, replace(CONFIG, accumulate=2))
    assert len(alone) == 3 * 12 + 12
    losses = [[float(row[name] or 0) for row in rows(run) for name in row if name == "loss" or name[:4] == "val_"]
              for run in (tmp_path, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)


def test_a_batch_has_as_many_blocks_as_parts(store, tmp_path):
    told = r"batch_size 4 is no multiple of 3, processes \(1\) times accumulate \(3\); choose one that is"
    with pytest.raises(ValueError, match=told):
        train(store, tmp_path / "run", replace(CONFIG, accumulate=3))
    assert not (tmp_path / "run").exists()


def test_a_store_through_a_cache(store, tmp_path):
    """The same weights; and a second run asks the store for no chunk."""
    train(store, tmp_path / "plain", CONFIG)
    near = shutil.copytree(store, tmp_path / "near")
    config = replace(CONFIG, in_memory=False)
    train(near, tmp_path / "first", config, cache=tmp_path / "cache", cache_size=0.2)
    for chunks in near.glob("*/c"):
        shutil.rmtree(chunks)
    train(near, tmp_path / "second", config, cache=tmp_path / "cache", cache_size=0.2)
    for run in ("first", "second"):
        weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", run)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with pytest.raises(ValueError, match="a cache of 0.01 GB is no use"):
        train(near, tmp_path / "third", config, cache=tmp_path / "cache", cache_size=0.01)
    assert not (tmp_path / "third").exists()


def test_processes_that_do_not_know_of_each_other(store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were launched, but this one works alone, .* ACCELERATE_USE_CPU"):
        train(store, tmp_path / "run", CONFIG)
