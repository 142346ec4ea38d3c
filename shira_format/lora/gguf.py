"""llama.cpp's LoRA: a GGUF file of the type "adapter", as ``convert_lora_to_gguf.py`` writes it.

What the file means is what llama.cpp does with it (``src/llama-adapter.cpp`` and ``llama-adapter.h``, ggml-org/llama.cpp):
for every tensor ``NAME`` of the model, ``NAME.lora_a`` is ``[r, in]`` and ``NAME.lora_b`` is ``[out, r]`` (in numpy's
order of dimensions), the update is ``scale * lora_b @ lora_a``, and the scale is ``alpha / r``, or 1 if alpha is 0 or
missing. Of ``token_embd.weight``, ``lora_a`` is ``[vocabulary, r]`` and ``lora_b`` ``[width, r]``: the update is
``scale * lora_a @ lora_b.T``. All this is of the model as GGUF stores it: what the converter did to a weight it did to
the rows of ``lora_b``, and is undone here by the same tables by which checkpoints are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.gguf import read_stored
from shira_format.checkpoints.gguf_file import GGUFFile
from shira_format.checkpoints.gguf_names import ADAPTED, HEADS, Form
from shira_format.errors import SourceError
from shira_format.lora.files import checked, is_number
from shira_format.lora.pairs import plain, transposed
from shira_format.lora.products import LowRank
from shira_format.lora.rope import Attention, attention_of, halves
from shira_format.lora.update import Update
from shira_format.lora.updates import Lora
from shira_format.names.match import match_names

_SUFFIX = ".gguf"
_FACTORS = (".lora_a", ".lora_b")
_EMBEDDING = "token_embd.weight"


class Gguf:
    """llama.cpp's own files."""

    name = "gguf"

    def recognises(self, path: Path) -> bool:
        return _find(path) is not None

    def read(self, path: Path, base: Checkpoint) -> Lora:
        found = _find(path)
        if found is None:
            raise SourceError(f"{path}: no LoRA of llama.cpp: need one {_SUFFIX} file")
        file = GGUFFile(found)
        try:
            return _Reader(file, base).read()
        finally:
            file.storage.close()


def _find(path: Path) -> Path | None:
    """The file, or the only one in a folder that is not the PEFT adapter from which it was made."""
    if path.is_file():
        return path if path.name.lower().endswith(_SUFFIX) else None
    if (path / "adapter_config.json").is_file():
        return None
    found = [inner for inner in path.iterdir() if inner.name.lower().endswith(_SUFFIX) and inner.is_file()]
    return found[0] if len(found) == 1 else None


class _Reader:
    """One adapter on its way from tensors to updates."""

    def __init__(self, file: GGUFFile, base: Checkpoint) -> None:
        self.file = file
        self.path = file.path
        self.base = base
        self.kind, self.alpha = _header(file.path, file.metadata)
        self.ranks: set[int] = set()

    def read(self) -> Lora:
        pairs = self._pairs()
        forms = {name: self._target(name) for name in pairs}
        rename, words = match_names(dict.fromkeys(target for target, _ in forms.values()), self.base, self.path)
        updates: list[Update] = [
            self._update(name, rename(target), form, pairs[name]) for name, (target, form) in forms.items()
        ]
        quantised = sorted({entry.type.name for entry in self.file.entries.values() if entry.block > 1})
        notices = [f"names of the LoRA are not those of the base: {words}"] if words else []
        if quantised:
            notices.append(f"the LoRA is quantised ({', '.join(quantised)}): values are the dequantised ones")
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

    def _pairs(self) -> dict[str, dict[str, str]]:
        """The tensors of each weight, by factor."""
        found: dict[str, dict[str, str]] = {}
        for tensor in self.file.entries:
            name, dot, factor = tensor.rpartition(".")
            if dot + factor not in _FACTORS:
                hint = ": llama.cpp leaves out vectors of norms; convert the adapter that the file was made of"
                raise SourceError(
                    f"{self.path}: unmatched tensor {tensor!r}{hint if tensor.endswith('_norm.weight') else ''}"
                )
            found.setdefault(name, {})[factor] = tensor
        for name, pair in found.items():
            if len(pair) != len(_FACTORS):
                raise SourceError(f"{self.path}: {name!r} has {', '.join(pair)} only")
        if not found:
            raise SourceError(f"{self.path}: it has no tensors")
        return found

    def _target(self, name: str) -> tuple[str, Form]:
        known = ADAPTED[self.kind].find(name)
        # Of what is no matrix product llama.cpp adapts only the embedding of tokens.
        if known is None or not name.endswith(".weight") or name.startswith("position_embd"):
            raise SourceError(
                f"{self.path}: tensor {name!r} has no Hugging Face name that is known for {self.kind}, "
                "or is not one that a LoRA adapts"
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
            return plain(target, shape, a, b.T, scale, where)
        if form is Form.ROTARY:
            return plain(target, shape, halves(b, self._heads(name), where), a, scale, where)
        if form is not Form.TRANSPOSED:
            return plain(target, shape, b, a, scale, where)
        if shape == shape[::-1]:
            # The converter turns PEFT's factors of a Conv1D over, though they are right as they are: llama.cpp refuses
            # the file, unless the weight is square.
            raise SourceError(
                f"{where}: the base's {target!r} is square and stored as [in, out], and convert_lora_to_gguf.py turns the "
                "factors of such layers over: nothing tells which way round they are"
            )
        return transposed(plain(target, shape[::-1], b, a, scale, where), shape)

    def _heads(self, name: str) -> int:
        attention = self._attention
        return attention.key if name.endswith("attn_k.weight") else attention.query

    @cached_property
    def _attention(self) -> Attention:
        """Of the base; converters of 2024 wrote the numbers of heads into the LoRA as well."""
        found = attention_of(self.base, self.path)
        for stem, heads in (("attn_q", found.query), ("attn_k", found.key)):
            key = f"{self.kind}.{HEADS[stem]}"
            if (own := self.file.metadata.get(key, heads)) != heads:
                raise SourceError(f"{self.path}: {key} is {own!r}, the base has {heads}")
        return found


def _header(path: Path, metadata: Mapping[str, Any]) -> tuple[str, float]:
    """The architecture and alpha of a header that is one of a LoRA."""
    for key, good in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != good:
            raise SourceError(f"{path}: {key} is {metadata.get(key)!r}, not {good!r}: not a LoRA of llama.cpp")
    if "adapter.alora.invocation_tokens" in metadata:
        raise SourceError(
            f"{path}: an activated LoRA (adapter.alora.invocation_tokens) acts on some tokens only and is no change of weights"
        )
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ADAPTED:
        raise SourceError(
            f"{path}: how the architecture {kind!r} stores its tensors is not known here; read are {', '.join(ADAPTED)}"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not is_number(alpha):
        raise SourceError(f"{path}: adapter.lora.alpha is {alpha!r}, not a number")
    return kind, float(alpha)


def _base_model(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The base as the model card told it to the converter."""
    url = metadata.get("general.base_model.0.repo_url")
    hub = "https://huggingface.co/"
    return {"id": url.removeprefix(hub)} if isinstance(url, str) and url.startswith(hub) else {}
