"""A product of two matrices at some of its entries: by our compiled loops on the CPU, else by ``torch.sparse.sampled_addmm``."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira_format._core.arrays import Array
from shira_format._core.threads import MOST_THREADS

_PART = 128  # tokens

_loading = threading.Lock()
_kernel: Any = None  # the module, False if it cannot be used, None if that is not known yet


def kernel() -> Any:
    """Our compiled loops, or False where numba is not installed or does not compile them."""
    global _kernel  # noqa: PLW0603 - set once
    with _loading:
        if _kernel is None:
            try:
                from shira_format.training import sampled_kernel
            except ImportError:
                _kernel = False
            else:
                _kernel = sampled_kernel if sampled_kernel.is_supported() else False
    return _kernel


def is_compiled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our loops take factors like these."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16) and bool(kernel())


def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of 16-bit floats; without instructions they take up to a hundred times as long."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if asked is None:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, asked)())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


_IN_FLOAT32 = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not _has_instructions(dtype))


def multiplied(one: Tensor, other: Tensor) -> Tensor:
    """``one @ other``; on a CPU without instructions for a 16-bit dtype computed in float32, and left in it."""
    if one.device.type == "cpu" and one.dtype in _IN_FLOAT32:
        return one.float() @ other.float()
    return one @ other


def sampled_product(outer: Tensor, inner: Tensor, starts: Tensor, places: Tensor) -> Tensor:
    """``outer^T inner`` at the entries: ``[K]`` in float32, float64 of factors in float64.

    Sums are taken in that dtype, over parts of the tokens of a fixed size: the result does not depend on the number of threads.

    Args:
        outer: ``[T, m]``.
        inner: ``[T, n]``, of the same dtype.
        starts: ``[m + 1]``, where the entries of each row of the product start.
        places: ``[K]``, their columns, of the same integer dtype.
    """
    if is_compiled(outer.device, outer.dtype):
        return _compiled(outer, inner, starts.numpy(), places.numpy())
    wide = torch.promote_types(outer.dtype, torch.float32)
    zeros = torch.zeros(len(places), dtype=wide, device=outer.device)
    # Parts of the tokens whose factors stay in the cache of a core, and which need little memory as they are made wide.
    size = _PART if outer.device.type == "cpu" else max(1, len(outer))
    with warnings.catch_warnings():  # torch calls these tensors a beta, once
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(
            starts, places, zeros, (outer.shape[1], inner.shape[1]), check_invariants=False
        )
    for one, other in zip(torch.split(outer, size), torch.split(inner, size), strict=True):
        torch.sparse.sampled_addmm(wanted, one.to(wide).t(), other.to(wide), out=wanted)
    found: Tensor = wanted.values()
    return found


def _compiled(outer: Tensor, inner: Tensor, starts: Any, places: Any) -> Tensor:
    size: int = _kernel.TOKENS
    one, other = _bits(outer), _bits(inner)
    whole, rest = divmod(len(one), size)
    sums = np.empty((whole + bool(rest), len(places)), np.float32)
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < len(sums):
            if number < whole:
                _kernel.products(one, other, number * size, starts, places, sums[number])
            else:  # zeros add nothing
                ends = [np.pad(factor[-rest:], ((0, size - rest), (0, 0))) for factor in (one, other)]
                _kernel.products(*ends, 0, starts, places, sums[number])

    threads = min(torch.get_num_threads(), len(sums), MOST_THREADS)
    others = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for running in others:
        running.result()
    return torch.from_numpy(sums).sum(0)


def _bits(factor: Tensor) -> Array:
    """The elements as unsigned integers of 4 bytes, or of 2 for bfloat16; contiguous."""
    narrow = (factor.float() if factor.dtype == torch.float16 else factor).contiguous()
    signed = narrow.view(torch.int16 if narrow.itemsize == 2 else torch.int32).numpy()
    return np.asarray(signed.view(f"u{narrow.itemsize}"))


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    """The pool of this process: a forked one has none of the threads of its parent."""
    with _loading:
        process = os.getpid()
        if process not in _pools:
            _pools.clear()
            _pools[process] = ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="shira-gradients")
        return _pools[process]
