"""``shira-demo``: real LoRAs of a real model made sparse, by a cut and by a fit, and sparse adapters trained in their place."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.output import Printer, print_json
from shira_cli.shipped import BASE_PACKAGE, DATA, TASKS, find_base
from shira_format.storage.outputs import check_output_files

__all__ = ["DATA", "TASKS", "command", "find_base", "main"]

PROG = "shira-demo"

EXAMPLE = """
examples:
  shira-demo
  shira-demo --task spam --density 0.01 --density 0.1 --keep adapters/
  shira-demo --cut-only
"""

CUT, FITTED, TRAINED = (0.01, 0.05), (0.01, 0.002), (0.01,)


@click.command(cls=app.Command, example=EXAMPLE)
@click.option("--task", "tasks", type=click.Choice(TASKS), multiple=True, help="This task only (default: both).")
@click.option("--density", "densities", type=options.SHARE, multiple=True, metavar="D", help="Cut and fit the LoRA at this share of the entries; may be repeated (default: cut at 0.01 and 0.05, fitted at 0.01 and 0.002).")  # fmt: skip
@click.option("--scope", type=click.Choice(["tensor", "global"]), default="tensor", help="Cut to the largest changes of each tensor (default) or of all tensors together.")  # fmt: skip
@click.option(
    "--cut-only", is_flag=True, help="Only cut the LoRAs: train nothing. Takes seconds instead of minutes."
)
@options.base_option(f": a folder of all-MiniLM-L6-v2 (default: the package {BASE_PACKAGE})")
@click.option("--keep", type=options.PATH, metavar="DIR", help="Keep the adapter files in this folder.")
@options.force_option("Replace adapter files in that folder.")
@options.printing
@app.version_option
def command(
    tasks: Sequence[str],
    densities: Sequence[float],
    scope: str,
    cut_only: bool,
    base: str | None,
    keep: Path | None,
    force: bool,
    printer: Printer,
) -> int:
    """Try the whole pipeline on a real model.

    Two shipped LoRAs of MiniLM (spam or not; news or romance) are cut to their largest changes, and fitted: as many
    entries are chosen and trained on unlabelled texts to do what the LoRA does. Beside them a sparse adapter is trained
    on the task itself, without the LoRA. Printed is what each reaches on held-out texts. Takes some minutes.
    """
    found = find_base() if base is None else Path(base)
    _need_torch()
    from shira_analysis.measures.classifier import LabelledTexts
    from shira_analysis.measures.ways import Adapters, adapter_path, compare_ways
    from shira_analysis.reports.text import demo
    from shira_format.training.state import state_path

    adapters = Adapters(
        densities or CUT, () if cut_only else densities or FITTED, () if cut_only else TRAINED, scope
    )
    results: list[dict[str, Any]] = []
    with _folder(keep) as folder, warnings.catch_warnings():
        # What transformers and PEFT deprecate in each other tells our users nothing.
        warnings.simplefilter("ignore")
        paths = [adapter_path(folder, task, *one) for task in tasks or TASKS for one in adapters.all()]
        check_output_files(*paths, *map(state_path, paths), inputs=[found], force=force)
        for task in tasks or TASKS:
            texts = DATA / "text"
            held_out = LabelledTexts.read(texts / f"{task}.jsonl")
            results.append(
                compare_ways(DATA / "loras" / task, held_out, texts / f"{task}-train.jsonl", found, adapters, folder, printer.notice)
            )  # fmt: skip
            if not printer.json:
                print(demo.as_text(results[-1], adapter_path(folder, task, "cut", adapters.cut[0])))
    if printer.json:
        print_json(results)
    return 0


def _need_torch() -> None:
    import importlib.util

    from shira_format.errors import ShiraError

    missing = [
        name for name in ("torch", "transformers", "peft", "accelerate") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ShiraError(f"this needs {' and '.join(missing)}: pip install 'shira-format[demo]'")


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="shira-demo-") as folder:
            yield Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
