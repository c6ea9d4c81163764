"""The book's own Sphinx extension: nbdev's notebooks as chapters, and the paper's equation numbers.

A chapter is written for nbdev, whose directives (`#| export`) stand at the head of a cell. A reader of the book needs
none of them: they are taken off, and those that say what to show become the tags by which MyST-NB shows it. The sources
stay as they are.
"""

import itertools
import re
from typing import Any

import nbformat
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

TAGS = {
    ("hide", ""): "remove-cell",
    ("code-fold", "true"): "hide-input",
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
}


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """The nbdev directives at the head of a code cell, as {name: value}, and the code under them."""
    directives, lines = {}, source.splitlines()
    while lines and (match := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", lines[0])):
        directives[match[1]] = match[2]
        del lines[0]
    return directives, "\n".join(lines).strip("\n")


def read_chapter(text: str) -> nbformat.NotebookNode:
    """MyST-NB's reader of .ipynb: directives become tags, and a cell of directives alone is not shown."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives, cell.source = split_directives(cell.source)
            tags = [TAGS[item] for item in directives.items() if item in TAGS]
            tags += ["remove-cell"] if not cell.source else []
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), *tags]
    return notebook


def number_equations(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Equation `eq-27` is the paper's and keeps its number, (27); one of ours is counted within its chapter, (5.1)."""
    for figures in env.toc_fignumbers.values():
        equations, ours = figures.get("displaymath", {}), itertools.count(1)
        for label, number in equations.items():
            paper = re.fullmatch(r"equation-eq-(\d+)", label)
            equations[label] = (int(paper[1]),) if paper else (*number[:-1], next(ours))
    return []


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-get-updated", number_equations, priority=900)   # after Sphinx has numbered them
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
