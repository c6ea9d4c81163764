"""Damaged files of every kind that people bring, by the thousand: `python tests/fuzz.py 100000` tries so many.

A case is a number: it chooses a kind of file, an example of it, and how that is damaged. It is fine if the file is
read, or refused in one line. Cases run in processes of their own, where a crash, a hang or a growing memory is seen.
`python tests/fuzz.py 300 0 commands` hands damaged files to the command, and `... 200 0 midi` to FluidSynth.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: threads do not outlive a fork
SECONDS, MEGABYTES = 60, 1500  # that one case may take; the memory is beside what PyTorch has taken
REFUSALS = (ValueError, FileNotFoundError, OSError)
Examples = dict[str, bytes]


FORMATS = {"WAV": "PCM_16 FLOAT MS_ADPCM GSM610", "RF64": "PCM_16", "W64": "PCM_24", "AIFF": "PCM_16 FLOAT",
           "CAF": "PCM_16 ALAC_16", "AU": "ULAW", "FLAC": "PCM_16", "OGG": "VORBIS OPUS", "MP3": "MPEG_LAYER_III"}


def once(make: Callable) -> Callable:
    kept: list = []
    return lambda: kept[0] if kept else kept.append(make()) or kept[0]


def sounds() -> Examples:
    """A fifth of a second in each format, mono and stereo."""
    wave = np.sin(np.arange(1600) / 7)[:, None] * (0.5, 0.25)
    found: Examples = {}
    for name, subtypes in FORMATS.items():
        for subtype in subtypes.split():
            for channels in (1, 2):
                data = io.BytesIO()
                try:
                    soundfile.write(data, wave[:, :channels], 8000, subtype, format=name)
                except soundfile.LibsndfileError:
                    continue  # GSM has no stereo
                found[f"{name} {subtype} {channels}"] = data.getvalue()
    return found


def midis() -> Examples:
    """Two notes: in one track, and with a tempo in a track of its own."""
    notes = bytes([0, 0x90, 60, 90, 96, 0x90, 67, 90, 96, 0x80, 60, 0, 0, 0x80, 67, 0, 0, 0xFF, 0x2F, 0])
    tempo = bytes([0, 0xFF, 0x51, 3, 7, 0xA1, 0x20, 0, 0xFF, 0x2F, 0])

    def file(*tracks: bytes) -> bytes:
        head = b"MThd" + struct.pack(">IHHH", 6, len(tracks) > 1, len(tracks), 96)
        return head + b"".join(b"MTrk" + struct.pack(">I", len(track)) + track for track in tracks)

    return {"one track": file(notes), "two tracks": file(tempo, notes)}


def indexes() -> Examples:
    """MAESTRO's index, as CSV, as JSON of columns and of rows."""
    rows = [{"canonical_composer": "Bach", "canonical_title": name, "split": split, "year": 2018,
             "audio_filename": f"{name}.wav", "midi_filename": f"{name}.midi", "duration": 12.5}
            for name, split in (("a", "train"), ("b", "validation"), ("ü", "test"))]
    table = ",".join(rows[0]) + "\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    columns = {key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]}
    return {"index.csv": table.encode(), "maestro-v3.json": json.dumps(columns).encode(),
            "index.json": json.dumps(rows).encode()}


def zips() -> Examples:
    """A folder of three sounds and an index, stored and compressed."""
    found: Examples = {}
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", method) as archive:
            archive.writestr("music/index.csv", indexes()["index.csv"])
            for sound in "abü":
                archive.writestr(f"music/{sound}.wav", sounds()["WAV PCM_16 1"])
        found[name] = data.getvalue()
    return found


EXTREMES = [b"\0", b"\xff", b"\x7f\xff\xff\xff",
            b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0", b"\xff" * 8, b"\0" * 8,
            b"\n", b'"', b"../../etc/passwd", b"[" * 2000, b"9" * 400, "\u2028é".encode(), b"\xff\xfe"]


def damaged(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, extremes, pieces cut, doubled, moved, or taken from another file."""
    for _ in range(draw.randint(1, 4)):
        at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        if draw.random() < 0.5:  # most that can go wrong stands in the first bytes
            at, to = min(at, draw.randrange(64)), min(to, at + draw.randrange(64))
        change = draw.randrange(7)
        if change == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif change == 1:
            extreme = draw.choice(EXTREMES)
            data = data[:at] + extreme + data[at + len(extreme) :]
        elif change == 2:
            data = data[:at] + draw.choice(EXTREMES) + data[at:]
        elif change == 3:
            data = data[:at]
        elif change == 4:
            data = data[:at] + data[to:]
        elif change == 5:
            data = data[:to] + data[at:]
        else:
            other = draw.choice(others)
            data = data[:at] + other[draw.randrange(len(other) + 1) :]
    return data


def read_sound(data: bytes, home: Path) -> None:
    from pianodiff.audio import load_audio

    load_audio(io.BytesIO(data))


def read_midi(data: bytes, home: Path) -> None:
    from pianodiff import recordings

    recordings._midi_seconds(data)


def read_index(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, home: Path) -> None:
        from pianodiff.recordings import find_recordings

        (home / name).write_bytes(data)
        (home / "a.wav").write_bytes(sounds_once()["WAV PCM_16 1"])
        find_recordings(home)

    return read


def read_zip(data: bytes, home: Path) -> None:
    from pianodiff.recordings import find_recordings, read_recording

    (home / "music.zip").write_bytes(data)
    for recording in find_recordings(home / "music.zip"):
        try:
            read_recording(recording, str(home / "music.zip"))
        except REFUSALS as error:
            told(error)


def read_model(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, home: Path) -> None:
        from pianodiff.model import load_model

        for other, content in models_once().items():
            (home / other).write_bytes(content)
        (home / name).write_bytes(data)
        load_model(home)

    return read


def read_store(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, home: Path) -> None:
        from pianodiff.data import BlockDataset

        shutil.copytree(store_once(), home / "store")
        (home / "store" / name).write_bytes(data)
        blocks = BlockDataset(home / "store", "train", random_offset=False)
        for index in range(len(blocks)):
            blocks.codes(index, 0)

    return read


@once
def sounds_once() -> Examples:
    return sounds()


@once
def models_once() -> Examples:
    from test_generate import tiny_piano

    with tempfile.TemporaryDirectory() as folder:
        tiny_piano().save_pretrained(f"{folder}/model")
        return {path.name: path.read_bytes() for path in Path(folder, "model").iterdir()}


@once
def store_once() -> Path:
    from test_recordings import CFG, sound

    from pianodiff.audio import save_audio
    from pianodiff.data import prepare

    home = Path(tempfile.mkdtemp())
    (home / "music").mkdir()
    for seed in range(4):
        save_audio(home / f"music/{seed}.wav", sound(seed, 0.5))
    prepare(home / "music", home / "store", CFG, jobs=1)
    return home / "store"


def kinds() -> dict[str, tuple[Callable[[bytes, Path], None], list[bytes]]]:
    """Each kind of file: what reads it, and examples."""
    from pianodiff.data import open_store

    found: dict[str, tuple[Callable[[bytes, Path], None], list[bytes]]] = {
        "sound": (read_sound, list(sounds_once().values())), "midi": (read_midi, list(midis().values())),
        "zip": (read_zip, list(zips().values()))}
    found |= {name: (read_index(name), [data]) for name, data in indexes().items()}
    found |= {name: (read_model(name), [data]) for name, data in models_once().items()}
    home = store_once()
    recording = next(r["id"] for r in open_store(home).recordings if r["split"] == "train")
    for path in [home / "zarr.json", *sorted(p for p in (home / recording).rglob("*") if p.is_file())]:
        name = str(path.relative_to(home))
        found[f"store: {name}"] = read_store(name), [path.read_bytes()]
    return found


# What only `midi` tries


def render(data: bytes, home: Path) -> None:
    """Play it: a minute at most, so that many can be tried."""
    from pianodiff import recordings

    recordings._LONGEST, recordings._RINGING = 1 / 60, 30
    wave = recordings.render_midi(data, SOUNDFONT)
    assert len(wave) < 8000 * 100 and bool(wave.isfinite().all())


SOUNDFONT = Path(__file__).resolve().parent.parent.parent / "shared/data/fluidr3-piano.sf2"


def rendered() -> dict[str, tuple[Callable[[bytes, Path], None], list[bytes]]]:
    return {"midi": (render, [*midis().values(), lively()])}


def lively() -> bytes:
    """A pedal, a program, a bend, words, a message to the device, and notes under a running status."""
    events = [b"\0\xc0\0", b"\0\xb0\x40\x7f", b"\0\xff\3\5piano", b"\0\xf0\5\x7e\x7f\x09\1\xf7", b"\0\xe0\0\x50",
              b"\0\xff\x51\3\7\xa1\x20", b"\0\x90\x30\x50"]
    notes = [bytes([24, 48 + n, 0, 0, 49 + n, 80]) for n in range(24)]
    track = b"".join([*events, *notes, b"\x18\x48\0", b"\x83\0\xb0\x40\0", b"\0\xff\x2f\0"])
    return b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk" + struct.pack(">I", len(track)) + track


# What only `commands` tries


def command(place: str, *line: str, beside: Callable[[], Path] | None = None) -> Callable[[bytes, Path], None]:
    """Run a command where the damaged file lies at `place`, in a copy of what `beside` gives."""

    def run(data: bytes, home: Path) -> None:
        from pianodiff.cli import main

        if beside:
            shutil.copytree(beside(), home, dirs_exist_ok=True)
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_bytes(data)
        os.chdir(home)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as screen:
            code = main(line)
        lines = [line for line in screen.getvalue().replace("\r", "\n").splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("pianodiff: ")]
        if code not in (0, 2) or len(ours) != code // 2 or code and lines[-1] not in ours:
            raise AssertionError(f"exit code {code}, {lines[-3:]}")
        assert "Traceback" not in screen.getvalue(), screen.getvalue()[-300:]
        if code:
            raise ValueError(ours[0])

    return run


@once
def workplace() -> Path:
    """A folder with music, a store, a model and a run of four steps."""
    from test_generate import tiny_piano
    from test_recordings import CFG
    from test_train import CONFIG

    from pianodiff import train
    from pianodiff.audio import SPECTROGRAMS

    SPECTROGRAMS["nano"] = CFG  # blocks of an eighth of a second
    few, train_as_asked = replace(CONFIG, images=16, eval_blocks=2, eval_images=16), train.train
    train.train = lambda store, run, config, **how: train_as_asked(store, run, few, **how)
    home = Path(tempfile.mkdtemp())
    shutil.copytree(store_once().parent, home, dirs_exist_ok=True)
    tiny_piano().save_pretrained(home / "model")
    train.train(home / "store", home / "run", None)
    return home


def commands() -> dict[str, tuple[Callable[[bytes, Path], None], list[bytes]]]:
    home, sound = workplace(), list(sounds_once().values())
    if SOUNDFONT.is_file():
        os.environ["PIANODIFF_SOUNDFONT"] = str(SOUNDFONT)
    prepare = "prepare", "music", "new", "--jobs", "1"
    found = {f"prepare: {name}": (command(f"music/{name}", *prepare, beside=workplace), some) for name, some in (
        ("z.wav", sound), ("z.mid", [lively()]), *((name, [data]) for name, data in indexes().items()))}
    found["prepare: zip"] = command("z.zip", "prepare", "z.zip", "new", "--jobs", "1"), list(zips().values())
    found["info: sound"] = command("z.wav", "info", "z.wav"), sound
    found["continue"] = command("z.wav", "continue", "z.wav", "-m", "model", "-n", "1", "-s", "0.25", "--seed", "1",
                                beside=workplace), sound
    for folder, line in (("model", "info model"), ("store", "info store"), ("store", "train store other"),
                         ("run", "train store run --images 32")):
        for path in sorted(path for path in (home / folder).rglob("*") if path.is_file()):
            name = str(path.relative_to(home))
            if folder != "run" or path.parent == home / "run":
                found[f"{line}: {name}"] = command(name, *line.split(), beside=workplace), [path.read_bytes()]
    return found


def told(error: BaseException) -> None:
    """Raise AssertionError for a refusal that is no single line."""
    if not str(error).strip() or "\n" in str(error):
        raise AssertionError(f"not one line: {error!r}") from error


def tried(number: int) -> str:
    """The kind of a case, and whether it was read or refused. Raises whatever is neither."""
    draw = random.Random(number)
    kind = draw.choice(sorted(kinds_once()))
    read, examples = kinds_once()[kind]
    everything = [data for _, some in kinds_once().values() for data in some]
    data = damaged(draw.choice(examples), everything, draw)
    with tempfile.TemporaryDirectory() as home:
        signal.alarm(SECONDS)
        try:
            read(data, Path(home))
            return f"{kind}: read"
        except REFUSALS as error:
            told(error)
            return f"{kind}: refused"
        finally:
            signal.alarm(0)


@once
def kinds_once() -> dict:
    return WAYS[way]()


WAYS = {"files": kinds, "commands": commands, "midi": rendered}
way = "files"


def worker(first: int, count: int, report: int) -> None:
    """Tries cases; each line of the report is a case, and what came of it."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    kinds_once()
    resource.setrlimit(resource.RLIMIT_AS, (used() + MEGABYTES * 2**20,) * 2)
    for number in range(first, first + count):
        os.write(report, f"{number}\n".encode())
        try:
            outcome = tried(number)
        except BaseException as error:
            outcome = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        os.write(report, f"{outcome}\n".encode())
    os._exit(0)


def used() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def outcomes(first: int, count: int, batch: int = 500) -> Iterator[tuple[int, str]]:
    """Each case's number and outcome; a crash is one, too."""
    kinds_once()  # before the fork: the children share it
    end = first + count
    while first < end:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            worker(first, min(batch, end - first), writer)
        os.close(writer)
        with open(reader) as lines:
            number = None
            for line in lines:
                if number is None:
                    number = int(line)
                else:
                    yield number, line.strip()
                    first, number = number + 1, None
        _, status = os.waitpid(child, 0)
        if number is not None:  # it died there
            yield number, f"FAILED: the process ended with {os.waitstatus_to_exitcode(status)}"
            first = number + 1


def main(count: int, first: int = 0, chosen: str = "files") -> int:
    global way
    way = chosen
    begin, found, bad = time.monotonic(), Counter(), 0
    for number, outcome in outcomes(first, count):
        found[outcome if not outcome.startswith("FAILED") else "failed"] += 1
        if outcome.startswith("FAILED"):
            bad += 1
            print(f"{number}: {outcome}", flush=True)
    for outcome, times in sorted(found.items()):
        print(f"{outcome:32} {times:7,}")
    print(f"{count:,} cases from {first}, {bad} failed, in {time.monotonic() - begin:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]))
