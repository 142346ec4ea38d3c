"""Where the elements of a checkpoint's tensor are in the parameters of a model that holds them otherwise.

A model in memory may hold several tensors in one parameter (q, k and v in ``qkv_proj``, all experts of a layer), one tensor
in several, or on each rank a slice only. All of these are rectangles: rows and columns of the tensor's matrix view that are
rows and columns of the parameter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shira_format._core.arrays import Indices
from shira_format.errors import SourceError
from shira_format.names.row_blocks import Location
from shira_format.tensors import matrix_shape, numel

Shape = tuple[int, ...]
Range = tuple[int, int]  # start, stop

# Positions among a tensor's entries.
Positions = slice | Indices


@dataclass(frozen=True)
class Block:
    """Rows and columns of a tensor's matrix view, and where they are in a parameter.

    Attributes:
        parameter: the parameter's name.
        shape: its shape.
        width: the columns of its matrix view, ``[numel / width, width]``: of three dimensions with experts first, the last.
        rows: the tensor's rows that are here.
        columns: the tensor's columns that are here.
        row: the parameter's row that holds the first of them.
        column: the parameter's column that holds the first of them.
    """

    parameter: str
    shape: Shape
    width: int
    rows: Range
    columns: Range
    row: int = 0
    column: int = 0

    @property
    def numel(self) -> int:
        """The number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class Placement:
    """Where one tensor is.

    Attributes:
        tensor: its name in the checkpoint.
        shape: its shape there.
        width: the columns of its matrix view.
        blocks: the parts of it that the model has; none on a rank without any.
    """

    tensor: str
    shape: Shape
    width: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        height = numel(self.shape) // self.width if self.width else 0
        for block in self.blocks:
            rows = numel(block.shape) // block.width if block.width else 0
            inside = (
                0 <= block.rows[0] <= block.rows[1] <= height
                and 0 <= block.columns[0] <= block.columns[1] <= self.width
                and 0 <= block.row <= rows - (block.rows[1] - block.rows[0])
                and 0 <= block.column <= block.width - (block.columns[1] - block.columns[0])
            )
            if not inside:
                raise SourceError(
                    f"tensor {self.tensor!r} of shape {list(self.shape)} has no rows {block.rows} and columns {block.columns} "
                    f"that lie at row {block.row}, column {block.column} of {block.parameter!r}, {list(block.shape)}"
                )

    @property
    def ranges(self) -> list[Range]:
        """The ranges of flat indices, in order and apart, outside which the model has nothing of the tensor."""
        found: list[Range] = []
        for start, stop in sorted({block.rows for block in self.blocks if block.numel}):
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], max(stop, found[-1][1])
            else:
                found.append((start, stop))
        return [(start * self.width, stop * self.width) for start, stop in found]

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is one parameter of its shape."""
        if len(self.blocks) != 1:
            return False
        block = self.blocks[0]
        return (block.shape, block.width, block.numel) == (self.shape, self.width, numel(self.shape))

    def place(self, indices: Indices) -> Iterator[tuple[Block, Positions, Indices]]:
        """Flat indices of the tensor, strictly increasing, as flat indices of parameters.

        Yields:
            For each block with any of them: the block, which of ``indices`` they are, and the strictly increasing flat indices
            of its parameter.
        """
        for block in self.blocks:
            at, placed = _place(block, self.width, indices)
            if placed.size:
                yield block, at, placed


def _place(block: Block, width: int, indices: Indices) -> tuple[Positions, Indices]:
    first, last = (int(at) for at in np.searchsorted(indices, [block.rows[0] * width, block.rows[1] * width]))
    within = indices[first:last]
    if block.columns == (0, width) and block.width == width:
        return slice(first, last), within + (block.row - block.rows[0]) * width
    rows, columns = np.divmod(within, max(width, 1))
    inside = np.flatnonzero((columns >= block.columns[0]) & (columns < block.columns[1]))
    rows, columns = rows[inside], columns[inside]
    rows += block.row - block.rows[0]
    columns += block.column - block.columns[0]
    return inside + first, rows * block.width + columns


class Layout(Protocol):
    """Which parameters of a model hold the tensors of a checkpoint."""

    def place(self, name: str, shape: Shape) -> Placement:
        """Where a tensor is.

        Raises:
            SourceError: the layout does not know such a tensor, or not with this shape.
        """


@dataclass(frozen=True)
class ModelLayout:
    """The layout of a model whose parameters are known: each tensor is one of them, or where its location says.

    Attributes:
        shapes: of the parameters, by name.
        names: the parameters by the names of tensors that are the same.
        locations: where tensors of other name spaces are in the parameters.
    """

    shapes: Mapping[str, Shape]
    names: Mapping[str, str]
    locations: Mapping[str, Location]

    @property
    def known(self) -> list[str]:
        """All names of tensors, sorted."""
        return sorted({*self.names, *self.locations})

    def shape_of(self, name: str) -> Shape:
        """The shape that the model has for a tensor."""
        return self.shapes[self.names[name]] if name in self.names else self.locations[name].shape

    def place(self, name: str, shape: Shape) -> Placement:
        """Where a tensor is.

        Raises:
            SourceError: the model has no such tensor, or with another shape.
        """
        if name not in self.names and name not in self.locations:
            raise SourceError(f"the model has no tensor {name!r}")
        if shape != self.shape_of(name):
            raise SourceError(
                f"tensor {name!r}: the adapter is for shape {list(shape)}, the weight has {list(self.shape_of(name))}"
            )
        if name in self.names:
            return in_place(name, self.names[name], shape)
        location = self.locations[name]
        height = sum(block.height for block in location.blocks)
        if not height or numel(shape) % height:
            raise SourceError(f"tensor {name!r} of shape {list(shape)} has no {height} rows")
        width = numel(shape) // height
        return Placement(name, shape, width, tuple(self._blocks(location, width)))

    def _blocks(self, location: Location, width: int) -> Iterator[Block]:
        for block in location.blocks:
            row = block.start
            for rows in block.rows:
                yield Block(block.name, self.shapes[block.name], width, rows, (0, width), row)
                row += rows[1] - rows[0]


def in_place(name: str, parameter: str, shape: Shape) -> Placement:
    """A tensor that is one parameter of the same shape."""
    width = matrix_shape(shape)[1]
    return Placement(
        name, shape, width, (Block(parameter, shape, width, (0, matrix_shape(shape)[0]), (0, width)),)
    )
