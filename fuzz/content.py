"""The content of an adapter as the library finds it, in the form of section 11 of the specification."""

from __future__ import annotations

from typing import Any

from shira_format._core.arrays import Array
from shira_format._core.dtypes import dtype_name
from shira_format.adapter import Adapter
from shira_format.tensors import SparseTensor


def content(adapter: Adapter) -> dict[str, Any]:
    """What section 11 asks a reader to print."""
    tensors = [adapter[name] for name in adapter]
    removed = {"removed": list(adapter.removed)} if "removed" in adapter.manifest else {}
    return removed | {
        "format_version": adapter.manifest["format_version"],
        "alpha": adapter.manifest.get("alpha", 1),
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "dtype": dtype_name(t.dtype),
                "values": t.value_kind,
                "nnz": t.nnz,
                "indices": t.indices.tolist(),
                "value_dtype": None if t.value_kind == "none" else dtype_name(t.values.dtype),
                "value_hex": None if t.value_kind == "none" else _hex(t.values),
                "base_hex": _hex(t.base),
                "base_digest": t.base_digest,
            }
            | _of_patch(t)
            for t in tensors
        ],
        "whole": [
            {
                "name": w.name,
                "shape": list(w.values.shape),
                "dtype": dtype_name(w.values.dtype),
                "value_hex": _hex(w.values),
                "base_hex": _hex(w.base),
                "base_digest": w.base_digest,
            }
            for w in adapter.dense.values()
        ],
    }


def _of_patch(tensor: SparseTensor) -> dict[str, Any]:
    """The keys that only some tensors have."""
    found = {
        "from": tensor.base_name if tensor.base_name != tensor.name else None,
        "rows": tensor.rows,
        "rows_hex": _hex(tensor.new_rows),
        "result_digest": tensor.result_digest,
    }
    return {key: value for key, value in found.items() if value is not None}


def _hex(array: Array | None) -> str | None:
    return None if array is None else array.tobytes().hex()
