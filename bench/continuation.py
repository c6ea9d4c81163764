"""Whether a recording is continued in its own sound: on a piano never heard, and in rooms never heard.

    python bench/continuation.py ../shared/data/asap-maestro-midi.zip --home fluidr3.sf2 \\
        --unseen /usr/share/sounds/sf2/TimGM6mb.sf2 --piano salamander.sf2 --models nano base

The sound of a stretch of music is its spectrum: in bands of a third of an octave the tenth, fiftieth and ninetieth
percentile of the level over time, in decibels, so that the room between the notes counts as the notes do, less their
mean, since music may grow louder.

First, how far a continuation's spectrum is from its prompt's: the root mean square of the differences. Six performances
of the test split are played: two by the unseen piano, two by it in a room, two by a piano of the training in a room.
The rooms are none of ROOMS. Each is continued, from the same seeds. But music varies: what comes after the prompt in
the same performance has a distance, too, and so have the prompt's two halves, and these are hardly smaller.

So then, what a change of the prompt's sound changes in its continuation. Each performance is played in all these
sounds, and once more at home, by a piano of the training without a room. The notes are the same, so what differs in
what follows the prompt is the sound, u. The model continues each prompt from the same seeds, and its continuations
differ by v. Told are the share of u that is carried over, u·v / u·u, and the distance |v - u| / |u|: 0 where all is
carried over, and 1 for a model that goes on with one sound, whatever it hears.

Files of `--recordings` are continued after their first half. Their distances stand beside those of their second halves.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from pianodiff import Piano
from pianodiff.audio import SpectrogramConfig, load_audio, normalize_peak, to_spectrogram
from pianodiff.recordings import Recording, Room, find_recordings, read_recording, reverberate_, room_response

UNSEEN_ROOMS = Room((9, 6, 4), 0.6, 1.0), Room((24, 15, 9), 1.3, 2.5)
PROMPT, NEW = 16.384, 16.384  # seconds
SEEDS = range(4)
QUANTILES = 0.1, 0.5, 0.9
SOUNDS = "unseen piano", "unseen piano and room", "unseen room"


def bands(cfg: SpectrogramConfig) -> Tensor:
    """Which rows `[bands, n_bins]` a third of an octave averages, from 100 Hz."""
    frequency = torch.arange(cfg.n_bins) * cfg.sample_rate / cfg.n_fft
    edges = 100 * 2 ** (torch.arange(17) / 3)
    inside = (frequency >= edges[:-1, None]) & (frequency < edges[1:, None])
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


def colour(wave: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Levels `[quantiles, bands]` in decibels of a wave `[T]`, their mean taken off."""
    level = cfg.top_db * (bands(cfg) @ to_spectrogram(normalize_peak(wave)[0], cfg))
    levels = level.quantile(torch.tensor(QUANTILES), dim=1)
    return levels - levels.mean()


def far(a: Tensor, b: Tensor) -> float:
    """The root mean square of what two spectra differ by, in decibels."""
    return float((a - b).square().mean().sqrt())


def chosen(source: str) -> list[Recording]:
    """Six performances, each of another composition."""
    found = {r.title: r for r in find_recordings(source) if r.split == "test" and r.duration > 90}
    return [found[title] for title in sorted(found)[:: max(1, len(found) // 6)][:6]]


def played(recording: Recording, source: str, piano: str, rate: int, room: Room | None = None) -> Tensor:
    """The prompt and what follows it, from the middle of a performance."""
    wave = read_recording(recording, source, rate, piano)
    if room:
        wave = reverberate_(wave, room_response(room, rate))
    middle = len(wave) // 2
    return wave[middle : middle + round((PROMPT + NEW) * rate)]


def continued(piano: Piano, prompt: Tensor, seconds: float = NEW) -> Tensor:
    """The spectra `[seeds, quantiles, bands]` of what a model makes of a prompt."""
    made = piano.waves(seconds, list(SEEDS), prompt=prompt)
    return torch.stack([colour(wave.as_subclass(Tensor), piano.cfg) for wave in made])


def carried(real: Tensor, made: Tensor) -> tuple[float, float]:
    """How much of a change of sound is carried over, and how far the changes are apart, both as shares of the change.

    `real` is `[quantiles, bands]`; `made` `[seeds, quantiles, bands]`, of which the mean counts.
    """
    made, power = made.mean(0), real.square().sum()
    return float((real * made).sum() / power), float(((made - real).square().sum() / power).sqrt())


def judge(piano: Piano, waves: list[list[Tensor]]) -> dict[str, Any]:
    """Distances of six continuations from their prompts, and what is carried over of each change of sound.

    `waves` has a list for each performance: it at home, and in each of SOUNDS.
    """
    half = round(PROMPT * piano.cfg.sample_rate)
    distances, changes = [], {sound: [] for sound in SOUNDS}
    for i, (home, *others) in enumerate(waves):
        from_home = continued(piano, home[:half])
        follows = colour(home[half:], piano.cfg)
        for j, (sound, wave) in enumerate(zip(SOUNDS, others, strict=True)):
            made = continued(piano, wave[:half])
            changes[sound].append(carried(colour(wave[half:], piano.cfg) - follows, made - from_home))
            if j == i // 2:
                prompt = colour(wave[:half], piano.cfg)
                distances.append(statistics.median(far(spectrum, prompt) for spectrum in made))
    return {"distances": distances, "carried": changes}


def of_recording(piano: Piano, wave: Tensor) -> tuple[float, float]:
    """How far a recording's second half, and its continuations, are from its first half."""
    first, second = wave.chunk(2)
    prompt, rate = colour(first, piano.cfg), piano.cfg.sample_rate
    made = continued(piano, first, len(second) / rate)
    return far(colour(second, piano.cfg), prompt), statistics.median(far(spectrum, prompt) for spectrum in made)


def main(source: Annotated[str, tyro.conf.Positional], home: str, unseen: str, piano: str,
         models: tuple[str, ...] = ("nano", "base"), recordings: tuple[Path, ...] = (),
         out: Path | None = None) -> None:
    """Print distances in decibels, and shares of the changes."""
    pianos = {name: Piano(name) for name in models}
    cfg = pianos[models[0]].cfg
    rate, half = cfg.sample_rate, round(PROMPT * cfg.sample_rate)
    waves = [[played(recording, source, home, rate), played(recording, source, unseen, rate),
              played(recording, source, unseen, rate, UNSEEN_ROOMS[i % 2]),
              played(recording, source, piano, rate, UNSEEN_ROOMS[i % 2])]
             for i, recording in enumerate(chosen(source))]
    own = [sounds[1 + i // 2] for i, sounds in enumerate(waves)]
    parts = [[colour(part, cfg) for part in wave[:half].chunk(2)] for wave in own]
    follows = [(colour(w[:half], cfg), colour(w[half:], cfg)) for w in own]
    table = {"the prompt's two halves": [far(*pair) for pair in parts],
             "what follows in the performance": [far(*pair) for pair in follows]}
    found = {name: judge(pianos[name], waves) for name in models}
    table |= {name: row["distances"] for name, row in found.items()}
    for name, row in table.items():
        print(f"{name[-34:]:34s}", *(f"{value:5.1f}" for value in row), f"  median {statistics.median(row):.2f}")
    for name, row in found.items():
        for sound, pairs in row["carried"].items():
            share, apart = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            print(f"{name[-34:]:34s} {sound:22s} carried over {share:.2f}, apart {apart:.2f}")
    for file in recordings:
        wave = load_audio(file, rate)
        for name in models:
            second, made = of_recording(pianos[name], wave)
            print(f"{name[-34:]:34s} {file.name:22s} second half {second:.1f}, continued {made:.1f}")
    if out:
        out.write_text(json.dumps({"floor": table, "models": found}))


if __name__ == "__main__":
    tyro.cli(main)
