"""Whether two adapters interfere in *feature* space: on the inputs that a layer actually sees.

AWOM and AWOR use weights alone, so they describe a worst-case or a random input. Here the outputs that two deltas ``D1, D2`` of
one weight add, ``y1 = D1 x`` and ``y2 = D2 x``, are compared over inputs ``x``. Mean products follow from the inputs' second
moments ``C = E[x x^T]``: ``E<y1, y2> = tr(D1 C D2^T)``. With ``C = I`` this is ``tr(D1^T D2)``, the inner product of the
weights; so deltas with orthogonal weights can interfere on inputs that are far from white, and vice versa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_analysis.measures.additive import Additive, attributes
from shira_analysis.measures.deltas import delta_matrix
from shira_analysis.measures.overlap import cosine, finite, shared_positions
from shira_format._core.arrays import Array
from shira_format.calibration.moments import Moment
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

_LONG = 1 << 12  # a segment with at least this many pairs of entries gets its own matrix product
_PAIRS = 1 << 20  # pairs per batch
_CELLS = 1 << 22  # outputs per batch


@dataclass(frozen=True)
class Interference(Additive):
    """Mean products of two adapters' outputs, for one layer or, added with ``+``, several.

    Outputs are treated as random vectors with the inner product ``E<y, z>``.

    Attributes:
        inner: ``E<y1, y2>``.
        first: ``E|y1|^2``, the energy (the mean sum of squares) of the first adapter's output.
        second: ``E|y2|^2``.
        along_first_energy: ``E<y1, y2>^2 / E|y1|^2``, the energy of the projection of ``y2`` onto ``y1``; summed over
            layers, so opposite signs of ``inner`` do not cancel.
        along_second_energy: ``E<y1, y2>^2 / E|y2|^2``, likewise.
        projected_first: ``E[<y1, y2>^2 / |y1|^2]``, the energy of ``y2`` projected onto ``y1`` per input; None if only moments
            are known, which do not determine it. For moments with sample inputs, the share over the samples times ``first``.
        projected_second: ``E[<y1, y2>^2 / |y2|^2]``.
    """

    inner: float = 0.0
    first: float = 0.0
    second: float = 0.0
    along_first_energy: float = 0.0
    along_second_energy: float = 0.0
    projected_first: float | None = 0.0
    projected_second: float | None = 0.0

    @property
    def cosine(self) -> float | None:
        """``E<y1, y2> / sqrt(E|y1|^2 E|y2|^2)``: 0 means no interference on average; None if one output is zero.

        For several layers, the cosine of all outputs as one vector: agreement in one layer and opposition in another cancel.
        """
        return cosine(self.inner, self.first, self.second)

    @property
    def along_first(self) -> float | None:
        """``E<y1, y2> / E|y1|^2``: the multiple of ``y1`` closest to ``y2``.

        With both adapters applied, the first's output is scaled by ``1 + along_first``: -1 cancels it, 1 doubles it.
        """
        return self.inner / self.first if self.first else None

    @property
    def along_second(self) -> float | None:
        """``E<y1, y2> / E|y2|^2``."""
        return self.inner / self.second if self.second else None

    @property
    def disturbed_first(self) -> float | None:
        """The energy of the projection of ``y2`` onto ``y1`` over the energy of ``y1``; for one layer, ``along_first`` squared.

        How much the second adapter changes the first's output along its own direction; above 1, more than the first does.
        The projection is over all inputs of a layer at once: opposite signs on different inputs cancel, but not across layers.
        """
        return self.along_first_energy / self.first if self.first else None

    @property
    def disturbed_second(self) -> float | None:
        """The same for the second adapter, changed by the first."""
        return self.along_second_energy / self.second if self.second else None

    @property
    def disturbed_first_each(self) -> float | None:
        """Like ``disturbed_first``, but projected per input, so that opposite signs do not cancel.

        At least ``disturbed_first`` on the same inputs; about ``second / first / out`` for outputs in random directions of
        ``out`` dimensions.
        """
        return self.projected_first / self.first if self.projected_first is not None and self.first else None

    @property
    def disturbed_second_each(self) -> float | None:
        """The same for the second adapter, changed by the first."""
        return self.projected_second / self.second if self.projected_second is not None and self.second else None

    @property
    def disturbed(self) -> tuple[float | None, float | None]:
        """``disturbed_first`` and ``disturbed_second``."""
        return self.disturbed_first, self.disturbed_second

    @property
    def disturbed_each(self) -> tuple[float | None, float | None]:
        """``disturbed_first_each`` and ``disturbed_second_each``."""
        return self.disturbed_first_each, self.disturbed_second_each

    def as_json(self) -> dict[str, Any]:
        """All measures; undefined or unknown ones are null."""
        return attributes(
            self, "inner", "energy_first=first", "energy_second=second", "cosine", "along_first", "along_second",
            "disturbed_first", "disturbed_second", "disturbed_first_each", "disturbed_second_each",
        )  # fmt: skip


def interference(a: Any, b: Any, inputs: Moment | Array, *, inputs_first: bool = False) -> Interference:
    """Compare the outputs that two adapters add to one layer.

    Args:
        a: the first adapter's :class:`SparseTensor`, or its deltas as a sparse matrix in the matrix view, in float64.
        b: the second's, of the same shape.
        inputs: the inputs' second moments (optionally with sample inputs), or the inputs, floats ``[samples, in]``.
        inputs_first: the weight is ``[in, out]``; ignored for a :class:`Moment`, which records it.

    Raises:
        SourceError: shapes do not match, inputs are empty or not finite; see also :func:`delta_matrix`.
        BaseRequired: target values without base values.
    """
    first, second = (delta_matrix(side) if isinstance(side, SparseTensor) else side for side in (a, b))
    if first.shape != second.shape:
        raise SourceError(f"the deltas have different shapes: {list(first.shape)} and {list(second.shape)}")
    if inputs.inputs_first if isinstance(inputs, Moment) else inputs_first:
        first, second = first.T, second.T
    first, second = _sorted(first), _sorted(second)
    if not isinstance(inputs, Moment):
        return _from_inputs(first, second, inputs)
    outputs, width = first.shape
    if width != inputs.width or outputs % inputs.groups:
        raise SourceError(
            f"the moments of {inputs.weight!r} have {inputs.width} inputs in {inputs.groups} groups, "
            f"but the deltas have {outputs} outputs and {width} inputs"
        )
    inner, of_first, of_second = (
        _bilinear(*pair, inputs) for pair in ((first, second), (first, first), (second, second))
    )
    for value in (inner, of_first, of_second):
        finite(value, f"a mean product of the outputs of {inputs.weight!r}")
    if inputs.tokens:
        return _from_means(
            inner, of_first, of_second, *_projections_per_token(first, second, inputs.blocks.reshape(-1)[:width])
        )
    if inputs.inputs is None:
        return _from_means(inner, of_first, of_second, None, None)
    _, first_energy, second_energy, along_first, along_second = _means_over_inputs(first, second, inputs.inputs)
    # Shares come from the sample inputs, energies from all inputs.
    return _from_means(
        inner, of_first, of_second,
        along_first / first_energy * of_first if first_energy else 0.0,
        along_second / second_energy * of_second if second_energy else 0.0,
    )  # fmt: skip


def _projections_per_token(first: Any, second: Any, frequencies: Array) -> tuple[float, float]:
    """Both mean projections over tokens; a token's output is a column of the matrices."""

    def sums(matrix: Any) -> Array:
        return np.bincount(matrix.indices, matrix.data, frequencies.size)

    both, e1, e2 = (sums(a.multiply(b).tocsr()) for a, b in ((first, second), (first, first), (second, second)))
    along = [float(frequencies[e > 0] @ (both[e > 0] ** 2 / e[e > 0])) for e in (e1, e2)]
    return along[0], along[1]


def _sorted(matrix: Any) -> Any:
    matrix = matrix.tocsr()
    if not matrix.has_sorted_indices:
        matrix = matrix.sorted_indices()
    return matrix


def _from_inputs(first: Any, second: Any, inputs: Array) -> Interference:
    width = first.shape[1]
    if inputs.ndim != 2 or inputs.shape[1] != width or not len(inputs):
        raise SourceError(f"the inputs have shape {list(inputs.shape)}, but the deltas have {width} inputs")
    return _from_means(*_means_over_inputs(first, second, inputs[:, None, :]))


def _means_over_inputs(first: Any, second: Any, inputs: Array) -> tuple[float, float, float, float, float]:
    """``E<y1, y2>``, ``E|y1|^2``, ``E|y2|^2`` and both projections over inputs ``[samples, groups, width]``."""
    groups = inputs.shape[1]
    outputs = first.shape[0] // groups
    spans = [slice(group * outputs, (group + 1) * outputs) for group in range(groups)]
    parts = [(first, second)] if groups == 1 else [(first[span], second[span]) for span in spans]
    inner = of_first = of_second = along_first = along_second = 0.0
    step = max(1, _CELLS // max(1, outputs, inputs.shape[2]))
    for start in range(0, len(inputs), step):
        some = np.asarray(inputs[start : start + step], np.float64)
        if not np.isfinite(some).all():
            raise SourceError("an input is NaN or infinite")
        both, e1, e2 = np.zeros((3, len(some)))
        for group, (a, b) in enumerate(parts):
            y1, y2 = a @ some[:, group].T, b @ some[:, group].T
            for sums, y, z in ((both, y1, y2), (e1, y1, y1), (e2, y2, y2)):
                np.add(sums, np.einsum("os,os->s", y, z), out=sums)
        inner, of_first, of_second = inner + both.sum(), of_first + e1.sum(), of_second + e2.sum()
        along_first += float(np.sum(both[e1 > 0] ** 2 / e1[e1 > 0]))
        along_second += float(np.sum(both[e2 > 0] ** 2 / e2[e2 > 0]))
    means = np.array([inner, of_first, of_second, along_first, along_second]) / len(inputs)
    return float(means[0]), float(means[1]), float(means[2]), float(means[3]), float(means[4])


def _from_means(
    inner: float, first: float, second: float, each_first: float | None, each_second: float | None
) -> Interference:
    """The measures of one layer from its mean products."""
    first, second = max(0.0, first), max(0.0, second)  # rounding could make them negative
    # Not inner^2 / energy: the square of a small number may underflow.
    along_first, along_second = (inner / energy * inner if energy else 0.0 for energy in (first, second))
    return Interference(inner, first, second, along_first, along_second, each_first, each_second)


def _bilinear(first: Any, second: Any, moment: Moment) -> float:
    """``tr(first C second^T)``, using only the cells of ``C`` that pair entries of the same row.

    A segment is the entries of one row within one block of ``C``. They are contiguous, and the product of two segments needs
    only their own rows and columns of ``C``.
    """
    (of_first, at_first), (of_second, at_second) = (_segments(matrix, moment) for matrix in (first, second))
    in_first, in_second = shared_positions(of_first[0], of_second[0])
    keys = of_first[0][in_first]
    blocks = moment.blocks.shape[1]
    groups = keys // blocks // max(1, first.shape[0] // moment.groups)
    which = groups * blocks + keys % blocks
    spans = [of[1][chosen] for of, chosen in ((of_first, in_first), (of_second, in_second))]
    squares = moment.blocks.reshape(-1, moment.size, moment.size)
    try:
        from shira_analysis.measures.product_kernels import bilinear
    except ImportError:
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks
            return _bilinear_numpy(
                spans[0], at_first, first.data, spans[1], at_second, second.data, squares, which
            )
    return float(bilinear(spans[0], at_first, first.data, spans[1], at_second, second.data, squares, which))


def _segments(matrix: Any, moment: Moment) -> tuple[tuple[Array, Array], Array]:
    """Increasing keys ``row * blocks + block`` with the start and stop of each, and every entry's position in its block."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    block, place = np.divmod(matrix.indices.astype(np.int64), moment.size)
    keys = rows * moment.blocks.shape[1] + block
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    spans = np.stack([starts, np.append(starts[1:], keys.size)[: starts.size]], axis=1)
    return (keys[starts], spans), place


def _bilinear_numpy(
    first: Array, first_at: Array, first_values: Array,
    second: Array, second_at: Array, second_values: Array, squares: Array, which: Array,
) -> float:  # fmt: skip
    """The fallback without numba; see :func:`shira_analysis.measures.product_kernels.bilinear`."""
    counts = [spans[:, 1] - spans[:, 0] for spans in (first, second)]
    pairs = counts[0] * counts[1]
    total = 0.0
    for i in np.flatnonzero(pairs >= _LONG):
        one, other = slice(*first[i]), slice(*second[i])
        cells = squares[which[i]][np.ix_(first_at[one], second_at[other])]
        total += float(first_values[one] @ cells @ second_values[other])
    short = np.flatnonzero(pairs < _LONG)
    ends = np.cumsum(pairs[short])
    start = 0
    while start < short.size:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS, side="right")))
        chosen = short[start:stop]
        segment = np.repeat(chosen, pairs[chosen])
        number = np.arange(segment.size) - np.repeat(ends[start:stop] - pairs[chosen] - before, pairs[chosen])
        i = first[segment, 0] + number // counts[1][segment]
        j = second[segment, 0] + number % counts[1][segment]
        total += float((first_values[i] * squares[which[segment], first_at[i], second_at[j]]) @ second_values[j])
        start = stop
    return total
