"""The book's own Sphinx extension: nbdev's notebooks as chapters, the paper's equation numbers, and what pages carry.

A chapter is written for nbdev, whose directives (`#| export`) stand at the head of a cell. A reader of the book needs
none of them: they are taken off, and those that say what to show become the tags by which MyST-NB shows it; imports
are folded, and pictures get words for those who can't see them. The sources stay as they are.
"""

import ast
import itertools
import re
import textwrap
from configparser import ConfigParser, SectionProxy
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives as options
from myst_nb.core.render import MimeData, NbElementRenderer
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc import preserve_defaults
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
# Equations in a docstring, "Eqs. (25), (32)" of the paper or "Eq. (guidance) of chapter 12" of ours; and the chapter
CITED = re.compile(r"(Eqs?\.\s+\([\w-]+\)(?:(?:,|,?\s+and|\s+to)\s+\([\w-]+\))*)(?:\s+of\s+chapter\s+(\d+))?")


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """The nbdev directives at the head of a code cell, as {name: value}, and the code under them."""
    directives, lines = {}, source.splitlines()
    while lines and (match := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", lines[0])):
        directives[match[1]] = match[2]
        del lines[0]
    return directives, "\n".join(lines).strip("\n")


def describe(section: str, code: str) -> str:
    """The words for the pictures of a cell: its section, and the titles and labels that its code writes into them."""
    words = re.findall(r"(?:title|label)\w*[=(]\s*f?[\"']([^\"'{}]*[a-z][^\"'{}]*)[\"']", code)
    return f"Picture: {section}" + (f" ({', '.join(dict.fromkeys(words))})" if words else "")


def only_imports(code: str) -> bool:
    """Whether a cell imports, perhaps for types alone or with a way out where something is missing, perhaps chooses
    the book's style, and does nothing else."""
    try:
        body = ast.parse(code).body
    except SyntaxError:    # a line for the shell
        return False
    for node in [node for node in body if isinstance(node, ast.Try)
                 or isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]:
        body.remove(node)
        body += node.body + node.orelse
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom)
                              or ast.unparse(node).startswith("plt.style.use(") for node in body)


def read_chapter(text: str) -> nbformat.NotebookNode:
    """MyST-NB's reader of .ipynb: directives become tags, and a cell of directives alone is not shown.

    Of imports in a row, those that nbdev exports and those that it doesn't, one folded cell is shown.
    """
    notebook, section, before = nbformat.reads(text, as_version=4), "", None
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}    # `!` and `%` are no errors
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives, cell.source = split_directives(cell.source)
            tags = [TAGS[item] for item in directives.items() if item in TAGS]
            imports = only_imports(cell.source)
            if imports and before:
                cell.source = f"{before.source}\n\n{cell.source}"
                before.metadata["tags"] = ["remove-cell"]
            tags += ["remove-cell"] if not cell.source else ["hide-input"] if imports else []
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), *tags]
            before = cell if imports else before if "remove-cell" in tags else None
            what = "imports" if imports else "the code"
            drawn = any("alt" in about for output in cell.outputs for about in output.get("metadata", {}).values())
            cell.metadata["mystnb"] = {"image": {"alt": describe(section, "" if drawn else cell.source)},
                                       "code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}
        else:
            before = None
            section = re.findall(r"^#+ (.+)$", f"# {section}\n{cell.source}", re.M)[-1]
    return notebook


def at_night(planes: list[list[float]]) -> str:
    """What lies over a figure and inverts it in the dark: all but its planes, given as picture.py does."""
    edge = "0 0, 100% 0, 100% 100%, 0 100%, 0 0"
    holes = "".join(f", {left}% {top}%, {right}% {top}%, {right}% {bottom}%, {left}% {bottom}%, {left}% {top}%, 0 0"
                    for left, top, right, bottom in planes)
    return f'<span class="night" style="clip-path: polygon(evenodd, {edge}{holes})"></span>'


def show_picture(self: NbElementRenderer, data: MimeData) -> list[nodes.Element]:
    """An output's picture, in the words that picture.py took from the figure; for the dark, what to invert of it."""
    image, = render_image(self, data)
    about = data.output_metadata.get(data.mime_type, {})
    if "planes" not in about:
        return [image]
    del image["height"]     # the page's width may shrink it
    image["alt"] = ": ".join(filter(None, (image["alt"], about["alt"])))
    image["classes"].append("dark-light")    # the theme dims pictures of another class
    return [nodes.container("", image, nodes.raw("", at_night(about["planes"]), format="html"), classes=["picture"])]


def settings() -> SectionProxy:
    """What settings.ini says of the project."""
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def repository() -> tuple[str, str]:
    """Where the project lies: its address and its branch."""
    known = settings()
    return f"https://github.com/{known['user']}/{known['repo']}", known["branch"]


def published() -> str:
    """The address of the book's folder on the web: GitHub's pages of the repository."""
    _, _, _, user, name = repository()[0].split("/")
    return f"https://{user}.github.io/{name}/"


def install_cell() -> str:
    """The second cell of every chapter, under its title: what a notebook opened in Colab needs."""
    return f"""#| hide
import importlib.util

if importlib.util.find_spec("pianodiff") is None:  # in Colab
    get_ipython().system("pip install -q git+{repository()[0]}")"""


COLAB = "https://colab.research.google.com"


def offer_colab(app: Sphinx, config: Config) -> None:
    """A button on each chapter opens its notebook there, and another the repository."""
    address, branch = repository()
    config.html_theme_options |= {"repository_url": address, "repository_branch": branch, "path_to_docs": "",
                                  "use_repository_button": True, "launch_buttons": {"colab_url": COLAB}}
    config.html_baseurl = published()


class Player(SphinxDirective):
    """A sound file of the book under its spectrogram, as `pianodiff.show.player` plays it, on a page of text."""

    required_arguments = 1
    option_spec = {"title": options.unchanged}

    def run(self) -> list[nodes.Node]:
        name, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(name)
        return [nodes.raw("", player(load_audio(path), title=self.options.get("title")).data, format="html")]


def mend_lists(body: str) -> str:
    """Lists that are none, for a screen reader: Sphinx's of a long signature's parameters, docutils' of citations."""
    body = re.sub(r'<dl>\s*(<dd><em class="sig-param">.*?)</dl>', lambda match: "<div>" + re.sub(
        r"<(/?)dd>", r"<\1div>", match[1]) + "</div>", body, flags=re.S)
    return body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')


def preview(app: Sphinx, page: str, title: str, doctree: nodes.document | None) -> str:
    """What a link to a page shows elsewhere: its title, the beginning of its text, and its first picture."""
    doctree = doctree or nodes.document(None, None)
    texts = (re.sub("<!--.*?-->", "", node.astext()) for node in doctree.findall(nodes.paragraph))
    text = next((text for text in texts if len(text) > 80), settings()["description"])
    short = textwrap.shorten(text, 200, placeholder=" …")
    files = (app.builder.images.get(node["uri"]) for node in doctree.findall(nodes.image))
    picture = next((f"_images/{file}" for file in files if file), "_static/nano-seed7.png")
    told = {"og:title": title, "og:description": short, "og:type": "article",
            "og:image": published() + picture, "og:url": f"{published()}{page}.html"}
    return (f'<meta name="description" content="{escape(short)}">\n'
            '<meta name="twitter:card" content="summary_large_image">\n'
            + "".join(f'<meta property="{name}" content="{escape(value)}">\n' for name, value in told.items()))


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Mend a page's lists, leave out MathJax where there is no maths, and say what a link to it shows."""
    body = mend_lists(context.get("body", ""))
    address, branch = repository()
    here = f"{COLAB}/github/{address.removeprefix('https://github.com/')}/blob/{branch}/{page}.ipynb"
    context["body"] = body.replace(f'<a href="{COLAB}"', f'<a href="{here}"')    # the studio's, where it has no kernel
    if 'class="math ' not in body:
        context["script_files"] = [file for file in context["script_files"] if "mathjax" not in str(file.filename)]
    title = re.sub("<[^>]*>", "", context.get("title") or app.config.project)
    context["metatags"] = context.get("metatags", "") + preview(app, page, title, doctree)


def drop_icons_script(app: Sphinx, error: Exception | None) -> None:
    """The theme brings its icons twice, as a font and as a script of 1.5 MB; the font stays."""
    for path in [] if error else Path(app.outdir).rglob("*.html"):
        text = path.read_text()
        if (lighter := re.sub(r"<script src=\"[^\"]*/fontawesome\.js[^\"]*\"></script>", "", text)) != text:
            path.write_text(lighter)


def join_entries(app: Sphinx, what: str, name: str, what_for: Any, how: Any, lines: list[str]) -> None:
    """An option that goes on in the next line, as the commands' docstrings wrap it, becomes one line of its list."""
    begin = next((i for i, line in enumerate(lines) if line in ("Args:", "Attributes:")), len(lines))
    joined: list[str] = []
    for line in lines[begin:]:
        if line.startswith(" " * 5):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    lines[begin:] = joined


def keep_defaults(app: Sphinx, function: Any, bound: bool) -> None:
    """Show defaults as the source writes them, but where a signature is made up: its source has none of them."""
    if not hasattr(function, "__signature__"):
        preserve_defaults.update_defvalue(app, function, bound)


def link_equations(app: Sphinx, what: str, name: str, what_for: Any, how: Any, lines: list[str]) -> None:
    """`Eq. (guidance) of chapter 12` in a docstring links to `eq-guidance`; in the book its number is enough."""
    text = CITED.sub(lambda match: re.sub(r"\(([\w-]+)\)", r":eq:`eq-\1`", match[1]), "\n".join(lines))
    lines[:] = text.split("\n")


def number_equations(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Equation `eq-27` is the paper's and keeps its number, (27); one of ours is counted within its chapter, (5.1)."""
    for figures in env.toc_fignumbers.values():
        equations, ours = figures.get("displaymath", {}), itertools.count(1)
        for label, number in equations.items():
            paper = re.fullmatch(r"equation-eq-(\d+)", label)
            equations[label] = (int(paper[1]),) if paper else (*number[:-1], next(ours))
    return []


render_image = NbElementRenderer.render_image


def setup(app: Sphinx) -> dict[str, Any]:
    NbElementRenderer.render_image = show_picture    # MyST-NB has no hook for it
    app.add_directive("player", Player)
    app.connect("config-inited", offer_colab)
    app.connect("html-page-context", finish_page, priority=900)    # after MathJax has been asked for
    app.connect("build-finished", drop_icons_script)
    app.connect("autodoc-process-docstring", link_equations)
    app.connect("autodoc-process-docstring", join_entries)
    for listener in app.events.listeners["autodoc-before-process-signature"]:
        if listener.handler is preserve_defaults.update_defvalue:
            app.disconnect(listener.id)
    app.connect("autodoc-before-process-signature", keep_defaults)
    app.connect("env-get-updated", number_equations, priority=900)   # after Sphinx has numbered them
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
