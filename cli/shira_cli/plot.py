"""``shira-plot``: pictures of adapters, each with its numbers beside it as CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_format._core import text

if TYPE_CHECKING:
    from shira_analysis.figures.pictures import Picture
    from shira_analysis.measures.deltas import DeltaFile
    from shira_format.checkpoints import Checkpoint

PROG = "shira-plot"

EXAMPLE = """examples:
  shira-plot mask adapter.st -o mask.png
  shira-plot spectrum adapter.st --base my-model/ --lora my-lora/ -o spectrum.png
  shira-plot orthogonality a.st b.st --moments moments.safetensors -o pairs.png
  shira-plot dimension --quick -o dimension.png
"""

FORMS = {".png": "png", ".svg": "svg"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(
        PROG, "Draw adapters. The numbers of each picture are written beside it, as CSV.", EXAMPLE
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    mask = _kind(kinds, "mask", _mask, "where the entries of one tensor lie, by density of the cells of a grid")
    _add_tensor(mask)
    mask.add_argument("--cells", type=int, default=None, metavar="N", help="cells along the longer side, 1 to 512 (default: 96)")  # fmt: skip
    layers = _kind(
        kinds, "layers", _layers, "how dense the change is in each layer, and how much of its energy is there"
    )
    _add_choice(layers)
    spectrum = _kind(
        kinds, "spectrum", _spectrum, "the singular values of the change of one tensor, and of a LoRA's"
    )
    _add_tensor(spectrum)
    spectrum.add_argument("--lora", action="append", default=[], metavar="L", help="a LoRA of the same base, which needs --base; may be repeated")  # fmt: skip
    overlap = _kind(
        kinds,
        "overlap",
        _overlap,
        "how many entries each two adapters share, beside what chance gives",
        pairs=True,
    )
    _add_choice(overlap)
    orthogonality = _kind(
        kinds,
        "orthogonality",
        _orthogonality,
        "AWOR and AWOM of each two adapters, beside what chance gives",
        pairs=True,
    )
    _add_choice(orthogonality)
    orthogonality.add_argument("--transposed", action="store_true", help="of A1 A2^T in place of A1^T A2: layers whose weight is [in, out] write along rows")  # fmt: skip
    orthogonality.add_argument("--moments", type=Path, metavar="FILE", help="second moments of the layers' inputs, from shira-moments: what each two do to each other on them as well")  # fmt: skip
    dimension = _kind(kinds, "dimension", _dimension, "AWOM and AWOR of random adapters against the dimension: figures 4 and 9 of the paper", files=False)  # fmt: skip
    dimension.add_argument("--quick", action="store_true", help="up to dimension 2048 with 5 pairs each, seconds; by default up to 8192 with 50, half an hour on two cores")  # fmt: skip
    dimension.add_argument("--seeds", type=int, metavar="N", help="pairs of adapters for each point")
    options = parser.parse_args(argv)
    options.csv = options.csv or options.output.with_suffix(".csv")
    if options.output.suffix.lower() not in FORMS:
        console.usage_error(PROG, f"{options.output}: a picture ends in {' or '.join(FORMS)}")
    if options.csv == options.output:
        console.usage_error(PROG, f"{options.csv}: picture and CSV need two names")
    if getattr(options, "seeds", None) is not None and options.seeds < 1:
        console.usage_error(PROG, f"--seeds {options.seeds} is not a positive count")
    if getattr(options, "lora", None) and options.base is None:
        console.usage_error(PROG, "--lora needs --base, against which its names and shapes are resolved")
    if options.kind in ("overlap", "orthogonality") and len(options.adapters) < 2:
        console.usage_error(PROG, f"{options.kind} is about pairs: name two adapters or more")
    return console.run(PROG, lambda: _plot(options))


def _kind(
    kinds: Any,
    name: str,
    draw: Callable[[argparse.Namespace], Picture],
    text: str,
    *,
    files: bool = True,
    pairs: bool = False,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    add = parser.add_argument
    if files:
        several = "adapter files of one base, two or more" if pairs else "adapter files"
        add("adapters", nargs="+", type=Path, metavar="ADAPTER", help=several)
        add("--base", help="the checkpoint that they were made for; needed for the deltas of files that are not self-contained")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture to write, .png or .svg")
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="where its numbers go (default: beside the picture, ending in .csv)",
    )
    add("--force", action="store_true", help="replace FILE if it exists")
    console.add_output_options(parser)
    parser.set_defaults(draw=draw)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--include", action="append", default=[], metavar="REGEX", help="only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip


def _add_tensor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensor", metavar="NAME", help="the tensor to draw (default: the one with most entries in the first adapter)")  # fmt: skip


def _plot(options: argparse.Namespace) -> int:
    from shira_analysis.figures.records import to_csv
    from shira_format.storage.atomic import atomic_file

    console.terminate_like_interrupt()
    for path in (options.output, options.csv):
        console.check_output(path, force=options.force)
    picture = options.draw(options)
    with atomic_file(options.csv) as table, atomic_file(options.output) as image:
        table.write(to_csv(picture.records).encode(errors="backslashreplace"))
        image.write(picture.image)
    if options.json:
        console.print_json({"picture": str(options.output), "csv": str(options.csv), "records": picture.records})
    else:
        print(
            text.printable(
                f"{options.output}: drawn; its numbers are in {options.csv} ({len(picture.records)} rows)"
            )
        )
    return 0


def _files(options: argparse.Namespace) -> list[DeltaFile]:
    from shira_analysis.measures.deltas import open_deltas

    base = _base(options)
    include, exclude = (getattr(options, name, []) for name in ("include", "exclude"))
    return [open_deltas(path, base, include=include, exclude=exclude) for path in options.adapters]


def _base(options: argparse.Namespace) -> Checkpoint | None:
    from shira_format.checkpoints import open_checkpoint

    return None if options.base is None else open_checkpoint(options.base)


def _form(options: argparse.Namespace) -> str:
    return FORMS[options.output.suffix.lower()]


@contextmanager
def _bar(options: argparse.Namespace, total: int | None, unit: str) -> Iterator[Callable[..., object]]:
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=total, unit=unit, disable=hidden, leave=False) as bar:
        yield lambda *_: bar.update(1)


def _mask(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures.masks import SIDE
    from shira_analysis.figures.pictures import mask_picture

    side = SIDE if options.cells is None else options.cells
    return mask_picture(_files(options), options.tensor, side=side, form=_form(options))


def _layers(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures.pictures import layers_picture

    files = _files(options)
    with _bar(options, sum(len(file.names) for file in files), "tensors") as step:
        return layers_picture(files, form=_form(options), progress=step)


def _spectrum(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures.pictures import spectrum_picture

    loras = []
    if options.lora:
        from shira_format.lora import open_lora

        base = _base(options)
        assert base is not None
        for path in options.lora:
            lora = open_lora(path, base)
            loras.append((f"LoRA {Path(path).name}", lora))
            for text in lora.notices:
                console.notice(f"note: {text}", quiet=options.quiet)
    return spectrum_picture(_files(options), loras, options.tensor, form=_form(options))


def _overlap(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures.pictures import overlap_picture

    return overlap_picture(_files(options), form=_form(options))


def _orthogonality(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures.pictures import orthogonality_picture
    from shira_format.calibration.moments import Moments

    files = _files(options)
    moments = None if options.moments is None else Moments.read(options.moments)
    with _bar(options, len({name for file in files for name in file.names}), "tensors") as step:
        return orthogonality_picture(
            files, moments=moments, transposed=options.transposed, form=_form(options), progress=step
        )


def _dimension(options: argparse.Namespace) -> Picture:
    from shira_analysis.figures import dimensions
    from shira_analysis.figures.pictures import dimension_picture

    sizes = dimensions.QUICK if options.quick else dimensions.DIMENSIONS
    seeds = options.seeds or (dimensions.QUICK_SEEDS if options.quick else dimensions.SEEDS)
    with _bar(options, len(sizes) * len(dimensions.SERIES) * seeds, "pairs") as step:
        records = dimensions.dimension_records(dimensions=sizes, seeds=seeds, progress=step)
    return dimension_picture(records, form=_form(options))


if __name__ == "__main__":
    sys.exit(main())
