"""Matrices over all pairs of adapters: mask overlap, and orthogonality of the deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.figures.records import Record
from shira_analysis.figures.style import digits, distinct_labels, text_colour
from shira_analysis.measures.deltas import DeltaFile
from shira_analysis.measures.overlap import Overlap, overlap
from shira_analysis.measures.pairs import measure_pairs
from shira_format.calibration.moments import Moments
from shira_format.errors import SourceError

_BRACKETS = 6  # the most adapters for which cells have room for the expected values
WRITTEN = 10  # and for any number


@dataclass(frozen=True, eq=False)
class Matrix:
    """One measure of all pairs.

    Attributes:
        title: the measure and its unit.
        names: the adapters' names.
        values: float64 ``[adapters, adapters]``, symmetric; NaN on the diagonal and where there is no value.
        form: formats a value.
        log: whether the colour scale is logarithmic.
        scale: the colour map.
        ends: the ends of the colour scale; by default the smallest and largest value.
        expected: the values expected by chance, float64 ``[adapters, adapters]``, shown in brackets below the values; None if unknown.
        chance: the random model behind ``expected``, for the title.
    """

    title: str
    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    form: Callable[[float], str]
    log: bool = False
    scale: str = "viridis"
    ends: tuple[float, float] | None = None
    expected: npt.NDArray[np.float64] | None = None
    chance: str = ""

    @property
    def brackets(self) -> bool:
        """Whether the expected values are shown."""
        return self.expected is not None and len(self.names) <= _BRACKETS


def labels(files: Sequence[DeltaFile]) -> tuple[str, ...]:
    """Short names of files: without folders, unless two would be the same."""
    short = [file.path.name for file in files]
    return tuple(short if len(set(short)) == len(short) else [str(file.path) for file in files])


def overlaps(files: Sequence[DeltaFile]) -> dict[tuple[int, int], Overlap]:
    """The overlap of the masks of each pair, by their indices in ``files``; values are not compared, and no base is needed.

    Raises:
        SourceError: fewer than two adapters, or weights of the same name with different shapes.
        FormatError: a tensor is damaged.
    """
    if len(files) < 2:
        raise SourceError("a pair takes at least two adapters")
    found = dict.fromkeys(combinations(range(len(files)), 2), Overlap())
    for name in dict.fromkeys(name for file in files for name in file.names):
        tensors = [file.file.sparse(name) if name in file.names else None for file in files]
        for i, j in found:
            if tensors[i] is None and tensors[j] is None:
                continue
            try:
                found[i, j] += overlap(tensors[i], tensors[j], values=False)
            except SourceError as error:
                raise SourceError(f"{files[i].path} and {files[j].path}: {error}") from None
    return found


def overlap_matrices(files: Sequence[DeltaFile]) -> tuple[list[Matrix], list[Record]]:
    """Two matrices, the shared entries and their ratio to chance; and the records of all pairs."""
    names, found = labels(files), overlaps(files)
    jaccard = _filled(
        len(files), {at: None if one.jaccard is None else 100 * one.jaccard for at, one in found.items()}
    )
    times = _filled(
        len(files), {at: one.shared / one.expected if one.expected else None for at, one in found.items()}
    )
    matrices = [
        Matrix("shared entries, % of the union (Jaccard)", names, jaccard, lambda value: f"{digits(value, 3)} %"),
        Matrix("shared entries, ratio to chance", names, times, lambda value: f"{digits(value, 3)}×"),
    ]
    records = [
        {
            "first": names[i],
            "second": names[j],
            "shared": one.shared,
            "either": one.union,
            "jaccard": one.jaccard,
            "expected_shared": one.expected,
            "deviation": one.deviation,
        }
        for (i, j), one in found.items()
    ]
    return matrices, records


_PRODUCT = ("awor", "awor_structural", "awor_if_uniform", "awor_if_independent", "awom", "awom_if_independent")


def orthogonality_matrices(
    files: Sequence[DeltaFile],
    progress: Callable[[str], object] = lambda _: None,
    *,
    moments: Moments | None = None,
    transposed: bool = False,
) -> tuple[list[Matrix], list[Record]]:
    """Matrices of AWOR and AWOM over all weights that both adapt, with moments a third; and the records of all pairs.

    Args:
        files: at least two.
        progress: called with the name of each finished weight.
        moments: of the layers' inputs, for the third matrix: the cosine of what two adapters add to the outputs.
        transposed: measure ``A1 A2^T`` instead of ``A1^T A2``.

    Raises:
        SourceError, FormatError, BaseRequired, BaseMismatch: see :func:`shira_analysis.measures.pairs.measure_pairs`.
    """
    names, size = labels(files), len(files)
    pairs = measure_pairs(files, moments, transposed=transposed, progress=progress)
    whole = {at: pair.whole for at, pair in zip(combinations(range(size), 2), pairs, strict=True)}
    products = {at: one.transposed if transposed else one.product for at, one in whole.items()}
    known = {
        at: dict.fromkeys(_PRODUCT) if one is None else {key: getattr(one, key) for key in _PRODUCT}
        for at, one in products.items()
    }

    def of(key: str) -> npt.NDArray[np.float64]:
        return _filled(size, {at: numbers[key] for at, numbers in known.items()})

    product = "A₁A₂ᵀ" if transposed else "A₁ᵀA₂"
    matrices = [
        Matrix(
            f"AWOR: share of zeros in {product}", names, of("awor"), lambda value: f"{value:.4f}",
            ends=(0.0, 1.0), expected=of("awor_if_uniform"), chance="uniform masks",
        ),
        Matrix(
            f"AWOM: Frobenius norm of {product}", names, of("awom"), lambda value: digits(value, 3),
            scale="cividis", log=True, expected=of("awom_if_independent"), chance="values with random signs",
        ),
    ]  # fmt: skip
    met = {at: one.interference for at, one in whole.items()}
    if moments is not None:
        cosines = _filled(size, {at: None if one is None else one.cosine for at, one in met.items()})
        title = "on the layers' inputs: cosine\nof what the two add to the outputs"
        matrices.append(
            Matrix(title, names, cosines, lambda value: f"{value:+.3f}", scale="PuOr", ends=(-1.0, 1.0))
        )
    records: list[Record] = []
    for (i, j), numbers in known.items():
        record: Record = {"first": names[i], "second": names[j], **numbers}
        if moments is not None:
            fed = met[i, j]
            for key in (
                "cosine",
                "disturbed_first",
                "disturbed_second",
                "disturbed_first_each",
                "disturbed_second_each",
            ):
                record[f"inputs_{key}"] = None if fed is None else getattr(fed, key)
        records.append(record)
    return matrices, records


def _filled(size: int, values: dict[tuple[int, int], float | None]) -> npt.NDArray[np.float64]:
    made = np.full((size, size), np.nan)
    for (i, j), value in values.items():
        if value is not None:
            made[i, j] = made[j, i] = value
    return made


def draw_matrix(axes: Any, matrix: Matrix) -> Any:
    """Draw one matrix with its numbers in the cells; the diagonal stays empty.

    Returns:
        ``axes``.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = matrix.values[np.isfinite(matrix.values)]
    low, high = matrix.ends or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    norm: Normalize
    if matrix.log and low > 0:
        norm = LogNorm(low, high if high > low else 2 * low)
    else:
        low = min(low, 0.0)
        norm = Normalize(low, high if high > low else low + 1)
    image = axes.imshow(matrix.values, cmap=matrix.scale, norm=norm)
    axes.set_facecolor("#f2f2f2")
    size = len(matrix.names)
    for i, j in np.argwhere(np.isfinite(matrix.values)) if size <= WRITTEN else ():
        text = matrix.form(float(matrix.values[i, j]))
        if matrix.brackets and matrix.expected is not None and np.isfinite(matrix.expected[i, j]):
            text += f"\n({matrix.form(float(matrix.expected[i, j]))})"
        colour = text_colour(image.cmap(norm(matrix.values[i, j])))
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    for at in range(size):
        axes.text(at, at, "–", ha="center", va="center", fontsize=7.5, color="#777777")
    short = distinct_labels(matrix.names, 28)
    axes.set_xticks(range(size), short, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), short)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(matrix.title + (f"\n(in brackets: expected for {matrix.chance})" if matrix.brackets else ""))
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        if high < 30 * low:  # the range may hold one power of ten or none
            bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.minorticks_off()
    return axes
