"""Nothing that is read is run: the package neither unpickles nor evaluates, whatever a file holds."""

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numcodecs
import pytest
import torch
import zarr
from test_generate import tiny_piano
from test_recordings import CFG, sound

from pianodiff.audio import load_audio, save_audio
from pianodiff.data import BlockDataset, prepare
from pianodiff.files import load_tensors
from pianodiff.model import load_model
from pianodiff.recordings import find_recordings, render_midi
from pianodiff.train import load_checkpoint

PACKAGE = Path(__file__).resolve().parent.parent / "pianodiff"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "yaml.load",
         "yaml.unsafe_load", "pd.read_pickle"}


def what_runs(source: str) -> Iterator[str]:
    """The places of a module that would run what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name, flags = ast.unparse(node.func), {flag.arg: ast.unparse(flag.value) for flag in node.keywords}
            unsafe = {"allow_pickle", "trust_remote_code", "shell"} & {flag for flag in flags if flags[flag] != "False"}
            if name in CALLS or unsafe or name == "torch.load" and flags.get("weights_only") != "True":
                yield f"{node.lineno}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("module", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_runs_what_it_reads(module: Path):
    assert list(what_runs(module.read_text())) == []


@pytest.mark.parametrize("code", ["import pickle", "from joblib import load", "eval(text)", "torch.load(path)",
                                  "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
                                  "yaml.load(text)", "Model(trust_remote_code=flag)", "run(line, shell=True)"])
def test_what_runs_would_be_seen(code: str):
    assert len(list(what_runs(code))) == 1


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with music, a store and a model."""
    home = tmp_path_factory.mktemp("home")
    (home / "music").mkdir()
    for seed in range(4):
        save_audio(home / f"music/{seed}.wav", sound(seed, 0.5))
    prepare(home / "music", home / "store", CFG, jobs=1)
    tiny_piano().save_pretrained(home / "model")
    return home


def read_store(store: Path) -> None:
    blocks = BlockDataset(store, "train", random_offset=False)
    for index in range(len(blocks)):
        blocks.codes(index)


def read_with(name: str):
    """What reads the file of that name in a folder of everything."""
    return {"model.safetensors": lambda place: load_model(place.parent),
            "config.json": lambda place: load_model(place.parent),
            "checkpoint.safetensors": load_checkpoint, "kept.safetensors": load_tensors,
            "index.csv": lambda place: find_recordings(place.parent),
            "maestro-v9.json": lambda place: find_recordings(place.parent),
            "0.wav": load_audio, "0.mid": lambda place: render_midi(place.read_bytes(), place)}[name]


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "run/checkpoint.safetensors",
                                  "kept.safetensors", "music/index.csv", "music/maestro-v9.json", "music/0.wav",
                                  "music/0.mid", "store/zarr.json", "store/*/zarr.json", "store/*/c/0/0"])
def test_a_pickle_in_place_of_a_file_is_not_run(home, tmp_path, name, form):
    ran, data = tmp_path / "ran", io.BytesIO()
    if form == "pickle":
        pickle.dump(Payload(ran), data)
    else:
        torch.save(Payload(ran), data, _use_new_zipfile_serialization=form == "torch")
    shutil.copytree(home, tmp_path / "home")
    for place in [*(tmp_path / "home").glob(name)] or [tmp_path / "home" / name]:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data.getvalue())
    with suppress(ValueError, OSError):
        if name.startswith("store"):
            read_store(tmp_path / "home/store")
        else:
            read_with(place.name)(place)
    assert not ran.exists()
    if form == "pickle":
        pickle.loads(data.getvalue())    # it would have
        assert ran.exists()


def test_a_store_of_zarr_2_is_not_opened(home, tmp_path, monkeypatch):
    """Its chunks may be pickles, and older versions of numcodecs unpickle them."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    group = zarr.open_group(home / "store", mode="r")
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / ".zattrs").write_text(json.dumps(dict(group.attrs)))
    for name, array in group.arrays():
        (tmp_path / name).mkdir()
        about = {"zarr_format": 2, "shape": array.shape, "chunks": array.shape, "dtype": "|O", "fill_value": 0,
                 "order": "C", "compressor": {"id": "pickle"}, "filters": [{"id": "vlen-utf8"}]}
        (tmp_path / name / ".zarray").write_text(json.dumps(about))
        (tmp_path / name / ".zattrs").write_text(json.dumps(dict(array.attrs)))
        (tmp_path / name / "0.0").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(FileNotFoundError, match="is not a spectrogram store"):
        read_store(tmp_path)
    assert not (tmp_path / "ran").exists()
