"""What the commands share with their terminal; and that a question for help loads nothing heavy."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pianodiff.terminal import counted, discreet, lasting, own_streams, printed, progress_bar

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


def test_slow_work_is_counted_by_the_second_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", stderr := io.StringIO())
    with progress_bar(total=3, unit=" blocks", initial=0) as bar:
        bar.start_t -= 100
        bar.update(3)
    assert "0.03 blocks/s" in stderr.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(0, "0.0 seconds"), (59.7, "59.7 seconds"), (60, "1.0 minutes"),
                                               (3599, "60.0 minutes"), (3600, "1.0 hours"), (241_200, "67.0 hours")])
def test_times_and_counts_in_words(seconds: float, words: str):
    assert lasting(seconds) == words
    assert [counted(n, "block") for n in (0, 1, 2000)] == ["0 blocks", "1 block", "2,000 blocks"]


def test_only_the_own_pipe_ends_a_command_in_silence(monkeypatch: pytest.MonkeyPatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(OSError, match="the connection to another program broke; run the same again"), printed():
            raise BrokenPipeError
        os.close(reader)
        with pytest.raises(SystemExit) as stop, printed():
            raise BrokenPipeError
        assert stop.value.code == 141


def test_closed_streams_are_taken_and_open_ones_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", None)
    before = os.open(os.devnull, os.O_RDONLY)  # the next number
    os.close(before)
    own_streams()
    assert sys.stderr.write("to nobody") == 9
    sys.stderr.close()
    after = os.open(os.devnull, os.O_RDONLY)
    os.close(after)
    assert after == before


@pytest.mark.parametrize("text", ["ftp://me:open-sesame@host/music", "no https://open-sesame@host/a.zip; check it",
                                  "s3://bucket/a?X-Amz-Credential=open-sesame&X-Amz-Signature=open-sesame",
                                  "https://host/a.zip?year=2018&sig=open-sesame) and 'https://b?access_key=open-sesame'"])
def test_what_gives_access_is_not_told(text):
    told = discreet(text)
    assert "open-sesame" not in told and "***" in told
    assert all(word in told for word in ("host", "check it", "year=2018") if word in text)


def test_addresses_and_other_texts_stay():
    for text in ("https://host:80/a@b.wav?year=2018", "mail me@host", "s3://bucket/key=1/signature.wav", "a/b: c"):
        assert discreet(text) == text
