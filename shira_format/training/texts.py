"""Texts to train on: read, split and tokenized."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shira_format.calibration.texts import read_texts
from shira_format.errors import SourceError

Task = Literal["classify", "causal"]
_NUMBER = re.compile("-?[0-9]{1,1000}")


@dataclass(frozen=True)
class LabelledText:
    """One text; ``label`` is None where there is none to learn."""

    text: str
    label: str | None = None


@dataclass(frozen=True)
class TextFile:
    """The texts of a file.

    Attributes:
        name: of the file.
        digest: its SHA-256.
        texts: in its order.
    """

    name: str
    digest: str
    texts: list[LabelledText]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, numbers in order of size and others by the alphabet."""
        found = {one.label for one in self.texts if one.label is not None}
        numbers = all(map(_NUMBER.fullmatch, found))
        return tuple(sorted(found, key=int if numbers else str))


def read_file(path: Path, task: Task, *, limit: int | None = None) -> TextFile:
    """Read objects with ``text`` and, to classify, ``label`` (a text or an integer); for a causal model also one text a line.

    Raises:
        SourceError: not such a file, or fewer than two labels.
        OSError: it cannot be read.
    """
    texts = read_texts(path, limit=limit, labelled=task == "classify")
    labels = texts.labels if task == "classify" else [None] * len(texts.texts)
    made = TextFile(path.name, texts.digest, list(map(LabelledText, texts.texts, labels)))
    if task == "classify" and len(made.labels) < 2:
        raise SourceError(f"{path}: all labels are {made.labels[0]!r}; a classifier needs two or more")
    return made


def split(texts: Sequence[LabelledText], share: float, seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Texts to train on and texts that are held out: of each label the same share, at least one, drawn at random.

    Raises:
        SourceError: a label has a single text, or there is but one.
    """
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    by_label: dict[str | None, list[int]] = {}
    for place, one in enumerate(texts):
        by_label.setdefault(one.label, []).append(place)
    held: set[int] = set()
    for label, places in by_label.items():
        if len(places) < 2:
            what = "one text" if label is None else f"one text of the label {label!r}"
            raise SourceError(f"there is but {what}: nothing can be held out")
        held.update(draw.sample(places, min(max(1, round(share * len(places))), len(places) - 1)))
    return [one for i, one in enumerate(texts) if i not in held], [texts[i] for i in sorted(held)]


def tokenized(
    tokenizer: Any, texts: Sequence[LabelledText], labels: Sequence[str], length: int
) -> list[dict[str, Any]]:
    """Rows for a trainer: ``input_ids`` and, with ``labels``, the number of the text's label.

    Raises:
        SourceError: a label that is not among ``labels``.
    """
    encoded = tokenizer([one.text for one in texts], truncation=True, max_length=length)
    rows = [{key: encoded[key][place] for key in encoded} for place in range(len(texts))]
    if labels:
        numbers = {label: number for number, label in enumerate(labels)}
        for row, one in zip(rows, texts, strict=True):
            if one.label not in numbers:
                raise SourceError(f"the label {one.label!r} is not among those to train: {', '.join(labels)}")
            row["labels"] = numbers[one.label]
    return rows


class Collator:
    """Rows to a batch, padded to its longest; of a causal model the labels are the tokens, but for padding."""

    def __init__(self, tokenizer: Any, *, causal: bool) -> None:
        self._tokenizer, self._causal = tokenizer, causal

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        """``input_ids``, ``attention_mask`` and ``labels``."""
        labels = [row["labels"] for row in rows if "labels" in row]
        inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        batch = self._tokenizer.pad(inputs, return_tensors="pt")
        if self._causal:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        else:
            import torch

            batch["labels"] = torch.tensor(labels)
        return batch
