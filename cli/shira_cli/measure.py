"""``shira-measure``: what adapters are, in numbers, and how two of one base will disturb each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.output import Printer

PROG = "shira-measure"

EXAMPLE = """
examples:
  shira-measure adapter.st --ranks
  shira-measure adapter.st --base my-model/ --lora my-lora/ --spectrum
  shira-measure adapter.st other.st --base my-model/ --moments moments.safetensors --json
"""


@click.command(cls=app.Command, example=EXAMPLE)
@click.argument("adapters", nargs=-1, required=True, type=options.PATH, metavar="ADAPTER...")
@options.base_option(" that the adapters were made for; needed unless they are self-contained")
@click.option("--ranks", is_flag=True, help="Exact rank with a certificate, numerical, stable and effective rank; seconds for a large weight.")  # fmt: skip
@click.option("--spectrum", is_flag=True, help="Singular values: a summary for each tensor, all of them with --json; includes --ranks.")  # fmt: skip
@click.option("--histogram", is_flag=True, help="Histogram of the magnitudes of the deltas (always in --json, for each tensor).")  # fmt: skip
@click.option("--lora", "loras", multiple=True, type=options.PATH, metavar="LORA", help="Also measure this LoRA of the same base, of any dialect; needs --base; may be repeated; includes --ranks.")  # fmt: skip
@options.filters("Measure")
@options.moments_option
@click.option("--transposed", is_flag=True, help="Of pairs: also measure A1 A2^T, for layers whose weight is stored [in, out].")  # fmt: skip
@click.option("--spectral", is_flag=True, help="Of pairs: also compute AWOM in the spectral norm.")
@click.option("--tensors", is_flag=True, help="Print a line for each tensor, not only for each kind of layer.")
@options.printing
@app.version_option
def command(
    adapters: Sequence[Path],
    base: str | None,
    ranks: bool,
    spectrum: bool,
    histogram: bool,
    loras: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    moments: Path | None,
    transposed: bool,
    spectral: bool,
    tensors: bool,
    printer: Printer,
) -> int:
    """Measure adapters: how much they change and where, and how each two of them overlap and interfere.

    Each adapter is measured by itself: entries, density, norms, and how its entries are spread. Of several adapters of
    one base, each pair is measured too: shared entries beside what chance gives, cosine, and the paper's orthogonality
    measures AWOM and AWOR; with --moments also how much one disturbs the other on real inputs.
    """
    if loras and base is None:
        raise click.UsageError("--lora needs --base, against which its names and shapes are resolved")
    if len(adapters) == 1 and (moments or transposed or spectral):
        raise click.UsageError("--moments, --transposed and --spectral are about pairs: name two adapters or more")
    ranks = ranks or spectrum or bool(loras)

    from shira_analysis.measures.adapter import measure_file
    from shira_analysis.measures.deltas import open_deltas
    from shira_analysis.reports.text import measure
    from shira_format.checkpoints import open_checkpoint

    checkpoint = None if base is None else open_checkpoint(base)
    if checkpoint is not None:
        printer.notes(checkpoint.notices)
    files = [open_deltas(path, checkpoint, include=include, exclude=exclude) for path in adapters]
    with printer.bar("tensors", sum(len(file.names) for file in files)) as bar:
        found = [measure_file(file, rank=ranks, progress=bar.update) for file in files]
    texts = [measure.as_text(found, tensors=tensors, histogram=histogram, ranks=ranks, spectrum=spectrum)]
    result: dict[str, Any] = {"adapters": [one.as_json(values=spectrum) for one in found]}
    if loras:
        from shira_analysis.measures.lora import measure_lora
        from shira_analysis.reports.text import loras as loras_text

        assert checkpoint is not None
        with printer.bar("updates") as bar:
            measured = [measure_lora(path, checkpoint, include=include, exclude=exclude, progress=bar.update) for path in loras]  # fmt: skip
        printer.notes(note for one in measured for note in one.notices)
        result["loras"] = [one.as_json(values=spectrum) for one in measured]
        texts.insert(0, loras_text.as_text(measured, tensors=tensors, spectrum=spectrum))
    if len(files) > 1:
        from shira_analysis.measures.pairs import measure_pairs
        from shira_analysis.reports.text import pairs
        from shira_format.calibration.moments import Moments

        inputs = None if moments is None else Moments.read(moments)
        with printer.bar("tensors", len({name for file in files for name in file.names})) as bar:
            between = measure_pairs(files, inputs, transposed=transposed, spectral=spectral, progress=lambda _: bar.update())  # fmt: skip
        result["pairs"] = [pair.as_json() for pair in between]
        texts.append(pairs.as_text(between, tensors=tensors, transposed=transposed, spectral=spectral, fed=inputs is not None))  # fmt: skip
    printer.result(lambda: result, lambda: "\n\n".join(texts))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
