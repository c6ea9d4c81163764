"""The house: chapters run, exports are fresh, imports point upwards, the contract holds, no file knows this machine."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from chapters import ran
from conftest import prose, resolve

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pianodiff"
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
BIN = Path(sys.executable).parent

# What each module may import of the package. The commands may import all.
MAY_IMPORT = {
    "files": set(),
    "synth": set(),
    "terminal": set(),
    "sde": set(),
    "audio": {"files", "terminal"},
    "phases": {"audio"},
    "recordings": {"audio", "terminal"},
    "data": {"audio", "files", "recordings", "synth", "terminal"},
    "unet": set(),
    "edm": set(),
    "model": {"files", "unet"},
    "recipe": {"audio", "data", "edm", "files", "model", "unet"},
    "train": {"data", "edm", "files", "model", "recipe", "terminal", "unet"},
    "sampler": {"edm"},
    "generate": {"audio", "edm", "files", "model", "phases", "sampler", "unet"},
    "pieces": {"audio", "files", "generate", "model", "phases", "recordings", "terminal"},
    "distance": {"audio", "files", "pieces"},
    "music": {"audio", "distance", "files", "pieces", "recordings"},
    "joins": {"audio", "files", "music", "phases", "pieces"},
    "novelty": {"audio", "data", "distance", "files", "phases", "pieces"},
    "classifier": {"audio", "files", "joins", "pieces", "terminal"},
    "evaluate": {"audio", "classifier", "data", "distance", "files", "generate", "joins", "model", "music", "novelty",
                 "pieces", "recordings", "terminal"},
    "fewstep": {"edm", "files", "generate", "model", "recipe", "sampler", "train"},
    "show": {"audio"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# The contract: the parameters that each public name has at least, in this order, those after "*" by name.
SAMPLER = ("denoise latents cond * sigmas num_steps sigma_min sigma_max rho S_churn S_min S_max S_noise randn_like "
           "dtype callback")
STOCHASTIC = ("denoise latents cond * sigmas num_steps sigma_min sigma_max rho eta S_noise randn_like dtype "
              "callback")
CONTRACT = {
    "sde.VPSDE": "beta_min beta_max", "sde.SubVPSDE": "beta_min beta_max", "sde.VESDE": "sigma_min sigma_max",
    "sde.SDE.marginal": "x0 t", "sde.SDE.drift_diffusion": "x t", "sde.SDE.reverse": "score noise",
    "sde.SDE.prior": "shape generator dtype", "sde.SDE.schedule": "t", "sde.SDE.time": "sigma",
    "sde.dsm_loss": "sde score x0 t noise", "sde.score_from_noise": "sde predict_noise",
    "sde.score_from_denoiser": "sde denoise cond",
    "sde.euler_maruyama_sample": "sde score x * noise num_steps t_min times randn_like callback",
    "sde.ode_sample": "sde score x * num_steps t_min times callback",
    "sde.log_likelihood": "sde score x * probes num_steps t_min times generator",
    "audio.SpectrogramConfig": "sample_rate n_fft hop_length n_frames top_db",
    "audio.load_audio": "path sample_rate",
    "audio.save_audio": "path wave sample_rate",
    "audio.to_spectrogram": "wave cfg",
    "audio.to_magnitude": "spec cfg",
    "audio.to_wave": "spec cfg * n_iter",
    "audio.griffin_lim": "magnitude cfg * n_iter momentum generator",
    "audio.to_flac": "wave sample_rate",
    "audio.whole_file": "path",
    "phases.to_wave": "spec cfg * n_iter init generator known",
    "phases.griffin_lim": "magnitude cfg * n_iter momentum init generator known",
    "phases.stream_wave": "specs cfg * n_iter generator known",
    "data.prepare": "source store cfg * splits jobs",
    "data.BlockDataset": "store split * random_offset",
    "data.example_performance": "seconds seed",
    "edm.karras_sigmas": "num_steps sigma_min sigma_max rho",
    "edm.Denoiser": "net sigma_data",
    "edm.edm_loss": "denoiser y cond * P_mean P_std generator",
    "sampler.heun_sample": SAMPLER,
    "sampler.euler_sample": SAMPLER,
    "sampler.dpmpp_2m_sample": "denoise latents cond * sigmas num_steps sigma_min sigma_max rho dtype callback",
    "fewstep.fewstep_sample": "denoise latents cond * sigmas randn_like dtype callback",
    "fewstep.distillation_loss": "student teacher y noise cond * sigma lower num_steps rho sigma_min teacher_cond",
    "fewstep.copying": "teacher levels teacher_steps",
    "fewstep.distill": "store run teacher levels teacher_steps config",
    "fewstep.consistency_loss": "student y sigma noise cond * ratio",
    "sampler.euler_ancestral_sample": STOCHASTIC,
    "sampler.dpmpp_3m_sde_sample": STOCHASTIC,
    "generate.Piano.from_pretrained": "name_or_path device",
    "generate.Piano.generate": "seconds * seed prompt sampler num_steps guidance guidance_interval callback",
    "generate.Piano.stream": "seconds * seed prompt sampler num_steps guidance guidance_interval callback",
    "generate.Piano.spectrogram": "seconds * seed prompt sampler num_steps guidance guidance_interval callback",
    "generate.Piano.spectrograms": "seconds seeds * sampler num_steps guidance guidance_interval callback",
    "generate.Piano.save_pretrained": "folder",
    "show.player": "wave sample_rate * title",
    "show.slider": "frames cfg * label",
    "show.studio": "piano",
}
DEFAULTS = {
    "sde.VPSDE": {"beta_min": 0.1, "beta_max": 20.0},
    "sde.euler_maruyama_sample": {"noise": 1.0, "num_steps": 1000},
    "audio.SpectrogramConfig": {"sample_rate": 8000, "n_fft": 512, "hop_length": 128, "n_frames": 128, "top_db": 80.0},
    "audio.griffin_lim": {"n_iter": 32, "momentum": 0.99},
    "edm.karras_sigmas": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
    "edm.Denoiser": {"sigma_data": 0.5},
    "sampler.heun_sample": {"num_steps": 40, "S_churn": 0.0, "S_max": float("inf"), "S_noise": 1.0},
    "generate.Piano.from_pretrained": {"name_or_path": "nano", "device": None},
    "generate.Piano.generate": {"sampler": None, "num_steps": None,  # the model's own
                                "guidance": None, "guidance_interval": None, "prompt": None, "seed": None},
    "generate.Piano.stream": {"seconds": None},
}
COMMANDS = {
    "generate": "--seconds --seed --out --image --model --steps --sampler --guidance --guidance-interval --device "
                "--play --force",
    "continue": "--seconds --out --play",
    "prepare": "--preset",
    "train": "--preset --init",
    "distill": "--teacher --levels --teacher-steps",
    "evaluate": "--out --pieces --training --transpose --embeddings --seed",
    "info": "",
}


def run(*command: object, cwd: Path = ROOT) -> str:
    """What the command printed; the test fails with it if the command does."""
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The notebooks and the version alone, where nbdev may write."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "pianodiff").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(PACKAGE / name, tmp_path / "pianodiff")
    for chapter in CHAPTERS:
        shutil.copy(chapter, tmp_path / "nbs")
    return tmp_path


def test_every_module_has_a_notebook():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_modidx"}
    exported = set(re.findall(r"#\| default_exp (\w+)", "".join(path.read_text() for path in CHAPTERS)))
    assert modules == exported == set(MAY_IMPORT)


@pytest.mark.apart
@pytest.mark.parametrize("chapter", [
    pytest.param(path, marks=[] if "#| export" in path.read_text() else pytest.mark.long) for path in CHAPTERS
], ids=lambda path: path.stem)
def test_chapter_runs(chapter: Path, tmp_path: Path):
    """nbdev_test says "Success." only when it ran a notebook; on a path that matches none it exits 0 all the same."""
    assert "Success." in ran(chapter, ROOT, tmp_path / "told")


def test_a_failing_chapter_would_be_seen(copy: Path, tmp_path: Path):
    cell = nbformat.v4.new_code_cell("assert 1 + 1 == 3")
    broken = copy / "nbs" / "99_broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), broken)
    with pytest.raises(AssertionError, match="exited 1"):
        ran(broken, copy, tmp_path / "told")


def test_export_is_fresh(copy: Path):
    run(BIN / "nbdev_export", cwd=copy)
    fresh = {path.name: path.read_text() for path in (copy / "pianodiff").glob("*.py")}
    here = {path.name: path.read_text() for path in PACKAGE.glob("*.py")}
    assert sorted(here) == sorted(fresh)
    assert [name for name in here if here[name] != fresh[name]] == [], "run nbdev_export"


def test_modules_import_each_other_relatively():
    """nbdev leaves an import that is wrapped over lines as it is."""
    texts = {path.name: path.read_text() for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    assert [name for name, text in texts.items() if re.search(r"^(from|import) pianodiff\b", text, re.M)] == []


def test_notebooks_are_clean(copy: Path):
    run(BIN / "nbdev_clean", cwd=copy)
    changed = [path.name for path in CHAPTERS if path.read_bytes() != (copy / "nbs" / path.name).read_bytes()]
    assert changed == [], "run nbdev_clean"


def test_outputs_are_as_new_as_the_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    assert importlib.import_module("execute").stale() == [], "run make chapters"


WITH_EXERCISES = [path for path in CHAPTERS
                  if path.stem[:2] in {*map("{:02}".format, range(1, 20)), "22", "23", "28", "29"}]


@pytest.mark.parametrize("chapter", WITH_EXERCISES, ids=lambda path: path.stem)
def test_a_chapter_ends_with_what_was_learnt_and_exercises(chapter: Path):
    text = prose(chapter)
    assert re.findall(r"^## .+$", text, re.M)[-2:] == ["## What was learnt", "## Exercises"]
    _, exercises = text.split("## Exercises")
    assert len(re.findall(r"^\d\. ", exercises, re.M)) >= 3
    assert exercises.rstrip().endswith("[](24_solutions.ipynb).")


def lines_of_code(source: str) -> int:
    """Of a cell: without docstrings, imports, comments, blank lines, and the lists of fields of classes."""
    left = {number for number, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    source = "\n".join("pass" if line.startswith(("!", "%")) else line for line in source.splitlines())
    for node in ast.walk(ast.parse(source)):
        body = node.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) else []
        text = [item for item in body[:1] if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)]
        fields = [item for item in body if isinstance(item, ast.AnnAssign) and isinstance(node, ast.ClassDef)]
        imports = [node] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for item in text + fields + imports:
            left -= set(range(item.lineno, (item.end_lineno or item.lineno) + 1))
    return len(left)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_cell_can_be_taken_in_at_a_glance(chapter: Path):
    """Ten lines of code or fewer, forty where it is exported. And all figures have one look."""
    code = [cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "code"]
    for source in code:
        most = 40 if "#| export" in source else 10
        assert lines_of_code(source) <= most, f"{lines_of_code(source)} lines\n{source}"
    if "matplotlib.pyplot" in "".join(code):
        assert 'plt.style.use("pianodiff.book")' in "\n".join(code)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_code_fits_on_a_wide_screen(chapter: Path, monkeypatch: pytest.MonkeyPatch):
    """At 1440 px the book shows 98 columns. Imports, which it folds, don't count."""
    monkeypatch.syspath_prepend(ROOT / "book")
    only_imports = importlib.import_module("pianodiff_book").only_imports
    code = [cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "code"]
    lines = [line for source in code if not only_imports(source) for line in source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


def test_lines_of_code_leave_out_what_is_no_code():
    source = '''#| export
import math


class Point:
    """Two numbers.

    More.
    """

    x: float  # the first
    y: float = 0.0

    def size(self) -> float:
        """Its distance from 0."""
        # Pythagoras
        return math.hypot(self.x,
                          self.y)
'''
    assert lines_of_code(source) == 4


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_heading_is_followed_by_words(chapter: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports, which the book folds, don't count."""
    monkeypatch.syspath_prepend(ROOT / "book")
    only_imports = importlib.import_module("pianodiff_book").only_imports
    cells = [cell for cell in nbformat.read(chapter, as_version=4).cells
             if cell.cell_type == "markdown" or not only_imports(cell.source)]
    bare = [cell.source for cell, after in pairwise(cells) if cell.cell_type == "markdown"
            and after.cell_type == "code" and re.match(r"#+ ", cell.source.strip().splitlines()[-1])]
    assert bare == []


def test_every_exercise_has_its_solution():
    solved = prose(ROOT / "nbs" / "24_solutions.ipynb")
    for chapter in WITH_EXERCISES:
        asked = len(re.findall(r"^\d\. ", prose(chapter).split("## Exercises")[1], re.M))
        _, found, rest = solved.partition(f"({chapter.name})")
        assert found and len(re.findall(r"^### ", re.split(r"^## ", rest, flags=re.M)[0], re.M)) == asked, chapter.name


def test_ruff_passes():
    run(BIN / "ruff", "check", ".")


@pytest.mark.long    # most of a minute where nothing is cached yet
@pytest.mark.apart
def test_mypy_passes():
    run(BIN / "mypy")


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_up_the_table(module: str):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "pianodiff"):
            path = [part for part in (node.module or "").split(".") if part and part != "pianodiff"]
            imported |= {path[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pianodiff.")}
    assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[module]


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name: str):
    parameters = {key: value for key, value in inspect.signature(resolve(name)).parameters.items() if key != "self"}
    positional, _, keyword = (part.split() for part in CONTRACT[name].partition("*"))
    kinds = {key: value.kind for key, value in parameters.items()}
    assert [key for key, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional
    assert set(keyword) <= {key for key, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
    defaults = DEFAULTS.get(name, {})
    assert {key: parameters[key].default for key in defaults} == defaults
    assert inspect.getdoc(resolve(name)), f"{name} has no docstring"


def test_samplers_differ_in_nothing_but_the_method():
    for kind in (SAMPLER, STOCHASTIC):
        names = [name for name in CONTRACT if CONTRACT[name] == kind]
        assert len(names) == 2 and len({str(inspect.signature(resolve(name))) for name in names}) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_their_options(command: str):
    printed = run(BIN / "pianodiff", command, "--help")
    assert [option for option in COMMANDS[command].split() if option not in printed] == []


def test_no_file_knows_this_machine():
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    places = "|".join(re.escape(f"{place}/") for place in (ROOT, Path.home()))
    path = re.compile(rf"(?<![\w.])(?:{places}|/(?:home|Users|root|work|tmp)/[\w.])".encode())
    texts = {name: (ROOT / name).read_bytes() for name in listed if (ROOT / name).is_file()}
    assert [name for name, text in texts.items() if b"\0" not in text and path.search(text)] == []


def test_constraints_name_no_place():
    """Exact versions that any index can serve: no link, no path, no local build."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", pin)] == []
    assert "torch==2.13.0" in pins


def test_one_worker_takes_a_file(request: pytest.FixtureRequest):
    """pytest-xdist says nothing where it misses the groups, as it does with a pytest that is too new for it."""
    assert request.node.nodeid.endswith("@test_house") or not hasattr(request.config, "workerinput")
