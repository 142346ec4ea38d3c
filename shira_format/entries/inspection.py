"""What an adapter file is, whether it is sound, and whether it fits a base; nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shira_format.entries.base_check import base_values, check_dense
from shira_format.errors import BaseMismatch, BaseRequired
from shira_format.format import AdapterFile
from shira_format.format.fields import representable
from shira_format.format.items import SparseEntry, stream_name
from shira_format.names.filters import name_filter
from shira_format.tensors import density, numel

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint  # imports all layouts, which a look at a file does not need

# Orders of the tensors in a description.
ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda row: row["name"],
    "nnz": lambda row: -row["nnz"],
    "density": lambda row: -row["density"],
    "bytes": lambda row: -row["bytes"],
    "energy": lambda row: row["energy_kept"] if row["energy_kept"] is not None else 2,
}


def inspect(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    verify: bool = False,
    order: str = "file",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """What an adapter file is, as plain JSON values: provenance, sizes, and each tensor; from its header alone.

    Args:
        adapter: the file.
        base: a checkpoint, a path or an open one: does the adapter fit it? Reads all indices and the base's values there.
        verify: read everything, and check all digests and every rule of the format.
        order: of the tensors: ``"file"`` or a key of :data:`ORDERS`.
        include: regexes; a tensor is listed only if one of them is found in its name.
        exclude: regexes; a tensor is not listed if one of them is found in its name.

    Raises:
        FormatError: the file is no adapter, or is damaged.
        SourceError: an invalid regex, or no checkpoint.
        OSError: the file cannot be read.

    Example:
        >>> inspect("adapter.st")["totals"]["nnz"]
        1475
    """
    keep = name_filter(include, exclude)
    file = AdapterFile(adapter, base=None if base is None else _opened(base))
    info = describe(file)
    info["tensors"] = [row for row in info["tensors"] if keep(row["name"])]
    if order != "file":
        info["tensors"].sort(key=ORDERS[order])
    if verify:
        info["verified"] = not (untold := file.verify())
        info["unverified"] = untold
    if base is not None:
        misfits = misfits_with(file, _opened(base))
        info["base"] = {"path": str(getattr(base, "path", base)), "fits": not misfits, "reasons": misfits}
    return info


def verify(adapter: str | os.PathLike[str], base: str | os.PathLike[str] | Checkpoint | None = None) -> None:
    """Check every rule of the format and every digest of an adapter file; with ``base``, that it fits this checkpoint.

    Raises:
        FormatError: the file is no adapter, or is damaged.
        BaseRequired: the entries follow from the base's values, and no base is given.
        BaseMismatch: ``base`` is not the checkpoint that the adapter was made for; names the first tensor that differs.
        SourceError: ``base`` is no checkpoint.
        OSError: the file cannot be read.
    """
    file = AdapterFile(adapter, base=None if base is None else _opened(base))
    if untold := file.verify():
        raise BaseRequired(
            f"{file.path}: tensor {untold[0]!r}: its entries follow from the base's values: pass the base (--base)"
        )
    if base is not None and (misfits := misfits_with(file, _opened(base))):
        raise BaseMismatch(f"{file.path}: {misfits[0]}")


def _opened(base: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    from shira_format.checkpoints import open_checkpoint

    return open_checkpoint(base)


def describe(file: AdapterFile) -> dict[str, Any]:
    """The content of the header, as plain JSON values; no tensor is read.

    Numbers of the provenance that no float64 holds are left out.
    """
    raw = representable({k: v for k, v in file.manifest.raw.items() if k not in ("tensors", "whole")})
    rows = [_row(file, entry) for entry in file.manifest.tensors.values()]
    whole = [_whole_row(file, name) for name in file.manifest.whole]
    nnz, elements = sum(row["nnz"] for row in rows), sum(numel(tuple(row["shape"])) for row in rows)
    index_bytes = sum(row["index_bytes"] for row in rows)
    base_bytes = sum(row["base_bytes"] for row in rows)
    row_bytes = sum(row["row_bytes"] for row in rows)
    own_bytes = file.streams.size - base_bytes - row_bytes - sum(row["bytes"] for row in whole)
    return {
        "file": str(file.path),
        "format_version": raw["format_version"],
        "features": raw["features"],
        "base_model": raw.get("base_model"),
        "components": raw.get("components"),
        "source": raw.get("source"),
        "selection": raw.get("selection"),
        "fit": raw.get("fit"),
        "mask": raw.get("mask"),
        "alpha": raw.get("alpha", 1.0),
        "license": raw.get("license"),
        "description": raw.get("description"),
        "writer": raw.get("writer"),
        "self_contained": bool(rows) and all(row["base_values"] for row in rows),
        "undo": "file" if _undone(file, rows) else "base",
        "deltas": _deltas(rows),
        "needs_base": sum(row["needs_base"] for row in rows),
        "totals": {
            "tensors": len(rows),
            "nnz": nnz,
            "numel": elements,
            "density": density(nnz, elements),
            "whole_tensors": len(whole),
            "file_bytes": file.streams.size,
            "index_bits_per_entry": 8 * index_bytes / nnz if nnz else None,
            "bits_per_entry": 8 * own_bytes / nnz if nnz else None,
        },
        "tensors": rows,
        "whole": whole,
        "removed": list(file.manifest.removed),
    }


def _undone(file: AdapterFile, rows: list[dict[str, Any]]) -> bool:
    """Whether the file holds every value that it overwrites; a dense tensor without a digest of the base's is new."""
    held = all(
        (row["base_values"] and not row["needs_base"]) or not row["nnz"] for row in rows if row["values"] != "none"
    )
    wholes = all(one.base_values or "base" not in one.digests for one in file.manifest.whole.values())
    dropped = any(row["result_shape"][:1] < row["shape"][:1] for row in rows)  # the file does not hold these rows
    return held and wholes and not dropped and not file.manifest.removed


def _deltas(rows: list[dict[str, Any]]) -> str | None:
    """Whether the deltas are known from the file alone or need the base; None if there are no values."""
    valued = [row for row in rows if row["values"] != "none"]
    if not valued:
        return None
    known = ((row["base_values"] or row["values"] == "delta") and not row["needs_base"] for row in valued)
    return "file" if all(known) else "base"


def _row(file: AdapterFile, entry: SparseEntry) -> dict[str, Any]:
    sizes = {role: file.streams[stream_name(entry.name, role)].nbytes for role in entry.streams()}
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "nnz": entry.nnz,
        "density": density(entry.nnz, numel(entry.shape)),
        "index_codec": entry.codec,
        "needs_base": entry.needs_base,
        "values": entry.values,
        "base_values": entry.base_values,
        "base_digest": entry.digests.get("base"),
        "energy_kept": representable(entry.raw.get("energy_kept")),
        "relative_error": representable(entry.raw.get("relative_error")),
        "bytes": sum(sizes.values()),
        "index_bytes": sizes.get("indices", 0) + sizes.get("blocks", 0),
        "base_bytes": sizes.get("base", 0),
        "row_bytes": sizes.get("rows", 0),
        "from": entry.base_name,
        "result_shape": list(entry.result_shape),
        "result_digest": entry.digests.get("result"),
    }


def _whole_row(file: AdapterFile, name: str) -> dict[str, Any]:
    entry, stream = file.manifest.whole[name], file.streams[name]
    copies = 2 if entry.base_values else 1
    return {
        "name": name,
        "shape": list(stream.shape),
        "dtype": stream.dtype,
        "base_digest": entry.digests.get("base"),
        "bytes": copies * stream.nbytes,
    }


def misfits_with(file: AdapterFile, base: Checkpoint) -> list[str]:
    """The reasons why the adapter does not fit ``base``, one for each tensor; empty if it fits."""
    misfits = []
    for name in file.manifest.tensors:
        try:
            base_values(file.sparse(name), base)
        except BaseMismatch as error:
            misfits.append(str(error))
    for name in file.manifest.whole:
        try:
            check_dense(file.dense(name), base)
        except BaseMismatch as error:
            misfits.append(str(error))
    misfits += [f"tensor {name!r}: to be removed, but not in the base" for name in file.manifest.removed if name not in base]  # fmt: skip
    return misfits
