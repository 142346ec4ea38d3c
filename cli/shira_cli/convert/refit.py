"""``shira-convert refit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert import fitting

EXAMPLE = """
examples:
  shira-convert refit adapter.st --base my-model/ --texts texts.jsonl --density 0.002 -o smaller.st
  shira-convert refit a.st b.st --base my-model/ --texts a.jsonl --texts b.jsonl --keep 0.95 -o both.st
"""


@click.command("refit", cls=app.Command, example=EXAMPLE)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.base_option(" that the adapters are for", required=True)
@click.option(
    "--weights", metavar="W,W,...", help="A weight for each adapter, multiplied by its alpha (default: 1)."
)
@options.density_option
@options.top_k_option
@fitting.fit_options(needed=True)
@options.filters("Take")
@options.output_file()
@options.self_contained_option
@options.compact_option
@options.threads_option
@options.force_adapter_option
@options.dry_run_option
@options.printing
def command(adapters: tuple[str, ...], base: str, weights: str | None, **settings: Any) -> int:
    """Fit an adapter file anew with fewer entries, or several adapter files together as one.

    The entries of the result are chosen, and their values fitted, so that the base with it does what it does with ADAPTER.
    Of several adapters the source is the base with all of them: the sum of their changes, each at its weight. With a --texts for
    each ADAPTER, in their order, the base with that adapter alone is the source on these texts.
    """
    method, given, settings = fitting.split(settings)
    parts = _parts(given, len(adapters))
    fitting.check(method, given, settings)
    numbers = () if weights is None else options.numbers("--weights", weights)
    if numbers and len(numbers) != len(adapters):
        raise click.UsageError(f"--weights: {len(numbers)} for {len(adapters)} adapters")
    return fitting.run(
        "fit_adapter",
        adapters,
        base,
        method=method,
        given=given,
        strengths=numbers,
        **parts,
        **fitting.without(settings),
    )


def _parts(given: dict[str, Any], adapters: int) -> dict[str, Any]:
    """The texts of each adapter, if there is more than one --texts; else ``given`` has the one of all.

    Raises:
        UsageError: not as many as adapters.
    """
    found: dict[str, Any] = {}
    for option, name in (("texts", "parts"), ("test", "held_parts")):
        paths: tuple[Path, ...] = given[option] or ()
        if len(paths) > 1:
            if len(paths) != adapters:
                raise click.UsageError(
                    f"--{option}: {len(paths)} for {adapters} adapters: give one for all, or one for each"
                )
            found[name] = paths
        given[option] = paths[0] if len(paths) == 1 else None
    if (bool(given["test"]) and "parts" in found) or ("held_parts" in found and "parts" not in found):
        raise click.UsageError("--texts and --test: give both once, or both once for each adapter")
    return found
