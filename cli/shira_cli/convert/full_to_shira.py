"""``shira-convert full_to_shira``."""

from __future__ import annotations

import argparse
from typing import Any

from shira_cli import console
from shira_cli.convert import common

DESCRIPTION = """\
Turn what lies between a base and a fine-tune of it into a sparse adapter (the largest changes), or, with --exact, into
a patch of every entry whose bits differ, from which shira_to_full makes the fine-tune again.

BASE and TUNED may be of different layouts: a safetensors file, its index of shards or the folder; pytorch_model.bin
likewise; a diffusers folder; a GGUF file; a torch DCP folder; local, hf://owner/name[@revision][/path], or any URL that
fsspec reads."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "full_to_shira", help="a full fine-tune, with its base", description=DESCRIPTION,
        example="--base my-model/ --tuned my-tune/ -o patch.st --exact",
    )  # fmt: skip
    parser.add_argument("--base", required=True, help="the checkpoint before")
    parser.add_argument("--tuned", required=True, help="the checkpoint after")
    amount = common.add_selection(parser)
    amount.add_argument("--exact", action="store_true", help="keep every entry whose bits differ")
    parser.add_argument("--no-result-digests", action="store_true", help="with --exact: do not record what each whole tensor has to be in the end; faster, but then nothing tells a base that differs elsewhere")  # fmt: skip
    common.add_filters(parser)
    common.add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from shira_format.convert import Exact, FullJob

    for option, given in (("--scope", options.scope), ("--min-change", options.min_change)):
        if options.exact and given is not None:
            console.usage_error(common.PROG, f"--exact keeps every difference: {option} has no meaning with it")
    if options.no_result_digests and not options.exact:
        console.usage_error(common.PROG, "--no-result-digests goes with --exact")
    rule = Exact(not options.no_result_digests) if options.exact else common.selection_rule(options)
    job = FullJob(options.base, options.tuned, options.exact, tuple(options.include), tuple(options.exclude))
    return common.run_job(options, job, rule)
