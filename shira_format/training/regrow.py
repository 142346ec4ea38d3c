"""Regrowth: entries that training hardly changed are dropped, and others of large gradients are grown (SpIEL, arXiv 2401.16405).

:mod:`shira_format.masks.spiel` says when, how many and which. Here they change, after an optimizer step, in whatever loop or
trainer the step is made: dropped entries get the base's bits back, grown ones start from the base's value, and the number of
entries of each weight stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from shira_format._core.arrays import Indices, as_array
from shira_format._core.dtypes import working_dtype
from shira_format.errors import SourceError
from shira_format.masks import spiel
from shira_format.training.candidates import Candidates
from shira_format.training.weight import SparseWeight

_live: WeakSet[Regrowth] = WeakSet()


class Regrowth:
    """Changes the entries of weights under training; made by :meth:`shira_format.training.sparse.SparseParameters.regrow`.

    Attributes:
        weights: by their names in the mask.
        schedule: when how many entries change.
        step: the optimizer steps so far.
        changed: how many entries have been replaced so far.
    """

    def __init__(self, weights: Mapping[str, SparseWeight], schedule: spiel.Schedule) -> None:
        """Raises SourceError: there are several processes."""
        _check_one_process()
        self.weights, self.schedule = weights, schedule
        self.step, self.changed = 0, 0
        self._first = {name: weight.indices for name, weight in weights.items()}
        self._prepare()
        _watch(self)

    def restart(self, steps: int) -> None:
        """Begin again for another number of steps, with the entries that training started with, at the base's values."""
        self.schedule = replace(self.schedule, steps=steps)
        for name, weight in self.weights.items():
            weight.place(self._first[name])
        self.step, self.changed = 0, 0
        self._stop_sums()
        self._prepare()

    def stop(self) -> None:
        """Change nothing more."""
        self._stop_sums()
        _live.discard(self)

    def after_step(self, optimizer: Any) -> None:
        """The optimizer has made a step."""
        self.step += 1
        if self.schedule.changes(self.step):
            _check_one_process()
            for weight in self.weights.values():
                self._change(weight, optimizer)
        self._prepare()

    def notes(self) -> dict[str, Any]:
        """For the manifest's ``mask``."""
        schedule = asdict(self.schedule)
        return {"rule": "spiel"} | {key: schedule[key] for key in ("every", "summed", "rate")}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the entries, for :meth:`set_state`."""
        sums = {
            name: {"indices": torch.from_numpy(found.indices), "sums": found.sums}
            for name, weight in self.weights.items()
            if (found := weight.candidates) is not None and found.indices is not None
        }
        return {"schedule": asdict(self.schedule), "step": self.step, "changed": self.changed, "candidates": sums}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken; another number of steps is taken as it is now.

        Raises:
            SourceError: it was another schedule.
        """
        before = spiel.Schedule(**state["schedule"])
        if replace(before, steps=self.schedule.steps) != self.schedule:
            raise SourceError(
                f"the run that goes on changes entries every {before.every} steps (gradients of {before.summed}, rate {before.rate:g}), and this "
                f"one every {self.schedule.every} (gradients of {self.schedule.summed}, rate {self.schedule.rate:g})"
            )
        self.step, self.changed = state["step"], state["changed"]
        self._stop_sums()
        self._prepare()
        for name, saved in state["candidates"].items():
            if (found := self.weights[name].candidates) is not None:
                found.indices, found.sums = saved["indices"].numpy(), saved["sums"].clone()

    def _prepare(self) -> None:
        """Before the next step: whether its gradients are summed."""
        if not self.schedule.sums(self.step + 1):
            self._stop_sums()
            return
        for weight in self.weights.values():
            if weight.candidates is None:
                weight.candidates = Candidates(weight.indices.size)

    def _stop_sums(self) -> None:
        for weight in self.weights.values():
            if weight.candidates is not None:
                weight.candidates.stop()
                weight.candidates = None

    def _change(self, weight: SparseWeight, optimizer: Any) -> None:
        """Replace entries of one weight, if gradients reached it, and what the optimizer holds for them."""
        found, count = weight.candidates, self.schedule.count(self.step, weight.indices.size)
        if found is None or found.indices is None or not count:
            return
        assert found.sums is not None
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SourceError(
                "LBFGS holds a history of all entries, which cannot be regrown: take another optimizer"
            )
        values = weight.parameter("values")
        states = _states_of_entries(optimizer, weight)
        wide = working_dtype(weight.base.dtype)
        deltas = as_array(values.detach()).astype(wide) - weight.base.astype(wide)
        if not np.isfinite(deltas).all():
            raise SourceError(
                f"{weight.path}: has values that are no finite numbers: choose a lower learning rate"
            )
        change = spiel.regrow(weight.indices, deltas, found.indices, as_array(found.sums), count)
        if not change.grown.size:
            return
        after, _ = spiel.regrown(weight.indices, deltas, change)
        was, now = _common(weight.indices, after, values.device)
        kept = values.detach()[was]
        weight.place(after)
        with torch.no_grad():
            values[now] = kept
            for state in (*states, *([] if values.grad is None else [values.grad])):
                entries = state[was]
                state.zero_()[now] = entries
        weight.write()
        self.changed += change.grown.size

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model is trained like the model."""
        self.__dict__.update(state)
        _watch(self)


def _common(before: Indices, after: Indices, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries that both have are in each."""
    _, was, now = np.intersect1d(before, after, assume_unique=True, return_indices=True)
    return torch.from_numpy(was).to(device), torch.from_numpy(now).to(device)


def _states_of_entries(optimizer: Any, weight: SparseWeight) -> list[Tensor]:
    """What an optimizer holds for each entry of a weight.

    Raises:
        SourceError: it holds something that is neither one number nor one for each entry.
    """
    values = weight.parameter("values")
    found = []
    for name, state in optimizer.state.get(values, {}).items():
        if isinstance(state, Tensor) and state.shape == values.shape:
            found.append(state)
        elif (isinstance(state, Tensor) and state.numel() != 1) or isinstance(state, list | tuple | dict):
            raise SourceError(
                f"the optimizer's {name} of {weight.path} is neither one number nor one for each entry: entries cannot be regrown with it"
            )
    return found


def _check_one_process() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if distributed else 1
    if size > 1:
        raise SourceError(
            f"regrowth chooses by the gradients of one process, and here are {size}: train without it, or in one process"
        )


_is_watching: list[Any] = []


def _watch(regrowth: Regrowth) -> None:
    """Call :meth:`Regrowth.after_step` after each step of the optimizer of its entries."""
    _live.add(regrowth)
    if not _is_watching:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        # After the hook of shira_format.training.weight, which writes the values into the weights, since that came first.
        _is_watching.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Any, *_: object) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for regrowth in list(_live):
        mine = [id(weight.parameter("values")) in stepped for weight in regrowth.weights.values()]
        if any(mine) and not all(mine):
            raise SourceError("regrowth needs one optimizer for all entries, and this one has a part of them")
        if all(mine):
            regrowth.after_step(optimizer)
