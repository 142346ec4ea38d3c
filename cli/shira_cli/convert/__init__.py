"""``shira-convert``: from what people have to an adapter file, and back. A module for each subcommand."""

from __future__ import annotations

from collections.abc import Sequence

from shira_cli import console
from shira_cli.convert import (
    check_merge,
    csr,
    full_to_shira,
    lora_to_shira,
    peft_shira,
    shira_to_full,
    shira_to_lora,
)
from shira_cli.convert.common import PROG

EXAMPLE = """examples:
  shira-convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --density 0.02
  shira-convert full_to_shira --base my-model/ --tuned my-tune/ -o patch.st --exact
  shira-convert shira_to_full patch.st --base my-model/ -o my-tune-again/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, "Convert adapters and checkpoints to SHiRA adapter files, and back.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    lora_to_shira.add(commands)
    full_to_shira.add(commands)
    shira_to_full.add(commands)
    csr.add_shira_to_csr(commands)
    csr.add_csr_to_shira(commands)
    check_merge.add(commands)
    peft_shira.add_peft_to_shira(commands)
    peft_shira.add_shira_to_peft(commands)
    shira_to_lora.add(commands)
    options = parser.parse_args(argv)
    return console.run(PROG, lambda: int(options.run(options)))
