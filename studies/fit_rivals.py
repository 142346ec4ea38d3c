"""Other small forms of a source, to compare fits with: DARE, DAREx-q, a learned mask, and a LoRA of lower rank.

Each takes a :class:`shira_format.convert.fit.task.Task` and gives entries, or for the LoRA the weights that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shira_format.calibration.layers import restoring_gradients
from shira_format.convert.fit.distill import Distillation, Teacher
from shira_format.convert.fit.support import largest, update_of
from shira_format.convert.fit.task import Task, showing, showing_base

Found = dict[str, tuple[Tensor, Tensor]]

SCALES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of DAREx-q, between no rescaling and DARE's
MASK_RATE, MASK_START = 0.1, 2.0
MASK_PRICE = 1.0  # of a mask that is 1 everywhere, beside a loss that is 2 for the base
FACTOR_RATE = 2e-3


def dare(task: Task, budget: int, seed: int) -> Found:
    """Entries drawn at random, their updates divided by the share that is kept (DARE, arXiv 2311.03099)."""
    return _drawn(task, budget, seed, 1.0)


def darex(task: Task, budget: int, seed: int) -> Found:
    """DARE with a scale below 1 / density, chosen on the inputs to fit on by the outputs (DAREx-q, arXiv 2410.09344).

    There q is found by the change of the outputs at the labels or by their variance; here by the outputs' distance to the source's.
    """
    teacher, losses = Teacher(task), {}
    with showing_base(task):
        teacher.measure_base()
    batches = range(0, len(task.train), max(1, len(task.train) // 8))
    for scale in SCALES:
        with showing(task, _drawn(task, budget, seed, scale)), torch.no_grad():
            losses[scale] = sum(float(teacher.loss(number, 0.0)) for number in batches)
    return _drawn(task, budget, seed, min(losses, key=losses.__getitem__))


def _drawn(task: Task, budget: int, seed: int, scale: float) -> Found:
    draw = torch.Generator().manual_seed(seed)
    chosen = largest(
        {name: torch.rand(weight.numel(), generator=draw) for name, weight in task.source.items()}, budget
    )
    whole = task.numel / budget
    return _moved(task, chosen, 1 + scale * (whole - 1))


def _moved(task: Task, chosen: Mapping[str, Tensor], factor: float = 1.0) -> Found:
    """The base plus so many times the update, at the chosen entries."""
    with showing_base(task):
        return {
            name: (at, task.parameter(name).detach().reshape(-1)[at].float() + factor * update_of(task, name)[at])
            for name, at in chosen.items()
        }


class _Masked(nn.Module):
    def __init__(self, update: Tensor) -> None:
        super().__init__()
        self.update: Tensor
        self.register_buffer("update", update)
        self.real = nn.Parameter(torch.full_like(update, -MASK_START))

    def forward(self, base: Tensor) -> Tensor:
        return base + torch.sigmoid(self.real) * self.update


def learned(task: Task, budget: int, seed: int, steps: int) -> Found:
    """A mask on the update that is trained, with a price on its size (Localize-and-Stitch, arXiv 2408.13656); then its largest entries.

    There the loss is the task's on labelled data; here it is the distance to the source, as in the distillation.
    """
    with showing_base(task):
        parts = {name: _Masked(update_of(task, name).view(task.parameter(name).shape)) for name in task.source}

        def price() -> Tensor:
            return (
                MASK_PRICE
                * torch.stack([torch.sigmoid(part.real).sum() for part in parts.values()]).sum()
                / task.numel
            )

        reals = [part.real for part in parts.values()]
        teacher = _taught(task)
        with _parametrized(task, parts):
            _train(teacher, reals, steps, MASK_RATE, seed, price)
    chosen = largest(
        {name: part.real.detach().reshape(-1) + MASK_START + 100 for name, part in parts.items()}, budget
    )
    return _moved(task, chosen)


class _Factors(nn.Module):
    def __init__(self, update: Tensor, rank: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        root = values[:rank].sqrt()
        self.left, self.right = nn.Parameter(left[:, :rank] * root), nn.Parameter(root[:, None] * right[:rank])

    def forward(self, base: Tensor) -> Tensor:
        return base + self.left @ self.right


def low_rank(task: Task, parameters: int, seed: int, steps: int) -> tuple[dict[str, Tensor], int]:
    """The weights with a LoRA of at most so many parameters, and how many it has.

    Factors start from the singular vectors of the update, those with the largest values of all matrices per parameter, and are trained
    as a fit's values are.
    """
    with showing_base(task):
        updates = {name: update_of(task, name).view(task.parameter(name).shape) for name in task.source}
        gains = [
            (float(value) ** 2 / sum(update.shape), name, sum(update.shape))
            for name, update in updates.items()
            for value in torch.linalg.svdvals(update)
        ]
        ranks, size = dict.fromkeys(updates, 0), 0
        for _, name, cost in sorted(gains, reverse=True):
            if size + cost > parameters:
                break
            ranks[name] += 1
            size += cost
        parts = {name: _Factors(updates[name], rank) for name, rank in ranks.items() if rank}
        teacher = _taught(task)
        with _parametrized(task, parts):
            _train(teacher, [p for part in parts.values() for p in part.parameters()], steps, FACTOR_RATE, seed)
        with torch.no_grad():
            return {name: part(task.parameter(name)) for name, part in parts.items()}, size


@contextmanager
def _parametrized(task: Task, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """The weights are what ``parts`` make of the base's."""
    places = {name: name.rpartition(".") for name in parts}
    try:
        for name, part in parts.items():
            module, _, attribute = places[name]
            parametrize.register_parametrization(task.model.get_submodule(module), attribute, part, unsafe=True)
        yield
    finally:
        for module, _, attribute in places.values():
            owner = task.model.get_submodule(module)
            if parametrize.is_parametrized(owner, attribute):
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)


def _taught(task: Task) -> Teacher:
    """A teacher that has seen all inputs: the source cannot be shown while weights are parametrized."""
    teacher = Teacher(task)
    teacher.measure_base()
    for number in range(len(task.train)):
        _ = teacher.source[number]
    return teacher


def _train(
    teacher: Teacher,
    parameters: Sequence[nn.Parameter],
    steps: int,
    rate: float,
    seed: int,
    price: Callable[[], Tensor] = lambda: torch.zeros(()),
) -> None:
    """Adam on the loss of the distillation, with a linear descent."""
    model = teacher.task.model
    draw = torch.Generator().manual_seed(seed)
    with restoring_gradients(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
        for _ in range(steps):
            number = int(torch.randint(len(teacher.task.train), (), generator=draw))
            loss = teacher.loss(number, Distillation().hidden) + price()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
