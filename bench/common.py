"""What the scripts beside it share: figures measured in turn, the machine's facts, the peers, bench/results.jsonl.

A record is one comparison, and one line of that file: `results` holds the median, minimum and maximum of each
contender's figure with all its runs, `ratios` the same of the others' figures to the first's, run by run.
"""

import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

RESULTS = Path(__file__).with_name("results.jsonl")
Record = dict[str, Any]


@cache
def peer(module: str, package: str) -> ModuleType | None:
    """The module; or None, with a line that says so, where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"without {package} ({error}): pip install {package}")
        return None


@cache
def k_diffusion() -> ModuleType | None:
    """k-diffusion with its modules `sampling`, `external` and `layers`, or None as `peer` gives it.

    The package's `__init__` imports all that its training needs (CLIP, wandb, kornia and more), so it is not run; and
    what these three import for purposes other than ours is a mock while they are loaded.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        print("without k-diffusion (it is not installed): pip install --no-deps k-diffusion")
        return None
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    unneeded = ("torchvision", "torchvision.transforms", "torchdiffeq", "torchsde", "dctorch", "einops")
    mocks: dict[str, Any] = {"k_diffusion": package, **{name: MagicMock() for name in unneeded}}
    before = {name: sys.modules.get(name) for name in mocks}
    sys.modules.update(mocks)
    try:
        for name in ("utils", "sampling", "external", "layers"):
            importlib.import_module(f"k_diffusion.{name}")
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module:
                sys.modules[name] = module
        for name in ("utils", "sampling", "external", "layers"):  # whoever loads them next gets them whole
            sys.modules.pop(f"k_diffusion.{name}", None)
    return package


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """How long one run of `work` takes on the device."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum, to six digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def compare(comparison: str, unit: str, contenders: Mapping[str, Callable[[], float]], *, runs: int = 7,
            device: str = "cpu", peers: Iterable[str] = (), **facts: Any) -> Record:
    """Measure the contenders in turn, A B A B ..., after a round to warm up; print and return the record.

    Each contender gives its figure in `unit` when called; `peers` are packages whose versions belong to the record.
    Raises ValueError for fewer than five runs or no contender.
    """
    if runs < 5 or not contenders:
        raise ValueError(f"{comparison}: at least five runs of one contender are needed, not {runs} of {[*contenders]}")
    rounds = [{name: measure() for name, measure in contenders.items()} for _ in range(runs + 1)][1:]
    first, *others = contenders
    values = {name: [figures[name] for figures in rounds] for name in contenders}
    results = {name: {**spread(v), "runs": [float(f"{x:.6g}") for x in v]} for name, v in values.items()}
    ratios = {name: spread([b / a for a, b in zip(values[first], values[name], strict=True)]) for name in others}
    print(f"\n{comparison} ({unit}; median, minimum and maximum of {runs})")
    for name, figures in results.items():
        line = "{median:>9.4g} ({min:.4g} - {max:.4g})".format_map(figures)
        if name in ratios:
            line += "   {median:.2f} ({min:.2f} - {max:.2f}) x the first".format_map(ratios[name])
        print(f"  {name:<36}{line}", flush=True)
    return {"comparison": comparison, "unit": unit, "device": device, **machine(device),
            "peers": {name: version(name) for name in peers}, "results": results, "ratios": ratios, "facts": facts}


def machine(device: str = "cpu") -> Record:
    """The date, and what the figures depend on: processor, usable cores, threads, versions."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    facts = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu,
             "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
             "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
             "python": platform.python_version(), "torch": torch.__version__}
    return {**facts, "gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else facts


def devices() -> list[str]:
    """What can be measured here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def append(records: Iterable[Record], path: Path = RESULTS) -> None:
    """Append each record as soon as it is made. An interrupt ends the program with a line; the file stays whole."""
    try:
        for record in records:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the comparisons before this one are in {path.name}")
