"""Whether two adapters disturb each other in *feature* space: on inputs that a layer really gets.

AWOM and AWOR look at weights alone, and say what may happen for the worst or for a random input. Here the outputs that two
deltas ``D1, D2`` of one weight add, ``y1 = D1 x`` and ``y2 = D2 x``, are compared over inputs ``x``. All that depends on
their mean products follows from the inputs' second moments ``C = E[x x^T]``: ``E<y1, y2> = tr(D1 C D2^T)``. With ``C = I``
it is ``tr(D1^T D2)``, the inner product of the weights; so a pair that is orthogonal in its weights may well disturb each
other on inputs that are far from white, and the other way round.
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

_LONG = 1 << 12  # pairs of entries from which on a segment is worth a product of its own
_PAIRS = 1 << 20  # pairs at a time
_CELLS = 1 << 22  # outputs at a time


@dataclass(frozen=True)
class Interference(Additive):
    """Mean products of two adapters' outputs, of one layer or, added up with ``+``, of several.

    The outputs are seen as random vectors, with ``E<y, z>`` as their inner product.

    Attributes:
        inner: ``E<y1, y2>``.
        first: ``E|y1|^2``, the energy of the first adapter's output.
        second: ``E|y2|^2``.
        along_first_energy: ``E<y1, y2>^2 / E|y1|^2``, the energy of the projection of ``y2`` onto ``y1``; of several layers, the
            sum of theirs, which opposite signs of ``inner`` in two layers do not lessen.
        along_second_energy: ``E<y1, y2>^2 / E|y2|^2``, likewise.
        projected_first: ``E[<y1, y2>^2 / |y1|^2]``, the energy of what the second adds along the first's output at each
            input by itself; None if only moments are known, of which it is no function. Of moments with some inputs beside
            them, the share over these times ``first``.
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
        """``E<y1, y2> / sqrt(E|y1|^2 E|y2|^2)``: 0 is no interference on the mean; None if one adapter does nothing.

        Of several layers, that of all outputs as one vector: a layer where the two agree and one where they oppose each other
        cancel.
        """
        return cosine(self.inner, self.first, self.second)

    @property
    def along_first(self) -> float | None:
        """``E<y1, y2> / E|y1|^2``: the multiple of ``y1`` that is nearest to ``y2``.

        With both adapters on, the first's output is there ``1 + along_first`` times: -1 cancels it, 1 doubles it.
        """
        return self.inner / self.first if self.first else None

    @property
    def along_second(self) -> float | None:
        """``E<y1, y2> / E|y2|^2``."""
        return self.inner / self.second if self.second else None

    @property
    def disturbed_first(self) -> float | None:
        """The energy of the projection of ``y2`` onto ``y1`` over the energy of ``y1``: of one layer, ``along_first`` squared.

        What the second adapter does to the first's own direction, in units of the first; above 1 where it does more there
        than the first itself. The projection is that of a layer's outputs on all inputs at once, so that what the second adds on
        some inputs and takes away on others cancels; from layer to layer nothing does.
        """
        return self.along_first_energy / self.first if self.first else None

    @property
    def disturbed_second(self) -> float | None:
        """The same of the second adapter by the first."""
        return self.along_second_energy / self.second if self.second else None

    @property
    def disturbed_first_each(self) -> float | None:
        """Like ``disturbed_first``, with the projection at each input by itself; gains and losses do not cancel.

        Never below ``disturbed_first`` on the same inputs; outputs in random directions of ``out`` dimensions have about
        ``second / first / out``.
        """
        return self.projected_first / self.first if self.projected_first is not None and self.first else None

    @property
    def disturbed_second_each(self) -> float | None:
        """The same of the second adapter by the first."""
        return self.projected_second / self.second if self.projected_second is not None and self.second else None

    @property
    def disturbed(self) -> tuple[float | None, float | None]:
        """Of the first and of the second."""
        return self.disturbed_first, self.disturbed_second

    @property
    def disturbed_each(self) -> tuple[float | None, float | None]:
        """Of the first and of the second, at each input by itself."""
        return self.disturbed_first_each, self.disturbed_second_each

    def as_json(self) -> dict[str, Any]:
        """All measures; what is undefined or unknown is null."""
        return attributes(
            self, "inner", "energy_first=first", "energy_second=second", "cosine", "along_first", "along_second",
            "disturbed_first", "disturbed_second", "disturbed_first_each", "disturbed_second_each",
        )  # fmt: skip


def interference(a: Any, b: Any, inputs: Moment | Array, *, inputs_first: bool = False) -> Interference:
    """Compare what two adapters add to the outputs of one layer.

    Args:
        a: the first adapter's :class:`SparseTensor`, or its deltas as a sparse matrix in the matrix view, in float64.
        b: the second's, of the same shape.
        inputs: their second moments (perhaps with some inputs), or the inputs themselves, floats ``[samples, in]``.
        inputs_first: of inputs themselves: the weight is ``[in, out]``. A :class:`Moment` says so itself.

    Raises:
        SourceError: shapes that do not fit each other, inputs that are not finite or none, and see :func:`delta_matrix`.
        BaseRequired: target values without those of the base.
    """
    first, second = (delta_matrix(side) if isinstance(side, SparseTensor) else side for side in (a, b))
    if first.shape != second.shape:
        raise SourceError(f"deltas of shapes {list(first.shape)} and {list(second.shape)} are of no common weight")
    if inputs.inputs_first if isinstance(inputs, Moment) else inputs_first:
        first, second = first.T, second.T
    first, second = _sorted(first), _sorted(second)
    if not isinstance(inputs, Moment):
        return _of_inputs(first, second, inputs)
    outputs, width = first.shape
    if width != inputs.width or outputs % inputs.groups:
        raise SourceError(
            f"moments of {inputs.weight!r} are of inputs of {inputs.width} in {inputs.groups} groups, "
            f"the adapters' deltas are {outputs} outputs by {width} inputs"
        )
    inner, of_first, of_second = (
        _bilinear(*pair, inputs) for pair in ((first, second), (first, first), (second, second))
    )
    for value in (inner, of_first, of_second):
        finite(value, f"a mean product of the outputs of {inputs.weight!r}")
    if inputs.tokens:
        return _of_means(inner, of_first, of_second, *_at_tokens(first, second, inputs.blocks.reshape(-1)[:width]))
    if inputs.inputs is None:
        return _of_means(inner, of_first, of_second, None, None)
    _, first_energy, second_energy, along_first, along_second = _means_of(first, second, inputs.inputs)
    # The shares are those of the inputs that were kept, the energies those of all.
    return _of_means(
        inner, of_first, of_second,
        along_first / first_energy * of_first if first_energy else 0.0,
        along_second / second_energy * of_second if second_energy else 0.0,
    )  # fmt: skip


def _at_tokens(first: Any, second: Any, frequencies: Array) -> tuple[float, float]:
    """Both projections at each token, whose output is a column of the matrices."""

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


def _of_inputs(first: Any, second: Any, inputs: Array) -> Interference:
    width = first.shape[1]
    if inputs.ndim != 2 or inputs.shape[1] != width or not len(inputs):
        raise SourceError(f"inputs of shape {list(inputs.shape)} for deltas of {width} inputs")
    return _of_means(*_means_of(first, second, inputs[:, None, :]))


def _means_of(first: Any, second: Any, inputs: Array) -> tuple[float, float, float, float, float]:
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


def _of_means(
    inner: float, first: float, second: float, each_first: float | None, each_second: float | None
) -> Interference:
    """Of one layer."""
    first, second = max(0.0, first), max(0.0, second)  # not below 0 by rounding
    # Not inner^2 / energy: a square of what is small may vanish where their ratio does not.
    along_first, along_second = (inner / energy * inner if energy else 0.0 for energy in (first, second))
    return Interference(inner, first, second, along_first, along_second, each_first, each_second)


def _bilinear(first: Any, second: Any, moment: Moment) -> float:
    """``tr(first C second^T)``, from the cells of ``C`` at which an entry of each meets one of the other's in its row.

    A segment is what one row has within one block of ``C``. Entries of a segment follow each other, and their product with
    those of the other's segment needs no more of ``C`` than their own rows and columns.
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
        with np.errstate(over="ignore", invalid="ignore"):  # told by whoever asks
            return _bilinear_plainly(
                spans[0], at_first, first.data, spans[1], at_second, second.data, squares, which
            )
    return float(bilinear(spans[0], at_first, first.data, spans[1], at_second, second.data, squares, which))


def _segments(matrix: Any, moment: Moment) -> tuple[tuple[Array, Array], Array]:
    """The rising keys ``row * blocks + block`` with start and stop of each, and the places of all entries in their block."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    block, place = np.divmod(matrix.indices.astype(np.int64), moment.size)
    keys = rows * moment.blocks.shape[1] + block
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    spans = np.stack([starts, np.append(starts[1:], keys.size)[: starts.size]], axis=1)
    return (keys[starts], spans), place


def _bilinear_plainly(
    first: Array, first_at: Array, first_values: Array,
    second: Array, second_at: Array, second_values: Array, squares: Array, which: Array,
) -> float:  # fmt: skip
    """See :func:`shira_analysis.measures.product_kernels.bilinear`."""
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
