"""Damaged files, as `python tests/fuzz.py` tries many more: read, handed to the command, and played as MIDI."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform == "win32", reason="fork")]


def tried(count: int, way: str) -> None:
    done = subprocess.run([sys.executable, Path(__file__).with_name("fuzz.py"), str(count), "0", way],
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"{count:,} cases from 0, 0 failed" in done.stdout, done.stdout + done.stderr


def test_damaged_files_are_read_or_refused():
    tried(2000, "files")


def test_the_command_tells_of_damaged_files_in_one_line():
    tried(300, "commands")


def test_damaged_midi_is_played_or_refused(fluidsynth, shared_data):
    tried(200, "midi")
