"""AWOM and AWOR of random adapters against the dimension of the weight: the paper's figures 4 and 9, recomputed.

Weights are square, ``[m, m]``; all values are standard normal; a share ``p`` of the entries is trained (1 %). For two adapters of
the same kind, ``A1^T A2`` is measured:

* ``dense``: every entry.
* ``sparse LoRA``: ``B A`` with ``B`` of ``[m, r]`` and ``A`` of ``[r, m]``, both masked uniformly so that together they have
  ``p m^2`` entries, as the others do. The paper does not give its sizes; this one reproduces its finding that AWOR is near 0 at 4096,
  while factors of density 1 % would give sparser products than SHiRA's.
* ``SHiRA-WM, overlapping``: both train the top ``p`` of one random weight by magnitude; ``non-overlapping``: the second trains the next ``p``.
* ``SHiRA-Rand``: independent uniform masks.
* ``SHiRA-Struct, rows`` (``columns``): every f-th row (column) and the diagonal, the second's rows halfway between those of the first. f
  is the largest that gives at least ``p m^2`` entries.

For random adapters, AWOM reflects little but their norms: if they are independent, it is ``||A1|| ||A2|| / sqrt(m)`` for any masks,
and dense adapters with values of the same size have 100 times the energy (the sum of squares).

For independent uniform masks the structural AWOR is ``(1 - p^2)^m`` and the AWOM ``p m^1.5`` (root mean square): the grey
curves in the figures; ``dense`` has 0 and ``m^1.5``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.figures.records import Record
from shira_analysis.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from shira_analysis.measures.orthogonality import orthogonality
from shira_format._core.arrays import distinct
from shira_format.errors import SourceError

DIMENSIONS = (128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = (128, 256, 512, 1024, 2048)
DENSITY = 0.01
SEEDS, QUICK_SEEDS = 50, 5
RANK = 64
_TILE = 1 << 22  # cells of a product at a time

SERIES = (
    "dense", "sparse LoRA", "SHiRA-WM, overlapping", "SHiRA-WM, non-overlapping", "SHiRA-Rand", "SHiRA-Struct, rows",
    "SHiRA-Struct, columns",
)  # fmt: skip

Floats = npt.NDArray[Any]
Measured = tuple[float, float, float]  # AWOM, AWOR, density


def measure_random_pair(series: str, dimension: int, seed: int, density: float = DENSITY) -> Measured:
    """AWOM, AWOR and the share of trained entries of one random pair.

    Args:
        series: one of :data:`SERIES`.
        dimension: m.
        seed: the same seed gives the same adapters; both WM kinds share the weight and the values.
        density: p.

    Raises:
        SourceError: the dimension is below 2, or the density is not in (0, 0.5].
    """
    if dimension < 2 or not 0 < density <= 0.5:
        raise SourceError(f"random adapters of dimension {dimension} and density {density:g} cannot be made")
    family = "WM" if "WM" in series else series
    random = np.random.default_rng([seed, dimension, sum(family.encode())])
    if series == "dense":
        return _dense(dimension, random)
    if series == "sparse LoRA":
        return _sparse_lora(dimension, density, random)
    masks = _masks(series, dimension, density, random)
    matrices = [_matrix(mask, dimension, random) for mask in masks]
    found = orthogonality(*matrices)
    assert found.awor is not None
    return found.awom, found.awor, masks[0].size / dimension**2


def dimension_records(
    *,
    dimensions: Sequence[int] = DIMENSIONS,
    seeds: int = SEEDS,
    density: float = DENSITY,
    series: Sequence[str] = SERIES,
    progress: Callable[[str, int], object] = lambda *_: None,
) -> list[Record]:
    """Means and standard deviations over ``seeds`` pairs, for each kind of adapter and each dimension.

    Args:
        dimensions: the values of m.
        seeds: pairs of adapters for each point.
        density: p.
        series: some of :data:`SERIES`.
        progress: called with kind and dimension after each pair.

    Raises:
        SourceError: see :func:`measure_random_pair`.
    """
    records = []
    for dimension in dimensions:
        for one in series:
            found = []
            for seed in range(seeds):
                found.append(measure_random_pair(one, dimension, seed, density))
                progress(one, dimension)
            values = np.array(found)
            records.append(
                {
                    "adapter": one,
                    "dimension": dimension,
                    "pairs": seeds,
                    "trained": float(values[:, 2].mean()),
                    "awom": float(values[:, 0].mean()),
                    "awom_deviation": float(values[:, 0].std()),
                    "awor": float(values[:, 1].mean()),
                    "awor_deviation": float(values[:, 1].std()),
                    "awom_if_uniform": density * dimension**1.5,
                    "awor_if_uniform": uniform_awor(dimension, density),
                }
            )
    return records


def uniform_awor(dimension: float, density: float = DENSITY) -> float:
    """``(1 - p^2)^m``: the expected AWOR of independent uniform masks."""
    return math.exp(dimension * math.log1p(-density * density))


def struct_step(dimension: int, density: float = DENSITY) -> int:
    """f: the largest for which every f-th row, from any offset, and the diagonal have at least density ``density``."""
    lines = max(1, math.ceil((density * dimension - 1) * dimension / (dimension - 1)))
    return max(2, dimension // lines)


def _masks(series: str, m: int, density: float, random: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The flat indices of two adapters, strictly increasing."""
    count = max(1, round(density * m * m))
    if series == "SHiRA-Rand":
        return [np.sort(random.choice(m * m, count, replace=False, shuffle=False)) for _ in range(2)]
    if series.startswith("SHiRA-WM"):
        size = np.abs(random.standard_normal(m * m, np.float32))
        first = np.partition(size, size.size - count)[size.size - count]
        top = np.flatnonzero(size >= first)[:count]
        if series.endswith("non-overlapping"):
            size[top] = 0
            second = np.partition(size, size.size - count)[size.size - count]
            return [top, np.flatnonzero(size >= second)[:count]]
        return [top, top]
    step = struct_step(m, density)
    diagonal = np.arange(m, dtype=np.int64) * (m + 1)
    found = []
    for offset in (0, step // 2):
        lines = np.arange(offset, m, step, dtype=np.int64)
        whole = (
            np.add.outer(lines * m, np.arange(m))
            if series.endswith("rows")
            else np.add.outer(lines, np.arange(m) * m)
        )
        found.append(distinct(np.concatenate([diagonal, whole.ravel()])))
    return found


def _matrix(indices: npt.NDArray[np.int64], m: int, random: np.random.Generator) -> Any:
    pointers = np.searchsorted(indices, np.arange(m + 1, dtype=np.int64) * m)
    from scipy.sparse import csr_array

    return csr_array((random.standard_normal(indices.size), indices % m, pointers), shape=(m, m))


def _dense(m: int, random: np.random.Generator) -> Measured:
    # float32 is fast, and gives seven digits of the norm. One cell in 10^8 rounds to 0 and counts as a zero.
    first, second = (random.standard_normal((m, m), np.float32) for _ in range(2))
    return *_product(first.T, second), 1.0


def _sparse_lora(m: int, density: float, random: np.random.Generator) -> Measured:
    rank = min(RANK, m)
    kept = min(1.0, density * m / (2 * rank))

    def factor(shape: tuple[int, int]) -> Floats:
        made = random.standard_normal(shape)
        made[random.random(shape) >= kept] = 0
        return made

    (up1, down1), (up2, down2) = ((factor((m, rank)), factor((rank, m))) for _ in range(2))
    # (B1 A1)^T B2 A2 from the inside out: no intermediate is larger than r x m.
    return *_product(down1.T, up1.T @ up2 @ down2), kept * 2 * rank / m


def _product(left: Floats, right: Floats) -> tuple[float, float]:
    """Frobenius norm and share of zeros of ``left @ right``, in blocks of rows."""
    energy, nonzero = 0.0, 0
    step = max(1, _TILE // right.shape[1])
    for start in range(0, len(left), step):
        cells = left[start : start + step] @ right
        energy += float(np.square(cells, dtype=np.float64).sum())
        nonzero += int(np.count_nonzero(cells))
    return math.sqrt(energy), 1 - nonzero / (len(left) * right.shape[1])


_LINE_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "marker": "s"},
    "sparse LoRA": {"color": RED, "marker": "D"},
    "SHiRA-WM, overlapping": {"color": BLUE, "marker": "o", "ms": 9, "mfc": "none", "ls": "none"},
    "SHiRA-WM, non-overlapping": {"color": SKY, "marker": "o", "ms": 6, "ls": "none"},
    "SHiRA-Rand": {"color": ORANGE, "marker": "x", "ms": 5, "ls": "none", "zorder": 4},
    "SHiRA-Struct, rows": {"color": GREEN, "marker": "^", "ms": 7, "mfc": "none"},
    "SHiRA-Struct, columns": {"color": PINK, "marker": "v", "ls": "--"},
}


def draw_dimension(axes: Any, records: Sequence[Record], measure: str = "awor") -> Any:
    """Draw one measure of :func:`dimension_records` against the dimension.

    Args:
        axes: a matplotlib Axes.
        records: all of one density.
        measure: ``"awom"`` or ``"awor"``.

    Returns:
        ``axes``.
    """
    dimensions = sorted({record["dimension"] for record in records})
    for series in SERIES:
        mine = [record for record in records if record["adapter"] == series]
        if mine:
            look = {"lw": 1.2, **_LINE_STYLES[series]}
            label = f"{series}, rank {RANK}" if series == "sparse LoRA" else series
            axes.plot([r["dimension"] for r in mine], [r[measure] for r in mine], label=label, **look)
    expected = {record["dimension"]: record[f"{measure}_if_uniform"] for record in records}
    axes.plot(
        dimensions, [expected[m] for m in dimensions], color=GREY, alpha=0.4, lw=6, solid_capstyle="round", zorder=1,
        label="uniform masks, by formula: " + ("p·m√m" if measure == "awom" else "(1 − p²)ᵐ"),
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(dimensions, [f"{m}" for m in dimensions])
    axes.minorticks_off()
    axes.set_xlabel("dimension m of a weight [m, m]")
    axes.grid(visible=True)
    if measure == "awom":
        axes.set_yscale("log")
        axes.set_ylabel("AWOM: Frobenius norm of A₁ᵀA₂")
    else:
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("AWOR: share of zeros in A₁ᵀA₂")
    return axes
