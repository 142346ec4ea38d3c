"""Report of the differences between two adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format._core.text import count, printable, table

if TYPE_CHECKING:
    from shira_format.merging.diff import Differences, TensorDifference

HEAD = ("tensor", "differs in", "only in A", "only in B", "equal", "other values", "largest difference", "base")


def as_json(found: Differences, listed: Sequence[TensorDifference], first: Path, second: Path) -> dict[str, Any]:
    """The differences as plain JSON values."""
    return {
        "files": [str(first), str(second)],
        "same": found.same,
        "totals": {"tensors": len(found.tensors), "different": len(found.different)} | _totals(found),
        "alpha": list(found.alpha),
        "removed": [list(names) for names in found.removed],
        "provenance": {key: list(values) for key, values in found.provenance.items()},
        "tensors": [asdict(tensor) | {"same": tensor.same} for tensor in listed],
    }


def as_text(found: Differences, listed: Sequence[TensorDifference]) -> str:
    """The differences for a terminal."""
    lines = []
    if listed:
        rows = [_row(tensor) for tensor in listed]
        rows.append(("all", "", *(count(value) for value in _totals(found).values()), "", ""))
        lines.append(table(HEAD, rows))
    if found.alpha[0] != found.alpha[1]:
        lines.append(f"alpha: {found.alpha[0]:g} in A, {found.alpha[1]:g} in B")
    for which, names in zip("AB", found.removed, strict=True):
        if names:
            lines.append(f"removed by {which} alone: {', '.join(map(printable, names))}")
    if found.provenance:
        keys = ", ".join(map(printable, found.provenance))
        lines.append(f"provenance differs, which does not count as a difference: {keys}")
    if found.same:
        lines.append(f"the same content: {len(found.tensors)} tensors")
    else:
        lines.append(f"different: {len(found.different)} of {len(found.tensors)} tensors")
    return "\n".join(lines)


def _totals(found: Differences) -> dict[str, int]:
    return {
        what: sum(getattr(tensor, what) for tensor in found.tensors)
        for what in ("only_first", "only_second", "equal", "other")
    }


def _row(tensor: TensorDifference) -> tuple[str, ...]:
    first, second = tensor.entries
    if first is None or second is None:
        differs = f"only in {'A' if second is None else 'B'}"
    else:
        parts = [*tensor.traits]
        parts += ["entries"] if tensor.only_first or tensor.only_second else []
        parts += ["values"] if tensor.other else []
        differs = ", ".join(parts) or "nothing"
    base = {None: "", True: "same", False: "other"}[tensor.same_base]
    return (
        f"{tensor.name} (whole)" if tensor.whole else tensor.name, differs,
        *(count(value) for value in (tensor.only_first, tensor.only_second, tensor.equal, tensor.other)),
        "" if tensor.largest is None else f"{tensor.largest:.4g}", base,
    )  # fmt: skip
