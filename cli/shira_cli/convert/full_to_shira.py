"""``shira-convert full_to_shira``."""

from __future__ import annotations

from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert import fitting, running

EXAMPLE = """
examples:
  shira-convert full_to_shira --base my-model/ --tuned my-tune/ -o patch.st --exact
  shira-convert full_to_shira --base my-model/ --tuned my-tune/ -o adapter.st --fit distill --texts texts.txt --max-bytes 1M
"""


@click.command("full_to_shira", cls=app.Command, example=EXAMPLE)
@options.base_option(", before fine-tuning", required=True)
@click.option("--tuned", metavar="CHECKPOINT", required=True, help="The fine-tuned checkpoint, in any layout.")
@options.selection_options
@click.option("--exact", is_flag=True, help="Keep every entry whose bits differ, instead of the largest changes.")
@click.option("--no-result-digests", is_flag=True, help="With --exact: do not store digests of the whole resulting tensors; faster, but a base that differs elsewhere goes unnoticed.")  # fmt: skip
@fitting.fit_options(needed=False)
@options.filters("Convert")
@options.allow_unused_option
@running.work_options
def command(
    base: str, tuned: str, exact: bool, no_result_digests: bool, scope: str | None, **settings: Any
) -> int:
    """Convert a full fine-tune to a sparse adapter: the largest changes, or with --exact every difference.

    From an exact patch, shira_to_full restores the fine-tune bit for bit.

    With --fit, entries and values are chosen so that the model does what the fine-tune does, on texts that you give; what
    is kept is measured on others. This runs the base.

    The two checkpoints may have different layouts: a safetensors file, the index of its shards or their folder;
    pytorch_model.bin likewise; a diffusers folder; a GGUF file; a torch DCP folder. They may be local,
    hf://owner/name[@revision][/path], or any URL that fsspec reads.
    """
    from shira_format.convert.full import full_to_shira

    method, given, settings = fitting.split(settings)
    if method != "none":
        fitting.check(method, given, settings | {"scope": scope}, exact=exact)
        return fitting.run("fit_full", tuned, base, method=method, given=given, **fitting.without(settings))
    for option, value in (("--scope", scope), ("--min-change", settings["min_change"])):
        if exact and value is not None:
            raise click.UsageError(f"--exact keeps every difference: {option} has no meaning with it")
    if no_result_digests and not exact:
        raise click.UsageError("--no-result-digests goes with --exact")
    running.one_amount(**{amount: settings[amount] for amount in ("density", "top_k", "energy")}, exact=exact)
    return running.convert(
        full_to_shira, tuned, base, exact=exact, digests=not no_result_digests, scope=scope or "tensor", **settings
    )
