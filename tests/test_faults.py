"""Kills, runs at the same time, and unreliable networks: the store and the weights are as if nothing had happened."""

import http.client
import http.server
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from chapters import PROCESSES
from commands import as_command
from test_data import Handler, group_is_gone, wait
from test_evaluate import figures
from test_generate import tiny_piano
from test_recordings import CFG, sound
from test_train import CONFIG, assert_same_end, chords, rows

from pianodiff.audio import save_audio
from pianodiff.data import BlockDataset, open_store, prepare
from pianodiff.files import Cache
from pianodiff.model import load_model
from pianodiff.train import load_checkpoint, train

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
    takes(tmp_path / "music", 40)
    for path in killed_and_resumed(prepared, tmp_path):
        assert_same_store(path, tmp_path / "whole", 40)


def takes(folder: Path, count: int, shortest: float = 0.5) -> None:
    """Recordings of `shortest` seconds, and up to 0.6 more."""
    folder.mkdir()
    for seed in range(count):
        save_audio(folder / f"{seed:02}.wav", sound(seed, shortest + 0.1 * (seed % 7)))


def assert_same_store(path: Path | str, other: Path, count: int) -> None:
    (store, found), (facts, whole) = ((open_store(p), contents(p)) for p in (path, other))
    assert (store.mean, store.std, store.recordings) == (facts.mean, facts.std, facts.recordings)
    assert found.keys() == whole.keys() and len(whole) == count
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


def contents(store: Path | str) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(store, mode="r").arrays()}


# Several at once

@pytest.mark.parametrize("runs", [2, 4])
def test_preparations_of_one_store_at_once(tmp_path, runs):
    takes(tmp_path / "music", 24)
    prepared(tmp_path / "whole")
    for attempt in range(5):
        store = tmp_path / str(attempt)
        processes = [in_a_process(prepared, store) for _ in range(runs)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * runs
        assert_same_store(store, tmp_path / "whole", 24)


def test_one_of_two_preparations_is_killed(tmp_path):
    takes(tmp_path / "music", 24)
    prepared(tmp_path / "whole")
    moments = random.Random(1)
    for attempt in range(5):
        store = tmp_path / str(attempt)
        killed, other = (in_a_process(prepared, store) for _ in range(2))
        while not store.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        killed.kill()
        other.join()
        assert other.exitcode == 0
        assert_same_store(store, tmp_path / "whole", 24)


# Networks

class Unreliable(http.server.BaseHTTPRequestHandler):
    """Hands requests on to a server, but one in five fails: by 500, 503, a reset, silence, or half an answer."""

    protocol_version = "HTTP/1.1"
    origin: tuple[str, int]
    silence = 1.0
    faults = (500, 503, "reset", "silence", "half")
    draw: random.Random
    seen: Counter[Any]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.draw.choice(self.faults) if self.draw.random() < 0.2 else None
        self.seen[fault] += 1
        self.seen[self.command, self.path] += 1
        if fault in ("reset", "silence"):
            time.sleep(self.silence if fault == "silence" else 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif isinstance(fault, int):
            code = {500: "InternalError", 503: "SlowDown"}[fault]
            self.reply(fault, {}, f"<Error><Code>{code}</Code><Message>try later</Message></Error>".encode())
        else:
            there = http.client.HTTPConnection(*self.origin)
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            data, unsaid = answer.read(), {"connection", "transfer-encoding", "date", "server", "content-length"}
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in unsaid}
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length", "0")
            self.reply(answer.status, kept, data, half=fault == "half" and self.command == "GET")
            there.close()

    def reply(self, status: int, headers: dict[str, str], data: bytes, half: bool = False) -> None:
        self.send_response(status)
        if self.command != "HEAD" or not headers:
            headers = headers | {"Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port of a server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def unreliable(port: int, **settings: Any) -> type[Unreliable]:
    settings = {"origin": ("127.0.0.1", port), "seen": Counter(), "draw": random.Random(0)} | settings
    return type("Handler", (Unreliable,), settings)


@pytest.fixture
def object_store(monkeypatch):
    """The port of an object store of our own, and settings by which a process finds one at another port."""
    server = pytest.importorskip("moto.server", reason="moto[server] is missing: pip install -e '.[dev]'")
    pytest.importorskip("s3fs", reason="s3fs is missing: pip install -e '.[s3]'")
    import s3fs

    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "open-sesame")
    there = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
    there.mkdir("far-away")
    yield port, there
    thread.stop()


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pianodiff", *map(str, words)], text=True, capture_output=True,
                          env=os.environ | environment)


def test_an_unreliable_object_store(tmp_path, object_store):
    """Recordings come from there and spectrograms go there, while a fifth of the requests fail."""
    port, there = object_store
    takes(tmp_path / "music", 12, shortest=2.1)
    assert command("prepare", tmp_path / "music", tmp_path / "whole").returncode == 0
    there.put(str(tmp_path / "music"), "far-away/music", recursive=True)
    handler = unreliable(port)
    with serving(handler) as bad:
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{bad}",
                       "FSSPEC_S3_CONFIG_KWARGS": json.dumps({"read_timeout": 0.5})}
        done = command("prepare", "s3://far-away/music", "s3://far-away/store", "--jobs", 2, **environment)
    assert done.returncode == 0, done.stderr
    assert "open-sesame" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert all(handler.seen[fault] for fault in Unreliable.faults) and handler.seen[None] > 50
    there.get("far-away/store", str(tmp_path / "copy"), recursive=True)
    assert_same_store(tmp_path / "copy", tmp_path / "whole", 12)


def test_an_unreliable_web_server(tmp_path):
    """A store is read from there, through a cache; its second reading asks for no chunk."""
    takes(tmp_path / "music", 12)
    prepare(tmp_path / "music", tmp_path / "whole", CFG, jobs=1)
    here = BlockDataset(tmp_path / "whole", "train", random_offset=False)
    cache = Cache(tmp_path / "cache", 0.1)
    folder = type("Folder", (Handler,), {"__init__": folder_of(tmp_path)})
    with serving(folder) as port:
        handler = unreliable(port, silence=0.1)
        with serving(handler) as bad:
            prepare(f"http://127.0.0.1:{bad}/music/", tmp_path / "made", CFG, jobs=1)
            assert_same_store(tmp_path / "made", tmp_path / "whole", 12)
            handler.seen.clear()
            for asked in (10, 0):
                there = BlockDataset(f"http://127.0.0.1:{bad}/whole", "train", random_offset=False, cache=cache)
                assert all((there[i]["spec"] == here[i]["spec"]).all() for i in range(len(here)))
                chunks = [path for _, path in (key for key in handler.seen if isinstance(key, tuple)) if "/c/" in path]
                assert len(chunks) == asked
                handler.seen.clear()


def folder_of(path: Path) -> Callable[..., None]:
    def __init__(self: Any, *args: Any) -> None:
        Handler.__init__(self, *args, directory=str(path))

    return __init__


# Full disks, signals and clocks, in every command

COMMANDS = {
    "generate": "generate --model {home}/model --steps 2 --seconds 0.5 --seed 3 -o {out}/new.flac -i {out}/new.png -f",
    "continue": "continue {home}/mine.wav --model {home}/model --steps 2 --seconds 0.5 --seed 3 -o {out}/new.wav -f",
    "prepare": "prepare {home}/music {out}/store --jobs 1",
    "train": "train {home}/store {out}/run --images 96 --batch-size 4 --lr 3e-3 --warmup-images 8 --eval-blocks 4 "
             "--eval-images 32 --log-images 16 --checkpoint-images 16 --snapshot-images 96 --workers 1 "
             "--mixed-precision no",
    "evaluate": "evaluate nano {home}/real -o {out}/new.html --pieces 2 --seconds 4.1 --steps 2 -f",
    "info": "info {home}/store",
    "prepare with workers": "prepare {home}/music {out}/store --jobs 2",
}
TRIES = {"generate": 15, "continue": 8, "prepare": 15, "train": 8, "evaluate": 3, "info": 30, "prepare with workers": 4}
WRITING = ["generate", "continue", "prepare", "train", "evaluate"]
OLD = "what was there before"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What the commands work with, and in `whole` what they write where nothing disturbs them."""
    home = tmp_path_factory.mktemp("home")
    tiny_piano(CFG).save_pretrained(home / "model")
    save_audio(home / "mine.wav", sound(0, 1))
    takes(home / "music", 12)
    takes(home / "real", 6, shortest=4.1)
    prepared(home / "store")
    (home / "whole").mkdir()
    for name in COMMANDS:
        shutil.rmtree(home / "whole/store", ignore_errors=True)
        code, told = ran(name, home, home / "whole")
        assert code == 0, told
    return home


def ran(name: str, home: Path, out: Path, **how: Any) -> tuple[int, str]:
    """The exit code of a command, and what it printed."""
    process, told = begun(name, home, out, **how)
    process.join()
    return process.exitcode, told.read_text()


def begun(name: str, home: Path, out: Path, jumps: float = 0) -> tuple[Any, Path]:
    """A command at work, as the leader of a group of processes, and the file that gets what it prints."""
    told = home / "told"
    told.unlink(missing_ok=True)
    words = shlex.split(COMMANDS[name].format(home=home, out=out))
    process = PROCESSES.Process(target=as_command, args=(words, told, jumps))
    process.start()
    wait(lambda: told.exists() or not process.is_alive())
    return process, told


def lines(told: str) -> list[str]:
    """What was printed, without bars."""
    bars = r"\d(it|block|step|clip)|\|"
    return [line for line in re.split(r"[\r\n]+", told) if line.strip() and not re.search(bars, line)]


def check_whole(home: Path, out: Path, early: bool = False) -> None:
    """What a command left is whole: what it wrote, or what was there before. Music may end `early`."""
    assert not [path for path in out.rglob("*") if re.search(r"\.(part|tmp|partial|old)$", path.name)]
    for path in out.glob("new.*"):
        if path.suffix in (".flac", ".wav", ".png") and path.read_bytes() != OLD.encode() and not early:
            assert path.read_bytes() == (home / "whole" / path.name).read_bytes()
    if (out / "new.json").exists():
        figures(out / "new.json")
    if (out / "new.html").exists():
        assert (out / "new.html").read_text().rstrip().endswith(("</html>", OLD))
    if (out / "run/checkpoint.safetensors").exists():
        load_checkpoint(out / "run/checkpoint.safetensors")
    if (out / "run/model").exists():
        load_model(out / "run/model")


def check_same(name: str, home: Path, out: Path) -> None:
    """What a command wrote is what it writes where nothing disturbs it."""
    whole = home / "whole"
    check_whole(home, out)
    if name.startswith("prepare"):
        assert_same_store(out / "store", whole / "store", 12)
    elif name == "train":
        assert_same_training(out / "run", whole / "run")
        for sample in (whole / "run/samples").iterdir():
            assert sample.read_bytes() == (out / "run/samples" / sample.name).read_bytes(), sample
    elif name == "evaluate":
        mine, theirs = (figures(folder / "new.json") | {"seconds": 0} for folder in (out, whole))
        assert mine == theirs
    else:
        assert all(path.read_bytes() != OLD.encode() for path in out.iterdir())


def assert_same_training(run: Path, other: Path) -> None:
    """But for the log's rows between validations: a run that is stopped writes one."""
    (tensors, _), (others, _) = (load_checkpoint(r / "checkpoint.safetensors") for r in (run, other))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert (run / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    mine, theirs = ([(row["images"], row["val_1"]) for row in rows(r) if row["val_1"]] for r in (run, other))
    assert mine == theirs and len(mine) == 3


def as_before(name: str, out: Path) -> None:
    """An empty folder, but for what the command will replace."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    endings = {"generate": ("flac", "png"), "continue": ("wav",), "evaluate": ("html",)}
    for ending in endings.get(name, ()):
        (out / f"new.{ending}").write_text(OLD)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    (folder := tmp_path / "disk").mkdir()
    if not as_root("mount", "-t", "tmpfs", "-o", f"size=4m,uid={os.getuid()}", "tmpfs", folder):
        pytest.skip("no file system may be mounted here")
    yield folder
    assert as_root("umount", "-l", folder)


def as_root(*words: object) -> bool:
    """Whether the system lets us run that."""
    with suppress(FileNotFoundError):
        command = [*map(str, words)]
        return any(subprocess.run([*sudo, *command], capture_output=True).returncode == 0
                   for sudo in ([], ["sudo", "-n"]))
    return False


@pytest.mark.parametrize("name", WRITING)
def test_a_disk_that_is_full_at_any_point(tmp_path, home, disk, name):
    """It has room for a part of what a command writes, and then for all: the command goes on."""
    out, ballast = disk / "out", disk / "ballast"
    as_before(name, out)
    empty = free(disk)
    assert ran(name, home, out)[0] == 0
    needed = empty - free(disk)
    for point in range(TRIES[name]):
        as_before(name, out)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free(disk) - int(needed * (point + 0.5) / TRIES[name]) // 4096 * 4096)
        code, told = ran(name, home, out)
        last = lines(told)[-1]
        assert code == 2 and re.match(rf"pianodiff: .*{disk}", last), (point, told)
        assert re.search("make room|choose another|give another", last), told
        assert "Traceback" not in told and "xception" not in told, told
        check_whole(home, out)
        ballast.unlink()
        code, told = ran(name, home, out)
        assert code == 0 and "Zarr" not in told, told
        check_same(name, home, out)


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_bsize


@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_can_only_be_read(tmp_path, home, disk, name):
    """Where nothing is yet, where something is, and below a file."""
    out = disk / "out"
    as_before(name, out)
    (disk / "file").write_text(OLD)
    assert as_root("mount", "-o", "remount,ro", disk)
    check_refused(name, home, out)
    check_refused(name, home, disk / "file")
    if name in ("prepare", "train"):
        assert as_root("mount", "-o", "remount,rw", disk)
        assert ran(name, home, out)[0] == 0
        assert as_root("mount", "-o", "remount,ro", disk)
        check_refused(name, home, out)
        check_same(name, home, out)


def check_refused(name: str, home: Path, out: Path) -> None:
    code, told = ran(name, home, out)
    assert code == 2 and re.match(rf"pianodiff: .*{out}", lines(told)[-1]), told
    assert re.search("make it first|choose another|give another", lines(told)[-1]), told
    assert "Traceback" not in told and "xception" not in told, told


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_interrupted_at_any_moment(tmp_path, home, name):
    """All its processes get the signal, as from a terminal. It says so in two lines at most, and goes on when asked."""
    out, moments = tmp_path / "out", random.Random(0)
    as_before(name, out)
    begin = time.monotonic()
    assert ran(name, home, out)[0] == 0
    longest = time.monotonic() - begin
    as_before(name, out)
    numbers = count()
    for _ in range(TRIES[name]):
        code = 0
        while code == 0:
            sent = (signal.SIGINT, signal.SIGTERM)[next(numbers) % 2]
            process, told = begun(name, home, out)
            process.join(moments.uniform(0, longest))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            process.join()
            code = process.exitcode
            longest *= 1.1 if code else 0.8
            if code == 0:
                check_same(name, home, out)
                as_before(name, out)
        wait(partial(group_is_gone, process.pid), 300)
        check_interrupted(name, told.read_text(), code, sent)
        check_whole(home, out, early=True)
    assert ran(name, home, out)[0] == 0
    check_same(name, home, out)


def check_interrupted(name: str, told: str, code: int, sent: int) -> None:
    """By 130, or 128 and the signal in a training. Before the work and after it, the process ends in silence."""
    assert code in (130, -sent, -signal.SIGINT, 128 + sent if name == "train" else 130), told
    assert "Traceback" not in told and "xception" not in told, told
    said = [line for line in lines(told) if re.search("interrupted|stop|kept", line)]
    assert len(said) <= 3, told


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_is_imported(tmp_path, home, sent):
    """What Python says of a signal in its first moments isn't ours, nor that torch may abort at its start."""
    words = shlex.split(COMMANDS["generate"].format(home=home, out=tmp_path))
    for moment in np.linspace(0, 0.9, 10):
        process = subprocess.Popen([sys.executable, "-m", "pianodiff", *words], stderr=subprocess.PIPE, text=True)
        time.sleep(moment)
        process.send_signal(sent)
        said = process.communicate()[1].replace("pianodiff: interrupted\n", "")
        if "pybind11" not in said and "import_site" not in said:
            assert "pianodiff" not in said, said
            assert process.returncode in (130, -signal.SIGINT, -sent) or "Traceback" in said, said
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["generate", "prepare", "train"])
def test_a_clock_that_jumps(tmp_path, home, name):
    """Back by a year and forth again, and forth by a day and back."""
    for jumps in (-365 * 86_400, 86_400):
        (out := tmp_path / str(jumps)).mkdir()
        code, told = ran(name, home, out, jumps=jumps)
        assert code == 0, told
        check_same(name, home, out)
        if name == "train":
            times = [float(row["seconds"]) for row in rows(out / "run")]
            assert times == sorted(times) and 0 < times[0] and times[-1] < 3600
            assert all(float(row["images_per_second"]) > 0 for row in rows(out / "run"))


@pytest.mark.parametrize("jumps", [-365 * 86_400, 86_400])
def test_a_cache_when_the_clock_has_jumped(tmp_path, jumps):
    """It stays within its size, and gives what it was given."""
    cache, size = Cache(tmp_path / "cache", 0.1), 200_000
    keys = [key for key in map(str, range(4000)) if cache._path(key).parent.name == "00"]
    assert len(keys) * size > 2 * cache.share
    for number, key in enumerate(keys):
        cache.put(key, data := number.to_bytes(4) * (size // 4))
        assert cache.get(key) == data
        then = time.time() + jumps * (number % 2)
        os.utime(cache._path(key), (then, then))
        assert sum(path.stat().st_size for path in (tmp_path / "cache/00").iterdir()) <= cache.share
