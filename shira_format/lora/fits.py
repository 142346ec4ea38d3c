"""Whether a module's LoRA has the shape that a weight needs, to choose between weights that have its name."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shira_format.lora.groups import Group
from shira_format.lora.keys import DOWN, MID, UP, WHOLE
from shira_format.lora.products import fits_shapes

Shape = tuple[int, ...]


def fits(group: Group, shape: Shape) -> bool:
    """False if the parts are of a weight of another shape; what is wrong in itself is reported when the update is made."""
    shapes = {part: group.tensors.shape(key) for part, key in group.keys.items()}
    for part in ("diff", WHOLE, "w_norm"):
        if part in shapes and "on_input" not in shapes:  # the numbers of (IA)^3 have the name of a whole weight
            return shapes[part] == shape
    if UP in shapes and DOWN in shapes and MID not in shapes:
        return fits_shapes(shape, shapes[UP], shapes[DOWN])
    rows, columns = _size(shapes)
    return rows is None or columns is None or (bool(shape) and (rows, columns) == (shape[0], math.prod(shape[1:])))


def _size(shapes: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """Rows and columns of the update; None where they are not known."""
    if UP in shapes:
        return _rows(shapes, UP), _columns(shapes, DOWN, MID)
    if "hada_w1_a" in shapes:
        has_core = "hada_t1" in shapes
        return _rows(shapes, "hada_w1_a", has_core=has_core), _columns(shapes, "hada_w1_b", "hada_t1")
    rows, columns = 1, 1
    for half in ("lokr_w1", "lokr_w2"):
        core = half.replace("w", "t")
        if half in shapes:
            size = _rows(shapes, half), _columns(shapes, half, "")
        else:
            size = _rows(shapes, f"{half}_a", has_core=core in shapes), _columns(shapes, f"{half}_b", core)
        if size[0] is None or size[1] is None:
            return None, None
        rows, columns = rows * size[0], columns * size[1]
    return rows, columns


def _rows(shapes: Mapping[str, Shape], part: str, *, has_core: bool = False) -> int | None:
    """Of a factor ``[out, R]``, or ``[R, out]`` with a core."""
    shape = shapes.get(part, ())
    return shape[int(has_core)] if len(shape) > 1 else None


def _columns(shapes: Mapping[str, Shape], part: str, core: str) -> int | None:
    """Of a factor ``[R, in, *kernel]``, or ``[R, in]`` with a core ``[R, R, *kernel]``."""
    shape, kernel = shapes.get(part, ()), shapes.get(core, ())[2:]
    return math.prod(shape[1:]) * math.prod(kernel) if len(shape) > 1 else None
