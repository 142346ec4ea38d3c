"""A transposition of 16 x 16 elements in registers, for code that numba compiles.

Loops over the elements, which are what a compiler sees otherwise, take four times as long: one load and one store for each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

SIDE = 16


@intrinsic  # type: ignore[untyped-decorator]
def transpose(typing: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, target_stride: Any) -> Any:  # noqa: ARG001 - numba's signature  # fmt: skip
    """Rows of 16 from flat positions ``at``, ``at + stride``, ... of ``source`` become columns of ``target``, 4 bytes an element.

    Elements of 4 bytes are moved as they are; those of 2, which are bfloat16, become float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(array: int, row: int) -> Any:
            """A pointer to a row: the array's argument is followed by its start and its stride."""
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            start, stride = arguments[array + 1 : array + 3]
            return builder.gep(data, [builder.add(start, builder.mul(stride, ir.Constant(stride.type, row)))])

        item = signature.args[0].dtype.bitwidth // 8
        rows = [_load(builder, place(0, row), item) for row in range(SIDE)]
        half = SIDE // 2
        while half:
            for row in range(SIDE):
                if not row & half:
                    rows[row], rows[row | half] = _exchanged(builder, rows[row], rows[row | half], half)
            half //= 2
        for row, vector in enumerate(rows):
            builder.store(vector, builder.bitcast(place(3, row), _vector(32).as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


def _vector(bits: int) -> Any:
    return ir.VectorType(ir.IntType(bits), SIDE)


def _load(builder: Any, pointer: Any, item: int) -> Any:
    vector = builder.load(builder.bitcast(pointer, _vector(8 * item).as_pointer()), align=item)
    if item == 4:
        return vector
    return builder.shl(builder.zext(vector, _vector(32)), ir.Constant(_vector(32), [16] * SIDE))


def _exchanged(builder: Any, upper: Any, lower: Any, half: int) -> tuple[Any, Any]:
    """Of two rows of blocks of ``half`` elements, those with the odd blocks of one and the even blocks of the other exchanged."""
    first, second = list[int](), list[int]()
    for start in range(0, SIDE, 2 * half):
        first += [*range(start, start + half), *range(SIDE + start, SIDE + start + half)]
        second += [*range(start + half, start + 2 * half), *range(SIDE + start + half, SIDE + start + 2 * half)]
    found = (builder.shuffle_vector(upper, lower, ir.Constant(_vector(32), one)) for one in (first, second))
    return next(found), next(found)
