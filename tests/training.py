"""Masks and small models for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira_format._core.arrays import Array

KINDS = ("rand", "runs", "rows", "columns", "struct", "cross", "whole", "few_columns")


def mask(model: nn.Module, kind: str = "rand", *, density: float = 0.05, only: str = "") -> dict[str, Array]:
    """Flat indices for each matrix whose name has ``only`` in it; tied weights once."""
    random = np.random.default_rng(0)
    return {
        name: pattern(kind, tuple(parameter.shape), density, random)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and only in name
    }


def pattern(kind: str, shape: tuple[int, ...], density: float, random: np.random.Generator) -> Array:
    """Flat indices of one weight."""
    found = np.zeros((shape[0], int(np.prod(shape[1:]))), bool)
    if kind == "rand":
        found.reshape(-1)[random.choice(found.size, max(1, int(density * found.size)), replace=False)] = True
    if kind == "runs":
        runs = found.reshape(-1)[: found.size // 4 * 4].reshape(-1, 4)
        runs[random.choice(len(runs), max(1, int(density * len(runs))), replace=False)] = True
    if kind in ("rows", "struct", "cross"):
        found[1::5] = True
    if kind in ("columns", "cross"):
        found[:, ::9] = True
    if kind == "struct":
        np.fill_diagonal(found, True)
    if kind == "cross":
        found[0, 1] = True
    if kind == "few_columns":
        found[::2, 1] = True
        found[1::3, 2] = True
    if kind == "whole":
        found[:] = True
    return np.flatnonzero(found)


class Layers(nn.Module):
    """One of each layer: embedding, linear, convolutions, attention, experts, and a weight that is used twice."""

    def __init__(self, *, by_frequency: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.often = nn.Embedding(20, 12, scale_grad_by_freq=by_frequency)
        self.line = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.image = nn.Conv2d(1, 4, (3, 3), stride=2, padding=1, padding_mode="circular")
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.wide = nn.Linear(12, 20, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``[b, t]`` to ``[b, t, 20]``."""
        x = self.embed(tokens) + self.often(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + torch.tanh(self.wide(x)) @ self.head.weight
        line = self.line(x.transpose(1, 2)).sum(-1)
        image = self.image(x[:, None]).mean((-1, -2))
        routed = torch.stack([nn.functional.linear(x[:, i], self.experts[i]) for i in range(3)], 1).sum(1)
        return self.head(x) + (line.sum(-1) + image.sum(-1) + routed.sum(-1))[:, None, None]


def layers(*, by_frequency: bool = True) -> Layers:
    """With the same weights every time; ``by_frequency``: gradients of one embedding are divided by counts in the batch."""
    torch.manual_seed(5)
    return Layers(by_frequency=by_frequency)


def tokens() -> Tensor:
    """``[4, 6]``, with padding."""
    return torch.tensor([[1, 2, 3, 4, 5, 0], [7, 7, 7, 2, 0, 0], [9, 19, 11, 12, 3, 1], [5, 6, 7, 8, 9, 10]])


def frozen_bits_are_kept(
    model: nn.Module, before: dict[str, Tensor], masked: dict[str, Array], *, moved_too: bool = True
) -> bool:
    """Whether all weights have the bits of ``before`` but at the entries; and, if so asked, at least one entry has others."""
    moved = 0
    now = dict(raw(model))
    for name, old in before.items():
        new = now[name]
        view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
        different = (old.view(view) != new.view(view)).reshape(-1)
        if name in masked:
            moved += int(different.sum())
            different[torch.from_numpy(masked[name])] = False
        if bool(different.any()):
            return False
    return moved > 0 or not moved_too


def raw(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name but those that training adds, as they are."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.endswith(("_values", "_magnitudes")):
            yield name, parameter.detach()


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: tensor.clone() for name, tensor in raw(model)}


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """A loss that needs no labels."""
    found = model(tokens)
    logits = found.logits if hasattr(found, "logits") else found
    return logits.float().logsumexp(-1).mean() + 0.1 * logits.float().square().mean()


def bare(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, *, steps: int = 4, accumulate: int = 1, autocast: bool = False) -> list[float]:  # fmt: skip
    """A bare loop with clipping."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, ids) / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def in_two_processes(rank: int, folder: str) -> None:
    """Train :func:`layers` in both ways, each process on half of the tokens, and save what comes of it."""
    from shira_format.training.hook import attach
    from shira_format.training.sparse import sparse_parameters
    from shira_format.training.trained import training_of

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for way, start in {"sparse": sparse_parameters, "hook": attach}.items():
        model = layers(by_frequency=False).eval()
        trained = start(model, mask(model))  # type: ignore[operator]
        ddp = nn.parallel.DistributedDataParallel(model)
        assert training_of(ddp) is trained
        bare(ddp, torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9), tokens()[rank * 2 : rank * 2 + 2])
        if rank == 0:
            trained.save(f"{folder}/{way}.st")
    torch.distributed.destroy_process_group()


def word_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` words, for trainers that ask for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w1", eos_token="w2", unk_token="w0")
