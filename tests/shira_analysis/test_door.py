"""The names of ``import shira_analysis``: what is public, and that nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import shira_analysis

PUBLIC = {
    "accuracy", "analyse_merge", "awom", "awor", "check_merge", "collect_moments", "effect", "interference", "measure",
    "measure_lora", "measure_pairs", "orthogonality", "overlap", "plot_dimension", "plot_layers", "plot_mask",
    "plot_orthogonality", "plot_overlap", "plot_spectrum", "rank", "report", "verify_lemmas",
}  # fmt: skip


def test_public_names_and_no_others() -> None:
    assert PUBLIC == set(dir(shira_analysis)) == set(shira_analysis.__all__)
    for name in PUBLIC:
        assert callable(getattr(shira_analysis, name)), name


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, shira_analysis; print({'scipy', 'torch', 'matplotlib', 'transformers'} & {*sys.modules})"
    assert (
        "set()"
        == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
