"""``shira-merge``: merge adapters of one base into one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shira_cli import app, options
from shira_cli.output import Printer, json_text
from shira_format.merging.methods import METHODS, shown
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_analysis.merging.report import MergeAnalysis
    from shira_format.checkpoints import Checkpoint
    from shira_format.merging import Merge, MergeReport

PROG = "shira-merge"

EXAMPLE = """
examples:
  shira-merge a.st b.st -o ab.st --weights 0.7,0.3
  shira-merge a.st b.st -o ab.st --base my-model/ --method ties --density 0.2
  shira-merge a.st b.st -o ab.st --layer 'attention:weights=1,0' --max-density 0.01
  shira-merge a.st b.st --check --report ab.html
  shira-merge a.st b.st -o only-a.st --method subtract
"""

# The methods that follow an exact rule of their own: what they do, and how many adapters they take at least and at most.
ALGEBRA = {
    "subtract": ("the changes of the first adapter minus those of the second", 2, 2),
    "compose": ("one adapter after the other, in this order; each was made for the result of those before it", 2, None),
    "invert": ("the adapter that restores the base from the adapted weights", 1, 1),
}  # fmt: skip
# Options on how changes are weighed and chosen, which those methods do not do.
_WEIGHING = (
    "weights",
    "option",
    "layer",
    "density",
    "max_density",
    "self_contained",
    "threads",
    "report",
    "moments",
    "check",
)

_LAYER = re.compile(r"(?P<pattern>.*):(?P<key>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


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


@click.command(cls=app.Command, example=f"{_methods_help()}\n{EXAMPLE}")
@click.argument("adapters", nargs=-1, required=True, type=options.PATH, metavar="ADAPTER...")
@options.output_file(required=False)
@click.option("--method", type=click.Choice([*METHODS, *ALGEBRA]), default="linear", metavar="METHOD", help="How to merge; the methods are listed below (default: linear).")  # fmt: skip
@click.option(
    "--weights", metavar="W,W,...", help="A weight for each adapter, multiplied by its alpha (default: 1)."
)
@click.option("--density", metavar="D[,D...]", help="The method's density, such as of ties and dare_ties: the share of each adapter's entries that takes part in the merge; one for all adapters or one for each.")  # fmt: skip
@click.option("--max-density", type=options.SHARE, metavar="D", help="Keep at most this share of each tensor's entries in the result, the largest changes first.")  # fmt: skip
@click.option("--option", multiple=True, metavar="KEY=VALUE", help="An option of the method, listed below; may be repeated.")  # fmt: skip
@click.option("--layer", multiple=True, metavar="REGEX:KEY=VALUE", help="An option, or 'weights', for tensors whose name matches REGEX; may be repeated, later ones win.")  # fmt: skip
@options.base_option(" that the adapters were made for; needed where several adapters that are not self-contained change one tensor")  # fmt: skip
@click.option("--self-contained/--no-self-contained", default=None, help="Store the base's values too (default: if all adapters do).")  # fmt: skip
@options.compact_option
@options.filters("Merge")
@options.threads_option
@click.option("--report", type=options.PATH, metavar="FILE", help="Write a report on how the adapters interfere, tensor by tensor, as .html or .json.")  # fmt: skip
@options.moments_option
@click.option("--check", is_flag=True, help="Print that report, and merge nothing.")
@options.force_option("Replace the files if they exist.")
@options.dry_run_option
@options.printing
@app.version_option
def command(adapters: Sequence[Path], method: str, printer: Printer, **given: Any) -> int:
    """Merge adapters of one base into one adapter, without making a dense tensor.

    An entry of the result is the base's value plus what the method makes of the adapters' deltas there, times the
    weights. Where only one adapter changes an entry, at weight 1, its target is kept bit for bit.
    """
    from shira_analysis.reports.text import merge

    settings = _settings(method, adapters, given)
    output = None if settings["dry_run"] or settings["check"] else settings["output"]
    page = None if settings["dry_run"] else settings["report"]
    base = _base(settings["base"], printer)
    weights = [] if base is None else [base.path, *base.files]
    inputs = [*adapters, settings["base"], *weights, settings["moments"]]
    check_output_files(output, page, inputs=inputs, force=settings["force"])
    if method in ALGEBRA:
        report = _combine(method, adapters, output, base, printer, settings)
    else:
        from shira_format.merging import open_merge

        job = open_merge(
            adapters, method=method, weights=settings["weights"], options=settings["option"],
            layers=settings["layer"], base=base, max_density=settings["max_density"], self_contained=settings["self_contained"],
            compact=settings["compact"],
            include=settings["include"], exclude=settings["exclude"],
        )  # fmt: skip
        with ExitStack() as stack:
            if settings["check"] or settings["report"] is not None:
                analysis = _analysis(job, settings["moments"], printer)
                if page is not None:
                    stack.enter_context(_written(analysis, page))
            if settings["check"]:
                printer.result(analysis.as_json, analysis.text)
                return 0
            with printer.bar("tensors", len(job.names) + len(job.whole)) as bar:
                report = job.write(output, threads=settings["threads"], progress=lambda *_: bar.update())
    printer.notes(report.notices)
    printer.result(
        lambda: merge.as_json(report, output, weights=settings["weights"], page=page),
        lambda: merge.as_text(report, output),
    )
    return 0


def _base(path: str | None, printer: Printer) -> Checkpoint | None:
    if path is None:
        return None
    from shira_format.checkpoints import open_checkpoint

    base = open_checkpoint(path)
    printer.notes(base.notices)
    return base


def _analysis(job: Merge, moments: Path | None, printer: Printer) -> MergeAnalysis:
    from shira_analysis.merging.analysis import analyse_merge
    from shira_format.calibration.moments import Moments

    inputs = None if moments is None else Moments.read(moments)
    with printer.bar("tensors", len(job.names)) as bar:
        return analyse_merge(job, inputs, progress=lambda *_: bar.update())


@contextmanager
def _written(analysis: MergeAnalysis, page: Path) -> Iterator[None]:
    """The report in its file, which appears when the block has ended without an exception."""
    from shira_format.storage.atomic import atomic_file

    if page.suffix.lower() == ".json":
        text = json_text(analysis.as_json()) + "\n"
    else:
        from shira_analysis.reports.html.merge_page import merge_page

        text = merge_page(analysis)
    with atomic_file(page) as out:
        out.write(text.encode(errors="backslashreplace"))
        yield


def _settings(method: str, adapters: Sequence[Path], given: dict[str, Any]) -> dict[str, Any]:
    """The options, checked and with their values parsed.

    Raises:
        UsageError: they do not go together.
    """
    if method in ALGEBRA:
        for name in _WEIGHING:
            if given[name] not in (None, False, ()) or (name == "self_contained" and given[name] is False):
                flag = f"--{'no-' if given[name] is False else ''}{name.replace('_', '-')}"
                raise click.UsageError(f"{flag} does not go with --method {method}")
        _, least, most = ALGEBRA[method]
        if not least <= len(adapters) <= (most or len(adapters)):
            takes = f"{least} adapter{'s' if least > 1 else ''}{'' if most else ' or more'}"
            raise click.UsageError(f"--method {method} takes {takes}, not {len(adapters)}")
    if given["output"] is None and not (given["check"] or given["dry_run"]):
        raise click.UsageError("-o is missing (only --check and --dry-run go without)")
    if given["report"] is not None and given["report"].suffix.lower() not in (".html", ".json"):
        raise click.UsageError(f"--report {given['report']}: a report ends in .html or .json")
    if given["moments"] is not None and given["report"] is None and not given["check"]:
        raise click.UsageError("--moments is about the report: it needs --report or --check")
    return given if method in ALGEBRA else given | _parsed(method, len(adapters), given)


def _parsed(method: str, count: int, given: dict[str, Any]) -> dict[str, Any]:
    weights = None if given["weights"] is None else options.numbers("--weights", given["weights"])
    if weights is not None and len(weights) != count:
        raise click.UsageError(f"--weights: {len(weights)} for {count} adapters")
    pairs = [_pair(method, "--option", text, text) for text in given["option"]]
    if given["density"] is not None:
        pairs.append(_pair(method, "--density", f"density={given['density']}", given["density"]))
    for number, (key, _) in enumerate(pairs):
        if key in dict(pairs[:number]):
            raise click.UsageError(f"--option {key}: given twice")
    layers = [_layer(method, text) for text in given["layer"]]
    for key, value in [*pairs, *(pair for _, some in layers for pair in some.items())]:
        if isinstance(value, tuple | list) and len(value) != count:
            raise click.UsageError(f"{key}: {len(value)} values for {count} adapters")
    return {"weights": weights, "option": dict(pairs), "layer": layers}


def _pair(method: str, flag: str, text: str, given: str) -> tuple[str, Any]:
    """KEY=VALUE, the value in the option's type, so that the result says the same as if Python had given it."""
    from shira_format.errors import SourceError

    key, found, value = text.partition("=")
    if not found or not key:
        raise click.UsageError(f"{flag} {given}: not KEY=VALUE")
    try:
        return key, METHODS[method].settings({key: value})[key]
    except SourceError as error:
        raise click.UsageError(f"{flag} {given}: {error}") from None


def _layer(method: str, text: str) -> tuple[str, dict[str, Any]]:
    """REGEX:KEY=VALUE, split at the last colon before a KEY=, since the regex may hold colons."""
    found = _LAYER.fullmatch(text)
    if found is None:
        raise click.UsageError(f"--layer {text}: not REGEX:KEY=VALUE")
    if found["key"] == "weights":
        return found["pattern"], {
            "weights": options.numbers(f"--layer {found['pattern']}:weights", found["value"])
        }
    key, value = _pair(method, "--layer", f"{found['key']}={found['value']}", text)
    return found["pattern"], {key: value}


def _combine(
    method: str, adapters: Sequence[Path], output: Path | None, base: Checkpoint | None, printer: Printer, settings: dict[str, Any]
) -> MergeReport:  # fmt: skip
    """Subtract, compose or invert, by an exact rule."""
    from shira_format.merging import compose, invert, subtract

    with printer.bar("tensors") as bar:
        shared: dict[str, Any] = {
            "base": base, "compact": settings["compact"], "include": settings["include"], "exclude": settings["exclude"],
            "progress": lambda _: bar.update(),
        }  # fmt: skip
        if method == "subtract":
            return subtract(adapters[0], adapters[1], output, **shared)
        if method == "invert":
            return invert(adapters[0], output, **shared)
        return compose(adapters, output, **shared)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
