"""Whether a recording is continued in its own sound: on a piano never heard, and in rooms never heard.

    python bench/continuation.py ../shared/data/asap-maestro-midi.zip \\
        --unseen /usr/share/sounds/sf2/TimGM6mb.sf2 --piano salamander.sf2 --models nano base

Six performances of the test split are played: two by the unseen piano, two by it in a room, two by a piano of the
training in a room. The rooms are none of ROOMS. Each is continued, from the same seeds, and the continuation's
spectrum is set against the prompt's: in bands of a third of an octave the tenth, fiftieth and ninetieth percentile of
the level over time, in decibels, so that the room between the notes counts as the notes do. The distance is the root
mean square of the differences, less their mean, since music may grow louder. What comes after the prompt in the same
performance has a distance, too, and so have the prompt's two halves: music varies.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from pianodiff import Piano
from pianodiff.audio import SpectrogramConfig, normalize_peak, to_spectrogram
from pianodiff.recordings import Room, find_recordings, read_recording, reverberate_, room_response

UNSEEN_ROOMS = Room((9, 6, 4), 0.6, 1.0), Room((24, 15, 9), 1.3, 2.5)
PROMPT, NEW = 16.384, 16.384  # seconds
SEEDS = range(4)
QUANTILES = 0.1, 0.5, 0.9


def bands(cfg: SpectrogramConfig) -> Tensor:
    """Which rows `[bands, n_bins]` a third of an octave averages, from 100 Hz."""
    frequency = torch.arange(cfg.n_bins) * cfg.sample_rate / cfg.n_fft
    edges = 100 * 2 ** (torch.arange(17) / 3)
    inside = (frequency >= edges[:-1, None]) & (frequency < edges[1:, None])
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


def colour(wave: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Levels `[quantiles, bands]` in decibels of a wave `[T]`."""
    level = cfg.top_db * (bands(cfg) @ to_spectrogram(normalize_peak(wave)[0], cfg))
    return level.quantile(torch.tensor(QUANTILES), dim=1)


def spectral_distance(a: Tensor, b: Tensor, cfg: SpectrogramConfig) -> float:
    """Root mean square in decibels, without the mean, of the difference of two waves' levels."""
    difference = colour(a, cfg) - colour(b, cfg)
    return float((difference - difference.mean()).square().mean().sqrt())


def performances(source: str, pianos: list[str], rate: int) -> list[Tensor]:
    """Six waves of prompt and what follows it: one from each composition's middle."""
    found = {r.title: r for r in find_recordings(source) if r.split == "test" and r.duration > 90}
    waves = []
    for i, title in enumerate(sorted(found)[:: max(1, len(found) // 6)][:6]):
        wave = read_recording(found[title], source, rate, pianos[i // 4])
        if i >= 2:
            wave = reverberate_(wave, room_response(UNSEEN_ROOMS[i % 2], rate))
        middle = len(wave) // 2
        waves.append(wave[middle : middle + round((PROMPT + NEW) * rate)])
    return waves


def judge(piano: Piano, waves: list[Tensor], **how: Any) -> list[float]:
    """The distance of each continuation from its prompt, median over the seeds."""
    half = round(PROMPT * piano.cfg.sample_rate)
    found = []
    for wave in waves:
        prompt = wave[:half]
        made = piano.waves(NEW, list(SEEDS), prompt=prompt, **how)
        distances = [spectral_distance(m.as_subclass(Tensor), prompt, piano.cfg) for m in made]
        found.append(float(torch.tensor(distances).median()))
    return found


def main(source: Annotated[str, tyro.conf.Positional], unseen: str, piano: str,
         models: tuple[str, ...] = ("nano", "base"), out: Path | None = None) -> None:
    """Print distances in decibels, each recording's and their median."""
    first = Piano(models[0])
    waves = performances(source, [unseen, piano], first.cfg.sample_rate)
    half = round(PROMPT * first.cfg.sample_rate)
    far = partial(spectral_distance, cfg=first.cfg)
    table = {"the prompt's two halves": [far(w[: half // 2], w[half // 2 : half]) for w in waves],
             "what follows in the performance": [far(w[:half], w[half:]) for w in waves]}
    for name in models:
        table[name] = judge(Piano(name), waves)
    for name, row in table.items():
        print(f"{name:34s}", *(f"{value:5.1f}" for value in row), f"  median {statistics.median(row):.2f}")
    if out:
        out.write_text(json.dumps(table))


if __name__ == "__main__":
    tyro.cli(main)
