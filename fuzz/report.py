"""The results of the last campaign as the table of `docs/security.md`; `python -m fuzz.report` puts it there."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.targets import TARGETS

_ROOT = Path(__file__).parents[1]
RESULTS, PAGE = _ROOT / "fuzz" / "results.json", _ROOT / "docs" / "security.md"


def table() -> str:
    """The table, and the line under it that names the machine."""
    results = json.loads(RESULTS.read_text("utf-8"))
    lines = [
        "| a case is | cases | accepted | refused | violations | CPU seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["targets"]:
        counts = [f"{row[key]:,}" for key in ("cases", "accepted", "refused", "violation", "cpu_seconds")]
        lines.append(f"| {TARGETS[row['target']].about} | {' | '.join(counts)} |")
    return "\n".join([*lines, "", f"Measured on one core of {results['machine']}."])


def main() -> None:
    """Write the page's table anew."""
    text = PAGE.read_text("utf-8")
    begin, end = text.index("| a case is |"), text.index("Measured on one core of")
    end = text.index("\n", end)
    PAGE.write_text(text[:begin] + table() + text[end:], "utf-8")


if __name__ == "__main__":
    main()
