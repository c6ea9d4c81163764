"""The book's own Sphinx extension: nbdev's notebooks as chapters, and the paper's equation numbers.

A chapter is written for nbdev, whose directives (`#| export`) stand at the head of a cell. A reader of the book needs
none of them: they are taken off, and those that say what to show become the tags by which MyST-NB shows it; imports
are folded, and pictures get words for those who can't see them. The sources stay as they are.
"""

import ast
import itertools
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives as options
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from pianodiff.audio import load_audio
from pianodiff.show import player

ROOT = Path(__file__).resolve().parent.parent
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


def describe(section: str, code: str) -> str:
    """The words for the pictures of a cell: its section, and the titles and labels that its code writes into them."""
    words = re.findall(r"(?:title|label)\w*[=(]\s*f?[\"']([^\"']*[a-z][^\"'{}]*)[\"']", code)
    return f"Picture: {section}" + (f" ({', '.join(dict.fromkeys(words))})" if words else "")


def only_imports(code: str) -> bool:
    """Whether a cell imports, perhaps chooses the book's style, and does nothing else."""
    try:
        body = ast.parse(code).body
    except SyntaxError:    # a line for the shell
        return False
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom)
                              or ast.unparse(node).startswith("plt.style.use(") for node in body)


def read_chapter(text: str) -> nbformat.NotebookNode:
    """MyST-NB's reader of .ipynb: directives become tags, and a cell of directives alone is not shown."""
    notebook, section = nbformat.reads(text, as_version=4), ""
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}    # `!` and `%` are no errors
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives, cell.source = split_directives(cell.source)
            tags = [TAGS[item] for item in directives.items() if item in TAGS]
            imports = only_imports(cell.source)
            tags += ["remove-cell"] if not cell.source else ["hide-input"] if imports else []
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), *tags]
            what = "imports" if imports else "the code"
            cell.metadata["mystnb"] = {"image": {"alt": describe(section, cell.source)},
                                       "code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}
        else:
            section = re.findall(r"^#+ (.+)$", f"# {section}\n{cell.source}", re.M)[-1]
    return notebook


def repository() -> tuple[str, str]:
    """Where the project lies, by settings.ini: its address and its branch."""
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    known = config["DEFAULT"]
    return f"https://github.com/{known['user']}/{known['repo']}", known["branch"]


def install_cell() -> str:
    """The second cell of every chapter, under its title: what a notebook opened in Colab needs."""
    return f"""#| hide
import importlib.util

if importlib.util.find_spec("pianodiff") is None:  # in Colab
    get_ipython().system("pip install -q git+{repository()[0]}")"""


def offer_colab(app: Sphinx, config: Config) -> None:
    """A button on each chapter opens its notebook there."""
    address, branch = repository()
    config.html_theme_options |= {"repository_url": address, "repository_branch": branch, "path_to_docs": "",
                                  "launch_buttons": {"colab_url": "https://colab.research.google.com"}}


class Player(SphinxDirective):
    """A sound file of the book under its spectrogram, as `pianodiff.show.player` plays it, on a page of text."""

    required_arguments = 1
    option_spec = {"title": options.unchanged}

    def run(self) -> list[nodes.Node]:
        name, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(name)
        return [nodes.raw("", player(load_audio(path), title=self.options.get("title")).data, format="html")]


def mend_lists(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Lists that are none, for a screen reader: Sphinx's of a long signature's parameters, docutils' of citations."""
    body = re.sub(r'<dl>\s*(<dd><em class="sig-param">.*?)</dl>', lambda match: "<div>" + re.sub(
        r"<(/?)dd>", r"<\1div>", match[1]) + "</div>", context.get("body", ""), flags=re.S)
    context["body"] = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')


def number_equations(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Equation `eq-27` is the paper's and keeps its number, (27); one of ours is counted within its chapter, (5.1)."""
    for figures in env.toc_fignumbers.values():
        equations, ours = figures.get("displaymath", {}), itertools.count(1)
        for label, number in equations.items():
            paper = re.fullmatch(r"equation-eq-(\d+)", label)
            equations[label] = (int(paper[1]),) if paper else (*number[:-1], next(ours))
    return []


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("player", Player)
    app.connect("config-inited", offer_colab)
    app.connect("html-page-context", mend_lists)
    app.connect("env-get-updated", number_equations, priority=900)   # after Sphinx has numbered them
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
