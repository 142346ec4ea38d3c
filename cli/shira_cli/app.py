"""What the commands are made of: one command, a group that imports its commands when they are needed, and how they start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click
from click.shell_completion import shell_complete

from shira_cli import errors
from shira_format._core.text import printable
from shira_format.version import __version__

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Help(click.Command):
    """Help with the examples printed line by line at its end."""

    example = ""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the examples, which are not wrapped."""
        if self.example:
            formatter.write("\n" + self.example.strip() + "\n")


class Command(_Help):
    """A command whose function returns the exit code."""

    def __init__(self, *args: Any, example: str = "", failed: int = errors.EXIT_FAILED, **settings: Any) -> None:
        """``example`` ends the help; ``failed`` is the exit code of an error."""
        super().__init__(*args, **{"context_settings": _SETTINGS} | settings)
        self.example, self.failed = example, failed

    def invoke(self, ctx: click.Context) -> int:
        """Run the function; known errors become one line and an exit code."""
        return errors.guarded(program(ctx), lambda: int(super(Command, self).invoke(ctx)), failed=self.failed)


class Group(_Help, click.Group):
    """A group of commands; ``a-b`` and ``a_b`` are the same name."""

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        """``example`` ends the help."""
        super().__init__(*args, **{"context_settings": _SETTINGS} | settings)
        self.example = example

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        name = next((known for known in self.list_commands(ctx) if _plain(known) == _plain(cmd_name)), None)
        return None if name is None else self.named(name)

    def named(self, name: str) -> click.Command:
        """The command of a listed name."""
        return self.commands[name]

    def about(self, name: str) -> str:
        """A line on a command for the list of commands."""
        return self.commands[name].get_short_help_str(limit=200)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.about(name)) for name in self.list_commands(ctx)])

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names in the order in which they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name, or a usage error that suggests one."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            close = get_close_matches(_plain(args[0]), map(_plain, known), n=1, cutoff=0.5)
            hint = "".join(f" (did you mean {name}?)" for name in known if [_plain(name)] == close)
            raise click.UsageError(f"no such command: {args[0]}{hint}; the commands are {', '.join(known)}", ctx)
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group that imports the module of a command when it is called."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        """``lazy``: for each command where it is, ``"module:attribute"``, and its line in the list of commands."""
        super().__init__(*args, **settings)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names in the order in which they were given."""
        return list(self.lazy)

    def named(self, name: str) -> click.Command:
        """Import a command."""
        module, _, attribute = self.lazy[name][0].partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def about(self, name: str) -> str:
        """The line that was given with it."""
        return self.lazy[name][1]


def _plain(name: str) -> str:
    return name.replace("-", "_")


def program(ctx: click.Context | None = None) -> str:
    """The program's name, such as ``shira-merge``, for messages."""
    return str((ctx or click.get_current_context()).find_root().info_name)


version_option: Callable[[Any], Any] = click.version_option(__version__, message="%(prog)s %(version)s")


def start(command: click.Command, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code.

    Raises:
        SystemExit: with 2 after a usage error, with 0 after help, version or completion.
    """
    variable = completion_variable(prog)
    if instruction := os.environ.get(variable):
        sys.exit(shell_complete(command, {}, prog, variable, instruction))
    try:
        with command.make_context(prog, list(sys.argv[1:] if argv is None else argv)) as ctx:
            return int(command.invoke(ctx))
    except click.exceptions.Exit as end:
        raise SystemExit(end.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
    except click.UsageError as error:
        print(f"{prog}: error: {printable(_message(error))}", file=sys.stderr)
    raise SystemExit(errors.EXIT_USAGE)


def completion_variable(prog: str) -> str:
    """The environment variable by which a shell asks a program for completions."""
    return f"_{_plain(prog).upper()}_COMPLETE"


def _message(error: click.UsageError) -> str:
    """One line, with the option that was probably meant."""
    if isinstance(error, click.NoSuchOption):
        hint = f" (did you mean {error.possibilities[0]}?)" if error.possibilities else ""
        return f"no such option: {error.option_name}{hint}"
    message = error.format_message()
    return message[:1].lower() + message[1:]
