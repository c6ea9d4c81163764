"""Do the chapters' own checks fail where a formula is broken? Each fault below is put into its chapter, which runs.

    python tests/mutations/run.py             all of them, and each chapter as it stands
    python tests/mutations/run.py heun flux   some

Exits with 1 if a fault goes unseen, or if a chapter fails without one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book"))
from execute import skipped  # noqa: E402

SECONDS = 7200  # for one chapter, on a machine that has other work, too


class Mutation(NamedTuple):
    """`source` stands once in the chapter's exported cells; with `mutant` in its place a check has to fail."""

    name: str
    chapter: str
    equation: str
    source: str
    mutant: str


MUTATIONS = [
    Mutation("scale", "01_sde", "Eq. (10)", "(-integral / 2).exp(), torch.expm1", "(integral / 2).exp(), torch.expm1"),
    Mutation("reverse", "01_sde", "Eq. (7)", "return drift - pull", "return drift + pull"),
    Mutation("score", "01_sde", "Eq. (15)", "-predict_noise(x, t) / ", "predict_noise(x, t) / "),
    Mutation("matching", "01_sde", "Eq. (16)", "noise, t) + noise / std", "noise, t) - noise / std"),
    Mutation("decibels", "02_audio", "Eq. (decibels)", "(1 + decibels / cfg.top_db)", "(1 - decibels / cfg.top_db)"),
    Mutation("magnitude", "02_audio", "Eq. (decibels), back", "10 ** ((spec - 1)", "10 ** ((1 - spec)"),
    Mutation("phases", "03_phases", "Eq. (phase-gradient)", "(own + along_rows", "(own - along_rows"),
    Mutation("attention", "06_unet", "Eq. (attention)", "(x + self.out(h))", "(x - self.out(h))"),
    Mutation("adagn", "06_unet", "AdaGN", "self.norm1(h), scale + 1)", "self.norm1(h), scale - 1)"),
    Mutation("schedule", "07_edm", "Eq. (27)", "** (1 / rho) - sigma_max", "** (1 / rho) + sigma_max"),
    Mutation("denoiser", "07_edm", "Eq. (24)", "c_skip * x.to(dtype) + c_out", "c_skip * x.to(dtype) - c_out"),
    Mutation("total", "07_edm", "Eqs. (28)-(30)",
             "(sigma**2 + sigma_data**2) ** 0.5", "(sigma**2 - sigma_data**2) ** 0.5"),
    Mutation("weight", "07_edm", "Eq. (33)", "(sigma**2 + sigma_data**2) / (", "(sigma**2 - sigma_data**2) / ("),
    Mutation("levels", "07_edm", "Eq. (32)", "P_mean + P_std * torch", "P_std + P_mean * torch"),
    Mutation("rate", "09_recipe", "Eq. (learning-rate)",
             "(1 - images / config.images)", "(1 + images / config.images)"),
    Mutation("average", "09_recipe", "Eq. (ema-step)", "** (self.gamma + 1)", "** (self.gamma - 1)"),
    Mutation("heun", "11_sampler", "Algorithm 2", "(d_cur + d_prime)", "(d_cur - d_prime)"),
    Mutation("multistep", "11_sampler", "Eq. (2m)", "1 + h[i] / (2 * h[i - 1])", "1 - h[i] / (2 * h[i - 1])"),
    Mutation("ancestral", "11_sampler", "Eq. (down-up)", "(t_next**2 - t_up**2)", "(t_next**2 + t_up**2)"),
    Mutation("frechet", "14_distance", "Eq. (37)", "- 2 * cross", "+ 2 * cross"),
    Mutation("merge", "14_distance", "Eq. (merge)", "centred.T @ centred + self.n", "centred.T @ centred - self.n"),
    Mutation("kernel", "14_distance", "Eq. (mmd)", "within_y - 2 * ", "within_y + 2 * "),
    Mutation("flux", "15_music", "Eq. (flux)", "(spec[..., lag:] - spec", "(-spec[..., lag:] + spec"),
    Mutation("left over", "15_music", "Eq. (left-over)", "(frames / p).log()", "(p / frames).log()"),
    Mutation("notes", "15_music", "Eq. (notes)", "torch.special.entr(q).sum(0).exp()", "torch.special.entr(q).sum(0)"),
    Mutation("work", "15_music", "Eq. (wasserstein)", "(F_x - F_y).abs()", "(F_x + F_y).abs()"),
    Mutation("pattern", "17_novelty", "Eq. (pattern)", "(x - x.mean((-2", "(x + x.mean((-2"),
    Mutation("ratio", "17_novelty", "Eq. (ratio)", "distance[:, 0] / further", "further / distance[:, 0]"),
]

# What runs a chapter: its cells one by one, up to the first that fails; pictures are not drawn, and sounds not encoded.
CHILD = """
import builtins, json, sys, traceback
from unittest.mock import MagicMock
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import pianodiff.show
plt.show = pianodiff.show.player = pianodiff.show.slider = builtins.display = MagicMock()
space = {"__name__": "__main__"}
for number, source in json.load(open("cells.json")):
    try:
        exec(compile(source, f"cell {number}", "exec"), space)
    except BaseException as error:
        traceback.print_exc()
        print("\\n" + json.dumps([number, type(error).__name__]))
        sys.exit(1)
    plt.close("all")
print("\\nnull")
"""


class Outcome(NamedTuple):
    """How a chapter's run ended: at which cell (None: at none), by what, and that cell's first line."""

    cell: int | None
    error: str
    line: str

    @property
    def caught(self) -> bool:
        return self.error == "AssertionError"


def cells_of(chapter: str) -> list[tuple[int, str]]:
    """A chapter's code cells, with their numbers among all cells; those that nbdev_test runs."""
    cells = nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", as_version=4).cells
    return [(i, cell.source) for i, cell in enumerate(cells)
            if cell.cell_type == "code" and not skipped(cell.source)]


def replaced(texts: list[str], mutation: Mutation) -> list[str]:
    """The texts with the mutant; ValueError unless the fragment stands in them once."""
    found = sum(text.count(mutation.source) for text in texts)
    if found != 1:
        raise ValueError(f"{mutation.name}: {mutation.source!r} stands {found} times in the exports of "
                         f"{mutation.chapter}, not once; mend its line in tests/mutations/run.py")
    return [text.replace(mutation.source, mutation.mutant) for text in texts]


def run(chapter: str, mutation: Mutation | None = None, until: int | None = None) -> Outcome:
    """Run a chapter, with a fault or as it is, to its first failing cell, or to cell `until`, in a copy of its own."""
    cells = [(number, source) for number, source in cells_of(chapter) if until is None or number <= until]
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pianodiff"
        shutil.copytree(ROOT / "pianodiff", package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
        os.symlink(ROOT / "pianodiff" / "weights", package / "weights")
        if mutation:
            exported = [(number, source) for number, source in cells if re.search(r"^#\| ?export", source, re.M)]
            mutated = replaced([source for _, source in exported], mutation)
            changed = {number: source for (number, _), source in zip(exported, mutated, strict=True)}
            cells = [(number, changed.get(number, source)) for number, source in cells]
            module = package / f"{chapter.partition('_')[2]}.py"
            module.write_text(*replaced([module.read_text()], mutation))
        (Path(folder) / "cells.json").write_text(json.dumps(cells))
        env = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run([sys.executable, "-c", CHILD], cwd=folder, env=env, capture_output=True, text=True,
                                  timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(None, f"{SECONDS} s were too few", "")
    ended = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else [None, done.stderr[-1000:]]
    if ended is None:
        return Outcome(None, "", "")
    number, error = ended
    body = [line for line in dict(cells).get(number, "").splitlines() if line.strip() and not line.startswith("#|")]
    return Outcome(number, error, body[0] if body else "")


def main(names: list[str]) -> int:
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        sys.exit(f"there is no mutation {min(unknown)}; choose of {', '.join(m.name for m in MUTATIONS)}")
    chosen = [mutation for mutation in MUTATIONS if mutation.name in names or not names]
    failed, last = 0, dict[str, int]()
    for mutation in chosen:
        outcome = run(mutation.chapter, mutation)
        failed += not outcome.caught
        last[mutation.chapter] = max(last.get(mutation.chapter, 0), outcome.cell or 0)
        seen = f"seen in cell {outcome.cell}" if outcome.caught else outcome.error or "NOT SEEN"
        print(f"{mutation.chapter:13}{mutation.name:10} {mutation.equation:22}{seen:18} {outcome.line[:60]}",
              flush=True)
    for chapter, cell in last.items():
        outcome = run(chapter, until=cell)
        failed += outcome.error != ""
        print(f"{chapter:13}as it is, to cell {cell}: {outcome.error or 'passes'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
