"""That the targets of long sequences see faults: mutants of the product, each of which must be a violation within some cases."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fuzz.faults import FAULTS
from tests.test_fuzz import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="a fault is in the child processes only if they are forked")
@pytest.mark.parametrize("target", sorted({fault.target for fault in FAULTS}))
def test_faults_are_seen(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.faults", "--target", target],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["fault"] for row in rows] == [fault.about for fault in FAULTS if fault.target == target], (
        done.stderr
    )
    assert not [row["fault"] for row in rows if row["cases"] is None]
