"""How cost grows with the work: at 1, 2, 4 and 8 times as much, with the slope of log cost against log work.

    python bench/growth.py            # some ten minutes; appends to bench/growth.jsonl
    python bench/growth.py search     # only the parts whose names hold one of these words
    python bench/scale.py             # writes the tables of book/at_scale.md from it

A slope of 1 means cost in proportion. Below 1, a fixed cost is part of it; above 1, the work outgrows the machine.
Costs are seconds of one core, and not of the clock, so other work on the machine hardly shows. Each measurement has a
process of its own, whose peak of memory is counted with the interpreter and PyTorch in it. A record is one line of
the file: the amounts of work, and each measure's figures at them. Sound is made here, and nothing is downloaded.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import log
from pathlib import Path
from statistics import linear_regression
from typing import Any

import soundfile
import soxr
import torch
from common import Record, append, machine

from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, save_audio
from pianodiff.data import BlockDataset, open_store, prepare
from pianodiff.distance import LogMel, Moments, embed, frechet_distance, kernel_distance
from pianodiff.edm import Denoiser, edm_loss
from pianodiff.generate import Piano
from pianodiff.model import PRESETS
from pianodiff.novelty import Corpus
from pianodiff.phases import to_wave
from pianodiff.pieces import read_pieces
from pianodiff.synth import example_performance
from pianodiff.unet import UNet, UNetConfig

GROWTH = Path(__file__).with_name("growth.jsonl")
CFG = SPECTROGRAMS["nano"]
TINY = SpectrogramConfig(n_fft=64, n_frames=32)  # what a recording costs beside its sound
TIMES = 1, 2, 4, 8
Figures = dict[str, float]


def cpu(work: Callable[[], object]) -> float:
    """Seconds of this process' cores that `work` takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak() -> float:
    """The most memory that this process has had, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def slope(work: Sequence[float], cost: Sequence[float]) -> float:
    """The slope of the line through log cost against log work, by least squares."""
    return linear_regression([log(w) for w in work], [log(c) for c in cost]).slope


def remark(slope: float) -> str:
    """What a slope away from 1 means."""
    if 0.9 <= slope <= 1.1:
        return ""
    return "faster than the work" if slope > 1.1 else "hardly" if slope < 0.1 else "more slowly than the work"


def _alone(measure: Callable[[int], Figures], work: int) -> Figures:
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):  # progress
        return measure(work)


def apart(measure: Callable[[int], Figures], work: int) -> Figures:
    """`measure(work)` in a new process, which computes in one thread."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_alone, measure, work).result()


def growth(part: str, unit: str, measure: Callable[[int], Figures], works: Sequence[int] = TIMES, *, each: float = 1,
           run: Callable[[Callable[[int], Figures], int], Figures] = apart) -> Record:
    """Measure at each amount of `works`, print and return the record. `each` is how many of `unit` one of them is.

    Raises ValueError for fewer than two amounts.
    """
    if len(works) < 2:
        raise ValueError(f"{part}: a slope needs two amounts of work, not {[*works]}")
    found = [run(measure, work) for work in works]
    amounts = [float(f"{each * work:.6g}") for work in works]
    print(f"\n{part}: " + ", ".join(f"{amount:g}" for amount in amounts) + f" {unit}")
    measures: dict[str, Record] = {}
    for name in found[0]:
        figures = [float(f"{costs[name]:.6g}") for costs in found]
        grows = float(f"{slope(amounts, figures):.3g}")
        measures[name] = {"figures": figures, "slope": grows}
        told = "".join(f"{figure:>12.4g}" for figure in figures)
        print(f"  {name:<42}{told}   slope {grows:.2f}  {remark(grows)}", flush=True)
    return {"part": part, "unit": unit, "work": amounts, **machine(), "threads": 1, "measures": measures}


def recording(path: Path, minutes: float) -> None:
    """A WAV file as MAESTRO has them, 44.1 kHz, stereo, 16 bit: music with a little noise, repeated each minute."""
    wave = soxr.resample(example_performance(min(60.0, 60 * minutes)).numpy(), 8000, 44_100)
    noise = torch.randn(len(wave), 2, generator=torch.Generator().manual_seed(0)).numpy()
    stereo = wave[:, None] * [1.0, 0.8] + 3e-4 * noise
    with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16") as file:
        for _ in range(max(1, round(minutes))):
            file.write(stereo)


def source(home: Path, count: int, minutes: float) -> Path:
    """A folder with one recording under `count` names, all to train on; it is made once."""
    folder = home / f"{count} recordings"
    if not folder.exists():
        folder.mkdir(parents=True)
        if not (one := home / f"{minutes:g}.wav").exists():
            recording(one, minutes)
        for number in range(count):
            os.link(one, folder / f"{number}.wav")
        names = "".join(f"{number}.wav,train\n" for number in range(count))
        (folder / "index.csv").write_text("audio_filename,split\n" + names)
    return folder


def linked_store(home: Path, count: int, minutes: float) -> Path:
    """A store of `count` recordings, all of which are one: made once, in the time that one takes."""
    store = home / f"store {count}"
    if not store.exists():
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(source(home, 1, minutes), home / "one", CFG, jobs=1)
            shutil.copytree(home / "one", store, copy_function=os.link)
            about = (store / "0.wav" / "zarr.json").read_text()
            (store / "zarr.json").unlink()
            (store / "zarr.json").write_text((home / "one" / "zarr.json").read_text().replace(
                "1 recordings", f"{count} recordings"))
            for number in range(1, count):
                shutil.copytree(store / "0.wav", store / f"{number}.wav", copy_function=os.link)
                (store / f"{number}.wav" / "zarr.json").unlink()
                (store / f"{number}.wav" / "zarr.json").write_text(about.replace('"0.wav"', f'"{number}.wav"'))
            prepare(source(home, count, minutes), store, CFG, jobs=1)  # finds all of them, and writes the index
    return store


def preparation(count: int, home: Path, minutes: float) -> Figures:
    """`prepare` for some recordings."""
    folder, store = source(home, count, minutes), home / f"prepared {count}"
    seconds = cpu(lambda: prepare(folder, store, CFG, jobs=1))
    sizes = [path.stat().st_size for path in store.rglob("*") if path.is_file()]
    return {"seconds of a core": seconds, "peak of memory, MB": peak(), "store, MB": sum(sizes) / 1e6,
            "files": len(sizes)}


def long_recording(work: int, home: Path, minutes: float) -> Figures:
    """`prepare` for one recording, however long."""
    found = preparation(1, home / f"{work} times", work * minutes)
    return {name: found[name] for name in ("seconds of a core", "peak of memory, MB")}


def recordings(count: int) -> Figures:
    """What many short recordings cost: to begin a store, to find it finished, to open it, to put as many more in it."""
    with tempfile.TemporaryDirectory() as name:
        music, store = Path(name, "music"), Path(name, "store")
        music.mkdir()
        save_audio(music / "0.wav", example_performance(1.0))
        data = (music / "0.wav").read_bytes()

        def add(first: int, end: int) -> None:
            for number in range(first, end):
                (music / f"{number}.wav").write_bytes(data)

        add(0, count)
        work = partial(prepare, music, store, TINY, jobs=1)
        new, again = cpu(work), cpu(work)
        index = (store / "zarr.json").stat().st_size
        opened, blocks = cpu(lambda: open_store(store)), cpu(lambda: BlockDataset(store, "train", random_offset=True))
        add(count, 2 * count)
        return {"a new store, seconds of a core": new, "as many more, seconds of a core": cpu(work),
                "nothing left to do, seconds of a core": again, "open_store, ms": 1000 * opened,
                "BlockDataset, ms": 1000 * blocks, "index, kB": index / 1000, "peak of memory, MB": peak()}


def loading(blocks: int, home: Path, minutes: float, count: int = 16) -> Figures:
    """Blocks at random places of `count` recordings, from the disk."""
    data = BlockDataset(linked_store(home, count, minutes), "train", random_offset=True)
    data.codes(0)
    chosen = torch.randint(len(data), (blocks,), generator=torch.Generator().manual_seed(0)).tolist()
    return {"seconds of a core": cpu(lambda: [data.codes(index, 1) for index in chosen])}


def training(blocks: int, config: UNetConfig) -> Figures:
    """One step of training: loss, gradient, AdamW."""
    denoiser = Denoiser(UNet(config).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(denoiser.parameters())
    y = torch.randn(blocks, 1, config.n_bins, config.n_frames)
    cond = (y.flip(0), torch.ones(blocks, dtype=torch.bool))

    def step() -> None:
        optimizer.zero_grad()
        edm_loss(denoiser, y, cond).mean().backward()
        optimizer.step()

    step()
    return {"seconds of a core": cpu(step), "peak of memory, MB": peak()}


def generation(work: int, name: str = "nano", *, batch: bool, num_steps: int | None = None) -> Figures:
    """Two blocks for each unit of work: in one piece, or in pieces side by side."""
    piano = Piano.from_pretrained(name, "cpu")
    seconds = piano.cfg.block_seconds * (2 if batch else 2 * work)
    setting: dict[str, Any] = {"num_steps": num_steps} if num_steps else {}

    def play() -> None:
        for spec in piano.spectrograms(seconds, range(work if batch else 1), **setting):
            to_wave(spec, piano.cfg)

    return {"seconds of a core": cpu(play), "peak of memory, MB": peak()}


def reading(count: int, home: Path, minutes: float) -> Figures:
    """Recordings as an evaluation reads them."""
    folder = source(home, count, minutes)
    return {"seconds of a core": cpu(lambda: read_pieces(folder, CFG)), "peak of memory, MB": peak()}


def distances(blocks: int) -> Figures:
    """Points of clips that are noise, which take as long as music, and both distances of as many points."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(blocks, CFG.block_samples, generator=generator).clamp(-1, 1)
    embedding = cpu(lambda: embed(LogMel(), clips, CFG.sample_rate))
    x, y = torch.randn(2, 10 * blocks, 96, generator=generator)  # sets of points are larger
    return {"embedding, seconds of a core": embedding,
            "Fréchet distance of ten times as many, ms": 1000 * cpu(
                lambda: frechet_distance(Moments.of(x), Moments.of(y))),
            "kernel distance of ten times as many, ms": 1000 * cpu(lambda: kernel_distance(x, y)),
            "peak of memory, MB": peak()}


def search(count: int, home: Path, minutes: float, queries: int = 64) -> Figures:
    """The search for copies: a corpus of a store's recordings, and some blocks that are looked for in it."""
    corpus: list[Corpus] = []
    store = linked_store(home, count, minutes)
    read = cpu(lambda: corpus.append(Corpus.of(store, progress=False)))
    blocks = torch.rand(queries, CFG.n_bins, CFG.n_frames, generator=torch.Generator().manual_seed(0))
    found = cpu(lambda: corpus[0].nearest(blocks, k=1))
    kept = corpus[0].bands.nbytes + corpus[0].points.nbytes
    return {"corpus, seconds of a core": read, f"{queries} blocks, seconds of a core": found,
            "corpus, MB": kept / 1e6, "peak of memory, MB": peak()}


def parts(home: Path, minutes: float = 12.0, count: int = 250, blocks: int = 32) -> dict[str, Callable[[], Record]]:
    """All parts, at recordings of `minutes`, stores of `count` short ones, and `blocks` blocks, and their multiples."""
    hours = minutes / 60

    def music(measure: Callable[..., Figures]) -> Callable[[int], Figures]:
        return partial(measure, home=home, minutes=minutes)

    found: dict[str, tuple[str, Callable[[int], Figures], Sequence[int], float]] = {
        "preparation": ("hours of sound", music(preparation), TIMES, hours),
        "preparation of one recording": ("hours of sound", music(long_recording), TIMES, hours),
        "short recordings": ("recordings", recordings, [count * times for times in TIMES], 1),
        "loading": ("blocks", music(loading), [4 * blocks * times for times in TIMES], 1),
        # paper-256 would take minutes
        **{f"a step of training {preset}": ("blocks", partial(training, config=PRESETS[preset]), works, 1)
           for preset, works in {"nano": TIMES, "base": TIMES, "paper-128": TIMES[:2]}.items()},
        "generation with nano": ("seconds of music", partial(generation, batch=False), TIMES, 2 * CFG.block_seconds),
        "generation with nano, side by side": ("pieces of two blocks", partial(generation, batch=True), TIMES, 1),
        "evaluation: reading": ("hours of sound", music(reading), TIMES, hours),
        "evaluation: distances": ("blocks", distances, [2 * blocks * times for times in TIMES], 1),
        "evaluation: search for copies": ("hours of sound", music(search), [20 * times for times in TIMES], hours),
    }
    return {part: partial(growth, part, unit, measure, works, each=each)
            for part, (unit, measure, works, each) in found.items()}


def records(words: Sequence[str] = ()) -> Iterator[Record]:
    """All parts, or those whose names hold one of the words."""
    with tempfile.TemporaryDirectory() as name:
        for part, measure in parts(Path(name)).items():
            if not words or any(word in part for word in words):
                yield measure()


if __name__ == "__main__":
    append(records(sys.argv[1:]), GROWTH)
