"""Spectrograms and phase retrieval beside librosa's: equal results first, then the time they take."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import numpy as np
import torch
from common import Record, append, compare, peer, seconds
from torch import Tensor

from pianodiff.audio import SPECTROGRAMS, SpectrogramConfig, to_magnitude, to_spectrogram
from pianodiff.phases import griffin_lim
from pianodiff.synth import example_performance

CFG = SPECTROGRAMS["nano"]


def convergence(wave: Tensor, original: Tensor, n_fft: int = 1024, hop_length: int = 256) -> float:
    """Spectral convergence in decibels of `wave` `[T]` to `original`, by an STFT that nothing was fitted to."""
    made, wanted = (torch.stft(w, n_fft, hop_length, window=torch.hann_window(n_fft), return_complex=True).abs()
                    for w in (wave, original[: len(wave)]))
    return float(20 * torch.log10((made - wanted).norm() / wanted.norm()))


def smallest(reaches: Callable[[int], bool], limit: int) -> int:
    """The smallest number of iterations from 0 to `limit` that does; ValueError if none does."""
    for n_iter in range(limit + 1):
        if reaches(n_iter):
            return n_iter
    raise ValueError(f"{limit} iterations do not reach the other's spectral convergence: there is nothing to compare")


def phase_retrieval(n_iter: int = 32, *, length: float = 20.0, seeds: Sequence[int] = (0, 1, 2), limit: int = 100,
                    runs: int = 7) -> Record:
    """Griffin-Lim beside librosa's `n_iter` iterations at its defaults (momentum 0.99, random phases).

    Both get the same magnitudes. Ours has the smallest number of iterations with which each of the sounds comes at
    least as near to its original as with librosa's. The first sound is timed.
    """
    originals = [example_performance(length, seed) for seed in seeds]
    targets = [to_magnitude(to_spectrogram(wave, CFG), CFG) for wave in originals]

    def ours(target: Tensor, n: int) -> Tensor:
        return griffin_lim(target, CFG, n_iter=n, generator=torch.Generator().manual_seed(0))

    librosa = peer("librosa", "librosa")
    if librosa is None:
        own = {f"pianodiff, {n_iter} iterations": partial(seconds, lambda: ours(targets[0], n_iter))}
        return compare(f"Griffin-Lim of {length:g} s", "s", own, runs=runs)
    theirs = partial(librosa.griffinlim, n_iter=n_iter, hop_length=CFG.hop_length, random_state=0)
    goals = [convergence(torch.from_numpy(theirs(target.numpy())), wave)
             for target, wave in zip(targets, originals, strict=True)]
    n_ours = smallest(lambda n: all(convergence(ours(target, n), wave) <= goal for target, wave, goal
                                    in zip(targets, originals, goals, strict=True)), limit)
    reached = [convergence(ours(target, n_ours), wave) for target, wave in zip(targets, originals, strict=True)]
    contenders = {f"pianodiff, {n_ours} iterations": partial(seconds, lambda: ours(targets[0], n_ours)),
                  f"librosa, {n_iter} iterations": partial(seconds, lambda: theirs(targets[0].numpy()))}
    return compare(f"Griffin-Lim of {length:g} s to librosa's {n_iter} iterations", "s", contenders, runs=runs,
                   peers=["librosa"], decibels={"pianodiff": reached, "librosa": goals})


def librosa_spectrogram(librosa: ModuleType, wave: np.ndarray, cfg: SpectrogramConfig) -> np.ndarray:
    """`to_spectrogram` of librosa's parts."""
    stft = librosa.stft(wave, n_fft=cfg.n_fft, hop_length=cfg.hop_length)
    magnitude = np.abs(stft[: cfg.n_bins, : len(wave) // cfg.hop_length])
    decibels = librosa.amplitude_to_db(magnitude, ref=cfg.reference, amin=1e-12, top_db=None)
    return np.clip(1 + decibels / cfg.top_db, 0, 1)


def spectrogram(*, length: float = 60.0, runs: int = 15) -> Record:
    """`to_spectrogram` beside librosa's `stft` and `amplitude_to_db`. AssertionError where they differ by 1e-4."""
    wave = example_performance(length)
    contenders = {"pianodiff": partial(seconds, lambda: to_spectrogram(wave, CFG))}
    if librosa := peer("librosa", "librosa"):
        theirs = librosa_spectrogram(librosa, wave.numpy(), CFG)
        torch.testing.assert_close(to_spectrogram(wave, CFG), torch.from_numpy(theirs), atol=1e-4, rtol=0)
        contenders["librosa"] = partial(seconds, lambda: librosa_spectrogram(librosa, wave.numpy(), CFG))
    return compare(f"spectrogram of {length:g} s", "s", contenders, runs=runs, peers=["librosa"] * bool(librosa))


def records() -> Iterator[Record]:
    yield spectrogram()
    for n_iter in (32, 100):
        yield phase_retrieval(n_iter)


if __name__ == "__main__":
    append(records())
