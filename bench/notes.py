"""Makes the spectra of single notes that come with the package, pianodiff/notes.safetensors, from soundfonts.

    python bench/notes.py fluidr3-piano.sf2 salamander.sf2

FluidR3's piano (Frank Wen) is under the MIT licence, the Salamander Grand Piano (Alexander Holm) under CC BY 3.0. The
samples of the latter, as npm distributes them, make its soundfont.
"""

from pathlib import Path
from typing import Annotated

import torch
import tyro

import pianodiff
from pianodiff.files import save_tensors
from pianodiff.music import _STORED, known_pianos, note_spectra

FILE = Path(pianodiff.__file__).parent / "notes.safetensors"


def main(soundfonts: Annotated[list[Path], tyro.conf.Positional], out: Path = FILE) -> None:
    """Write the spectra of each soundfont's piano, under the name of its file."""
    pianos = [note_spectra(path) for path in soundfonts]
    save_tensors(out, {piano.name: (_STORED * piano.spectra).to(torch.float16) for piano in pianos})
    if out == FILE:
        print(", ".join(piano.name for piano in known_pianos()))


if __name__ == "__main__":
    tyro.cli(main)
