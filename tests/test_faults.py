"""Kills, runs at the same time, and unreliable networks: the store and the weights are as if nothing had happened."""

import http.client
import http.server
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from chapters import PROCESSES
from test_data import Handler
from test_recordings import CFG, sound
from test_train import CONFIG, assert_same_end, chords

from pianodiff.audio import save_audio
from pianodiff.data import BlockDataset, open_store, prepare
from pianodiff.files import Cache
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
