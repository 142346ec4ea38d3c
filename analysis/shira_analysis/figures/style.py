"""One style for all pictures. matplotlib is imported lazily, and its global state is left alone.

Colours are the Okabe-Ito palette and the viridis and cividis scales, which are safe for colour-blind readers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

BLUE, ORANGE, GREEN, SKY, PINK, YELLOW, RED, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#F0E442", "#D55E00", "#777777",
)  # fmt: skip
LINES = (BLUE, RED, GREEN, ORANGE, PINK, SKY, "black", GREY, "saddlebrown")
"""Colours of lines, in order of use. Yellow is too pale for lines."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_DASHES = ("-", "--", ":", "-.")

DPI = 160

_STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "figure.titlesize": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.grid": False, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "legend.frameon": False,
    "text.usetex": False, "svg.hashsalt": "shira",
}  # fmt: skip


@contextlib.contextmanager
def our_style() -> Iterator[None]:
    """Apply the style within the context; matplotlib's previous settings are restored after it."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def figure(width: float, height: float) -> Any:
    """A new matplotlib ``Figure``, size in inches, independent of pyplot and of any display; use it inside :func:`our_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def render(drawn: Any, form: str = "png") -> bytes:
    """The bytes of a PNG, SVG or PDF, without date or version, so that the same numbers give the same file."""
    buffer = io.BytesIO()
    nothing = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }[form]
    drawn.savefig(buffer, format=form, dpi=DPI, metadata=nothing)
    return buffer.getvalue()


def short_label(text: str, most: int = 60) -> str:
    """A name from a file as a label: one line, control characters and ``$`` escaped, shortened to ``most`` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > most:
        head = (most - 1) // 3
        text = f"{text[:head]}…{text[head + 1 - most :]}"
    return text.replace("$", r"\$")


def line_style(at: int) -> dict[str, Any]:
    """Colour, marker and dashes of line number ``at`` (from 0): the first 32 differ in colour or dashes."""
    turn = at // len(LINES)
    return {
        "color": LINES[at % len(LINES)],
        "marker": MARKS[(at + turn) % len(MARKS)],
        "ls": _DASHES[turn % len(_DASHES)],
    }


def distinct_labels(names: Sequence[str], most: int) -> list[str]:
    """Distinct :func:`short_label` labels: where shortening makes two equal, common prefixes and suffixes are removed, or numbers added."""
    found = [short_label(name, most) for name in names]
    if len(set(found)) == len(set(names)):
        return found
    start = _common(names)
    end = _common([name[start:][::-1] for name in names])
    middles = [f"…{name[start : len(name) - end]}…" for name in names]
    found = [short_label(name, most) for name in middles]
    if len(set(found)) == len(set(names)):
        return found
    return [f"{number}: {short_label(name, most - 4)}" for number, name in enumerate(names, 1)]


def _common(names: Sequence[str]) -> int:
    """The length of the common prefix."""
    together = zip(*names, strict=False)
    return next((at for at, letters in enumerate(together) if len(set(letters)) > 1), min(map(len, names)))


def digits(value: float, count: int) -> str:
    """A number with ``count`` significant digits, trailing zeros included; below a million without an exponent: "100", not "1e+02"."""
    if 10**count <= abs(value) < 1e6:
        return f"{value:.0f}"
    rounded = f"{value:#.{count}g}"
    return f"{value:.0f}" if "e+0" in rounded and abs(value) < 1e6 else rounded.removesuffix(".")


def text_colour(colour: Sequence[float]) -> str:
    """Black or white, whichever is more legible on an RGB colour (0 to 1)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    # Above this luminance, black has the higher contrast as WCAG defines it.
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def percent_digits(value: float) -> str:
    """A share in per cent, three significant digits: 0.0123 as 1.23."""
    return f"{100 * value:.3g}"
