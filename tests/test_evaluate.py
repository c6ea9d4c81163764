"""Evaluation: pieces, rows and their order, the report, and what bad input gets."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from matplotlib import image

from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, save_audio
from pianodiff.cli import main
from pianodiff.data import prepare
from pianodiff.distance import embed, interval, kernel_distance_to, load_embedding
from pianodiff.evaluate import (
    Piece,
    Row,
    clips_of,
    course,
    distances,
    evaluate,
    farther,
    floors,
    in_order,
    make_pieces,
    make_rows,
    noise_like,
    novelty,
    plot_training,
    read_pieces,
    rejoined,
    retrieved,
    seams,
    shifted,
    shuffled,
    spectrogram_blocks,
    split_pieces,
    training_curves,
)
from pianodiff.generate import Piano
from pianodiff.music import JOIN_MEASURES, retrieval_residue
from pianodiff.synth import example_performance

CFG = SpectrogramConfig()
BLOCK = CFG.block_samples


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """Two folders of sound: "real", ten takes of four blocks, and "made", four others of three."""
    home = tmp_path_factory.mktemp("music")
    for folder, seeds, seconds in (("real", range(10), 8.5), ("made", range(40, 44), 6.5)):
        (home / folder).mkdir()
        for seed in seeds:
            save_audio(home / folder / f"take {seed:02}.flac", example_performance(seconds, seed))
    return home


def piece(blocks: int, title: str, seed: int = 0) -> Piece:
    return Piece(f"{title}-{seed}.wav", title, example_performance(blocks * CFG.block_seconds, seed))


# pieces

def test_pieces_are_whole_blocks_in_order(music):
    pieces, unused = read_pieces(music / "real", CFG)
    assert [p.name for p in pieces] == [f"take {n:02}.flac" for n in range(10)] and not unused
    assert all(len(p.wave) == 4 * BLOCK for p in pieces) and clips_of(pieces, CFG).shape == (40, BLOCK)


def test_a_number_of_blocks_is_kept_and_the_seed_decides_which(music):
    first, again, other = (read_pieces(music / "real", CFG, blocks=11, most=3, seed=s)[0] for s in (1, 1, 2))
    assert [len(p.wave) // BLOCK for p in first] == [3, 3, 3, 2]
    assert [p.name for p in first] == [p.name for p in again] != [p.name for p in other]
    everything, _ = read_pieces(music / "real", CFG, blocks=1000, seed=1)
    assert len(everything) == 10


def test_titles_come_once_before_any_comes_twice(tmp_path):
    rows = ["canonical_composer,canonical_title,split,audio_filename,duration"]
    for n in range(6):
        save_audio(tmp_path / f"{n}.wav", example_performance(2.2, n))
        rows.append(f"Someone,{'Waltz' if n < 4 else f'No. {n}'},{'test' if n else 'train'},{n}.wav,2.2")
    (tmp_path / "index.csv").write_text("\n".join(rows))
    for seed in range(5):
        pieces, _ = read_pieces(tmp_path, CFG, blocks=3, seed=seed, splits=["test"])
        assert len({p.title for p in pieces}) == 3 and "0.wav" not in {p.name for p in pieces}
    with pytest.raises(ValueError, match="no recordings of the splits validation; choose others"):
        read_pieces(tmp_path, CFG, splits=["validation"])


def test_normalized_pieces_have_the_recordings_peak_of_one(music, tmp_path):
    wave = example_performance(10, 3)
    save_audio(tmp_path / "soft.flac", 0.1 * wave)
    assert read_pieces(tmp_path, CFG)[0][0].wave.abs().max() < 0.11
    assert read_pieces(tmp_path, CFG, normalize=True)[0][0].wave.abs().max() > 0.8


def test_what_cannot_be_used_is_told(tmp_path, music):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_pieces(tmp_path / "nowhere", CFG)
    with pytest.raises(ValueError, match="no sound file"):
        read_pieces(tmp_path, CFG)
    save_audio(tmp_path / "short.wav", example_performance(1, 0))
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing")
    with pytest.raises(ValueError, match="none of the 2 recordings .* can be used") as error:
        read_pieces(tmp_path, CFG)
    assert "\n" not in str(error.value)
    save_audio(tmp_path / "long.wav", example_performance(3, 0))
    pieces, unused = read_pieces(tmp_path, CFG)
    assert [p.name for p in pieces] == ["long.wav"] and set(unused) == {"short.wav", "broken.wav"}
    assert "1.00 s" in unused["short.wav"]


def test_no_title_is_on_both_sides():
    pieces = [piece(3, title, seed) for seed, title in enumerate("AABBCCD")]
    for seed in range(4):
        reference, others = split_pieces(pieces, 5, CFG, seed)
        assert not {p.title for p in reference} & {p.title for p in others}
        assert len(clips_of(others, CFG)) == 5
    with pytest.raises(ValueError, match="the reference has too few blocks"):
        split_pieces(pieces, 20, CFG)
    with pytest.raises(ValueError, match="the reference has too few blocks"):
        split_pieces([piece(9, "alone")], 2, CFG)


# pieces by a model

def made_by_nano(cache: Path, **settings) -> list[Piece]:
    return make_pieces("nano", cache, **{"pieces": 2, "seconds": 4.2, "steps": 2, "seed": 3, **settings})


def test_a_models_pieces_have_their_seeds_and_their_spectrograms(tmp_path):
    made = made_by_nano(tmp_path)
    assert [piece.name for piece in made] == ["seed 3", "seed 4"]
    for seed, piece in zip((3, 4), made, strict=True):
        assert piece.wave.shape == (2 * BLOCK,)
        expected = Piano.from_pretrained("nano").spectrogram(2 * CFG.block_seconds, seed=seed, num_steps=2)
        torch.testing.assert_close(piece.spec, expected, atol=1e-4, rtol=0)
        assert retrieval_residue(piece.spec, piece.wave, CFG).median() < -6
    assert made_by_nano(tmp_path, seconds=2.1)[0].wave.shape == (BLOCK,)


def test_pieces_are_made_once_and_anew_where_settings_differ(tmp_path, monkeypatch):
    made = made_by_nano(tmp_path)
    [file] = tmp_path.iterdir()
    monkeypatch.setattr(Piano, "spectrograms", lambda *args, **kwargs: pytest.fail("made again"))
    for piece, same in zip(made, made_by_nano(tmp_path), strict=True):
        assert torch.equal(piece.wave, same.wave) and torch.equal(piece.spec, same.spec)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-100])  # damaged
    for piece, same in zip(made, made_by_nano(tmp_path), strict=True):
        assert torch.equal(piece.wave, same.wave)
    for n, settings in enumerate(({"steps": 3}, {"sampler": "euler"}, {"seed": 7}, {"seconds": 2.5},
                                  {"guidance": 1.0}, {"guidance_interval": (0.0, 2.0)}), 1):
        made_by_nano(tmp_path, pieces=1, **settings)
        assert len(list(tmp_path.iterdir())) == 1 + n


def test_interrupted_work_goes_on_where_it_was(tmp_path, monkeypatch):
    spectrograms, calls = Piano.spectrograms, []

    def interrupted(self, seconds, seeds, **kwargs):
        calls.append(list(seeds))
        if 9 in seeds and calls.count(calls[-1]) == 1:
            raise KeyboardInterrupt
        return spectrograms(self, seconds, seeds, **kwargs)

    monkeypatch.setattr(Piano, "spectrograms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made_by_nano(tmp_path, pieces=7, seconds=2.1)
    made = made_by_nano(tmp_path, pieces=7, seconds=2.1)
    assert [piece.name for piece in made] == [f"seed {i}" for i in range(3, 10)]
    assert sorted(calls) == [[3, 4, 5, 6, 7], [8, 9], [8, 9]]  # those that were ready are not made again


# rows

def test_rows_are_what_they_say():
    clips = torch.stack([torch.sin(2 * torch.pi * 440 * torch.arange(BLOCK) / 8000)] * 4)
    slow = shifted(clips)
    assert slow.shape == clips.shape
    assert int(torch.fft.rfft(slow[1][:8000]).abs().argmax()) == round(440 * 2 ** (-3 / 12))
    noise = noise_like(clips * torch.tensor([[1.0], [0.1], [0.5], [0.0]]), torch.Generator().manual_seed(0))
    level = torch.tensor([1.0, 0.1, 0.5, 0.0]) * 0.5**0.5
    torch.testing.assert_close(noise.square().mean(1).sqrt(), level, rtol=0.03, atol=0)
    music = clips_of([piece(4, "A")], CFG)
    mixed = shuffled(music, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.square().mean(1), music.square().mean(1), rtol=0.1, atol=0)
    assert (mixed - music).square().mean() > music.square().mean()
    back = retrieved(piece(2, "A"), CFG).wave
    assert back.shape == (2 * BLOCK,)
    torch.testing.assert_close(back.square().mean(), piece(2, "A").wave.square().mean(), rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_the_order_of_the_rows(music):
    real = read_pieces(music / "real", CFG)[0]
    reference, others = split_pieces(real, 12, CFG)
    model = [p._replace(wave=p.wave + 0.05 * torch.randn(p.wave.shape, generator=torch.Generator().manual_seed(0)))
             for p in others]
    rows = make_rows(model, others, [retrieved(p, CFG) for p in others], CFG)
    assert all(row.clips.shape == (12, BLOCK) and torch.equal(row.pieces, rows["real"].pieces) for row in rows.values())
    table = distances(rows, clips_of(reference, CFG), CFG, load_embedding("logmel"))
    assert all(found["clips"] == 12 and found["pieces"] == len(others) for found in table.values())
    for measure in ("frechet", "frechet_infinity", "kernel"):
        assert table["real"][measure] < table["model"][measure] < table["noise"][measure]
        assert abs(table["retrieved"][measure] / table["real"][measure] - 1) < 0.2
    assert all(found["kernel_interval"][0] < found["kernel_interval"][1] for found in table.values())


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_intervals_are_over_pieces_where_these_are_enough(music):
    real = read_pieces(music / "real", CFG)[0]
    row = Row.of(real[:6], CFG)
    assert row.pieces.unique().tolist() == [0, 1, 2, 3, 4, 5] and len(row.pieces) == len(row.clips)
    ear, reference = load_embedding("logmel"), clips_of(real[6:], CFG)
    x = embed(ear, row.clips, CFG.sample_rate)
    distance = kernel_distance_to(embed(ear, reference, CFG.sample_rate))
    few = Row(row.clips, (row.pieces > 2).long())
    table = distances({"many": row, "few": few}, reference, CFG, ear)
    assert table["many"]["kernel_interval"] == interval(distance, x, groups=row.pieces)
    assert table["few"]["kernel_interval"] == interval(distance, x)


def test_a_measure_that_ranks_wrongly_is_told():
    def ranked(floor: float, ceiling: float, model: float, noise: float, split: tuple[float, float] = (2, 2.5)) -> bool:
        rows = {"real": floor, "retrieved": ceiling, "model": model, "noise": noise}
        table = {row: {"frechet": d, "frechet_infinity": d, "frechet_interval": (d - 0.5, d + 0.5)}
                 for row, d in rows.items()}
        return in_order(table, {"real": [1, split[0], 9], "model": [1.5, split[1], 3]})

    assert ranked(1, 2, 3, 4) and ranked(1.2, 1, 3, 4)  # a tie
    assert ranked(3.1, 3, 2, 4)  # an unlucky floor is not that of most splits
    assert not any(ranked(*d) for d in ((2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 4, 4)))
    assert not ranked(1, 2, 3, 4, split=(2.5, 2)) and not ranked(1, 2, 3, 4, split=(2, 2))


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_floors_are_those_of_the_table_split_by_split(music, tmp_path):
    real, ear = read_pieces(music / "real", CFG)[0], load_embedding("logmel")
    made = clips_of(read_pieces(music / "made", CFG)[0], CFG)
    found = floors(real, made, CFG, ear, count=3, seed=5, cache=tmp_path / "kept")
    assert found == floors(real, made, CFG, ear, count=3, seed=5, cache=tmp_path / "kept")
    assert len(set(found["real"])) == len(set(found["model"])) == 3
    for n in range(3):
        reference, others = split_pieces(real, len(made), CFG, 5 + n)
        rows = {"real": Row.of(others, CFG), "model": Row(made, torch.arange(len(made)))}
        table = distances(rows, clips_of(reference, CFG), CFG, ear)
        for row in table:
            assert found[row][n] == pytest.approx(table[row]["frechet"], rel=1e-4)
    far = floors(real, noise_like(made, torch.Generator().manual_seed(0)), CFG, ear, count=3)
    assert farther(far) == 3 and min(far["model"]) > max(far["real"])
    assert farther({"real": [1, 2, 3], "model": [2, 2, 2]}) == 1


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_splits_that_cannot_be_are_left_out():
    pieces = [piece(4, "A", 1), piece(4, "B", 2), piece(1, "C", 3)]
    ear, made = load_embedding("logmel"), clips_of([piece(5, "made", 9)], CFG)
    found = floors(pieces, made, CFG, ear, count=12)
    assert 0 < len(found["real"]) == len(found["model"]) < 12  # where A and B are the others, C is too short


# joins, drift, copies

def test_strangers_are_heard_and_neighbours_are_not(music):
    pieces = read_pieces(music / "real", CFG)[0]
    neighbours = seams([retrieved(p, CFG) for p in pieces], CFG)
    strangers = seams(rejoined(pieces, CFG, across=True), CFG)
    assert neighbours.keys() == strangers.keys() == JOIN_MEASURES.keys()
    assert strangers["residue"]["low"] > 0.8 > neighbours["residue"]["auc"]
    assert strangers["residue"]["join"] > strangers["residue"]["inside"] + 3
    assert seams(pieces, CFG).keys() == JOIN_MEASURES.keys() - {"residue"}  # nothing is known of their spectrograms
    assert strangers["chroma"]["auc"] > neighbours["chroma"]["auc"] + 0.1 or strangers["chroma"]["auc"] < 0.4
    assert neighbours["flux"]["low"] < 0.6
    moved = rejoined(pieces, CFG, across=False)
    assert [len(p.wave) for p in moved] == [len(p.wave) for p in pieces]


def test_a_fading_piece_drifts(music):
    pieces = read_pieces(music / "real", CFG)[0]
    fading = [p._replace(wave=p.wave * torch.logspace(0, -1, len(p.wave))) for p in pieces]
    level = course(fading, CFG)["level"]
    assert level.shape == (10, 4) and (level[:, -1] < level[:, 0] - 5).all()


def test_a_planted_copy_is_found(music, tmp_path):
    prepare(music / "real", tmp_path / "store", CFG, splits=["train"], jobs=1)
    pieces = {p.name: p for p in read_pieces(music / "real", CFG)[0]}
    copied = pieces["take 05.flac"] if "take 05.flac" in training_names(tmp_path / "store") else None
    name = copied.name if copied else training_names(tmp_path / "store")[0]
    made = read_pieces(music / "made", CFG)[0]
    stolen = Piece("stolen.wav", "stolen", 0.5 * pieces[name].wave[1000 : 1000 + 2 * BLOCK])
    found, sides = novelty([*made, stolen], made, tmp_path / "store", CFG)
    for search, verdict in found.items():
        first = verdict["pairs"][0]
        assert first["query"] >= len(clips_of(made, CFG)) and first["recording"] == name.replace(" ", "%20")
        assert verdict["verdict"]["suspicious"][0] == first["query"]
        assert sides[search][0][0].shape == (CFG.n_bins, CFG.n_frames)
        assert {row: len(ratios) for row, ratios in verdict["ratios"].items()} == {"model": 14, "held out": 12}
    assert list(found) == ["spectrogram", "logmel"]
    higher = Piece("higher.wav", "higher", torch.from_numpy(soxr.resample(stolen.wave.numpy(), 2 ** (2 / 12), 1)))
    higher = higher._replace(wave=higher.wave[:BLOCK])
    found, _ = novelty([*made, higher], made, tmp_path / "store", CFG, transpose=2)
    assert found["spectrogram"]["pairs"][0]["query"] == 12 and found["spectrogram"]["pairs"][0]["transposition"] == 2
    blocks = spectrogram_blocks([stolen], CFG)
    assert blocks.shape == (2, CFG.n_bins, CFG.n_frames)


def training_names(store: Path) -> list[str]:
    from pianodiff.data import open_store

    return [r["id"].replace("%20", " ") for r in open_store(store).of("train")]


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


def figures(path: Path) -> dict:
    """A report's figures; the last digits of a distance of eight clips in 96 dimensions hang on memory's alignment."""
    return json.loads(path.read_text(), parse_float=lambda text: round(float(text), 6))


# all of it

@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_the_report_is_whole_and_the_same_twice(music, tmp_path, capsys):
    assert main(["evaluate", f"{music}/made", f"{music}/real", "--out", f"{tmp_path}/a.html", "--blocks", "30"]) == 0
    told = capsys.readouterr()
    assert re.search(r"Fréchet distance \(logmel.*; farther off than other real music in \d+ of 20 splits", told.out)
    assert len(re.findall(r"^warning: .*without full rank", told.err, re.M)) == 1
    evaluate(music / "made", music / "real", tmp_path / "b.html", blocks=30)
    as_json = [figures(tmp_path / f"{name}.json") for name in "ab"]
    for results in as_json:
        del results["seconds"]
    assert as_json[0] == as_json[1]
    assert as_json[0]["generated"]["blocks"] == 12 == as_json[0]["others"]["blocks"]
    for name, split in as_json[0]["floors"].items():
        assert {row: found[0] for row, found in split.items()} == pytest.approx(
            {row: as_json[0]["distances"][name][row]["frechet"] for row in split}, rel=1e-4)
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<audio" in page and page.count("data:image/png") == 5
    assert "Over 20 random splits by title other real music lies at a median of" in page
    for row in ("real", "retrieved", "model: made", "shifted", "shuffled", "noise"):
        assert f"<td>{row}</td>" in page
    assert "residue" in as_json[0]["joins"]["strangers"] and "residue" not in as_json[0]["joins"]["model"]
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["a.html", "a.json", "b.html", "b.json"]


@pytest.mark.filterwarnings("ignore:.*without full rank")
def test_a_model_is_evaluated_by_its_name_and_its_command_gives_the_same(music, tmp_path, monkeypatch):
    monkeypatch.chdir(music)
    prepare(music / "real", tmp_path / "store", CFG, splits=["train"], jobs=1)
    command = f"evaluate nano real --out {tmp_path}/a.html --pieces 2 --seconds 8.2 --steps 2 --sampler heun " \
              f"--seed 1 --training {tmp_path}/store --transpose 1 --blocks 30"
    assert main(shlex.split(command)) == 0
    first = figures(tmp_path / "a.json")
    assert first["seconds"]["making"] > 0 and first["generated"]["name"] == "nano" and first["generated"]["blocks"] == 8
    assert 0 <= first["joins"]["model"]["residue"]["auc"] <= 1
    page = (tmp_path / "a.html").read_text()
    assert "<td>model: nano</td>" in page and "by logmel" in page and "The closest pairs by spectrogram" in page
    program, *words = shlex.split(first["command"])
    assert program == "pianodiff"
    assert main([*words, "--out", f"{tmp_path}/b.html", "--cache", f"{tmp_path}/a.cache"]) == 0
    second = figures(tmp_path / "b.json")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_store_of_other_spectrograms_is_refused(music, tmp_path):
    prepare(music / "made", tmp_path / "store", SPECTROGRAMS["paper-128"], splits=["train"], jobs=1)
    with pytest.raises(ValueError, match="holds other spectrograms than nano's"):
        evaluate("nano", music / "real", tmp_path / "x.html", training=tmp_path / "store")


@pytest.mark.parametrize("arguments, words", [
    (["nowhere", "real"], "nowhere is no folder of sound files, and there is no model 'nowhere'"),
    (["nano", "real", "--steps", "0", "--cache", "kept"], "num_steps"),
    (["nano", "real", "--seconds", "1"], "hold no blocks"),
    (["nano", "real", "--pieces", "0"], "hold no blocks"),
    (["nano", "real", "--pieces", "1", "--seconds", "6.2"], "hold 3 blocks of 2.048 s; give 4 or more"),
    (["nano", "real", "--sampler", "best"], "no sampler 'best'"),
    (["nano", "nowhere"], "nowhere does not exist"),
    (["made", "nowhere"], "nowhere does not exist"),
    (["empty", "real"], "no sound file"),
    (["made", "real", "--out", "report.pdf"], "must end in .html"),
    (["made", "real", "--out", "missing/report.html"], "can't be written to"),
    (["made", "real", "--embeddings", "no/such"], "no/such can't be loaded"),
    (["made", "real", "--embeddings", "logmell"], "no embedding 'logmell'; give logmel,"),
    (["made", "real", "--embeddings"], "an embedding be named; not 2000, 0, 0 and none"),
    (["made", "real", "--blocks", "0"], "blocks must be at least 1"),
    (["nano", "real", "--transpose", "-1"], "transpose and seed at least 0"),
    (["made", "real", "--splits", "best"], "no recordings of the splits best"),
    (["made", "real", "--blocks", "3"], "too few blocks"),
    (["made", "real", "--training", "nowhere", "--blocks", "40"], "nowhere is not a spectrogram store"),
])
def test_bad_input_is_told_in_one_line(music, tmp_path, monkeypatch, capsys, arguments, words):
    (music / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(music)
    before = sorted(music.rglob("*"))
    assert main(["evaluate", *arguments]) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pianodiff:")]
    assert len(message) == 1 and words in message[0]
    assert sorted(music.rglob("*")) == before
