"""DoRA's norms in tiles, against the whole weight in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shira_format.checkpoints import open_checkpoint
from shira_format.lora import decomposed
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.products import LowRank
from tests import models


@pytest.mark.parametrize("rows", [40, 7000])  # less and more than the tiles in which norms of columns are computed
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("kernel", [1, 4])
def test_tiles_in_any_order(rows: int, by_column: bool, kernel: int, tmp_path: Path) -> None:
    """The first tile that is asked for may be any, and norms are computed when it is."""
    columns = 48
    assert (rows * columns > decomposed._TILE) == (rows > 40)  # noqa: SLF001
    rng = np.random.default_rng(rows)
    weight, up, down = (rng.standard_normal(shape) for shape in ((rows, columns), (rows, 2), (2, columns)))
    base = open_checkpoint(models.save_arrays(tmp_path / "base.safetensors", {"w": weight}))
    update = LowRank("w", weight.shape, up, down)
    summed = weight + up @ down
    if by_column:
        magnitude = rng.random(columns // kernel)
        norms = np.sqrt((summed**2).sum(0).reshape(-1, kernel).sum(1))
        wanted = summed * np.repeat(magnitude / norms, kernel) - weight
    else:
        magnitude = rng.random(rows)
        wanted = summed * (magnitude / np.sqrt((summed**2).sum(1)))[:, None] - weight
    for first in (0, 8, rows - 8):
        made = Decomposed(update, base, magnitude, by_column, kernel if by_column else 1)
        found = np.empty((8, columns))
        made.tile(first, first + 8, found)
        np.testing.assert_allclose(found, wanted[first : first + 8], rtol=1e-12, atol=1e-12)
