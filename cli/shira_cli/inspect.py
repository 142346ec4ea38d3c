"""``shira-inspect``: what an adapter file is, before anyone trusts it. Imports neither torch nor the converters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.report.summary import describe, misfits_with
from shira_cli import console
from shira_format import AdapterFile
from shira_format._core import text
from shira_format.names.filters import name_filter

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint

PROG = "shira-inspect"

EXAMPLE = """examples:
  shira-inspect adapter.st --sort nnz
  shira-inspect adapter.st --verify --base my-model/
  shira-inspect adapter.st other.st --html report.html
  shira-inspect adapter.st other.st --moments moments.safetensors --html report.html
"""

_KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda row: row["name"],
    "nnz": lambda row: -row["nnz"],
    "density": lambda row: -row["density"],
    "bytes": lambda row: -row["bytes"],
    "energy": lambda row: row["energy_kept"] if row["energy_kept"] is not None else 2,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, "Show what adapter files are, for which base, and how they were made.", EXAMPLE)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="an adapter file")
    add("--sort", choices=("file", *_KEYS), default="file", help="order of the tensors: as in the file (default), name, most entries, density or bytes first, least energy kept first")  # fmt: skip
    add(
        "--include",
        action="append",
        default=[],
        metavar="REGEX",
        help="list only tensors in whose name this is found",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="REGEX",
        help="do not list tensors in whose name this is found",
    )
    add("--verify", action="store_true", help="read everything: check all digests and every rule of the format")
    add("--base", help="a checkpoint: does the adapter fit it, by shapes, dtypes and digests?")
    add("--html", type=Path, metavar="FILE", help="write a report to read in a browser, of all files and of how each two go together")  # fmt: skip
    add("--moments", type=Path, metavar="FILE", help="second moments of the layers' inputs, from shira-moments: the report tells what each two do to each other on such inputs")  # fmt: skip
    add("--force", action="store_true", help="replace the report if it exists")
    console.add_output_options(parser)
    options = parser.parse_args(argv)
    if options.moments is not None and (options.html is None or len(options.files) < 2):
        console.usage_error(PROG, "--moments is about pairs in a report: name two adapters or more, and --html")
    return console.run(PROG, lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    if options.html is not None:
        console.check_output(options.html, force=options.force)
    keep = name_filter(options.include, options.exclude)
    base = None
    if options.base is not None:
        from shira_format.checkpoints import open_checkpoint

        base = open_checkpoint(options.base)
    infos = [_describe(path, keep, base, options) for path in options.files]
    if options.html is not None:
        _write_report(infos, keep, base, options)
    if options.json:
        console.print_json(infos[0] if len(infos) == 1 else {"files": infos})
    else:
        print("\n\n".join(as_text(info) for info in infos))
    misfits = [
        (info["file"], info["base"]["reasons"]) for info in infos if base is not None and info["base"]["reasons"]
    ]
    for path, reasons in misfits:
        where = f"{options.base}: the adapter" + (f" {path}" if len(infos) > 1 else "")
        console.complain(PROG, f"{where} does not fit: {reasons[0]}")
    return console.EXIT_FAILED if misfits else 0


def _describe(
    path: Path, keep: Callable[[str], bool], base: Checkpoint | None, options: argparse.Namespace
) -> dict[str, Any]:
    file = AdapterFile(path)
    info = describe(file)
    info["tensors"] = [row for row in info["tensors"] if keep(row["name"])]
    if options.sort != "file":
        info["tensors"].sort(key=_KEYS[options.sort])
    if options.verify:
        file.verify()
        info["verified"] = True
    if base is not None:
        misfits = misfits_with(file, base)
        info["base"] = {"path": str(options.base), "fits": not misfits, "reasons": misfits}
    return info


def _write_report(
    infos: list[dict[str, Any]], keep: Callable[[str], bool], base: Checkpoint | None, options: argparse.Namespace
) -> None:
    from tqdm import tqdm

    from shira_analysis.measures.deltas import DeltaFile
    from shira_analysis.report.html import look, report
    from shira_format.storage.atomic import atomic_file

    hidden = options.quiet or not sys.stderr.isatty()
    moments = None
    if options.moments is not None:
        from shira_format.calibration.moments import Moments

        moments = Moments.read(options.moments)
    looks = []
    with tqdm(total=sum(len(i["tensors"]) for i in infos), unit="tensors", disable=hidden, leave=False) as bar:
        for path, info in zip(options.files, infos, strict=True):
            file = AdapterFile(path, separate_maps=True)
            fits = base is not None and info["base"]["fits"]
            names = tuple(row["name"] for row in info["tensors"])
            whole = tuple(name for name in file.manifest.whole if keep(name))
            looks.append(look(DeltaFile(file, base if fits else None, names, whole), info, bar.update))
    count = len({tensor.name for one in looks for tensor in one.tensors})
    with tqdm(total=count, unit="tensors", disable=hidden or len(looks) == 1, leave=False) as bar:
        page = report(looks, moments, progress=lambda _: bar.update(1))
    with atomic_file(options.html) as out:
        out.write(page.encode())
    console.notice(f"{options.html}: written", quiet=options.quiet)


def as_text(info: dict[str, Any]) -> str:
    """The description for a terminal."""
    totals = info["totals"]
    facts = [
        ("file", f"{info['file']} ({text.file_size(totals['file_bytes'])})"),
        ("format", f"{info['format_version']}, written by {info['writer'] or 'an unnamed writer'}"),
        ("base model", _model(info["base_model"])),
        *((f"  {name}", _model(part.get("base_model"))) for name, part in (info["components"] or {}).items()),
        ("made from", _made_from(info["source"])),
        ("selection", _selection(info["selection"])),
        ("strength", f"{info['alpha']:g}"),
        *_needs(info),
        ("entries", _entries(totals)),
        ("bits an entry", _bits(totals)),
        *(("patch", text) for text in _patch(info)),
        *((key, str(info[key])) for key in ("license", "description") if info[key]),
    ]  # fmt: skip
    if info.get("verified"):
        facts.append(("verified", "all digests and rules"))
    if "base" in info:
        reasons = info["base"]["reasons"]
        verdict = (
            f"yes, by shapes, dtypes and digests ({info['base']['path']})" if not reasons else f"NO: {reasons[0]}"
        )
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        facts.append(("fits the base", verdict + more))
    width = max(len(key) for key, _ in facts)
    lines = [f"{key.ljust(width)}  {text.printable(value)}" for key, value in facts]
    if info["tensors"]:
        lines += ["", _tensor_table(info["tensors"])]
    if info["whole"]:
        rows = [(w["name"], w["dtype"], _shape(w["shape"]), text.file_size(w["bytes"])) for w in info["whole"]]
        lines += ["", text.table(("whole tensor", "dtype", "shape", "size"), rows)]
    return "\n".join(lines)


def _tensor_table(tensors: list[dict[str, Any]]) -> str:
    head = ("tensor", "dtype", "shape", "entries", "density", "codec", "values", "size", "energy kept")
    return text.table(
        head,
        (
            (t["name"], t["dtype"], _shape(t["shape"]), text.count(t["nnz"]), text.percent(t["density"]),
             t["index_codec"], t["values"], text.file_size(t["bytes"]),
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


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


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
    if "energy" in selection:
        amount = f"{selection['energy']:.1%} of the energy"
    elif "density" in selection:
        amount = f"density {selection['density']:g}"
    else:
        amount = f"{selection.get('top_k', '?')} entries"
    if selection.get("min_change"):
        amount += f", changes of {selection['min_change']:g} or more"
    text = f"{selection.get('rule', '?')}, {amount}, per {selection.get('scope', '?')}".replace(
        "per global", "over all tensors"
    )
    if "energy_kept" in selection:
        text += f"; keeps {selection['energy_kept']:.1%} of the update's energy"
    if "relative_error" in selection:
        text += f", relative error {selection['relative_error']:.3f}"
    return text


def _entries(totals: dict[str, Any]) -> str:
    share = f"{text.count(totals['nnz'])} of {text.count(totals['numel'])} ({text.percent(totals['density'])})"
    return f"{share} in {text.counted(totals['tensors'], 'tensor')}; {totals['whole_tensors']} replaced as a whole"


def _bits(totals: dict[str, Any]) -> str:
    if totals["bits_per_entry"] is None:
        return "no entries"
    return f"{totals['bits_per_entry']:.2f}, of which indices {totals['index_bits_per_entry']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
