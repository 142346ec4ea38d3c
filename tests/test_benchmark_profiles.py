"""The benchmark of profiles on a small weight, and the page's table of it."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import profiles

ROOT = Path(__file__).parents[1]


def test_every_profile_of_every_load_and_the_table_of_them(tmp_path: Path) -> None:
    found = [row for load in profiles._loads(128) for row in profiles._profiles(load, tmp_path / "one.st")]
    assert len({row.case for row in found}) == len(found) == 4 * 3 * 3
    of = {row.case: row.ours for row in found}
    sizes = {case: ours for case, ours in of.items() if case.endswith("; size")}
    for case in ("1 %, random, seeded", "1 %, largest weights"):
        assert sizes[f"compact; {case}; size"] < sizes[f"plain; {case}; size"]
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    lines = hooks.profiles([asdict(row) for row in found]).splitlines()
    assert 2 + 4 * 3 == len(lines)
    assert f"| {sizes['plain; 1 %, any entries; size']:.1f} |" in next(
        line for line in lines if "| 1 %, any entries | plain |" in line
    )
    assert "" == hooks.profiles([{"case": "another", "ours": 1.0}])


def test_peers_decode_to_the_new_weight(tmp_path: Path) -> None:
    pytest.importorskip("pcodec")
    pytest.importorskip("zstandard")
    found = list(profiles._peers(profiles._step(128), tmp_path / "one.st"))  # asserts it
    assert 3 * 3 == len(found)
