"""The folder that PEFT loads: the configuration, and one safetensors file of known layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format.convert.peft_shira.files import SHIRA
from shira_format.errors import SourceError
from shira_format.lora.files import read_json
from shira_format.lora.peft import CONFIG, WEIGHTS
from shira_format.storage.atomic import LITTER, atomic_file
from shira_format.storage.safetensors_file import header_of

# Not "random": PEFT would draw a mask for each layer as it loads, only to throw it away. With a name that it does not know, it
# takes the indices of the file, and warns only if inference_mode is not set.
MASK_TYPE = "given"


@dataclass(frozen=True)
class Stored:
    """A tensor of the file to be."""

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@contextmanager
def weights_file(path: Path, tensors: Iterable[Stored]) -> Iterator[Callable[[str, Array], None]]:
    """A safetensors file of these tensors; gives a function that puts one of them in its place."""
    # Larger elements first, so that each tensor is aligned to its element size.
    order = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    header, begins = header_of(((tensor.key, tensor.dtype, tensor.shape) for tensor in order), {"format": "pt"})
    left = {tensor.key: tensor for tensor in order}
    with atomic_file(path) as file:
        file.write(header)

        def put(key: str, array: Array) -> None:
            tensor = left.pop(key)
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), key
            file.seek(begins[key])
            file.write(as_bytes(array).data)

        yield put
        assert not left, left


def config_text(
    rank: int, modules: Iterable[str], modules_to_save: Sequence[str], base_model: Mapping[str, Any]
) -> bytes:
    """``adapter_config.json``, with the keys that every PEFT with SHiRA knows.

    ``target_modules`` is one regex and not the list of names: PEFT takes a name in a list for the end of a name, too, and
    ``head`` would also adapt ``other.head``.
    """
    known = {key: base_model.get(key) for key in ("id", "revision")}
    known = {key: value if isinstance(value, str) and value else None for key, value in known.items()}
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": known["id"],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": MASK_TYPE,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": SHIRA.peft_type,
        "r": rank,
        "random_seed": None,
        "revision": known["revision"],
        "target_modules": "|".join(map(re.escape, modules)),
        # With SEQ_CLS and TOKEN_CLS, PEFT would look for a saved classifier whether or not there is one.
        "task_type": None,
    }
    return json.dumps(config, indent=2).encode() + b"\n"


def check_replaceable(folder: Path, inputs: Iterable[object]) -> None:
    """Raise SourceError unless ``folder`` holds a SHiRA adapter of PEFT, nothing else, and no input."""
    if folder.is_symlink() or not folder.is_dir():
        raise SourceError(f"{folder}: not a folder that shira_to_peft wrote, and so not replaced")
    here = folder.resolve()
    for path in inputs:
        if isinstance(path, Path) and (here == path.resolve() or here in path.resolve().parents):
            raise SourceError(f"{folder}: holds {path}, an input, and so is not replaced")
    names = {path.name for path in folder.iterdir()}
    if others := sorted(names - {CONFIG, WEIGHTS[0]} - LITTER):
        raise SourceError(
            f"{folder}: holds {others[0]!r}, which shira_to_peft did not write, and so is not replaced"
        )
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("peft_type") != SHIRA.peft_type:
        raise SourceError(f"{folder}: not a folder that shira_to_peft wrote, and so not replaced")
