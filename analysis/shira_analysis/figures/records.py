"""The numbers of a picture, to and from CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def to_csv(records: Sequence[Record]) -> str:
    """CSV with a header; numbers round-trip, None is an empty cell. All records have the keys of the first."""
    text = io.StringIO()
    if records:
        table = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)
    return text.getvalue()


def from_csv(text: str) -> list[Record]:
    """Parse the output of :func:`to_csv`: numbers as int or float, empty cells as None."""
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
