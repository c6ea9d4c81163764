"""The nearest training passages against brute force, planted copies, and what is refused (chapter 9)."""

import csv
import math
from pathlib import Path

import pytest
import soxr
import torch
import zarr
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pianodiff.audio import SpectrogramConfig, save_audio, to_spectrogram
from pianodiff.data import open_store, prepare
from pianodiff.distance import LogMel
from pianodiff.novelty import (
    LOWEST_PITCH,
    Corpus,
    Neighbours,
    calibrate,
    closest_pairs,
    nearest_vectors,
    novelty,
    novelty_ratio,
    semitone_bands,
)
from pianodiff.phases import to_wave
from pianodiff.pieces import Piece, Pieces, read_pieces

CFG = SpectrogramConfig(n_fft=256, hop_length=64, n_frames=64)    # a block is 4096 samples, half a second
TITLES = [f"piece {i}" for i in range(12)] + ["piece 0", "piece 0"]    # the first is there in three performances


def music(seed: int, seconds: float = 5.0) -> torch.Tensor:
    """Decaying tones on random semitones, eight a second."""
    generator, wave = torch.Generator().manual_seed(seed), torch.zeros(round(seconds * 8000))
    t = torch.arange(4000) / 8000
    for onset in range(0, len(wave), 1000):
        pitch = int(torch.randint(45, 85, (), generator=generator))
        f = 440 * 2 ** ((pitch - 69) / 12)
        tone = sum((2 * math.pi * n * f * t).sin() / n for n in range(1, 5) if n * f < 3800) * torch.exp(-8 * t)
        wave[onset : onset + 4000] += (0.2 * tone)[: len(wave) - onset]
    return wave


def write(folder: Path, waves: dict[str, tuple[str, str, torch.Tensor]]) -> Path:
    """A store of {name: (split, title, wave)}."""
    folder.mkdir(exist_ok=True)
    with open(folder / "index.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("canonical_composer", "canonical_title", "split", "audio_filename", "duration"))
        for name, (split, title, wave) in waves.items():
            save_audio(folder / name, wave)
            writer.writerow(("", title, split, name, 1))
    prepare(folder, folder / "store", CFG, jobs=1)
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    waves = {f"{i:02}.wav": ("train", title, music(i)) for i, title in enumerate(TITLES)}
    waves |= {f"v{i}.wav": ("validation", f"other {i}", music(100 + i)) for i in range(10)}
    return write(tmp_path_factory.mktemp("music"), waves)


@pytest.fixture(scope="module")
def corpus(store) -> Corpus:
    return Corpus.of(store, progress=False)


def blocks_of(corpus: Corpus, step: int, first: int = 5) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    places = [(r["id"], n) for r in corpus.recordings for n in range(first, r["frames"] - CFG.n_frames + 1, step)]
    return torch.stack([corpus.block(*place) for place in places]), places


def dirty(blocks: torch.Tensor, noise: float = 0.05) -> torch.Tensor:
    """6 dB quieter, noise in every pixel, through Griffin-Lim and back."""
    generator = torch.Generator().manual_seed(0)
    quieter = (blocks - 6 / CFG.top_db + noise * torch.randn(blocks.shape, generator=generator)).clamp(0, 1)
    return to_spectrogram(to_wave(quieter, CFG, generator=generator), CFG)


def test_a_tone_lies_in_its_band():
    for cfg in (CFG, SpectrogramConfig(), SpectrogramConfig(sample_rate=16000, n_fft=1024)):
        bands = semitone_bands(cfg)
        torch.testing.assert_close(bands.sum(1), torch.ones(len(bands)))
        for pitch in (81, 90, 99):
            t = torch.arange(cfg.sample_rate) / cfg.sample_rate
            spec = to_spectrogram((2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * t).sin(), cfg)
            assert abs(int((bands @ spec).mean(1).argmax()) + LOWEST_PITCH - pitch) <= 1
    with pytest.raises(ValueError, match="sample rate of 100"):
        semitone_bands(SpectrogramConfig(sample_rate=100))


def test_planted_copies_are_found_to_the_frame(corpus):
    originals, places = blocks_of(corpus, 211)
    found = corpus.nearest(dirty(originals), k=8)
    for names, frame, (name, start) in zip(found.recording, found.frame, places, strict=True):
        assert names[0] == name and abs(int(frame[0]) - start) <= 1
    exact = corpus.nearest(originals, k=8)
    assert exact.distance[:, 0].max() < 0.01 and exact.frame[:, 0].tolist() == [start for _, start in places]
    assert novelty_ratio(exact).max() < 0.02 and novelty_ratio(found).max() < 0.65
    assert (found.transposition == 0).all()


def test_level_does_not_hide_a_copy(corpus):
    originals, _ = blocks_of(corpus, 211)
    quiet = corpus.nearest((originals - 10 / CFG.top_db).clamp(0, 1), k=8)
    assert novelty_ratio(quiet).max() < 0.5


def test_held_out_music_is_not_flagged_and_copies_are(store, corpus):
    held_out = Corpus.of(store, "validation", progress=False)
    real = novelty_ratio(corpus.nearest(blocks_of(held_out, 37)[0]))
    copies = novelty_ratio(corpus.nearest(dirty(blocks_of(corpus, 211)[0])))
    verdict = calibrate(copies, real)
    assert verdict.share == 1 and verdict.auc == 1 and verdict.p_value < 1e-6
    assert verdict.suspicious == copies.argsort(stable=True).tolist()
    fair = calibrate(real[::2], real[1::2], quantile=0.05)
    assert fair.low <= 0.05 <= fair.high and fair.p_value > 0.01


def test_a_transposed_copy_is_found(corpus):
    originals, places = blocks_of(corpus, 97)
    row = torch.arange(CFG.n_bins) * 2 ** (-3 / 12)
    low = row.long().clamp(max=CFG.n_bins - 2)
    raised = torch.lerp(originals[:, low], originals[:, low + 1], (row - low)[:, None])
    found = corpus.nearest(raised, k=8, transpose=4)
    right = [names[0] == name and abs(int(n[0]) - start) <= 1 and int(t[0]) == 3 for names, n, t, (name, start)
             in zip(found.recording, found.frame, found.transposition, places, strict=True)]
    assert sum(right) >= 0.95 * len(right)
    assert novelty_ratio(found).median() < 0.7 * novelty_ratio(corpus.nearest(raised, k=8)).median()


def test_neighbours_agree_with_brute_force(store, corpus):
    """Every frame of every recording at full resolution, one after the other."""
    queries = blocks_of(Corpus.of(store, "validation", progress=False), 400)[0][:6]
    bands = semitone_bands(CFG)

    def unit(x):
        x = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
        return x / x.norm(dim=1, keepdim=True)

    best: dict[str, torch.Tensor] = {}
    for r in corpus.recordings:
        codes = torch.from_numpy(zarr.open_group(store, mode="r")[r["id"]][:]) / 255
        passages = codes.unfold(0, CFG.n_frames, 1)    # a view [all, 128, 64]
        distance = torch.cdist(unit(bands @ queries), unit(bands @ passages)).amin(1)
        best[r["title"]] = torch.minimum(best.get(r["title"], distance), distance)
    expected = torch.stack(list(best.values()), 1).sort(1).values[:, :5]
    found = corpus.nearest(queries, k=5).distance
    assert (found >= expected - 1e-3).all()    # the coarse search may miss the nearest frame, and never finds a nearer
    assert (found - expected).mean() < 0.02


def test_each_piece_counts_once(corpus):
    originals, places = blocks_of(corpus, 211)
    title = {r["id"]: r["title"] for r in corpus.recordings}
    found = corpus.nearest(originals, k=12)
    assert corpus.pieces == 12 and len(corpus.recordings) == 14
    for names in found.recording:
        assert len({title[name] for name in names}) == 12
    assert (found.distance.diff(dim=1) >= 0).all()


def test_two_performances_of_a_piece_do_not_hide_a_copy(tmp_path):
    """The same passage in three recordings of one title: the ratio is as low as with one."""
    waves = {f"{i}.wav": ("train", f"piece {i}", music(i)) for i in range(8)}
    waves |= {f"again{i}.wav": ("train", "piece 0", music(0)) for i in range(2)}
    corpus = Corpus.of(write(tmp_path / "a", waves), progress=False)
    ratio = novelty_ratio(corpus.nearest(corpus.block("0.wav", 37)[None], k=6))
    assert ratio < 0.02


def test_silence_is_no_copy(corpus):
    found = corpus.nearest(torch.stack([torch.zeros(CFG.n_bins, 64), torch.full((CFG.n_bins, 64), 0.5)]), k=4)
    torch.testing.assert_close(found.distance, torch.full((2, 4), math.sqrt(2)))
    torch.testing.assert_close(novelty_ratio(found), torch.ones(2))


def test_silent_passages_are_near_to_nothing(tmp_path):
    waves = {f"{i}.wav": ("train", "", torch.cat([music(i, 2), torch.zeros(16000)])) for i in range(4)}
    corpus = Corpus.of(write(tmp_path / "a", waves), progress=False)
    assert corpus.pieces == 4    # without titles each recording counts
    found = corpus.nearest(dirty(corpus.block("0.wav", 51)[None], 0.0), k=3)
    assert found.recording[0][0] == "0.wav" and abs(int(found.frame[0, 0]) - 51) <= 1


def test_the_embedding_is_searched_exactly(corpus):
    """Against LogMel's points one by one, of passages half a block apart, level with each other."""
    def point(block):
        levels = LogMel.levels(block, CFG)
        return LogMel.points(levels - levels.mean())

    queries = torch.stack([corpus.block("03.wav", 200), corpus.block("00.wav", 40).flip(1)])
    found = corpus.nearest_heard(queries, k=12)
    title = {r["id"]: r["title"] for r in corpus.recordings}
    for q, query in enumerate(queries):
        nearest = {}
        for r in corpus.recordings:
            for frame in range(0, r["frames"] - 63, 32):
                distance = float((point(corpus.block(r["id"], frame)) - point(query)).norm())
                nearest[r["title"]] = min(nearest.get(r["title"], (9e9,)), (distance, r["id"], frame))
        expected = sorted(nearest.values())
        torch.testing.assert_close(found.distance[q], torch.tensor([e[0] for e in expected]), atol=1e-4, rtol=1e-4)
        assert (found.recording[q][0], int(found.frame[q, 0])) == expected[0][1:]
        assert len({title[name] for name in found.recording[q]}) == 12


def test_copies_are_heard_at_any_level_and_silence_is_none(corpus):
    originals, places = blocks_of(corpus, 210)
    found = corpus.nearest_heard((originals - 6 / 80).clamp(min=0), k=6)
    assert sum(names[0] == place[0] for names, place in zip(found.recording, places, strict=True)) >= len(places) - 1
    assert novelty_ratio(found).median() < 0.6 and not found.transposition.any()
    still = corpus.nearest_heard(torch.stack([torch.zeros(CFG.n_bins, 64), originals[0]]), k=4)
    assert novelty_ratio(still)[0] == 1 > novelty_ratio(still)[1]
    assert found[2:4].recording == found.recording[2:4] and torch.equal(found[2:4].frame, found.frame[2:4])


def test_same_twice_and_in_parts(corpus):
    blocks, _ = blocks_of(corpus, 300)
    a, b = corpus.nearest(blocks, k=6, transpose=1), corpus.nearest(blocks, k=6, transpose=1)
    assert torch.equal(a.distance, b.distance) and torch.equal(a.frame, b.frame) and a.recording == b.recording
    one = corpus.nearest(blocks[3:4], k=6, transpose=1)
    torch.testing.assert_close(one.distance[0], a.distance[3], atol=2e-3, rtol=0)
    assert one.frame[0, 0] == a.frame[3, 0]


def test_long_recordings_are_searched_in_stretches(corpus, monkeypatch):
    blocks, _ = blocks_of(corpus, 150)
    whole = corpus.nearest(blocks, k=5)
    monkeypatch.setattr("pianodiff.novelty._STRETCH", 7)    # of 140 columns
    parts = corpus.nearest(blocks, k=5)
    assert torch.equal(whole.frame[:, 0], parts.frame[:, 0])
    assert (parts.distance[:, 0] <= whole.distance[:, 0] + 1e-4).all()


def test_the_cache_is_keyed_by_content_and_survives_damage(store, corpus, tmp_path):
    cache = tmp_path / "deep" / "cache"
    assert torch.equal(Corpus.of(store, cache=cache, progress=False).bands, corpus.bands)
    assert torch.equal(Corpus.of(store, cache=cache, progress=False).points, corpus.points)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 500, whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert torch.equal(Corpus.of(store, cache=cache, progress=False).bands, corpus.bands)
        assert file.read_bytes() == whole
    Corpus.of(store, "validation", cache=cache, progress=False)
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written"):
        Corpus.of(store, cache=tmp_path / "file", progress=False)


def test_a_warm_cache_is_used(store, tmp_path, monkeypatch):
    Corpus.of(store, cache=tmp_path, progress=False)
    monkeypatch.setattr("pianodiff.novelty._digested", None)
    Corpus.of(store, cache=tmp_path, progress=False)
    monkeypatch.setattr("pianodiff.novelty._VERSION", 0)    # of another version it is not
    with pytest.raises(TypeError):
        Corpus.of(store, cache=tmp_path, progress=False)


class Largest(TorchDispatchMode):
    """Notes the largest memory that one tensor holds."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_queries_times_windows(corpus, monkeypatch):
    monkeypatch.setattr("pianodiff.novelty._STRETCH", 128)
    monkeypatch.setattr("pianodiff.novelty.ahead", lambda make, items, jobs: map(make, items))    # it sees one thread
    many = Corpus(corpus.store, corpus.split, corpus.recordings * 10, corpus.bands.repeat(10, 1), corpus.points)
    block = corpus.block("00.wav", 9)
    with Largest() as largest:
        many.nearest(block.expand(300, -1, -1), k=3)
    assert largest.bytes < 300 * len(many.bands) * 4 / 2    # of all distances, which would be one tensor


def test_what_nearest_refuses(store, corpus, tmp_path):
    block = corpus.block("00.wav", 0)[None]
    for bad, options, message in (
        (block[0], {}, "blocks"), (block[..., :32], {}, "blocks"), (block[:0], {}, "blocks"),
        (block * math.nan, {}, "NaN"), (block + 1, {}, "outside"),
        (block, {"k": 13}, "12 pieces"), (block, {"k": 0}, "k is 0"), (block, {"transpose": -1}, "transpose"),
        (block, {"transpose": 40}, "transpose"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus.nearest(bad, **options)
        if "transpose" not in options:
            with pytest.raises(ValueError, match=message):
                corpus.nearest_heard(bad, **options)
    for name, frame in (("none.wav", 0), ("00.wav", -1), ("00.wav", 10**6)):
        with pytest.raises(ValueError, match=name):
            corpus.block(name, frame)
    with pytest.raises(ValueError, match="no recordings"):
        Corpus.of(store, "test")
    with pytest.raises(FileNotFoundError):
        Corpus.of(tmp_path / "nothing")


def test_ratio():
    distance = torch.tensor([[0.2, 0.9, 1.1], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([0.2, 1.0, 1.0])
    torch.testing.assert_close(novelty_ratio(distance), expected)
    ids, zeros = [["a", "b", "c"]] * 3, torch.zeros(3, 3, dtype=torch.long)
    neighbours = Neighbours(distance, ids, zeros + 7, zeros - 2)
    torch.testing.assert_close(novelty_ratio(neighbours), expected)
    (pair,) = closest_pairs(neighbours, 1)
    assert pair[:4] == (0, "a", 7, -2) and pair.ratio == pytest.approx(0.2) and pair.distance == pytest.approx(0.2)
    assert [p.query for p in closest_pairs(neighbours)] == [0, 1, 2]
    for bad in (distance[:, :1], distance[0], distance.flip(1), distance * math.nan, distance - 1):
        with pytest.raises(ValueError, match="distances"):
            novelty_ratio(bad)


@pytest.mark.parametrize("ties", [False, True])
def test_calibration_agrees_with_scipy(ties):
    generator = torch.Generator().manual_seed(1)
    g, h = torch.rand(150, generator=generator) * 0.95, torch.rand(250, generator=generator)
    if ties:
        g, h = (g * 10).round() / 10, (h * 10).round() / 10
    verdict = calibrate(g, h, quantile=0.1, confidence=0.9)
    test = stats.mannwhitneyu(g.numpy(), h.numpy(), alternative="less", method="asymptotic")
    assert verdict.auc == pytest.approx(1 - test.statistic / (150 * 250))
    assert verdict.p_value == pytest.approx(test.pvalue, rel=1e-6)
    count = len(verdict.suspicious)
    interval = stats.binomtest(count, 150).proportion_ci(0.9, method="wilson")
    assert (verdict.low, verdict.high) == pytest.approx((interval.low, interval.high))
    assert verdict.share == count / 150 and verdict.threshold == h.sort().values[24]
    assert verdict.expected == pytest.approx(25 / 251)


def test_like_ratios_are_flagged_as_rarely_as_promised():
    generator = torch.Generator().manual_seed(2)
    flagged = [calibrate(*torch.rand(2, 99, generator=generator)).share for _ in range(400)]
    assert sum(flagged) / 400 == pytest.approx(0.01, abs=0.002)


def test_what_calibrate_refuses():
    good = torch.rand(99)
    calibrate(good, good)
    for g, h, options, message in (
        (good, good[:98], {}, "needs 99"), (good[:0], good, {}, "finite"), (good * math.nan, good, {}, "finite"),
        (good[None], good, {}, "finite"), (good, good, {"quantile": 0.0}, "between"),
        (good, good, {"confidence": 1.0}, "between"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(g, h, **options)
    same = calibrate(torch.ones(5), torch.ones(99))
    assert same.auc == 0.5 and same.p_value == 1


@pytest.mark.parametrize("chunk", [1, 1000, 2**25])
def test_vectors_agree_with_brute_force(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(40, 16, generator=generator) + 100, torch.randn(300, 16, generator=generator) + 100
    vectors[7] = queries[3]
    distance, index = nearest_vectors(queries, vectors, k=6, chunk=chunk)
    exact = torch.cdist(queries.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.topk(6, largest=False)
    torch.testing.assert_close(distance.double(), expected.values, atol=1e-6, rtol=1e-6)
    assert torch.equal(index, expected.indices) and distance[3, 0] == 0 and index[3, 0] == 7
    groups = torch.randint(20, (300,), generator=generator)
    distance, index = nearest_vectors(queries, vectors, k=6, groups=groups, chunk=chunk)
    nearest = torch.stack([exact[:, groups == i].amin(1) for i in groups.unique()], 1).sort(1).values[:, :6]
    torch.testing.assert_close(distance.double(), nearest, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(exact.gather(1, index), nearest, atol=1e-6, rtol=1e-6)
    assert all(len(set(row.tolist())) == 6 for row in groups[index])


def test_what_nearest_vectors_refuses():
    q, c = torch.rand(3, 4), torch.rand(5, 4)
    for bad, options, message in (
        ((q, c[:, :3]), {"k": 2}, "vectors"), ((q[0], c), {"k": 2}, "vectors"), ((q[:0], c), {"k": 2}, "vectors"),
        ((q * math.nan, c), {"k": 2}, "NaN"), ((q, c), {"k": 6}, "k is 6"), ((q, c), {"k": 0}, "k is 0"),
        ((q, c), {"k": 3, "groups": torch.tensor([0, 0, 1, 1, 1])}, "2 vectors or groups"),
        ((q, c), {"k": 1, "groups": torch.tensor([0, 1])}, "groups"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_vectors(*bad, **options)


# of an evaluation


def test_a_planted_copy_is_found_among_pieces(music, tmp_path):
    cfg = SpectrogramConfig()
    prepare(music / "real", tmp_path / "store", cfg, splits=["train"], jobs=1)
    pieces = {p.name: p for p in read_pieces(music / "real", cfg)}
    copied = pieces["take 05.flac"] if "take 05.flac" in training_names(tmp_path / "store") else None
    name = copied.name if copied else training_names(tmp_path / "store")[0]
    made = read_pieces(music / "made", cfg)
    stolen = Piece("stolen.wav", "stolen", 0.5 * pieces[name].wave[1000 : 1000 + 2 * cfg.block_samples])
    found, sides = novelty(Pieces([*made, stolen], cfg), made, tmp_path / "store")
    for search, verdict in found.items():
        first = verdict["pairs"][0]
        assert first["query"] >= made.blocks and first["recording"] == name.replace(" ", "%20")
        assert verdict["verdict"]["suspicious"][0] == first["query"]
        assert sides[search][0][0].shape == (cfg.n_bins, cfg.n_frames)
        assert {row: len(ratios) for row, ratios in verdict["ratios"].items()} == {"model": 14, "held out": 12}
    assert list(found) == ["spectrogram", "logmel"]
    higher = Piece("higher.wav", "higher", torch.from_numpy(soxr.resample(stolen.wave.numpy(), 2 ** (2 / 12), 1)))
    higher = higher._replace(wave=higher.wave[: cfg.block_samples])
    found, _ = novelty(Pieces([*made, higher], cfg), made, tmp_path / "store", transpose=2)
    assert found["spectrogram"]["pairs"][0]["query"] == 12 and found["spectrogram"]["pairs"][0]["transposition"] == 2


def training_names(store: Path) -> list[str]:
    return [r["id"].replace("%20", " ") for r in open_store(store).of("train")]
