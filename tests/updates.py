"""Updates as whole arrays, and all of a LoRA put into a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from shira_format._core.arrays import Array
from shira_format.convert import lora_to_shira
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora.base import Update


def dense(update: Update, step: int = 7) -> Array:
    """All of an update in its weight's shape, computed a few rows at a time."""
    rows = int(np.prod(update.shape)) // update.columns
    out = np.full((rows, update.columns), np.nan, update.dtype)
    for start in range(0, rows, step):
        update.tile(start, min(start + step, rows), out[start : start + step])
    return out.reshape(update.shape)


def close(expected: Array, found: Array) -> None:
    """Equal to the rounding of float32, and not because both are nothing."""
    assert expected.shape == found.shape
    scale = float(np.abs(expected).max())
    assert scale > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


def merge(lora: Path, base: Path, model: nn.Module, folder: Path) -> nn.Module:
    """``model`` (changed in place) with every entry that the LoRA changes, by our own conversion."""
    lora_to_shira(lora, base, folder / "everything.st", density=1.0)
    apply(load(folder / "everything.st"), model.state_dict())
    return model
