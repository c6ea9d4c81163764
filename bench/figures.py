"""Writes single figures into README, pages, cards and chapters, each from where it is measured or defined.

`<!-- =steps -->15<!-- = -->` holds what `figures` calls "steps". A link whose text is a number, or "Chapter" and a
number, as in `[Chapter 12](nbs/…)`, gets the number that the book gives to its chapter.
"""

import json
import re
import struct
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import yaml
from card import MODELS, WATTS, between, models
from common import RESULTS, Record
from generation import settings
from table import figure, newest

import pianodiff
from pianodiff.model import sampling_defaults, trainings

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(?P<begin><!-- =(?P<name>[^>]*?) -->).*?(?P<end><!-- = -->)")
LINK = re.compile(r"\[(?P<word>(?:[Cc]hapter )?)\d+[a-z]?\]\((?P<target>[\w./]*?(?P<file>\w+)\.ipynb)\)")


def files() -> Iterator[Path]:
    """All that holds prose."""
    for pattern in ("*.md", "book/*.md", "nbs/*.md", "nbs/*.ipynb", "pianodiff/weights/*/README.md"):
        yield from sorted(ROOT.glob(pattern))


@cache
def numbers() -> dict[str, int]:
    """{file: the number of its chapter in the book}."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    names = [Path(chapter["file"]).name for part in parts if part.get("numbered") for chapter in part["chapters"]]
    return {name: number for number, name in enumerate(names, 1)}


def parameters(model: str) -> int:
    """How many a shipped model has, by the head of its file."""
    with (MODELS / model / "model.safetensors").open("rb") as file:
        head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(prod(about["shape"]) for name, about in head.items() if name != "__metadata__")


def speed(model: str, records: list[Record], *, steps: int | None = None) -> tuple[float, float]:
    """Seconds of work for a second of music, and until the first sound: medians, by the default or in so many steps."""
    results = {record["comparison"]: record["results"] for record in records}
    begin = next(iter(settings(model))) if steps is None else f"{pianodiff.SAMPLER}, {steps} steps"
    generated = results.get(f"generation with {model}", {})
    second = [row for setting, row in generated.items() if setting.startswith(begin)]
    first = results.get(f"first sound of {model}", {})
    if not second or not first:
        raise ValueError(f"{model} was not measured with {begin}: python bench/generation.py")
    return second[0]["median"], next(iter(first.values()))["median"]


@cache
def figures() -> dict[str, str]:
    """{name: a figure as it is written}."""
    records = newest(RESULTS.read_text().splitlines())
    here = [record for record in records if record["device"] == "cpu"]
    gpu = [record for record in records if record.get("gpu") == "NVIDIA H200"]
    found = {"steps": str(sampling_defaults(models()["nano"][0])["num_steps"]), "guidance": f"{pianodiff.GUIDANCE:g}",
             "H200 steps": str(H200_STEPS)}
    for model, (config, _) in models().items():
        second, first = speed(model, here)
        found |= {f"{model} parameters": f"{parameters(model) / 1e6:.1f} million",
                  f"{model} 20 s": f"{figure(20 * second)} s", f"{model} first sound": f"{first:.2g} s",
                  # of performances: later trainings may have heard them on several pianos
                  f"{model} hours": f"{[*trainings(config)][-1]['hours']['train']:.0f}",
                  f"{model} 20 s energy": f"{between(*(20 * second * 2 * watts / 3600 for watts in WATTS), 2)} Wh"}
    second, first = speed("nano", gpu, steps=H200_STEPS)
    return found | {"H200 second": f"{second:.1g} s", "H200 first sound": f"{first:.2g} s"}


H200_STEPS = 12    # of the default when that GPU was there


def fill(text: str) -> str:
    """`text` with today's figures. KeyError for a mark that names none."""
    text = MARK.sub(lambda mark: mark["begin"] + figures()[mark["name"]] + mark["end"], text)
    return LINK.sub(lambda link: f"[{link['word']}{numbers()[link['file']]}]({link['target']})", text)


if __name__ == "__main__":
    for path in files():
        if (made := fill(path.read_text())) != path.read_text():
            path.write_text(made)
            print(path.relative_to(ROOT))
