"""Pieces that are read and made, their splits, and the rows that are made of them."""

import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pianodiff.audio import SpectrogramConfig, save_audio, to_spectrogram
from pianodiff.evaluate import evaluate
from pianodiff.generate import Piano, Sampling, sampling_of
from pianodiff.joins import retrieval_residue
from pianodiff.model import find_model, load_model, save_model
from pianodiff.pieces import Piece, Pieces, make_pieces, noise_like, read_pieces, retrieved, shifted, shuffled
from pianodiff.synth import example_performance

CFG = SpectrogramConfig()
BLOCK = CFG.block_samples


def piece(blocks: int, title: str, seed: int = 0) -> Piece:
    return Piece(f"{title}-{seed}.wav", title, example_performance(blocks * CFG.block_seconds, seed))


def test_pieces_know_their_blocks():
    pieces = Pieces([piece(2, "A"), piece(3, "B", 1)], CFG)
    assert len(pieces) == 2 and pieces.sizes == [2, 3] and pieces.blocks == 5
    assert pieces.clips.shape == (5, BLOCK) and torch.equal(pieces.clips[2], pieces[1].wave[:BLOCK])
    whole = to_spectrogram(pieces[1].wave, CFG)
    torch.testing.assert_close(pieces.specs[3], whole[:, CFG.n_frames : 2 * CFG.n_frames])
    assert [p.title for p in pieces[1:]] == ["B"] and pieces[1:].cfg == CFG


# reading


def test_pieces_are_whole_blocks_in_order(music):
    pieces = read_pieces(music / "real", CFG)
    assert [p.name for p in pieces] == [f"take {n:02}.flac" for n in range(10)] and not pieces.unused
    assert pieces.sizes == 10 * [4] and pieces.clips.shape == (40, BLOCK)


def test_a_number_of_blocks_is_kept_and_the_seed_decides_which(music):
    first, again, other = (read_pieces(music / "real", CFG, blocks=11, most=3, seed=s) for s in (1, 1, 2))
    assert first.sizes == [3, 3, 3, 2]
    assert [p.name for p in first] == [p.name for p in again] != [p.name for p in other]
    everything = read_pieces(music / "real", CFG, blocks=1000, seed=1)
    assert len(everything) == 10


def test_titles_come_once_before_any_comes_twice(tmp_path):
    rows = ["canonical_composer,canonical_title,split,audio_filename,duration"]
    for n in range(6):
        save_audio(tmp_path / f"{n}.wav", example_performance(2.2, n))
        rows.append(f"Someone,{'Waltz' if n < 4 else f'No. {n}'},{'test' if n else 'train'},{n}.wav,2.2")
    (tmp_path / "index.csv").write_text("\n".join(rows))
    for seed in range(5):
        pieces = read_pieces(tmp_path, CFG, blocks=3, seed=seed, splits=["test"])
        assert len({p.title for p in pieces}) == 3 and "0.wav" not in {p.name for p in pieces}
    with pytest.raises(ValueError, match="no recordings of the splits validation; choose others"):
        read_pieces(tmp_path, CFG, splits=["validation"])


def test_normalized_pieces_have_the_recordings_peak_of_one(music, tmp_path):
    wave = example_performance(10, 3)
    save_audio(tmp_path / "soft.flac", 0.1 * wave)
    assert read_pieces(tmp_path, CFG)[0].wave.abs().max() < 0.11
    assert read_pieces(tmp_path, CFG, normalize=True)[0].wave.abs().max() > 0.8


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
    pieces = read_pieces(tmp_path, CFG)
    assert [p.name for p in pieces] == ["long.wav"] and set(pieces.unused) == {"short.wav", "broken.wav"}
    assert "1.00 s" in pieces.unused["short.wav"]


def test_no_title_is_on_both_sides():
    pieces = Pieces([piece(3, title, seed) for seed, title in enumerate("AABBCCD")], CFG)
    for seed in range(4):
        reference, others = pieces.split(5, seed)
        assert not {p.title for p in reference} & {p.title for p in others}
        assert len(others.clips) == others.blocks == 5
    with pytest.raises(ValueError, match="the reference has too few blocks"):
        pieces.split(20)
    with pytest.raises(ValueError, match="the reference has too few blocks"):
        Pieces([piece(9, "alone")], CFG).split(2)


# a model's pieces


def made_by_nano(cache: Path, **settings) -> Pieces:
    settings = {"pieces": 2, "seconds": 4.2, "sampling": Sampling(num_steps=2), "seed": 3, **settings}
    return make_pieces("nano", cache, **settings)


def test_a_models_pieces_have_their_seeds_and_their_spectrograms(tmp_path):
    made = made_by_nano(tmp_path)
    assert [piece.name for piece in made] == ["seed 3", "seed 4"]
    for seed, piece in zip((3, 4), made, strict=True):
        assert piece.wave.shape == (2 * BLOCK,)
        expected = Piano.from_pretrained("nano").spectrogram(2 * CFG.block_seconds, seed=seed,
                                                             **asdict(Sampling(num_steps=2)))
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
    for n, settings in enumerate([{"seed": 7}, {"seconds": 2.5}] + [{"sampling": sampling} for sampling in (
            Sampling(num_steps=3), Sampling("euler", 2), Sampling(num_steps=2, guidance=1.0),
            Sampling(num_steps=2, guidance_interval=(0.0, 2.0)))], 1):
        made_by_nano(tmp_path, pieces=1, **settings)
        assert len(list(tmp_path.iterdir())) == 1 + n


def test_pieces_are_made_anew_where_the_guide_differs(tmp_path, monkeypatch):
    net, config = load_model(find_model("nano"))
    save_model(tmp_path / "model", net, config | {"guide": "coarse"})
    monkeypatch.setattr("pianodiff.generate.find_model", tmp_path.joinpath)
    monkeypatch.setattr("pianodiff.pieces.find_model", tmp_path.joinpath)
    settings = {"pieces": 1, "seconds": 2.1, "sampling": Sampling(num_steps=2)}
    for bias, kept in ((0, 1), (0, 1), (1, 2)):
        net.out.bias += bias
        save_model(tmp_path / "coarse", net, config)
        make_pieces("model", tmp_path / "cache", **settings)
        assert len(list((tmp_path / "cache").iterdir())) == kept


def test_pieces_are_made_anew_where_the_expert_or_its_guide_differs(tmp_path, monkeypatch):
    net, config = load_model(find_model("nano"))
    save_model(tmp_path / "model", net, config | {"guide": None, "expert": "strong", "expert_above": 1.0})
    monkeypatch.setattr("pianodiff.generate.find_model", tmp_path.joinpath)
    monkeypatch.setattr("pianodiff.pieces.find_model", tmp_path.joinpath)
    settings = {"pieces": 1, "seconds": 2.1, "sampling": Sampling(num_steps=2)}
    for changed, kept in (("", 1), ("strong", 2), ("", 2), ("coarse", 3)):
        net.out.bias += bool(changed)
        for name, facts in (("strong", {"guide": "coarse"}), ("coarse", {"guide": None})):
            if changed in ("", name) and (changed or not (tmp_path / name).exists()):
                save_model(tmp_path / name, net, config | facts)
        make_pieces("model", tmp_path / "cache", **settings)
        assert len(list((tmp_path / "cache").iterdir())) == kept


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


@pytest.mark.skipif(sys.platform == "win32", reason="batches aren't claimed there")
def test_two_at_one_folder_share_the_work(tmp_path, monkeypatch):
    """Both begin a batch at once, none is made twice, and both have all in the end."""
    spectrograms, calls, begun = Piano.spectrograms, [], threading.Barrier(2)

    def noted(self, seconds, seeds, **kwargs):
        calls.append(list(seeds))
        if len(calls) <= 2:
            begun.wait(600)
        return spectrograms(self, seconds, seeds, **kwargs)

    monkeypatch.setattr(Piano, "spectrograms", noted)
    monkeypatch.setattr("os.cpu_count", lambda: 1)    # each makes one batch at a time
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: made_by_nano(tmp_path, pieces=12, seconds=2.1), range(2))
    assert sorted(calls) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    assert [piece.name for piece in first] == [f"seed {i}" for i in range(3, 15)]
    assert all(torch.equal(piece.wave, same.wave) for piece, same in zip(first, second, strict=True))
    assert len(list(tmp_path.iterdir())) == 3    # no claim is left


def test_a_report_finds_the_pieces_that_were_made_before():
    """By the defaults of both, as the chapter has it."""
    asked, made = (inspect.signature(function).parameters for function in (evaluate, make_pieces))
    assert all(asked[name].default == made[name].default for name in ("pieces", "seconds", "seed"))
    how = {name: asked[name].default for name in ("sampler", "steps", "guidance", "guidance_interval")}
    assert all(default is None for default in how.values()) and sampling_of({}) == Sampling()


# rows


def test_rows_are_what_they_say():
    clips = torch.stack([torch.sin(2 * torch.pi * 440 * torch.arange(BLOCK) / 8000)] * 4)
    slow = shifted(clips)
    assert slow.shape == clips.shape
    assert int(torch.fft.rfft(slow[1][:8000]).abs().argmax()) == round(440 * 2 ** (-3 / 12))
    noise = noise_like(clips * torch.tensor([[1.0], [0.1], [0.5], [0.0]]), torch.Generator().manual_seed(0))
    level = torch.tensor([1.0, 0.1, 0.5, 0.0]) * 0.5**0.5
    torch.testing.assert_close(noise.square().mean(1).sqrt(), level, rtol=0.03, atol=0)
    music = Pieces([piece(4, "A")], CFG).clips
    mixed = shuffled(music, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.square().mean(1), music.square().mean(1), rtol=0.1, atol=0)
    assert (mixed - music).square().mean() > music.square().mean()
    back = retrieved(Pieces([piece(2, "A")], CFG))[0].wave
    assert back.shape == (2 * BLOCK,)
    torch.testing.assert_close(back.square().mean(), piece(2, "A").wave.square().mean(), rtol=0.1, atol=0)
