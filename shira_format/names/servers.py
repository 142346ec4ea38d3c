"""How serving engines lay out the weights of language models: fused, and sliced over ranks.

The rules are those of vLLM's layers (``QKVParallelLinear``, ``MergedColumnParallelLinear``, ``RowParallelLinear``,
``VocabParallelEmbedding``, ``FusedMoE``), which SGLang has taken over with their names:

* ``qkv_proj``: a rank's rows of q, then of k, then of v. A rank has ``num_heads / tp_size`` heads; with fewer KV heads than
  ranks, rank ``r`` has the one KV head ``r * num_kv_heads // tp_size``, so that several ranks hold the same one.
* ``gate_up_proj``: a rank's rows of gate, then of up.
* ``o_proj``, ``down_proj``: a rank's columns; the bias whole on each rank.
* ``embed_tokens``, ``lm_head``: a rank's rows of the vocabulary, which is padded to a multiple of 64 first.
* ``experts.w13_weight`` ``[experts, 2 * rows of a rank, hidden]``: of each expert gate, then up; ``experts.w2_weight``
  ``[experts, hidden, columns of a rank]``. With expert parallelism a rank has a range of experts.
* norms, routers and what else is small: whole on each rank.

They hold for weights in floats as the engine has loaded them; kernels for which an engine rearranges weights after loading
(quantised ones, and some for experts) hold other values there, which the check of the base's values refuses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from shira_format.errors import SourceError
from shira_format.names.placement import Block, Placement, Range, Shape, in_place
from shira_format.tensors import matrix_shape

# How the rows or columns of a checkpoint's module are in the engine's one:
#   q, k, v: the rows of a rank's heads, one after the other in one parameter;  qkv: the checkpoint has all three in one
#   merged: the rows of a rank, those of several modules one after the other;   halves: the checkpoint has both in one
#   column: the rows of a rank;  row: the columns of a rank;  vocabulary: the rows of a rank, padded;  whole: on each rank
Kind = Literal["q", "k", "v", "qkv", "merged", "halves", "column", "row", "vocabulary", "whole"]


@dataclass(frozen=True)
class ServerLayer:
    """How an engine has a module of a checkpoint.

    Attributes:
        kind: see :data:`Kind`.
        name: the last part of its module's name in the engine; empty: the same.
        part: of ``merged``, which part of the engine's module this is.
        parts: of ``merged``, the number of parts, all of one size.
    """

    kind: Kind
    name: str = ""
    part: int = 0
    parts: int = 1


# By the last part of a module's name: the family of Llama, Mistral, Qwen, Gemma, Phi and the models with experts made of them.
LAYERS: Mapping[str, ServerLayer] = MappingProxyType({
    "q_proj": ServerLayer("q", "qkv_proj"), "k_proj": ServerLayer("k", "qkv_proj"), "v_proj": ServerLayer("v", "qkv_proj"),
    "qkv_proj": ServerLayer("qkv"),
    "gate_proj": ServerLayer("merged", "gate_up_proj", 0, 2), "up_proj": ServerLayer("merged", "gate_up_proj", 1, 2),
    "gate_up_proj": ServerLayer("halves"),
    "o_proj": ServerLayer("row"), "down_proj": ServerLayer("row"),
    "embed_tokens": ServerLayer("vocabulary"), "lm_head": ServerLayer("vocabulary"),
    "gate": ServerLayer("whole"), "shared_expert_gate": ServerLayer("whole"),
    "norm": ServerLayer("whole"), "q_norm": ServerLayer("whole"), "k_norm": ServerLayer("whole"),
    "input_layernorm": ServerLayer("whole"), "post_attention_layernorm": ServerLayer("whole"),
    "pre_feedforward_layernorm": ServerLayer("whole"), "post_feedforward_layernorm": ServerLayer("whole"),
})  # fmt: skip

# Names of wrapper models, as vLLM maps them (``hf_to_vllm_mapper``); the first prefix that a name has is replaced.
VISION_LANGUAGE: Mapping[str, str] = MappingProxyType({
    "model.language_model.": "language_model.model.", "language_model.model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.", "language_model.lm_head.": "language_model.lm_head.",
})  # fmt: skip

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<module>\w+)\.weight")
_FUSED_EXPERTS = re.compile(r"(?P<experts>.*\.experts)\.(?P<module>gate_up_proj|down_proj)")
_GATE, _UP, _DOWN = {"w1", "gate_proj"}, {"w3", "up_proj"}, {"w2", "down_proj"}


@dataclass(frozen=True)
class ServerLayout:
    """The layout of one rank of a serving engine.

    Attributes:
        num_heads: attention heads of the whole model.
        num_kv_heads: heads of keys and values.
        head_size: rows of q, k and v for each head.
        tp_size: ranks of tensor parallelism.
        tp_rank: this rank.
        num_experts: experts of a layer; 0: none.
        ep_size: ranks of expert parallelism, each with a range of ``num_experts / ep_size`` experts.
        ep_rank: this rank among them.
        expert_tp_size: ranks that share one expert's rows; None: ``tp_size`` without expert parallelism, else 1, as in vLLM.
        expert_tp_rank: this rank among them; None: ``tp_rank``, or 0 if ``expert_tp_size`` is 1.
        vocabulary_padding: what the number of rows of embeddings is padded to a multiple of.
        layers: beyond those of :data:`LAYERS`, by the last part of a module's name or, where that does not tell, the last two
            (``"intermediate.dense"``).
        prefixes: from the first parts of names in the checkpoint to those in the engine, such as :data:`VISION_LANGUAGE`.
        gate_up: the name of the parameter with all experts' gate and up.
        down: the name of the parameter with all experts' down.
        up_first: whether up comes before gate in it, as in TensorRT-LLM (whose name for it is ``w3_w1_weight``).

    Raises:
        SourceError: sizes that the ranks do not divide.

    Example:
        >>> ServerLayout(num_heads=32, num_kv_heads=8, head_size=128, tp_size=4, tp_rank=1).place(
        ...     "model.layers.0.self_attn.k_proj.weight", (1024, 4096)
        ... ).blocks[0].row
        1024
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    tp_size: int = 1
    tp_rank: int = 0
    num_experts: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    expert_tp_size: int | None = None
    expert_tp_rank: int | None = None
    vocabulary_padding: int = 64
    layers: Mapping[str, ServerLayer] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    gate_up: str = "w13_weight"
    down: str = "w2_weight"
    up_first: bool = False

    def __post_init__(self) -> None:
        for what, rank, size in (
            ("tp", self.tp_rank, self.tp_size), ("ep", self.ep_rank, self.ep_size),
            ("expert_tp", self._expert_tp[0], self._expert_tp[1]),
        ):  # fmt: skip
            if not 0 <= rank < size:
                raise SourceError(f"{what}_rank {rank} is not one of {size} ranks")
        if self.num_heads % self.tp_size:
            raise SourceError(f"{self.num_heads} heads cannot be shared by tp_size {self.tp_size}")
        if self.num_kv_heads % self.tp_size and self.tp_size % self.num_kv_heads:
            raise SourceError(f"{self.num_kv_heads} KV heads cannot be shared by tp_size {self.tp_size}")
        if self.num_experts % self.ep_size:
            raise SourceError(f"{self.num_experts} experts cannot be shared by ep_size {self.ep_size}")

    @classmethod
    def of_config(cls, config: Any, **more: Any) -> ServerLayout:
        """The layout of a model by its configuration.

        Args:
            config: of transformers, or the content of its ``config.json``; of a wrapper model, its ``text_config`` counts.
            **more: other attributes, such as ``tp_size`` and ``tp_rank``.

        Raises:
            SourceError: it does not say how many heads there are; or sizes that the ranks do not divide.
        """
        values: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
        values = values.get("text_config") or values
        heads = values.get("num_attention_heads")
        if heads is None:
            raise SourceError("the configuration has no num_attention_heads")
        experts = next(
            (values[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(key)), 0
        )
        sizes = {
            "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "head_size": values.get("head_dim") or values["hidden_size"] // heads,
            "num_experts": experts,
        }
        return cls(**(sizes | more))

    @property
    def _expert_tp(self) -> tuple[int, int]:
        """Rank and size."""
        size = self.expert_tp_size if self.expert_tp_size is not None else self.tp_size if self.ep_size == 1 else 1
        rank = self.expert_tp_rank if self.expert_tp_rank is not None else self.tp_rank if size > 1 else 0
        return rank, size

    def place(self, name: str, shape: Shape) -> Placement:
        """Where a checkpoint's tensor is on this rank.

        Raises:
            SourceError: a tensor that the layout does not know, or whose shape does not fit.
        """
        renamed = self._renamed(name)
        if match := _EXPERT.fullmatch(renamed):
            return self._one_expert(name, shape, match["experts"], int(match["number"]), match["module"])
        if match := _FUSED_EXPERTS.fullmatch(renamed):
            return self._all_experts(name, shape, match["experts"], match["module"])
        module, _, attribute = renamed.rpartition(".")
        parent, dot, last = module.rpartition(".")
        layer = self._layer(last, f"{parent.rpartition('.')[2]}.{last}")
        if layer is None or attribute not in ("weight", "bias", "e_score_correction_bias"):
            if self.tp_size == 1:  # nothing is sliced, so a tensor of a name of its own is where it was
                return in_place(name, renamed, shape)
            raise SourceError(
                f"tensor {name!r}: the layout does not know how {last or name!r} is shared by {self.tp_size} ranks: say so "
                "by layers="
            )
        parameter = f"{parent}{dot}{layer.name or last}.{attribute}"
        if layer.kind == "whole" or (layer.kind == "row" and attribute == "bias"):
            return in_place(name, parameter, shape)
        return self._sliced(name, parameter, shape, layer)

    def _layer(self, last: str, last_two: str) -> ServerLayer | None:
        known = (table.get(key) for table in (self.layers, LAYERS) for key in (last_two, last))
        return next((layer for layer in known if layer is not None), None)

    def _renamed(self, name: str) -> str:
        for old, new in self.prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def _sliced(self, name: str, parameter: str, shape: Shape, layer: ServerLayer) -> Placement:
        height, width = matrix_shape(shape)
        if layer.kind == "row":
            columns = _share(name, width, "columns", self.tp_rank, self.tp_size)
            mine = columns[1] - columns[0]
            block = Block(parameter, (height, mine), mine, (0, height), columns)
            return Placement(name, shape, width, (block,))
        pieces, rows = self._rows(name, height, layer)
        found = (rows, *shape[1:])
        blocks = (Block(parameter, found, width, (start, stop), (0, width), row) for start, stop, row in pieces)
        return Placement(name, shape, width, tuple(blocks))

    def _rows(self, name: str, height: int, layer: ServerLayer) -> tuple[list[tuple[int, int, int]], int]:
        """The tensor's rows that this rank has, ``(start, stop, first row in the parameter)``, and the parameter's rows."""
        if layer.kind in ("q", "k", "v", "qkv"):
            return self._heads(name, height, layer.kind)
        if layer.kind == "vocabulary":
            padded = -(-height // self.vocabulary_padding) * self.vocabulary_padding
            start, stop = _share(name, padded, "rows of the padded vocabulary", self.tp_rank, self.tp_size)
            return [(min(start, height), min(stop, height), 0)], stop - start
        if layer.kind == "halves":
            if height % 2:
                raise SourceError(f"tensor {name!r} has {height} rows, which are not two halves")
            start, stop = _share(name, height // 2, "rows of a half", self.tp_rank, self.tp_size)
            mine = stop - start
            return [(start, stop, 0), (height // 2 + start, height // 2 + stop, mine)], 2 * mine
        start, stop = _share(name, height, "rows", self.tp_rank, self.tp_size)
        return [(start, stop, layer.part * (stop - start))], layer.parts * (stop - start)

    def _heads(self, name: str, height: int, kind: str) -> tuple[list[tuple[int, int, int]], int]:
        heads = self.num_heads // self.tp_size
        kv_heads = max(1, self.num_kv_heads // self.tp_size)
        first = {"q": self.tp_rank * heads, "kv": self.tp_rank * self.num_kv_heads // self.tp_size}
        # Of q, k and v: the heads in the tensor, this rank's first one, how many it has, and where they are in its parameter.
        parts = {
            "q": (self.num_heads, first["q"], heads, 0),
            "k": (self.num_kv_heads, first["kv"], kv_heads, heads),
            "v": (self.num_kv_heads, first["kv"], kv_heads, heads + kv_heads),
        }
        wanted = sum(parts[part][0] for part in kind) * self.head_size
        if height != wanted:
            raise SourceError(
                f"tensor {name!r} has {height} rows; {self.num_heads} heads ({self.num_kv_heads} of keys and values) of size "
                f"{self.head_size} make {wanted}"
            )
        pieces, before = [], 0
        for part in kind:
            all_heads, start, mine, place = parts[part]
            rows = [(before + start), (before + start + mine), place]
            pieces.append((rows[0] * self.head_size, rows[1] * self.head_size, rows[2] * self.head_size))
            before += all_heads
        return pieces, (heads + 2 * kv_heads) * self.head_size

    def _one_expert(self, name: str, shape: Shape, experts: str, number: int, module: str) -> Placement:
        if module not in _GATE | _UP | _DOWN:
            raise SourceError(f"tensor {name!r}: the layout does not know the part {module!r} of an expert")
        if len(shape) != 2 or number >= self.num_experts:
            raise SourceError(
                f"tensor {name!r} of shape {list(shape)} is not a matrix of one of {self.num_experts} experts"
            )
        part = "down" if module in _DOWN else "gate" if module in _GATE else "up"
        block = self._expert_block(name, experts, number, part, 0, shape)
        return Placement(name, shape, shape[1], (block,))

    def _all_experts(self, name: str, shape: Shape, experts: str, module: str) -> Placement:
        if len(shape) != 3 or shape[0] != self.num_experts or (module == "gate_up_proj" and shape[1] % 2):
            raise SourceError(
                f"tensor {name!r} of shape {list(shape)} is not {self.num_experts} experts, one after the other"
            )
        parts = ("down",) if module == "down_proj" else ("gate", "up")
        one = (shape[1] // len(parts), shape[2])
        blocks = [
            self._expert_block(name, experts, number, part, number * shape[1] + place * one[0], one)
            for number in range(self.num_experts)
            for place, part in enumerate(parts)
        ]
        return Placement(name, shape, shape[2], tuple(block for block in blocks if block.numel))

    def _expert_block(self, name: str, experts: str, number: int, part: str, before: int, shape: Shape) -> Block:
        """Where one matrix ``shape`` of an expert is, which begins at row ``before`` of the tensor; no rows: on other ranks."""
        rank, size = self._expert_tp
        here = self.num_experts // self.ep_size
        local = number - self.ep_rank * here
        is_here = 0 <= local < here
        columns, rows, height = (0, shape[1]), (0, shape[0]), shape[0]
        if part == "down":
            columns = _share(name, shape[1], "columns", rank, size)
        else:
            rows = _share(name, shape[0], "rows", rank, size)
            height = 2 * (rows[1] - rows[0])
        width = columns[1] - columns[0]
        second = part != "down" and (part == "up") != self.up_first
        return Block(
            f"{experts}.{self.down if part == 'down' else self.gate_up}",
            (here, height, width),
            width,
            (before + rows[0], before + (rows[1] if is_here else rows[0])),
            columns,
            local * height + (height // 2 if second else 0) if is_here else 0,
        )


def _share(name: str, size: int, what: str, rank: int, ranks: int) -> Range:
    """The rank's equal share.

    Raises:
        SourceError: the ranks do not divide it.
    """
    if size % ranks:
        raise SourceError(f"tensor {name!r} has {size} {what}, which {ranks} ranks cannot share")
    return rank * size // ranks, (rank + 1) * size // ranks
