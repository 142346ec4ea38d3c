"""Random masks of every kind in the paper, and two more; all from one seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.files import FileDelta, FileDeltas, spread

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

KINDS = ("uniform", "WM", "rows", "columns", "banded", "block")


@dataclass(frozen=True)
class Setting:
    """What a lemma is checked on.

    Attributes:
        seed: the random seed.
        quick: fewer and smaller cases.
        files: the given adapters.
    """

    seed: int = 0
    quick: bool = False
    files: list[FileDeltas] = field(default_factory=list)

    def random(self, lemma: int) -> np.random.Generator:
        """A generator for one lemma, independent of the other lemmas."""
        return np.random.default_rng([self.seed, lemma])

    @property
    def strangers(self) -> list[str]:
        """A note for each pair of files without a common weight of one shape."""
        pairs = itertools.combinations(self.files, 2)
        return [
            f"{a.file.path.name} and {b.file.path.name} have no weight of the same name and shape in common"
            for a, b in pairs
            if not a.names.items() & b.names.items()
        ]

    def updates(self, most: int) -> Iterator[FileDelta]:
        """The deltas of all files, at most ``most`` per file, evenly spread."""
        for file in self.files:
            yield from map(file.update, file.spread(most))

    def pairs(self, most: int) -> Iterator[tuple[FileDelta, FileDelta]]:
        """The deltas of the same weight in two files, at most ``most`` per pair of files; a single file is paired with itself."""
        for at, first in enumerate(self.files):
            for second in self.files[at + 1 :] or (self.files if len(self.files) == 1 else []):
                names = [name for name in first.names if second.names.get(name) == first.names[name]]
                for name in spread(names, most):
                    yield first.update(name), second.update(name)


def mask(kind: str, shape: tuple[int, int], density: float, random: np.random.Generator) -> Mask:
    """A mask, bool ``[rows, columns]``, of about the given density, with at least one entry.

    ``rows`` and ``columns`` are the paper's Struct: every f-th one from a random offset, and the diagonal. ``WM`` takes the largest
    magnitudes of random weights whose rows and columns differ in scale, as in real models.

    Raises:
        ValueError: ``kind`` is not in :data:`KINDS`.
    """
    rows, columns = shape
    made = np.zeros(shape, bool)
    count = max(1, round(density * rows * columns))
    if kind == "uniform":
        made.flat[random.choice(rows * columns, count, replace=False)] = True
    elif kind == "WM":
        scales = np.exp(0.5 * random.standard_normal((rows, 1))) * np.exp(0.5 * random.standard_normal(columns))
        weights = np.abs(random.standard_normal(shape) * scales)
        made.flat[np.argpartition(weights.ravel(), -count)[-count:]] = True
    elif kind in ("rows", "columns"):
        lines = made if kind == "rows" else made.T
        step = max(2, round(1 / density))
        lines[int(random.integers(min(step, len(lines)))) :: step] = True
        np.fill_diagonal(made, True)
    elif kind == "banded":
        row, column = np.indices(shape)
        made = np.abs(column * rows - row * columns) <= density * rows * columns / 2
    elif kind == "block":
        height, width = (max(1, round(size * density**0.5)) for size in shape)
        top, left = (
            int(random.integers(size - part + 1)) for size, part in zip(shape, (height, width), strict=True)
        )
        made[top : top + height, left : left + width] = True
    else:
        raise ValueError(f"no kind of mask {kind!r}")
    return made


def integers(shape: tuple[int, ...], random: np.random.Generator, most: int = 9) -> Integers:
    """Random non-zero integers from ``-most`` to ``most``."""
    signed: Integers = random.integers(1, most + 1, shape) * random.choice(np.array([-1, 1]), shape)
    return signed


def case_name(kind: str, shape: tuple[int, int], made: Mask) -> str:
    """The name of a case in a report."""
    return f"{kind} {shape[0]}x{shape[1]}, {int(made.sum())} entries"
