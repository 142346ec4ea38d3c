"""Which entries a fit may change: rules that score all weights, and the largest scores of all tensors together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shira_format._core.arrays import Array, as_array
from shira_format.convert.fit.task import Task, showing_base
from shira_format.errors import SourceError
from shira_format.masks.gradients import Loss, sum_gradients
from shira_format.masks.weights import Weight

Rule = Literal["product", "gradient", "fisher", "magnitude", "wm", "random"]
RULES: tuple[Rule, ...] = ("product", "gradient", "fisher", "magnitude", "wm", "random")


def gradients_of(task: Task, batches: Sequence[Any], loss: Loss, *, squares: bool = False) -> dict[str, Tensor]:
    """``[numel]`` float32 for each weight: the sum over batches of the gradients of a loss, or of their squares.

    The model is taken as it is now. Weights that the loss does not reach have zeros.
    """
    weights = [_weight(task, name) for name in task.source]
    with sum_gradients(task.model, weights, batches, loss, squares=squares) as found:
        missing = set(found.unreached)
        return {
            name: torch.zeros(task.parameter(name).numel())
            if name in missing
            else torch.from_numpy(np.array(found(name)(0, task.parameter(name).numel())))
            for name in task.source
        }


def _weight(task: Task, name: str) -> Weight:
    parameter = task.parameter(name)
    flat = parameter.detach().reshape(-1)
    return Weight(
        name,
        tuple(parameter.shape),
        as_array(flat[:0]).dtype,
        lambda a, b: as_array(flat[a:b]),
        parameter=parameter,
    )


def scores(task: Task, rule: Rule, batches: Sequence[Any], loss: Loss, seed: int) -> dict[str, Tensor]:
    """``[numel]`` float32 for each weight of the base; the larger, the more a change of the entry is expected to gain.

    ``product`` is ``|g u|`` with the gradient ``g`` of the loss at the base and the source's update ``u``: how much the loss falls
    with that entry's update, to first order. ``gradient`` is ``|g|``, ``fisher`` ``sum g^2`` over batches, ``magnitude`` ``|u|``,
    ``wm`` the base's ``|w|``, and ``random`` drawn by the seed.

    Raises:
        ValueError: no rule has the name.
    """
    if rule not in RULES:
        raise ValueError(f"no rule is named {rule!r}; the rules are {', '.join(RULES)}")
    if rule == "random":
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.rand(task.parameter(name).numel(), generator=draw) for name in task.source}
    if rule == "wm":
        return {name: task.parameter(name).detach().float().abs().cpu().reshape(-1) for name in task.source}
    if rule == "magnitude":
        return {name: update_of(task, name).abs_() for name in task.source}
    with showing_base(task):
        found = gradients_of(task, batches, loss, squares=rule == "fisher")
    if rule == "product":
        for name, gradient in found.items():
            gradient.mul_(update_of(task, name))
    return {name: one.abs_() for name, one in found.items()}


def update_of(task: Task, name: str) -> Tensor:
    """``[numel]`` float32, on the CPU: source minus what the weight is now."""
    source, weight = task.source[name].cpu(), task.parameter(name).detach().cpu()
    wide = torch.promote_types(torch.float32, torch.promote_types(source.dtype, weight.dtype))
    return (source.to(wide) - weight.to(wide)).float().reshape(-1)


def largest(found: Mapping[str, Tensor], budget: int, *, run: int = 1) -> dict[str, Tensor]:
    """The entries with the largest scores of all tensors together, exactly ``budget``: int64 flat indices, strictly increasing.

    Of equal scores those of earlier tensors and lower indices are taken. With ``run``, aligned runs of so many entries are taken
    whole, by the sums of their scores; the last run is cut where the budget ends.

    Raises:
        SourceError: there are fewer entries than that.
    """
    names = list(found)
    sizes = [found[name].numel() for name in names]
    if not 1 <= budget <= sum(sizes):
        raise SourceError(f"a budget of {budget} entries; the weights have {sum(sizes)}")
    grouped = [_runs(found[name], run) for name in names]
    flat = torch.cat(grouped).numpy()
    first = np.cumsum([0, *(len(one) for one in grouped)])
    # The last run of a tensor may be short, which is why a few more are ranked than whole ones would need.
    ranked = _ranked(flat, -(-budget // run) + (len(names) if run > 1 else 0))
    tensor = np.searchsorted(first, ranked, side="right") - 1
    start = (ranked - first[tensor]) * run
    size = np.minimum(run, np.array(sizes)[tensor] - start)
    size = size[: int(np.searchsorted(size.cumsum(), budget)) + 1]
    size[-1] -= size.sum() - budget
    result: dict[str, Tensor] = {}
    for number in range(len(names)):
        here = tensor[: len(size)] == number
        starts, counts = start[: len(size)][here], size[here]
        inside = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        if counts.size:
            result[names[number]] = torch.from_numpy(np.sort(np.repeat(starts, counts) + inside))
    return result


def _runs(scores: Tensor, run: int) -> Tensor:
    if run == 1:
        return scores
    return torch.nn.functional.pad(scores, (0, -scores.numel() % run)).view(-1, run).sum(1)


def _ranked(flat: Array, count: int) -> Array:
    """The places of the ``count`` largest, the largest first; of equal ones the first first."""
    count = min(count, flat.size)
    edge = np.partition(flat, flat.size - count)[flat.size - count]
    sure = np.flatnonzero(flat > edge)
    sure = sure[np.argsort(-flat[sure], kind="stable")]
    return np.concatenate([sure, np.flatnonzero(flat == edge)[: count - sure.size]])
