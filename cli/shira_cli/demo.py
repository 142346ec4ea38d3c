"""``shira-demo``: a real LoRA of a real model, converted at several densities, and what the adapters keep of it."""

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
"""


@click.command(cls=app.Command, example=EXAMPLE)
@click.option("--task", "tasks", type=click.Choice(TASKS), multiple=True, help="This task only (default: both).")
@click.option("--density", "densities", type=options.SHARE, multiple=True, metavar="D", help="Keep this share of the entries; may be repeated (default: 0.01, 0.02 and 0.05).")  # fmt: skip
@click.option("--scope", type=click.Choice(["tensor", "global"]), default="tensor", help="Select the largest changes of each tensor (default) or of all tensors together.")  # fmt: skip
@options.base_option(f": a folder of all-MiniLM-L6-v2 (default: the package {BASE_PACKAGE})")
@click.option("--keep", type=options.PATH, metavar="DIR", help="Keep the adapter files in this folder.")
@options.force_option("Replace adapter files in that folder.")
@options.printing
@app.version_option
def command(
    tasks: Sequence[str],
    densities: Sequence[float],
    scope: str,
    base: str | None,
    keep: Path | None,
    force: bool,
    printer: Printer,
) -> int:
    """Try the whole pipeline on a real model.

    Two shipped LoRAs of MiniLM (spam or not; news or romance) are converted to sparse adapters at several densities
    and applied to the model. Printed is what is left of each LoRA's accuracy and of its effect on the logits.
    """
    found = find_base() if base is None else Path(base)
    _need_torch()
    from shira_analysis.measures.classifier import LabelledTexts
    from shira_analysis.measures.densities import adapter_path, compare_densities
    from shira_analysis.reports.text import demo

    densities = densities or (0.01, 0.02, 0.05)
    results: list[dict[str, Any]] = []
    with _folder(keep) as folder, warnings.catch_warnings():
        # What transformers and PEFT deprecate in each other tells our users nothing.
        warnings.simplefilter("ignore")
        paths = [adapter_path(folder, task, density) for task in tasks or TASKS for density in densities]
        check_output_files(*paths, inputs=[found], force=force)
        for task in tasks or TASKS:
            held_out = LabelledTexts.read(DATA / "text" / f"{task}.jsonl")
            printer.notice(f"{task}: {len(held_out.texts)} held-out texts through base, LoRA and {len(densities)} adapters ...")  # fmt: skip
            results.append(
                compare_densities(DATA / "loras" / task, held_out, found, densities, folder, scope=scope)
            )
            if not printer.json:
                print(demo.as_text(results[-1], adapter_path(folder, task, densities[0])))
    if printer.json:
        print_json(results)
    return 0


def _need_torch() -> None:
    import importlib.util

    from shira_format.errors import ShiraError

    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
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
