"""Charts of a report, as HTML and as embedded images."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from shira_analysis.figures.layers import LayerGrid, What
from shira_analysis.figures.masks import MaskGrid, scale_end
from shira_analysis.figures.style import digits
from shira_analysis.reports.html.page import text

# Points of the colour scale cividis, from few entries to many.
_CIVIDIS = np.array([(0, 34, 78), (65, 77, 107), (124, 123, 120), (188, 175, 111), (254, 232, 56)], np.float64)
_IMAGE = 480  # pixels along the longer side, about


def bars(head: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]) -> str:
    """A table with plain cells and a bar for a share of 1 in each row; the last title is that of the bars."""
    titles = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}"
        f'<td class="bar"><span class="track"><span style="width:{100 * min(1.0, value):.2f}%"></span></span></td></tr>'
        for cells, value in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="bars"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def heat(grid: LayerGrid, what: What, caption: str) -> str:
    """A heat map with a row for each kind of layer and a column for each block; the cells show per cent."""
    values = grid.values(what)
    known = values[np.isfinite(values)]
    most = float(known.max()) if known.size else 0.0
    head = "".join(
        f'<th scope="col" title="{text(grid.block(at))}">{text(number or "–")}</th>'
        for at, number in enumerate(grid.blocks)
    )
    body = []
    for kind, row in zip(grid.kinds, values.tolist(), strict=True):
        cells = "".join("<td></td>" if value != value else _cell(value, most) for value in row)  # noqa: PLR0124 - NaN
        body.append(f'<tr><th scope="row">{text(kind)}</th>{cells}</tr>')
    return (
        f'<figure><div class="scroll" tabindex="0"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div><figcaption>{text(caption)}</figcaption></figure>"
    )


def _cell(value: float, most: float) -> str:
    strength = 0.6 * value / most if most else 0.0  # text stays legible on it
    number = "<0.01" if 0 < value < 0.01 else digits(value, 2) if value else "0"
    return f'<td style="background:rgb(var(--blue) / {strength:.3f})">{text(number)}</td>'


def mask_image(grid: MaskGrid, caption: str) -> str:
    """The mask of a tensor as an image."""
    top = scale_end(grid)
    place = np.minimum(1.0, 100 * grid.density / top) * (len(_CIVIDIS) - 1)
    low = np.minimum(place.astype(int), len(_CIVIDIS) - 2)
    part = (place - low)[..., None]
    pixels = np.rint(_CIVIDIS[low] * (1 - part) + _CIVIDIS[low + 1] * part).astype(np.uint8)
    height, width = grid.counts.shape
    scale = max(1, _IMAGE // max(height, width))
    source = base64.b64encode(_png(pixels)).decode()
    legend = f"{caption} Dark: no entries; yellow: {top:.3g} % of a cell's elements or more."
    return (
        f'<figure><img src="data:image/png;base64,{source}" width="{width * scale}" height="{height * scale}" '
        f'alt="{text(caption)}"><figcaption>{text(legend)}</figcaption></figure>'
    )


def _png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """A PNG of ``[height, width, 3]`` pixels."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a filter of 0 before each row
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
