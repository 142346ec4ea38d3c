"""``shira-plot``: pictures of adapters, each with its numbers as CSV beside it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shira_cli import app, options
from shira_cli.output import Printer
from shira_format._core.text import printable
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_analysis.figures.pictures import Picture
    from shira_analysis.measures.deltas import DeltaFile
    from shira_format.checkpoints import Checkpoint

PROG = "shira-plot"

EXAMPLE = """
examples:
  shira-plot mask adapter.st -o mask.png
  shira-plot spectrum adapter.st --base my-model/ --lora my-lora/ -o spectrum.png
  shira-plot orthogonality a.st b.st --moments moments.safetensors -o pairs.png
  shira-plot dimension --quick -o dimension.png
"""

FORMS = {".png": "png", ".svg": "svg"}


@click.group(cls=app.Group, example=EXAMPLE)
@app.version_option
def command() -> None:
    """Draw adapters.

    The numbers of each picture are written beside it, as CSV.
    """


def _picture(name: str, example: str, *, files: bool = True, pairs: bool = False) -> Callable[[Callable[..., Picture]], click.Command]:  # fmt: skip
    """A subcommand that draws one kind of picture: the options of all, and the writing."""

    def made(draw: Callable[..., Picture]) -> click.Command:
        @functools.wraps(draw)
        def drawn(output: Path, csv: Path | None, force: bool, printer: Printer, **settings: Any) -> int:
            csv = csv or output.with_suffix(".csv")
            if output.suffix.lower() not in FORMS:
                raise click.UsageError(f"{output}: a picture ends in {' or '.join(FORMS)}")
            if pairs and len(settings["adapters"]) < 2:
                raise click.UsageError(f"{name} is about pairs: name two adapters or more")
            read = [settings.get(name) for name in ("adapters", "loras", "base", "moments")]
            inputs = [path for one in read for path in (one if isinstance(one, tuple) else (one,))]
            check_output_files(output, csv, inputs=inputs, force=force)
            picture = draw(form=FORMS[output.suffix.lower()], printer=printer, **settings)
            _write(picture, output, csv)
            printer.result(
                lambda: {"picture": str(output), "csv": str(csv), "records": picture.records},
                lambda: printable(f"{output}: drawn; its numbers are in {csv} ({len(picture.records)} rows)"),
            )
            return 0

        run = options.printing(drawn)
        run = options.force_option("Replace the files if they exist.")(run)
        run = click.option("--csv", type=options.PATH, metavar="FILE", help="Where the numbers go (default: beside the picture, ending in .csv).")(run)  # fmt: skip
        run = options.output_file("The picture to write, .png or .svg.")(run)
        if files:
            run = options.base_option(" that the adapters were made for; needed for deltas unless they are self-contained")(run)  # fmt: skip
            run = click.argument("adapters", nargs=-1, required=True, type=options.PATH, metavar="ADAPTER...")(run)
        full = f"example:\n  shira-plot {name} {example}"
        found: click.Command = command.command(name, cls=app.Command, example=full)(run)
        return found

    return made


tensor_option = click.option("--tensor", metavar="NAME", help="The tensor to draw (default: the one with most entries in the first adapter).")  # fmt: skip


@_picture("mask", "adapter.st -o mask.png")
@tensor_option
@click.option("--cells", type=int, metavar="N", help="Cells along the longer side, 1 to 512 (default: 96).")
def mask(
    adapters: Sequence[Path], base: str | None, tensor: str | None, cells: int | None, form: str, **_: Any
) -> Picture:
    """Draw where the entries of one tensor are, as densities of the cells of a grid."""
    from shira_analysis.figures.masks import SIDE
    from shira_analysis.figures.pictures import mask_picture

    return mask_picture(_files(adapters, _base(base)), tensor, side=SIDE if cells is None else cells, form=form)


@_picture("layers", "adapter.st -o layers.png")
@options.filters("Draw")
def layers(
    adapters: Sequence[Path],
    base: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    form: str,
    printer: Printer,
) -> Picture:
    """Draw the density of each layer's change, and its share of the energy (the sum of squares)."""
    from shira_analysis.figures.pictures import layers_picture

    files = _files(adapters, _base(base), include, exclude)
    with printer.bar("tensors", sum(len(file.names) for file in files)) as bar:
        return layers_picture(files, form=form, progress=lambda *_: bar.update())


@_picture("spectrum", "adapter.st --base my-model/ --lora my-lora/ -o spectrum.png")
@tensor_option
@click.option("--lora", "loras", multiple=True, metavar="LORA", help="Also draw this LoRA of the same base; needs --base; may be repeated.")  # fmt: skip
def spectrum(
    adapters: Sequence[Path],
    base: str | None,
    tensor: str | None,
    loras: Sequence[str],
    form: str,
    printer: Printer,
) -> Picture:
    """Draw the singular values of the change of one tensor, and of a LoRA's change."""
    if loras and base is None:
        raise click.UsageError("--lora needs --base, against which its names and shapes are resolved")

    from shira_analysis.figures.pictures import spectrum_picture
    from shira_format.lora import open_lora

    checkpoint = _base(base)
    opened = []
    for path in loras:
        assert checkpoint is not None
        lora = open_lora(path, checkpoint)
        printer.notes(lora.notices)
        opened.append((f"LoRA {Path(path).name}", lora))
    return spectrum_picture(_files(adapters, checkpoint), opened, tensor, form=form)


@_picture("overlap", "a.st b.st -o overlap.png", pairs=True)
@options.filters("Count")
def overlap(
    adapters: Sequence[Path],
    base: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    form: str,
    **_: Any,
) -> Picture:
    """Draw how many entries each two adapters share, beside what chance gives."""
    from shira_analysis.figures.pictures import overlap_picture

    return overlap_picture(_files(adapters, _base(base), include, exclude), form=form)


@_picture("orthogonality", "a.st b.st --moments moments.safetensors -o pairs.png", pairs=True)
@options.filters("Measure")
@click.option("--transposed", is_flag=True, help="Of A1 A2^T instead of A1^T A2, for layers whose weight is stored [in, out].")  # fmt: skip
@options.moments_option
def orthogonality(
    adapters: Sequence[Path],
    base: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    transposed: bool,
    moments: Path | None,
    form: str,
    printer: Printer,
) -> Picture:
    """Draw AWOR and AWOM of each two adapters, beside what chance gives; with moments also their effect on inputs."""
    from shira_analysis.figures.pictures import orthogonality_picture
    from shira_format.calibration.moments import Moments

    files = _files(adapters, _base(base), include, exclude)
    inputs = None if moments is None else Moments.read(moments)
    with printer.bar("tensors", len({name for file in files for name in file.names})) as bar:
        return orthogonality_picture(
            files, moments=inputs, transposed=transposed, form=form, progress=lambda *_: bar.update()
        )


@_picture("dimension", "--quick -o dimension.png", files=False)
@options.quick_option("up to dimension 2048 with 5 pairs each, not up to 8192 with 50 (half an hour on two cores)")
@click.option("--seeds", type=options.COUNT, metavar="N", help="Pairs of adapters for each point.")
def dimension(quick: bool, seeds: int | None, form: str, printer: Printer) -> Picture:
    """Draw AWOM and AWOR of random adapters against the dimension: figures 4 and 9 of the paper."""
    from shira_analysis.figures import dimensions
    from shira_analysis.figures.pictures import dimension_picture

    sizes = dimensions.QUICK if quick else dimensions.DIMENSIONS
    pairs = seeds or (dimensions.QUICK_SEEDS if quick else dimensions.SEEDS)
    with printer.bar("pairs", len(sizes) * len(dimensions.SERIES) * pairs) as bar:
        records = dimensions.dimension_records(dimensions=sizes, seeds=pairs, progress=lambda *_: bar.update())
    return dimension_picture(records, form=form)


def _base(path: str | None) -> Checkpoint | None:
    from shira_format.checkpoints import open_checkpoint

    return None if path is None else open_checkpoint(path)


def _files(
    adapters: Sequence[Path], base: Checkpoint | None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[DeltaFile]:
    from shira_analysis.measures.deltas import open_deltas

    return [open_deltas(path, base, include=include, exclude=exclude) for path in adapters]


def _write(picture: Picture, output: Path, csv: Path) -> None:
    from shira_analysis.figures.records import to_csv
    from shira_format.storage.atomic import atomic_file

    with atomic_file(csv) as numbers, atomic_file(output) as image:
        numbers.write(to_csv(picture.records).encode(errors="backslashreplace"))
        image.write(picture.image)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
