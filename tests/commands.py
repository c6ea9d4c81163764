"""Runs a command of the package in a process of its own, which imports this module, so it imports little."""

import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pianodiff.__main__
import pianodiff.recipe
from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig
from pianodiff.unet import UNetConfig

SPECTROGRAM = SpectrogramConfig(n_fft=64, hop_length=32, n_frames=32)    # a block is an eighth of a second
NETWORK = UNetConfig(n_bins=32, n_frames=32, patch=4, channels=(8, 16), blocks=(1, 1), attention=("", "ft"),
                     emb_channels=16, cond_channels=(8, 8))


def as_command(words: list[str], told: Path, jumps: float) -> None:
    """The command, with a small preset, as the leader of a group of processes; what is printed goes to a file.

    A clock that `jumps` goes so many seconds forth, or back, at each third look at it, and returns.
    """
    pianodiff.recipe.PRESETS["nano"], SPECTROGRAMS["nano"] = NETWORK, SPECTROGRAM
    if jumps:
        true, looks = time.time, count()
        time.time = lambda: true() + jumps * (next(looks) // 3 % 2)
    sys.argv = ["pianodiff", *words]
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(pianodiff.__main__.run())
