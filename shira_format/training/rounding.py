"""From float32 values to a narrower weight: to nearest, or at random in proportion to what is between (stochastic rounding)."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


def generator(seed: int, name: str, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one weight in one step: a run that is resumed draws what it would have drawn."""
    mixed = zlib.crc32(f"{seed} {step} {name}".encode())
    return torch.Generator(device).manual_seed(mixed)


def rounded(values: Tensor, dtype: torch.dtype, draw: torch.Generator | None = None) -> Tensor:
    """``values`` in ``dtype``, a tensor of the same shape.

    Args:
        values: floats.
        dtype: of the result.
        draw: None rounds to nearest, ties to even. Otherwise each value becomes one of its two neighbours, the nearer one
            with the higher probability, so that the expected result is the value; what lies beyond the largest finite
            number is rounded to nearest.
    """
    near = values.to(dtype)
    if draw is None or dtype == values.dtype or dtype.itemsize >= values.dtype.itemsize:
        return near
    missing = values - near.to(values.dtype)
    other = _neighbour(near, up=missing > 0)
    gap = (other.to(values.dtype) - near.to(values.dtype)).abs()
    chance = torch.rand(values.shape, generator=draw, dtype=values.dtype, device=values.device)
    take = (missing != 0) & (chance * gap < missing.abs()) & torch.isfinite(other) & torch.isfinite(near)
    return torch.where(take, other, near)


def _neighbour(near: Tensor, *, up: Tensor) -> Tensor:
    """The next number of a 16-bit float dtype above, or below, each one."""
    bits = near.view(torch.int16)
    # Sign and magnitude: away from zero is the next larger pattern, toward zero the next smaller one.
    away = up == (near > 0)
    moved = torch.where(away, bits + 1, bits - 1)
    smallest = torch.where(up, 1, -0x7FFF).to(torch.int16)  # next to zero: the smallest subnormal of either sign
    return torch.where(near == 0, smallest, moved).view(near.dtype)
