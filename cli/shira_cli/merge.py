"""``shira-merge``: join adapters of one base to one."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_format._core import text
from shira_format.merge.methods import METHODS, shown

if TYPE_CHECKING:
    from shira_analysis.merging.analysis import MergeAnalysis
    from shira_format import Adapter, SparseTensor
    from shira_format.checkpoints import Checkpoint
    from shira_format.merge import Merge, MergedTensor, MergeReport

PROG = "shira-merge"

DESCRIPTION = """\
Join adapters of one base to one adapter, from sparse to sparse: an entry of the result is the base's value plus what the method makes of the
adapters' changes there, times the weights. Where one adapter alone changes an entry, at weight 1, its target comes out bit for bit."""

EXAMPLE = """examples:
  shira-merge a.st b.st -o ab.st --weights 0.7,0.3
  shira-merge a.st b.st -o ab.st --layer 'attention:weights=1,0' --density 0.01
  shira-merge a.st b.st --check --report ab.html
  shira-merge a.st b.st -o only-a.st --method subtract
"""

# How many adapters each of the methods takes that follow an exact rule of their own.
ALGEBRA = {
    "subtract": ("the changes of the first adapter less those of the second", 2, 2),
    "compose": ("one adapter after the other, in this order; each was made for what those before it give", 2, None),
    "invert": ("the adapter that brings the adapted weights back to the base", 1, 1),
}  # fmt: skip
# Options that say how changes are weighed and chosen, which those methods do not do.
_WEIGHING = ("weights", "option", "layer", "density", "self_contained", "threads", "report", "moments", "check")

_LAYER = re.compile(r"(?P<pattern>.*):(?P<key>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, DESCRIPTION, f"{_methods_help()}\n\n{EXAMPLE}")
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="adapter files of one base")
    add("-o", "--output", type=Path, metavar="FILE", help="the adapter file to write")
    add("--method", choices=[*METHODS, *ALGEBRA], default="linear", metavar="M", help="how they are joined, see below (default: linear)")  # fmt: skip
    add("--weights", metavar="W,W,...", help="one number for each adapter, times its own strength (default: 1); write --weights=-1,1 if the first is negative")  # fmt: skip
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the method; may be repeated")  # fmt: skip
    add("--layer", action="append", default=[], metavar="REGEX:KEY=VALUE", help="an option, or 'weights', for tensors in whose name REGEX is found; may be repeated, later ones are stronger")  # fmt: skip
    add("--base", metavar="CHECKPOINT", help="the checkpoint that they were made for, checked by digests; needed where several adapters that lack its values change one tensor")  # fmt: skip
    add("--density", type=float, metavar="D", help="keep of each tensor's result the largest changes, this share of its elements, rounded up")  # fmt: skip
    add("--self-contained", action=argparse.BooleanOptionalAction, help="store the base's values too (default: if all adapters do)")  # fmt: skip
    add("--include", action="append", default=[], metavar="REGEX", help="join only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--threads", type=int, metavar="N", help="at most this many threads (default: all cores); the bytes do not depend on it")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="write how the adapters go together, tensor by tensor, as .html or .json")  # fmt: skip
    add("--moments", type=Path, metavar="FILE", help="second moments of the layers' inputs, from shira-moments, for the report")  # fmt: skip
    add("--check", action="store_true", help="print that report, and merge nothing")
    add("--force", action="store_true", help="replace FILEs if they exist")
    add("--dry-run", action="store_true", help="compute and report everything, write nothing")
    console.add_output_options(parser)
    options = parser.parse_args(argv)
    _check_usage(options)
    return console.run(PROG, lambda: _merge(options))


def _methods_help() -> str:
    """All methods, a line each, with their options' defaults below; then what the options mean, once each."""
    width = max(map(len, [*METHODS, *ALGEBRA]))
    lines = ["methods, with the defaults of their options:"]
    meanings: dict[str, dict[str, list[str]]] = {}
    for name, method in METHODS.items():
        lines.append(f"  {name.ljust(width)}  {method.about}")
        if method.options:
            lines.append(
                f"  {' ' * width}    {' '.join(f'{k}={shown(o.default)}' for k, o in method.options.items())}"
            )
        for key, option in method.options.items():
            about = option.about + (f" ({', '.join(option.choices)})" if option.choices else "")
            about += "; or one for each adapter, with commas between" if option.each else ""
            meanings.setdefault(key, {}).setdefault(about, []).append(name)
    lines += ["", "methods without weights and options:"]
    lines += [f"  {name.ljust(width)}  {about}" for name, (about, _, _) in ALGEBRA.items()]
    lines += ["", "options of methods:"]
    for key, texts in meanings.items():
        for about, names in texts.items():
            of = f"{', '.join(names)}: " if len(texts) > 1 else ""  # one name, several meanings
            lines.append(f"  {key.ljust(width)}  {of}{about}")
    return "\n".join(lines)


def _check_usage(options: argparse.Namespace) -> None:
    if options.method in ALGEBRA:
        for name in _WEIGHING:
            value = getattr(options, name)
            if value is not None and value is not False and value != []:
                flag = f"--{name.replace('_', '-')}"
                console.usage_error(PROG, f"{flag} does not go with --method {options.method}")
        if options.self_contained is False:
            console.usage_error(PROG, f"--no-self-contained does not go with --method {options.method}")
        _, least, most = ALGEBRA[options.method]
        if not least <= len(options.adapters) <= (most or len(options.adapters)):
            takes = f"{least} adapter{'s' if least > 1 else ''}{'' if most else ' or more'}"
            console.usage_error(PROG, f"--method {options.method} takes {takes}, not {len(options.adapters)}")
    if options.output is None and not (options.check or options.dry_run):
        console.usage_error(PROG, "-o is missing (only --check and --dry-run go without)")
    if options.threads is not None and options.threads < 1:
        console.usage_error(PROG, f"--threads {options.threads} is not a positive count")
    if options.density is not None and not 0 < options.density <= 1:
        console.usage_error(PROG, f"--density {options.density} is not in (0, 1]")
    if options.report is not None and options.report.suffix.lower() not in (".html", ".json"):
        console.usage_error(PROG, f"--report {options.report}: a report ends in .html or .json")
    if options.moments is not None and options.report is None and not options.check:
        console.usage_error(PROG, "--moments is about the report: it needs --report or --check")
    if options.method in METHODS:
        if options.weights is not None:
            options.weights = _numbers("--weights", options.weights)
            if (given := len(options.weights)) != (count := len(options.adapters)):
                console.usage_error(PROG, f"--weights: {given} for {count} adapters")
        pairs = [_pair(options.method, "--option", text, text) for text in options.option]
        for number, (key, _) in enumerate(pairs):
            if key in dict(pairs[:number]):
                console.usage_error(PROG, f"--option {key}: given twice")
        options.option = dict(pairs)
        options.layer = [_layer(options.method, text) for text in options.layer]
        for key, value in [*pairs, *(pair for _, some in options.layer for pair in some.items())]:
            if isinstance(value, tuple | list) and len(value) != (count := len(options.adapters)):
                console.usage_error(PROG, f"{key}: {len(value)} values for {count} adapters")


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        console.usage_error(PROG, f"{flag} {text}: not numbers with commas between")


def _pair(method: str, flag: str, text: str, given: str) -> tuple[str, Any]:
    """KEY=VALUE, the value in the option's type, so that the result says the same as if Python had given it."""
    from shira_format import SourceError

    key, found, value = text.partition("=")
    if not found or not key:
        console.usage_error(PROG, f"{flag} {given}: not KEY=VALUE")
    try:
        return key, METHODS[method].settings({key: value})[key]
    except SourceError as error:
        console.usage_error(PROG, f"{flag} {given}: {error}")


def _layer(method: str, text: str) -> tuple[str, dict[str, Any]]:
    """REGEX:KEY=VALUE, split at the last colon before a KEY=, for the regex may hold colons."""
    found = _LAYER.fullmatch(text)
    if found is None:
        console.usage_error(PROG, f"--layer {text}: not REGEX:KEY=VALUE")
    if found["key"] == "weights":
        return found["pattern"], {"weights": _numbers(f"--layer {found['pattern']}:weights", found["value"])}
    key, value = _pair(method, "--layer", f"{found['key']}={found['value']}", text)
    return found["pattern"], {key: value}


def _merge(options: argparse.Namespace) -> int:
    console.terminate_like_interrupt()
    output = None if options.dry_run or options.check else options.output
    base = _base(options)
    _check_files(options, output, [] if base is None else [base.path, *base.files])
    if options.method in ALGEBRA:
        report = _algebra(options, base, output)
    else:
        from shira_format.merge import open_merge

        job = open_merge(
            options.adapters, method=options.method, weights=options.weights, options=options.option,
            layers=options.layer, base=base, density=options.density, self_contained=options.self_contained,
            include=options.include, exclude=options.exclude,
        )  # fmt: skip
        with ExitStack() as stack:
            if options.check or options.report is not None:
                joining = _joining(job, options)
                if options.report is not None and not options.dry_run:
                    stack.enter_context(_written(joining, options))
            if options.check:
                if options.json:
                    console.print_json(joining.as_json())
                else:
                    print(joining.text())
                return 0
            with _bar(options, len(job.names) + len(job.whole)) as step:
                report = job.write(output, threads=options.threads, progress=step)
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    if options.json:
        console.print_json(_json(report, options, output))
    else:
        print(_text(report, output))
    return 0


def _check_files(options: argparse.Namespace, output: Path | None, base: Sequence[Path]) -> None:
    """Raise ShiraError if a file to write is there already, is an input, or is another file to write."""
    from shira_format import SourceError
    from shira_format.storage.paths import check_not_input

    inputs = [*map(Path, options.adapters), *base, *([] if options.moments is None else [options.moments])]
    report = None if options.dry_run else options.report
    for path in (output, report):
        if path is None:
            continue
        check_not_input(path, inputs)
        console.check_output(path, force=options.force)
    if output is not None and report is not None and output.resolve() == report.resolve():
        raise SourceError(f"{report}: the report and the adapter need two names")


def _base(options: argparse.Namespace) -> Checkpoint | None:
    if options.base is None:
        return None
    from shira_format.checkpoints import open_checkpoint

    base = open_checkpoint(options.base)
    for text in base.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    return base


@contextmanager
def _bar(options: argparse.Namespace, total: int | None) -> Iterator[Callable[..., object]]:
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=total, unit="tensors", disable=hidden, leave=False) as bar:
        yield lambda *_: bar.update(1)


def _joining(job: Merge, options: argparse.Namespace) -> MergeAnalysis:
    from shira_analysis.merging.analysis import analyse_merge
    from shira_format.calibration.moments import Moments

    moments = None if options.moments is None else Moments.read(options.moments)
    with _bar(options, len(job.names)) as step:
        return analyse_merge(job, moments, progress=step)


@contextmanager
def _written(joining: MergeAnalysis, options: argparse.Namespace) -> Iterator[None]:
    """The report in its file, which appears when the block has ended without an exception."""
    from shira_format.storage.atomic import atomic_file

    if options.report.suffix.lower() == ".json":
        text = json.dumps(joining.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        from shira_analysis.report.html.merge_page import merge_page

        text = merge_page(joining)
    with atomic_file(options.report) as out:
        out.write(text.encode(errors="backslashreplace"))
        yield


def _algebra(options: argparse.Namespace, base: Checkpoint | None, output: Path | None) -> MergeReport:
    """Subtract, compose or invert, and write the result tensor by tensor."""
    from shira_format import AdapterFile, AdapterWriter, SourceError
    from shira_format.merge import MergeReport
    from shira_format.names.filters import name_filter

    files = [AdapterFile(path, separate_maps=True) for path in options.adapters]
    chosen = name_filter(options.include, options.exclude)
    result = _result(options.method, options.adapters, base)
    names = [name for name in dict.fromkeys([n for f in files for n in f.manifest.tensors] + list(result)) if chosen(name)]  # fmt: skip
    whole = [name for name in result.dense if chosen(name)]
    removed = [name for name in result.removed if chosen(name)]
    if not names and not whole and not removed:
        raise SourceError("no tensor is left by the choice of names")
    manifest = {key: value for key, value in result.manifest.items() if key != "removed"}
    if removed:
        manifest["removed"] = removed
    report = MergeReport([str(path) for path in options.adapters], options.method, whole=whole)
    if removed:
        report.notices.append(
            f"removes {len(removed)} tensors that the adapter added ({removed[0]} for example): shira-convert shira_to_full does that, "
            "live models keep their tensors and refuse it"
        )
    with ExitStack() as stack:
        step = stack.enter_context(_bar(options, len(names) + len(whole)))
        writer = None if output is None else stack.enter_context(AdapterWriter(output, manifest))
        for name in names:
            tensor = result.get(name)
            if writer is not None and tensor is not None:
                writer.add(tensor)
            parts = [file.sparse(name) if name in file.manifest.tensors else None for file in files]
            report.tensors.append(_account(name, parts, tensor))
            step()
        for name in whole:
            if writer is not None:
                writer.add_dense(result.dense[name])
            step()
    if output is not None:
        report.file_bytes = output.stat().st_size
    return report


def _result(method: str, adapters: Sequence[str], base: Checkpoint | None) -> Adapter:
    from shira_format.merge.algebra import compose, invert, subtract

    if method == "invert":
        return invert(adapters[0], base)
    if method == "subtract":
        return subtract(adapters[0], adapters[1], base)
    return compose(*adapters, base=base)


def _account(name: str, parts: Sequence[SparseTensor | None], result: SparseTensor | None) -> MergedTensor:
    import numpy as np

    from shira_format._core.compiled import union
    from shira_format.merge import MergedTensor

    known = result if result is not None else next(part for part in parts if part is not None)
    every, places = union([part.indices for part in parts if part is not None])
    count = np.zeros(every.size, np.int64)
    for at in places:
        count[at] += 1
    return MergedTensor(
        name, known.shape, 0 if result is None else result.nnz, known.numel,
        tuple(0 if part is None else part.nnz for part in parts), int(np.count_nonzero(count > 1)),
    )  # fmt: skip


def _json(report: MergeReport, options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "report": None if options.report is None or options.dry_run else str(options.report),
        "method": report.method,
        "inputs": report.labels,
        "weights": options.weights,
        "totals": {
            "tensors": len(report.tensors),
            "inputs": _inputs(report),
            "shared": report.shared,
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "energy_kept": report.energy_kept,
            "whole_tensors": len(report.whole),
            "file_bytes": report.file_bytes,
        },
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "inputs": list(tensor.inputs),
                "shared": tensor.shared,
                "nnz": tensor.nnz,
                "numel": tensor.numel,
                "density": tensor.nnz / tensor.numel if tensor.numel else 0.0,
                "energy_kept": _kept(tensor.energy, tensor.energy_kept),
            }
            for tensor in report.tensors
        ],
        "whole": report.whole,
        "notices": report.notices,
    }


def _inputs(report: MergeReport) -> list[int]:
    return [sum(tensor.inputs[at] for tensor in report.tensors) for at in range(len(report.labels))]


def _kept(energy: float | None, kept: float | None) -> float | None:
    """Share of the sum of squares that was kept; of a change of 0, all."""
    if energy is None or kept is None:
        return None
    return kept / energy if energy else 1.0


def _text(report: MergeReport, output: Path | None) -> str:
    names = [Path(label).name for label in report.labels]
    names = names if len(set(names)) == len(names) else report.labels
    head: tuple[str, ...] = ("tensor", *map(text.printable, names), "shared", "result", "density")
    totals = ("all", *map(text.count, [*_inputs(report), report.shared, report.nnz]), text.percent(report.density))  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            tensor.name, *map(text.count, [*tensor.inputs, tensor.shared, tensor.nnz]),
            text.percent(tensor.nnz / tensor.numel if tensor.numel else 0.0),
        )
        for tensor in report.tensors
    ]  # fmt: skip
    rows.append(totals)
    kept = [_kept(tensor.energy, tensor.energy_kept) for tensor in report.tensors]
    if any(share is not None for share in kept):
        head += ("energy lost",)
        shares = [*kept, report.energy_kept]
        rows = [(*row, "" if share is None else text.percent(1 - share)) for row, share in zip(rows, shares, strict=True)]  # fmt: skip
    lines = [text.table(head, rows)] if report.tensors else []
    if report.whole:
        lines.append(f"stored whole: {', '.join(map(text.printable, report.whole))}")
    if output is None:
        lines.append("dry run: nothing was written")
    else:
        lines.append(f"{text.printable(str(output))}: {text.file_size(report.file_bytes or 0)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
