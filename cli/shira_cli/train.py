"""``shira-train``: a sparse adapter trained on texts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shira_cli import app, options
from shira_cli.convert.running import usage_errors
from shira_cli.output import Printer
from shira_format.errors import SourceError
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_format.training.report import TrainingReport
    from shira_format.training.run import Plan

PROG = "shira-train"

EXAMPLE = """
examples:
  shira-train --base my-model/ --data train.jsonl --task classify -o adapter.st
  shira-train --base my-model/ --data train.jsonl --task causal --mask snip --density 0.005 --lr auto -o adapter.st
  shira-train --base my-model/ --data train.jsonl --task classify --test test.jsonl --compare lora -o adapter.st
  shira-train --base my-model/ --data train.jsonl --task classify --mask spiel --regrow-every 20 -o adapter.st
  shira-train --base model.gguf --data texts.jsonl --task causal --mask mask.st --checkpoints run/ -o adapter.st
"""

RULES = ("wm", "rand", "struct", "grad", "snip", "lift", "gallop", "talos", "neuroada")
_REGROWN = "spiel"

_F = TypeVar("_F", bound=Callable[..., Any])


class LearningRate(click.types.FloatParamType):
    """A positive number, or ``auto``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number or the word; a usage error for others."""
        if value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < 10:
            self.fail(f"--lr {value} is neither a positive number nor auto", param, ctx)
        return number


def _mask_options(command: _F) -> _F:
    for option in (
        click.option("--regrow-every", type=options.COUNT, metavar="N", help="With --mask spiel: change entries every N steps (default: a tenth of the steps, at most 100)."),
        click.option("--runs", type=options.COUNT, metavar="L", help="Take aligned runs of L entries (2, 4, ... 256) by the sums of their scores."),
        click.option("--scope", type=click.Choice(["tensor", "global", "row"]), help="Rank the entries of each tensor (default), of all tensors together, or of each row, with the same number in each."),
        click.option("--rank", type=options.COUNT, metavar="R", help="As many entries as a LoRA of rank R has parameters."),
        click.option("--top-k", type=options.COUNT, metavar="N", help="This many entries per tensor, or in all with --scope global."),
        click.option("--density", type=options.SHARE, metavar="D", help="Train this share of the entries, in (0, 1] (default: 0.01)."),
        click.option("--mask", default="wm", metavar="RULE", help=f"How entries are chosen ({', '.join(RULES)}; default: wm); or {_REGROWN}: random ones, of which some are dropped and others grown in training; or a mask file."),
    ):  # fmt: skip
        command = option(command)
    return command


def _schedule_options(command: _F) -> _F:
    for option in (
        click.option("--patience", type=options.COUNT, default=4, metavar="N", help="Stop after N validations without a better one (default: 4)."),
        click.option("--evaluations", type=options.COUNT, default=10, metavar="N", help="Measure the validation texts N times (default: 10)."),
        click.option("--accumulate", type=options.COUNT, default=1, metavar="N", help="Compute each batch in N parts, to save memory (default: 1)."),
        click.option("--batch", type=options.COUNT, default=16, metavar="N", help="Texts per step (default: 16)."),
        click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, metavar="D", help="Weight decay of AdamW on the trained entries (default: 0)."),
        click.option("--lr", type=LearningRate(), metavar="RATE", help="The highest learning rate (default: 0.005; of a LoRA to compare with 0.001), or auto: the best of several in short runs."),
        click.option("--steps", type=options.COUNT, metavar="N", help="Train for N steps at most."),
        click.option("--epochs", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Go through the texts N times at most (default: 8)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _text_options(command: _F) -> _F:
    for option in (
        click.option("--max-length", type=options.COUNT, default=128, metavar="N", help="Cut texts after N tokens (default: 128, or what the model takes)."),
        click.option("--limit", type=options.COUNT, metavar="N", help="Use only the first N texts."),
        click.option("--test", type=options.PATH, metavar="FILE", help="Other texts that have no part in the training, to measure the result on."),
        click.option("--validation", type=options.SHARE, default=0.2, metavar="D", help="Hold out this share of the texts, to choose the best checkpoint by (default: 0.2)."),
        click.option("--task", type=click.Choice(["classify", "causal"]), required=True, help="Learn the texts' labels, or the texts themselves token by token."),
        click.option("--data", type=options.PATH, required=True, metavar="FILE", help="The texts: .jsonl with 'text' and, for --task classify, 'label'; for causal also one text a line."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=app.Command, example=EXAMPLE)
@click.option("--base", type=options.PATH, required=True, metavar="MODEL", help="The model: a folder that transformers loads, or a GGUF file.")  # fmt: skip
@_text_options
@_mask_options
@options.filters("Train")
@_schedule_options
@click.option("--dora", is_flag=True, help="Train directions and magnitudes of the entries (SHiRA-DoRA).")
@options.seed_option
@click.option("--compare", type=click.Choice(["lora"]), help="Train a LoRA of equal size in the same way, too.")
@click.option("--checkpoints", type=options.PATH, metavar="DIR", help="Keep checkpoints in this folder, and go on from the last one that it holds.")  # fmt: skip
@click.option("--picture", type=options.PATH, metavar="FILE", help="Draw the losses into this file (.png, .svg or .pdf).")  # fmt: skip
@options.compact_option
@options.self_contained_option
@options.output_file()
@options.force_option("Replace FILE if it exists, and remove the training state beside it (FILE.state).")
@options.dry_run_option
@options.printing
@app.version_option
def command(
    base: Path,
    data: Path,
    output: Path,
    test: Path | None,
    checkpoints: Path | None,
    picture: Path | None,
    force: bool,
    dry_run: bool,
    printer: Printer,
    **settings: Any,
) -> int:
    """Train a sparse adapter of MODEL on texts, and write it as an adapter file.

    Only the chosen entries are trained, by default of the matrices in the model's blocks; a new head of a classifier is
    trained whole and is in the file, too. The checkpoint with the lowest validation loss is kept. Printed is the quality on
    the held-out texts, beside the base's. Needs torch, transformers and accelerate: pip install 'shira-format[train]'.
    """
    from shira_cli import train_report
    from shira_format.training.run import Events, train_adapter
    from shira_format.training.state import state_path

    plan = _plan(settings)
    # The state of an adapter that is replaced is removed.
    check_output_files(
        output, state_path(output), picture, inputs=[base, data, test, plan.mask, checkpoints], force=force
    )
    if base.is_dir() and base.resolve() in output.resolve().parents:
        raise SourceError(f"{output}: is in the folder of the model")
    with printer.bar("steps") as bar:

        def ready(report: TrainingReport) -> None:
            printer.notes([*report.notices, train_report.what_is_trained(report)])

        def step(steps: int, number: int, loss: float) -> None:
            if bar.total != steps or number < bar.n:
                bar.reset(steps)
            bar.update(number - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        report = train_adapter(
            base, data, None if dry_run else output, plan,
            test=test, checkpoints=checkpoints, events=Events(ready, step, bar.set_description),
        )  # fmt: skip
    if picture is not None and not dry_run:
        from shira_cli.train_picture import draw

        draw(report, picture)
    printer.result(
        lambda: train_report.as_json(report, None if dry_run else output),
        lambda: train_report.as_text(report, output, dry_run=dry_run),
    )
    return 0


def _plan(settings: dict[str, Any]) -> Plan:
    """The options as a plan; a usage error for those that do not go together."""
    from shira_format.masks import RULES as CLASSES
    from shira_format.masks import Rand
    from shira_format.masks.plan import MaskPlan
    from shira_format.masks.size import Size
    from shira_format.training.fit import Schedule
    from shira_format.training.run import Plan
    from shira_format.training.sparse import Options

    if settings["steps"] is not None and settings["epochs"] is not None:
        raise click.UsageError("--steps and --epochs exclude each other")
    size = tuple(settings[name] for name in ("density", "top_k", "rank"))
    name, seed = settings["mask"], settings["seed"]
    mask: MaskPlan | Path
    with usage_errors():
        regrow = _regrow(settings)
        if name in (*RULES, _REGROWN):
            rule = Rand(seed) if name in ("rand", _REGROWN) else CLASSES[name]()
            mask = MaskPlan(
                rule,
                Size(settings["density"], settings["top_k"], settings["rank"], settings["scope"] or "tensor"),
                settings["runs"] or 1,
            )
        else:
            mask = Path(name)
            if not mask.is_file():
                raise click.UsageError(
                    f"--mask {name} is neither a file nor one of {', '.join((*RULES, _REGROWN))}"
                )
            if any(value is not None for value in (*size, settings["scope"], settings["runs"])):
                raise click.UsageError(
                    "--density, --top-k, --rank, --scope and --runs have no meaning with a mask file"
                )
        schedule = Schedule(
            settings["steps"], settings["epochs"] or Schedule.epochs, settings["batch"], settings["accumulate"],
            settings["lr"], weight_decay=settings["weight_decay"], evaluations=settings["evaluations"],
            patience=settings["patience"], seed=seed,
        )  # fmt: skip
    return Plan(
        settings["task"], mask, settings["include"], settings["exclude"], Options(dora=settings["dora"], seed=seed), regrow, schedule,
        settings["validation"], settings["limit"], settings["max_length"],
        lora=settings["compare"] == "lora", self_contained=settings["self_contained"], compact=settings["compact"],
    )  # fmt: skip


def _regrow(settings: dict[str, Any]) -> int | None:
    """Steps from one change of the entries to the next, 0 for the default; None: they do not change."""
    every: int | None = settings["regrow_every"]
    if settings["mask"] != _REGROWN:
        if every is not None:
            raise click.UsageError(f"--regrow-every has no meaning without --mask {_REGROWN}")
        return None
    if settings["dora"] or settings["runs"] or settings["scope"] == "row":
        raise click.UsageError(
            f"--mask {_REGROWN} changes single entries of a weight: it goes without --dora, --runs and --scope row"
        )
    return every or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
