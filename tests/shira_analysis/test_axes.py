"""Plots on axes of one's own: they draw what the pictures of the command draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shira_analysis as an
from shira_format.adapter import Adapter
from shira_format.format import save
from shira_format.tensors import SparseTensor

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = []
    for number in range(3):
        indices = np.sort(random.choice(48, 12, replace=False))
        values = random.normal(size=12).astype(np.float32)
        paths.append(tmp_path / f"{number}.st")
        save(Adapter([SparseTensor(NAME, (6, 8), indices, values, base=np.zeros(12, np.float32))]), paths[-1])
    return paths


def axes() -> object:
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_mask_layers_and_spectrum(adapters: list[Path]) -> None:
    ax = an.plot_mask(adapters[0], NAME, axes(), side=8)
    assert pytest.approx(100 * 12 / 48) == ax.images[0].get_array().mean()
    ax = an.plot_layers(adapters[0], axes(), what="density")
    assert pytest.approx(100 * 12 / 48) == ax.images[0].get_array()[0, 0]
    ax = an.plot_spectrum(adapters[0], NAME, axes())
    dense = np.zeros(48, np.float32)
    from shira_format.format import load

    tensor = load(adapters[0])[NAME]
    dense[tensor.indices] = tensor.values
    drawn = ax.lines[0].get_ydata()  # without those that rounding makes of 0
    assert np.linalg.svd(dense.reshape(6, 8), compute_uv=False)[: len(drawn)] == pytest.approx(drawn, rel=1e-5)


def test_pairs(adapters: list[Path]) -> None:
    ax = an.plot_overlap(adapters, axes())
    pairs = an.measure_pairs(adapters)
    assert pytest.approx(100 * pairs[0].whole.overlap.jaccard) == ax.images[0].get_array()[0, 1]
    for measure in ("awor", "awom"):
        ax = an.plot_orthogonality(adapters, axes(), measure=measure)
        assert pytest.approx(getattr(pairs[0].whole.product, measure)) == ax.images[0].get_array()[0, 1]


def test_dimension() -> None:
    ax = an.plot_dimension(axes(), measure="awom", dimensions_of=(16, 32))
    assert 2 == len(ax.lines[0].get_xdata())
