"""Hooks of MkDocs: parts of pages that are generated from the repository, each where a page has its marker.

``<!-- benchmarks -->``: all rows of benchmarks/results/*.json; ``<!-- profiles -->``: the profiles of the format in them; ``<!-- api: PACKAGE -->``: the public names of a package;
``<!-- schemas -->``: the schemas of JSON outputs in docs/schemas; ``<!-- commands -->``: the help of all commands; ``<!-- quantised -->``: the schemes of quantised weights.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMAS = ROOT / "docs" / "schemas"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pictures of the benchmarks and the schema of the manifest, which have their places outside docs/."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    schema = ROOT / "spec" / "manifest.schema.json"
    files.append(File.generated(config, f"format/{schema.name}", abs_src_path=str(schema)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the markers of a page by what they stand for."""
    del page, config, files
    markdown = markdown.replace("<!-- benchmarks -->", "\n\n".join(benchmarks(path) for path in results()))
    if "<!-- profiles -->" in markdown:
        stored = [json.loads(path.read_text("utf-8"))["rows"] for path in results()]
        markdown = markdown.replace("<!-- profiles -->", "\n\n".join(filter(None, map(profiles, stored))))
    markdown = markdown.replace("<!-- schemas -->", "\n".join(map(schema_line, sorted(SCHEMAS.glob("*.json")))))
    if "<!-- quantised -->" in markdown:
        markdown = markdown.replace("<!-- quantised -->", quantised())
    if "<!-- commands -->" in markdown:
        shira = importlib.import_module("shira_cli.main").command
        markdown = markdown.replace("<!-- commands -->", "\n\n".join(commands(shira, "shira")))
    return re.sub(r"<!-- api: (\w+) -->", lambda marker: api(marker[1]), markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the roles of Sphinx, such as :func:, before names in docstrings."""
    del page, config, files
    return re.sub(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)", "", html)


def results() -> list[Path]:
    """The stored runs of the benchmarks."""
    return sorted(RESULTS.glob("*.json"))


def benchmarks(path: Path) -> str:
    """One stored run: the machine, then all rows as a table."""
    run = json.loads(path.read_text("utf-8"))
    machine = run["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    lines = [
        f"## {path.stem}",
        "",
        f"{hardware}; {machine['system']}, Python {machine['python']}; {packages}.",
        "",
        "| case | ours | peer | unit | peer / ours | the peer is | required |",
        "|---|--:|--:|---|--:|---|---|",
    ]
    for row in run["rows"]:
        case = row["case"]  # a row that belongs to the one above it starts with spaces
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
        required = f"{row['required']}: {'met' if row['met'] else 'missed'}" if row["required"] else ""
        cells = (
            ("&emsp;" if case.startswith(" ") else "") + case.strip(),
            f"{row['ours']:.4g}", f"{row['peer']:.4g}", row["unit"], ratio, row["peer_is"], required,
        )  # fmt: skip
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return "\n".join(lines)


def profiles(rows: list[dict[str, Any]]) -> str:
    """The profiles of the format in a stored run, by what is stored; empty without any."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        parts = row["case"].split("; ")  # as benchmarks.profiles names them
        if len(parts) == 3:
            found.setdefault((parts[1], parts[0]), []).append(row["ours"])
    lines = [
        "| what is stored | profile | bits an entry | encode, ns an entry | decode, ns an entry |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {case} | {profile} | {size:.1f} | {encode:.0f} | {decode:.0f} |"
        for (case, profile), (size, encode, decode) in found.items()
    ]
    return "\n".join(lines) if found else ""


def quantised() -> str:
    """The schemes of quantised weights that are known by their tensors, and the way out of each."""
    schemes = importlib.import_module("shira_format.checkpoints.quantised").SCHEMES
    lines = ["| scheme | the codes' name ends in | one of these is beside | way out |", "|---|---|---|---|"]
    for scheme in schemes:
        codes = f"`{scheme.codes}`" if scheme.codes else "(any)"
        beside = ", ".join(f"`{end}`" for end in scheme.beside)
        lines.append(f"| {escaped(scheme.name)} | {codes} | {beside} | {escaped(scheme.way_out)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def schema_line(path: Path) -> str:
    """One schema as an item of a list: title, link, description."""
    schema = json.loads(path.read_text("utf-8"))
    described = schema.get("description", "")
    title = schema.get("title", path.name.removesuffix(".schema.json"))
    return f"* **{title}**: [`{path.name}`](../schemas/{path.name}). {described}".rstrip()


def commands(
    command: click.Command, name: str, parent: click.Context | None = None, level: int = 2
) -> Iterator[str]:
    """The help of a command and, if it is a group, of all its commands, each under a heading."""
    settings: dict[str, Any] = {**command.context_settings, "terminal_width": 84}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield f"{'#' * level} {context.command_path}\n\n```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for key in command.list_commands(context):
            found = command.get_command(context, key)
            assert found is not None
            yield from commands(found, key, context, level + 1)


def api(package: str) -> str:
    """The public names of a package, grouped by kind, each as an instruction to mkdocstrings."""
    module = importlib.import_module(package)
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Modules": []}
    for name in sorted(dir(module)):
        value = getattr(module, name)
        if name.startswith("__"):
            continue
        if inspect.ismodule(value):
            groups["Modules"].append(directive(value.__name__))
        elif inspect.isclass(value):
            groups["Classes"].append(directive(home(value)))
        elif callable(value):
            groups["Functions"].append(directive(home(value)))
    return "\n\n".join(f"## {group}\n\n" + "\n\n".join(found) for group, found in groups.items() if found)


def home(value: Any) -> str:
    """The dotted path of where a function or class is defined."""
    return f"{value.__module__}.{value.__qualname__}"


def directive(path: str) -> str:
    """What mkdocstrings replaces by the documentation of ``path``."""
    return f"::: {path}"
