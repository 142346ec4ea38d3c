"""Diffusers pipelines: a folder with ``model_index.json``, and a folder of weights for each component in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.strict_json import parse_object
from shira_format.checkpoints.base import Checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.storage.paths import MOST_JSON, read_file
from shira_format.storage.weight_files import find_weights

_PIPELINE = "model_index.json"
# The file names under which each library looks for weights: for copies of weights in other formats.
_COPIES = {"transformers": "model.safetensors"}
_COPY = "diffusion_pytorch_model.safetensors"
# Endings of the names of classes that have no weights.
_WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor")
# Weights in unsupported formats; a component with one of these has weights.
_UNREAD = (".onnx", ".msgpack", ".h5", ".ckpt", ".pt", ".pth", ".pb", ".xml", ".safetensors", ".bin")


@dataclass(frozen=True)
class _Component:
    library: str
    cls: str


class PipelineCheckpoint(Checkpoint):
    """The tensors of all components, named ``COMPONENT/NAME``."""

    def __init__(
        self, folder: Path, parts: dict[str, Checkpoint], copies: dict[str, str], notices: list[str]
    ) -> None:
        """Args: ``copies`` is for each of ``parts`` the name of a single file with its weights."""
        self.path = folder
        self.components = tuple(parts)
        self.unused = tuple(f"{name}/{entry}" for name, part in parts.items() for entry in part.unused)
        self.files = [file for part in parts.values() for file in part.files]
        self.notices = (
            *notices,
            *(f"{name}: {notice}" for name, part in parts.items() for notice in part.notices),
        )
        self._parts = parts
        self._copies = copies

    def __getitem__(self, name: str) -> Array:
        part, inner = self._find(name)
        return part[inner]

    def __iter__(self) -> Iterator[str]:
        return (f"{component}/{name}" for component, part in self._parts.items() for name in part)

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        component, _, inner = name.partition("/")
        return component in self._parts and inner in self._parts[component]

    def _find(self, name: str) -> tuple[Checkpoint, str]:
        component, _, inner = name.partition("/")
        if component not in self._parts or inner not in self._parts[component]:
            raise KeyError(name)
        return self._parts[component], inner

    def shape(self, name: str) -> tuple[int, ...]:
        part, inner = self._find(name)
        return part.shape(inner)

    def dtype(self, name: str) -> np.dtype[Any]:
        part, inner = self._find(name)
        return part.dtype(inner)

    def is_quantised(self, name: str) -> bool:
        part, inner = self._find(name)
        return part.is_quantised(inner)

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        part, inner = self._find(name)
        return part.part(inner, start, stop, out)

    @property
    def shards(self) -> dict[str, list[str]]:
        found = {}
        for component, part in self._parts.items():
            # Loaders look for weights in the component's folder.
            shards = part.shards or {self._copies[component]: list(part)}
            for shard, names in shards.items():
                found[f"{component}/{shard}"] = [f"{component}/{name}" for name in names]
        return found

    @property
    def folder(self) -> Path:
        return self.path

    def metadata(self, shard: str) -> dict[str, str]:
        component, _, inner = shard.partition("/")
        return self._parts[component].metadata(inner)


def open_diffusers(path: Path) -> PipelineCheckpoint | None:
    """Open ``path`` if it is the folder, or the ``model_index.json``, of a diffusers pipeline."""
    if path.name == _PIPELINE and path.is_file():
        path = path.parent
    if not path.is_dir() or not (path / _PIPELINE).is_file():
        return None
    parts: dict[str, Checkpoint] = {}
    copies: dict[str, str] = {}
    notices: list[str] = []
    for name, component in _components(path / _PIPELINE).items():
        part = _open(path / name, component, notices)
        if part is not None:
            parts[name] = part
            copies[name] = _COPIES.get(component.library, _COPY)
    if not parts:
        raise SourceError(f"{path}: no component of {_PIPELINE} has weights")
    return PipelineCheckpoint(path, parts, copies, notices)


def _components(path: Path) -> dict[str, _Component]:
    """The entries ``name: [library, class]`` of ``model_index.json``; the others are settings or empty."""
    try:
        entries = parse_object(read_file(path, MOST_JSON).strip(), "json")
    except (FormatError, ValueError) as error:
        raise SourceError(f"{path}: not the index of a pipeline: {getattr(error, 'reason', error)}") from None
    found = {}
    for name, entry in entries.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue
        library, cls = entry
        # A pipeline with custom code has a list for the module and a string for the class.
        if not isinstance(cls, str) or not isinstance(library, (str, list)):
            continue
        if (
            not name.isidentifier()
        ):  # it is an argument of the pipeline's class, and must not be a path to elsewhere
            raise SourceError(f"{path}: {name!r} is not the name of a component")
        found[name] = _Component(str(library), cls)
    return found


def _open(folder: Path, component: _Component, notices: list[str]) -> Checkpoint | None:
    """The weights in the folder of a component; None if it has none, such as a tokenizer."""
    from shira_format.checkpoints import try_layouts

    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else None
    usual = find_weights(files or ())
    if usual is None and component.cls.endswith(_WEIGHTLESS):
        return None
    if files is None:
        raise SourceError(
            f"{folder}: the folder of a component that {_PIPELINE} lists ({component.cls}) is missing"
        )
    if _PIPELINE in files:
        raise SourceError(f"{folder}: a pipeline within a pipeline")
    if usual is not None and usual.variant is not None:
        if usual.others:
            variants = ", ".join(sorted([usual.variant, *usual.others]))
            raise SourceError(f"{folder}: several variants ({variants}) and no plain weights; keep one")
        notices.append(f"{folder.name}: the variant {usual.variant} is read; there are no plain weights")
    path = folder if usual is None else folder / usual.name
    if (found := try_layouts(path)) is not None:
        return found
    # Models have a config.json; other objects have configs of other names.
    if "config.json" in files or not files or any(name.endswith(_UNREAD) for name in files):
        raise SourceError(f"{folder}: no weights of a supported format, but {_PIPELINE} lists the component ({component.cls})")  # fmt: skip
    return None
