"""The classifier two-sample test: toys whose answer is known, who hears what, and what is refused."""

import pytest
import torch
from conftest import CFG, seed
from torch import Tensor

from pianodiff import classifier
from pianodiff.audio import SpectrogramConfig, to_spectrogram
from pianodiff.classifier import Listener, TwoSample, classifier_section, most_certain, saliency, two_sample
from pianodiff.pieces import Comparison, Piece, Pieces

SMALL = SpectrogramConfig(n_fft=128, hop_length=32, n_frames=64)    # a block is a quarter of a second


def tones(wave: Tensor, draw: torch.Generator) -> Tensor:
    """A chord of three decaying tones, struck anew four times a block."""
    t = torch.arange(512) / 8000
    for at in range(0, len(wave), 512):
        pitch = torch.randint(20, 60, (3, 1), generator=draw)
        chord = (torch.sin(2 * torch.pi * 110 * 2 ** (pitch / 12) * t) * torch.exp(-20 * t)).sum(0)
        wave[at : at + 512] += 0.2 * chord
    return wave


def music(first: int, hiss: float = 0.0, pieces: int = 8, title: str = "", cfg: SpectrogramConfig = SMALL) -> Pieces:
    """Pieces of two blocks of tones over white noise; each has a title of its own if none is given."""
    items = []
    for n in range(first, first + pieces):
        draw = seed(n)
        wave = hiss * torch.randn(2 * cfg.block_samples, generator=draw)
        items.append(Piece(f"{n}.wav", title or f"title {n}", tones(wave, draw)))
    return Pieces(items, cfg)


@pytest.fixture(scope="module")
def told() -> TwoSample:
    return two_sample(music(0, hiss=0.03), music(100), seed=1)


# the statistic


def test_a_fault_in_every_block_is_told(told):
    assert told.auc == told.accuracy == 1 and told.auc_interval == told.accuracy_interval == (1, 1)
    assert told.blocks == (16, 16) and [judges.shape for judges in told.judges] == [(16,), (16,)]
    assert all(judges.unique().tolist() == [0, 1, 2, 3] for judges in told.judges)
    assert told.scores[0].min() > 0 > told.scores[1].max()


def test_equal_sides_are_not_told():
    found = [two_sample(music(1000 * s, 0.01), music(1000 * s + 500, 0.01), folds=2, seed=s) for s in range(6)]
    assert sum(test.auc_interval[0] <= 0.5 <= test.auc_interval[1] for test in found) >= 5
    assert 0.35 < sum(test.auc for test in found) / len(found) < 0.6


# who hears what


def test_nobody_judges_a_title_that_it_has_learnt(monkeypatch):
    """Titles may have several pieces, and pieces on both sides."""
    sides = [Pieces([piece._replace(title=f"{n // 2 + shift}") for n, piece in enumerate(music(first))], SMALL)
             for first, shift in ((0, 0), (100, 2))]
    title = {float(to_spectrogram(piece.wave, SMALL).sum()): piece.title for side in sides for piece in side}
    learnt: dict[Listener, list[set[str]]] = {}

    def teach(listener, known, width, epochs, rng):
        learnt[listener] = [{title[float(whole.sum())] for whole in side} for side in known]
        return listener.eval()

    monkeypatch.setattr(classifier, "_teach", teach)
    found = two_sample(*sides)
    assert len(title) == 16 and len(learnt) == len(found.listeners) == 4
    for side, judges in zip(sides, found.judges, strict=True):
        for piece, judge in zip([piece for piece in side for _ in range(2)], judges.tolist(), strict=True):
            ours, theirs = learnt[found.listeners[judge]]
            assert piece.title not in ours | theirs and ours and theirs
    heard = [set.union(*(known[side] for known in learnt.values())) for side in (0, 1)]
    assert heard == [side.titles for side in sides]


def test_folds_have_equal_shares_of_both_sides():
    sides = music(0, pieces=10), music(100, pieces=7)
    fold = classifier._deal(sides, 3, seed())
    for side in sides:
        sizes = [sum(fold[piece.title] == k for piece in side) for k in range(3)]
        assert max(sizes) - min(sizes) <= 1
    assert fold != classifier._deal(sides, 3, seed(1)) and fold == classifier._deal(sides, 3, seed())


@pytest.mark.parametrize("fold_seed", range(5))
def test_no_fold_is_left_without_a_side_where_titles_are_shared(fold_seed):
    """Three titles of the second side are of the first too, and were dealt with its seven others."""
    sides = music(0, pieces=10), music(0, pieces=3)
    fold = classifier._deal(sides, 3, seed(fold_seed))
    assert all({fold[title] for title in side.titles} == {0, 1, 2} for side in sides)


def test_loudness_is_not_heard_within_the_depth():
    spec = to_spectrogram(music(0).clips[0], SMALL)[None]
    listener = Listener(SMALL)
    peak = float(spec.max())
    for lower in (0.0, (peak - 50 / 80) / 2):
        torch.testing.assert_close(listener.heard((spec - lower).clamp(min=0)), listener.heard(spec))
    assert listener.heard(spec).max() == 1 and listener.heard(spec).min() == 0
    quiet = listener.heard((spec - peak + 0.5).clamp(min=0))    # its loudest pixel lies at -40 dB
    assert float(quiet.max()) == pytest.approx(0.8) and not listener.heard(0 * spec).any()


def test_a_listener_hears_no_deeper_than_it_is_told():
    """Noise far below the tones is found with the whole depth alone."""
    faint, clean = music(0, hiss=2e-3), music(100, hiss=1e-5)
    near, deep = (two_sample(faint, clean, folds=2, epochs=8, depth=depth) for depth in (30.0, 80.0))
    assert near.auc_interval[0] < 0.6 and deep.auc > 0.95


# the same again


def test_equal_seeds_give_equal_scores_on_any_number_of_threads(told):
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = two_sample(music(0, hiss=0.03), music(100), seed=1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(told.scores, again.scores, strict=True))
    assert again.auc_interval == told.auc_interval and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(told.scores[0], two_sample(music(0, hiss=0.03), music(100), seed=2).scores[0])


# what it listens to


def test_evidence_adds_up_to_the_score(told):
    made = music(0, hiss=0.03)
    listener = told.listeners[told.judges[0][5]]
    evidence = saliency(listener, made.specs[5])
    nothing = listener(torch.zeros(1, SMALL.n_bins, SMALL.n_frames)).detach()
    assert evidence.shape == made.specs[5].shape
    assert float(evidence.sum() + nothing) == pytest.approx(float(told.scores[0][5]), rel=0.05)
    assert not saliency(listener, 0 * made.specs[5]).any()


def hissing(piece: Piece) -> Piece:
    """With noise above 2 kHz in the first half of each of its two blocks."""
    spectrum = torch.fft.rfft(torch.randn(len(piece.wave), generator=seed(int(piece.name[:-4]))))
    spectrum[: len(spectrum) // 2] = 0
    halves = torch.fft.irfft(spectrum, n=len(piece.wave)).unflatten(0, (4, -1))
    return piece._replace(wave=piece.wave + 0.03 * (halves * torch.tensor([[1.0], [0], [1], [0]])).flatten())


def test_evidence_lies_where_the_fault_is():
    made = Pieces([hissing(piece) for piece in music(0)], SMALL)
    found = two_sample(made, music(100))
    assert found.auc > 0.9
    evidence = sum(saliency(found.listeners[judge], spec)
                   for judge, spec in zip(found.judges[0].tolist(), made.specs, strict=True))
    (low_first, low_second), (first, second) = evidence.unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum((1, 3))
    assert first > 2 * max(low_first, low_second, second)


def test_the_most_certain_blocks_are_those_of_the_ends(told):
    made, real = music(0, hiss=0.03), music(100)
    chosen = most_certain(told, made, real)
    best, least = told.scores[0].argmax(), told.scores[1].argmin()
    assert [block.title.split(",")[0] for block in chosen] == ["generated", "generated", "real", "real"]
    assert torch.equal(chosen[0].wave, made.clips[best]) and torch.equal(chosen[2].wave, real.clips[least])
    assert chosen[0].evidence.sum() > chosen[2].evidence.sum()


# the report


def test_a_side_of_one_title_is_left_out_of_the_report():
    real, others = music(100), music(200, pieces=4)
    one = music(0, pieces=2, title="seed 0")
    section = classifier_section(Comparison(one, real, real, others, others, 0))
    assert list(section.results["told_apart"]) == ["real", "noise"] and not section.figures and not section.sounds
    assert section.results["told_apart"]["noise"]["auc"] > 0.9
    assert section.results["told_apart"]["real"] == {
        **section.results["told_apart"]["real"], "blocks": [8, 8], "pieces": [4, 4]}


# what is refused

NAN = Pieces([piece._replace(wave=piece.wave / 0) for piece in music(0, pieces=2)], SMALL)


@pytest.mark.parametrize("call, words", [
    (lambda: two_sample(music(0, pieces=1), music(100)), "the generated pieces are of 1 title; give 2 or more"),
    (lambda: two_sample(music(0), music(100, title="one")), "the real pieces are of 1 title"),
    (lambda: two_sample(Pieces([], SMALL), music(100)), "the generated pieces are of 0 titles"),
    (lambda: two_sample(music(0), music(100, cfg=CFG)), "make both with one spectrogram"),
    (lambda: two_sample(NAN, music(100)), "0.wav holds NaN or infinite samples; leave it out"),
    (lambda: two_sample(music(0), music(100), folds=1), "folds must be at least 2"),
    (lambda: two_sample(music(0), music(100), epochs=0), "epochs at least 1"),
    (lambda: two_sample(music(0), music(100), depth=90.0), "depth from 0 to 80"),
    (lambda: saliency(Listener(SMALL), torch.zeros(1, 64, 64)), "a finite spectrogram"),
    (lambda: saliency(Listener(SMALL), torch.full((64, 64), torch.nan)), "a finite spectrogram"),
])
def test_bad_input_is_told_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as told:
        call()
    assert "\n" not in str(told.value)
