"""Figures as the book keeps them, for the kernels of execute.py: twice as sharp, a third as heavy, and in words.

A chapter that is run by hand shows Matplotlib's own pictures.
"""

import base64
import io
import re
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

DENSITY = 2     # pixels of the file for one of the page
COLOURS = 64    # magma's and the lines': the eye sees no difference, and a third of the bytes is left
FEW, HEAVY = 32, 100_000    # so many where the file would be heavier: planes of noise, in which nobody counts colours
MARGIN = 0.05   # inches around what is drawn


def plain(text: str) -> str:
    """A label without what only TeX needs: `$\\sigma_{\\max}$` as sigma max."""
    inner = re.sub(r"\$([^$]*)\$", lambda maths: re.sub(r"[\\{}^_]+", " ", maths[1]), text)
    return " ".join(inner.split())


def words_of(axes: Axes) -> str:
    """What one plane shows: its title, what is drawn over what, and the names of its lines."""
    across, up = plain(axes.get_xlabel()), plain(axes.get_ylabel())
    if axes.get_label() == "<colorbar>":
        return f"colours: {up or across}" if up or across else ""
    title = next((plain(axes.get_title(loc)) for loc in ("left", "center", "right") if axes.get_title(loc)), "")
    drawn = " over ".join(filter(None, (up, across)))
    legend = axes.get_legend()
    names = ", ".join(plain(text.get_text()) for text in legend.get_texts()) if legend else ""
    return "; ".join(filter(None, (": ".join(filter(None, (title, drawn))), names)))


def words(figure: Figure) -> str:
    """A figure's alternative text, from what it says itself; empty where it says nothing."""
    heading = [plain(figure.get_suptitle())] if figure.get_suptitle() else []
    found = [words_of(axes) for axes in figure.axes if axes.get_visible()]
    return textwrap.shorten(". ".join(dict.fromkeys(filter(None, heading + found))), 300, placeholder=" …")


def planes(figure: Figure, seen: Bbox) -> list[list[float]]:
    """Where coloured planes lie, which must stay as they are in the dark: [left, top, right, bottom] in percent."""
    boxes = [axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for axes in figure.axes
             if axes.get_visible() and (axes.images or axes.get_label() == "<colorbar>")]
    return [[round(100 * float(part), 1) for part in (
        (box.x0 - seen.x0) / seen.width, (seen.y1 - box.y1) / seen.height,
        (box.x1 - seen.x0) / seen.width, (seen.y1 - box.y0) / seen.height)] for box in boxes]


def packed(image: Image.Image, colours: int) -> bytes:
    """A PNG file with a palette, in which rare colours have their place: a colour bar stays whole, and text black."""
    file = io.BytesIO()
    image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def png(figure: Figure) -> tuple[str, dict[str, Any]]:
    """The PNG of a figure in base64, and its metadata: width and height in the page's pixels, `alt` and `planes`."""
    figure.draw_without_rendering()
    seen = figure.get_tightbbox().padded(MARGIN)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DENSITY * figure.dpi, bbox_inches=seen, facecolor="white")
    image = Image.open(drawn).convert("RGB")
    file = packed(image, COLOURS)
    if len(file) > HEAVY:
        file = packed(image, FEW)
    size = {"width": image.width // DENSITY, "height": image.height // DENSITY}
    return base64.b64encode(file).decode(), size | {"alt": words(figure), "planes": planes(figure, seen)}


def install(shell: Any) -> None:
    """Have an IPython shell show figures so."""
    shell.run_line_magic("matplotlib", "inline")    # first, since it sets the same formatter
    shell.display_formatter.formatters["image/png"].for_type(Figure, png)
