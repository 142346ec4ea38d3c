"""Text for people: printable names, numbers and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """``text`` in one line, without what could move the cursor or reorder it: names come from strangers' files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(text: str) -> str:
    """A message as :func:`printable` has it, of which a stranger's name of megabytes shows its beginning and end alone."""
    return printable(text if len(text) <= 4000 else f"{text[:2000]} ... {text[-1000:]}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text: the first is aligned left, the others right."""
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def count(number: int) -> str:
    """12345678 as 12,345,678."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """1 as "1 tensor", 2000 as "2,000 tensors"."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def percent(share: float | None) -> str:
    """0.01234 as 1.23 %, with more digits where it is small; None as -."""
    if share is None:
        return "-"
    if abs(share) >= 10:
        return f"{100 * share:,.3g} %" if abs(share) >= 1e6 else f"{100 * share:,.0f} %"
    return f"{100 * share:.2f} %" if abs(share) >= 0.001 or share == 0 else f"{100 * share:.2g} %"


def number(value: float | None, form: str) -> str:
    """A number in a format; None as -."""
    return "-" if value is None else format(value, form)


def file_size(size: float) -> str:
    """Bytes in powers of 1000: 1234567 as 1.23 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
