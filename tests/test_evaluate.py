"""The report: whole, the same twice, and refused in one line; the course of a training."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from pianodiff import Piano
from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig
from pianodiff.cli import main
from pianodiff.data import prepare
from pianodiff.evaluate import _check_reference, evaluate, plot_training, training_curves, write_report
from pianodiff.model import find_model

CFG = SpectrogramConfig()


# training


def test_training_curves(tmp_path):
    log = tmp_path / "log.csv"
    with pytest.raises(FileNotFoundError, match="log.csv is missing"):
        training_curves(log)
    log.write_text("images,loss,val_0.1,val_1\n100,0.9,,\n")
    with pytest.raises(ValueError, match="no validation yet"):
        training_curves(log)
    log.write_text("images,loss,val_0.1,val_1\n100,0.9,,\n200,0.8,0.5,0.25\n300,0.7,,\n400,0.6,0.4,0.125\n")
    images, losses = training_curves(log)
    assert images.tolist() == [200, 400] and {k: v.tolist() for k, v in losses.items()} == {
        "0.1": [0.5, pytest.approx(0.4)], "1": [0.25, 0.125]}


def test_a_runs_course_is_drawn_with_its_samples(tmp_path):
    (tmp_path / "log.csv").write_text("images,val_1\n200,0.25\n400,0.125\n")
    assert len(plot_training(tmp_path / "log.csv").axes) == 1
    (tmp_path / "samples").mkdir()
    for i, images in enumerate((9, 80, 700, 6000, 50000, 400000)):  # not in the order of their names
        image.imsave(tmp_path / "samples" / f"{images}.png", np.full((4, 8, 3), i / 5))
    axes = plot_training(tmp_path, most=3).axes
    shown = [float(ax.images[0].get_array()[0, 0, 0]) for ax in axes[1:]]
    assert len(shown) == 3 and shown[0] < shown[1] < shown[2] == 1
    np.testing.assert_array_equal(axes[0].lines[0].get_xydata(), [[200, 0.25], [400, 0.125]])


# all of it


def figures(path: Path) -> dict:
    """A report's figures; the last digits of a distance of eight clips in 96 dimensions hang on memory's alignment."""
    return json.loads(path.read_text(), parse_float=lambda text: round(float(text), 6))


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_the_report_is_whole_and_the_same_twice(music, tmp_path, capsys):
    assert main(["evaluate", f"{music}/made", f"{music}/real", "--out", f"{tmp_path}/a.html", "--blocks", "30"]) == 0
    told = capsys.readouterr()
    assert re.search(r"Fréchet distance \(logmel.*\nkernel distance \(logmel.*\nby the Fréchet distance, made is "
                     r"farther off than other real music in \d+ of 20 random divisions\n", told.out)
    assert len(re.findall(r"^warning: .*without full rank", told.err, re.M)) == 1
    evaluate(music / "made", music / "real", tmp_path / "b.html", blocks=30)
    as_json = [figures(tmp_path / f"{name}.json") for name in "ab"]
    for results in as_json:
        del results["seconds"]
    assert as_json[0] == as_json[1]
    assert as_json[0]["sampling"] is None and as_json[0]["generated"]["blocks"] == 12 == as_json[0]["others"]["blocks"]
    for name, split in as_json[0]["floors"].items():
        assert {row: found[0] for row, found in split.items()} == pytest.approx(
            {row: as_json[0]["distances"][name][row]["frechet"] for row in split}, rel=1e-4)
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<audio" in page and page.count("data:image/png") == 7
    assert "Over 20 random splits by title, other real music lies" in page
    for row in ("real", "retrieved", "model: made", "shifted", "shuffled", "noise"):
        assert f"<td>{row}</td>" in page
    assert "<h2>What is not made of notes</h2>" in page and as_json[0]["not_notes"]["model"]["pieces"] == 4
    rows = as_json[0]["told_apart"]
    assert list(rows) == ["real", "model", "noise"] and "<h2>Told apart</h2>" in page
    assert rows["model"]["blocks"] == [12, 12] and rows["model"]["pieces"][0] == 4 and rows["noise"]["auc"] > 0.9
    assert "residue" in as_json[0]["joins"]["strangers"] and "residue" not in as_json[0]["joins"]["model"]
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["a.html", "a.json", "b.html", "b.json"]


@pytest.mark.parametrize("model", ["nano", "base"])
def test_a_report_without_the_sections_of_today_still_makes_a_page(model, tmp_path):
    """Figures from before notes were looked for, or a network was asked, give the page that they gave then."""
    older = json.loads((find_model(model) / "report.json").read_text())
    for section in ("told_apart", "not_notes"):
        older.pop(section, None)
    write_report(tmp_path / "older.html", older, [], CFG)
    page = (tmp_path / "older.html").read_text()
    assert "<h2>The joins</h2>" in page and "Told apart" not in page and "made of notes" not in page
    assert json.loads((tmp_path / "older.json").read_text()) == older


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_a_model_is_evaluated_by_its_name_and_its_command_gives_the_same(music, tmp_path, monkeypatch):
    monkeypatch.chdir(music)
    prepare(music / "real", tmp_path / "store", CFG, splits=["train"], jobs=1)
    command = f"evaluate nano real --out {tmp_path}/a.html --pieces 2 --seconds 8.2 --steps 2 --sampler heun " \
              f"--guidance 1.5 --guidance-interval 0.2 3 --seed 1 --training {tmp_path}/store --transpose 1 --blocks 30"
    assert main(shlex.split(command)) == 0
    first = figures(tmp_path / "a.json")
    assert first["seconds"]["making"] > 0 and first["generated"]["name"] == "nano" and first["generated"]["blocks"] == 8
    assert 0 <= first["joins"]["model"]["residue"]["auc"] <= 1
    assert first["sampling"] == {"sampler": "heun", "num_steps": 2, "guidance": 1.5, "guidance_interval": [0.2, 3],
                                 "sigma_min": 0.04, "sigma_max": 400, "rho": 30, "guide": "guide"}
    page = (tmp_path / "a.html").read_text()
    assert "<td>model: nano</td>" in page and "by logmel" in page and "The closest pairs by spectrogram" in page
    program, *words = shlex.split(first["command"])
    assert program == "pianodiff"
    assert main([*words, "--out", f"{tmp_path}/b.html", "--cache", f"{tmp_path}/a.cache"]) == 0
    second = figures(tmp_path / "b.json")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("name, splits, warned", [("real", (), True), ("real", ("train",), True),
                                                  ("real", ("validation", "test"), False), ("other", (), False)])
def test_a_reference_of_the_training_music_is_warned_of(music, tmp_path, recwarn, name, splits, warned):
    """A run knows the name of its data, no more."""
    for path in find_model("nano").glob("*.*"):
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["training"]["ancestor"]["data"] = name
    (tmp_path / "config.json").write_text(json.dumps(config))
    _check_reference(Piano(tmp_path), music / "real", splits)
    _check_reference(None, music / "real", splits)  # sound was trained on nothing
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == warned and all("--splits validation test leaves them out" in text for text in told)


def test_a_store_of_other_spectrograms_is_refused(music, tmp_path):
    prepare(music / "made", tmp_path / "store", SPECTROGRAMS["paper-128"], splits=["train"], jobs=1)
    with pytest.raises(ValueError, match="holds other spectrograms than nano's"):
        evaluate("nano", music / "real", tmp_path / "x.html", training=tmp_path / "store")


@pytest.mark.parametrize("arguments, words", [
    (["nowhere", "real"], "nowhere is no folder of sound files, and there is no model 'nowhere'"),
    (["nano", "real", "--steps", "0", "--cache", "kept"], "--steps must be a whole number"),
    (["nano", "real", "--seconds", "1"], "hold no blocks"),
    (["nano", "real", "--pieces", "0"], "hold no blocks"),
    (["nano", "real", "--pieces", "1", "--seconds", "6.2"], "hold 3 blocks of 2.048 s; give 4 or more"),
    (["nano", "real", "--sampler", "best"], "no sampler 'best'"),
    (["nano", "nowhere"], "nowhere does not exist"),
    (["made", "nowhere"], "nowhere does not exist"),
    (["empty", "real"], "no sound file"),
    (["made", "real", "--out", "report.pdf"], "must end in .html"),
    (["made", "real", "--out", "missing/report.html"], "the folder missing does not exist; make it first"),
    (["made", "real", "--embeddings", "no/such"], "no/such can't be loaded"),
    (["made", "real", "--embeddings", "logmell"], "no embedding 'logmell'; give logmel,"),
    (["made", "real", "--embeddings"], "an embedding be named; not 2000, 0, 0 and none"),
    (["made", "real", "--blocks", "0"], "--blocks must be at least 1"),
    (["nano", "real", "--transpose", "-1"], "transpose and seed at least 0"),
    (["made", "real", "--splits", "best"], "there is no split best; choose of train, validation, test"),
    (["nano", "real", "--splits", "best", "--pieces", "100000"], "there is no split best"),  # before they are made
    (["made", "real", "--out", "old.html"], "old.html exists; give another name, or --force to replace it"),
    (["made", "made/take 40.flac"], "is one file; give the folder"),
    (["made", "real", "--blocks", "3"], "too few blocks"),
    (["made", "real", "--training", "nowhere", "--blocks", "40"], "nowhere is not a spectrogram store"),
])
def test_bad_input_is_told_in_one_line(music, tmp_path, monkeypatch, capsys, arguments, words):
    (music / "empty").mkdir(exist_ok=True)
    (music / "old.html").touch()
    monkeypatch.chdir(music)
    before = sorted(music.rglob("*"))
    assert main(["evaluate", *arguments]) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pianodiff:")]
    assert len(message) == 1 and words in message[0]
    assert sorted(music.rglob("*")) == before
