"""Exact ranks of integer matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.arrays import Array

PRIME = 2**31 - 1  # products of two residues fit int64
_BAREISS_SIDE = 48  # the shorter side up to which Bareiss elimination is fast


def rank(matrix: Any) -> int:
    """The rank of an integer matrix.

    The rank modulo a prime never exceeds the rank over the rationals. If it is full (zero rows and columns aside), it is the rank.
    Otherwise fraction-free elimination (Bareiss) in Python integers decides if the shorter side is at most 48; for larger matrices the
    rank modulo the prime is returned, which for random integers is too low with a probability of at most about 1e-7.
    """
    a = np.asarray(matrix)
    a = a[(a != 0).any(axis=1)][:, (a != 0).any(axis=0)] if a.size else a.reshape(0, 0)
    if not a.size:
        return 0
    found = rank_modulo(a)
    if found == min(a.shape) or min(a.shape) > _BAREISS_SIDE:
        return found
    return _bareiss([[int(value) for value in row] for row in a])


def rank_modulo(matrix: Array) -> int:
    """The rank of an integer matrix modulo 2^31 - 1: at most its rank."""
    a = np.mod(matrix, PRIME).astype(np.int64)
    if a.shape[0] > a.shape[1]:
        a = np.ascontiguousarray(a.T)
    found = 0
    for column in range(a.shape[1]):
        pivots = np.flatnonzero(a[found:, column])
        if not pivots.size:
            continue
        pivot = found + int(pivots[0])
        if pivot != found:
            a[[found, pivot]] = a[[pivot, found]]
        a[found, column:] = a[found, column:] * pow(int(a[found, column]), -1, PRIME) % PRIME
        below = found + 1 + np.flatnonzero(a[found + 1 :, column])
        if below.size:
            a[below, column:] = (a[below, column:] - a[below, column, None] * a[found, column:]) % PRIME
        found += 1
        if found == a.shape[0]:
            break
    return found


def _bareiss(a: list[list[int]]) -> int:
    rows, columns = len(a), len(a[0])
    found, before = 0, 1
    for column in range(columns):
        pivot = next((row for row in range(found, rows) if a[row][column]), None)
        if pivot is None:
            continue
        a[found], a[pivot] = a[pivot], a[found]
        top = a[found]
        for row in range(found + 1, rows):
            head, other = a[row][column], a[row]
            # The division is exact: both sides are minors of the matrix.
            a[row] = [(top[column] * other[k] - head * top[k]) // before for k in range(columns)]
        before = top[column]
        found += 1
        if found == rows:
            break
    return found
