"""``shira completion``: scripts for the completion of commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from shira_cli import app

PROGRAMS = ("shira", "shira-convert", "shira-inspect", "shira-diff", "shira-merge", "shira-measure", "shira-moments", "shira-plot", "shira-verify", "shira-demo")  # fmt: skip

EXAMPLE = """
examples:
  eval "$(shira completion bash)"                      in ~/.bashrc
  eval "$(shira completion zsh)"                       in ~/.zshrc
  shira completion fish | source                       in ~/.config/fish/config.fish
"""


@click.command("completion", cls=app.Command, example=EXAMPLE)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> int:
    """Print the script with which bash, zsh or fish completes shira and the shira-* commands."""
    found = get_completion_class(shell)
    assert found is not None
    # Not source(), which looks for the shell and its version: the script may be made elsewhere.
    for prog in PROGRAMS:
        made = found(click.Command(prog), {}, prog, app.completion_variable(prog))
        print(made.source_template % made.source_vars())
    return 0
