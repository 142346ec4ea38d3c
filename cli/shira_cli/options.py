"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from shira_cli.output import Printer

_F = TypeVar("_F", bound=Callable[..., Any])


class Share(click.types.FloatParamType):
    """A number in (0, 1]."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error for others."""
        number = float(super().convert(value, param, ctx))
        if not 0 < number <= 1:
            raise click.UsageError(f"{_flag(param)} {number} is not in (0, 1]", ctx)
        return number


class Count(click.types.IntParamType):
    """A positive integer."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error for others."""
        number = int(super().convert(value, param, ctx))
        if number < 1:
            raise click.UsageError(f"{_flag(param)} {number} is not a positive count", ctx)
        return number


class Bytes(click.types.IntParamType):
    """A number of bytes such as 200k, 1.5M or 1MiB: k, M and G are powers of 1000, Ki, Mi and Gi of 1024; a B may follow."""

    name = "bytes"
    _SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?) ?(?:([kmg])(i)?)?b?", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error for others."""
        if isinstance(value, int):
            return value
        found = self._SIZE.fullmatch(str(value).strip())
        size = 0
        if found is not None:
            number, prefix, binary = found.groups()
            power = 0 if prefix is None else "kmg".index(prefix.lower()) + 1
            size = int(Fraction(number) * (1024 if binary else 1000) ** power)
        if size < 1:
            raise click.UsageError(f"{_flag(param)} {value} is no number of bytes such as 200k, 1.5M or 1MiB", ctx)
        return size


def _flag(param: click.Parameter | None) -> str:
    return "" if param is None else param.opts[-1]


PATH = click.Path(path_type=Path)
COUNT = Count()

SHARE = Share()

BYTES = Bytes()


def base_option(text: str, *, required: bool = False) -> Callable[[_F], _F]:
    """``--base``: always a checkpoint of the original model."""
    return click.option("--base", metavar="CHECKPOINT", required=required, help=f"The base checkpoint (any layout){text}.")  # fmt: skip


def filters(verb: str) -> Callable[[_F], _F]:
    """``--include`` and ``--exclude``, with what the command does to the tensors, such as ``"Convert"``."""

    def add(command: _F) -> _F:
        command = click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors whose name matches; may be repeated.")(command)  # fmt: skip
        return click.option("--include", multiple=True, metavar="REGEX", help=f"{verb} only tensors whose name matches; may be repeated.")(command)  # fmt: skip

    return add


def output_file(text: str = "The adapter file to write.", *, required: bool = True) -> Callable[[_F], _F]:
    """``-o FILE``."""
    return click.option("-o", "--output", type=PATH, required=required, metavar="FILE", help=text)


def output_folder(text: str = "The folder to write.") -> Callable[[_F], _F]:
    """``-o DIR``."""
    return click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help=text)


def force_option(text: str) -> Callable[[_F], _F]:
    """``--force``: write it anyway; with what it replaces."""
    return click.option("--force", is_flag=True, help=text)


def values_option(verb: str, default: str) -> Callable[[_F], _F]:
    """``--values``: targets or deltas."""
    text = f"{verb} deltas (what is added to the base) or targets (what the entries become) (default: {default})."
    return click.option("--values", type=click.Choice(["delta", "target"]), default=default, help=text)


force_adapter_option = force_option(
    "Write FILE anyway: replace it if it exists, and write an adapter that changes the base by less than a thousandth of "
    "what its source asks for."
)

allow_unused_option = click.option("--allow-unused", is_flag=True, help="Go on although the source has weights that are not used, such as other weight files in its folder; they are named in a note.")  # fmt: skip

dry_run_option = click.option("--dry-run", is_flag=True, help="Compute and report everything, write nothing.")

self_contained_option = click.option(
    "--self-contained",
    is_flag=True,
    help="Store the base's values too, so that the adapter can be undone, scaled, measured and merged without the base.",
)

compact_option = click.option(
    "--compact",
    is_flag=True,
    help="Take as few bytes as possible: what the base tells is not stored. The file is then read with its base, unless it is "
    "--self-contained (shira-convert repack stores it plain again).",
)

threads_option = click.option("--threads", type=COUNT, metavar="N", help="At most this many threads (default: all cores); results do not depend on it.")  # fmt: skip

prefix_option = click.option("--prefix", default="", metavar="TEXT", help="Put this before all names, such as 'bert.' or 'model.' if the live model has the base inside another module.")  # fmt: skip

moments_option = click.option("--moments", type=PATH, metavar="FILE", help="Second moments of the layers' inputs, from shira-moments.")  # fmt: skip

seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of all random numbers (default: 0).")  # fmt: skip

base_prefix_option = click.option("--prefix", metavar="TEXT", help="What the base's names of the adapted weights start with, such as 'text_model.', if the names fit the base in several ways (of one component of a pipeline: 'text_encoder/text_model.').")  # fmt: skip

dialect_option = click.option("--dialect", metavar="NAME", help="The LoRA's dialect (default: detected from the file's keys).")  # fmt: skip


def scale_options(command: _F) -> _F:
    """``--rank`` and ``--alpha`` of a LoRA that lacks its configuration."""
    command = click.option("--alpha", type=float, metavar="A", help="With --rank: alpha; the scale is alpha / rank.")(command)  # fmt: skip
    return click.option("--rank", type=click.IntRange(min=1), metavar="R", help="Rank of a LoRA of PEFT whose adapter_config.json is missing.")(command)  # fmt: skip


def quick_option(text: str) -> Callable[[_F], _F]:
    """``--quick``: less work, in seconds."""
    return click.option("--quick", is_flag=True, help=f"A smaller run of a few seconds: {text}.")


def numbers(flag: str, text: str) -> list[float]:
    """Numbers with commas between; a usage error for others."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{flag} {text}: not numbers with commas between") from None


def printing_options(quiet: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """``--json`` and ``--quiet``, with what this one does; the command gets them as ``printer``."""

    def add(command: Callable[..., int]) -> Callable[..., int]:
        @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
        @click.option("--quiet", is_flag=True, help=quiet)
        @functools.wraps(command)
        def with_printer(*args: Any, as_json: bool, quiet: bool, **options: Any) -> int:
            return command(*args, printer=Printer(as_json, quiet), **options)

        return with_printer

    return add


printing = printing_options("Print no notices, warnings or progress bars on stderr.")


density_option = click.option("--density", type=SHARE, metavar="D", help="Keep this share of the entries, in (0, 1] (default: 0.01).")  # fmt: skip

top_k_option = click.option("--top-k", type=COUNT, metavar="N", help="Keep this many entries in all.")


def selection_options(command: _F) -> _F:
    """How many changes to keep."""
    for option in (
        click.option("--scope", type=click.Choice(["tensor", "global"]), help="Select the largest changes of each tensor (default) or of all tensors together."),
        click.option("--min-change", type=float, metavar="X", help="Leave out changes of a smaller magnitude; alone: keep all others."),
        click.option("--energy", type=SHARE, metavar="E", help="Keep the fewest changes that hold this share of the energy (the sum of squares)."),
        click.option("--top-k", type=COUNT, metavar="N", help="Keep this many entries per tensor, or in all with --scope global or --fit."),
        density_option,
    ):  # fmt: skip
        command = option(command)
    return command
