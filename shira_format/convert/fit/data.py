"""Inputs to fit on, and inputs that are held out: texts, arrays, or batches as the model takes them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira_format._core.text import counted
from shira_format.calibration.texts import batches, read_texts
from shira_format.errors import SourceError
from shira_format.storage.npz import read_arrays

# A file of texts (.txt, .jsonl) or of arrays (.npy, .npz), texts, an array or a mapping of arrays whose first dimension counts
# inputs, or batches as the model takes them.
Data = str | os.PathLike[str] | Tensor | np.ndarray[Any, Any] | Mapping[str, Any] | Iterable[Any]


@dataclass
class Inputs:
    """Batches to fit on and to measure on.

    Attributes:
        train: batches to fit on.
        held: batches that are held out.
        counts: how many inputs (batches, where these are given) there are of each.
        source: where they come from, for the manifest.
        notices: what a user should know.
    """

    train: list[Any]
    held: list[Any]
    counts: tuple[int, int]
    source: dict[str, Any]
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Split:
    """How inputs are divided and batched.

    Attributes:
        held: share that is held out.
        seed: of the draw.
        batch: inputs of a batch.
        length: tokens after which a text is cut.
        limit: at most so many inputs, held-out ones included.
    """

    held: float = 0.2
    seed: int = 0
    batch: int = 8
    length: int = 64
    limit: int | None = None

    def parts(self, count: int, what: str) -> tuple[list[int], list[int]]:
        """Which of ``count`` inputs are fitted on, and which are held out; at least one each.

        Raises:
            SourceError: there is but one.
        """
        if count < 2:
            raise SourceError(f"{what}: there is but one input: nothing can be held out to measure on")
        draw = random.Random(self.seed)  # noqa: S311 - reproducible, not secret
        out = set(draw.sample(range(count), min(max(1, round(self.held * count)), count - 1)))
        return [i for i in range(count) if i not in out], sorted(out)


def read_inputs(data: Data, split: Split, tokenizer: Any = None, held: Data | None = None) -> Inputs:
    """Read, divide and batch inputs.

    Args:
        data: see :data:`Data`.
        split: how.
        tokenizer: for texts.
        held: other inputs to measure on, of the same kind; by default a share of ``data``, drawn by the seed.

    Raises:
        SourceError: they cannot be read, are too few, or are texts without a tokenizer.
        OSError: a file cannot be read.
    """
    items, source = _items(data, split.limit)
    if held is None:
        fitted, measured = split.parts(len(items), source["name"])
        parts = [items.chosen(fitted), items.chosen(measured)]
    else:
        others, other_source = _items(held, None)
        source |= {"held": other_source}
        parts = [items, others]
    made = [part.batched(split, tokenizer) for part in parts]
    return Inputs(made[0], made[1], (len(parts[0]), len(parts[1])), source, items.notices)


class _Texts:
    """Texts, each once."""

    def __init__(self, texts: Sequence[str], notices: Sequence[str] = ()) -> None:
        self.texts = list(dict.fromkeys(texts))
        self.notices = list(notices)
        if len(self.texts) < len(texts):
            self.notices.append(f"left out: {counted(len(texts) - len(self.texts), 'repeated text')}")

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, places: Sequence[int]) -> _Texts:
        return _Texts([self.texts[i] for i in places])

    def batched(self, split: Split, tokenizer: Any) -> list[Any]:
        if tokenizer is None:
            raise SourceError(
                "texts need a tokenizer, and the model was given without one: give batches or arrays"
            )
        return [dict(one) for one in batches(tokenizer, self.texts, batch=split.batch, length=split.length)]


class _Arrays:
    """Arrays whose first dimension counts inputs: one, or several by name."""

    def __init__(self, arrays: Mapping[str, Tensor] | Tensor) -> None:
        self.arrays = arrays
        self.notices: list[str] = []
        sizes = {len(one) if one.ndim else 0 for one in self._all()}
        if len(sizes) != 1 or 0 in sizes:
            raise SourceError(
                f"arrays of inputs of {', '.join(map(str, sorted(sizes)))} rows: all need the same number, and one at least"
            )

    def _all(self) -> list[Tensor]:
        return [self.arrays] if isinstance(self.arrays, Tensor) else list(self.arrays.values())

    def __len__(self) -> int:
        return len(self._all()[0])

    def chosen(self, places: Sequence[int]) -> _Arrays:
        at = torch.tensor(places)
        if isinstance(self.arrays, Tensor):
            return _Arrays(self.arrays[at])
        return _Arrays({name: one[at] for name, one in self.arrays.items()})

    def batched(self, split: Split, tokenizer: Any) -> list[Any]:
        starts = range(0, len(self), split.batch)
        return [self.chosen(range(start, min(start + split.batch, len(self)))).arrays for start in starts]


class _Batches:
    """Batches as they were given."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.given = list(batches)
        self.notices: list[str] = []

    def __len__(self) -> int:
        return len(self.given)

    def chosen(self, places: Sequence[int]) -> _Batches:
        return _Batches([self.given[i] for i in places])

    def batched(self, split: Split, tokenizer: Any) -> list[Any]:
        return self.given


def _items(data: Data, limit: int | None) -> tuple[_Texts | _Arrays | _Batches, dict[str, Any]]:
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if path.suffix in (".npy", ".npz"):
            arrays, digest = read_arrays(path)
            try:
                made = {name: _tensor(one) for name, one in arrays.items()}
            except TypeError as error:  # texts, dates and the like
                raise SourceError(f"{path}: {error}") from None
            items = _Arrays(made[""] if path.suffix == ".npy" else made)
            return _cut(items, limit), {"name": path.name, "digest": digest}
        read = read_texts(path, limit=limit)
        notices = [f"{read.empty} empty lines are left out"] if read.empty else []
        return _Texts(read.texts, notices), {"name": path.name, "digest": read.digest}
    if isinstance(data, Tensor | np.ndarray):
        return _cut(_Arrays(_tensor(data)), limit), {"name": "an array"}
    if isinstance(data, Mapping):
        return _cut(_Arrays({name: _tensor(one) for name, one in data.items()}), limit), {"name": "arrays"}
    given = list(data)
    if not given:
        raise SourceError("there are no inputs to fit on")
    if all(isinstance(one, str) for one in given):
        return _cut(_Texts([one.strip() for one in given if one.strip()]), limit), {"name": "texts"}
    return _cut(_Batches(given), limit), {"name": "batches"}


def _cut(items: Any, limit: int | None) -> Any:
    return items if limit is None or limit >= len(items) else items.chosen(range(limit))


def _tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def sampled(
    model: Any, tokenizer: Any, *, count: int, length: int, seed: int, batch: int = 32
) -> list[dict[str, Tensor]]:
    """Batches of token ids that a causal language model writes from its first token on, at temperature 1.

    Args:
        model: of transformers.
        tokenizer: whose first token starts each text: that of a beginning, or of an end if it has none.
        count: how many.
        length: tokens of each.
        seed: of the draw; the same on one machine.
        batch: how many are written at a time.

    Raises:
        SourceError: the tokenizer has no such token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SourceError("the tokenizer has no token to begin a text with: give texts")
    found = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, count, batch):
            ids = torch.full((min(batch, count - start), 1), first)
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            found.append(written)
    ids = torch.cat(found)
    return [
        {"input_ids": some, "attention_mask": torch.ones_like(some)}
        for some in ids.tensor_split(tuple(range(batch, count, batch)))
    ]
