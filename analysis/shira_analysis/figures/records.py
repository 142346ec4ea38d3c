"""The numbers of a picture as CSV, and back."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def to_csv(records: Sequence[Record]) -> str:
    """A table with a head; a number comes back as it was, None as an empty cell. All records have the keys of the first."""
    text = io.StringIO()
    if records:
        table = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)
    return text.getvalue()


def from_csv(text: str) -> list[Record]:
    """What :func:`to_csv` wrote: numbers as int or float, empty cells as None."""
    return [{key: _value(cell) for key, cell in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _value(cell: str) -> Any:
    if cell == "":
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell
