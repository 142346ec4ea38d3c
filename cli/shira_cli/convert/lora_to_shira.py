"""``shira-convert lora_to_shira``."""

from __future__ import annotations

import argparse
from typing import Any

from shira_cli import console
from shira_cli.convert import common


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "lora_to_shira", help="a LoRA, with its base",
        description="Turn a LoRA into a sparse adapter: the largest entries of its update, as exact values of the tuned weights.",
        example="my-lora/ --base my-model/ -o adapter.st --density 0.02",
    )  # fmt: skip
    parser.add_argument("lora", metavar="LORA", help="a LoRA: PEFT folder, its adapter_model.safetensors or .bin, or hf://owner/name")  # fmt: skip
    parser.add_argument("--base", required=True, help="the model that it adapts: a checkpoint of any layout")
    common.add_selection(parser)
    common.add_filters(parser)
    parser.add_argument("--dialect", help="what kind of LoRA it is (default: recognised)")
    common.add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from shira_format.convert import LoraJob
    from shira_format.lora import DIALECTS

    if options.dialect is not None and options.dialect not in DIALECTS:
        console.usage_error(common.PROG, f"--dialect {options.dialect!r} is not one of {', '.join(DIALECTS)}")
    rule = common.selection_rule(options)
    job = LoraJob(options.lora, options.base, options.dialect, tuple(options.include), tuple(options.exclude))
    return common.run_job(options, job, rule)
