"""``shira-convert``: from LoRAs, checkpoints and others to adapter files, and back; a module for each subcommand."""

from __future__ import annotations

from collections.abc import Sequence

import click

from shira_cli import app

PROG = "shira-convert"

EXAMPLE = """
examples:
  shira-convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --density 0.02
  shira-convert full_to_shira --base my-model/ --tuned my-tune/ -o patch.st --exact
  shira-convert shira_to_full patch.st --base my-model/ -o my-tune-again/
"""

COMMANDS = {
    "lora_to_shira": "A LoRA and its base, to an adapter.",
    "full_to_shira": "A full fine-tune and its base, to an adapter or an exact patch.",
    "refit": "An adapter, to one of fewer entries that does the same; or several, to one.",
    "repack": "An adapter, to the same one in fewer bytes, or plain again.",
    "shira_to_full": "An adapter and its base, to a full checkpoint.",
    "shira_to_lora": "An adapter, to a LoRA for PEFT.",
    "peft_to_shira": "A sparse adapter that PEFT trained, to an adapter.",
    "shira_to_peft": "An adapter, to PEFT's SHiRA.",
    "shira_to_csr": "An adapter, to scipy's CSR matrices.",
    "csr_to_shira": "CSR matrices, to an adapter.",
    "check_merge": "Does a merged checkpoint hold a LoRA?",
}


@click.group(
    cls=app.LazyGroup,
    lazy={name: (f"shira_cli.convert.{name}:command", text) for name, text in COMMANDS.items()},
    example=EXAMPLE,
)
@app.version_option
def command() -> None:
    """Convert LoRAs, fine-tunes and other sparse formats to SHiRA adapter files, and back."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)
