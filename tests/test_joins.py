"""Joins on sounds whose answers are known, and what phase retrieval leaves over."""

import pytest
import torch
from conftest import BLOCK, BLOCKS, CFG, seed
from torch import Tensor

from pianodiff.audio import to_spectrogram
from pianodiff.joins import (
    JOIN_MEASURES,
    excess,
    inside_positions,
    join,
    join_measures,
    join_positions,
    rejoined,
    retrieval_residue,
    seams,
)
from pianodiff.music import drift, trend
from pianodiff.phases import to_wave
from pianodiff.pieces import Piece, Pieces, read_pieces, retrieved


@pytest.fixture(scope="module")
def blocks(pieces) -> list[tuple[Tensor, ...]]:
    return [to_spectrogram(wave, CFG).split(CFG.n_frames, 1) for wave in pieces]


def sound(specs, n_iter: int = 12) -> Tensor:
    return join(specs, CFG, n_iter=n_iter, generator=seed())


@pytest.fixture(scope="module")
def neighbours(blocks) -> list[Tensor]:
    return [sound(piece) for piece in blocks]


def told(waves) -> dict:
    """The excess of each measure at the joins over the insides of several waves."""
    sides = [[join_measures(w, where(len(w), CFG), CFG) for w in waves] for where in (join_positions, inside_positions)]
    joins, inside = ({name: torch.cat([m[name] for m in side]) for name in side[0]} for side in sides)
    return {name: excess(joins[name], inside[name]) for name in joins}


def test_positions():
    assert join_positions(3 * BLOCK + 5, CFG).tolist() == [BLOCK, 2 * BLOCK]
    assert inside_positions(3 * BLOCK + 5, CFG).tolist() == [BLOCK // 2, 3 * BLOCK // 2, 5 * BLOCK // 2]


def test_joined_blocks_are_one_spectrogram(blocks):
    wave = sound(blocks[0][:3])
    assert wave.shape == (3 * BLOCK,)
    torch.testing.assert_close(wave, to_wave(torch.cat(blocks[0][:3], 1), CFG, n_iter=12, generator=seed()))


def test_real_neighbours_cannot_be_told_apart(neighbours):
    found = told(neighbours)
    assert list(found) == [name for name in JOIN_MEASURES if name != "residue"]
    assert sum(e.low < 0.5 < e.high for e in found.values()) >= 3  # of four intervals of 95 % one may miss by chance
    assert all(abs(e.auc - 0.5) < 0.15 for e in found.values())


def test_shuffled_neighbours_are_told_apart(blocks):
    every = [block for piece in blocks for block in piece]
    mixed = [every[i] for i in torch.randperm(len(every), generator=seed(1))]
    found = told([sound(mixed[i : i + BLOCKS]) for i in range(0, len(mixed), BLOCKS)])
    assert found["flux"].auc > 0.85 and found["flux"].low > 0.7
    assert found["chroma"].auc < 0.3 and found["chroma"].high < 0.4


@pytest.mark.parametrize("decibels", [6, -6])
def test_a_planted_jump_of_loudness_is_found(neighbours, decibels):
    odd = torch.arange(BLOCKS * BLOCK) // BLOCK % 2 == 1
    found = told([w * torch.where(odd, 10 ** (decibels / 20), 1.0) for w in neighbours])["level_jump"]
    assert found.auc > 0.93 and found.low > 0.85


def test_a_planted_jump_survives_phase_retrieval(blocks):
    louder = [[(b + k % 2 * 6 / CFG.top_db).clamp(0, 1) for k, b in enumerate(piece)] for piece in blocks]
    found = told([sound(piece) for piece in louder])["level_jump"]
    assert found.auc > 0.9 and found.low > 0.8


def test_a_planted_click_is_found(neighbours):
    where = torch.zeros(BLOCKS * BLOCK).index_fill(0, join_positions(BLOCKS * BLOCK, CFG), 1.0)
    offset = told([w + 0.03 * where for w in neighbours])
    assert offset["click"].auc > 0.97 and offset["click"].low > 0.9
    assert all(offset[name].low < 0.5 < offset[name].high for name in ("flux", "level_jump", "chroma"))


def test_a_planted_jump_of_phase_is_found(neighbours):
    """Eight samples are left out at each join: level, harmony and spectrum stay."""
    cut = [torch.cat([part[:BLOCK] for part in w.split(BLOCK + 8)]) for w in neighbours]
    found = told(cut)
    assert found["click"].auc > 0.95 and found["click"].low > 0.85 and found["chroma"].low < 0.5 < found["chroma"].high


def test_measures_of_a_steady_chord():
    t = torch.arange(2 * BLOCK) / 8000
    chord = 0.1 * sum(torch.sin(2 * torch.pi * f * t) for f in (262, 330, 392)) + 1e-4 * torch.randn(
        len(t), generator=seed())
    later = t >= t[BLOCK]
    for gain, expected in ((1.0, 0.0), (2.0, 6.02), (0.5, 6.02)):
        found = join_measures(chord * torch.where(later, gain, 1.0), [BLOCK], CFG)
        assert float(found["level_jump"]) == pytest.approx(expected, abs=0.2) and found["chroma"] > 0.99
    wave = chord.clone()
    wave[BLOCK] += 0.01
    at = [BLOCK - 500, BLOCK, BLOCK + 500]
    click = join_measures(wave, at, CFG)["click"]
    assert click[1] > click[[0, 2]].max() + 15
    other = 0.1 * sum(torch.sin(2 * torch.pi * f * t) for f in (277, 349, 415))
    assert join_measures(torch.where(later, other, chord), torch.tensor([BLOCK]), CFG)["chroma"] < 0.3


def test_measures_are_local_and_do_not_depend_on_the_others(pieces):
    at = join_positions(len(pieces[0]), CFG)
    together = join_measures(pieces[0], at, CFG)
    changed = pieces[0].clone()
    changed[: int(at[2]) - 4000] = 0
    alone = join_measures(changed, at[2:3], CFG)
    for name, values in together.items():
        assert values.shape == at.shape
        torch.testing.assert_close(values[2:3], alone[name])


def test_silence_at_a_join():
    found = join_measures(torch.zeros(2 * BLOCK), [BLOCK], CFG)
    assert found["chroma"].isnan() and [float(found[n]) for n in ("flux", "level_jump", "click")] == [0, 0, 0]


def test_residue_of_phase_retrieval(blocks, pieces):
    spec = torch.cat(blocks[0][:2], 1)
    exact = retrieval_residue(spec, pieces[0][: 2 * BLOCK], CFG)
    assert exact.shape == (256,) and exact[:253].max() < -80  # the last frames saw the next block
    waves = (to_wave(spec, CFG, n_iter=n, init="random", generator=seed()) for n in (2, 30))
    rough, fine = (retrieval_residue(spec, wave, CFG).median() for wave in waves)
    assert fine < rough - 5
    assert retrieval_residue(spec, torch.zeros(2 * BLOCK), CFG).median() == pytest.approx(0, abs=0.5)
    softer = retrieval_residue(spec, 0.5 * pieces[0][: 2 * BLOCK], CFG)[:250].median()
    assert softer == pytest.approx(-6.02, abs=0.3)  # half is missing


def test_seams_are_the_excess_of_several_pieces(neighbours):
    found = seams(Pieces([Piece(str(i), str(i), wave) for i, wave in enumerate(neighbours)], CFG))
    for name, expected in told(neighbours).items():
        assert (found[name]["auc"], found[name]["low"], found[name]["high"]) == pytest.approx(expected)
    assert seams(Pieces([Piece("one", "one", neighbours[0][:BLOCK])], CFG)) == {}  # a block has no join


def test_strangers_are_heard_and_neighbours_are_not(music):
    pieces = read_pieces(music / "real", CFG)
    neighbours = seams(retrieved(pieces))
    strangers = seams(rejoined(pieces, across=True))
    assert neighbours.keys() == strangers.keys() == JOIN_MEASURES.keys()
    assert strangers["residue"]["low"] > 0.8 > neighbours["residue"]["auc"]
    assert strangers["residue"]["join"] > strangers["residue"]["inside"] + 3
    assert seams(pieces).keys() == JOIN_MEASURES.keys() - {"residue"}  # nothing is known of their spectrograms
    assert strangers["chroma"]["auc"] > neighbours["chroma"]["auc"] + 0.1 or strangers["chroma"]["auc"] < 0.4
    assert neighbours["flux"]["low"] < 0.6
    assert rejoined(pieces, across=False).sizes == pieces.sizes


def test_excess_counts_pairs():
    x, y = torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.tensor([2.0, 0.0])
    found = excess(x, y)
    assert found.auc == pytest.approx((1 + 1.5 + 2) / 6) and 0 <= found.low <= found.auc <= found.high <= 1
    assert found == excess(x, y) and excess(-x, -y).auc == pytest.approx(1 - found.auc)


def test_interval_of_excess_holds_chance():
    held = sum(e.low <= 0.5 <= e.high for e in (excess(*torch.randn(2, 40, generator=seed(s))) for s in range(60)))
    assert 50 <= held <= 60


def test_interval_shrinks_with_the_sample():
    few, many = (excess(*torch.randn(2, n, generator=seed(n))) for n in (20, 500))
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_an_interval_of_excess_is_over_groups():
    """Values of one group are alike: a thousand in forty groups leave more to chance than they would alone."""
    rows = [torch.randn(40, 1, generator=seed(s)).expand(40, 25).flatten() for s in (0, 1)]
    groups = tuple(torch.arange(40).repeat_interleave(25) for _ in rows)
    grouped, alone = excess(*rows, groups=groups), excess(*rows)
    assert grouped.auc == alone.auc and grouped.high - grouped.low > 3 * (alone.high - alone.low)
    rows[0][:25] = torch.nan    # all of one group
    assert excess(*rows, groups=groups) == excess(rows[0][25:], rows[1], groups=(groups[0][25:], groups[1]))
    with pytest.raises(ValueError, match=r"groups must number each value, not be of shapes \[\[999\], \[1000\]\]"):
        excess(*rows, groups=(groups[0][1:], groups[1]))


def test_a_planted_fade_is_drift_and_no_join(neighbours):
    waves = torch.stack(neighbours)
    fade = 10 ** (-torch.arange(BLOCKS * BLOCK) / BLOCK / 20)  # 1 dB a block
    still, fading = (trend(drift(w, CFG)["level"]) for w in (waves, waves * fade))
    assert still.low < 0 < still.high and fading.high < 0
    assert fading.slope - still.slope == pytest.approx(-1, abs=0.03)
    found = told(list(waves * fade))["level_jump"]
    assert found.low < 0.5 < found.high


# bad input


WAVE = torch.zeros(1, 3 * BLOCK)


@pytest.mark.parametrize("call, words", [
    (lambda: join_positions(BLOCK, CFG), "at least two blocks"),
    (lambda: inside_positions(BLOCK - 1, CFG), "no whole block"),
    (lambda: join_measures(WAVE, [BLOCK], CFG), r"wave \[T\]"),
    (lambda: join_measures(WAVE[0] / 0, [BLOCK], CFG), "finite"),
    (lambda: join_measures(WAVE[0], [], CFG), r"positions"),
    (lambda: join_measures(WAVE[0], [0.5], CFG), "whole numbers"),
    (lambda: join_measures(WAVE[0], [3999], CFG), "keep 4000 samples away"),
    (lambda: join_measures(WAVE[0], [3 * BLOCK - 3999], CFG), "keep 4000 samples away"),
    (lambda: join([], CFG), "no block"),
    (lambda: join([torch.zeros(256, 127)], CFG), r"\[256, 128\]"),
    (lambda: retrieval_residue(torch.zeros(256, 128), WAVE[0], CFG), r"frames \* 128"),
    (lambda: excess(torch.ones(1), torch.ones(9)), "at least 2"),
    (lambda: excess(torch.full((9,), torch.nan), torch.ones(9)), "0 values at joins"),
])
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
