"""Sparse least squares: which entries of a layer to change, and to what, so that its outputs come near to given ones.

A layer is fed ``x``, and its outputs are to change by ``t``. For a row ``s`` of the sparse change the error over all inputs is

    sum (s x - t)^2 + ridge |s|^2  =  s G s - 2 c s + sum t^2,    G = sum x x^T + ridge,    c = sum t x^T,

so that the Gram matrix ``G`` and the cross moments ``c`` say all. On a support ``P`` the best values are ``G_PP^-1 c_P``; an entry
``j`` beside it lowers the error by ``r_j^2 / (G_jj - G_jP G_PP^-1 G_Pj)``, where ``r = c - s G`` (orthogonal least squares: Chen,
Billings and Luo 1989). The support grows by the entries of all rows with the largest gains, a share of the budget at a time, and the
values are solved anew each time, as in orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CELLS = 1 << 24  # of the matrices that are solved together


@dataclass(frozen=True)
class Problem:
    """Least squares for all rows of a layer.

    Attributes:
        gram: ``[groups, width, width]`` ``G``, positive definite; the rows of a group share one.
        cross: ``[groups, rows, width]`` ``c``.
    """

    gram: Tensor
    cross: Tensor

    @property
    def diagonal(self) -> Tensor:
        """``[groups, 1, width]``."""
        return self.gram.diagonal(dim1=1, dim2=2)[:, None]

    def gained(self, change: Tensor) -> float:
        """By how much a change ``[groups, rows, width]`` lowers the error: ``2 c s - s G s``, summed over the rows."""
        return float(((2 * self.cross - change @ self.gram) * change).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Solution:
    """Values on a support.

    Attributes:
        support: bool ``[groups, rows, width]``.
        change: of the weight, the same shape; 0 beside the support.
    """

    support: Tensor
    change: Tensor


def solve(problem: Problem, support: Tensor) -> Solution:
    """The best values on a support: exact least squares in each row."""
    return Solution(support, _solved(problem, support, None))


def grow(problem: Problem, budget: int, *, rounds: int) -> Solution:
    """Choose ``budget`` entries of all rows by their gains, in so many rounds, and solve for their values.

    The gains of a row's entries depend on each other, so that in a round no row gets more than twice its share.
    """
    shape = problem.cross.shape
    support = torch.zeros(shape, dtype=torch.bool, device=problem.cross.device)
    change = torch.zeros_like(problem.cross)
    spare = problem.diagonal.expand(shape)
    floor = 1e-6 * problem.diagonal
    chosen = 0
    for number in range(min(rounds, budget)):
        gains = (problem.cross - change @ problem.gram).square_() / torch.maximum(spare, floor)
        gains = gains.masked_fill_(support, -1.0).view(-1, shape[2])
        count = -(-(budget - chosen) // (min(rounds, budget) - number))
        each = min(shape[2], max(1, -(-2 * count // len(gains))))
        best, places = gains.topk(each)
        best, order = best.view(-1).topk(count)
        order = order[best >= 0]
        support.view(-1, shape[2])[order // each, places.view(-1)[order]] = True
        chosen += len(order)
        spare = problem.diagonal.expand(shape).clone(memory_format=torch.contiguous_format)
        change = _solved(problem, support, spare)
    if chosen < budget:  # rows that were full before others had their share
        support.view(-1)[(~support).view(-1).nonzero()[: budget - chosen, 0]] = True
        change = _solved(problem, support, None)
    return Solution(support, change)


def _solved(problem: Problem, support: Tensor, spare: Tensor | None) -> Tensor:
    """The best values ``[groups, rows, width]``; from ``spare``, of that shape, ``G_jP G_PP^-1 G_Pj`` is taken away."""
    _, rows, width = support.shape
    change = torch.zeros_like(problem.cross)
    flat = support.view(-1, width)
    for which, places, inside in _packed(flat):
        group = (which // rows)[:, None]
        both = inside[:, :, None] & inside[:, None, :]
        square = problem.gram[group[:, :, None], places[:, :, None], places[:, None, :]].mul_(both)
        square.diagonal(dim1=1, dim2=2).add_(~inside)
        lower = torch.linalg.cholesky(square)
        wanted = problem.cross.view(-1, width)[which[:, None], places].mul_(inside)
        values = torch.cholesky_solve(wanted[:, :, None], lower)[:, :, 0].mul_(inside)
        # Places beside a row's support all point to column 0, where adding their zeros changes nothing.
        change.view(-1, width).index_put_((which[:, None].expand_as(places), places), values, accumulate=True)
        if spare is not None:
            beside = problem.gram[group, places].mul_(inside[:, :, None])
            solved = torch.linalg.solve_triangular(lower, beside, upper=False)
            spare.view(-1, width)[which] -= solved.square_().sum(1)
    return change


def _packed(support: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows ``[n]`` with supports of similar size, the columns of these ``[n, most]``, and which of the columns are meant."""
    width = support.shape[1]
    counts = support.sum(1)
    order = counts.argsort(stable=True)
    sizes = counts[order].tolist()
    start = next((number for number, size in enumerate(sizes) if size), len(sizes))
    while start < len(sizes):
        end = start + 1
        while (
            end < len(sizes)
            and sizes[end] <= 1.25 * sizes[start] + 4
            and (end + 1 - start) * sizes[end] * max(width, sizes[end]) <= _CELLS
        ):
            end += 1
        which, most = order[start:end], sizes[end - 1]
        row, column = support[which].nonzero(as_tuple=True)
        count = counts[which]
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        places = torch.zeros(end - start, most, dtype=torch.int64, device=row.device)
        places[row, slot] = column
        yield which, places, torch.arange(most, device=row.device) < count[:, None]
        start = end
