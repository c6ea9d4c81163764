"""The commands: what they write, what they print, and what bad input gets. The network is tiny and untrained."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_generate import LARGE, tiny_piano

import pianodiff.cli
import pianodiff.terminal
from pianodiff import GUIDANCE, GUIDANCE_INTERVAL, NUM_STEPS, SAMPLER
from pianodiff.audio import SPECTROGRAMS, load_audio, save_audio, sound_facts, sound_file
from pianodiff.cli import main
from pianodiff.data import prepare
from pianodiff.fewstep import StudentConfig
from pianodiff.generate import Piano
from pianodiff.synth import example_performance
from pianodiff.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """A model's folder, beside an empty one to work in."""
    tiny_piano().save_pretrained(tmp_path / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(tmp_path / "model")


def make(model: str, *flags: str, command: tuple[str, ...] = ("generate",)) -> int:
    return main([*command, "--model", model, "--steps", "2", "--seconds", "0.25", *flags])


def test_help_is_quick():
    code = ("import sys, pianodiff.cli\ntry: pianodiff.cli.main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'librosa', 'matplotlib', 'zarr'} & set(sys.modules)")
    help_ = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert help_.returncode == 0, help_.stderr
    assert all(command in help_.stdout for command in ("generate", "continue", "prepare", "train", "info"))


@pytest.mark.parametrize(("command", "phrases"), [
    ("generate", ["WAV stream", "drawn and printed", "noise levels"]),
    ("continue", ["at any rate", "drawn and printed"]),
    ("prepare", ["MAESTRO's layout", "Dask scheduler"]), ("train", ["fine-tuning", "blocks a step"]),
    ("evaluate", ["a folder of sound", "search for copies"]), ("info", ["or a sound file"])])
def test_help_explains_the_options(command, phrases, capsys):
    """A docstring that tyro can't parse is shown as it stands, and its options without a word."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = " ".join(re.sub(r"\x1b\[[\d;]*m|│", "", capsys.readouterr().out).split())
    assert "Args:" not in out and [phrase for phrase in phrases if phrase not in out] == []


def test_generate_writes_sound_and_picture(model, capsys):
    assert make(model, "--seed", "7", "--out", "piano.wav", "--image", "piano.png") == 0
    about = soundfile.info("piano.wav")
    assert (about.samplerate, about.channels, about.frames, about.subtype) == (8000, 1, 2000, "PCM_16")
    assert Path("piano.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(os.listdir()) == ["piano.png", "piano.wav"]
    out, err = capsys.readouterr()
    assert re.fullmatch(r"piano.wav and piano.png: 0.25 s of new music, seed 7, made in .* s \(.* s a second, "
                        r"the first sound after .* s\)\n", out)
    assert "block 4 of 4" in err and "8/8" in err  # the bar


def test_the_same_seed_gives_the_same_bytes(model, capsys):
    assert make(model, "--out", "one.flac") == 0
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]  # drawn, and told
    assert make(model, "--out", "two.flac", "--seed", seed) == 0
    assert make(model, "--out", "three.flac", "--seed", str(int(seed) + 1)) == 0
    one, two, three = (Path(f"{name}.flac").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_continue_writes_the_prompt_and_then_new_music(model):
    mono = 0.1 * example_performance(1, seed=0)
    soundfile.write("mine.wav", mono[:, None].expand(-1, 2).numpy(), 16_000)  # stereo; half as long at this rate
    assert make(model, "--seed", "1", "--out", "longer.wav", command=("continue", "mine.wav")) == 0
    longer, mine = load_audio("longer.wav"), load_audio("mine.wav")
    assert len(mine) == 4000 and len(longer) == 6000
    torch.testing.assert_close(longer[:4000], mine, atol=2e-4, rtol=0)
    assert longer[4000:].abs().max() > 0.001


def again(capsys, sound: str) -> list[str]:
    """The command that `info` tells, without the program's name."""
    capsys.readouterr()
    assert main(["info", sound]) == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["made by"] == f"pianodiff {pianodiff.__version__}"
    program, *words, out, name = shlex.split(rows["again"])
    assert (program, out, name) == ("pianodiff", "--out", f"again{Path(sound).suffix}")
    return words


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_a_file_tells_how_to_make_it_again(model, capsys, ending):
    assert make(model, "-g", "1.5", "--sampler", "heun", "-o", f"one.{ending}") == 0  # the seed is drawn
    assert main([*again(capsys, f"one.{ending}"), "--out", f"two.{ending}"]) == 0
    one, two = (load_audio(f"{name}.{ending}") for name in ("one", "two"))
    assert len(one) == 2000 and torch.equal(one, two)


def test_a_continuation_tells_its_prompt(model, capsys):
    save_audio("meine Übung.wav", example_performance(1, seed=0))
    assert make(model, "--out", "one.mp3", command=("continue", "meine Übung.wav")) == 0
    words = again(capsys, "one.mp3")
    assert words[:2] == ["continue", "meine Übung.wav"]
    assert main([*words, "--out", "two.mp3"]) == 0
    assert torch.equal(load_audio("one.mp3"), load_audio("two.mp3"))
    assert main(["info", "meine Übung.wav"]) == 0 and "its tags don't tell" in capsys.readouterr().out


def test_info_of_what_is_no_sound(model, capsys):
    Path("notes.wav").write_text("crotchet")
    assert "notes.wav can't be read as sound" in refused(capsys, main(["info", "notes.wav"]))
    assert "missing.wav is not a file; give the path" in refused(capsys, main(["info", "missing.wav"]))


def test_info_says_that_a_sound_is_shorter_than_its_command(model, capsys):
    assert make(model, "--out", "whole.wav") == 0
    comment = sound_facts("whole.wav").comment
    with sound_file(Path("half.wav"), 8000, comment) as write:
        write(load_audio("whole.wav")[:1000])
    capsys.readouterr()
    assert main(["info", "whole.wav"]) == 0 and "interrupted" not in capsys.readouterr().out
    assert main(["info", "half.wav"]) == 0
    assert re.search(r"^interrupted +the command makes 0.25 s$", capsys.readouterr().out, re.M)


def test_a_run_stands_for_its_model(model, capsys, tmp_path):
    """Beside its model a run holds much else."""
    (tmp_path / "log.csv").write_text("")
    assert make(str(tmp_path), "--out", "piano.wav") == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path)]) == 0
    assert re.match(rf"model +{tmp_path}\nnetwork +tiny, ", capsys.readouterr().out)


def test_force_replaces(model):
    for name in ("piano.wav", "piano.png"):
        Path(name).write_text("what was there before")
    assert make(model, "-f", "-i", "piano.png") == 0
    assert len(load_audio("piano.wav")) == 2000 and Path("piano.png").read_bytes()[:4] == b"\x89PNG"


def test_a_terminal_gets_no_samples(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "standard output is a terminal; give the name of a file" in refused(capsys, make(model, "--out", "-"))


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_what_is_written_is_the_stream(model, ending):
    assert make(model, "--seed", "3", "--seconds", "0.5", "--out", f"piano.{ending}") == 0
    expected = torch.cat(list(Piano.from_pretrained(model).stream(0.5, seed=3, num_steps=2))).clamp(-1, 1)
    written = load_audio(f"piano.{ending}")
    assert len(written) == 4000 and os.listdir() == [f"piano.{ending}"]
    exact = ending in ("wav", "flac", "aiff")
    assert (written - expected).norm() < (1e-3 if exact else 0.5) * expected.norm()


def test_what_exceeds_full_scale_is_clipped(model, monkeypatch):
    wave = 2 * torch.sin(0.3 * torch.arange(2000))
    monkeypatch.setattr("pianodiff.generate.Piano.stream", lambda *args, **how: iter(wave.split(700)))
    assert make(model, "--out", "piano.wav") == 0
    torch.testing.assert_close(load_audio("piano.wav"), wave.clamp(-1, 1), atol=1e-4, rtol=0)


def shell(model: str, *flags: str, encoding: str = "utf-8", **how) -> subprocess.Popen:
    """The command in a process of its own, which is killed after an hour, so that no pipe is read for ever."""
    command = [sys.executable, "-m", "pianodiff.cli", "generate", "--model", model, "--steps", "2", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}, **how)
    watch = threading.Timer(3600, process.kill)  # does nothing to one that has ended
    watch.daemon = True
    watch.start()
    return process


def test_a_pipe_gets_a_wav_stream(model):
    assert make(model, "--seed", "3", "--out", "piano.wav") == 0
    out, err = shell(model, "--seed", "3", "--seconds", "0.25", "--out", "-").communicate()
    assert out[:4] == b"RIFF" and out[4:8] == out[40:44] == b"\xff" * 4 and len(out) == 44 + 2 * 2000
    assert out[44:] == Path("piano.wav").read_bytes()[-4000:]
    assert torch.equal(load_audio(io.BytesIO(out)), load_audio("piano.wav"))
    assert b"standard output: 0.25 s of new music, seed 3" in err and b"block 4 of 4" in err
    assert os.listdir() == ["piano.wav"]


def test_a_pipe_gets_sound_before_the_end_and_may_close(model):
    process = shell(model, "--seconds", "80000", "--out", "-")
    assert len(process.stdout.read(44 + 2 * 1000)) == 2044  # most of it lies hours ahead
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141 and b"pianodiff" not in err and b"Error" not in err  # nothing but the bar


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_pipe_that_is_full_or_closed(model):
    def run(redirection):
        command = f"{sys.executable} -m pianodiff.cli generate --model {model} --seconds 0.25 --steps 2 --out -"
        done = subprocess.run(f"{command} {redirection}", shell=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 2
        return done.stderr.decode()

    assert run(">&-").startswith("pianodiff: standard output is closed; give the name of a file")  # before the work
    assert "\npianodiff: standard output can't be written (No space left on device); " in run(">/dev/full")


def in_bash(line: str, **env: str) -> subprocess.CompletedProcess:
    """What comes of a line in which `pianodiff` is this package's command."""
    command = f"{shlex.quote(sys.executable)} -m pianodiff"
    return subprocess.run(line.replace("pianodiff", command), shell=True, executable="/bin/bash", capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})


@pytest.mark.parametrize("out", ["piano.wav", "-"])
def test_standard_error_may_be_closed(model, out):
    """What is opened next must not get its number: a library's warning would end in the sound."""
    done = in_bash(f"pianodiff generate --model {model} --seconds 0.25 --steps 2 --seed 3 --out {out} 2>&-")
    assert done.returncode == 0
    sound = io.BytesIO(done.stdout) if out == "-" else "piano.wav"
    assert len(load_audio(sound)) == 2000


@pytest.mark.parametrize("prompt", ["cat mine.wav | pianodiff continue -", "pianodiff continue - < mine.wav",
                                    "pianodiff continue <(cat mine.wav)"])
def test_a_prompt_comes_through_a_pipe(model, prompt):
    save_audio("mine.wav", 0.1 * example_performance(1, seed=0))
    done = in_bash(f"{prompt} --model {model} --seconds 0.25 --steps 2 --out longer.wav")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_audio("longer.wav")[:8000], load_audio("mine.wav"), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("line", "message"), [
    ("echo crotchet | pianodiff continue -", "standard input can't be read as sound"),
    ("pianodiff continue - <&-", "standard input can't be read as sound"),
    ("pianodiff continue <(echo quaver)", "can't be read as sound"),
])
def test_what_comes_through_a_pipe_is_no_sound(model, line, message):
    done = in_bash(f"{line} --model {model}")
    assert done.returncode == 2 and re.fullmatch(rf"pianodiff: .*{message}.*\n", done.stderr.decode())


@pytest.mark.skipif(not shutil.which("script"), reason="there is no script here")
@pytest.mark.parametrize(("wish", "coloured"), [("", True), ("1", False)])
def test_colours_stay_away_from_those_who_want_none(wish, coloured):
    line = "script -qec 'pianodiff generate --help' /dev/null"
    done = in_bash(line, TERM="xterm", NO_COLOR=wish)
    assert done.returncode == 0 and (b"\x1b[3" in done.stdout) == coloured


class Device:
    """Stands for sounddevice: keeps what it is given to play."""

    class PortAudioError(Exception):
        pass

    def __init__(self, fails: str = "", rate: int = 80_000) -> None:    # faster than it sounds, slower than it is made
        self.fails, self.rate, self.played, self.log = fails, rate, [], []

    def OutputStream(self, rate, channels, dtype):
        if self.fails == "open":
            raise self.PortAudioError("no default output device")
        if self.fails == "no PortAudio":
            raise OSError("PortAudio library not found")
        self.log.append((rate, channels, dtype))
        return self

    def __enter__(self):
        self.log.append("start")

    def __exit__(self, *error):
        self.log.append("stop")

    def write(self, samples):
        if self.fails == "write":
            raise self.PortAudioError("unplugged")
        assert samples.shape[1] == 1 and samples.dtype == "float32" and samples.flags.c_contiguous
        time.sleep(len(samples) / self.rate)
        self.played.append(samples.copy())


def test_play(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", device := Device())
    assert make(model, "--seed", "3", "--seconds", "1", "--play") == 0
    played = torch.from_numpy(np.concatenate(device.played)[:, 0])
    assert device.log == [(8000, 1, "float32"), "start", "stop"] and len(device.played) > 10
    torch.testing.assert_close(played, load_audio("piano.wav"), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("device", "message"), [
    (None, r"--play can't reach a sound device .*pip install sounddevice, or pipe the sound"),
    (Device("no PortAudio"), r"--play .*library not found\); install PortAudio \(on Debian: libportaudio2\), or pipe"),
    (Device("open"), r"--play can't reach a sound device \(no default output device\); "),
    (Device("write"), r"the sound device failed \(unplugged\); pipe the sound"),
])
def test_nothing_to_play_on(model, monkeypatch, capsys, device, message):
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # None: as if it were not installed
    assert make(model, "--seconds", "2", "--play") == 2
    out, err = capsys.readouterr()
    assert re.search(message, err.splitlines()[-1]) and not out and not os.listdir()
    if device and device.fails == "write":
        assert device.log[-1] == "stop"


def test_ctrl_c_silences_at_once_and_keeps_the_file(model, monkeypatch, capsys):
    def pieces(*args, **how):
        yield from (torch.full((40_000,), 0.5), torch.full((40_000,), -0.5))
        raise KeyboardInterrupt

    monkeypatch.setattr("pianodiff.generate.Piano.stream", pieces)
    monkeypatch.setitem(sys.modules, "sounddevice", device := Device(rate=800))  # the first piece alone takes 50 s
    assert make(model, "--seed", "3", "--play") == 130
    assert device.log[-1] == "stop" and sum(map(len, device.played)) < 40_000
    torch.testing.assert_close(load_audio("piano.wav"), torch.tensor([0.5, -0.5]).repeat_interleave(40_000))
    out, err = capsys.readouterr()
    assert out.startswith("piano.wav: 10 s of new music, seed 3") and err == "pianodiff: interrupted\n"


def test_memory_does_not_grow_with_the_length(model, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def pieces(*args, **how):
        for _ in range(200):
            alive.add(piece := torch.zeros(8000))
            yield piece
            most.append(len(alive))

    monkeypatch.setattr("pianodiff.generate.Piano.stream", pieces)
    assert make(model, "--image", "piano.png") == 0
    assert len(load_audio("piano.wav")) == 200 * 8000 and max(most) <= 62  # the minute of the picture


def refused(capsys, status: int) -> str:
    """What a refused command says: one line, nothing written beside what was there."""
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert re.fullmatch(r"pianodiff: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_impossible_lengths(model, capsys, seconds):
    assert "--seconds must be more than 0" in refused(capsys, make(model, "--seconds", seconds))
    assert not os.listdir()


@pytest.mark.parametrize(("flags", "message"), [
    (("--out", "no/such/folder/piano.wav"), "the folder no/such/folder does not exist; make it first"),
    (("--out", "file/piano.wav"), "the folder file does not exist; make it first"),
    (("--image", "no/such/folder/piano.png"), "the folder no/such/folder does not exist; make it first"),
    (("--out", "folder.wav"), "folder.wav is a folder"),
    (("--out", "piano.txt"), "piano.txt must end in .wav, .flac, .ogg, .mp3, .aiff or .aif"),
    (("--image", "piano.jpeg"), "piano.jpeg must end in .png"),
    (("--sampler", "hein"), "no sampler 'hein'"),
    (("--steps", "0"), ": --steps must be a whole number of at least 1"),
    (("--out", "-", "--steps", "0"), ": --steps must be a whole number of at least 1"),
    (("--seed", "-1"), ": --seed must be a whole number from 0"),
    (("--guidance", "nan"), ": --guidance must be finite"),
    (("--guidance-interval", "2", "1"), ": --guidance-interval must be noise levels low < high"),
    (("--model", "no-such-model"), "no model 'no-such-model'; give one that ships"),
    (("--model", "nanno"), "no model 'nanno'; did you mean 'nano'? or give one"),
    (("--model", "."), "model"),
    (("--device", "cud"), "the device 'cud' can't be used"),
    (("--out", "file.wav"), "file.wav exists; give another name, or --force to replace it"),
    (("--image", "file.png"), "file.png exists; give another name, or --force to replace it"),
])
def test_bad_flags(model, capsys, flags, message):
    there = ["file", "file.png", "file.wav"]
    for name in there:
        Path(name).write_text("")
    Path("folder.wav").mkdir()
    assert message in refused(capsys, make(model, *flags))
    assert sorted(os.listdir()) == [*there, "folder.wav"] and not any(Path(name).read_text() for name in there)


def test_outputs_are_tried_before_the_minutes_of_work(model, monkeypatch, capsys):
    monkeypatch.setattr("pianodiff.generate.Piano.from_pretrained", lambda *args: pytest.fail("too late"))
    refused(capsys, make(model, "--out", "no/such/folder/piano.wav"))


def test_a_folder_without_permission(model, capsys):
    Path("closed").mkdir(mode=0o500)
    target = "closed/piano.wav" if os.geteuid() else "/proc/piano.wav"  # root may write everywhere but there
    if not os.geteuid() and not Path("/proc").is_dir():
        pytest.skip("root can write to every folder here")
    assert "can't be written to" in refused(capsys, make(model, "--out", target))


@pytest.mark.parametrize(("name", "message"), [
    ("missing.wav", "missing.wav is not a file"),
    ("notes.wav", "notes.wav can't be read as sound"),
    ("empty.wav", "empty.wav"),
    ("short.wav", ": short.wav lasts 0.013 s; give at least 0.064 s"),
    ("silent.wav", ": silent.wav is silent"),
])
def test_bad_prompts(model, capsys, name, message):
    Path("notes.wav").write_text("crotchet, quaver, quaver")
    Path("empty.wav").write_bytes(b"")
    save_audio("short.wav", torch.ones(100))
    save_audio("silent.wav", torch.zeros(4000))
    before = sorted(os.listdir())
    assert message in refused(capsys, make(model, command=("continue", name)))
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("out", ["./mine.wav", "link.wav", "hard.wav"])
def test_the_recording_is_not_replaced(model, capsys, monkeypatch, out):
    save_audio("mine.wav", example_performance(1, seed=0))
    os.symlink("mine.wav", "link.wav")
    os.link("mine.wav", "hard.wav")
    monkeypatch.setattr("pianodiff.generate.Piano.from_pretrained", lambda *args: pytest.fail("too late"))
    before = Path("mine.wav").read_bytes()
    message = refused(capsys, make(model, "--out", out, "--force", command=("continue", "mine.wav")))
    assert "is the recording itself, which would be lost; choose another name" in message
    assert Path("mine.wav").read_bytes() == before and Path("link.wav").is_symlink()


def test_a_damaged_model(model, capsys):
    weights = Path(model, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in refused(capsys, make(model))


def test_a_disk_that_fills_leaves_no_half_file(model, capsys, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", full)
    status = make(model, "--image", "piano.png")
    assert status == 2 and "piano.wav: No space left on device" in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.parametrize(("line", "message"), [
    ("generate --seconds long", "--seconds takes a number, not long; see pianodiff generate --help"),
    ("generate --steps 1.5", "--steps takes a whole number, not 1.5; see pianodiff generate --help"),
    ("generate --seed lucky", "--seed takes a whole number, not lucky; see pianodiff generate --help"),
    ("generate -s", "--seconds needs a value; see pianodiff generate --help"),
    ("generate -g much", "--guidance takes a number, not much; see pianodiff generate --help"),
    ("generate --guidance-interval 1", "--guidance-interval needs 2 values; see pianodiff generate --help"),
    ("generate --guidance-interval 1 b",
     "--guidance-interval takes numbers, not '1', 'b'; see pianodiff generate --help"),
    ("generate --loudness 3", "there is no option --loudness; see pianodiff generate --help"),
    ("generate 20", "there is no place for 20; see pianodiff generate --help"),
    ("continue one.wav two.wav", "there is no place for two.wav; see pianodiff continue --help"),
    ("continue", "SOUND is missing; see pianodiff continue --help"),
    ("prepare", "SOURCE is missing; see pianodiff prepare --help"),
    ("evaluate nano", "REFERENCE is missing; see pianodiff evaluate --help"),
    ("train store run --lr fast", "--lr takes a number, not fast; see pianodiff train --help"),
    ("train store run --mixed-precision half",
     "--mixed-precision takes one of 'auto', 'no', 'bf16', not half; see pianodiff train --help"),
    ("generate --secods 3", "there is no option --secods; did you mean --seconds? see pianodiff generate --help"),
    ("train store run --batchsize 4",
     "there is no option --batchsize; did you mean --batch-size? see pianodiff train --help"),
    ("train store run --image 4", "there is no option --image; did you mean --images? see pianodiff train --help"),
    ("--seconds 20 generate", "options stand behind the command; see pianodiff --help"),
    ("--versoin", "there is no option --versoin; did you mean --version? see pianodiff --help"),
])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # in which tyro draws its box
def test_usage_errors(capsys, monkeypatch, line, message, encoding):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert refused(capsys, main(line.split())) == f"pianodiff: {message}\n"


def test_a_line_without_a_command_gets_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    out = capsys.readouterr().out
    assert not stop.value.code and all(command in out for command in ("generate", "continue", "prepare", "info"))


@pytest.mark.parametrize("command", ["generate", "continue", "prepare", "train", "distill", "evaluate"])
def test_the_help_names_no_types_of_python(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "{None}" not in capsys.readouterr().out


@pytest.mark.parametrize(("wish", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_do_not_spin_for_long(wish, spins):
    """Set before PyTorch is loaded, and only where nobody has set it."""
    code = "import os, sys, pianodiff.cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env | wish)
    assert told.stdout == f"{spins} False\n"


def test_the_package_is_the_command():
    told = subprocess.run([sys.executable, "-m", "pianodiff", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == f"pianodiff {pianodiff.__version__}\n" and not told.returncode


@pytest.mark.parametrize(("word", "advice"), [
    ("genrate", "did you mean 'generate'? see pianodiff --help"), ("xyz", "see pianodiff --help")])
def test_a_command_that_is_not_there(capsys, word, advice):
    assert refused(capsys, main([word])) == f"pianodiff: there is no command {word!r}; {advice}\n"


def test_completion_knows_commands_and_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert not stop.value.code and all(word in script for word in ("generate", "--guidance-interval", "--batch-size"))


def test_version(capsys):
    assert main(["--version", "please"]) == 0
    assert capsys.readouterr().out == f"pianodiff {pianodiff.__version__}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"pianodiff {pianodiff.__version__}, as --version says" in capsys.readouterr().out


def test_any_name_can_be_printed(model):
    process = shell(model, "--seconds", "0.25", "--seed", "3", "--out", "Flügel.wav", encoding="ascii")
    out, err = process.communicate()
    assert process.returncode == 0 and out.startswith(rb"Fl\xfcgel.wav: 0.25 s of new music"), err
    assert os.listdir() == ["Flügel.wav"]


def test_a_log_gets_few_bars(model, capsys):
    begin = time.monotonic()
    assert make(model, "--seconds", "4") == 0
    assert capsys.readouterr().err.count("step/s]") <= 3 + (time.monotonic() - begin) / 10  # of 126 steps


def interrupted(process: subprocess.Popen, number: int, ready: Callable[[], bool]) -> None:
    """Interrupt a command once it is ready."""
    while not ready():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 130 and b"Traceback" not in rest
    assert rest.splitlines()[-1] == b"pianodiff: interrupted"


def check_kept(model: str, told: str) -> None:
    """The file has what was told, and it is the stream's beginning."""
    told = re.match("piano.flac: (.*) s of new music, seed 3, made in", told)
    kept = load_audio("piano.flac")
    assert os.listdir() == ["piano.flac"] and len(kept) == round(8000 * float(told[1])) >= 8 * 512 - 256
    whole = torch.cat(list(Piano.from_pretrained(model).stream(len(kept) / 8000 + 1, seed=3, num_steps=2))).clamp(-1, 1)
    torch.testing.assert_close(kept, whole[: len(kept)], atol=1e-4, rtol=0)


def test_interrupted(model):
    process = shell(model, "--seed", "3", "--seconds", "80000", "--out", "piano.flac")
    interrupted(process, signal.SIGINT, lambda: any(part.stat().st_size > 20_000 for part in Path().iterdir()))
    check_kept(model, process.stdout.read().decode())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_interrupted_by_another_signal(model, monkeypatch, capsys, name):
    def pieces(*args, **how):
        for number, piece in enumerate(stream(*args, **how)):
            if number == 20:
                signal.raise_signal(getattr(signal, name))
            yield piece

    stream = Piano.stream
    with monkeypatch.context() as patch:
        patch.setattr("pianodiff.generate.Piano.stream", pieces)
        assert make(model, "--seed", "3", "--seconds", "80000", "--out", "piano.flac") == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "pianodiff: interrupted"
    check_kept(model, out)


def test_interrupted_before_there_is_a_sound(model):
    Path("piano.wav").write_text("what was there before")
    process = shell(model, "--seconds", "80000", "--steps", "10000", "--force")
    interrupted(process, signal.SIGINT, lambda: len(os.listdir()) == 2)
    assert os.listdir() == ["piano.wav"] and Path("piano.wav").read_text() == "what was there before"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_where_a_compiled_module_swallows_what_is_raised(model, monkeypatch, capsys, number):
    """As Cython's do while they start: NumPy's random numbers, of which the first are drawn after a file is opened."""
    def start(module):
        with suppress(BaseException):
            signal.raise_signal(number)
            done.append("start")

    def pieces(*args, **how):
        ExtensionFileLoader("compiled", "compiled.so").exec_module(None)
        yield torch.ones(2000)
        done.append("a piece")
        for _ in range(6000):    # a longer sleep would not be cut short
            time.sleep(0.01)

    done = []
    monkeypatch.setattr("_imp.exec_dynamic", start)
    monkeypatch.setattr("pianodiff.generate.Piano.stream", pieces)
    assert make(model, "--seed", "3") == 130 and done == ["start", "a piece"]
    assert capsys.readouterr().err == "pianodiff: interrupted\n" and len(load_audio("piano.wav")) == 2000


@pytest.mark.parametrize(("error", "code", "told"), [
    (ValueError("no shape"), 130, "interrupted"),
    (OSError(28, "No space left on device"), 2, "No space left on device")])
def test_interrupted_where_compiled_code_makes_another_error_of_it(model, monkeypatch, capsys, error, code, told):
    """As safetensors does while it loads a model; a full disk is still told."""
    def pieces(*args, **how):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr("pianodiff.generate.Piano.stream", pieces)
    assert make(model) == code
    assert capsys.readouterr().err == f"pianodiff: {told}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's signals")
def test_interrupted_before_the_command_line_is_read(tmp_path):
    """While tyro is imported: the process ends as one of C does, and shows no line of Python."""
    (tmp_path / "tyro.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(3600)")
    done = subprocess.run([sys.executable, "-m", "pianodiff"], capture_output=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert (done.returncode, done.stderr, done.stdout) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_has_no_reader(unbuffered):
    def run(redirection):
        return subprocess.run(f"{sys.executable} -m pianodiff.cli --help {redirection}", shell=True,
                              executable="/bin/bash", capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered})

    quiet = run("| true; echo ${PIPESTATUS[0]}")
    assert (quiet.stdout, quiet.stderr) == ("141\n", "")
    full = run("> /dev/full")
    assert (full.returncode, full.stderr) == (2, "pianodiff: No space left on device\n")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX's signals")
def test_signals_are_as_they_were(model, monkeypatch):
    """What nohup ignores stays ignored, and afterwards all is as before."""
    seen = []
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    monkeypatch.setattr("pianodiff.generate.Piano.stream",
                        lambda *args, **how: seen.extend(map(signal.getsignal, numbers)) or iter([]))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert make(model) == 0
        assert seen == [pianodiff.terminal._interrupt, signal.SIG_IGN, pianodiff.terminal._interrupt]
        assert [*map(signal.getsignal, numbers)] == [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler]
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(make, model).result() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_disk_that_fills_while_writing(model):
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    process = shell(model, "--seconds", "2", preexec_fn=limit)
    out, err = process.communicate()
    assert process.returncode == 2 and not out and b"piano.wav can't be written" in err.splitlines()[-1], err
    assert not os.listdir()


LEVELS = "{:g} to {:g}".format(*GUIDANCE_INTERVAL)


def test_info(model, capsys):
    config = json.loads(Path(model, "config.json").read_text())
    first = {"images": 100_000, "seconds": 3600}
    last = {"images": 400_000, "seconds": 90, "device": "H100", "data": "music.zip", "hours": {"train": 1.25},
            "validation": {"loss": {"0.1": 0.123456}}, "ancestor": first | {"ancestor": first}}
    Path(model, "config.json").write_text(json.dumps(config | {"licence": "CC BY 4.0", "training": last}))
    Path(model, "README.md").write_text("# A card")

    assert main(["info", model]) == 0
    short = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    size = sum(p.numel() for p in tiny_piano().net.parameters())
    assert short["network"].endswith(f" MB, {size:,} parameters") and short["model"] == model
    assert short["card"] == f"{model}/README.md"
    assert short["block"] == "32 x 32, 0.064 s at 8,000 Hz" and short["data"] == "music.zip: train 1.2 hours"
    assert short["trained"] == "400,000 blocks in 1.5 minutes, H100" and short["licence"] == "CC BY 4.0"
    assert short["guidance"] == f"{GUIDANCE:g}, away from what it does without a past, at sigma {LEVELS}"
    assert short["before that"] == "200,000 blocks in 2.0 hours, cpu" and short["loss by sigma"] == "0.123 at 0.1"
    assert short["sampling"] == f"{NUM_STEPS} steps of {SAMPLER}, sigma 80 to 0.002, rho 7" and len(short) <= 12
    assert main(["info", model, "--all"]) == 0
    whole = capsys.readouterr().out
    for line in (r"training", r"  images +400,000", r"  ancestor", r"    ancestor", r"      seconds +3,600",
                 r"      0\.1 +0\.1235", r"  hop_length +16", r"  channels +8, 16"):
        assert re.search(f"^{line}$", whole, re.M), line
    assert all(re.search(f"^{name} +{re.escape(text)}$", whole, re.M) for name, text in short.items())


def test_info_of_a_student(model, capsys):
    config = json.loads(Path(model, "config.json").read_text()) | {"sigmas": [400, 2.5, 0.4]}
    Path(model, "config.json").write_text(json.dumps(config))
    assert main(["info", model]) == 0
    short = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert short["sampling"] == "3 steps of euler, at sigma 400, 2.5, 0.4" and "guidance" not in short
    assert "is a student, drawn with num_steps 3, not 2" in refused(capsys, main(["generate", "-m", model, "-n", "2"]))


def test_info_of_a_store(capsys, tmp_path):
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/a.wav", example_performance(3, seed=0))
    prepare(tmp_path / "music", tmp_path / "store", SPECTROGRAMS["nano"], jobs=1)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "store")]) == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows == {"store": str(tmp_path / "store"), "of": "music", "hours": "train 3.0 seconds", "recordings": "1",
                    "block": "256 x 128, 2.048 s at 8,000 Hz"}


@pytest.mark.parametrize("name", ["nano", "base"])
def test_info_of_what_ships(capsys, name):
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 12 and "CC BY-NC-SA 4.0" in out


def test_the_help_names_what_ships(capsys):
    shipped = sorted(path.parent.name for path in ROOT.glob("pianodiff/weights/*/config.json"))
    for command in ("generate", "info"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert all(re.search(rf"\b{name}\b", out) for name in shipped)


def test_prepare(monkeypatch, capsys):
    asked = {}

    def prepare(source, store, cfg, **how):
        asked.update(source=source, store=store, cfg=cfg, **how)
        return {"hours": {"train": 1.5}, "recordings": 3, "new": 2, "bytes": 1_300_000,
                "skipped": {"odd.wav": "it is silent"}}

    monkeypatch.setattr("pianodiff.data.prepare", prepare)
    assert main("prepare music.zip s3://bucket/store --preset paper-128 --splits train test --jobs 2".split()) == 0
    assert asked["source"] == "music.zip" and asked["store"] == "s3://bucket/store" and asked["cfg"].n_fft == 256
    assert asked["splits"] == ("train", "test") and asked["jobs"] == 2
    assert asked["cluster"] is None and not asked["soundfont"] and not asked["rooms"] and asked["seed"] == 0
    assert main("prepare --soundfont a.sf2 b.sf2 --seed 3 --rooms dry hall --jobs 1 music store".split()) == 0
    assert (asked["soundfont"], asked["rooms"], asked["seed"]) == (("a.sf2", "b.sf2"), ("dry", "hall"), 3)
    capsys.readouterr()
    assert main("prepare music.zip store".split()) == 0
    out, err = capsys.readouterr()
    assert err == "skipped odd.wav: it is silent\n" and "3 recordings (train 1.5 hours), 2 new, 1.3 MB" in out
    assert "no preset 'grand'" in refused(capsys, main("prepare music.zip store --preset grand".split()))


def test_train(model, monkeypatch, capsys, tmp_path):
    asked = {}

    def train(store, run, config, **how):
        asked.update(store=store, run=run, config=config, **how)
        (tmp_path / "config.json").write_text(json.dumps({"training": {"images": 5008, "seconds": 90}}))
        return tmp_path

    monkeypatch.setattr("pianodiff.train.train", train)
    flags = (f"--preset base --images 5000 --batch-size 4 --lr 0.01 --P-mean -1.2 --compile --init {model} "
             "--cache kept --cache-size 2")
    assert main(["train", "store", "run", *flags.split()]) == 0
    expected = TrainConfig(preset="base", images=5000, batch_size=4, lr=0.01, P_mean=-1.2, compile=True)
    assert asked == {"store": "store", "run": Path("run"), "config": expected, "init": Path(model),
                     "on_snapshot": pianodiff.cli.snapshot, "cache": Path("kept"), "cache_size": 2}
    # what it has seen, not what was asked for
    assert "trained on 5,008 blocks in 1.5 minutes\n" in capsys.readouterr().out
    assert ": --lr must be positive" in refused(capsys, main("train store run --lr -1".split()))
    assert "no model 'nanno'" in refused(capsys, main("train store run --init nanno".split()))


def test_distill(monkeypatch, capsys, tmp_path):
    asked = []
    (tmp_path / "config.json").write_text(json.dumps({"training": {"images": 64, "seconds": 2}}))
    monkeypatch.setattr("pianodiff.fewstep.distill", lambda *args, **how: asked.append((args, how)) or tmp_path)
    assert main("distill store run --teacher base --levels 80 2 --teacher-steps 3 --lr 0.1 --images 64".split()) == 0
    expected = StudentConfig(lr=0.1, images=64)
    assert asked == [(("store", Path("run"), "base", (80.0, 2.0), 3, expected),
                      {"on_snapshot": pianodiff.cli.snapshot, "cache": None, "cache_size": 10})]
    assert "trained on 64 blocks in 2.0 seconds\n" in capsys.readouterr().out
    monkeypatch.undo()
    assert ": --lr must be positive" in refused(capsys, main("distill store run --lr -1".split()))
    assert "no model 'nanno'" in refused(capsys, main("distill store run --teacher nanno".split()))
    assert "a student's levels fall" in refused(capsys, main("distill store run --levels 1 2".split()))


def test_samples_during_training(tmp_path):
    tiny_piano(SPECTROGRAMS["nano"], LARGE).save_pretrained(tmp_path / "model")
    pianodiff.cli.snapshot(tmp_path / "model", 20_000)
    assert sorted(os.listdir(tmp_path / "samples")) == ["20000.png", "20000.wav"]
    assert len(load_audio(tmp_path / "samples" / "20000.wav")) == 8 * 8000


def test_the_shipped_model(tmp_path):
    out = tmp_path / "piano.wav"
    assert main(["generate", "--seconds", "0.5", "--steps", "2", "--seed", "7", "--out", str(out)]) == 0
    assert len(load_audio(out)) == 4000
