"""What is published: a wheel that holds all a reader needs, installed where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.long


def run(*command: object, cwd: Path) -> str:
    """What the command printed, which knows nothing of the checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def sources() -> list[str]:
    """The files that the repository has, or will have."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, since what an earlier build left behind would go into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in sources():
        if name.startswith("pianodiff/") or "/" not in name:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder,
        folder / "source", cwd=folder)
    [built] = folder.glob("*.whl")
    return built


def test_a_wheel_holds_the_whole_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    package = {name for name in sources() if name.startswith("pianodiff/")}
    assert package - held == set()
    assert "pianodiff/py.typed" in held and any(name.endswith(".safetensors") for name in held)
    assert {name for name in held if ".dist-info/" not in name} == package
    assert wheel.stat().st_size < 100_000_000


def test_an_installed_wheel_makes_music(wheel: Path, tmp_path: Path):
    """In an environment that borrows all packages but this one, whose checkout it doesn't know."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / Path(sys.executable).parent.name / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    where = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (where / "borrowed.pth").write_text(sysconfig.get_path("purelib"))    # whose own .pth files aren't read
    imported = Path(run(python, "-c", "import pianodiff; print(pianodiff.__file__)", cwd=tmp_path).strip())
    assert imported == where / "pianodiff" / "__init__.py"
    told = run(python.parent / "pianodiff", "generate", "--seconds", "1", "--seed", "7", "--out", "piano.wav",
               cwd=tmp_path)
    assert told.startswith("piano.wav: 1 s of new music, seed 7")
    about = soundfile.info(tmp_path / "piano.wav")
    assert (about.samplerate, about.frames) == (8000, 8000)
