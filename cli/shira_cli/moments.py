"""``shira-moments``: second moments of the inputs of a model's layers on some texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_files

PROG = "shira-moments"

EXAMPLE = """
examples:
  shira-moments my-model/ --texts texts.txt -o moments.safetensors
  shira-moments my-model/ --texts texts.jsonl --limit 200 --include mlp --dtype float32 -o moments.safetensors
  shira-moments my-model/ --texts texts.txt --inputs 256 -o moments.safetensors
  shira-measure a.st b.st --moments moments.safetensors
"""


@click.command(cls=app.Command, example=EXAMPLE)
@click.argument("model", type=options.PATH, metavar="MODEL")
@click.option("--texts", type=options.PATH, required=True, metavar="FILE", help="One text a line, or .jsonl.")
@options.output_file("The file of moments to write.")
@click.option("--field", default="text", metavar="NAME", help="The field of the .jsonl objects that holds the text (default: text).")  # fmt: skip
@click.option("--limit", type=options.COUNT, metavar="N", help="Use only the first N texts.")
@click.option("--batch", type=options.COUNT, default=16, metavar="N", help="Texts per batch (default: 16).")
@click.option("--max-length", type=options.COUNT, default=512, metavar="N", help="Cut texts after N tokens (default: 512, or what the model takes).")  # fmt: skip
@click.option("--causal", is_flag=True, help="Load the model as AutoModelForCausalLM (default: the class in its config).")  # fmt: skip
@options.filters("Watch")
@click.option("--block", type=options.COUNT, metavar="N", help="Keep only blocks of N inputs along the diagonal of each matrix (1: the diagonal).")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float64", help="Sum and store the moments in this dtype (default: float64).")  # fmt: skip
@click.option("--inputs", type=options.COUNT, metavar="N", help="Also keep N randomly drawn inputs of each layer, to measure adapters at each input by itself.")  # fmt: skip
@options.seed_option
@options.force_option("Replace FILE if it exists.")
@options.dry_run_option
@options.printing
@app.version_option
def command(model: Path, texts: Path, output: Path, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:  # fmt: skip
    """Run MODEL over texts and store the second moments E[x x^T] of the inputs of its layers.

    MODEL is a folder that transformers loads, with its tokenizer; no code in it is run. Moments are stored under the
    names of the weights in the model's files. With them, shira-measure and shira-merge report how much two adapters
    disturb each other on such texts. Needs torch and transformers: pip install 'shira-format[demo]'.
    """
    from shira_analysis.reports.text import moments
    from shira_format.calibration.collect import MomentsReport, check_moments_output, moments_of_texts

    check_moments_output(output, model, texts)
    check_output_files(output, inputs=[model, texts], force=force)
    with printer.bar("texts") as bar:

        def loaded(report: MomentsReport) -> None:
            printer.notes(report.notices)
            printer.warnings(report.warnings)
            bar.reset(report.texts)

        report = moments_of_texts(
            model, texts, None if dry_run else output, on_load=loaded, progress=bar.update, **settings
        )
    printer.result(
        lambda: moments.as_json(report, None if dry_run else output),
        lambda: moments.as_text(report, output, dry_run=dry_run),
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
