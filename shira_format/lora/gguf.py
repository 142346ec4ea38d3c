"""llama.cpp's LoRA: a GGUF file of the type "adapter", as ``convert_lora_to_gguf.py`` writes it.

The rules are those of ``src/llama-adapter.cpp`` and ``llama-adapter.h`` (ggml-org/llama.cpp): for every tensor ``NAME`` of
the model, ``NAME.lora_a`` is ``[r, in]`` and ``NAME.lora_b`` is ``[out, r]`` (in numpy's order of dimensions), the update
is ``scale * lora_b @ lora_a``, and the scale is ``alpha / r``, or 1 if alpha is 0 or missing. For ``token_embd.weight``,
``lora_a`` is ``[vocabulary, r]`` and ``lora_b`` ``[width, r]``: the update is ``scale * lora_a @ lora_b.T``. All this is in
GGUF's layout: what the converter did to a weight it did to the rows of ``lora_b``, and it is undone here with the tables
that read checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.gguf import read_stored
from shira_format.checkpoints.gguf_file import GGUFFile
from shira_format.checkpoints.gguf_names import ADAPTED, HEADS, Form
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.files import checked, is_number
from shira_format.lora.keys import by_pattern, group_keys
from shira_format.lora.products import LowRank, fits_shapes, low_rank, transposed
from shira_format.lora.rope import Attention, attention_of, deinterleave_heads
from shira_format.names.prefixes import match_names
from shira_format.storage.paths import is_file

_SUFFIX = ".gguf"
_KEY = re.compile(r"(?P<module>.*)\.(?P<part>lora_a|lora_b)")
_EMBEDDING = "token_embd.weight"


class Gguf:
    """Files that llama.cpp's converter writes."""

    name = "gguf"

    def recognises(self, path: Path) -> bool:
        return _find(path) is not None

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        found = _find(path)
        if found is None:
            raise SourceError(f"{path}: no LoRA of llama.cpp: need one {_SUFFIX} file")
        file = GGUFFile(found)
        try:
            return _Reader(file, base, prefix).read()
        finally:
            file.storage.close()


def _find(path: Path) -> Path | None:
    """The file, or the only one in a folder that is not the PEFT adapter that it was converted from."""
    if path.is_file():
        return path if path.name.lower().endswith(_SUFFIX) else None
    if is_file(path / "adapter_config.json"):
        return None
    found = [inner for inner in path.iterdir() if inner.name.lower().endswith(_SUFFIX) and inner.is_file()]
    return found[0] if len(found) == 1 else None


class _Reader:
    """Turns the tensors of one adapter into updates."""

    def __init__(self, file: GGUFFile, base: Checkpoint, prefix: str | None) -> None:
        self.prefix = prefix
        self.file = file
        self.path = file.path
        self.base = base
        self.kind, self.alpha = _header(file.path, file.metadata)
        self.ranks: set[int] = set()

    def read(self) -> Lora:
        pairs = group_keys(self.file.entries, by_pattern(_KEY), self.path, _unmatched)
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise SourceError(f"{self.path}: {name!r} has {', '.join(pair)} only")
        forms = {name: self._target(name) for name in pairs}
        by_name = {target: pairs[name] for name, (target, _) in forms.items()}

        def fits(name: str, found: str) -> bool:
            down, up = (self.file.entries[by_name[name][factor]].shape for factor in ("lora_a", "lora_b"))
            return by_name[name] is pairs.get(_EMBEDDING) or fits_shapes(self.base.shape(found), up, down)

        rename = match_names(by_name, self.base, self.path, fits=fits, prefix=self.prefix)
        updates: list[Update] = [
            self._update(name, rename(target), form, pairs[name]) for name, (target, form) in forms.items()
        ]
        quantised = sorted({entry.type.name for entry in self.file.entries.values() if entry.block > 1})
        notices = rename.notices("the LoRA")
        if quantised:
            notices.append(f"the LoRA is quantised ({', '.join(quantised)}): its dequantised values are used")
        return Lora(
            updates=updates,
            source={
                "kind": "lora", "dialect": "gguf", "lora_alpha": self.alpha, "architecture": self.kind,
                "r": min(self.ranks) if len(self.ranks) == 1 else sorted(self.ranks),
            },
            base_model=_base_model(self.file.metadata),
            files=[self.path],
            notices=notices,
        )  # fmt: skip

    def _target(self, name: str) -> tuple[str, Form]:
        known = ADAPTED[self.kind].find(name)
        # The token embedding is the only weight that llama.cpp adapts outside matrix products.
        if known is None or not name.endswith(".weight") or name.startswith("position_embd"):
            raise SourceError(
                f"{self.path}: tensor {name!r} has no known Hugging Face name for {self.kind}, or is none that a LoRA adapts"
            )
        return known

    def _update(self, name: str, target: str, form: Form, pair: Mapping[str, str]) -> LowRank:
        where = f"{self.path}: {name!r}"
        a, b = (checked(self.path, pair[factor], read_stored(self.file, pair[factor])) for factor in sorted(pair))
        if a.ndim != 2 or b.ndim != 2:
            raise SourceError(
                f"{where}: lora_a has shape {list(a.shape)}, lora_b {list(b.shape)}: not two matrices"
            )
        rank = b.shape[1]  # by which llama.cpp divides
        self.ranks.add(rank)
        scale = self.alpha / rank if self.alpha else 1.0
        shape = self.base.shape(target)
        if name == _EMBEDDING:
            return low_rank(target, shape, a, b.T, scale, where)
        if form is Form.ROTARY:
            return low_rank(target, shape, deinterleave_heads(b, self._heads(name), where), a, scale, where)
        if form is not Form.TRANSPOSED:
            return low_rank(target, shape, b, a, scale, where)
        if shape == shape[::-1]:
            # The converter transposes PEFT's factors of a Conv1D, though they need no transposition: llama.cpp refuses the
            # file, unless the weight is square.
            raise SourceError(
                f"{where}: the base's {target!r} is square and stored as [in, out], and convert_lora_to_gguf.py transposes the "
                "factors of such layers: whether they are transposed cannot be determined"
            )
        return transposed(low_rank(target, shape[::-1], b, a, scale, where), shape)

    def _heads(self, name: str) -> int:
        attention = self._attention
        return attention.key if name.endswith("attn_k.weight") else attention.query

    @cached_property
    def _attention(self) -> Attention:
        """That of the base; early converters (2024) wrote the numbers of heads into the LoRA as well, which must agree."""
        found = attention_of(self.base, self.path)
        for stem, heads in (("attn_q", found.query), ("attn_k", found.key)):
            key = f"{self.kind}.{HEADS[stem]}"
            if (own := self.file.metadata.get(key, heads)) != heads:
                raise SourceError(f"{self.path}: {key} is {own!r}, the base has {heads}")
        return found


def _unmatched(tensor: str) -> str:
    if tensor.endswith("_norm.weight"):
        return "llama.cpp ignores vectors of norms; convert the adapter that the file was made from"
    return "it ends neither in .lora_a nor .lora_b"


def _header(path: Path, metadata: Mapping[str, Any]) -> tuple[str, float]:
    """The architecture and alpha, from the header of a LoRA."""
    for key, good in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != good:
            raise SourceError(f"{path}: {key} is {metadata.get(key)!r}, not {good!r}: not a LoRA of llama.cpp")
    if "adapter.alora.invocation_tokens" in metadata:
        raise SourceError(
            f"{path}: an activated LoRA (adapter.alora.invocation_tokens) acts on some tokens only, and is no change of weights"
        )
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ADAPTED:
        raise SourceError(
            f"{path}: how the architecture {kind!r} stores its tensors is not known; supported are {', '.join(ADAPTED)}"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not is_number(alpha):
        raise SourceError(f"{path}: adapter.lora.alpha is {alpha!r}, not a number")
    return kind, float(alpha)


def _base_model(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The base that the model card names."""
    url = metadata.get("general.base_model.0.repo_url")
    hub = "https://huggingface.co/"
    return {"id": url.removeprefix(hub)} if isinstance(url, str) and url.startswith(hub) else {}
