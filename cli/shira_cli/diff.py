"""``shira-diff``: what differs between two adapters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_format._core import text

if TYPE_CHECKING:
    from shira_format.merge.diff import Differences, TensorDifference

PROG = "shira-diff"

SAME, DIFFERENT, TROUBLE = 0, 1, 2  # as diff

DESCRIPTION = """\
Compare two adapters, tensor by tensor: which entries one of them has alone, which both have with the same bits, and which with other values.
The content counts: codecs, the order of tensors and provenance (shown, if it differs) make no difference.

The exit code is 0 if the content is the same, 1 if it differs, 2 if there was trouble."""

EXAMPLE = """examples:
  shira-diff a.st b.st
  shira-diff old.st new.st --quiet || echo changed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="an adapter file")
    add("second", type=Path, metavar="B", help="another one")
    add("--all", action="store_true", help="list equal tensors as well")
    add("--include", action="append", default=[], metavar="REGEX", help="compare only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="print nothing but errors: the exit code tells")
    options = parser.parse_args(argv)
    return console.run(PROG, lambda: _diff(options), failed=TROUBLE)


def _diff(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from shira_format.merge.diff import diff

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(unit="tensors", disable=hidden, leave=False) as bar:
        found = diff(
            options.first, options.second, include=options.include, exclude=options.exclude,
            progress=lambda _: bar.update(),
        )  # fmt: skip
    if not options.quiet:
        listed = found.tensors if options.all else found.different
        if options.json:
            console.print_json(as_json(found, listed, options.first, options.second))
        else:
            print(as_text(found, listed))
    return SAME if found.same else DIFFERENT


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
        head = (
            "tensor",
            "differs in",
            "only in A",
            "only in B",
            "equal",
            "other values",
            "largest difference",
            "base",
        )
        rows = [_row(tensor) for tensor in listed]
        rows.append(("all", "", *(text.count(value) for value in _totals(found).values()), "", ""))
        lines.append(text.table(head, rows))
    if found.alpha[0] != found.alpha[1]:
        lines.append(f"strength: {found.alpha[0]:g} in A, {found.alpha[1]:g} in B")
    for which, names in zip("AB", found.removed, strict=True):
        if names:
            lines.append(f"removed by {which} alone: {', '.join(map(text.printable, names))}")
    if found.provenance:
        keys = ", ".join(map(text.printable, found.provenance))
        lines.append(f"provenance differs, which is no difference of content: {keys}")
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
        *(text.count(value) for value in (tensor.only_first, tensor.only_second, tensor.equal, tensor.other)),
        "" if tensor.largest is None else f"{tensor.largest:.4g}", base,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
