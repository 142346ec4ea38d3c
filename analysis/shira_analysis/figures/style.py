"""One look for all pictures; matplotlib is imported here, when the first one is made, and never its global state.

Colours are those of Okabe and Ito and the scales viridis and cividis, which people tell apart whatever colours they see.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

BLUE, ORANGE, GREEN, SKY, PINK, YELLOW, RED, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#F0E442", "#D55E00", "#777777",
)  # fmt: skip
LINES = (BLUE, RED, GREEN, ORANGE, PINK, SKY, "black", GREY)
"""Colours of lines, in the order in which they are given out. Yellow is too pale for one."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
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
    """The look, for what is drawn inside; what matplotlib was set to before comes back."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def figure(width: float, height: float) -> Any:
    """A new matplotlib ``Figure`` of so many inches, on no screen and in no list of pyplot; used inside :func:`our_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def render(drawn: Any, form: str = "png") -> bytes:
    """The bytes of a PNG or SVG; no date or version in them, so that the same numbers give the same file."""
    buffer = io.BytesIO()
    nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[form]
    drawn.savefig(buffer, format=form, dpi=DPI, metadata=nothing)
    return buffer.getvalue()


def short_label(text: str, most: int = 60) -> str:
    """A name from a file, for a label: one line, nothing that reorders it or is a formula, and not longer than ``most``."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > most:
        head = (most - 1) // 3
        text = f"{text[:head]}…{text[head + 1 - most :]}"
    return text.replace("$", r"\$")


def line_style(at: int) -> dict[str, Any]:
    """Colour, mark and dashes of the line with this number, from 0: no two of the first 32 are alike in colour and dashes."""
    turn = at // len(LINES)
    return {
        "color": LINES[at % len(LINES)],
        "marker": MARKS[(at + turn) % len(MARKS)],
        "ls": _DASHES[turn % len(_DASHES)],
    }


def distinct_labels(names: Sequence[str], most: int) -> list[str]:
    """:func:`short_label` names; where that makes two of them one, without what all have at their beginnings and ends."""
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
    """How many letters all have in common from the first on."""
    together = zip(*names, strict=False)
    return next((at for at, letters in enumerate(together) if len(set(letters)) > 1), min(map(len, names)))


def digits(value: float, count: int) -> str:
    """A number with so many digits that count, zeros at its end too, so that those of a table are alike; 100 as "100", not "1e+02"."""
    if 10**count <= abs(value) < 1e6:
        return f"{value:.0f}"
    rounded = f"{value:#.{count}g}"
    return f"{value:.0f}" if "e+0" in rounded and abs(value) < 1e6 else rounded.removesuffix(".")


def text_colour(colour: Sequence[float]) -> str:
    """Black or white: what is read better on a colour of red, green and blue from 0 to 1."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    # From this luminance on, black has the higher contrast as WCAG counts it.
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def percent_digits(value: float) -> str:
    """A share in per cent, with as many digits as it takes: 0.0123 as 1.23."""
    return f"{100 * value:.3g}"
