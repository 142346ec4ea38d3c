"""``shira-mask``: which entries of a model's weights an adapter may change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shira_cli import app, options
from shira_cli.convert.running import usage_errors
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_format.masks.base import Rule
    from shira_format.masks.limits import Limits
    from shira_format.masks.make import Calibration, MaskReport
    from shira_format.masks.plan import MaskPlan
    from shira_format.masks.weights import Weight

PROG = "shira-mask"

EXAMPLE = """
examples:
  shira-mask --base my-model/ --rule wm --density 0.01 -o mask.st
  shira-mask --base my-model/ --rule rand --rank 8 --seed 1 --exclude embed -o mask.st
  shira-mask --base my-model/ --rule struct --lines columns --offset 1 -o mask.st
  shira-mask --base my-model/ --rule wm --density 0.01 --without first-task.st -o second-task.st
  shira-mask --combine union first.st second.st -o both.st
  shira-mask --base my-model/ --rule snip --data texts.jsonl --task classify --scope global --runs 16 -o mask.st
"""

RULES = ("wm", "rand", "struct", "grad", "snip", "lift", "gallop", "talos", "neuroada")
COMBINATIONS = ("union", "intersection", "difference")
_WITH_DATA = ("grad", "snip", "gallop", "talos")

_F = TypeVar("_F", bound=Callable[..., Any])


def _size_options(command: _F) -> _F:
    for option in (
        click.option("--without", type=options.PATH, multiple=True, metavar="MASK", help="Choose no entries that this mask or adapter has; may be repeated."),
        click.option("--within", type=options.PATH, multiple=True, metavar="MASK", help="Choose among the entries of this mask or adapter, and leave out weights that it lacks; may be repeated."),
        click.option("--band", type=click.IntRange(min=0), default=0, metavar="I", help="Take the I-th band of the ranking: 0 is the best entries (default), 1 the next so many, and so on."),
        click.option("--runs", type=options.COUNT, default=1, metavar="L", help="Take aligned runs of L entries (2, 4, ... 256) by the sums of their scores."),
        click.option("--scope", type=click.Choice(["tensor", "global", "row"]), default="tensor", help="Rank the entries of each tensor (default), of all tensors together, or of each row, with the same number in each."),
        click.option("--rank", type=options.COUNT, metavar="R", help="As many entries as a LoRA of rank R has parameters: R (m + n) for a matrix m x n."),
        click.option("--top-k", type=options.COUNT, metavar="N", help="This many entries per tensor, or in all with --scope global."),
        click.option("--density", type=options.SHARE, metavar="D", help="This share of the entries, in (0, 1] (default: 0.01)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _rule_options(command: _F) -> _F:
    for option in (
        click.option("--lift-rank", type=options.COUNT, metavar="R", help="With --rule lift: the rank of the approximation (default: 64)."),
        click.option("--no-diagonal", is_flag=True, help="With --rule struct: leave out the diagonal."),
        click.option("--diagonal", type=int, metavar="K", help="With --rule struct: the K-th diagonal above the main one (default: 0)."),
        click.option("--offset", type=click.IntRange(min=0), metavar="N", help="With --rule struct: the first row or column (default: 0)."),
        click.option("--step", type=options.COUNT, metavar="F", help="With --rule struct: every F-th row or column (default: as the size allows)."),
        click.option("--lines", type=click.Choice(["rows", "columns"]), help="With --rule struct: rows (default) or columns."),
        click.option("--seed", type=click.IntRange(min=0), metavar="N", help="With --rule rand and talos: the seed (default: 0)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _data_options(command: _F) -> _F:
    for option in (
        click.option("--at-once", type=options.COUNT, metavar="N", help="Compute the gradients of N weights at a time: the rest is kept on disk, and the texts are run once for each N."),
        click.option("--max-length", type=options.COUNT, default=512, metavar="N", help="Cut texts after N tokens (default: 512, or what the model takes)."),
        click.option("--batch", type=options.COUNT, metavar="N", help="Texts per batch (default: 16; talos: 1)."),
        click.option("--limit", type=options.COUNT, metavar="N", help="Use only the first N texts."),
        click.option("--task", type=click.Choice(["causal", "classify"]), default="causal", help="The loss: of next tokens (default), or of a linear classifier on the mean of the last hidden states, which is fitted to the unchanged model first."),
        click.option("--data", type=options.PATH, metavar="FILE", help="With --rule grad, snip, gallop and talos: a .jsonl file whose objects have 'text', and 'label' for --task classify; or a file with one text a line."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=app.Command, example=EXAMPLE)
@click.argument("masks", type=options.PATH, nargs=-1, metavar="[MASK]...")
@options.base_option("; of rules that need --data a folder that transformers loads")
@click.option("--combine", type=click.Choice(COMBINATIONS), help="Make no new mask, but combine the files MASK: the entries of any of them, of all, or of the first and none of the others.")  # fmt: skip
@click.option("--rule", type=click.Choice(RULES), default="wm", help="How entries are chosen (default: wm).")
@options.output_file("The mask file to write.")
@options.compact_option
@_size_options
@options.filters("Mask")
@_rule_options
@_data_options
@options.force_option("Replace FILE if it exists.")
@options.dry_run_option
@options.threads_option
@options.printing
@app.version_option
def command(
    masks: tuple[Path, ...],
    base: str | None,
    combine: str | None,
    rule: str,
    output: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    force: bool,
    dry_run: bool,
    threads: int | None,
    printer: Printer,
    **settings: Any,
) -> int:
    """Choose the entries that an adapter may change, and write them as a mask file.

    wm: the largest weights. rand: random ones. struct: regular rows or columns and the diagonal. grad, snip: the largest
    gradients, or their products with the weights, on texts of yours. Later rules: lift (the largest of a low-rank
    approximation), gallop (large gradients on small weights), talos (the lowest Fisher information), neuroada (the same
    number for each output). Rules that need gradients run the model, and need torch and transformers:
    pip install 'shira-format[torch]'. With --combine the files MASK are combined instead.
    """
    from shira_format.masks.plan import MaskPlan
    from shira_format.masks.size import Size

    if combine is not None or masks:
        if settings["compact"]:
            raise click.UsageError(
                "--compact does not go with --combine: shira-convert repack stores the result in fewer bytes"
            )
        report = _combined(masks, combine, output, force=force, dry_run=dry_run)
        _print(report, output, printer, dry_run=dry_run)
        return 0
    if base is None:
        raise click.UsageError("Missing option '--base'.")
    chosen = _rule(rule, settings)
    with usage_errors():
        size = Size(settings["density"], settings["top_k"], settings["rank"], settings["scope"])
        plan = MaskPlan(chosen, size, settings["runs"], settings["band"])
        if settings["within"] or settings["without"]:
            plan = replace(plan, limits=_limits(base, settings))
    if bool(chosen.gradients) != (settings["data"] is not None):
        needs = "needs --data" if chosen.gradients else "needs no --data"
        raise click.UsageError(f"--rule {rule} {needs}")
    check_output_files(
        output, inputs=[base, settings["data"], *settings["within"], *settings["without"]], force=force
    )
    report = _made(base, None if dry_run else output, plan, include, exclude, threads, printer, settings)
    if report.unreached:
        printer.notes([f"left out, because the loss does not depend on them: {_some(report.unreached)}"])
    _print(report, output, printer, dry_run=dry_run)
    return 0


def _print(report: MaskReport, output: Path, printer: Printer, *, dry_run: bool) -> None:
    from shira_analysis.reports.text import mask

    printer.result(
        lambda: mask.as_json(report, None if dry_run else output),
        lambda: mask.as_text(report, output, dry_run=dry_run),
    )


def _combined(masks: tuple[Path, ...], how: str | None, output: Path, *, force: bool, dry_run: bool) -> MaskReport:
    """Combine files; a usage error for options that are about a new mask."""
    from shira_format.masks.make import write_combination

    if how is None:
        raise click.UsageError("files of masks are for --combine; --within and --without name masks to choose by")
    if len(masks) < 2:
        raise click.UsageError("--combine takes two masks or more")
    context = click.get_current_context()
    kept = {"masks", "combine", "output", "force", "dry_run", "as_json", "quiet"}
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if given is click.core.ParameterSource.COMMANDLINE and parameter.name not in kept:
            raise click.UsageError(f"{parameter.opts[0]} has no meaning with --combine")
    check_output_files(output, inputs=masks, force=force)
    return write_combination(how, masks, None if dry_run else output)


def _rule(name: str, settings: dict[str, Any]) -> Rule:
    """The rule with its settings; a usage error for those of other rules."""
    from shira_format.masks import RULES as CLASSES
    from shira_format.masks import Lift, Rand, Struct

    owners = {
        "seed": ("rand", "talos"), "lines": ("struct",), "step": ("struct",), "offset": ("struct",), "diagonal": ("struct",),
        "no_diagonal": ("struct",), "lift_rank": ("lift",), "at_once": _WITH_DATA, "limit": _WITH_DATA, "batch": _WITH_DATA,
    }  # fmt: skip
    for option, rules in owners.items():
        if settings[option] not in (None, False) and name not in rules:
            raise click.UsageError(f"--{option.replace('_', '-')} has no meaning with --rule {name}")
    if settings["no_diagonal"] and settings["diagonal"] is not None:
        raise click.UsageError("--diagonal and --no-diagonal exclude each other")
    with usage_errors():
        if name == "rand":
            return Rand(settings["seed"] or 0)
        if name == "lift":
            return Lift(**({"rank": settings["lift_rank"]} if settings["lift_rank"] else {}))
        if name == "struct":
            diagonal = None if settings["no_diagonal"] else settings["diagonal"] or 0
            return Struct(settings["lines"] or "rows", settings["step"], settings["offset"] or 0, diagonal)
    return CLASSES[name]()


def _made(
    base: str,
    out: Path | None,
    plan: MaskPlan,
    include: Sequence[str],
    exclude: Sequence[str],
    threads: int | None,
    printer: Printer,
    settings: dict[str, Any],
) -> MaskReport:
    from shira_format.checkpoints import open_checkpoint
    from shira_format.masks.make import write_mask
    from shira_format.masks.weights import weights_of

    weights: list[Weight]
    calibration: Calibration | None = None
    with printer.bar("texts") as texts, printer.bar("entries", scale=True) as bar:
        checkpoint = open_checkpoint(base)
        printer.notes(checkpoint.notices)
        inputs = [checkpoint.path, *checkpoint.files, *settings["within"], *settings["without"]]
        if plan.rule.gradients:
            from shira_format.masks.tasks import text_task, weights_in_files

            data = settings["data"]
            inputs.append(data)
            talos = plan.rule.name == "talos"
            task = text_task(
                Path(base), data, settings["task"],
                limit=settings["limit"], batch=settings["batch"] or (1 if talos else 16), max_length=settings["max_length"],
                own_outputs=talos, seed=settings["seed"] or 0,
            )  # fmt: skip
            weights, unknown = weights_in_files(task.loaded.model, checkpoint, include, exclude)
            if task.empty:
                printer.notes([f"{task.empty} empty lines are left out"])
            if unknown:
                printer.notes([f"not masked, because no tensor in the files has the name: {_some(unknown)}"])
            groups = -(-len(weights) // (settings["at_once"] or len(weights)))
            texts.reset(groups * len(task.batches))
            texts.unit = "batches"
            calibration = task.calibration(settings["at_once"], texts.update)
        else:
            weights = weights_of(checkpoint, include, exclude)
        return write_mask(
            base, out, plan, weights,
            inputs=inputs, include=include, exclude=exclude, calibration=calibration, threads=threads,
            compact=settings["compact"],
            progress=bar.update, on_start=bar.reset,
        )  # fmt: skip


def _limits(base: str, settings: dict[str, Any]) -> Limits:
    from shira_format.checkpoints import open_checkpoint
    from shira_format.masks.limits import Limits

    return Limits(settings["within"], settings["without"], set(open_checkpoint(base)))


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
