"""``shira-convert shira_to_lora``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_cli.convert import common
from shira_format._core import text

if TYPE_CHECKING:
    from shira_format.export.lora import LayerReport, LoraReport

DESCRIPTION = """\
Write the best low-rank approximation of an adapter as a LoRA that PEFT loads: of each weight's update the largest singular
triplets (truncated SVD). A sparse update has a high rank as a rule, so that much is lost; the report says how much:

  kept          share of the update's sum of squares that the LoRA holds
  error         ||S - BA|| / ||S|| in the Frobenius norm, S the update, BA the factors as written (float32)
  bound         what that is without rounding, by Eckart and Young: sqrt(sum of sigma_i^2 over i > rank) / ||S||
  spectral      ||S - BA|| in the spectral norm, its largest singular value; not divided
  sigma next    what that is without rounding: the largest singular value of S that is left out

Layers of which nothing tells what they are follow rules that are told in notes; options override them."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "shira_to_lora", help="an adapter, to a PEFT LoRA", description=DESCRIPTION,
        example="adapter.st --base my-model/ --rank 32 -o my-lora/",
    )  # fmt: skip
    option = parser.add_argument
    option("adapter", type=Path, metavar="ADAPTER", help="an adapter file")
    option("--base", help="the checkpoint that it was made for; needed unless the adapter is self-contained, and for tensors replaced as a whole")  # fmt: skip
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--rank", type=int, metavar="R", help="the rank of every layer, or less where it has no more"
    )
    amount.add_argument("--energy", type=float, metavar="E", help="of each layer the least rank that keeps this share, in (0, 1], of its sum of squares")  # fmt: skip
    option("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    option("--prefix", default="", metavar="TEXT", help="what names in the live model start with, where the checkpoint's do not, such as 'bert.' or 'model.'")  # fmt: skip
    option("--embedding", metavar="REGEX", help="the weights in whose name this is found are embeddings (default: the usual names; '(?!)' for none)")  # fmt: skip
    option("--fan-in-fan-out", metavar="REGEX", help="the weights in whose name this is found are stored [in, out], as in GPT-2 (default: the base tells)")  # fmt: skip
    common.add_filters(parser)
    common.add_writing(parser, "replace DIR if shira_to_lora wrote it and nothing else was put there")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from shira_format.export.lora import EMBEDDING, shira_to_lora

    if options.rank is not None and options.rank < 1:
        console.usage_error(common.PROG, f"--rank {options.rank} is not positive")
    if options.energy is not None and not 0 < options.energy <= 1:
        console.usage_error(common.PROG, f"--energy {options.energy} is not in (0, 1]")
    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output_folder(output, [options.adapter], force=options.force)
    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(unit="tensors", disable=hidden, leave=False) as bar:
        report = shira_to_lora(
            options.adapter, options.base, output, rank=options.rank, energy=options.energy, prefix=options.prefix,
            embedding=EMBEDDING if options.embedding is None else options.embedding,
            fan_in_fan_out=options.fan_in_fan_out, include=options.include, exclude=options.exclude, force=options.force, progress=bar.update,
        )  # fmt: skip
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    if options.json:
        console.print_json(_json(report, output))
    else:
        print(_text(report, output))
    for text in report.warnings():
        console.notice(f"warning: {text}", quiet=options.quiet)
    return 0


def _json(report: LoraReport, output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "totals": {
            "layers": len(report.layers),
            "nnz": report.nnz,
            "parameters": report.parameters,
            "norm": report.norm,
            "error": report.error,
            "relative_error": report.relative_error,
            "frobenius_bound": report.bound,
            "energy_kept": report.energy_kept,
            "adapter_bytes": report.adapter_bytes,
            "folder_bytes": report.folder_bytes,
        },
        "layers": [_layer(layer) for layer in report.layers],
        "modules_to_save": report.saved,
        "left_out": report.left_out,
        "notices": report.notices,
        "warnings": report.warnings(),
    }


def _layer(layer: LayerReport) -> dict[str, Any]:
    values = asdict(layer) | {"parameters": layer.parameters, "relative_error": layer.relative_error}
    return {key if key != "bound" else "frobenius_bound": value for key, value in values.items()}


def _text(report: LoraReport, output: Path | None) -> str:
    head = (
        "tensor", "shape", "entries", "rank", "numbers", "kept", "error", "bound", "spectral", "sigma next",
    )  # fmt: skip
    rows = [
        (
            layer.name, "x".join(map(str, layer.shape)), text.count(layer.nnz), str(layer.rank),
            text.count(layer.parameters), f"{layer.energy_kept:.1%}", f"{layer.relative_error:.4g}",
            f"{layer.bound / layer.norm if layer.norm else 0.0:.4g}", f"{layer.spectral_error:.4g}", f"{layer.spectral_bound:.4g}",
        )
        for layer in report.layers
    ]  # fmt: skip
    rows.append(
        (
            "all", "", text.count(report.nnz), "", text.count(report.parameters), f"{report.energy_kept:.1%}",
            f"{report.relative_error:.4g}", f"{report.bound / report.norm if report.norm else 0.0:.4g}", "", "",
        )
    )  # fmt: skip
    lines = [text.table(head, rows)]
    if report.saved:
        lines.append(f"replaced with their modules: {', '.join(map(text.printable, report.saved))}")
    if output is None:
        lines.append("dry run: nothing was written")
    else:
        size, before = text.file_size(report.folder_bytes or 0), text.file_size(report.adapter_bytes)
        lines.append(f"{text.printable(str(output))}: {size}; the adapter: {before}")
    return "\n".join(lines)
