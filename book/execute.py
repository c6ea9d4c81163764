"""Re-execute chapters in fresh kernels, so that the outputs which the book shows are those of the code as it stands.

    python book/execute.py [nbs/02_audio.ipynb ...]      all chapters, when none is named

Cells that nbdev_test skips (`#| eval: false`, `#| slow`, `#| gpu`) keep the outputs they have. What code each chapter
was executed with is recorded in executed.json; `stale` compares, and a test asks it.
"""

import ast
import hashlib
import json
import sys
import time
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from pianodiff_book import split_directives

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "book" / "executed.json"


def chapters() -> list[Path]:
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def code_of(path: Path) -> str:
    """A chapter's code cells, or a module's source: without the comments and blank lines that change nothing."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    else:
        text = path.read_text()
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("# "))


@cache
def modules_of(code: str) -> set[Path]:
    """The files of ours that this code imports, at any depth: `pianodiff.audio` in a chapter, `.audio` in a module."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            name = node.module if node.level == 0 else f"pianodiff.{node.module or '__init__'}"
            names.add("pianodiff.__init__" if name == "pianodiff" else name)
            if name == "pianodiff" and "Piano" in {alias.name for alias in node.names}:
                names.add("pianodiff.generate")  # which it hands on
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    found = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name and name.startswith("pianodiff.")}
    return found.union(*(modules_of(code_of(path)) for path in found if path.stem != "__init__"))


def fingerprint(chapter: Path) -> str:
    """Of the chapter's code and of every module of ours that it runs."""
    code = code_of(chapter)
    python = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    parts = [code, *(code_of(path) for path in sorted(modules_of(python)))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def recorded() -> dict[str, str]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def stale() -> list[str]:
    """The chapters whose outputs are older than their code."""
    return [path.stem for path in chapters() if recorded().get(path.stem) != fingerprint(path)]


def skipped(source: str) -> bool:
    """Whether nbdev_test leaves out a code cell."""
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    directives, _ = split_directives(source)
    return directives.get("eval") == "false" or bool(directives.keys() & set(config["DEFAULT"]["tst_flags"].split()))


# What a kernel does before its chapter: figures become pictures for the book, and no bar moves over its pages
BEGIN = f"""import tqdm.auto
class Silent(tqdm.auto.tqdm):    # a class still, since others derive theirs from it
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs | {{"disable": True}})
tqdm.auto.tqdm = Silent; del Silent, tqdm
import sys; sys.path.insert(0, {str(ROOT / "book")!r})
import picture; picture.install(get_ipython()); sys.path.pop(0); del picture, sys"""


class Client(NotebookClient):
    """Executes what nbdev_test would."""

    async def async_start_new_kernel_client(self, **kwargs: Any) -> Any:
        client = await super().async_start_new_kernel_client(**kwargs)
        reply = await client.execute_interactive(BEGIN, silent=True, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
        return client

    async def async_execute_cell(self, cell: Any, *args: Any, **kwargs: Any) -> Any:
        if cell.cell_type == "code" and skipped(cell.source):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def main(names: list[str]) -> None:
    for path in [Path(name).resolve() for name in names] or chapters():
        begin = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        Client(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
        notebook.metadata.pop("widgets", None)   # a widget's state changes at every run
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)   # died with the kernel
        nbformat.write(notebook, path)
        RECORD.write_text(json.dumps({**recorded(), path.stem: fingerprint(path)}, indent=1, sort_keys=True) + "\n")
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
