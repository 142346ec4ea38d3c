"""The order of the rooms: imports run one way, in the order that CONTRIBUTING states, without circles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"shira_cli": ROOT / "cli", "shira_analysis": ROOT / "analysis", "shira_format": ROOT}
# A room may import from itself and from the rooms before it.
ROOMS = (
    "version", "errors", "_core", "tensors", "adapter", "storage", "format", "checkpoints", "names", "lora",
    "entries", "selection", "convert", "export", "live", "merging", "calibration", "masks", "training", "convert.fit", "sync",
)  # fmt: skip
HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "scipy",
    "matplotlib",
    "numba",
    "distributed",
    "gguf",
    "tqdm",
    "flint",
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((PACKAGES[package] / package).rglob("*.py")):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


ALL = {name: path for package in PACKAGES for name, path in modules(package)}


def imported(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """The modules of ours and the packages of others that a file imports; on loading it, or in functions, too."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if everywhere else _on_loading(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in ALL else node.module


def _on_loading(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: without functions, and without what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _on_loading(node)


def room(module: str) -> str:
    """The first word of its name; fits of values need live models and training, and are the last room, within ``convert``."""
    inner = module.removeprefix("shira_format.")
    return "convert.fit" if f"{inner}.".startswith("convert.fit.") else inner.split(".")[0]


def inside() -> list[tuple[str, Path]]:
    """All modules of shira_format but the door, which opens on all rooms."""
    return [(name, path) for name, path in modules("shira_format") if name != "shira_format"]


def test_rooms_are_known() -> None:
    assert {room(name) for name, _ in inside()} <= set(ROOMS)


@pytest.mark.parametrize(("name", "path"), inside(), ids=[name for name, _ in inside()])
def test_imports_run_one_way(name: str, path: Path) -> None:
    for other in imported(path):
        if other.startswith("shira_format"):
            assert other != "shira_format", f"{name} imports from the door"
            assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} imports {other}, of a later room"
        assert not other.startswith(("shira_analysis", "shira_cli")), f"{name} imports {other}"


@pytest.mark.parametrize(("name", "path"), list(modules("shira_analysis")))
def test_analysis_knows_no_command(name: str, path: Path) -> None:
    assert not [other for other in imported(path) if other.startswith("shira_cli")], name


def test_no_circles() -> None:
    """No module, while it is loaded, needs one that needs it."""
    needs = {
        name: {other for other in imported(path, everywhere=False) if other in ALL and other != name}
        for name, path in ALL.items()
    }
    done: set[str] = set()
    while ready := {name for name in needs.keys() - done if needs[name] <= done}:
        done |= ready
    assert not needs.keys() - done, f"a circle among {sorted(needs.keys() - done)}"


@pytest.mark.parametrize(
    ("name", "path"), [*modules("shira_format"), *modules("shira_analysis"), *modules("shira_cli")]
)
def test_heavy_packages_are_imported_where_they_are_used(name: str, path: Path) -> None:
    # Modules that are themselves imported when their package is needed: compiled kernels, and hooks on torch's layers.
    on_demand = {
        "shira_format._core.kernels", "shira_format._core.prefetch", "shira_analysis.measures.product_kernels",
        "shira_format.calibration.layers",
    }  # fmt: skip
    if name not in on_demand and not name.startswith(
        ("shira_format.training", "shira_format.convert.fit")
    ):  # layers and hooks of torch, all of it
        assert not HEAVY & {other.partition(".")[0] for other in imported(path, everywhere=False)}


def test_contributing_states_the_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    stated = [word for word in re.findall(r"`([\w.]+)`", text) if word in ROOMS]
    places = [stated.index(name) for name in ROOMS if name in stated]
    assert places == sorted(places)
    assert {room(name) for name, _ in inside()} - {"version"} <= set(stated)


def test_the_door_opens_on_nothing_heavy() -> None:
    code = "import sys, shira_format, shira_analysis, shira_cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)


# What numpy computes by hashing, which takes a hundred times as long as a merge of sorted indices.
_HASHED = {"unique": "return_", "union1d": None, "intersect1d": "assume_unique", "setdiff1d": "assume_unique"}


@pytest.mark.parametrize(
    ("name", "path"), [*modules("shira_format"), *modules("shira_analysis"), *modules("shira_cli")]
)
def test_indices_are_never_hashed(name: str, path: Path) -> None:
    """``distinct`` of :mod:`shira_format._core.arrays` instead."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            assert node.attr != "union1d", f"{name}, line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _HASHED:
            needed = _HASHED[node.func.attr] or "nothing"
            assert any((one.arg or "").startswith(needed) for one in node.keywords), f"{name}, line {node.lineno}"
