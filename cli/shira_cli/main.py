"""``shira``: all commands as subcommands of one program."""

from __future__ import annotations

from collections.abc import Sequence

import click

from shira_cli import app

PROG = "shira"

EXAMPLE = """
examples:
  shira convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --density 0.02
  shira inspect adapter.st
  shira merge a.st b.st --base my-model/ --method ties -o ab.st

completion of commands and options in the shell:
  eval "$(shira completion bash)"       in ~/.bashrc, or zsh in ~/.zshrc
  shira completion fish | source        in ~/.config/fish/config.fish
"""

COMMANDS = {
    "convert": ("convert", "From LoRAs, fine-tunes and other formats to adapter files, and back."),
    "train": ("train", "Train a sparse adapter on texts."),
    "inspect": ("inspect", "What adapter files are, and whether they fit a base."),
    "diff": ("diff", "What differs between two adapters."),
    "merge": ("merge", "Merge adapters of one base into one."),
    "check-merge": ("convert.check_merge", "Does a merged checkpoint hold a LoRA?"),
    "mask": ("mask", "Masks: which entries of a model's weights an adapter may change."),
    "measure": ("measure", "Norms, ranks and spread of adapters; overlap and interference of pairs."),
    "moments": ("moments", "Second moments of a model's layer inputs, for measures on real inputs."),
    "plot": ("plot", "Pictures of adapters."),
    "lemmas": ("verify", "The five lemmas of the SHiRA paper, checked numerically."),
    "demo": ("demo", "A real LoRA converted, applied and measured."),
    "completion": ("completion", "Completion of commands and options for bash, zsh or fish."),
}


@click.group(
    cls=app.LazyGroup,
    lazy={name: (f"shira_cli.{module}:command", text) for name, (module, text) in COMMANDS.items()},
    example=EXAMPLE,
)
@app.version_option
def command() -> None:
    """Sparse High Rank Adapters: convert, inspect, merge, measure and draw them.

    Each command has its own help: shira COMMAND --help.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)
