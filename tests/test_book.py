"""The built book in a real browser: each page is silent, whole, readable and audible, and asks no host but its own.

A check is a function that lists the faults of a page; `test_a_check_finds_its_fault` breaks a small page for each.
"""

import base64
import html
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urlsplit

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml
from PIL import Image

from pianodiff.audio import SpectrogramConfig, to_spectrogram
from pianodiff.show import player, plot_spectrogram, slider
from pianodiff.synth import example_performance

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book" / "_build" / "html"
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MEGABYTE = 1_000_000
PATIENCE = 600_000  # in the browser's milliseconds: nothing takes so long, however busy the machine
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WIDE = {"width": 1440, "height": 900}

# What axe calls serious or critical and stays, with the reason.
EXCEPTIONS: dict[str, str] = {}


def contents() -> list[str]:
    """The pages of _toc.yml, in reading order, without their suffix; then Sphinx's own."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    return [*pages, "genindex", "py-modindex", "search"]


@pytest.fixture(scope="module")
def book() -> Path:
    """The built book, built now where it is missing or older than its sources."""
    folders = {"nbs": "*.*", "pianodiff": "*.py", "book": "*.*", ".": "_toc.yml"}
    sources = [path for folder, names in folders.items() for path in (ROOT / folder).glob(names) if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    if not (HTML / "index.html").exists() or (HTML / "index.html").stat().st_mtime < newest:
        command = ["make", "book", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed-dev"]    # which installs
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return HTML


@pytest.fixture(scope="module")
def context(book: Path) -> Iterator["BrowserContext"]:
    """One browser for all tests of this file, the system's Chromium, which may play without a click."""
    if not (program := shutil.which("chromium") or shutil.which("google-chrome")):
        assert not os.environ.get("CI"), "chromium is missing in CI: see .ci/run"
        pytest.skip("chromium is missing: apt-get install chromium")
    sync_api = importlib.import_module("playwright.sync_api")
    options = ["--no-sandbox", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options, timeout=PATIENCE)
        context = browser.new_context(viewport=DESKTOP)
        context.set_default_timeout(PATIENCE)
        yield context
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(book: Path) -> Iterator[str]:
    """The address at which the book is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=book)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@dataclass
class Visit:
    """A page that was opened, and what happened until now."""

    page: "Page"
    said: list[str] = field(default_factory=list)       # on the console, and what failed
    asked: list[str] = field(default_factory=list)      # the addresses of all requests


def visit(context: "BrowserContext", address: str) -> Visit:
    opened = Visit(page := context.new_page())
    page.on("console", lambda note: opened.said.append(f"{note.type}: {note.text}"))
    page.on("pageerror", lambda error: opened.said.append(f"error: {error}"))
    page.on("requestfailed", lambda request: opened.said.append(f"error: {request.url[:200]} failed"))
    page.on("request", lambda request: opened.asked.append(request.url))
    page.goto(address)
    page.evaluate("() => window.MathJax?.startup?.promise")     # the equations are set
    return opened


@pytest.fixture(scope="module", params=contents())
def opened(request: pytest.FixtureRequest, context: "BrowserContext", site: str) -> Iterator[Visit]:
    found = visit(context, f"{site}{request.param}.html")
    yield found
    found.page.close()


# ---- the checks

def noises(opened: Visit) -> list[str]:
    """Errors, warnings and failed requests; what a script merely logs is no fault."""
    return [note for note in opened.said if note.startswith(("error", "warning"))]


def strangers(opened: Visit) -> list[str]:
    """Requests to another host than the page's own."""
    own = urlsplit(opened.page.url)[:2]
    return [url for url in opened.asked if urlsplit(url)[:2] != own and not url.startswith(("data:", "blob:"))]


def directives(opened: Visit) -> list[str]:
    """nbdev's directives where the reader sees them."""
    text = opened.page.evaluate("document.body.textContent")
    names = "default_exp|export|hide|eval|code-fold|echo|output|slow|gpu"
    return re.findall(rf"# ?\| *(?:{names}).*", text)


def endless(opened: Visit) -> list[str]:
    """Sounds with no finite duration."""
    return opened.page.evaluate("""patience => Promise.all([...document.querySelectorAll("audio")].map(async (
            audio, i) => {
        if (!audio.readyState && !audio.error) {
            const known = new Promise(done => audio.onloadedmetadata = audio.onerror = done);
            audio.load();
            await Promise.race([known, new Promise(done => setTimeout(done, patience))]);
        }
        const fault = `sound ${i}: ${audio.error?.message ?? audio.duration}`;
        return audio.duration > 0 && audio.duration < 3600 ? "" : fault;
    })).then(faults => faults.filter(Boolean))""", PATIENCE)


def dead(opened: Visit) -> list[str]:
    """The first player does not play, its play-head does not move, or stopped does not tell its place."""
    return opened.page.evaluate("""async patience => {
        const audio = document.querySelector("audio"), limit = Date.now() + patience;
        if (!audio) return [];
        let box = audio.parentElement;
        while (box.parentElement && !box.matches(".cell_output, figure") && !box.querySelector("[role=slider]"))
            box = box.parentElement;
        const head = box.querySelector("[role=slider]"), begin = [audio.currentTime, head?.style.cssText];
        const still = () => !(audio.currentTime > begin[0] + 0.2) || head?.style.cssText === begin[1];
        await audio.play().catch(() => {});
        while (still() && !audio.paused && !audio.error && Date.now() < limit)    // to its end, if need be
            await new Promise(done => setTimeout(done, 20));
        const faults = [];
        if (!(audio.currentTime > begin[0])) faults.push("the first sound does not play");
        if (head && head.style.cssText === begin[1]) faults.push("the first play-head does not move");
        const paused = audio.paused || new Promise(done => audio.addEventListener("pause", done));
        audio.pause();
        await paused;
        if (head && !(Math.abs(head.getAttribute("aria-valuenow") - audio.currentTime) < 0.2))
            faults.push("the first play-head does not tell its place");
        return faults;
    }""", PATIENCE)


def stuck(opened: Visit) -> list[str]:
    """Sliders that do not change what is seen and heard, or lose the place in the sound."""
    return opened.page.evaluate("""async patience => {
        const faults = [];
        for (const input of document.querySelectorAll("label input[type=range]")) {
            const label = input.closest("label"), slider = label.parentElement, name = label.innerText;
            const seen = () => [...slider.querySelectorAll("figure")].filter(figure => figure.offsetHeight);
            const first = seen(), sound = first[0]?.querySelector("audio");
            for (const audio of slider.querySelectorAll("audio")) audio.loop = true;    // none ends in the meantime
            await sound?.play().catch(() => {});
            input.value = input.max;
            input.dispatchEvent(new Event("input", {bubbles: true}));
            const last = seen(), next = last[0]?.querySelector("audio"), place = next?.currentTime;
            const playsOn = () => sound?.paused && !next?.paused && next?.currentTime !== place;
            for (const limit = Date.now() + patience; next !== sound && !playsOn() && Date.now() < limit;)
                await new Promise(done => setTimeout(done, 20));
            if (first.length != 1 || last.length != 1 || first[0] === last[0]) faults.push(`${name}: the same picture`);
            if (!next || next.currentSrc === sound?.currentSrc) faults.push(`${name}: the same sound`);
            if (!playsOn()) faults.push(`${name}: it does not play on`);
            next?.pause();
            for (const audio of slider.querySelectorAll("audio")) audio.loop = false;
            input.value = 0;
            input.dispatchEvent(new Event("input", {bubbles: true}));
        }
        return faults;
    }""", PATIENCE)


# Ends what fades: colours in the midst of a transition are nobody's, and how far it has come is the machine's matter.
SETTLE = """() => {
    const fades = () => document.getAnimations().filter(it => it.playState == "running" || it.pending);
    for (let all = fades(); all.length; all = fades())     // an end may begin another, as of a colour that is inherited
        for (const it of all) it.effect.getComputedTiming().endTime == Infinity ? it.cancel() : it.finish();
}"""


@cache
def axe_source() -> str:
    package = Path(importlib.import_module("axe_playwright_python").__file__ or "")
    return (package.parent / "axe.min.js").read_text()


def barriers(opened: Visit) -> list[str]:
    """What axe finds serious or critical, in light and dark mode: contrast, names, alternative texts, structure.

    Of what a page repeats by the thousand, tokens of code and glyphs of equations, it sees one of each kind.
    """
    page = opened.page
    page.evaluate("""() => {
        const seen = new Set(), kind = token => token.className + "@" + token.closest("[class*=highlight-]")?.className;
        for (const token of document.querySelectorAll(".highlight pre span"))
            if (seen.has(kind(token))) token.replaceWith(...token.childNodes); else seen.add(kind(token));
        for (const maths of [...document.querySelectorAll("mjx-container")].slice(1)) maths.replaceWith("x");
        document.body.normalize();
    }""")
    page.evaluate(axe_source())
    faults = []
    for theme in ("light", "dark"):
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        page.evaluate(SETTLE)
        found = page.evaluate("""rules => axe.run({preload: false, selectors: false, ...rules}).then(report =>
            report.violations.filter(fault => ["serious", "critical"].includes(fault.impact)).map(fault =>
                [fault.id, fault.nodes.length, fault.nodes[0].html.slice(0, 200), fault.nodes[0].failureSummary]))""",
                              {} if theme == "light" else {"runOnly": ["color-contrast"]})
        faults += [f"{theme}, {rule}: {number} times, as {html}: {why}" for rule, number, html, why in found
                   if rule not in EXCEPTIONS]
    return faults


def wordless(opened: Visit) -> list[str]:
    """Pictures whose alternative text is a file's name, or has places that were to be filled."""
    texts = opened.page.evaluate("[...document.querySelectorAll('main img')].map(image => image.alt)")
    return [text for text in texts if re.fullmatch(r"\S+\.\w+", text.strip()) or re.search(r"\{[^}]*\}", text)]


def needless(opened: Visit) -> list[str]:
    """Scripts that a page loads and has no use for; equations that a keyboard has to step over."""
    maths = opened.page.locator("mjx-container").count()
    scripts = [url for url in opened.asked if "fontawesome.js" in url or ("mathjax" in url and not maths)]
    return scripts + ["equations are tab stops"] * opened.page.locator("mjx-container[tabindex='0']").count()


def cramped(opened: Visit) -> list[str]:
    """Cells of code that scroll sideways on a wide screen, but those that are folded."""
    opened.page.set_viewport_size(WIDE)
    faults = opened.page.evaluate("""() => [...document.querySelectorAll("div.cell_input pre")]
        .filter(code => !code.closest("details:not([open])") && code.scrollWidth > code.clientWidth)
        .map(code => code.textContent.slice(0, 100))""")
    opened.page.set_viewport_size(DESKTOP)
    return faults


def sideways(opened: Visit) -> list[str]:
    """What makes the page wider than a phone."""
    opened.page.set_viewport_size(PHONE)
    wide = opened.page.evaluate("""() => {
        const width = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth <= width) return [];
        const over = [...document.querySelectorAll("main *")].filter(it => it.getBoundingClientRect().right > width);
        const causes = over.slice(0, 5).map(it => it.outerHTML.slice(0, 120));
        return [`${document.documentElement.scrollWidth} px`, ...causes];
    }""")
    opened.page.set_viewport_size(DESKTOP)
    return wide


# ---- every page

def test_the_console_is_silent(opened: Visit):
    assert noises(opened) == []


def test_no_other_host_is_asked(opened: Visit):
    assert opened.asked and strangers(opened) == []


def test_no_directive_is_left(opened: Visit):
    assert directives(opened) == []


def test_every_sound_has_an_end(opened: Visit):
    assert endless(opened) == []


def test_the_first_player_plays(opened: Visit):
    assert dead(opened) == []


def test_sliders_switch_picture_and_sound(opened: Visit):
    assert stuck(opened) == []


def test_a_phone_need_not_scroll_sideways(opened: Visit):
    assert sideways(opened) == []


def test_a_picture_has_words(opened: Visit):
    assert wordless(opened) == []


def test_nothing_is_loaded_in_vain(opened: Visit):
    assert needless(opened) == []


def test_code_fits_on_a_wide_screen(opened: Visit):
    assert cramped(opened) == []


def test_nothing_bars_the_way(opened: Visit):    # the last one of a page, since it thins the page out
    # other tests change the window's size; the theme looks at what scrolls only a while later
    opened.page.wait_for_function("""() => [...document.querySelectorAll("pre")]
        .every(code => code.tabIndex == 0 || code.scrollWidth <= code.clientWidth)""")
    assert barriers(opened) == []


# ---- the checks' own test: a page without a fault, and that page with one

TONE = """<audio controls aria-label="a tone"></audio><script>{
    const bytes = new Uint8Array(44 + 16000), view = new DataView(bytes.buffer), text = "RIFF....WAVEfmt ";
    [...text].forEach((letter, i) => bytes[i] = letter.charCodeAt());
    [[4, 16036], [16, 16], [24, 8000], [28, 8000], [40, 16000]].forEach(([at, n]) => view.setUint32(at, n, true));
    [[20, 1], [22, 1], [32, 1], [34, 8]].forEach(([at, n]) => view.setUint16(at, n, true));
    [..."data"].forEach((letter, i) => bytes[36 + i] = letter.charCodeAt());
    document.currentScript.previousElementSibling.src =
        "data:audio/wav;base64," + btoa(String.fromCharCode(...bytes.map((b, i) => i < 44 ? b : 128)));
}</script>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
HEAD = '<div role="slider" tabindex="0" aria-label="place" aria-valuenow="0"></div>'
MOVES = """<script>document.querySelector("audio").ontimeupdate = event =>
    document.querySelector("[role=slider]").style.left = `${event.target.currentTime}px`</script>"""
TELLS = """<script>document.querySelector("audio").onpause = event =>
    document.querySelector("[role=slider]").setAttribute("aria-valuenow", event.target.currentTime)</script>"""
SLIDER = """<div><label>step <input type="range" max="1" value="0"></label>
<figure>{first}</figure><figure style="display: none">{last}</figure></div><script>{{
    const figures = document.querySelectorAll("figure");
    document.querySelector("[type=range]").oninput = event => figures.forEach((figure, i) => {{
        {switch}; const sound = figure.querySelector("audio");
        i == event.target.value ? sound.play() : sound.pause();
    }})
}}</script>"""
SWITCH = 'figure.style.display = i == event.target.value ? "" : "none"'
LAST = TONE.replace("128", "129")
FADES = """<style>body { transition: background 600s; color: #111; background: #fff }
[data-theme=dark] body { color: #eee; background: #111 } i { animation: fade 600s infinite alternate }
@keyframes fade { from { opacity: 0 } }</style><p>black on white, white on black <i>and seen by and by</i></p>"""
GOOD = [FADES, f'<div class="cell_output">{HEAD}{TONE}{MOVES}{TELLS}</div><img alt="a" src="{PIXEL}">',
        SLIDER.format(first=TONE, last=LAST, switch=SWITCH)]
BAD = {
    "a warning": (noises, "<script>console.warn('look')</script>"),
    "an uncaught error": (noises, "<script>nothing.here</script>"),
    "a missing file": (noises, '<img alt="a tone" src="missing.png">'),
    "another host": (strangers, '<img alt="a tone" src="http://127.0.0.1:9/tone.png">'),
    "a directive": (directives, "<pre>#| export\nimport torch</pre>"),
    "a broken sound": (endless, '<audio controls aria-label="a tone" src="data:audio/wav;base64,AAAA"></audio>'),
    "a still sound": (dead, '<audio controls aria-label="a tone" src="data:audio/wav;base64,AAAA"></audio>'),
    "a still play-head": (dead, f'<div class="cell_output">{HEAD}{TONE}{TELLS}</div>'),
    "a mute play-head": (dead, f'<div class="cell_output">{HEAD}{TONE}{MOVES}</div>'),
    "a still picture": (stuck, SLIDER.format(first=TONE, last=LAST, switch="0")),
    "a slider of one sound": (stuck, SLIDER.format(first=TONE, last=TONE, switch=SWITCH)),
    "no alternative text": (barriers, f'<img src="{PIXEL}">'),
    "pale text": (barriers, '<p style="color: #aaa; background: #fff">hardly to be read</p>'),
    "dark on dark": (barriers, "<style>[data-theme=dark] {background: #333}</style><p>not to be read at night</p>"),
    "a button without a name": (barriers, "<button></button>"),
    "a file's name as text": (wordless, f'<img alt="../_images/0ab1.png" src="{PIXEL}">'),
    "a template as text": (wordless, f'<img alt="noise at {{sigma:g}}" src="{PIXEL}">'),
    "maths in vain": (needless, '<script src="mathjax.js"></script>'),
    "a tab stop of maths": (needless, '<mjx-container tabindex="0">x</mjx-container>'),
    "narrow code": (cramped, f'<div class="cell_input"><pre style="width: 9em; overflow: auto">{"x" * 88}</pre></div>'),
    "a wide table": (sideways, '<table style="width: 500px"><tr><td>wide</td></tr></table>'),
}
CHECKS = [noises, strangers, directives, endless, dead, stuck, wordless, needless, cramped, sideways, barriers]


def small_page(context: "BrowserContext", folder: Path, body: str) -> Visit:
    (folder / "page.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>A page</title><main><h1>A page</h1>{body}</main></html>")
    return visit(context, (folder / "page.html").as_uri())


@pytest.mark.parametrize("body", GOOD, ids=["transition", "player", "slider"])
def test_checks_find_nothing_on_a_good_page(body: str, context: "BrowserContext", tmp_path: Path):
    opened = small_page(context, tmp_path, body)
    assert [fault for check in CHECKS for fault in check(opened)] == []
    opened.page.close()


def test_checks_find_nothing_on_what_show_makes(context: "BrowserContext", tmp_path: Path):
    cfg = SpectrogramConfig()
    waves = [example_performance(2.048, seed=seed) for seed in range(2)]
    frames = [(f"seed {seed}", to_spectrogram(wave, cfg), wave) for seed, wave in enumerate(waves)]
    made = slider(frames, cfg, label="seed")
    opened = small_page(context, tmp_path, player(waves[0])._repr_html_() + made._repr_html_())
    assert [fault for check in CHECKS for fault in check(opened)] == []
    assert opened.page.locator("audio").count() == 3
    opened.page.close()


@pytest.mark.parametrize("name", BAD)
def test_a_check_finds_its_fault(name: str, context: "BrowserContext", tmp_path: Path):
    check, body = BAD[name]
    opened = small_page(context, tmp_path, body)
    assert check(opened) != []
    opened.page.close()


# ---- the book as a whole

def test_search_finds_preconditioning(context: "BrowserContext", site: str):
    opened = visit(context, f"{site}search.html?q=preconditioning")
    opened.page.wait_for_selector("#search-results li a[href*='07_edm']")
    assert noises(opened) == strangers(opened) == []
    opened.page.close()


@pytest.mark.parametrize("name", ["nbs/00_intro", "nbs/12_generate", "nbs/23_show"])
def test_a_page_opens_from_a_folder(name: str, context: "BrowserContext", book: Path):
    opened = visit(context, (book / f"{name}.html").as_uri())
    assert [fault for check in (noises, strangers, endless, dead, stuck) for fault in check(opened)] == []
    opened.page.close()


def test_a_page_is_dark_where_the_system_is(context: "BrowserContext", site: str):
    page = context.new_page()
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{site}{contents()[0]}.html")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.close()


def test_the_first_page_is_light(context: "BrowserContext", site: str):
    """In bytes, without what a server's compression saves: it was five megabytes."""
    page, sizes = context.new_page(), []
    page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    page.goto(f"{site}{contents()[0]}.html", wait_until="networkidle")
    assert 100_000 < sum(sizes) < 1.2 * MEGABYTE
    page.close()


def test_at_night_all_of_a_figure_is_inverted_but_its_planes(extension, context: "BrowserContext", tmp_path: Path):
    """A white picture with a plane in its middle: its edge turns dark, and the plane stays white."""
    style = (ROOT / "book" / "_static" / "book.css").read_text()
    picture = extension.at_night([[25, 25, 75, 75]])
    (tmp_path / "page.html").write_text(
        f'<html data-theme="dark"><style>body {{ margin: 0 }} {style}</style><body class="bd-content">'
        f'<div class="picture container" style="background: #fff; width: 100px; height: 100px">{picture}</div>')
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    seen = Image.open(io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, "width": 100, "height": 100}))).convert("L")
    assert seen.getpixel((10, 50)) < 40 and seen.getpixel((50, 50)) == 255
    page.close()


def test_a_figure_becomes_a_light_picture_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    picture = importlib.import_module("picture")
    with plt.style.context("pianodiff.book"):
        cfg, wave = SpectrogramConfig(), example_performance(2.048, seed=0)
        axes = plot_spectrogram(to_spectrogram(wave, cfg), cfg, title="two seconds at $\\sigma_{\\max}$")
        data, about = picture.png(axes.figure)
        empty = picture.words(plt.figure())
        plt.close("all")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert about["alt"] == "two seconds at sigma max: frequency (Hz) over time (s). colours: level (dB)" and empty == ""
    assert (about["width"], about["height"]) == (image.width // 2, image.height // 2) and 650 < about["width"] <= 760
    assert image.mode == "P" and len(image.getcolors()) <= 64 and len(data) < 120_000
    seen = image.convert("RGB")
    for left, top, right, bottom in about["planes"]:     # of colour, and what is around them is white
        inside = seen.crop([round(part * side / 100) for part, side in zip(
            (left + 0.5, top + 1, right - 0.5, bottom - 1), seen.size * 2, strict=True)])
        assert (255, 255, 255) not in {colour for _, colour in inside.getcolors(inside.width * inside.height)}
    assert len(about["planes"]) == 2 and seen.getpixel((3, 3)) == (255, 255, 255)


def test_equations_of_the_library_are_links(book: Path):
    page = (book / "book" / "api.html").read_text()
    text = re.sub("<[^>]*>", "", page)
    assert re.findall(r"Eqs?\. \([a-z][\w-]*\)", text) == []
    assert len(re.findall(r'href="\.\./nbs/\w+\.html#equation-eq-', page)) > 50


@pytest.mark.parametrize("name", contents())
def test_a_link_to_a_page_shows_what_it_is(name: str, book: Path):
    head = (book / f"{name}.html").read_text().partition("</head>")[0]
    found = re.findall(r'<meta (?:name|property)="([\w:]+)" content="(.*?)"', head)
    told = {key: html.unescape(text) for key, text in found}
    assert len(told["description"]) > 3 and told["og:title"] and "<" not in told["description"]
    assert told["og:url"].endswith(f"/{name}.html")
    base = told["og:url"].removesuffix(f"{name}.html")
    assert (book / told["og:image"].removeprefix(base)).is_file()


class Links(HTMLParser):
    """The places that a page defines, and those that it asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.asked: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        self.asked += [found[name] for name in ("href", "src") if name in found]


def astray(folder: Path) -> list[str]:
    """Links within a folder of pages that lead nowhere: to no file, or to no place in it."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html") if "_static" not in path.parts}
    faults = []
    for page, links in pages.items():
        for link in set(links.asked):
            address, place = urldefrag(link)
            if urlsplit(link).scheme or address.startswith("//") or link == "#":
                continue
            target = (page.parent / unquote(urlsplit(address).path)).resolve() if address else page
            if not target.is_file() or (place and target in pages and unquote(place) not in pages[target].places):
                faults.append(f"{page.name}: {link[:200]}")
    return faults


def test_links_lead_somewhere(book: Path):
    assert len(list(book.rglob("*.html"))) > len(contents())
    assert astray(book) == []


@pytest.mark.parametrize("link", ["gone.html", "page.html#gone", "#gone", "gone.png"])
def test_a_link_astray_is_found(link: str, tmp_path: Path):
    page = '<p id="here"><a href="#here">a</a><a href="page.html#here">a</a><a href="https://example.org/gone">a</a>'
    (tmp_path / "page.html").write_text(page)
    assert astray(tmp_path) == []
    (tmp_path / "page.html").write_text(page + f'<a href="{link}">a</a>')
    assert astray(tmp_path) == [f"page.html: {link}"]


def test_pages_and_notebooks_stay_small(book: Path):
    pages = {path.name: path.stat().st_size for path in [*book.rglob("*.html"), *CHAPTERS]}
    assert {name: size for name, size in pages.items() if size > 4 * MEGABYTE} == {}
    assert sum(path.stat().st_size for path in CHAPTERS) < 10 * MEGABYTE


def test_the_book_opens_with_a_sound(book: Path):
    assert (book / f"{contents()[0]}.html").read_text().count("<audio") == 1


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("pianodiff_book")


@pytest.mark.parametrize("code, folded", [
    ("import torch\nfrom torch import Tensor", True), ("import a\n\nplt.style.use('pianodiff.book')", True),
    ("import a\nif TYPE_CHECKING:\n    import b", True), ("import a\nif TYPE_CHECKING:\n    a.run()", False),
    ("try:\n    import a\nexcept ImportError:\n    a = None", True), ("try:\n    a()\nexcept E:\n    pass", False),
    ("", False), ("import a\na.run()", False), ("!pip install a", False), ("plt.style.use(made())\nx = 1", False)])
def test_imports_alone_are_folded(code: str, folded: bool, extension):
    cell = nbformat.v4.new_code_cell(f"#| export\n{code}")
    read = extension.read_chapter(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
    assert ("hide-input" in read.cells[0].metadata["tags"]) is folded


def test_imports_in_a_row_are_one_cell(extension):
    codes = ["#| export\nimport a", "#| hide\nx = 1", "import b", "b.run()", "import c"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    read = extension.read_chapter(nbformat.writes(notebook))
    shown = [cell.source for cell in read.cells if "remove-cell" not in cell.metadata["tags"]]
    assert shown == ["import a\n\nimport b", "b.run()", "import c"]


# ---- Colab

def settings() -> dict[str, str]:
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return dict(config["DEFAULT"])


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_opens_in_colab(chapter: Path, book: Path):
    known = settings()
    address = (f"https://colab.research.google.com/github/{known['user']}/{known['repo']}/blob/{known['branch']}/"
               f"nbs/{chapter.name}")
    asked = Links(book / "nbs" / f"{chapter.stem}.html").asked
    assert asked.count(address) == 1 + ("studio(Piano" in chapter.read_text())    # where the studio would run
    assert f"https://github.com/{known['user']}/{known['repo']}" in asked


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_installs_the_package_where_it_is_missing(chapter: Path, extension):
    title, install = nbformat.read(chapter, as_version=4).cells[:2]
    assert (title.cell_type, install.cell_type) == ("markdown", "code") and title.source.startswith("# ")
    assert install.source == extension.install_cell()
    assert f"git+https://github.com/{settings()['user']}/{settings()['repo']}" in install.source
