"""What `prepare` takes and survives: layouts, places, clusters, interruptions, damage; and the blocks that come out."""

import errno
import functools
import http.server
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch
import zarr
from test_recordings import CFG, SECONDS, SOUNDFONT, SPLIT, maestro, sound, write_index, zipped
from torch.utils.data import DataLoader

from pianodiff.audio import SpectrogramConfig, load_audio, normalize_peak, save_audio, to_spectrogram
from pianodiff.cli import main
from pianodiff.data import BlockDataset, _collect, _prepare_one, _run, _Stage, open_store, prepare
from pianodiff.files import Cache
from pianodiff.recordings import SPLITS, Recording, find_recordings, read_recording, room_response

BLOCKS = {"train": 3 + 5, "validation": 3, "test": 2}
IDS = {f"2004--{name}.wav" for name in SPLIT}


def contents(store: Path | str) -> dict[str, tuple]:
    """All that a store says and holds, but for the name of its source."""
    group = zarr.open_group(str(store) if "://" in str(store) else Path(store), mode="r")
    about = {key: value for key, value in group.attrs.asdict().items() if key != "source"}
    return {"": about} | {name: (array.attrs.asdict(), array[:].tolist()) for name, array in group.arrays()}


def mtimes(store: Path, names: set[str]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for name in names for path in (store / name).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    return maestro(tmp_path_factory.mktemp("data") / "music")


@pytest.fixture(scope="module")
def store(music, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    prepare(music, path, CFG, jobs=1)
    return path


@pytest.fixture
def mine(store, tmp_path) -> Path:
    """A copy of the store, to be spoilt."""
    return shutil.copytree(store, tmp_path / "mine")


# Layouts

@pytest.mark.parametrize("kind", ["csv", "json", "rows"])
@pytest.mark.parametrize("inside", [None, "", "maestro-v9/data"], ids=["folder", "zip", "folder in a zip"])
def test_maestros_layout(kind, inside, store, tmp_path):
    source = maestro(tmp_path / "music", kind)
    if inside is not None:
        source = zipped(source, tmp_path / "music.zip", inside)
    found = find_recordings(source)
    assert {r.path for r in found} == {str(Path(inside or "", f"2004/{name}.wav")) for name in SPLIT}
    assert [(r.split, r.title, r.duration) for r in found] == [
        (SPLIT[name], f"Somebody: piece {name}", SECONDS[name]) for name in SPLIT]
    report = prepare(source, tmp_path / "store", CFG, jobs=1)
    assert (report["recordings"], report["new"], report["skipped"]) == (4, 4, {})
    if not inside:    # which is part of the names
        assert contents(tmp_path / "store") == contents(store)


def test_what_a_store_holds(music, store, tmp_path):
    info = open_store(store)
    assert (info.cfg, info.source, {r["id"] for r in info.recordings}) == (CFG, "music", IDS)
    waves = {name: normalize_peak(load_audio(music / f"2004/{name}.wav"))[0] for name in SPLIT}
    specs = {name: to_spectrogram(wave, CFG) for name, wave in waves.items()}
    group = zarr.open_group(str(store), mode="r")
    for name, spec in specs.items():
        array = group[f"2004--{name}.wav"]
        assert array.dtype == np.uint8 and array.shape == (round(SECONDS[name] * 250), 32)
        assert np.abs(array[:].T / 255 - spec.numpy()).max() < 0.5001 / 255
    train = np.concatenate([group[f"2004--{name}.wav"][:] / 255 for name in "ab"])
    assert info.mean == pytest.approx(train.mean(), abs=1e-9) and info.std == pytest.approx(train.std(), abs=1e-9)
    assert {split: 3600 * hours for split, hours in info.hours.items()} == pytest.approx(
        {"train": 1.2, "validation": 0.4, "test": 0.3})
    again = prepare(music, store, CFG, jobs=1)
    assert again["new"] == 0 and again["hours"] == info.hours
    assert again["bytes"] == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def test_a_plain_folder_is_split_by_file(tmp_path, capsys):
    (tmp_path / "music/deeper").mkdir(parents=True)
    for seed in range(11):
        save_audio(tmp_path / f"music/{'deeper/' * (seed % 2)}{seed}.{['wav', 'flac'][seed % 2]}", sound(seed, 0.2))
    (tmp_path / "music/0.mid").write_bytes(b"the notes of 0.wav")
    (tmp_path / "music/notes.txt").write_text("no music")
    (tmp_path / "music/.hidden.wav").write_text("no music")
    (tmp_path / "music/opus.csv").write_text("opus,key\n1,C\n")
    (tmp_path / "music/list.json").write_text("[1, 2]")
    report = prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)
    assert (report["recordings"], report["skipped"]) == (11, {})
    assert "11 recordings and no index: the files' names decide the splits\n" in capsys.readouterr().err
    counts = {split: len(open_store(tmp_path / "store").of(split)) for split in SPLITS}
    assert counts == {"train": 9, "validation": 1, "test": 1}
    moved = shutil.copytree(tmp_path / "music/deeper", tmp_path / "moved/elsewhere").parent
    shutil.copytree(tmp_path / "music", moved / "music", ignore=shutil.ignore_patterns("deeper"))
    by_name = [{Path(r.path).name: r.split for r in find_recordings(place)} for place in (tmp_path / "music", moved)]
    assert by_name[0] == by_name[1]


def test_a_store_may_lie_in_the_folder_that_it_is_made_of(tmp_path):
    save_audio(tmp_path / "a.wav", sound(0, 0.2))
    assert [prepare(tmp_path, tmp_path / "store", CFG, jobs=1)["new"] for _ in range(2)] == [1, 0]


def test_names_in_any_script_and_of_any_length(tmp_path):
    names = ["Für Elise – живая запись.wav", "演" * 80 + ".wav", "演" * 79 + "奏.wav", "__a b%20c#?.wav"]
    (tmp_path / "音楽").mkdir()
    for seed, name in enumerate(names):
        save_audio(tmp_path / "音楽" / name, sound(seed, 0.2))
    assert prepare(tmp_path / "音楽", tmp_path / "store", CFG, jobs=1)["recordings"] == 4
    assert len(BlockDataset(tmp_path / "store", "train", random_offset=False)) == 2 * 1


NAMES = ["my song.wav", "été.wav", "50% #1?.wav", "a::b.wav", "a%20b.wav", "x/y.wav", "x--y.wav", "[1]*&'.wav"]


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of recordings with such names, and the store that is made of it."""
    music = tmp_path_factory.mktemp("odd") / "music"
    for seed, name in enumerate(NAMES):
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        save_audio(music / name, sound(seed, 0.2))
    prepare(music, music.parent / "store", CFG, jobs=1)
    return music, music.parent / "store"


def test_odd_names_in_folders_and_zip_files(odd_names, tmp_path):
    music, store = odd_names
    assert {r["title"] for r in open_store(store).recordings} == {Path(name).stem for name in NAMES}
    assert len(os.listdir(store)) == len(NAMES) + 1
    (tmp_path / "::50% #1").mkdir()
    place = tmp_path / "::50% #1"
    shutil.copytree(music, place / "music.zip")    # a folder, whatever its name says
    sources = {place / "music.zip": place / "store::1", zipped(music, place / "odd names.zip"): place / "store 2%20#"}
    for source, made in sources.items():
        for new in (len(NAMES), 0):
            assert prepare(source, made, CFG, jobs=1)["new"] == new
        assert contents(made) == contents(store)
        for split in open_store(made).hours:
            assert len(list(BlockDataset(made, split, random_offset=False)))


def test_names_that_are_not_utf_8(tmp_path, monkeypatch):
    music = os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcsic")
    os.makedirs(music)
    for seed, name in enumerate([b"\xe9tude.wav", b"b.wav", "\u00e9.wav".encode()]):
        save_audio(tmp_path / "a.wav", sound(seed, 0.2))
        shutil.move(tmp_path / "a.wav", os.fsdecode(os.fsencode(music) + b"/" + name))
    store = os.fsdecode(os.fsencode(tmp_path) + b"/st\xf6re")
    for new in (3, 0):
        assert prepare(music, store, CFG, jobs=1)["new"] == new
    assert {r["id"] for r in open_store(store).recordings} == {"%E9tude.wav", "b.wav", "%C3%A9.wav"}
    assert {r["title"] for r in open_store(store).recordings} == {"\ufffdtude", "b", "\u00e9"}
    for split in open_store(store).hours:
        BlockDataset(store, split, random_offset=False, in_memory=True)


def test_what_desktops_leave_behind(music, store, tmp_path):
    mine = tmp_path / "store"
    mine.mkdir()
    strays = [".DS_Store", "Thumbs.db", "desktop.ini", "._zarr.json"]
    for name in strays:
        (mine / name).write_bytes(b"")
    for new in (4, 0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert prepare(music, mine, CFG, jobs=1)["new"] == new
        for name in strays:
            (mine / "2004--a.wav" / name).write_bytes(b"")
            (mine / "2004--a.wav/c" / name).write_bytes(b"")
    for name in strays:
        (mine / name).unlink()
    assert contents(mine) == contents(store)


def test_another_sample_rate(music, tmp_path):
    cfg = SpectrogramConfig(sample_rate=16000, n_fft=64, hop_length=32, n_frames=32)
    prepare(music, tmp_path / "store", cfg, jobs=1)
    assert 3600 * open_store(tmp_path / "store").hours["train"] == pytest.approx(1.2)


def test_some_splits_first_and_the_others_later(music, store, tmp_path):
    first = prepare(music, tmp_path / "mine", CFG, jobs=1, splits="train")
    assert first["hours"].keys() == {"train"} and first["recordings"] == 2
    with pytest.raises(ValueError, match="'test'; prepare that split too"):
        BlockDataset(tmp_path / "mine", "test", random_offset=False)
    kept = mtimes(tmp_path / "mine", {"2004--a.wav", "2004--b.wav"})
    rest = prepare(music, tmp_path / "mine", CFG, jobs=1, splits=["test", "validation"])
    assert (rest["recordings"], rest["new"]) == (4, 2)
    assert mtimes(tmp_path / "mine", {"2004--a.wav", "2004--b.wav"}) == kept
    assert contents(tmp_path / "mine") == contents(store)


def test_a_changed_index_moves_what_is_finished(mine, tmp_path):
    source = maestro(tmp_path / "music")
    write_index(source, SPLIT | {"b": "test"})
    assert prepare(source, mine, CFG, jobs=1)["new"] == 0
    assert [r["id"] for r in open_store(mine).of("test")] == ["2004--b.wav", "2004--d.wav"]
    assert open_store(mine).mean == pytest.approx(zarr.open_group(mine)["2004--a.wav"][:].mean() / 255)


# Pianos and rooms

def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_one_piano_and_no_room_leave_no_trace(music, store, tmp_path):
    prepare(music, tmp_path / "store", CFG, jobs=1, soundfont=[tmp_path / "any.sf2"], rooms=["dry"], seed=5)
    assert files(tmp_path / "store") == files(store)


@pytest.fixture(scope="module")
def takes(tmp_path_factory) -> Path:
    """A folder of twelve short recordings."""
    folder = tmp_path_factory.mktemp("takes") / "music"
    folder.mkdir()
    for seed in range(12):
        save_audio(folder / f"{seed:02}.wav", sound(seed, 0.3))
    return folder


def test_rooms(takes, tmp_path, capsys):
    how = {"rooms": ["dry", "studio", "church"], "seed": 3}
    prepare(takes, tmp_path / "whole", CFG, jobs=1, **how)
    rooms = {r["id"]: tuple(r.get("room", (0, 0))) for r in open_store(tmp_path / "whole").recordings}
    assert {seconds for _, seconds in rooms.values()} == {0, 0.4, 4} and len(set(rooms.values())) == 3
    dry = prepare(takes, tmp_path / "dry", CFG, jobs=1) and contents(tmp_path / "dry")
    wet = contents(tmp_path / "whole")
    assert all((wet[name] == dry[name]) == (room == (0, 0)) for name, room in rooms.items())
    assert all(wet[name][0].get("room", [0, 0]) == list(room) for name, room in rooms.items())

    some = shutil.copytree(takes, tmp_path / "some/music")    # the choice doesn't depend on what else there is
    for seed in range(0, 12, 2):
        (some / f"{seed:02}.wav").unlink()
    prepare(some, tmp_path / "parts", CFG, jobs=1, **how)
    assert "before" not in capsys.readouterr().err
    assert prepare(takes, tmp_path / "parts", CFG, jobs=1, **how)["new"] == 6
    assert files(tmp_path / "parts")["zarr.json"] == files(tmp_path / "whole")["zarr.json"]
    assert "before" not in capsys.readouterr().err

    blocks = {split: BlockDataset(tmp_path / "whole", split, random_offset=False) for split in SPLITS}
    for split, data in blocks.items():
        expected = [rooms[r["id"]] for r in data.info.of(split) for _ in range(2)]    # two blocks each
        assert [data.stage(i)[:2] for i in range(len(data))] == expected
        with pytest.raises(IndexError):
            data.stage(len(data))
    assert main(["info", str(tmp_path / "whole")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rooms")]
    for told, seconds in {"dry": 0, "0.4 s (30% wet)": 0.4, "4 s (60% wet)": 4}.items():
        assert f"{told} {sum(room[1] == seconds for room in rooms.values())}" in row


def test_pianos(tmp_path, monkeypatch, capsys):
    """Each soundfont plays a tone of its own here."""
    fonts = [tmp_path / f"{name}.sf2" for name in ("steinway", "bechstein")]
    for font in fonts:
        font.write_bytes(SOUNDFONT)
    (tmp_path / "music").mkdir()
    for i in range(12):
        (tmp_path / f"music/{i:02}.mid").write_bytes(b"MThd")
    save_audio(tmp_path / "music/recorded.wav", sound(0, 0.3))

    def read(recording: Recording, source: str, rate: int, soundfont: str | None) -> torch.Tensor:
        assert (soundfont is None) == (not recording.is_midi)
        return sound(len(Path(soundfont or "").stem), 0.3)

    monkeypatch.setattr("pianodiff.data.read_recording", read)
    prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1, soundfont=fonts, seed=1)
    group = zarr.open_group(tmp_path / "store", mode="r")
    pianos = {r["id"]: r.get("piano") for r in open_store(tmp_path / "store").recordings}
    assert set(pianos.values()) == {"steinway", "bechstein", None} and pianos["recorded.wav"] is None
    for name in ("steinway", "bechstein"):
        ids = [id for id, piano in pianos.items() if piano == name]
        expected = to_spectrogram(normalize_peak(sound(len(name), 0.3))[0], CFG)
        assert all(np.abs(group[id][:].T / 255 - expected.numpy()).max() < 0.5001 / 255 for id in ids)
        assert main(["info", str(tmp_path / "store")]) == 0
        assert f"{name} {len(ids)}" in capsys.readouterr().out
    info, data = open_store(tmp_path / "store"), BlockDataset(tmp_path / "store", "train", random_offset=False)
    noted = [r["piano"] for r in info.recordings if "piano" in r]
    assert info.piano == max(sorted(set(noted)), key=noted.count)    # all are equally long
    assert [data.stage(i)[2] for i in range(len(data))] == [
        r.get("piano") != info.piano for r in info.of("train") for _ in range(len(data) // len(info.of("train")))]
    before = files(tmp_path / "store")
    for soundfont, rooms, told in [(fonts, "dry", ""), (fonts[0], "dry", "12 recordings kept as prepared before, with"),
                                   (fonts, "hall", "13 recordings kept")]:
        how = {"soundfont": soundfont, "rooms": rooms, "seed": 1}
        assert prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1, **how)["new"] == 0
        assert files(tmp_path / "store") == before
        err = capsys.readouterr().err
        assert told in err and ("kept" in err) == bool(told)


def test_a_negative_seed_is_refused(music, tmp_path, capsys):
    assert main(["prepare", str(music), str(tmp_path / "store"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err.endswith("pianodiff: --seed must be 0 or more, not -1\n")
    assert not (tmp_path / "store").exists()


# Interruptions

SCRIPT = """
import sys
from pianodiff.audio import SpectrogramConfig
from pianodiff.data import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], SpectrogramConfig(n_fft=64, hop_length=32, n_frames=32), jobs=2)
"""


def finished(store: Path) -> set[str]:
    return {path.parent.name for path in store.glob("*/zarr.json") if "histogram" in path.read_text()}


def wait(until, seconds: float = 3600) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.long),
                                 pytest.param(signal.SIGINT, id="Ctrl-C")])
def test_an_interrupted_run_goes_on(how, tmp_path):
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/000.wav", sound(0, 1.5))
    for i in range(1, 120):
        os.link(tmp_path / "music/000.wav", tmp_path / f"music/{i:03}.wav")
    (tmp_path / "script.py").write_text(SCRIPT)
    store = tmp_path / "store"
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "music"), str(store)]
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
        wait(lambda: len(finished(store)) >= 5 or process.poll() is not None)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)    # as a terminal does; the workers leave it to their parent
        else:
            process.kill()
        assert process.wait(timeout=3600) == -how, (tmp_path / "stderr").read_text()
    wait(lambda: group_is_gone(process.pid))    # no worker is left behind
    before = finished(store)
    assert 5 <= len(before) < 120
    for use in (open_store, lambda store: BlockDataset(store, "train", random_offset=False)):
        with pytest.raises(ValueError, match=r"half-written; run the same `pianodiff prepare` again"):
            use(store)
    half = before.pop()    # as if killed between its data and its attributes
    array = zarr.open_group(store)[half]
    codes, array[:] = array[:], 0
    array.attrs.put({})
    kept = mtimes(store, before)
    report = prepare(tmp_path / "music", store, CFG, jobs=1)
    assert (report["recordings"], report["new"]) == (120, 120 - len(before))
    assert mtimes(store, before) == kept
    arrays = dict(zarr.open_group(store, mode="r").arrays())
    assert len(arrays) == 120 and all(np.array_equal(array[:], codes) for array in arrays.values())
    assert open_store(store).mean == pytest.approx(codes.mean() / 255)


@contextmanager
def files_limited_to(size: int):
    """No file may grow beyond `size` bytes: writing fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk(tmp_path):
    (tmp_path / "music").mkdir()
    for name, seconds in [("a", 0.2), ("b", 4), ("c", 0.2)]:
        save_audio(tmp_path / f"music/{name}.wav", sound(0, seconds))
    full = r"store can't be written \(File too large\); what is finished is kept: .* run again"
    with files_limited_to(10_000), pytest.raises(OSError, match=full):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)
    kept = mtimes(tmp_path / "store", {"a.wav"})
    with pytest.raises(ValueError, match="half-written"):
        open_store(tmp_path / "store")
    assert prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)["new"] == 2
    assert kept and mtimes(tmp_path / "store", {"a.wav"}) == kept


def test_adding_to_a_store_leaves_it_usable_when_it_fails(mine, tmp_path):
    source = maestro(tmp_path / "music")
    save_audio(source / "2004/e.wav", sound(9, 4))
    write_index(source, SPLIT | {"e": "train"})
    before = contents(mine)[""]
    with files_limited_to(10_000), pytest.raises(OSError, match="what is finished is kept"):
        prepare(source, mine, CFG, jobs=1)
    assert contents(mine)[""] == before and len(BlockDataset(mine, "train", random_offset=False)) == BLOCKS["train"]
    assert prepare(source, mine, CFG, jobs=1)["new"] == 1
    assert len(BlockDataset(mine, "train", random_offset=False)) == BLOCKS["train"] + 31


def test_what_another_run_has_finished_is_left_alone(music, mine):
    kept = mtimes(mine, IDS)
    for recording in find_recordings(music):
        about = _prepare_one(recording, str(music), str(mine), CFG, _Stage())
        assert about == zarr.open_group(mine, mode="r")[recording.id].attrs.asdict()
    assert mtimes(mine, IDS) == kept


def test_what_another_run_adds_is_listed_too(music, store, tmp_path, monkeypatch):
    def meanwhile(*args):
        monkeypatch.undo()
        prepare(music, tmp_path / "store", CFG, jobs=1, splits="test")
        return _run(*args)

    monkeypatch.setattr("pianodiff.data._run", meanwhile)
    assert prepare(music, tmp_path / "store", CFG, jobs=1, splits=["train", "validation"])["recordings"] == 4
    assert contents(tmp_path / "store") == contents(store)


@pytest.mark.parametrize("durations, told", [([3600, 1800], "1.0/1.5 h"), ([3600, 0], "1/2 recordings"),
                                             ([9, 9], "1/2 recordings")])
def test_a_bar_counts_hours_where_there_are_some(durations, told, capsys):
    todo = [Recording(f"{i}.wav", "train", "", duration) for i, duration in enumerate(durations)]

    def results():
        yield todo[0], {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _collect(results(), todo)
    assert told in capsys.readouterr().err


def test_who_interrupts_is_told_how_to_go_on(music, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pianodiff.data._run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(music, tmp_path / "store", CFG, jobs=1)
    assert "what is finished is kept: run the same again, and it goes on" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(music, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file/store can't be written \(Not a directory\).* give another place"):
        prepare(music, tmp_path / "file/store", CFG, jobs=1)


def die(recording: object) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_workers_that_cannot_start_are_told_of(tmp_path, monkeypatch):
    """Their pipe breaks while the work is handed out, or after it."""
    def submit(pool, work, recording):
        raise BrokenPipeError

    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/a.wav", sound(0, 0.2))
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", submit)
    with pytest.raises(ChildProcessError, match="a worker process died"):
        prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=2)


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_url_of_a_folder_is_that_folder(scheme, tmp_path):
    (tmp_path / "my music").mkdir()
    save_audio(tmp_path / "my music/a.wav", sound(0, 0.2))
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        url = f"{scheme}://{tmp_path}/{name}"
        prepare(f"{scheme}://{tmp_path}/my music", url, CFG, jobs=1)
        assert open_store(url).recordings == open_store(tmp_path / name).recordings != ()
        assert len(BlockDataset(url, "train", random_offset=False))


@pytest.mark.parametrize("failure", [ImportError("Please install gcsfs"), RuntimeError("Unable to locate credentials")])
def test_a_place_that_cannot_be_reached(failure, tmp_path, monkeypatch):
    def url_to_fs(url, **how):
        if url.startswith("far"):
            raise failure
        return known(url, **how)

    known = fsspec.core.url_to_fs
    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/a.wav", sound(0, 0.2))
    with pytest.raises(ValueError, match=f"far://away can't be (reached|opened) .*{failure}.*; check the address"):
        prepare(tmp_path / "music", "far://away", CFG, jobs=1)
    with pytest.raises(ValueError, match="far://away can't be opened .*; check the address"):
        open_store("far://away")


def test_processes(music, store, tmp_path):
    prepare(music, tmp_path / "store", CFG, jobs=2)
    assert contents(tmp_path / "store") == contents(store)
    with pytest.raises(ChildProcessError, match="a worker process died, .*run again with fewer jobs"):
        list(_run(die, find_recordings(music)[:1], 2, None))


# Bad input

def test_bad_recordings_are_skipped_and_named(tmp_path):
    source = maestro(tmp_path / "music")
    folder = source / "2004"
    save_audio(folder / "silent.wav", torch.zeros(8000))
    save_audio(folder / "short.wav", sound(0, 0.1))
    good = (folder / "a.wav").read_bytes()
    (folder / "truncated.wav").write_bytes(good[: len(good) // 2])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not a sound, whatever its name says")
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan, np.float32), 8000, subtype="FLOAT")
    bad = {"silent": "silent", "short": "0.10 s, less than a block", "truncated": "truncated", "empty": "can't be read",
           "text": "can't be read", "nan": "NaN", "missing": "listed in the index, but missing"}
    write_index(source, SPLIT | dict.fromkeys(bad, "train"))
    report = prepare(source, tmp_path / "store", CFG, jobs=1)
    assert (report["recordings"], report["new"]) == (4, 4)
    assert report["skipped"].keys() == {f"2004/{name}.wav" for name in bad}
    assert all(reason in report["skipped"][f"2004/{name}.wav"] for name, reason in bad.items()), report
    assert {r["id"] for r in open_store(tmp_path / "store").recordings} == IDS

    write_index(source, dict.fromkeys(bad, "train"))
    with pytest.raises(ValueError, match=r"none of the 7 recordings in .*music can be used; 2004/\w+\.wav: "):
        prepare(source, tmp_path / "none", CFG, jobs=1)
    assert not (tmp_path / "none").exists()


def test_damaged_zip_files(music, tmp_path):
    whole = zipped(music, tmp_path / "whole.zip").read_bytes()
    for name, data in [("half.zip", whole[: len(whole) // 2]), ("empty.zip", b""), ("text.zip", b"no zip")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} can't be opened \(.*\); check the address, or copy it again"):
            prepare(tmp_path / name, tmp_path / "store", CFG, jobs=1)
    spoilt = bytearray(whole)
    spoilt[whole.index((music / "2004/b.wav").read_bytes()) + 1000] ^= 255
    (tmp_path / "spoilt.zip").write_bytes(spoilt)
    report = prepare(tmp_path / "spoilt.zip", tmp_path / "store", CFG, jobs=1)
    assert report["recordings"] == 3 and "it can't be read (Bad CRC-32" in report["skipped"]["2004/b.wav"]
    shutil.move(tmp_path / "spoilt.zip", tmp_path / "old.zip")
    (tmp_path / "spoilt.zip").write_bytes(whole)    # repaired, and looked at anew
    assert prepare(tmp_path / "spoilt.zip", tmp_path / "store", CFG, jobs=1)["new"] == 1


def test_sources_that_cannot_be_used(music, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, error, message in [
        (tmp_path / "gone", FileNotFoundError, "gone does not exist; give a folder, a zip file or a URL"),
        (tmp_path / "gone.zip", FileNotFoundError, "gone.zip does not exist"),
        ("nowhere://at/all", ValueError, "nowhere://at/all can't be opened .*not known"),
        (tmp_path / "empty", ValueError, "no index in MAESTRO's layout and no sound file"),
        (music / "maestro-v9.csv", ValueError, "maestro-v9.csv is one file; give the folder that it lies in"),
    ]:
        with pytest.raises(error, match=message):
            prepare(source, tmp_path / "store", CFG, jobs=1)
    with pytest.raises(ValueError, match="there is no split valid; choose of train, validation, test"):
        prepare(music, tmp_path / "store", CFG, jobs=1, splits=["train", "valid"])
    write_index(tmp_path / "empty", {"a": "train"})
    with pytest.raises(ValueError, match="no recordings of the splits test; choose others"):
        prepare(tmp_path / "empty", tmp_path / "store", CFG, jobs=1, splits=["test"])
    assert not (tmp_path / "store").exists()


def test_a_store_made_of_something_else_is_left_alone(music, mine, tmp_path):
    before = contents(mine)
    with pytest.raises(ValueError, match=r"mine was made with n_fft 64, not 512, hop_length 32, not 128.* another"):
        prepare(music, mine, SpectrogramConfig(), jobs=1)
    with pytest.raises(ValueError, match="was made with source music, not other; give another folder"):
        prepare(shutil.copytree(music, tmp_path / "other"), mine, CFG, jobs=1)
    assert contents(mine) == before


def test_another_source_of_the_same_name(mine, tmp_path):
    source = maestro(tmp_path / "music")
    write_index(source, {"b": "train", "x": "test"})
    before = contents(mine)
    with pytest.raises(ValueError, match=r"mine holds 2004--a\.wav, which .*/music lacks; give another"):
        prepare(source, mine, CFG, jobs=1)
    assert contents(mine) == before


def test_what_is_wrong_is_told_before_there_is_a_store(music, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for jobs in (0, -1):
        with pytest.raises(ValueError, match=f"jobs is {jobs}; give 1 or more, or leave it out"):
            prepare(music, "store", CFG, jobs=jobs)
    for source, store in [("", "store"), (music, "")]:
        with pytest.raises(ValueError, match="a path is empty; give the name of a folder"):
            prepare(source, store, CFG, jobs=1)
    pytest.importorskip("distributed", reason="Dask is missing: pip install -e '.[dask]'")
    import dask

    for address in ("127.0.0.1:9", "no://where:1"):
        with (dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
              pytest.raises(ConnectionError, match=f"no scheduler answers at {address}; check the address")):
            prepare(music, "store", CFG, cluster=address)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_users_stays(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "store").mkdir()
    save_audio(tmp_path / "music/silent.wav", torch.zeros(8000))
    for name in ("store", "none"):
        with pytest.raises(ValueError, match="none of the 1 recordings"):
            prepare(tmp_path / "music", tmp_path / name, CFG, jobs=1)
    assert list((tmp_path / "store").iterdir()) == [] and not (tmp_path / "none").exists()


def other_format(store: Path) -> None:
    zarr.open_group(store).attrs["pianodiff_store"] = 99


def no_attributes(store: Path) -> None:
    zarr.open_group(store).attrs.put({})


def truncated_metadata(store: Path) -> None:
    (store / "zarr.json").write_bytes((store / "zarr.json").read_bytes()[:100])


def no_json_object(store: Path) -> None:
    (store / "zarr.json").write_text("[]")


def without(*names: str):
    def spoil(store: Path) -> None:
        group = zarr.open_group(store)
        group.attrs.put({name: value for name, value in group.attrs.asdict().items() if name not in names})
    return spoil


@pytest.mark.parametrize("spoil", [
    other_format, no_attributes, truncated_metadata, no_json_object, without("spectrogram"), without("source")])
def test_a_store_of_another_kind(spoil, music, mine):
    spoil(mine)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    refused = r"mine (is not a spectrogram store of format 1|can't be opened).* `pianodiff prepare`"
    for use in (open_store, lambda store: prepare(music, store, CFG, jobs=1)):
        with pytest.raises(ValueError, match=refused):
            use(mine)
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["complete", "mean", "std", "recordings"])
def test_a_store_that_lost_an_attribute_is_half_written(name, music, mine, store):
    without(name)(mine)
    with pytest.raises(ValueError, match="mine is half-written; run the same `pianodiff prepare` again"):
        open_store(mine)
    assert prepare(music, mine, CFG, jobs=1)["new"] == 0 and contents(mine) == contents(store)


@pytest.mark.parametrize("attributes", [{"mean": "x"}, {"recordings": 5}, {"spectrogram": {"frames": 1}}])
def test_attributes_of_another_kind(attributes, mine):
    zarr.open_group(mine).update_attributes(attributes)
    with pytest.raises(ValueError, match="the attributes of .*mine are damaged"):
        open_store(mine)


def chunk(store: Path) -> Path:
    return next(path for path in (store / "2004--b.wav").rglob("*") if path.is_file() and path.name != "zarr.json")


def chunk_is_missing(store: Path) -> None:
    chunk(store).unlink()


def chunk_is_truncated(store: Path) -> None:
    chunk(store).write_bytes(chunk(store).read_bytes()[:100])


def chunk_is_garbage(store: Path) -> None:
    chunk(store).write_bytes(bytes(range(256)) * 10)


def another_length(store: Path) -> None:
    zarr.open_group(store)["2004--b.wav"].resize((150, 32))


def half_written_anew(store: Path) -> None:
    zarr.open_group(store)["2004--b.wav"].attrs.put({})


def no_array(store: Path) -> None:
    (store / "2004--b.wav/zarr.json").write_text("{")


@pytest.mark.parametrize("spoil", [
    chunk_is_missing, chunk_is_truncated, chunk_is_garbage, another_length, half_written_anew, no_array])
def test_a_damaged_recording_is_named_and_made_anew(spoil, music, mine, store):
    spoil(mine)
    damage = r"mine is damaged in (.*/mine/2004--b\.wav) \(.+\): delete that and run the same `pianodiff prepare` again"
    dataset = BlockDataset(mine, "train", random_offset=False)
    dataset[2]    # of a.wav
    with pytest.raises(ValueError, match=damage):
        [dataset[index] for index in range(3, 8)]
    with pytest.raises(ValueError, match=damage):
        BlockDataset(mine, "train", random_offset=False, in_memory=True)
    shutil.rmtree(mine / "2004--b.wav")
    prepare(music, mine, CFG, jobs=1)
    assert contents(mine) == contents(store)


def test_silence_is_no_damage(tmp_path):
    (tmp_path / "music").mkdir()
    save_audio(tmp_path / "music/a.wav", torch.cat([sound(0, 0.2), torch.zeros(4000)]))
    prepare(tmp_path / "music", tmp_path / "store", CFG, jobs=1)
    for in_memory in (False, True):
        dataset = BlockDataset(tmp_path / "store", "train", random_offset=False, in_memory=in_memory)
        assert not list(dataset)[-1]["spec"].any() and len(dataset) == 5


def test_what_is_no_store(music, tmp_path):
    (tmp_path / "file").write_text("a letter")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/letter").write_text("a letter")
    zarr.save_array(str(tmp_path / "array"), np.zeros(3))
    for name in ("file", "folder", "array", "gone"):
        with pytest.raises(FileNotFoundError, match=f"{name} is not a spectrogram store; make one with `pianodiff"):
            BlockDataset(tmp_path / name, "train", random_offset=False)
        if name != "gone":
            with pytest.raises(ValueError, match=f"{name} exists and is not a spectrogram store; give another folder"):
                prepare(music, tmp_path / name, CFG, jobs=1)
    (tmp_path / "new").mkdir()    # an empty folder is as good as none
    assert prepare(music, tmp_path / "new", CFG, jobs=1)["recordings"] == 4


def test_a_store_that_lost_an_array(music, mine, store):
    shutil.rmtree(mine / "2004--a.wav")
    with pytest.raises(FileNotFoundError, match="mine lacks 2004--a.wav; copy it again"):
        BlockDataset(mine, "train", random_offset=False)[0]
    prepare(music, mine, CFG, jobs=1)
    assert contents(mine) == contents(store)


@pytest.mark.parametrize("change", [{"split": None}, {"split": "late"}, {"frames": -1}, {"frames": "9"}, {"id": 3},
                                    {"piano": 5}, {"room": 0.3}, {"room": [0.3]}, {"room": [1.1, 1]},
                                    {"room": [0.3, -1]}, {"room": ["0.3", 1]},
                                    {"room": [float("nan"), 1]}, {"room": [0.3, float("inf")]}])
def test_a_listing_that_is_damaged(mine, change):
    about = json.loads((mine / "zarr.json").read_text())
    first = about["attributes"]["recordings"][0]
    first |= {key: value for key, value in change.items() if value is not None}
    for key in [key for key, value in change.items() if value is None]:
        del first[key]
    (mine / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the attributes of .*mine are damaged .* make it anew"):
        open_store(mine)


def test_a_cached_recording_that_was_made_anew(music, mine, tmp_path):
    def blocks() -> torch.Tensor:
        dataset = BlockDataset(mine, "train", random_offset=False, cache=Cache(tmp_path / "cache", 0.1))
        return torch.stack([dataset[i]["spec"] for i in range(len(dataset))])

    before = blocks()
    assert torch.equal(blocks(), before)
    other = shutil.copytree(music, tmp_path / "other/music")
    save_audio(other / "2004/a.wav", sound(9, SECONDS["a"]))
    shutil.rmtree(mine / "2004--a.wav")
    prepare(other, mine, CFG, jobs=1)
    after = blocks()
    assert not torch.equal(after[:3], before[:3]) and torch.equal(after[3:], before[3:])


def test_a_store_that_another_run_fills_is_kept(tmp_path, monkeypatch):
    """This one began it, and can use none of its own recordings."""
    (tmp_path / "music/2004").mkdir(parents=True)
    save_audio(tmp_path / "music/2004/a.wav", sound(0, 0.5))
    save_audio(tmp_path / "music/2004/b.wav", torch.zeros(8000))
    write_index(tmp_path / "music", {"a": "train", "b": "test"})

    def meanwhile(*args: object) -> Iterator[tuple[Recording, dict]]:
        monkeypatch.undo()
        prepare(tmp_path / "music", tmp_path / "store", CFG, splits=["train"], jobs=1)
        yield from _run(*args)

    monkeypatch.setattr("pianodiff.data._run", meanwhile)
    report = prepare(tmp_path / "music", tmp_path / "store", CFG, splits=["test"], jobs=1)
    assert report["new"] == 0 and report["recordings"] == 1 and list(report["skipped"]) == ["2004/b.wav"]
    assert [r["id"] for r in open_store(tmp_path / "store").recordings] == ["2004--a.wav"]


def test_a_full_temporary_folder_does_not_matter_to_files_on_the_disk(tmp_path, monkeypatch):
    def full(*args: object, **how: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    save_audio(tmp_path / "a.wav", sound(0, 0.5))
    assert len(read_recording(Recording("a.wav", "train"), str(tmp_path))) == 4000


# Places

def test_memory(music, store):
    prepare(music, "memory://test_data/store", CFG, jobs=1)
    assert contents("memory://test_data/store") == contents(store)
    assert prepare(music, "memory://test_data/store", CFG, jobs=1)["new"] == 0


@pytest.fixture
def bucket(monkeypatch):
    """The URL of a bucket in an object store of our own."""
    server = pytest.importorskip("moto.server", reason="moto[server] is missing: pip install -e '.[dev]'")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is missing: pip install -e '.[s3]'")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("recordings")
    yield "s3://recordings"
    thread.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3(bucket, music, store, odd_names, tmp_path):
    import s3fs

    url = f"{bucket}/deep/store"
    report = prepare(music, url, CFG, jobs=1)
    assert report["new"] == 4 and contents(url) == contents(store)
    assert report["bytes"] == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert prepare(music, url, CFG, jobs=1)["new"] == 0
    here, there = (BlockDataset(place, "train", random_offset=False) for place in (store, url))
    expected = [here[i]["spec"] for i in range(len(here))]
    assert torch.equal(there[1]["spec"], expected[1])    # so that a connection is open when the loader forks
    read = torch.cat([batch["spec"] for batch in DataLoader(there, batch_size=3, num_workers=1)])
    assert torch.equal(read, torch.stack(expected))

    s3fs.S3FileSystem().put(str(music), f"{bucket}/music", recursive=True)
    s3fs.S3FileSystem().put(str(zipped(music, tmp_path / "music.zip")), f"{bucket}/music.zip")
    for source in ("music", "music.zip"):
        prepare(f"{bucket}/{source}", tmp_path / f"of {source}", CFG, jobs=1)
        assert contents(tmp_path / f"of {source}") == contents(store)
    odd, made = odd_names
    s3fs.S3FileSystem().put(str(odd), f"{bucket}/odd", recursive=True)
    prepare(f"{bucket}/odd", f"{bucket}/odd store", CFG, jobs=1)
    assert contents(f"{bucket}/odd store") == contents(made)
    elsewhere = s3fs.S3FileSystem(skip_instance_cache=True)    # another program, which adds a recording
    elsewhere.put(str(music / "2004/a.wav"), f"{bucket}/plain/a.wav")
    assert len(find_recordings(f"{bucket}/plain")) == 1
    elsewhere.put(str(music / "2004/b.wav"), f"{bucket}/plain/b.wav")
    assert len(find_recordings(f"{bucket}/plain")) == 2
    with pytest.raises(ValueError, match="exists and is not a spectrogram store"):
        prepare(music, f"{bucket}/music", CFG, jobs=1)
    with pytest.raises(FileNotFoundError, match="nothing is not a spectrogram store"):
        open_store(f"{bucket}/nothing")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        prepare(f"{bucket}/nothing", tmp_path / "store", CFG, jobs=1)
    with pytest.raises(OSError, match="s3://no-such-bucket/store can't be written"):
        prepare(music, "s3://no-such-bucket/store", CFG, jobs=1)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder in silence; ranges of files too, as every larger server does."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        if not path.is_file() or not wanted:
            return super().do_GET()
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{min(last + 1, len(data)) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server."""
    pytest.importorskip("aiohttp", reason="aiohttp is missing: pip install -e '.[s3]'")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http(music, store, tmp_path):
    shutil.copytree(music, tmp_path / "served/music")
    zipped(music, tmp_path / "served/music.zip")
    with served(tmp_path / "served") as address:
        for source in ("music/", "music.zip"):
            prepare(f"{address}/{source}", tmp_path / source, CFG, jobs=1)
            assert contents(tmp_path / source) == contents(store)
        with pytest.raises(FileNotFoundError, match="nothing.zip does not exist"):
            prepare(f"{address}/nothing.zip", tmp_path / "store", CFG, jobs=1)


def test_odd_names_on_the_web(odd_names, tmp_path):
    music, store = odd_names
    zipped(music, music.parent / "music.zip")
    with served(music.parent) as address:
        for source in ("music/", "music.zip"):
            prepare(f"{address}/{source}", tmp_path / source, CFG, jobs=1)
            assert contents(tmp_path / source) == contents(store)
        old = shutil.copytree(tmp_path / "music", tmp_path / "old")    # of a version that quoted twice
        shutil.move(old / "my%20song.wav", old / "my%2520song.wav")
        for about in (old / "zarr.json", old / "my%2520song.wav/zarr.json"):
            about.write_text(about.read_text().replace('"my%20song.wav', '"my%2520song.wav'))
        assert prepare(f"{address}/music/", old, CFG, jobs=1)["new"] == 0
        for split in open_store(store).hours:
            here, there = (BlockDataset(place, split, random_offset=False) for place in (store, f"{address}/store"))
            assert all(torch.equal(here[i]["spec"], there[i]["spec"]) for i in range(len(here)))


def test_dask(music, store, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="Dask is missing: pip install -e '.[dask]'")
    import dask

    shutil.copytree(music, tmp_path / "music")
    save_audio(tmp_path / "music/2004/e.wav", torch.zeros(8000))
    write_index(tmp_path / "music", SPLIT | {"e": "test"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")    # where the workers are at home
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.comm.timeouts.connect": "3600s"}
    with dask.config.set(settings), distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.chdir(tmp_path)
        address = cluster.scheduler_address
        report = prepare("music", "store", CFG, cluster=address)
        assert report["new"] == 4 and "silent" in report["skipped"]["2004/e.wav"]
        assert contents(tmp_path / "store") == contents(store)
        save_audio("clap.wav", 0.5 * room_response("studio"))    # to be found by workers elsewhere
        assert prepare("music", "in a room", CFG, cluster=address, rooms="clap.wav")["new"] == 4
        assert [r["room"] for r in open_store("in a room").recordings] == 4 * [pytest.approx([0.302, 0.417], abs=0.01)]
        with pytest.raises(ChildProcessError, match="a worker process died, .* or on larger workers"):
            list(_run(lambda recording: os.kill(os.getpid(), signal.SIGKILL), find_recordings("music"), 1, address))
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(OSError, match="127.0.0.1:9"):
        prepare("music", "third", CFG, cluster="tcp://127.0.0.1:9")


# Blocks

def test_blocks_and_their_predecessors(store):
    dataset = BlockDataset(store, "train", random_offset=False)
    assert len(dataset) == BLOCKS["train"] and dataset.info == open_store(store)
    a, b = (torch.from_numpy(zarr.open_group(store)[f"2004--{name}.wav"][:]).T / 255 for name in "ab")
    expected = [a[:, 32 * k : 32 * k + 32] for k in range(3)] + [b[:, 32 * k : 32 * k + 32] for k in range(5)]
    for index, spec in enumerate(expected):
        item = dataset[index]
        assert item["spec"].dtype == item["prev"].dtype == torch.float32
        assert torch.equal(item["spec"], spec[None])
        assert item["has_prev"] is (index not in (0, 3))
        assert torch.equal(item["prev"][0], expected[index - 1] if item["has_prev"] else torch.zeros(32, 32))
    assert [len(BlockDataset(store, split, random_offset=False)) for split in BLOCKS] == list(BLOCKS.values())
    for index in (-1, 8):
        with pytest.raises(IndexError):
            dataset[index]


def test_offsets(store):
    dataset = BlockDataset(store, "train", random_offset=True)
    a = torch.from_numpy(zarr.open_group(store)["2004--a.wav"][:]).T / 255    # 125 frames: three blocks, and 29 more
    for index, offset in [(0, 0), (0, 31), (1, 0), (1, 7), (2, 28), (2, 29), (2, 30), (2, 31)]:
        item, start = dataset.block(index, offset), min(32 * index + offset, 125 - 32)
        assert torch.equal(item["spec"][0], a[:, start : start + 32])
        assert item["has_prev"] is (start >= 32)
        assert torch.equal(item["prev"][0], a[:, start - 32 : start] if start >= 32 else torch.zeros(32, 32))

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([dataset[index]["spec"] for index in range(len(dataset))])

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0)[1], dataset.block(1)["spec"])


def test_in_memory_in_workers_and_pickled(store, mine):
    dataset = BlockDataset(store, "train", random_offset=False)
    expected = torch.stack([dataset[index]["spec"] for index in range(len(dataset))])
    in_memory = BlockDataset(mine, "train", random_offset=False, in_memory=True)
    shutil.rmtree(mine)    # nothing is read any more
    for other in (dataset, in_memory, pickle.loads(pickle.dumps(dataset)), pickle.loads(pickle.dumps(in_memory))):
        for workers in (0, 2):
            batches = list(DataLoader(other, batch_size=4, num_workers=workers))
            assert torch.equal(torch.cat([batch["spec"] for batch in batches]), expected)
            assert torch.cat([batch["has_prev"] for batch in batches]).tolist() == [i not in (0, 3) for i in range(8)]
