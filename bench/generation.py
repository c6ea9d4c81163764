"""From a seed to sound with the shipped models: against real time, and until the first sound."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from common import Record, append, compare, devices, seconds

from pianodiff.generate import Piano
from pianodiff.model import find_model, sampling_defaults


def settings(model: str = "nano") -> dict[str, dict[str, Any]]:
    """The model's own, and the paper's setting: 79 evaluations a block by Heun's method, unguided."""
    own = sampling_defaults(json.loads((find_model(model) / "config.json").read_text()))
    default, paper = {key: own[key] for key in ("sampler", "num_steps")}, {"sampler": "heun", "num_steps": 40}
    return {"{sampler}, {num_steps} steps, guided as the model asks".format_map(default): default,
            "{sampler}, {num_steps} steps, guidance 1".format_map(paper): paper | {"guidance": 1.0}}


def real_time(piano: Piano, *, length: float = 6.144, runs: int = 5) -> Record:
    """Seconds of work for a second of sound: three blocks, phase retrieval included."""
    def factor(setting: dict[str, Any]) -> float:
        return seconds(lambda: piano.generate(length, seed=0, **setting)) / length

    contenders = {name: partial(factor, setting) for name, setting in settings(piano.config["name"]).items()}
    return compare(f"generation with {piano.config['name']}", "s for 1 s of sound", contenders, runs=runs,
                   device=piano.device.type, seconds=length)


def first_sound(name: str = "nano", device: str = "cpu", *, runs: int = 7, **setting: Any) -> Record:
    """Seconds until `stream` gives its first sound, at the default setting."""
    piano = Piano.from_pretrained(name, device)
    contenders = {"model in memory": partial(seconds, lambda: next(piano.stream(seed=0, **setting))),
                  "model loaded first": partial(
                      seconds, lambda: next(Piano.from_pretrained(name, device).stream(seed=0, **setting)))}
    return compare(f"first sound of {name}", "s", contenders, runs=runs, device=device)


def records() -> Iterator[Record]:
    for device in devices():
        for name in ("nano", "base"):
            yield real_time(Piano.from_pretrained(name, device))
            yield first_sound(name, device)


if __name__ == "__main__":
    append(records())
