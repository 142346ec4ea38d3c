"""Rotations from skew-symmetric matrices: Cayley's transform ``R = (I + Q) (I - Q)^-1``, less the identity.

What is computed is ``R - I = 2 Q (I - Q)^-1``, in float64: near the identity nothing cancels. ``I - Q`` is never singular for a
skew-symmetric ``Q``, whose eigenvalues are imaginary.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array


def cayley(skew: Array) -> Array:
    """``R - I`` in float64 of skew-symmetric matrices ``[..., b, b]``."""
    wide = skew.astype(np.float64)
    # Q and (I - Q)^-1 commute.
    return np.asarray(2 * np.linalg.solve(np.eye(wide.shape[-1]) - wide, wide))


def cayley_neumann(skew: Array, terms: int) -> Array:
    """``R - I`` of PEFT's series for :func:`cayley`: ``2 Q + 2 Q^2 + ...``, of which the last power counts once.

    Args:
        skew: ``[..., b, b]``.
        terms: ``num_cayley_neumann_terms``, with the identity; as in ``OFTRotationModule``, there is no power of its own for
            the fourth term: with 3 terms the last power is the third, with 4 too.
    """
    wide = skew.astype(np.float64)
    found = np.zeros_like(wide)
    if terms > 1:
        found += 2 * wide
    if terms > 2:
        power = wide @ wide
        found += 2 * power
        for _ in range(3, terms - 1):
            power = power @ wide
            found += 2 * power
        found += power @ wide
    return found


def skew_symmetric(upper: Array, size: int) -> Array:
    """``[n, size, size]`` in float64 with these elements above the diagonal, ``[n, size (size - 1) / 2]``, by rows."""
    found = np.zeros((len(upper), size, size), np.float64)
    rows, columns = np.triu_indices(size, 1)
    found[:, rows, columns] = upper
    found[:, columns, rows] = -upper.astype(np.float64)
    return found
