"""Small modules that lay out weights as serving engines do, one rank each, with weight loaders like vLLM's.

Nothing here is shared with the package: offsets are those of ``narrow`` calls, as in the engines' loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model of the family of Llama; with experts if there are any."""

    hidden: int = 16
    heads: int = 4
    kv_heads: int = 2
    head: int = 4
    inner: int = 24
    vocabulary: int = 70
    layers: int = 2
    experts: int = 0


@dataclass(frozen=True)
class Rank:
    size: int = 1
    rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0

    @property
    def of_experts(self) -> tuple[int, int]:
        return (self.rank, self.size) if self.ep_size == 1 else (0, 1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


class QKVParallelLinear(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.rank, self.head = rank, sizes.head
        self.heads = sizes.heads // rank.size
        if rank.size >= sizes.kv_heads:
            self.kv_heads, self.replicas = 1, rank.size // sizes.kv_heads
        else:
            self.kv_heads, self.replicas = sizes.kv_heads // rank.size, 1
        rows = (self.heads + 2 * self.kv_heads) * self.head
        self.weight, self.bias = parameter(rows, sizes.hidden), parameter(rows)

    def load(self, own: nn.Parameter, loaded: torch.Tensor, part: str) -> None:
        q, kv = self.heads * self.head, self.kv_heads * self.head
        offset, size = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[part]
        shard = self.rank.rank if part == "q" else self.rank.rank // self.replicas
        own.data.narrow(0, offset, size).copy_(loaded.narrow(0, shard * size, size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return functional.linear(x, self.weight, self.bias).split([q, kv, kv], -1)


class MergedColumnParallelLinear(nn.Module):
    def __init__(self, hidden: int, inner: int, rank: Rank) -> None:
        super().__init__()
        self.rank, self.size = rank, inner // rank.size
        self.weight, self.bias = parameter(2 * self.size, hidden), parameter(2 * self.size)

    def load(self, own: nn.Parameter, loaded: torch.Tensor, part: int) -> None:
        own.data.narrow(0, part * self.size, self.size).copy_(
            loaded.narrow(0, self.rank.rank * self.size, self.size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(x, self.weight, self.bias).chunk(2, -1)
        return functional.silu(gate) * up


class RowParallelLinear(nn.Module):
    def __init__(self, inner: int, hidden: int, rank: Rank) -> None:
        super().__init__()
        self.rank, self.size = rank, inner // rank.size
        self.weight, self.bias = parameter(hidden, self.size), parameter(hidden)

    def load(self, own: nn.Parameter, loaded: torch.Tensor) -> None:
        own.data.copy_(loaded if loaded.ndim == 1 else loaded.narrow(1, self.rank.rank * self.size, self.size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias if self.rank.rank == 0 else None)


class VocabParallelEmbedding(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        padded = (sizes.vocabulary + 63) // 64 * 64
        self.size = padded // rank.size
        self.start = min(rank.rank * self.size, sizes.vocabulary)
        self.stop = min((rank.rank + 1) * self.size, sizes.vocabulary)
        self.weight = parameter(self.size, sizes.hidden)

    def load(self, own: nn.Parameter, loaded: torch.Tensor) -> None:
        own.data[: self.stop - self.start].copy_(loaded[self.start : self.stop])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mine = (tokens >= self.start) & (tokens < self.stop)
        return self.weight[torch.where(mine, tokens - self.start, 0)] * mine[..., None]


class FusedMoE(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.number, self.size = rank.of_experts[0], sizes.inner // rank.of_experts[1]
        self.here = sizes.experts // rank.ep_size
        self.first = rank.ep_rank * self.here
        self.w13_weight = parameter(self.here, 2 * self.size, sizes.hidden)
        self.w2_weight = parameter(self.here, sizes.hidden, self.size)

    def load(self, loaded: torch.Tensor, part: str, expert: int) -> None:
        local = expert - self.first
        if not 0 <= local < self.here:
            return
        start = self.number * self.size
        if part == "w2":
            self.w2_weight.data[local].copy_(loaded.narrow(1, start, self.size))
            return
        half = self.w13_weight.data[local].narrow(0, 0 if part == "w1" else self.size, self.size)
        half.copy_(loaded.narrow(0, start, self.size))

    def forward(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for local in range(self.here):
            gate, up = functional.linear(x, self.w13_weight[local]).chunk(2, -1)
            out = functional.linear(functional.silu(gate) * up, self.w2_weight[local])
            total += shares[..., self.first + local, None] * out
        return total


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.head = sizes.head
        self.qkv_proj = QKVParallelLinear(sizes, rank)
        self.o_proj = RowParallelLinear(sizes.heads * sizes.head, sizes.hidden, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(-2, -3) for part in self.qkv_proj(x))
        copies = q.shape[-3] // k.shape[-3]
        k, v = (part.repeat_interleave(copies, -3) for part in (k, v))
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        if sizes.experts:
            self.gate = nn.Linear(sizes.hidden, sizes.experts, bias=False)
            self.experts = FusedMoE(sizes, rank)
        else:
            self.gate_up_proj = MergedColumnParallelLinear(sizes.hidden, sizes.inner, rank)
            self.down_proj = RowParallelLinear(sizes.inner, sizes.hidden, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "experts"):
            return self.experts(x, self.gate(x).softmax(-1))
        return self.down_proj(self.gate_up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes, rank), Mlp(sizes, rank)
        self.input_layernorm = nn.RMSNorm(sizes.hidden)


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(sizes, rank)
        self.layers = nn.ModuleList(Layer(sizes, rank) for _ in range(sizes.layers))


class Server(nn.Module):
    """One rank of an engine."""

    def __init__(self, sizes: Sizes, rank: Rank) -> None:
        super().__init__()
        self.model = Decoder(sizes, rank)
        self.requires_grad_(False)

    def load(self, weights: Weights) -> Server:
        own = dict(self.named_parameters())
        stacked = {
            "q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
            "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
        }  # fmt: skip
        experts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for name, loaded in weights.items():
            *path, last, attribute = name.split(".")
            if "experts" in path:
                self.get_submodule(".".join(path[:-1])).load(loaded, experts[last], int(path[-1]))
                continue
            fused, part = stacked.get(last, (last, None))
            module = self.get_submodule(".".join([*path, fused]))
            target = own[".".join([*path, fused, attribute])]
            if not hasattr(module, "load"):
                target.data.copy_(loaded)
            elif part is None:
                module.load(target, loaded)
            else:
                module.load(target, loaded, part)
        return self


def checkpoint(sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by the names that a checkpoint has."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    found = {"model.embed_tokens.weight": some(sizes.vocabulary, sizes.hidden)}
    q, kv = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        found[f"{layer}.input_layernorm.weight"] = some(sizes.hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = some(rows, sizes.hidden)
            found[f"{layer}.self_attn.{name}_proj.bias"] = some(rows)
        found[f"{layer}.self_attn.o_proj.weight"] = some(sizes.hidden, q)
        found[f"{layer}.self_attn.o_proj.bias"] = some(sizes.hidden)
        experts = [f"mlp.experts.{expert}" for expert in range(sizes.experts)] or ["mlp"]
        for part in experts:
            for name in ("gate_proj", "up_proj"):
                found[f"{layer}.{part}.{name}.weight"] = some(sizes.inner, sizes.hidden)
            found[f"{layer}.{part}.down_proj.weight"] = some(sizes.hidden, sizes.inner)
        if sizes.experts:
            found[f"{layer}.mlp.gate.weight"] = some(sizes.experts, sizes.hidden)
        else:
            for name, rows in (("gate_proj", sizes.inner), ("up_proj", sizes.inner), ("down_proj", sizes.hidden)):
                found[f"{layer}.mlp.{name}.bias"] = some(rows)
    return found


def forward(ranks: list[Server], tokens: torch.Tensor) -> torch.Tensor:
    """All ranks together: what each adds is summed, as the engines' reductions do."""
    x = sum(rank.model.embed_tokens(tokens) for rank in ranks)
    for layers in zip(*(rank.model.layers for rank in ranks), strict=True):
        x = x + sum(layer.self_attn(layer.input_layernorm(x)) for layer in layers)
        x = x + sum(layer.mlp(layer.input_layernorm(x)) for layer in layers)
    return x
