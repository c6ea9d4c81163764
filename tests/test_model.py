"""Presets and their cost; models on disk, by name, and on the Hub."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_unet import BOTH, C_NOISE, OURS, awake, blocks, network
from torch import Tensor, nn

from pianodiff import GUIDANCE, GUIDANCE_INTERVAL, NUM_STEPS, SAMPLER
from pianodiff.model import (
    NOISE_LEVELS,
    PRESETS,
    count,
    find_model,
    load_model,
    noise_levels,
    sampling_defaults,
    save_model,
    trainings,
)
from pianodiff.unet import Attention, UNet

# presets

@pytest.mark.parametrize("name, parameters, multiplications", [("nano", 6e6, 1.2e9), ("base", 16e6, 4e9)])
def test_presets_keep_their_budgets(name, parameters, multiplications):
    found = count(PRESETS[name])
    assert found[0] <= parameters and found[1] <= multiplications, found
    assert (PRESETS[name].n_bins, PRESETS[name].n_frames, PRESETS[name].patch) == (256, 128, 4)


@pytest.mark.parametrize("size", [128, 256])
def test_presets_of_the_paper_have_its_shape(size):
    config = PRESETS[f"paper-{size}"]
    assert (config.n_bins, config.n_frames, config.patch, len(config.channels)) == (size, size, 1, 5)
    assert not (config.adaptive or config.coordinates or config.context)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_forward_and_backward(name):
    config = PRESETS[name]
    with torch.device("meta"):  # shapes without contents
        net, x = UNet(config), torch.empty(2, 1, config.n_bins, config.n_frames)
        y = net(x, torch.empty(2), (x, torch.empty(2, dtype=torch.bool)))
    assert y.shape == x.shape
    y.sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


def test_nano_with_contents():
    net, x = awake(UNet(PRESETS["nano"])), torch.randn(1, 1, 256, 128)
    y = net(x, torch.zeros(1), x)
    y.square().mean().backward()
    assert y.shape == x.shape and y.isfinite().all() and y.std() > 0.01
    assert all(p.grad.isfinite().all() for name, p in net.named_parameters() if name != "null")


@BOTH
def test_count_is_the_sum_over_the_layers(config):
    net, macs = UNet(config), []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Attention):
            _, c, f, t = output.shape
            macs.append(2 * c * f * t * {"f": f, "t": t, "ft": f * t}[module.axis])
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            macs.append(module.weight.numel() * output[0, 0].numel())
        elif isinstance(module, nn.Linear):
            macs.append(module.weight.numel())

    for module in net.modules():
        module.register_forward_hook(add)
    x = blocks(config, 1).float()
    net(x, torch.zeros(1), x)
    assert count(config) == (sum(p.numel() for p in net.parameters()), sum(macs))


# models on disk

SPECTROGRAM = {"sample_rate": 8000, "n_fft": 128, "hop_length": 32, "n_frames": 32, "top_db": 80.0}
CONFIG = {"format": 1, "name": "tiny", "spectrogram": SPECTROGRAM, "unet": asdict(OURS), "mean": 0.4, "std": 0.2,
          "sigma_data": 0.5, "training": {"images": 7}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "tiny", network(OURS).float(), CONFIG)
    return tmp_path / "tiny"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@BOTH
def test_a_model_comes_back(config, tmp_path):
    net = network(config).float().to(memory_format=torch.channels_last)
    spectrogram = SPECTROGRAM | {"n_fft": 2 * config.n_bins, "n_frames": config.n_frames}
    about = CONFIG | {"unet": asdict(config), "spectrogram": spectrogram}
    save_model(str(tmp_path / "deep" / "er" / "tiny"), net, about)
    loaded, facts = load_model(tmp_path / "deep/er/tiny")
    assert facts == json.loads(json.dumps(about)) and loaded.config == config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=2**-11, atol=2**-25)  # half precision
    x = blocks(config).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, C_NOISE, x), net(x, C_NOISE, x), rtol=0.02, atol=0.01)
    parameters = sum(p.numel() for p in net.parameters())
    assert 2 * parameters < (tmp_path / "deep/er/tiny/model.safetensors").stat().st_size < 2 * parameters + 20_000
    assert listing(tmp_path / "deep/er/tiny") == ["config.json", "model.safetensors"]
    assert listing(tmp_path / "deep/er") == ["tiny"]


def test_a_loaded_model_is_saved_without_loss(model):
    net, config = load_model(model)
    save_model(model, net, config)
    again, same = load_model(model)
    assert same == config and listing(model.parent) == ["tiny"]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("failure", [OSError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_write_leaves_the_old_model(model, monkeypatch, call, failure):
    before, calls, real = {path.name: path.read_bytes() for path in model.iterdir()}, [], os.replace

    def stop(*names: object) -> None:
        calls.append(names)
        if len(calls) == call:
            raise failure
        real(*names)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(type(failure)):
        save_model(model, network(OURS, seed=5), CONFIG)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert listing(model.parent) == ["tiny"]


def test_a_full_disk_leaves_the_old_model_and_no_more(model, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for folder in (model, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            save_model(folder, network(OURS, seed=5), CONFIG)
    assert listing(tmp_path) == ["tiny"]
    load_model(model)


def test_what_a_kill_left_does_not_stand_in_the_way(model):
    (model.parent / ".tiny.part").mkdir()
    (model.parent / ".tiny.part" / "model.safetensors").write_bytes(b"half")
    model.rename(model.parent / ".tiny.old")  # killed between the two renames
    save_model(model, network(OURS, seed=5), CONFIG)
    assert listing(model.parent) == ["tiny"]
    model.rename(model.parent / ".tiny.old")
    save_model(model, network(OURS, seed=5), CONFIG)
    (model.parent / ".tiny.old").mkdir()
    (model.parent / ".tiny.old" / "config.json").write_text("{}")
    save_model(model, network(OURS), CONFIG)
    assert listing(model.parent) == ["tiny"]
    assert torch.equal(load_model(model)[0].stem.weight, network(OURS).float().stem.weight.half().float())


def test_others_may_read_what_the_umask_lets_them(model):
    os.umask(umask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in model.iterdir()} == {0o666 & ~umask}


def test_trainings_are_told_from_the_last_to_the_first():
    first, second = {"images": 1, "ancestor": None}, {"images": 2}
    assert list(trainings({"training": second | {"ancestor": first}})) == [second | {"ancestor": first}, first]
    assert list(trainings({})) == []


def test_no_other_folder_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "waltz.wav").write_bytes(b"RIFF")
    (tmp_path / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "music", tmp_path / "notes", "music", "."):
        with pytest.raises(ValueError, match="is more than a model; give another folder"):
            save_model(folder, network(OURS), CONFIG)
    assert listing(tmp_path) == ["music", "notes"] and listing(tmp_path / "music") == ["waltz.wav"]
    (tmp_path / "empty").mkdir()
    save_model("empty", network(OURS), CONFIG)
    load_model("empty")


def test_hidden_files_do_not_stand_in_the_way_and_hidden_folders_do(model):
    (model / ".DS_Store").touch()
    save_model(model, network(OURS, seed=5), CONFIG)
    assert listing(model) == ["config.json", "model.safetensors"]
    (model / ".git").mkdir()
    with pytest.raises(ValueError, match="is more than a model"):
        save_model(model, network(OURS), CONFIG)
    assert (model / ".git").is_dir()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files(model, missing):
    (model / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"tiny holds no model: {missing} is missing; give") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere holds no model: config.json is missing"):
        load_model(model.parent / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(model, keep):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*; copy the model again") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_read(model):
    torch.save({"weights": torch.zeros(3)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(model)


@pytest.mark.parametrize("content", [
    pytest.param("[" * 100_000, id="deep"),
    "", "{", "[]", "{}", '"words"', "\x00", *(f'{{"format": 1, "unet": {unet}}}' for unet in (
        '{"unknown": 1}', '{"patch": 0}', "null", '{"channels": 5}', '{"attention": [1, 2, 3, 4, 5]}',
        '{"blocks": ["a", 1, 1, 1, 1]}')),
])
def test_broken_configurations(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is not a model's .*; copy the model again") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, reason", [
    *(({name: value}, f"{name} is ") for name in ("mean", "std", "sigma_data")
      for value in (None, "1", math.nan, True)),
    ({"std": 0}, "std is 0"), ({"sigma_data": -0.5}, "sigma_data is -0.5"), ({"std": 10**400}, "OverflowError"),
    *(({"spectrogram": value}, "AttributeError") for value in (None, [], "words")),
    ({"spectrogram": {}}, "a spectrogram of , not of sample_rate"),
    ({"spectrogram": SPECTROGRAM | {"n_mels": 80}}, "top_db, n_mels, not of"),
    *(({"spectrogram": SPECTROGRAM | {name: value}}, f"{name} is ") for name in SPECTROGRAM for value in (0, -1, "8")),
    ({"spectrogram": SPECTROGRAM | {"hop_length": 32.0}}, "hop_length is 32.0"),
    ({"spectrogram": SPECTROGRAM | {"n_frames": 64}}, "a spectrogram of 64x64 for a network of 64x32"),
    *(({name: value}, f"{name} is ") for name in ("sigma_max", "rho") for value in (None, "80", math.inf, 0.5, True)),
    *(({"sigma_min": value}, "sigma_min is ") for value in (None, "1", 0, -1, 1, math.inf, math.nan, False)),
    *(({"sigmas": value}, "sigmas are ") for value in (400, 0, "", [], {}, [0], [-1], [1, 2], [2, 2], [2, -1], ["2"],
                                                       [math.inf], [True], [10**400])),
    ({"sigma_max": 10**400}, "sigma_max is "), ({"guidance": 10**400}, "guidance is "),
    *(({"num_steps": value}, "num_steps ") for value in (None, 0, 12.0, "12", True, 10_001)),
    *(({"sampler": value}, "sampler is ") for value in (None, 1, ["euler"])),
])
def test_a_configuration_that_would_fail_later_is_refused(model, change, reason):
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=r"config\.json is not a model's .*; copy the model again") as caught:
        load_model(model)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["spectrogram", "mean", "std", "sigma_data", "unet", "format"])
def test_a_configuration_without_its_facts_is_refused(model, missing):
    (model / "config.json").write_text(json.dumps({key: value for key, value in CONFIG.items() if key != missing}))
    with pytest.raises(ValueError, match=rf"is not a model's configuration \(KeyError: '{missing}'\)"):
        load_model(model)


def test_a_model_says_from_what_noise_it_is_sampled(model):
    paper = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}  # where it says nothing
    assert noise_levels(load_model(model)[1]) == paper
    own = {"sigma_min": 0.04, "sigma_max": 400, "rho": 12.0}
    (model / "config.json").write_text(json.dumps(CONFIG | own))
    assert noise_levels(load_model(model)[1]) == own


def test_a_model_says_how_it_is_sampled(model):
    ours = {"sampler": SAMPLER, "num_steps": NUM_STEPS, "guidance": GUIDANCE, "guidance_interval": GUIDANCE_INTERVAL}
    assert sampling_defaults(load_model(model)[1]) == ours
    own = {"sampler": "heun", "num_steps": 3, "guidance": 1.5, "guidance_interval": [0.1, 2]}
    (model / "config.json").write_text(json.dumps(CONFIG | own))
    assert sampling_defaults(load_model(model)[1]) == own | {"guidance_interval": (0.1, 2)}


@pytest.mark.parametrize("name", ["nano", "base"])
def test_what_ships_is_sampled_as_its_preset_is(name):
    config = load_model(find_model(name))[1]
    preset = NOISE_LEVELS[name]
    assert noise_levels(config) == noise_levels(preset)
    assert sampling_defaults(config)["num_steps"] == sampling_defaults(preset)["num_steps"]


def test_guidance_may_have_no_upper_end(model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"guidance_interval": [0.2, math.inf]}))
    assert sampling_defaults(load_model(model)[1])["guidance_interval"] == (0.2, math.inf)


def test_a_student_says_at_which_levels_it_is_asked(model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"sigmas": [80, 0.5], "sigma_max": 400, "num_steps": 9}))
    config = load_model(model)[1]
    assert noise_levels(config) == {"sigmas": [80, 0.5, 0.0]}
    assert sampling_defaults(config) == {"sampler": "euler", "num_steps": 2, "guidance": 1.0}


@pytest.mark.parametrize(("weight", "interval"), [
    ("2", [0.2, 2]), (float("inf"), [0.2, 2]), (True, [0.2, 2]), (2, [2, 0.2]), (2, [-1, 2]), (2, 2), (2, ["0.2", 2]),
    (2, [0.2])])
def test_guidance_that_makes_no_sense_is_refused(model, weight, interval):
    (model / "config.json").write_text(json.dumps(CONFIG | {"guidance": weight, "guidance_interval": interval}))
    with pytest.raises(ValueError, match=r"not a model's configuration .*guidance is .* on .*; give a number, and two"):
        load_model(model)


def test_a_model_of_another_format(model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"format": 2}))
    with pytest.raises(ValueError, match=r"config\.json .*format 2, where 1 is read.*; .*update pianodiff$"):
        load_model(model)


@pytest.mark.parametrize("change", [{"emb_channels": 32}, {"channels": (16, 64)}, {"context": 0, "seam": 0},
                                    {"coordinates": False}, {"blocks": (1, 1)}, {"attention": ("f", "ft")}])
def test_weights_of_another_shape(model, change):
    (model / "config.json").write_text(json.dumps({**CONFIG, "unet": asdict(replace(OURS, **change))}))
    with pytest.raises(ValueError, match=r"tensors does not fit its config\.json; copy both again") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


# names

def test_names_of_models(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("someone/grand-piano") == tmp_path / "hub"
    assert asked == [("someone/grand-piano", ["*.safetensors", "*.json"])]
    assert find_model(tmp_path) == tmp_path  # a folder is never looked for on the Hub
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    assert find_model(tmp_path) == find_model(tmp_path / "model") == tmp_path / "model"  # a run stands for its model
    for missing in ("no-such-model", "/no/such/folder", "./nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="one that ships"):
            find_model(missing)
    assert len(asked) == 1


@pytest.mark.parametrize("failure", [OSError, ImportError, RuntimeError])  # each library has its own
def test_a_hub_that_fails(monkeypatch, failure):
    def download(name, allow_patterns):
        raise failure("the network is unreachable\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"not on the Hub \(the network is unreachable\); give one that ships"):
        find_model("someone/grand-piano")
