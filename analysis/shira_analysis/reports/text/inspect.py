"""Text of what an adapter file is."""

from __future__ import annotations

from typing import Any

from shira_analysis.reports.text import fit
from shira_analysis.reports.text.parts import shape
from shira_format._core.text import count, counted, file_size, percent, printable, table


def as_text(info: dict[str, Any]) -> str:
    """The description for a terminal."""
    totals = info["totals"]
    facts = [
        ("file", f"{info['file']} ({file_size(totals['file_bytes'])})"),
        ("format", f"{info['format_version']}, written by {info['writer'] or 'an unnamed writer'}"),
        ("base model", _model(info["base_model"])),
        *((f"  {name}", _model(part.get("base_model"))) for name, part in (info["components"] or {}).items()),
        ("made from", _made_from(info["source"])),
        ("selection", _selection(info["selection"])),
        *fit.facts(info["fit"]),
        *(("mask", line) for line in _mask(info["mask"])),
        ("strength", f"{info['alpha']:g}"),
        *_needs(info),
        ("entries", _entries(totals)),
        ("bits an entry", _bits(totals)),
        *([("to read it", _untold(info["needs_base"]))] if info["needs_base"] else []),
        *(("patch", line) for line in _patch(info)),
        *((key, str(info[key])) for key in ("license", "description") if info[key]),
    ]  # fmt: skip
    if info.get("verified"):
        facts.append(("verified", "all digests and rules"))
    elif info.get("unverified"):
        facts.append(("verified", f"all digests of the file; {_untold(len(info['unverified']))}: give --base"))
    if "base" in info:
        reasons = info["base"]["reasons"]
        verdict = (
            f"yes, by shapes, dtypes and digests ({info['base']['path']})" if not reasons else f"NO: {reasons[0]}"
        )
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        facts.append(("fits the base", verdict + more))
    width = max(len(key) for key, _ in facts)
    lines = [f"{key.ljust(width)}  {printable(value)}" for key, value in facts]
    if info["tensors"]:
        lines += ["", _tensor_table(info["tensors"])]
    if info["whole"]:
        rows = [(w["name"], w["dtype"], _shape(w["shape"]), file_size(w["bytes"])) for w in info["whole"]]
        lines += ["", table(("whole tensor", "dtype", "shape", "size"), rows)]
    return "\n".join(lines)


def _tensor_table(tensors: list[dict[str, Any]]) -> str:
    head = ("tensor", "dtype", "shape", "entries", "density", "codec", "values", "size", "energy kept")
    return table(
        head,
        (
            (t["name"], t["dtype"], _shape(t["shape"]), count(t["nnz"]), percent(t["density"]),
             t["index_codec"], t["values"], file_size(t["bytes"]),
             "" if t["energy_kept"] is None else f"{t['energy_kept']:.1%}")
            for t in tensors
        ),
    )  # fmt: skip


def _needs(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What can be done with the file alone."""
    words = {"file": "from the file alone", "base": "needs the base"}
    if info["deltas"] is None:  # a mask overwrites nothing
        return []
    if info["deltas"] == info["undo"]:
        return [("undo, scale, measure", words[info["undo"]])]
    return [("undo", words[info["undo"]]), ("scale, measure", words[info["deltas"]])]


def _patch(info: dict[str, Any]) -> list[str]:
    """What changes beyond entries, one line for each kind; and how much of the result is vouched for."""
    tensors = info["tensors"]
    renamed = [f"{t['name']} from {t['from']}" for t in tensors if t["from"] != t["name"]]
    resized = [
        f"{t['name']} {t['shape'][0]} -> {t['result_shape'][0]} rows"
        for t in tensors
        if t["shape"] != t["result_shape"]
    ]
    vouched = sum(t["result_digest"] is not None for t in tensors)
    found = [
        f"{what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"
        for what, names in (("renamed", renamed), ("resized", resized), ("removed", info["removed"]))
        if names
    ]
    return found + ([f"{vouched} tensors with the digest of the whole result"] if vouched else [])


def _untold(tensors: int) -> str:
    return f"the entries of {counted(tensors, 'tensor')} follow from the base's values"


def _shape(sizes: list[int]) -> str:
    return shape(sizes) or "scalar"


def _model(model: dict[str, Any] | None) -> str:
    if not model or not model.get("id"):
        return "not named"
    return f"{model['id']}@{model['revision']}" if model.get("revision") else str(model["id"])


def _made_from(source: dict[str, Any] | None) -> str:
    if not source:
        return "not said"
    files = ", ".join(item["name"] for item in source.get("files", []))
    kind = " ".join(str(source[key]) for key in ("dialect", "kind") if key in source)
    return f"{kind or 'unknown kind'}{f' ({files})' if files else ''}"


def _selection(selection: dict[str, Any] | None) -> str:
    if not selection:
        return "not said"
    if selection.get("rule") == "exact":
        return "every entry whose bits differ"
    fitted = selection.get("rule") == "fit"
    if "energy" in selection:
        amount = f"{selection['energy']:.1%} of the energy"
    elif "density" in selection:
        amount = f"density {selection['density']:g}"
    elif "lora_rank" in selection:
        amount = f"as many as a LoRA of rank {selection['lora_rank']}"
    else:
        amount = f"{selection.get('top_k', '?')} entries"
    if selection.get("min_change"):
        amount += f", changes of {selection['min_change']:g} or more"
    line = f"{selection.get('rule', '?')}, {amount}, per {selection.get('scope', '?')}".replace(
        "per global", "over all tensors"
    )
    if "energy_kept" in selection and not fitted:
        line += f"; keeps {selection['energy_kept']:.1%} of the update's energy"
    if "relative_error" in selection and not fitted:
        line += f", relative error {selection['relative_error']:.3f}"
    return line


def _mask(mask: Any) -> list[str]:
    """The rule and its settings; a digest says nothing to people."""
    if not isinstance(mask, dict) or "rule" not in mask:
        return []
    settings = (f"{key} {value}" for key, value in mask.items() if key not in ("rule", "calibration_digest"))
    return [", ".join([str(mask["rule"]), *settings])]


def _entries(totals: dict[str, Any]) -> str:
    share = f"{count(totals['nnz'])} of {count(totals['numel'])} ({percent(totals['density'])})"
    return f"{share} in {counted(totals['tensors'], 'tensor')}; {totals['whole_tensors']} replaced as a whole"


def _bits(totals: dict[str, Any]) -> str:
    if totals["bits_per_entry"] is None:
        return "no entries"
    return f"{totals['bits_per_entry']:.2f}, of which indices {totals['index_bits_per_entry']:.2f}"
