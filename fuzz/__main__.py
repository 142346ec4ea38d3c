"""`python -m fuzz`: the campaign."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz import oracle, runner, system
from fuzz.targets import TARGETS


def main() -> int:
    """Run it; the exit code is 1 if there was a violation."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz shira-format. See fuzz/README.md.")
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="CPU minutes for each target (default: %(default)g)"
    )
    parser.add_argument("--cases", type=int, help="stop a target after so many cases")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few cases of each target, as in the tests, without checks of bounds",
    )
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other cases (default: %(default)s)"
    )
    parser.add_argument("--found", type=Path, default=runner.FOUND, help="where violations are stored")
    parser.add_argument("--results", type=Path, metavar="FILE", help="record the counts in a file of JSON")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="CASE", help="judge stored cases instead")
    options = parser.parse_args()
    if options.replay:
        return _replay(options.replay)
    rows = []
    for name in options.target or TARGETS:
        target, cases = TARGETS[name], options.cases
        if options.quick:
            target, cases = replace(target, environment={}), target.quick
        tally = runner.run(
            target, seed=options.seed, seconds=60 * options.minutes, cases=cases, found=options.found
        )
        row = {outcome: tally.outcomes[outcome] for outcome in (oracle.ACCEPTED, oracle.REFUSED, oracle.VIOLATION)}
        rows.append(
            {"target": name, "seed": options.seed, "cases": tally.cases, **row, "cpu_seconds": round(tally.cpu)}
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        for place, why in tally.found:
            print(f"{place}:\n{why}", flush=True)
        if options.results:
            _record(options.results, rows[-1])
        if tally.interrupted:
            return 130
    return int(any(row["violation"] for row in rows))


def _record(path: Path, row: dict[str, Any]) -> None:
    """Put a target's row in place of its last one."""
    known = json.loads(path.read_text("utf-8"))["targets"] if path.exists() else []
    rows = {one["target"]: one for one in known} | {row["target"]: row}
    report = {"machine": system.machine(), "targets": [rows[name] for name in TARGETS if name in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _replay(cases: list[Path]) -> int:
    failed = 0
    for case in cases:
        outcome, why = runner.replay(case.resolve())
        failed += outcome == oracle.VIOLATION
        print(f"{case}: {outcome}\n{why}".rstrip())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
