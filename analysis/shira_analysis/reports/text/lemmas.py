"""Report of the five lemmas for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shira_format._core.text import count, printable

if TYPE_CHECKING:
    from shira_analysis.lemmas import LemmaReport, Verification
    from shira_analysis.lemmas.report import Check, Counterexample, Reading

WIDTH = 112


def broken_laws(found: Verification) -> list[str]:
    """The laws that should hold and do not, each after its lemma's number."""
    return [
        f"{lemma.number}: {check.law.strip()}" for lemma in found.lemmas for check in lemma.checks if not check.ok
    ]


_TRAINED = (
    "These are laws of matrices. Whether orthogonal weights keep trained adapters from disturbing each other is another question: the studies in "
    "docs/studies found that they do not (interference.md), and which merges lose least (fusion.md)."
)


def as_text(found: Verification) -> str:
    """The report for a terminal."""
    names = ", ".join(Path(file).name for file in found.files) or "none"
    lines = [f"Sparse High Rank Adapters, the five lemmas by numbers; seed {found.seed}{', quick' if found.quick else ''}; files: {printable(names)}"]  # fmt: skip
    for lemma in found.lemmas:
        lines += ["", *_lemma(lemma)]
    rows = [(f"{lemma.number} {lemma.title}", count(lemma.cases), "all hold" if lemma.ok else "BROKEN", lemma.verdict) for lemma in found.lemmas]  # fmt: skip
    summary = ["", "SUMMARY", *_columns(("lemma", "cases", "true laws", "the printed statement"), rows), ""]
    return "\n".join([*lines, *summary, *_wrapped(_TRAINED, "", 0)])


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """A table of which the last column is flush left and runs on below itself."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    lines = []
    for row in (head, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)),
        ]
        start = indent + "  ".join(cells) + "  "
        lines += _wrapped(row[-1], start, len(start))
    return lines


def _wrapped(text: str, start: str, indent: int) -> list[str]:
    return textwrap.wrap(
        printable(text), max(WIDTH, indent + 40), initial_indent=start, subsequent_indent=" " * indent,
        break_on_hyphens=False, break_long_words=False,
    ) or [start.rstrip()]  # fmt: skip


def _lemma(lemma: LemmaReport) -> list[str]:
    lines = [f"LEMMA {lemma.number}  {lemma.title}", ""]
    for name, text in (("printed", lemma.printed), ("verdict", lemma.verdict), ("true", lemma.true)):
        lines += _wrapped(text, f"  {name.ljust(9)}", 11)
    lines += ["", "  how it can be read"]
    for reading in lemma.readings:
        lines += _reading(reading)
    laws = [_check(check) for check in lemma.checks]
    lines += [
        "",
        "  laws that were tried",
        *_columns(("result", "cases", "closest to failing", "law"), laws, " " * 4),
    ]
    if lemma.measured:
        lines += ["", "  measured"]
        for what, text in lemma.measured:
            lines += [f"    {printable(what)}", *_wrapped(text, " " * 6, 6)]
    if lemma.of_files:
        shown = _some(lemma.of_files)
        lines += ["", f"  of the files ({len(shown)} of {len(lemma.of_files)} weights looked at; --json has all)"]
        for what, text in shown:
            lines += [f"    {printable(what)}", *_wrapped(text, " " * 6, 6)]
    for note in lemma.notes:
        lines += _wrapped(note, "  note: ", 8)
    return lines


def _some(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Three of them, from the first to the last."""
    return rows if len(rows) <= 3 else [rows[0], rows[len(rows) // 2], rows[-1]]


def _reading(reading: Reading) -> list[str]:
    mark = {"holds": "holds", "fails": "FAILS", "says nothing": "EMPTY"}[reading.verdict]
    lines = _wrapped(reading.text, f"    {mark}  ", 11)
    lines += _wrapped(reading.why, " " * 11, 11)
    if reading.counterexample is not None:
        lines += [f"           {line}".rstrip() for line in _counterexample(reading.counterexample)]
    return lines


def _counterexample(found: Counterexample) -> list[str]:
    """The matrices side by side, then the computation."""
    height = max(len(rows) for rows in found.matrices.values())
    blocks = []
    for name, rows in found.matrices.items():
        width = max(len(cell) for row in rows for cell in row)
        body = [f"[{' '.join(cell.rjust(width) for cell in row)}]" for row in rows]
        # The name stands on the first line, and blocks are of equal height.
        label = f"{name} = "
        block = [(label if line == 0 else " " * len(label)) + text for line, text in enumerate(body)]
        blocks.append([*block, *([" " * len(block[0])] * (height - len(block)))])
    drawn = ["   ".join(parts) for parts in zip(*blocks, strict=True)]
    searched = textwrap.wrap(f"smallest counterexample ({found.found}):", WIDTH - 11, break_on_hyphens=False)
    return [*searched, *(f"  {line}" for line in drawn), *(f"  {step}" for step in found.steps)]


def _check(check: Check) -> tuple[str, str, str, str]:
    result = "holds" if check.ok else f"BROKEN ({check.broken})" if check.cases else "NO CASE"
    law = check.law if check.ok else f"{check.law} -- worst: {check.where}"
    return result, count(check.cases), _margin(check), law


def _margin(check: Check) -> str:
    """How close the worst case came, in words."""
    if not check.cases:
        return ""
    if check.exact:
        if check.margin == 0:
            return "equal, exactly"
        return f"{check.margin:.0f} to spare" if check.margin > 0 else f"off by {-check.margin:g}"
    if check.relation == "=":
        return f"{max(0.0, 1 - check.margin):.1%} of the rounding bound"
    if check.margin < 1e-6:
        return "equal to rounding" if check.ok else f"{-check.margin:.1%} above"
    return f"{check.margin:.0%} below the right side"
