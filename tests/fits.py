"""Small fits for tests: models of random weights, random changes of them, and inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from shira_format.convert.fit.live import LiveModel
from shira_format.convert.fit.outputs import logits
from shira_format.convert.fit.task import Task, blocks_of
from tests import models


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Inputs of :class:`tests.models.Net`."""
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of token ids of different lengths, padded, for the models with 50 tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 50, (4, 7), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        mask[2, 3:] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def net_task(scale: float = 0.1) -> Task:
    """A net whose matrices all change, and whose biases are replaced."""
    model = models.net()
    draw = torch.Generator().manual_seed(3)
    source, whole = {}, {}
    for name, parameter in model.named_parameters():
        changed = parameter.detach() + scale * torch.randn(parameter.shape, generator=draw)
        (source if parameter.ndim > 1 else whole)[name] = changed
    x = rows(160)
    return Task(model, source, whole, list(x[:128].split(16)), list(x[128:].split(8)), lambda z, _: z)  # type: ignore[no-untyped-call]


def model_task(kind: str, scale: float = 0.05) -> Task:
    """One of the models of transformers, whose matrices within blocks change."""
    model = models.MODELS[kind]()
    draw = torch.Generator().manual_seed(3)
    blocks = blocks_of(model)
    source = {
        name: parameter.detach() + scale * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.startswith(blocks)
    }
    return Task(model, source, {}, tokens(6), tokens(3, 1), logits, True, kind != "bert", blocks)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit, and no others are there."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def net_lora(folder: Path) -> tuple[Path, Path, LiveModel]:
    """A LoRA of the net, its base's folder, and the live base."""
    base = models.save_base(models.net(), folder / "base")
    peft = models.random_lora(models.net(), scale=0.2, r=4, target_modules=["wide", "square", "head"])
    return models.save_lora(peft, folder / "lora"), base, live_net()


def live_net() -> LiveModel:
    """The net, whose output counts as it is."""
    return LiveModel(models.net(), outputs=lambda z, _: z)
