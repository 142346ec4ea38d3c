"""Second moments of layers' inputs, ``C = E[x x^T]``.

``E <D1 x, D2 x> = tr(D1 C D2^T)`` for any two changes ``D1, D2`` of the layer's weight, so the model runs once and any pair
of adapters can be measured afterwards; see :mod:`shira_analysis.measures.interference`. Interference at single inputs is no
function of C: for that a random sample of the inputs can be kept beside it.

A file of moments is a safetensors file with one tensor ``[groups, blocks, size, size]`` for each weight, under the weight's
name, and ``shira_moments`` in its metadata: a JSON object with ``version`` 1 and, for each weight, the number of
``samples``, the ``width`` of an input, whether ``inputs_first`` and, for an embedding, ``tokens``: true. If inputs are kept,
the version is 2, their number is ``inputs``, and they are a tensor ``[inputs, groups, width]`` under the weight's name with
the suffix ``#inputs``. It is written by :meth:`Moments.save`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format._core.strict_json import parse_object
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import header_of

_KEY = "shira_moments"
_VERSION, _WITH_INPUTS = 1, 2
_INPUTS = "#inputs"
_SYMMETRIC = 1e-3  # relative to the diagonal, how far a float32 sum of products may be off
_CELLS = 1 << 22  # checked at a time

LIMIT = 4 << 30  # bytes that the moments of a model may take, by default


@dataclass(frozen=True)
class Moment:
    """``E[x x^T]`` of the inputs of one weight.

    Attributes:
        weight: the weight's name.
        blocks: float32 or float64 ``[groups, blocks, size, size]``: the blocks along the diagonal, the last one padded with
            zeros. One block is the whole matrix, and blocks of size 1 are its diagonal; everything else is taken as 0. A
            grouped convolution has a matrix per group.
        width: elements of an input (of a group).
        samples: number of inputs.
        inputs_first: whether the weight is ``[in, out]`` (Conv1D, Embedding), not ``[out, in]``.
        inputs: a random sample of the inputs, float32 or float64 ``[inputs, groups, width]``; None if none were kept.
        tokens: whether inputs are one-hot tokens, as an Embedding's: then ``blocks`` are the tokens' frequencies.
    """

    weight: str
    blocks: Array
    width: int
    samples: int
    inputs_first: bool = False
    inputs: Array | None = None
    tokens: bool = False

    def __post_init__(self) -> None:
        """Check everything.

        Raises:
            SourceError: the blocks do not cover the width, or are no second moments; names the weight and the rule.
        """
        shape, blocks = self.blocks.shape, self.blocks
        if blocks.dtype not in (np.float32, np.float64):
            self._refuse(f"of {blocks.dtype}, not float32 or float64")
        if len(shape) != 4 or shape[2] != shape[3] or not all(shape):
            self._refuse(f"of shape {list(shape)}, not [groups, blocks, size, size]")
        if self.samples < 1:
            self._refuse(f"of {self.samples} samples")
        if not (shape[1] - 1) * shape[2] < self.width <= shape[1] * shape[2]:
            self._refuse(f"{shape[1]} blocks of {shape[2]} for inputs of {self.width}")
        if not np.isfinite(blocks).all():
            self._refuse("NaN or infinite")
        diagonal = np.diagonal(blocks, axis1=2, axis2=3)
        if diagonal.min() < 0:
            self._refuse("a negative mean square")
        if diagonal.reshape(shape[0], -1)[:, self.width :].any():
            self._refuse("the last block is not filled up with zeros")
        if self.inputs is not None:
            self._check_inputs(self.inputs)
        if self.tokens and (self.size > 1 or self.groups > 1 or abs(float(blocks.sum()) - 1) > _SYMMETRIC):
            self._refuse("of tokens, and not their frequencies")
        if self.size > 1:
            self._check_products(np.sqrt(diagonal.reshape(-1, self.size)))

    def _check_inputs(self, inputs: Array) -> None:
        if inputs.dtype not in (np.float32, np.float64):
            self._refuse(f"inputs of {inputs.dtype}, not float32 or float64")
        if inputs.ndim != 3 or inputs.shape[1:] != (self.groups, self.width):
            self._refuse(f"inputs of shape {list(inputs.shape)}, not [inputs, {self.groups}, {self.width}]")
        if not 1 <= len(inputs) <= self.samples:
            self._refuse(f"{len(inputs)} inputs kept of {self.samples}")
        if not np.isfinite(inputs).all():
            self._refuse("an input is NaN or infinite")

    def _check_products(self, roots: Array) -> None:
        """Refuse blocks that are not symmetric, or where a mean product exceeds the root of both mean squares."""
        squares, size = self.blocks.reshape(-1, self.size, self.size), self.size
        some = max(1, _CELLS // size**2)
        step = max(1, _CELLS // (some * size))
        for first in range(0, len(squares), some):
            block = squares[first : first + some]
            of_block = roots[first : first + some]
            for start in range(0, size, step):
                cells, mirrored = block[:, start : start + step], block[:, :, start : start + step].swapaxes(1, 2)
                most = of_block[:, start : start + step, None] * of_block[:, None, :]
                most += np.finfo(most.dtype).tiny
                if (np.abs(cells) > (1 + _SYMMETRIC) * most).any():
                    self._refuse("a mean product above the root of both mean squares")
                if (np.abs(cells - mirrored) > _SYMMETRIC * most).any():
                    self._refuse("not symmetric")

    def _refuse(self, why: str) -> None:
        raise SourceError(f"moments of {self.weight!r}: {why}")

    @property
    def groups(self) -> int:
        """Groups of a convolution; else 1."""
        return int(self.blocks.shape[0])

    @property
    def size(self) -> int:
        """Rows and columns of a block."""
        return int(self.blocks.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of moments and inputs."""
        return int(self.blocks.nbytes) + (0 if self.inputs is None else int(self.inputs.nbytes))

    @property
    def whole(self) -> bool:
        """Whether the matrix is complete: one block."""
        return bool(self.blocks.shape[1] == 1)


class Moments(Mapping[str, Moment]):
    """Moments by the weight's name; those of a file are read on access and not kept.

    Attributes:
        unseen: weights of watched layers that no input reached.
    """

    def __init__(self, moments: Mapping[str, Moment] | Iterable[Moment], *, unseen: Iterable[str] = ()) -> None:
        self._moments = moments if isinstance(moments, Mapping) else {one.weight: one for one in moments}
        self.unseen = tuple(unseen)

    def __getitem__(self, weight: str) -> Moment:
        return self._moments[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __contains__(self, weight: object) -> bool:
        return weight in self._moments  # without reading it

    def save(self, path: Path) -> None:
        """Write a file, atomically."""
        entries: dict[str, Any] = {}
        sizes: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        for name, one in self.items():
            entries[name] = {"samples": one.samples, "width": one.width, "inputs_first": one.inputs_first}
            sizes.append((name, one.blocks.dtype, one.blocks.shape))
            if one.tokens:
                entries[name]["tokens"] = True
            if one.inputs is not None:
                entries[name]["inputs"] = len(one.inputs)
                sizes.append((name + _INPUTS, one.inputs.dtype, one.inputs.shape))
        version = _WITH_INPUTS if len(sizes) > len(entries) else _VERSION
        header, _ = header_of(sizes, {_KEY: json.dumps({"version": version, "weights": entries})})
        with atomic_file(Path(path)) as file:
            file.write(header)
            for one in self.values():
                file.write(as_bytes(one.blocks).data)
                if one.inputs is not None:
                    file.write(as_bytes(one.inputs).data)

    @classmethod
    def read(cls, path: str | Path) -> Moments:
        """Open a file; each weight's moments are checked when they are read.

        Raises:
            FormatError: not a safetensors file, or a damaged one.
            SourceError: not a file of moments, or an inconsistent one.
            OSError: it cannot be read.
        """
        return cls(_File(path))


class _File(Mapping[str, Moment]):
    """The moments of a file."""

    def __init__(self, path: str | Path) -> None:
        self._file = SafetensorsFile(path)
        metadata = self._file.metadata.get(_KEY)
        if metadata is None:
            raise self._refusal(f"not a file of moments: its metadata has no {_KEY!r}")
        manifest = parse_object(metadata.encode(), "manifest-json")
        version = manifest.get("version")
        if version not in (_VERSION, _WITH_INPUTS):
            raise self._refusal(f"moments of version {version!r}; supported are {_VERSION} and {_WITH_INPUTS}")
        weights = manifest.get("weights")
        if not isinstance(weights, dict) or not all(isinstance(entry, dict) for entry in weights.values()):
            raise self._refusal("the metadata has no 'weights', or entries of a wrong type")
        if version == _VERSION and any("inputs" in entry for entry in weights.values()):
            raise self._refusal(f"inputs in a file of version {_VERSION}")
        kept = [name + _INPUTS for name, entry in weights.items() if "inputs" in entry]
        if sorted([*weights, *kept]) != sorted(self._file):
            raise self._refusal("the metadata and the tensors name different weights")
        self._entries: dict[str, Any] = weights
        for name, entry in self._entries.items():
            kinds = {"samples": int, "width": int, "inputs_first": bool, "tokens": bool}
            if any(type(({"tokens": False} | entry).get(key)) is not kind for key, kind in kinds.items()):
                raise self._refusal(
                    f"tensor {name!r}: 'samples', 'width', 'inputs_first' or 'tokens' is missing or of a wrong type"
                )

    def _refusal(self, why: str) -> SourceError:
        return SourceError(f"{self._file.path}: {why}")

    def __getitem__(self, weight: str) -> Moment:
        entry = self._entries[weight]
        inputs = self._file.read(weight + _INPUTS) if "inputs" in entry else None
        try:
            if inputs is not None and inputs.shape[:1] != (entry["inputs"],):
                raise SourceError(f"moments of {weight!r}: not the {entry['inputs']!r} inputs of the metadata")
            return Moment(
                weight, self._file.read(weight), entry["width"], entry["samples"], entry["inputs_first"], inputs,
                entry.get("tokens", False),
            )  # fmt: skip
        except SourceError as error:
            raise SourceError(f"{self._file.path}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, weight: object) -> bool:
        return weight in self._entries


def collect_moments(
    model: Any,
    data: Iterable[Any],
    modules: Iterable[str] | None = None,
    *,
    block: int | None = None,
    dtype: Literal["float32", "float64"] = "float64",
    limit: int = LIMIT,
    inputs: int = 0,
    seed: int = 0,
    rename: Callable[[str], str] = lambda name: name,
) -> Moments:
    """Run a model over data and collect the second moments of its layers' inputs.

    Layers can be Linear, GPT-2's Conv1D, Conv1d to Conv3d (an input is a patch, in the order of the weight's matrix view) and
    Embedding (an input is a token; the mean squares are the tokens' frequencies). If a batch has an ``attention_mask``
    ``[batch, tokens]``, inputs ``[batch, tokens, ...]`` or ``[batch * tokens, width]`` count only where it is not 0.

    Args:
        model: a torch module. It runs in evaluation mode and without gradients; its mode is restored.
        data: batches: mappings (as from tokenizers) that are passed by name, tuples or lists, or one tensor; moved to the
            device of the model's first parameter. Not kept.
        modules: names as in ``named_modules``; by default all layers that can be watched.
        block: keep only diagonal blocks of so many inputs of each matrix (1: the diagonal). An embedding has only its
            diagonal anyway.
        dtype: in which products are computed and summed.
        limit: bytes that all moments and kept inputs may take.
        inputs: size of the random sample of inputs to keep per layer; not for embeddings, whose frequencies say it all.
        seed: of the random sample.
        rename: from the model's names of weights to those in adapters.

    Raises:
        SourceError: a module is missing, cannot be watched, or is named but never reached; moments above ``limit``; no data;
            an input that is not finite.
    """
    from shira_format.calibration.layers import Watch

    watch = Watch(model, modules, block=block, dtype=dtype, limit=limit, inputs=inputs, seed=seed)
    watch.run(data)
    moments = [layer.moment(rename(layer.weight)) for layer in watch.layers if layer.samples]
    return Moments(moments, unseen=(rename(layer.weight) for layer in watch.layers if not layer.samples))
