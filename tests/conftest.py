import importlib
import os
import shutil
import signal
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, save_audio
from pianodiff.synth import example_performance

os.environ.setdefault("MPLBACKEND", "Agg")      # pictures are drawn, not shown
os.environ.setdefault("HF_HUB_OFFLINE", "1")    # no test asks a network
os.environ.setdefault("OMP_NUM_THREADS", "1")   # two wait for each other, up to ten times as long as they work

for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) is signal.SIG_IGN:    # as in a shell's background; children would, too
        signal.signal(number, usual)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [SPECTROGRAMS[name] for name in ("paper-128", "paper-256", "nano")]
shapes = pytest.mark.parametrize("cfg", SHAPES, ids=["paper-128", "paper-256", "nano"])
CFG = SpectrogramConfig()
BLOCK = CFG.block_samples
BLOCKS = 9    # of each of `pieces`


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def sine(frequency: float, samples: int, rate: int = 8000, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency / rate * np.arange(samples))


def level(wave: torch.Tensor) -> float:
    """Decibels relative to a full-scale sine."""
    return float(10 * torch.log10(2 * wave.double().square().mean() + 1e-30))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recordings and soundfont beside the checkout, which is not part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is missing: this test needs the performances and the soundfont there")
    return folder


@pytest.fixture(scope="session")
def fluidsynth() -> str:
    """The MIDI renderer's path."""
    if not (program := shutil.which("fluidsynth")):
        pytest.skip("fluidsynth is missing: apt-get install fluidsynth")
    return program


@pytest.hookimpl(tryfirst=True)    # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker takes all tests of a file, which share its fixtures; but any takes one that is marked as `apart`."""
    for item in items:
        if not any(item.iter_markers("apart")):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.stem != "test_book")    # the longest first, so that no worker ends with it


@pytest.fixture(scope="session")
def struck_notes() -> torch.Tensor:
    """Two blocks of struck notes with harmonics, a second of quiet among them; float64, peak 0.9."""
    wave = torch.zeros(2 * 16_384, dtype=torch.float64)
    for k, pitch in enumerate([48, 55, 64, 72, 60, 67, 76, 50, 57, 65, 74, 62]):
        at = 500 + 2600 * k
        t = torch.arange(len(wave) - at) / 8000
        for n in range(1, 9):
            wave[at:] += torch.exp(-t * (1 + n)) / n * torch.sin(2 * torch.pi * n * 440 * 2 ** ((pitch - 69) / 12) * t)
    wave[12_000:20_000] *= 0.01
    return 0.9 * wave / wave.abs().max()


@pytest.fixture(scope="session")
def pieces() -> list[torch.Tensor]:
    """Eight performances of `BLOCKS` blocks, float32."""
    return [example_performance(BLOCKS * CFG.block_seconds, seed) for seed in range(8)]


def resolve(name: str) -> object:
    """What a name of the package stands for: "audio.to_wave", "generate.Piano.stream"."""
    module, *attributes = name.split(".")
    found = importlib.import_module(f"pianodiff.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def prose(chapter: Path) -> str:
    """The text of a chapter, without its code."""
    cells = nbformat.read(chapter, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.fixture(scope="session")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of sound: "real", ten takes of four blocks, and "made", four others of three."""
    home = tmp_path_factory.mktemp("music")
    for folder, seeds, seconds in (("real", range(10), 8.5), ("made", range(40, 44), 6.5)):
        (home / folder).mkdir()
        for seed in seeds:
            save_audio(home / folder / f"take {seed:02}.flac", example_performance(seconds, seed))
    return home
