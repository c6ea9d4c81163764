"""Two thousand damaged files, as `python tests/fuzz.py` tries many more."""

import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_damaged_files_are_read_or_refused():
    import subprocess

    done = subprocess.run([sys.executable, Path(__file__).with_name("fuzz.py"), "2000", "0"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "2,000 cases from 0, 0 failed" in done.stdout, done.stdout + done.stderr
