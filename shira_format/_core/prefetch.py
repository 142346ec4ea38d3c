"""Prefetching cache lines from code that numba compiles.

Entries of a sparse adapter are a few cache lines apart, too far for the hardware prefetcher: without this, a switch
mostly waits for memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, index: Any) -> Any:  # noqa: ARG001 - numba's signature
    """``prefetch(array, index)``: hint that this element of a contiguous array will be read and written soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        # To be written; to be kept in all caches; data, not instructions.
        builder.call(hint, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@njit(cache=True)  # type: ignore[untyped-decorator]
def _ask(array: Any) -> None:
    prefetch(array, 0)


def is_supported() -> bool:
    """Whether this numba's LLVM has the intrinsic."""
    try:
        _ask(np.zeros(1, np.uint8))
    except Exception:  # other versions of LLVM raise different errors
        return False
    return True
