"""Players, sliders and the studio: what lies in a page is what was given, and bad input is named (chapter 11)."""

import base64
import io
import re
import shutil
import subprocess
import sys
import threading
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from pianodiff.audio import MP3_RATES, SPECTROGRAMS, to_flac, to_spectrogram
from pianodiff.generate import SAMPLERS, Piano, Sampling
from pianodiff.show import _SAMPLERS, _static, player, slider, studio

CFG = SPECTROGRAMS["nano"]
WAVES = [0.3 * torch.sin(torch.arange(8192.0) * pitch) for pitch in (0.2, 0.5, 1.0)]
FRAMES = [(f"{i} < 3", to_spectrogram(wave, CFG) if i else None, wave) for i, wave in enumerate(WAVES)]


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "pianodiff" / "static").glob("*.js"))
STYLES = [*sorted((ROOT / "pianodiff" / "static").glob("*.css")), ROOT / "book" / "_static" / "book.css"]


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


def sounds(page: str, kind: str = "flac") -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(f'data:audio/{kind};base64,([^"]+)"', page)]


def picture(page: str, at: int = 0) -> np.ndarray:
    """The brightness `[rows, columns]` of a page's picture, low frequencies first."""
    data = re.findall('data:image/webp;base64,([^"]+)"', page)[at]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float)[::-1]


def ticks(page: str) -> tuple[dict[str, float], dict[str, float]]:
    """The labels of the frequency and of the time axis, with their places in percent."""
    found = re.findall(r'<i style="(bottom|left):([\d.]+)%">(.*?)</i>', page)
    axes = [{text: float(place) for side, place, text in found if side == name} for name in ("bottom", "left")]
    return axes[0], axes[1]


# ---- the player

@pytest.mark.parametrize("wave", [WAVES[0], WAVES[0].double().numpy(), list(WAVES[0])])
def test_a_player_holds_the_wave_at_its_own_level(wave):
    sound, = sounds(player(wave, lossless=True)._repr_html_())
    found, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
    assert rate == 8000
    torch.testing.assert_close(torch.from_numpy(found), torch.as_tensor(wave).float(), atol=2**-15, rtol=0)


@pytest.mark.parametrize("rate", [*MP3_RATES, 10_000, 96_000])
def test_a_player_is_an_mp3_where_there_is_such_a_rate(rate):
    wave = WAVES[0] * torch.linspace(0, 1, len(WAVES[0]))
    page = player(wave, rate).data
    sound, = sounds(page, "mpeg" if rate in MP3_RATES else "flac")
    found, heard = soundfile.read(io.BytesIO(sound), dtype="float32")
    assert heard == rate and len(found) == len(wave)
    assert (torch.from_numpy(found) - wave).std() < 0.1 * wave.std()    # at its level, and in its place


@pytest.mark.parametrize("rate, seconds", [(8000, 2.048), (44_100, 1.0), (22_050, 0.3), (8000, 0.0125)])
def test_the_picture_shows_where_the_sound_is(rate, seconds):
    """A tone at an eighth of the rate, in the second half alone: a quarter up, on the right half; at any rate."""
    wave = 0.5 * torch.sin(torch.arange(round(rate * seconds)) * torch.pi / 4)
    wave[: len(wave) // 2] = 0
    rows = picture(player(wave, rate).data)
    assert abs((rows.mean(1).argmax() + 0.5) / len(rows) - 0.25) < 0.02
    if seconds > 0.2:
        columns = rows[len(rows) // 4 - 4 : len(rows) // 4 + 4].max(0)
        assert columns[: int(0.4 * len(columns))].max() < 60 < 100 < columns[int(0.6 * len(columns)) :].min()


def test_ten_minutes_have_a_small_picture_in_which_a_short_sound_is_seen():
    wave = torch.zeros(10 * 60 * 8000)
    wave[2_400_000:2_401_000] = 0.5 * torch.sin(torch.arange(1000.0))  # an eighth of a second in the middle
    page = player(wave).data
    columns = picture(page).max(0)
    assert len(columns) == 1000 and columns[499:502].max() > 100 and np.delete(columns, range(496, 505)).max() < 20
    assert list(ticks(page)[1]) == ["0", "100", "200", "300", "400", "500", "600 s"]


def test_a_player_is_small():
    wave = torch.randn(20 * 8000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)  # the hardest to squeeze
    page = player(0.3 * wave).data
    around = len(_static("player.css") + _static("player.js"))
    assert around < 4096 and len(re.findall("image/webp;base64,([^\"]+)", page)[0]) * 3 / 4 < 30_000
    assert len(page) - around - sum(map(len, re.findall('base64,([^"]+)', page))) < 1500
    assert len(sounds(page, "mpeg")[0]) < 20 * 5000    # 40 kbit/s, for noise


@pytest.mark.parametrize("samples, rate, frequencies, times", [
    (16_384, 8000, {"0": 0, "1": 25, "2": 50, "3": 75, "4 kHz": 100}, {"0": 0, "0.5": 24.41, "2 s": 97.66}),
    (160_000, 8000, {"2": 50}, {"0": 0, "5": 25, "20 s": 100}),
    (44_100, 44_100, {"0": 0, "5": 22.68, "20 kHz": 90.7}, {"0.2": 20, "1 s": 100}),
])
def test_the_axes_are_in_seconds_and_kilohertz(samples, rate, frequencies, times):
    for found, expected in zip(ticks(player(torch.zeros(samples), rate).data), (frequencies, times), strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.01)
        assert len(found) <= 7


def test_silence_is_dark_and_plays():
    page = player(torch.zeros(8000)).data
    assert picture(page).max() < 5 and len(sounds(page, "mpeg")) == 1


def test_without_scripts_there_are_a_picture_and_the_browsers_own_controls():
    page = Page(player(WAVES[0], title="a < b").data)
    audio, = page.all("audio")
    assert "controls" in audio and audio["src"].startswith("data:audio/mpeg;base64,")
    assert audio["aria-label"] == "a < b" and ("figcaption", "a < b") in page.texts
    assert page.all("img")[0]["alt"] == "spectrogram: a < b"
    assert page.all("piano-head") == [{"seconds": "1.024"}]  # the rest is the script's, which makes it a slider
    assert all(span["aria-hidden"] == "true" for span in page.all("span"))


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(0), r"a wave \[T\] with T > 0 is needed, not one of shape \[0\]"),
    (torch.zeros(2, 100), r"not one of shape \[2, 100\]"),
    (torch.tensor([0.0, torch.nan]), "NaN or infinite"),
])
def test_no_player_for_what_is_no_wave(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        player(bad)
    assert "\n" not in str(error.value)


# ---- the slider

def test_a_slider_holds_all_frames_in_order():
    data = slider(FRAMES, CFG, label="a & b", lossless=True).data
    page = Page(data)
    control, = page.all("input")
    assert (control["type"], control["min"], control["max"], control["value"]) == ("range", "0", "2", "0")
    assert ("label", "a & b") in page.texts
    assert [text for tag, text in page.texts if tag == "figcaption"] == ["0 < 3", "1 < 3", "2 < 3"]
    assert [image["alt"] for image in page.all("img")] == [f"spectrogram: {i} < 3" for i in range(3)]
    for wave, sound in zip(WAVES, sounds(data), strict=True):
        found, _ = soundfile.read(io.BytesIO(sound), dtype="float32")
        torch.testing.assert_close(torch.from_numpy(found), wave, atol=2**-15, rtol=0)
    files = ["player.css", "slider.css", "player.js", "slider.js"]
    assert [data.count(_static(name)) for name in files] == [1, 1, 1, 1]
    assert len(sounds(slider(FRAMES, CFG, label="x").data, "mpeg")) == 3


def test_a_slider_shows_the_spectrogram_that_is_given_or_the_waves_own():
    dark, own = torch.zeros(256, 64), [("own", None, WAVES[1])]
    page = slider([("given", dark, WAVES[1]), *own], CFG, label="x").data
    assert picture(page).max() < 5
    loudest = picture(page, 1).mean(1).argmax()
    assert abs(loudest - 0.5 / (2 * np.pi) * 512) <= 1  # 0.5 radians a sample


def test_pages_ask_nobody():
    for page in (player(WAVES[0]).data, slider(FRAMES, CFG, label="a").data):
        assert re.search(r"https?:|\ssrc=\"(?!data:)", page) is None


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


# ---- the studio

class Tones:
    """A piano that plays the seed, in hertz; it waits at `gate` in its second step."""

    cfg = CFG
    sampling = Sampling("euler", 7, guidance=1.5)

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.gate = threading.Event()
        self.gate.set()

    def generate(self, seconds, *, callback, **settings):
        self.calls.append({"seconds": seconds, **settings})
        if settings["seed"] == 13:
            raise ValueError("no 13\nnor anything like it")
        for step in range(settings["num_steps"]):
            callback(SimpleNamespace(block=0, num_blocks=1, step=step + 1, num_steps=settings["num_steps"]))
            assert self.gate.wait(3600)
        return 0.5 * torch.sin(torch.arange(round(8000 * seconds)) * (2 * torch.pi * settings["seed"] / 8000))


def play(room) -> None:
    room.button.click()
    room.thread.join(3600)
    assert not room.thread.is_alive() and room.button.description == "Generate"


def upload(room, name: str, data: bytes) -> None:
    room.prompt.value = ({"name": name, "type": "", "size": len(data), "content": memoryview(data),
                          "last_modified": datetime.now()},)


def heard(room) -> torch.Tensor:
    page = room.output.outputs[0]["data"]["text/html"]
    near, exact = (torch.from_numpy(soundfile.read(io.BytesIO(sounds(page, kind)[0]), dtype="float32")[0])
                   for kind in ("mpeg", "flac"))    # the player's and the link's
    assert len(near) == len(exact) and (near - exact).std() < 0.3 * exact.std()
    return exact


def test_the_studio_plays_what_is_asked_for():
    room = studio(Tones())
    play(room)
    assert room.piano.calls == [{"seconds": 8.0, "seed": 7, "prompt": None, "sampler": "euler", "num_steps": 7,
                                 "guidance": 1.5}]
    room.seconds.value, room.seed.value = 2, 440
    room.sampler.value, room.steps.value, room.guidance.value = "heun", 5, 2
    play(room)
    assert room.piano.calls[1] == {"seconds": 2.0, "seed": 440, "prompt": None, "sampler": "heun", "num_steps": 5,
                                   "guidance": 2.0}
    assert room.progress.value == 1 and room.status.value == "" and len(heard(room)) == 16_000
    page = Page(room.output.outputs[0]["data"]["text/html"])
    assert page.all("a")[0]["download"] == "piano-440.flac" and ("figcaption", "seed 440") in page.texts


def test_the_studio_goes_on_from_an_upload_until_it_is_forgotten():
    room = studio(Tones())
    upload(room, "a.flac", to_flac(WAVES[0]))
    room.seconds.value = 1
    play(room)
    torch.testing.assert_close(room.piano.calls[0]["prompt"], WAVES[0], atol=2**-15, rtol=0)
    assert len(heard(room)) == len(WAVES[0]) + 8000
    torch.testing.assert_close(heard(room)[: len(WAVES[0])], WAVES[0], atol=2**-14, rtol=0)
    room.forget.click()
    play(room)
    assert room.piano.calls[1]["prompt"] is None and len(heard(room)) == 8000


def test_the_studio_tells_an_error_in_one_line_and_works_again():
    room = studio(Tones())
    room.seed.value = 13
    play(room)
    assert room.status.value == "no 13" and room.output.outputs == ()
    upload(room, "a.txt", b"words")
    play(room)
    assert "can't be read as sound" in room.status.value and "\n" not in room.status.value
    room.forget.click()
    room.seed.value = 14
    play(room)
    assert room.status.value == "" and room.output.outputs


def test_the_studio_stops_when_it_is_told_to():
    room = studio(Tones())
    play(room)
    room.piano.gate.clear()
    room.button.click()
    while not room.progress.value:  # it waits in its first step
        assert room.thread.is_alive()
    assert room.button.description == "Stop"
    room.button.click()
    room.piano.gate.set()
    room.thread.join(3600)
    assert (room.status.value, room.button.description) == ("stopped", "Generate") and room.progress.value < 1
    play(room)
    assert room.status.value == "" and room.progress.value == 1


def test_the_studio_plays_the_shipped_model():
    room = studio(Piano.from_pretrained("nano"))
    room.seconds.value, room.steps.value = 2, 2
    play(room)
    assert room.status.value == "" and room.progress.value == 1
    expected = room.piano.generate(2, seed=7, num_steps=2)
    torch.testing.assert_close(heard(room), expected.clamp(-1, 1), atol=2**-14, rtol=0)


def test_the_studio_offers_the_samplers_there_are():
    assert set(_SAMPLERS) == set(SAMPLERS) and len(_SAMPLERS) == len(SAMPLERS)


def test_where_no_widget_is_shown_the_studio_says_how_to_get_one():
    bundle = studio(Tones())._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert re.search("needs a running kernel.*Jupyter.*Colab", bundle["text/html"], re.S)


def test_importing_show_is_cheap():
    """What only a notebook needs is imported where it is needed."""
    code = "import sys, pianodiff.show; print({'matplotlib', 'ipywidgets', 'IPython', 'PIL'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the files that a page needs

def lint(*files: Path) -> subprocess.CompletedProcess:
    program = shutil.which("oxlint", path=str(Path(sys.executable).parent))
    assert program, "oxlint is missing: pip install -e '.[dev]'"
    rules = "-D correctness -D suspicious -A unicorn/prefer-add-event-listener --deny-warnings"
    return subprocess.run([program, *rules.split(), *files], capture_output=True, text=True)


def test_scripts_pass_the_linter(tmp_path):
    assert len(SCRIPTS) == 2
    done = lint(*SCRIPTS)
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.js").write_text(SCRIPTS[0].read_text().replace("const box", "const unused"))
    assert lint(tmp_path / "bad.js").returncode != 0


@pytest.mark.parametrize("path", [*SCRIPTS, *STYLES], ids=lambda path: path.name)
def test_lines_are_short(path):
    assert max(map(len, path.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", [path.name for path in [*SCRIPTS, *STYLES[:-1]]])
def test_a_page_gets_a_file_without_its_comments(name):
    element = _static(name)
    assert not re.search(r"^\s*//|/\*|^\s+\S", element, re.M) and len(element) > 500
    source = (ROOT / "pianodiff" / "static" / name).read_text()
    words = re.findall(r"[\w-]+", re.sub(r"^\s*//.*|/\*.*?\*/", "", source, flags=re.M))
    assert re.findall(r"[\w-]+", element)[1:-1] == words


# ---- in a browser

@pytest.fixture(scope="module")
def browser():
    sync_api, program = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not program:
        pytest.skip("needs the browser chromium")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        opened = playwright.chromium.launch(executable_path=program, args=options, timeout=0)
        yield opened
        opened.close()


def unknown(page, text: str) -> list[str]:
    """The selectors and declarations of a style sheet that a browser drops; those for another one are left out."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    rules = [(selector.strip(), body) for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", text)]    # innermost
    selectors = [selector for selector, _ in rules if "-moz-" not in selector]
    lines = [line.replace("!important", "").strip() for _, body in rules for line in re.split(r";\s", f"{body} ")]
    return page.evaluate("""([selectors, lines]) => [...selectors.filter(it => {
        try { document.querySelector(it) } catch { return true }
    }), ...lines.filter(it => !CSS.supports(`(${it})`))]""", [selectors, [line for line in lines if line]])


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.name)
def test_a_browser_knows_every_style(path, browser):
    page = browser.new_page()
    assert unknown(page, path.read_text()) == []
    assert unknown(page, ".a { colour: red } .b:hoover { color: red }") == [".b:hoover", "colour: red"]
    page.close()


def test_the_axes_of_an_untitled_player_are_seen_and_a_thumb_is_large(browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    made = player(WAVES[0]).data + slider(FRAMES, CFG, label="x").data
    page.set_content(f"<div style='overflow: hidden'>{made}</div>")
    top = page.locator(".piano").first.locator("i").nth(4)
    assert top.inner_text() == "4 kHz" and top.bounding_box()["y"] >= page.locator("div").first.bounding_box()["y"]
    assert page.locator("input").bounding_box()["height"] >= 44
    page.close()


DRIVE = """async () => {
  const sounds = [...document.querySelectorAll("audio")], log = [], wait = ms => new Promise(go => setTimeout(go, ms));
  const [first, again] = document.querySelectorAll("piano-head"), note = (...texts) => log.push(texts.join(" "));
  const place = head => parseFloat(head.style.getPropertyValue("--at")), at = head => place(head).toFixed(0);
  const press = (head, key) => head.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const until = async done => { for (let i = 0; i < 30000 && !done(); i++) await wait(20) };
  const input = document.querySelector("input"), figures = [...document.querySelectorAll(".piano-slider figure")];
  const move = value => { input.value = value; input.dispatchEvent(new Event("input")) };
  const shown = () => figures.map(figure => figure.hidden ? "-" : "x").join("");
  await until(() => sounds.every(sound => sound.duration));
  note(sounds.map(sound => sound.duration));
  note(first.getAttribute("role"), first.tabIndex, first.getAttribute("aria-label"), first.ariaValueMax);
  const box = first.getBoundingClientRect();
  first.dispatchEvent(new MouseEvent("click", {clientX: box.left + box.width / 4}));
  await until(() => place(first) > 0);
  note("click", at(first), first.ariaValueText, "again", at(again));
  for (const key of ["ArrowRight", "ArrowUp", "ArrowLeft", "End", "Home", "x"]) {
    const before = place(first), taken = !press(first, key);
    if (taken) await until(() => place(first) !== before);
    note(key, taken, at(first));
  }
  for (const sound of sounds) sound.loop = true;  // none ends while a busy machine looks
  press(first, " ");
  await until(() => place(first) > 5 && sounds[0].currentTime > 0.05);
  note("plays", !sounds[0].paused, sounds[0].currentTime > 0.05, place(first) > 5);
  press(again, " ");
  await until(() => sounds[0].paused);
  note("alone", sounds[0].paused && !sounds[0].ended, !sounds[1].paused);
  press(again, " ");
  note("paused", sounds[1].paused);
  note(shown(), input.ariaValueText);
  sounds[2].currentTime = 0.5;
  move(2);
  note(shown(), input.ariaValueText, sounds[4].currentTime);
  sounds[4].play().catch(() => {});
  move(1);
  note(shown(), sounds[4].paused, !sounds[3].paused, sounds[3].currentTime);
  note(Object.keys(window).filter(name => /piano|slider$|seek$/.test(name)).length);
  return log;
}"""


def test_in_a_browser(browser, tmp_path):
    """The same output twice, then a slider: they seek, play alone, keep the place; no name is left in the page."""
    twice = player(WAVES[0], lossless=True).data
    made = slider(FRAMES, CFG, label="one", lossless=True).data
    (tmp_path / "page.html").write_text("<!doctype html><meta charset='utf-8'>" + twice + twice + made)
    page, said = browser.new_page(), []
    page.set_default_timeout(0)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    log = page.evaluate(DRIVE)
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto((tmp_path / "page.html").as_uri())
    controls = [each.locator("label").is_visible() for each in (page, plain)]
    figures = plain.locator(".piano-slider figure:visible").count()
    assert said == []
    assert log == [
        "1.024,1.024,1.024,1.024,1.024",
        "slider 0 place in the sound 1.0",
        "click 25 0.3 of 1.0 seconds again 0",
        "ArrowRight true 30", "ArrowUp true 35", "ArrowLeft true 30", "End true 100", "Home true 0", "x false 0",
        "plays true true true", "alone true true", "paused true",
        "x-- 0 < 3", "--x 2 < 3 0.5", "-x- true true 0.5", "0"]
    assert controls == [True, False] and figures == 3  # without scripts all players, and no control that does nothing
