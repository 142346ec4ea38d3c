"""Training where only the entries of a mask are parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from shira_format._core.arrays import Array, as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.masks import spiel
from shira_format.tensors import DenseTensor, matrix_shape
from shira_format.training.dora import DoraWeight
from shira_format.training.layers import is_switched, switch_back, switch_class
from shira_format.training.masks import Mask, masked_weights, read_mask
from shira_format.training.pattern import MatrixPattern, Method
from shira_format.training.regrow import Regrowth
from shira_format.training.rounding import ROUNDINGS, Rounding
from shira_format.training.state import check_state, drop_state, load_resumable, load_states, write_state
from shira_format.training.trained import (
    TrainedEntries,
    Training,
    WholeParameter,
    freeze_others,
    whole_parameters,
)
from shira_format.training.weight import SparseWeight


@dataclass(frozen=True)
class Options:
    """How entries are trained.

    Attributes:
        dtype: of the values; None: that of each weight. float32 beside bf16 or fp16 weights keeps small updates that the
            weight cannot show yet.
        rounding: from the values to the weight: to nearest (ties to even), or ``"stochastic"``.
        seed: of stochastic rounding.
        method: how gradients are computed; ``"auto"`` chooses for each matrix by shape, density and dtype.
        dora: train directions and magnitudes (:mod:`shira_format.training.dora`).
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    method: Method = "auto"
    dora: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown rounding."""
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding {self.rounding!r} is none of {', '.join(ROUNDINGS)}")


class SparseParameters(Training):
    """A model of which the entries of a mask are parameters; made by :func:`sparse_parameters`.

    Attributes:
        weights: the weights under training, by their names in the mask.
        options: how they are trained.
        resumed: the optimizer's state from the file, after :func:`resume`.
        regrowth: what changes the entries during training (:mod:`shira_format.training.regrow`), if anything does.
    """

    resumed: Any = None
    regrowth: Regrowth | None = None

    def __init__(
        self, model: nn.Module, mask: Mask, options: Options, whole: Sequence[str], new: Sequence[str], prefix: str | None
    ) -> None:  # fmt: skip
        found = read_mask(mask)
        chosen = masked_weights(model, mask if not isinstance(mask, str | os.PathLike) else found, prefix=prefix)
        trained_whole = whole_parameters(model, {one.path: one.name for one in chosen}, whole, new)
        super().__init__(model, trained_whole, found.manifest if isinstance(found, Adapter) else {})
        self.options = options
        made = DoraWeight if options.dora else SparseWeight
        self.weights: dict[str, SparseWeight] = {}
        for one in chosen:
            pattern = MatrixPattern(matrix_shape(tuple(one.parameter.shape)), one.indices, options.method)
            self.weights[one.name] = made(
                one, pattern, dtype=options.dtype, rounding=options.rounding, seed=options.seed
            )
        for module in self._modules():
            switch_class(module)

    def _modules(self) -> list[nn.Module]:
        found = {id(module): module for weight in self.weights.values() for module, _ in weight.places}
        return list(found.values())

    def entries(self) -> Iterator[TrainedEntries]:
        """The entries of each weight."""
        for name, weight in self.weights.items():
            values = as_array(weight.rounded()).copy()
            yield TrainedEntries(name, weight.shape, weight.indices, values, weight.base)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names in the model and parameters for the optimizer: the values, and what is trained whole."""
        for weight in self.weights.values():
            yield from weight.trained()
        yield from self.whole_parameters()

    @property
    def nnz(self) -> int:
        """Trained entries of masked weights."""
        return sum(weight.indices.size for weight in self.weights.values())

    def _written(self) -> Iterable[SparseWeight]:
        return self.weights.values()

    def _holders(self) -> Iterator[tuple[str, nn.Module]]:
        for weight in self.weights.values():
            yield weight.path, weight.places[0][0]

    def regrow(self, steps: int, *, every: int = 100, summed: int = 5, rate: float = 0.2) -> Regrowth:
        """Drop and grow entries during the training (SpIEL, arXiv 2401.16405): they change after steps of the optimizer.

        After the first ``summed`` steps, and then every ``every`` more, the entries whose values have moved least are dropped, and
        as many others are grown where the gradients, summed over the ``summed`` steps before, are largest. The first time all entries
        may change, since none has moved far by then: the mask that training starts with hardly matters. Later ``rate`` of them may,
        which falls linearly to 0 over ``steps``. Each weight keeps its number of entries. Dropped ones have the base's bits
        again, and what the optimizer holds for grown ones (momentum, second moments) starts at 0.

        That is all that a loop or a trainer needs. Steps whose gradients are summed compute dense ones, of one weight at a time, and
        are not compiled; the others cost what they always do. :meth:`save_state` and :func:`resume` keep the schedule.

        Args:
            steps: of the optimizer, that the training will make.
            every: steps from one change to the next.
            summed: steps whose gradients are summed before a change.
            rate: the share of the entries that is replaced at first.

        Raises:
            ValueError: numbers that are no schedule.
            SourceError: entries are regrown already, there are several processes, or the training is SHiRA-DoRA.

        Example:
            >>> training = sparse_parameters(model, "mask.st")
            >>> training.regrow(steps=1000, every=100)
        """
        if self.regrowth is not None:
            raise SourceError("the entries of this training are regrown already")
        if self.options.dora:
            raise SourceError(
                "regrowth changes entries, and not the magnitudes of SHiRA-DoRA: leave one of them out"
            )
        self.regrowth = Regrowth(self.weights, spiel.Schedule(steps, every, summed, rate))
        start = self.mask.get("mask", {})
        if start.get("rule") != "spiel":  # it is, of a run that goes on
            start = {"start" if key == "rule" else key: value for key, value in start.items()}
        self.mask["mask"] = start | self.regrowth.notes()
        return self.regrowth

    def detach(self, *, restore: bool = False) -> None:
        """End the training: modules are what they were, and the weights keep their trained values.

        Args:
            restore: give the entries the base's values back instead.
        """
        self.show_base() if restore else self.show_trained()
        modules = self._modules()
        for weight in self.weights.values():
            weight.remove()
        for module in modules:
            if is_switched(module):
                switch_back(module)
        if self.regrowth is not None:
            self.regrowth.stop()
        self._forget()

    def state(self) -> dict[str, Any]:
        """The values as the optimizer sees them, and what rounding has drawn; for :func:`resume`."""
        return {
            "options": asdict(self.options) | {"dtype": str(self.options.dtype or "")},
            "weights": {name: weight.state() for name, weight in self.weights.items()},
            "regrowth": None if self.regrowth is None else self.regrowth.state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        for name, weight in self.weights.items():
            weight.set_state(state["weights"][name])
        if self.regrowth is not None:
            self.regrowth.set_state(state["regrowth"])

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write the adapter file, at any step; see :meth:`Training.save`. A state beside it, of what it replaces, is removed.

        Raises:
            SourceError: what has the name of that state is none; nothing is written.
        """
        check_state(path)
        super().save(path, **more)
        drop_state(path)

    def save_state(self, path: str | os.PathLike[str], optimizer: Any = None, **more: Any) -> None:
        """Save the adapter, and beside it (``PATH.state``) what :func:`resume` needs to go on exactly.

        Args:
            path: of the adapter.
            optimizer: anything with ``state_dict()``; several (a schedule, a scaler) as a mapping.
            more: see :meth:`save`.
        """
        self.save(path, **more)
        write_state(path, self.state(), optimizer)

    def restore_optimizer(self, optimizer: Any) -> None:
        """Give an optimizer, or several as a mapping, the state that they had in :meth:`save_state`.

        Raises:
            SourceError: none was saved, or of others.
        """
        load_states(optimizer, self.resumed)


def sparse_parameters(
    model: nn.Module,
    mask: Mask,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    method: Method = "auto",
    dora: bool = False,
    whole: Sequence[str] = (),
    new: Sequence[str] = (),
    freeze: bool = True,
    prefix: str | None = None,
) -> SparseParameters:
    """Make the entries of ``mask`` the parameters of ``model``, in place.

    The entries live in the weights: nothing is cloned, forward passes are the model's own, and no dense gradient is kept.
    Each masked ``weight`` gets a parameter ``weight_values`` beside it, ``[K]``, which is what an optimizer and a
    checkpoint see. A weight decay pulls these values towards zero, as in full fine-tuning.

    Args:
        model: any module; its masked weights are frozen parameters afterwards.
        mask: a mask file or any adapter (its indices), or a mapping from name to flat indices or booleans.
        dtype: see :class:`Options`, as ``rounding``, ``seed``, ``method`` and ``dora``.
        rounding: see there.
        seed: see there.
        method: see there.
        dora: see there.
        whole: regexes; parameters that are trained whole, such as biases.
        new: regexes; parameters that are trained whole and that the base lacks, such as a new head.
        freeze: train nothing else.
        prefix: what the names in the model start with, if the mask's names fit in several ways.

    Raises:
        SourceError: the mask does not fit the model, or the model is under training already.
        BaseMismatch: a weight of another shape or of a dtype that cannot be trained.

    Example:
        >>> training = sparse_parameters(model, "mask.st", dtype=torch.float32)
        >>> optimizer = torch.optim.AdamW(training.parameters(), lr=5e-4)
        >>> ...  # any loop, any trainer
        >>> training.save("adapter.st")
    """
    options = Options(dtype, rounding, seed, method, dora)
    made = SparseParameters(model, mask, options, whole, new, prefix)
    for _, parameter in made.whole_parameters():
        parameter.requires_grad_(True)
    if freeze:
        freeze_others(model, made.parameters())
    return made


def resume(
    model: nn.Module, adapter: str | os.PathLike[str], *, freeze: bool = True, prefix: str | None = None
) -> SparseParameters:
    """Go on with an adapter: exactly where :meth:`SparseParameters.save_state` left off, if ``PATH.state`` is there.

    Without that file the entries start at the adapter's values, in the weights' dtype, with the default options.
    ``restore_optimizer`` of the result gives an optimizer its state back.

    Args:
        model: the base, as it was before the training.
        adapter: its file.
        freeze: see :func:`sparse_parameters`.
        prefix: see there.

    Raises:
        BaseMismatch: the model is not the base of the adapter.
        SourceError: the adapter does not fit the model, or the state is not of this adapter.
    """
    found, state = load_resumable(adapter)
    _check_resumable(adapter, found)
    dense = found.dense
    new = [name for name in dense if dense[name].base_digest is None]
    options = {} if state is None else state["options"]
    if options:
        name = str(options["dtype"]).removeprefix("torch.")
        options = options | {"dtype": getattr(torch, name) if name else None}
    training = sparse_parameters(
        model, found, whole=_exactly(set(dense) - set(new)), new=_exactly(new), freeze=freeze, prefix=prefix, **options
    )  # fmt: skip
    try:
        if state is not None and (regrowth := state.get("regrowth")) is not None:
            training.regrow(**regrowth["schedule"])
        take_adapter(training, found, state)
    except BaseException:
        training.detach(restore=True)
        raise
    return training


def take_adapter(training: SparseParameters, adapter: Adapter, state: Mapping[str, Any] | None) -> None:
    """Go on from an adapter of the same mask.

    Args:
        training: the model under training.
        adapter: as :meth:`SparseParameters.save` wrote it.
        state: its state, or None.

    Raises:
        BaseMismatch: it is of another base.
        SourceError: it is of another mask.
    """
    for name, weight in training.weights.items():
        found = adapter[name].indices if name in adapter else np.empty(0, np.int64)
        if not np.array_equal(found, weight.indices) and (
            training.regrowth is None or len(found) != len(weight.indices)
        ):
            raise SourceError(f"the adapter has other entries of {name!r} than the mask")
    if state is not None and (state.get("regrowth") is None) != (training.regrowth is None):
        before, now = ("regrown", "fixed") if training.regrowth is None else ("fixed", "regrown")
        raise SourceError(f"entries were {before} in the run that goes on, and are {now} in this one")
    wanted = {one.name for one in training.whole}
    if extra := [*(adapter.keys() - training.weights.keys()), *(adapter.dense.keys() ^ wanted)]:
        raise SourceError(f"{extra[0]!r} is not trained in both, the adapter and the model")
    with training.base():
        for name, weight in training.weights.items():
            adapter[name].checked_base(weight.weight)
        for one in training.whole:
            _check_whole(one, adapter.dense[one.name], training.model.get_parameter(one.path))
    for one in training.whole:
        parameter = training.model.get_parameter(one.path)
        with torch.no_grad():
            parameter.copy_(_tensor_of(adapter.dense[one.name].values, parameter))
    for name, weight in training.weights.items():
        if not np.array_equal(adapter[name].indices, weight.indices):
            weight.place(adapter[name].indices)
        weight.set_values(_tensor_of(adapter[name].applied(weight.base), weight.weight))
    if state is not None:
        training.set_state(state)
        training.resumed = state["optimizer"]


def _check_resumable(path: str | os.PathLike[str], adapter: Adapter) -> None:
    for name in adapter:
        if adapter[name].value_kind == "none":
            raise SourceError(
                f"{path}: tensor {name!r} is a mask, without values to go on with: use sparse_parameters"
            )
    if adapter.alpha != 1:
        raise SourceError(f"{path}: has strength {adapter.alpha:g}; only one of strength 1 can be trained on")


def _exactly(names: Iterable[str]) -> list[str]:
    """Regexes that find these names alone, with any prefix."""
    return [rf"(^|\.){re.escape(name)}$" for name in sorted(names)]


def _check_whole(one: WholeParameter, saved: DenseTensor, parameter: torch.Tensor) -> None:
    if tuple(parameter.shape) != saved.values.shape:
        raise BaseMismatch(f"tensor {one.name!r}: shape {list(saved.values.shape)} for {list(parameter.shape)}")
    if saved.base_digest != one.base_digest:
        raise BaseMismatch(
            f"tensor {one.name!r}: the model had other values before it was trained than the adapter's base"
        )


def _tensor_of(values: Array, like: torch.Tensor) -> torch.Tensor:
    """An array of ``like``'s dtype as a tensor on its device."""
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(values.copy()).to(like.device)
