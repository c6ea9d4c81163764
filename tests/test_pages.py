"""The pages that are not chapters: every equation and figure has its place, every name and every link leads there."""

import ast
import importlib
import re
import shlex
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import prose, resolve

from pianodiff.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "nbs").glob("*.md"))]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
LABELS = [f"eq-{n}" for n in range(1, 38)] + [f"fig-{n}" for n in range(1, 11)]


def labels(text: str) -> list[str]:
    """The equations `$$ (label)` and the places `(label)=` that a text defines."""
    return re.findall(r"^\$\$ \(([\w-]+)\)$|^\(([\w-]+)\)=$", text, re.M)


@cache
def places() -> dict[str, list[str]]:
    """{label: the chapters that define it, each as often as it does}."""
    found: dict[str, list[str]] = {}
    for chapter in CHAPTERS:
        for pair in labels(prose(chapter)):
            found.setdefault("".join(pair), []).append(chapter.name)
    return found


@cache
def table() -> dict[str, tuple[str, str]]:
    """The notation page's rows of equations and figures: {label: (chapter, function)}."""
    row = re.compile(r"^\| \{(?:eq|ref)\}`(?:\d+ <)?((?:eq|fig)-\d+)>?` \|.*\| \[\]\(\.\./nbs/([\w.]+)\) "
                     r"\| \{py:obj\}`~pianodiff\.([\w.]+)` \|$", re.M)
    rows = row.findall((ROOT / "book" / "notation.md").read_text())
    assert len(rows) == len({label for label, *_ in rows}), "a row stands twice"
    return {label: (chapter, function) for label, chapter, function in rows}


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The book's and the bench's modules can be imported."""
    monkeypatch.syspath_prepend(ROOT / "book")
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_no_equation_and_no_figure_is_missing():
    assert list(table()) == LABELS


@pytest.mark.parametrize("label", LABELS)
def test_a_label_stands_once_in_its_chapter(label: str):
    assert places().get(label, []) == [table()[label][0]]


@pytest.mark.parametrize("label", LABELS)
def test_a_function_of_the_table_can_be_imported(label: str):
    assert callable(resolve(table()[label][1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_a_page_can_be_imported(page: Path):
    names = re.findall(r"\{py:\w+\}`~?pianodiff\.([\w.]+)`", page.read_text())
    assert all(resolve(name) is not None for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []
    known = {label for pair in labels(text) for label in pair} | set(places())
    asked = re.findall(r"\{(?:eq|ref)\}`(?:[^`<]*<)?([\w-]+)>?`", text) + re.findall(r"\]\(#([\w-]+)\)", text)
    assert [label for label in asked if label not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_citations_of_a_page_are_in_the_bibliography(page: Path):
    known = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(), re.M))
    cited = ",".join(re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text()))
    assert {key.strip() for key in cited.split(",") if key} <= known


def commands(page: str) -> list[list[str]]:
    """The words of each `pianodiff …` in a page's shell blocks, after `accelerate launch` and its options too."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "book" / page).read_text(), re.M | re.S)
    lines = [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|-m )pianodiff(?:\.cli)? (.*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("command", commands("train_your_own.md"), ids=" ".join)
def test_the_commands_that_are_told_exist(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([command[0], "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert stopped.value.code == 0
    assert {word for word in command if word.startswith("--")} <= known


def test_the_commands_are_found():
    assert {command[0] for command in commands("train_your_own.md")} >= {"prepare", "train", "generate", "evaluate"}


# ---- docstrings say where their equations are

def misplaced(docstrings: str) -> list[str]:
    """Citations of no equation, of ours without its chapter's number, or with another; the paper's have their own."""
    found = []
    for match in importlib.import_module("pianodiff_book").CITED.finditer(docstrings):
        for label in re.findall(r"\(([\w-]+)\)", match[1]):
            chapters = {Path(name).stem for name in places().get(f"eq-{label}", [])}
            numbers = {str(importlib.import_module("figures").numbers().get(name)) for name in chapters}
            if not numbers or match[2] != (None if label.isdigit() else numbers.pop()):
                found.append(match[0])
    return found


@pytest.mark.parametrize("module", sorted((ROOT / "pianodiff").glob("[!_]*.py")), ids=lambda module: module.stem)
def test_a_docstring_tells_the_chapter_of_its_equations(module: Path, paths: None):
    nodes = ast.walk(ast.parse(module.read_text()))
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert misplaced("\n".join(texts)) == []


@pytest.mark.parametrize("wrong", ["Eq. (guidance)", "Eq. (guidance) of chapter 11", "Eqs. (first-order) and\n(2m)",
                                   "Eq. (27) of chapter 7", "Eq. (nothing) of chapter 12", "Eq. (axes) of chapter 23"])
def test_an_equation_that_is_misplaced_is_found(wrong: str, paths: None):
    assert misplaced(wrong) and not misplaced("Eq. (guidance)\n    of chapter 12, Eqs. (25), (32) and (33)")


# ---- figures have one source

@pytest.fixture
def figures(paths: None) -> ModuleType:
    return importlib.import_module("figures")


def test_figures_are_those_that_were_measured(figures: ModuleType):
    stale = [path.name for path in figures.files() if figures.fill(path.read_text()) != path.read_text()]
    assert stale == [], "run python bench/figures.py"


@pytest.mark.parametrize("wrong", [
    "in <!-- =steps -->7<!-- = --> steps", "`nano` takes <!-- =nano 20 s -->an hour<!-- = -->",
    "see [99](nbs/18_evaluate.ipynb)", "[Chapter 09a](14_distance.ipynb)"])
def test_a_stale_figure_is_found_and_mended(figures: ModuleType, wrong: str):
    mended = figures.fill(wrong)
    assert mended != wrong and figures.fill(mended) == mended


@pytest.mark.parametrize("unknown", ["<!-- =stops -->7<!-- = -->", "[99](nbs/99_nothing.ipynb)"])
def test_a_figure_without_source_is_refused(figures: ModuleType, unknown: str):
    with pytest.raises(KeyError):
        figures.fill(unknown)


LOOSE = {"steps": r"\b(?:1[0-9]|dozen|twelve|fifteen) steps\b", "a chapter's number": r"(?i)\bchapters? \d",
         "seconds of work": r"\d s on (?:two|2) cores", "a first sound": r"first sound (?:comes )?after \d",
         "parameters": r"\d million parameters"}


def loose(text: str) -> list[str]:
    """Figures that are written by hand although they have a source; cells of code and generated parts are left out."""
    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->|<!-- =.*?<!-- = -->|\[[^]]*\]\(|```.*?```", "", text, flags=re.S)
    return [match[0] for pattern in LOOSE.values() for match in re.finditer(pattern, text)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_no_figure_of_a_page_is_written_by_hand(page: Path):
    assert loose(page.read_text()) == []


@pytest.mark.parametrize("text", ["takes 15 steps", "in chapter 09b", "3.4 s on two cores", "first sound after 0.4 s"])
def test_a_figure_by_hand_is_found(text: str):
    assert loose(text) and not loose(f"<!-- =x -->{text}<!-- = -->")


def test_the_workflow_calls_the_makefile_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    lines = [line for line in steps if not line.startswith("choco install make ")]    # Windows brings none
    assert {line.split()[1] for line in lines} == {"test", "test-long", "book", "piano"} <= targets
    assert all(line.split()[0] == "make" and "\n" not in line.strip() for line in lines)
    assert workflow["jobs"]["build"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert set(workflow[True]) == {"push", "pull_request", "schedule", "workflow_dispatch"}    # YAML's `on` is true


ADDRESSED = [*PAGES, *CHAPTERS, *(ROOT / name for name in (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", ".github/workflows/book.yml"))]


def addresses(text: str) -> set[tuple[str, str]]:
    """Owner and name of every repository of this project's name that an address in the text leads to."""
    hosts = r"(?:github\.com/|githubusercontent\.com/|colab\.research\.google\.com/github/)([\w-]+)/([\w-]+)"
    found = re.findall(hosts, text) + re.findall(r"([\w-]+)\.github\.io/([\w-]+)", text)
    return {(owner, name) for owner, name in found if "pianodiff" in (owner, name)}


def repository() -> tuple[str, str, str]:
    """Owner, name and branch, as settings.ini has them."""
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]["user"], config["DEFAULT"]["repo"], config["DEFAULT"]["branch"]


def test_every_address_of_the_repository_is_that_of_the_settings():
    owner, name, _ = repository()
    assert {str(path) for path in ADDRESSED if addresses(path.read_text()) - {(owner, name)}} == set()
    assert addresses((ROOT / "README.md").read_text()) == addresses(CHAPTERS[0].read_text()) == {(owner, name)}


@pytest.mark.parametrize("text", ["git+https://github.com/someone/pianodiff", "https://pianodiff.github.io/piano/",
                                  "https://colab.research.google.com/github/pianodiff/piano/blob/main/a.ipynb"])
def test_another_address_would_be_found(text: str):
    assert addresses(text) - {repository()[:2]}


def test_links_into_colab_and_the_book_lead_to_pages():
    _, _, branch = repository()
    for path in ADDRESSED:
        text = path.read_text()
        notebooks = re.findall(r"research\.google\.com/github/[\w-]+/pianodiff/blob/([\w-]+)/([\w./]+)", text)
        pages = re.findall(r"github\.io/[\w-]+/([\w/]+)\.html", text)
        assert all(on == branch and (ROOT / notebook).is_file() for on, notebook in notebooks), path
        assert all([*ROOT.glob(f"{page}.*")] for page in pages), path
