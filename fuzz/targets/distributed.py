"""Folders of torch.distributed.checkpoint: metadata with other offsets, sizes, names and places, changed bytes, and opcodes."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from fuzz.mutate import NUMBERS, TEXTS, mutated_bytes
from fuzz.opcodes import Program, called, read_all
from shira_format.checkpoints.dcp_metadata import NAME, _names


def make(random: Random, folder: Path) -> None:
    """A folder with its metadata and its file of tensors."""
    files = dict(_saved())
    how = random.choice(["fields", "fields", "fields", "bytes", "data", "opcodes"])
    if how == "fields":
        metadata = pickle.loads(files[NAME])  # noqa: S301 - our own
        for _ in range(random.choice([1, 1, 2, 3])):
            _change(random, metadata)
        files[NAME] = pickle.dumps(metadata)
    elif how == "opcodes":
        files[NAME] = Program(random, sorted(_names()), [called("torch", "Size")]).pickled()
    else:
        name = NAME if how == "bytes" else next(name for name in files if name != NAME)
        files[name] = mutated_bytes(random, files[name])
    for name, data in files.items():
        (folder / name).write_bytes(data)


def check(folder: Path) -> None:
    """Open it and read every tensor; no function of the file's choice runs, and no other folder's file is read."""
    read_all(folder)


@functools.cache
def _saved() -> dict[str, bytes]:
    state = {
        "model": {"a.weight": torch.arange(24.0).reshape(4, 6), "b": torch.ones(5, dtype=torch.bfloat16)},
        "step": 7,
    }
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is disabled, it says
        save(state, checkpoint_id=folder, no_dist=True)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return found


def _change(random: Random, metadata: Metadata) -> None:
    """One field of it."""
    places: Any = metadata.storage_data
    items: Any = metadata.state_dict_metadata
    size = torch.Size([random.choice([0, 1, 2, 4, 6, 2**40]) for _ in range(random.choice([1, 2, 2, 3]))])
    odd = random.choice([*NUMBERS, *TEXTS, None, (1, 2), [3], size])
    how = random.choice(["place", "place", "chunk", "chunk", "size", "more", "kind", "key", "paths", "item"])
    if how == "place":
        index = random.choice(sorted(places, key=str))
        field = random.choice(["relative_path", "offset", "length"])
        value = random.choice(["../x", "/etc/passwd", "__0_0.distcp", "", 0, 1, -1, 7, 2**40, odd])
        places[index] = replace(places[index], **{field: value})
    elif how == "key":
        index = random.choice(sorted(places, key=str))
        places[MetadataIndex(random.choice([index.fqn, "x"]), random.choice([None, torch.Size([0]), size]))] = (
            places.pop(index)
        )
    elif how == "paths":
        metadata.planner_data = random.choice(
            [None, {"a": ("model", 3)}, {"a": odd}, {odd if isinstance(odd, str) else "x": ()}, 5]
        )
    elif how == "item":
        items[random.choice([*items, "new"])] = random.choice([BytesStorageMetadata(), None, odd])
    else:
        _change_tensor(random, items, how, size, odd)


def _change_tensor(random: Random, items: Any, how: str, size: torch.Size, odd: Any) -> None:
    tensors = [item for item in items.values() if isinstance(item, TensorStorageMetadata) and item.chunks]
    if not tensors:
        return
    item = random.choice(tensors)
    if how == "size":
        item.size = random.choice([size, size, odd])
    elif how == "more":
        item.chunks = [copy.deepcopy(item.chunks[0]) for _ in range(random.choice([0, 2, 1500]))]
    elif how == "kind":
        item.properties.dtype = random.choice([torch.float16, torch.complex64, torch.int8, odd])
    else:
        chunk: Any = random.choice(item.chunks)
        setattr(chunk, random.choice(["offsets", "sizes"]), random.choice([size, size, odd]))
