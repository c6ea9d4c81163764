"""What the commands share with their terminal; and that a question for help loads nothing heavy."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from pianodiff.terminal import progress_bar

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("code", ["import pianodiff", "import pianodiff.terminal",
                                  "import pianodiff.cli; assert pianodiff.cli.main(['--version']) == 0"])
def test_what_is_asked_first_loads_no_torch(code: str):
    heavy = "import sys; assert not {'torch', 'librosa', 'matplotlib', 'zarr'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "interval"), [(Screen(), 0.1), (io.StringIO(), 10)])
def test_a_log_gets_few_bars(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, interval: float):
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar(total=3) as bar:
        assert bar.mininterval == interval
        bar.update(3)
    assert "3/3" in stderr.getvalue()
