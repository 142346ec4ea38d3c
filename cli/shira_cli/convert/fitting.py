"""``--fit``: a conversion whose values are fitted to what the source does to the model, and the report on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shira_cli import options
from shira_cli.convert.running import one_amount, usage_errors
from shira_cli.output import Printer
from shira_format._core.optional import optional_import
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_format.convert.fit.live import Kind
    from shira_format.convert.fit.report import FitReport
    from shira_format.convert.fit.run import FitOptions

_F = TypeVar("_F", bound=Callable[..., Any])

METHODS = ("moments", "distill")
KINDS: dict[str, Kind] = {"classify": "classifier", "causal": "causal", "embed": "embedding", "states": "states"}
FORMATS = ("png", "svg")
_RANKING = ("energy", "min_change", "scope")
_REFUSED = (*_RANKING, "resume", "dask")

# Options that only a fit has, and what they are if they are not given.
DEFAULTS: dict[str, Any] = {
    "texts": None, "test": None, "keep": None, "max_bytes": None, "task": None, "steps": None, "seed": 0, "max_length": 64,
    "limit": None, "picture": None,
}  # fmt: skip


def fit_options(*, needed: bool) -> Callable[[_F], _F]:
    """``--fit`` and what goes with it; ``needed``: there is always a fit."""
    choice = (
        click.option("--fit", type=click.Choice(METHODS), default="distill", help="How: distill trains the values (default); moments computes them layer by layer without training, which keeps less below a density of 0.5 %.")
        if needed
        else click.option("--fit", type=click.Choice(["none", *METHODS]), default="none", help="Choose entries and values so that the model does what it does with the source: distill trains them, moments computes them layer by layer without training, which keeps less below a density of 0.5 % (default: none, the largest changes as they are).")
    )  # fmt: skip

    def add(command: _F) -> _F:
        for option in (
            click.option("--picture", type=options.PATH, metavar="FILE", help="Draw the effect kept against the density, and the error of each layer (.png or .svg)."),
            click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Use only the first N texts."),
            click.option("--max-length", type=options.COUNT, metavar="N", help=f"Cut texts after N tokens (default: {DEFAULTS['max_length']})."),
            click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of all random numbers (default: 0)."),
            click.option("--steps", type=options.COUNT, metavar="N", help="Train for N steps; of a search, each fit (with distill)."),
            click.option("--task", type=click.Choice(list(KINDS)), help="What the model does, and so what is compared: logits of texts (classify) or tokens (causal), mean-pooled embeddings (embed), or all last hidden states (states); default: what base and source say."),
            click.option("--max-bytes", type=options.BYTES, metavar="S", help="Keep as many entries as FILE has room for in S bytes, such as 200k or 1.5M (powers of 1000) or 1MiB (of 1024)."),
            click.option("--keep", type=float, metavar="R2", help="Keep the fewest entries that keep this share of the effect, such as 0.95: 1 is the source, 0 the base."),
            click.option("--test", type=options.PATH, multiple=needed, metavar="FILE", help="Other texts to measure the result on (default: a fifth of --texts is held out)."),
            click.option("--texts", type=options.PATH, multiple=needed, metavar="FILE", help="Texts like those that the model will see: .jsonl with 'text', or one a line; labels are not used. Without it, a causal model writes its own."),
            choice,
        ):  # fmt: skip
            command = option(command)
        return command

    return add


def split(settings: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The method, the options of the fit, and all others.

    Raises:
        UsageError: an option of a fit without one.
    """
    method = settings.pop("fit")
    given = {name: settings.pop(name) for name in DEFAULTS}
    if method == "none":
        for name, value in given.items():
            if value is not None:
                raise click.UsageError(f"{_flag(name)} goes with --fit moments or --fit distill")
    return method, given, settings


def check(method: str, given: dict[str, Any], settings: dict[str, Any], *, exact: bool = False) -> None:
    """Raise UsageError for options that do not go together with a fit."""
    if exact:
        raise click.UsageError("--exact keeps every difference as it is: --fit has no meaning with it")
    for name in _REFUSED:
        if settings.get(name) not in (None, False):
            raise click.UsageError(
                f"{_flag(name)} does not go with --fit"
                + (": entries are chosen among those of all tensors" if name in _RANKING else "")
            )
    one_amount(
        density=settings.get("density"),
        top_k=settings.get("top_k"),
        keep=given["keep"],
        max_bytes=given["max_bytes"],
    )
    if given["keep"] is not None and not 0 < given["keep"] < 1:
        raise click.UsageError(f"--keep {given['keep']:g} is not in (0, 1)")
    if given["steps"] is not None and method != "distill":
        raise click.UsageError("--steps goes with --fit distill")
    if given["test"] is not None and given["texts"] is None:
        raise click.UsageError("--test goes with --texts")
    if given["picture"] is not None and given["picture"].suffix.lower().lstrip(".") not in FORMATS:
        raise click.UsageError(f"--picture {given['picture']}: pictures are written as {' and '.join(FORMATS)}")


def without(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that :func:`check` refuses."""
    return {name: value for name, value in settings.items() if name not in _REFUSED}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(
    verb: str, *inputs: Any, method: str, given: dict[str, Any], output: Path, force: bool, dry_run: bool,
    printer: Printer, **settings: Any,
) -> int:  # fmt: skip
    """Fit by a verb of :mod:`shira_format.convert.fit.run`, such as ``"fit_lora"``, with progress on stderr, and print its report."""
    found = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    target, picture = None if dry_run else output, None if dry_run else found["picture"]
    read = [found["texts"], found["test"]]
    for one in (*inputs, settings.get("parts", ()), settings.get("held_parts", ())):
        read += one if isinstance(one, list | tuple) else [one]
    check_output_files(target, picture, inputs=read, force=force)
    with optional_import("a fit runs the model, for which it needs torch and transformers", "torch"):
        from shira_format.convert.fit import run as fits
    with printer.bar("steps") as bar, usage_errors():

        def stage(text: str) -> None:
            bar.reset()
            bar.set_description(text)

        def step(steps: int, number: int, loss: float) -> None:
            if bar.total != steps:
                bar.reset(steps)
            bar.update(number - bar.n)
            if math.isfinite(loss):
                bar.set_postfix(loss=f"{loss:.4f}")

        report = getattr(fits, verb)(
            *inputs, target, found["texts"], held=found["test"], keep=found["keep"], max_bytes=found["max_bytes"],
            options=_options(method, found), force=force, on_step=step, on_stage=stage, **settings,
        )  # fmt: skip
    if picture is not None:
        _draw(report, picture)
    show(report, target, printer)
    return 0


def _options(method: str, found: dict[str, Any]) -> FitOptions:
    from shira_format.convert.fit.distill import Distillation
    from shira_format.convert.fit.run import FitOptions

    distillation = Distillation() if found["steps"] is None else Distillation(steps=found["steps"])
    kind = None if found["task"] is None else KINDS[found["task"]]
    return FitOptions(
        method, distillation, length=found["max_length"], limit=found["limit"], seed=found["seed"], kind=kind
    )


def _draw(report: FitReport, path: Path) -> None:
    from shira_analysis.figures.fit import fit_picture
    from shira_format.storage.atomic import atomic_file

    with optional_import("pictures need matplotlib", "figures"):
        image = fit_picture(report, path.suffix.lower().lstrip("."))
    with atomic_file(path) as file:
        file.write(image)


def show(report: FitReport, output: Path | None, printer: Printer) -> None:
    """Print the report on stdout, notices and warnings on stderr."""
    from shira_analysis.reports.text import conversion, fit

    made = report.conversion
    printer.notes([*made.notices, *report.notices])
    printer.result(
        lambda: conversion.as_json(made, output) | {"fit": fit.as_json(report)},
        lambda: conversion.as_text(made, output, fit.as_text(report)),
    )
    printer.warnings(report.warnings())
