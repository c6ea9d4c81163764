"""Pictures, players and sliders: what lies in a page is what was given, and bad input is named (chapter 11)."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import soundfile
import torch
from PIL import Image

from pianodiff.audio import SPECTROGRAMS, to_spectrogram
from pianodiff.show import player, slider

CFG = SPECTROGRAMS["nano"]
WAVES = [0.3 * torch.sin(torch.arange(8192.0) * pitch) for pitch in (0.2, 0.5, 1.0)]
FRAMES = [(f"{i} < 3", to_spectrogram(wave, CFG) if i else None, wave) for i, wave in enumerate(WAVES)]


class Page(HTMLParser):
    """Tags with their attributes, and the text by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.tags[-1][0], data.strip()))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def sounds(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall('data:audio/flac;base64,([^"]+)"', page)]


def test_a_player_holds_the_wave_at_its_own_level():
    sound, = sounds(player(WAVES[0])._repr_html_())
    found, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
    assert rate == 8000
    torch.testing.assert_close(torch.from_numpy(found), WAVES[0], atol=2**-15, rtol=0)


def test_flac_frames_are_short():
    """Chromium can't find a place in short sounds of libFLAC's usual 4096 samples a frame: it gives up playing."""
    sound, = sounds(player(torch.zeros(40_000))._repr_html_())
    assert sound[:4] == b"fLaC" and int.from_bytes(sound[10:12]) <= 1152  # STREAMINFO's largest block


def test_a_slider_holds_all_frames_in_order():
    page = Page(slider(FRAMES, CFG, label="a & b").data)
    control, = page.all("input")
    assert (control["type"], control["min"], control["max"], control["value"]) == ("range", "0", "2", "0")
    assert ("label", "a & b") in page.texts
    assert [text for tag, text in page.texts if tag == "figcaption"] == ["0 < 3", "1 < 3", "2 < 3"]
    assert [image["alt"] for image in page.all("img")] == ["spectrogram: a & b 1 < 3", "spectrogram: a & b 2 < 3"]
    for wave, sound in zip(WAVES, sounds(slider(FRAMES, CFG, label="a & b").data), strict=True):
        found, _ = soundfile.read(io.BytesIO(sound), dtype="float32")
        torch.testing.assert_close(torch.from_numpy(found), wave, atol=2**-15, rtol=0)


def test_pictures_differ_and_are_wide():
    first, second = (image["src"].removeprefix("data:image/webp;base64,")
                     for image in Page(slider(FRAMES, CFG, label="pitch", height=3).data).all("img"))
    assert first != second and Image.open(io.BytesIO(base64.b64decode(first))).size == (810, 405)


def test_a_slider_asks_nobody_and_has_a_key_of_its_own():
    pages = [slider(frames, CFG, label=label).data for frames, label in
             ((FRAMES, "a"), (FRAMES, "a"), (FRAMES, "b"), (FRAMES[:2], "a"))]
    keys = [re.findall(r'data-slider="(\w+)"', page) for page in pages]
    assert all(len(found) == 2 and len(set(found)) == 1 for found in keys)  # the element, and the script's search
    assert keys[0] == keys[1] and len({found[0] for found in keys}) == 3
    assert all(re.search(r"https?:|\ssrc=\"(?!data:)", page) is None for page in pages)


@pytest.mark.parametrize("frames, message", [
    ([], "at least one frame"),
    ([("stereo", None, torch.zeros(2, 9))], "frame 'stereo': a wave"),
    ([("empty", None, torch.zeros(0))], "frame 'empty': a wave"),
    ([FRAMES[0], ("nan", None, torch.tensor([0.0, torch.nan]))], "frame 'nan': the wave holds NaN"),
    ([("nan", torch.full((256, 4), torch.nan), WAVES[0])], "frame 'nan': the spectrogram holds NaN"),
    ([("rows", torch.zeros(128, 4), WAVES[0])], r"frame 'rows': a spectrogram \[256, frames\]"),
])
def test_bad_frames_are_named(frames, message):
    with pytest.raises(ValueError, match=message) as error:
        slider(frames, CFG, label="x")
    assert "\n" not in str(error.value)


DRIVE = """<script>
const [first, second] = document.querySelectorAll("[data-slider]"), input = first.querySelector("input");
const sounds = [...first.querySelectorAll("audio")], log = [];
const move = value => { input.value = value; input.dispatchEvent(new Event("input")) };
const note = () => log.push([input.ariaValueText, ...[...first.querySelectorAll("figure")].map((figure, i) =>
  `${figure.style.display || "shown"} ${sounds[i].paused ? "still" : "plays"} ${sounds[i].currentTime}`)].join(", "));
note(); sounds[0].currentTime = 0.5; move(2); note();
sounds[2].play().catch(() => {}); move(1); note();
log.push([...second.querySelectorAll("figure")].map(figure => figure.style.display || "shown").join(", "));
document.title = log.join("; ");
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_a_browser_changes_picture_and_sound_and_keeps_the_place(tmp_path):
    pages = [slider(FRAMES, CFG, label="one").data, slider(FRAMES[:2], CFG, label="two").data]
    (tmp_path / "page.html").write_text("<!doctype html><meta charset='utf-8'>" + "".join(pages) + DRIVE)
    options = ["headless", "no-sandbox", "disable-gpu", f"user-data-dir={tmp_path}/user", "dump-dom",
               "autoplay-policy=no-user-gesture-required"]
    done = subprocess.run(["chromium", *(f"--{option}" for option in options), tmp_path / "page.html"],
                          capture_output=True, text=True, timeout=120)
    title, = [text for tag, text in Page(done.stdout).texts if tag == "title"]
    assert title.split("; ") == [
        "0 < 3, shown still 0, none still 0, none still 0",
        "2 < 3, none still 0.5, none still 0, shown still 0.5",
        "1 < 3, none still 0.5, shown plays 0.5, none still 0.5",
        "shown, none"]
