"""Writes the sounds and the moving picture in book/_static: python book/pictures.py [PERFORMANCES SOUNDFONT].

It makes twenty seconds of each shipped model with seed 7, as MP3. For nano it also makes a GIF: the spectrogram, and a
play-head that moves with the sound. Given a data set in MAESTRO's layout and a soundfont, it adds ten seconds from the
middle of two held-out performances. Nobody chose them: they are the first of each composer in the test split.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from pianodiff.audio import SPECTROGRAMS, load_audio, normalize_peak, save_audio, to_spectrogram
from pianodiff.data import find_recordings, read_recording
from pianodiff.phases import to_wave

STATIC = Path(__file__).resolve().parent / "_static"
CFG = SPECTROGRAMS["nano"]
WIDTH, HEIGHT, COLOURS, FRAMES_A_SECOND = 860, 240, 64, 5
COMPOSERS = ("Bach", "Schubert")


def moving_picture(wave: torch.Tensor, path: Path) -> None:
    """A GIF of the spectrogram of `wave` `[T]` and a play-head; it lasts as long as the sound, and repeats."""
    spec = to_spectrogram(wave, CFG)[: CFG.n_bins * 3 // 4].flip(0)    # up to 3 kHz, as high as most partials reach
    grey = Image.fromarray((255 * spec.numpy()).astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    shades = matplotlib.colormaps["magma"](np.linspace(0, 1, COLOURS))[:, :3]
    levels = (np.asarray(grey, dtype=float) / 256 * COLOURS).astype(np.uint8)
    seconds = len(wave) / CFG.sample_rate
    frames = []
    for place in np.linspace(0, WIDTH - 2, round(seconds * FRAMES_A_SECOND)).astype(int):
        pixels = levels.copy()
        pixels[:, place : place + 2] = COLOURS    # the play-head's own colour, behind the shades
        frame = Image.fromarray(pixels, "P")
        frame.putpalette((255 * np.vstack([shades, [1, 1, 1]])).round().astype(np.uint8).tobytes())
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_A_SECOND, loop=0)


def models() -> None:
    """The pieces that README and introduction play."""
    for model in ("nano", "base"):
        command = f"generate --seconds 20 --seed 7 --model {model} --force --out {STATIC}/{model}-seed7.mp3"
        if model == "nano":
            command += f" --image {STATIC}/nano-seed7.png"
        subprocess.run([sys.executable, "-m", "pianodiff.cli", *command.split()], check=True)
    moving_picture(load_audio(STATIC / "nano-seed7.mp3"), STATIC / "nano-seed7.gif")


def performances(source: str, soundfont: str) -> None:
    """Music that no model was trained on, as it is and through its spectrogram."""
    held_out = [recording for recording in find_recordings(source) if recording.split == "test"]
    for composer in COMPOSERS:
        recording = next(found for found in held_out if f"/{composer}/" in found.path)
        wave = read_recording(recording, source, CFG.sample_rate, soundfont)
        start = len(wave) // 2
        wave = normalize_peak(wave[start : start + 10 * CFG.sample_rate])[0]
        through = to_wave(to_spectrogram(wave, CFG), CFG, generator=torch.Generator().manual_seed(0))
        save_audio(STATIC / f"{composer.lower()}.mp3", 0.9 * wave)
        save_audio(STATIC / f"{composer.lower()}-retrieved.mp3", 0.9 * through[: len(wave)])
        print(f"{composer}: {recording.title}, {recording.path}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        performances(*sys.argv[1:])
    models()
