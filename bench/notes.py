"""How much of a sound is not made of piano notes, and of how many notes the rest is.

    python bench/notes.py SOUNDFONT FILE...

Each frame's magnitude is explained by non-negative amounts of the spectra of single notes: 88 keys at two velocities,
each at four ages from the attack to two and a half seconds, as the soundfont plays them. The amounts minimise the
Kullback-Leibler divergence by multiplicative steps (Lee and Seung 2000, "Algorithms for Non-negative Matrix
Factorization"), the spectra being fixed. What is left over is the divergence as a share of the frame's sum. The number
of notes is the exponential of the entropy of the keys' shares: smearing leaves little over, and too many notes.
"""

import struct
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from pianodiff.audio import load_audio
from pianodiff.recordings import render_midi

RATE, N_FFT, HOP = 8000, 512, 128
VELOCITIES = 50, 95
AGES = (0, 4), (6, 16), (30, 60), (110, 145)  # frames after a note's beginning
HELD, APART = 2.4, 3.0  # seconds that a note is held, and from one to the next


def scale(velocity: int) -> bytes:
    """A MIDI file with all 88 keys, one after the other."""
    track = b""
    for key in range(21, 109):
        for ticks, status, force in ((0 if key == 21 else round((APART - HELD) * 1000), 0x90, velocity),
                                     (round(HELD * 1000), 0x80, 0)):
            track += bytes([ticks >> 7 | 0x80, ticks & 0x7F, status, key, force])
    track += b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500) + b"MTrk" + struct.pack(">I", len(track)) + track


def magnitude(wave: Tensor) -> Tensor:
    """`[T]` at 8 kHz -> magnitudes `[257, frames]`."""
    return torch.stft(wave, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True).abs()


def dictionary(soundfont: str | Path) -> Tensor:
    """Spectra of single notes `[257, velocities * 88 * ages]`, each of sum 1."""
    columns = []
    for velocity in VELOCITIES:
        wave = render_midi(scale(velocity), soundfont, RATE)
        for k in range(88):
            spectrum = magnitude(wave[round(APART * k * RATE) : round((APART * k + 2.9) * RATE)])
            columns += [spectrum[:, start:end].mean(1) for start, end in AGES]
    spectra = torch.stack(columns, 1)
    return spectra / (spectra.sum(0) + 1e-9) + 1e-7


def explained(wave: Tensor, spectra: Tensor, *, every: int = 1, steps: int = 60) -> tuple[float, float]:
    """What is left over, and the number of notes: medians over each `every`-th frame of `wave` `[T]` that sounds.

    NaN for silence.
    """
    frames = magnitude(wave)
    frames = frames[:, frames.sum(0) > 3e-3 * frames.sum(0).max()]
    if not frames.numel():
        return torch.nan, torch.nan
    frames = frames / frames.sum(0).mean()
    V = (frames + frames.max() * 10 ** (-70 / 20))[:, ::every]  # a floor, 70 dB below the loudest
    H = V.sum(0).expand(spectra.shape[1], -1) / spectra.shape[1]
    for _ in range(steps):
        H = H * (spectra.T @ (V / (spectra @ H + 1e-9))) / spectra.sum(0)[:, None]
    P = spectra @ H
    left = (V * (V / P).log() - V + P).sum(0) / V.sum(0)
    share = H.reshape(len(VELOCITIES), 88, len(AGES), -1).sum((0, 2)) / V.sum(0)
    return float(left.median()), float((-(share * (share + 1e-9).log()).sum(0)).exp().median())


def main(soundfont: Annotated[Path, tyro.conf.Positional], files: Annotated[list[Path], tyro.conf.Positional]) -> None:
    """Print both figures: medians over the files."""
    spectra = dictionary(soundfont)
    left, notes = torch.tensor([explained(load_audio(path, RATE), spectra) for path in files]).nanmedian(0).values
    print(f"left over {left:.4f}, notes {notes:.1f}, of {len(files)} files")


if __name__ == "__main__":
    tyro.cli(main)
