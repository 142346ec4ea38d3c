"""The trained entries of one weight: a small parameter whose values live in the weight itself.

After each optimizer step the values are written into the weight, rounded to its dtype. That happens in a hook on all of
torch's optimizers, and before a forward pass if values were changed by other means (a state that was loaded, say).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from shira_format._core.arrays import Array, Indices, as_array
from shira_format.errors import SourceError
from shira_format.live.weights import check_memory, live_weight
from shira_format.training.candidates import Candidates
from shira_format.training.masks import MaskedWeight, check_stays
from shira_format.training.pattern import MatrixPattern
from shira_format.training.rounding import Rounding, generator, rounded

# What a module holds for its weights under training, by attribute.
HELD = "_shira_weights"

_live: WeakSet[SparseWeight] = WeakSet()


class SparseWeight:
    """The entries of one weight under training.

    Attributes:
        name: of the weight in mask and file.
        path: of the weight in the model.
        places: modules and attributes that hold it.
        shape: of the weight.
        pattern: the entries, of the weight's matrix view or, for one of more dimensions, of its rows against all else.
        base: ``[K]``, what the entries were, in the weight's dtype, on the CPU.
        updates: how often the values were written after a change.
        candidates: while gradients are summed for regrowth: what takes them.
    """

    candidates: Candidates | None = None

    def __init__(
        self, of: MaskedWeight, pattern: MatrixPattern, *, dtype: torch.dtype | None, rounding: Rounding, seed: int
    ) -> None:
        """Take the entries from the weight; ``dtype`` is that of the values, by default the weight's."""
        self.name, self.path, self.places, self.shape = of.name, of.path, of.places, of.shape
        self.pattern = pattern
        self.rounding, self.seed, self.updates = rounding, seed, 0
        weight = self.weight
        weight.requires_grad_(False)
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()
        now = self.read()
        if weight.ndim == 2:
            pattern.on(weight.device)  # now, since torch.compile cannot trace it later
        self.base: Array = as_array(now).copy()
        module, attribute = self.places[0]
        self.parameters: dict[str, str] = {}
        for part, start in self.initial(now.to(dtype or weight.dtype)).items():
            self.parameters[part] = f"{attribute}_{part}"
            module.register_parameter(self.parameters[part], nn.Parameter(start))
        for holder, where in self.places:
            holder.__dict__.setdefault(HELD, {})[where] = self
        self._written, self._into = self._values_now(), self._weight_now()
        _live.add(self)
        _watch_optimizers()

    def initial(self, now: Tensor) -> dict[str, Tensor]:
        """What is trained, by the last word of its name, for entries that are ``now``."""
        return {"values": now.clone()}

    def values(self) -> Tensor:
        """``[K]``: what the entries become, before rounding; with its graph."""
        return self.parameter("values")

    @property
    def indices(self) -> Indices:
        """``[K]``, flat."""
        return self.pattern.indices

    @property
    def weight(self) -> nn.Parameter:
        """The weight, frozen for autograd.

        Raises:
            BaseMismatch: it was resized.
        """
        module, attribute = self.places[0]
        found = module._parameters[attribute]  # noqa: SLF001 - the attribute is a property
        assert found is not None
        check_stays(self.path, self.shape, found)
        return found

    def parameter(self, part: str) -> nn.Parameter:
        """What is trained, by the last word of its name."""
        found = self.places[0][0]._parameters[self.parameters[part]]  # noqa: SLF001
        assert found is not None
        return found

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names of the parameters in the model, and these."""
        path = self.path.rpartition(".")[0]
        for part, name in self.parameters.items():
            yield (f"{path}.{name}" if path else name), self.parameter(part)

    def _here(self) -> Tensor:
        """The weight to read or write; BaseMismatch if its memory was released. The values have memory of their own."""
        weight = self.weight.detach()
        check_memory(self.path, weight)
        return weight

    def read(self) -> Tensor:
        """The entries in the weight, ``[K]``."""
        weight = self._here()
        return weight.view(-1).index_select(0, self.pattern.index_on(weight.device))

    def write(self) -> None:
        """Write the values into the weight."""
        if (values := self._values_now()) != self._written:
            self.updates, self._written = self.updates + 1, values
        weight = self._here()
        with torch.no_grad():
            weight.view(-1).index_copy_(0, self.pattern.index_on(weight.device), self.rounded())
        self._into = self._weight_now()

    def rounded(self) -> Tensor:
        """``[K]``: the values as the weight has them, in its dtype."""
        weight, draw = self.weight, None
        if self.rounding == "stochastic":
            draw = generator(self.seed, self.name, self.updates, weight.device)
        with torch.no_grad():
            return rounded(self.values().detach(), weight.dtype, draw)

    def write_if_changed(self) -> None:
        """Write the values into the weight, unless it has them; what else was written at the entries is overwritten."""
        if (self._values_now(), self._weight_now()) != (self._written, self._into):
            self.write()

    def write_base(self) -> None:
        """Write what was there before; forward passes see it until :meth:`write`."""
        weight = self.weight.detach()
        live_weight(self.path, weight).put(self.indices, self.base)
        self._into = self._weight_now()

    def place(self, indices: Indices) -> None:
        """Train other entries, as many as before, from the base's values; the old ones get the base's bits back."""
        if len(indices) != len(self.indices):
            raise ValueError(f"{self.path}: {len(indices)} entries in the place of {len(self.indices)}")
        self.write_base()
        self.pattern = MatrixPattern(self.pattern.shape, indices, self.pattern.method)
        if self.weight.ndim == 2:
            self.pattern.on(self.weight.device)
        now = self.read()
        self.base = as_array(now).copy()
        with torch.no_grad():
            self.parameter("values").copy_(now)
        self._written, self._into = self._values_now(), self._weight_now()

    def set_values(self, values: Tensor) -> None:
        """Take over entries that were trained before, ``[K]``."""
        with torch.no_grad():
            self.parameter("values").copy_(values)
        self.write()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beyond the weight's dtype."""
        parts = {part: self.parameter(part).detach().clone() for part in self.parameters}
        return {"parts": parts, "updates": self.updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            SourceError: it is that of another weight.
        """
        parts = state["parts"]
        for part in self.parameters:
            if parts[part].shape != self.parameter(part).shape:  # a copy would repeat them
                raise SourceError(
                    f"the state has {list(parts[part].shape)} {part} for {list(self.parameter(part).shape)} of {self.path}"
                )
        with torch.no_grad():
            for part in self.parameters:
                self.parameter(part).copy_(parts[part])
        self.write()
        self.updates = state["updates"]
        self.write()

    def remove(self) -> None:
        """Drop the parameters; the weight stays as it is."""
        for name in self.parameters.values():
            del self.places[0][0]._parameters[name]  # noqa: SLF001
        for holder, where in self.places:
            held = holder.__dict__[HELD]
            del held[where]
            if not held:
                del holder.__dict__[HELD]
        _live.discard(self)

    def _values_now(self) -> tuple[int, ...]:
        return tuple(self.parameter(part)._version for part in self.parameters)  # noqa: SLF001 - torch's own counter

    def _weight_now(self) -> tuple[int, int]:
        return id(self.weight), self.weight._version  # noqa: SLF001

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model is trained like the model."""
        self.__dict__.update(state)
        _live.add(self)
        _watch_optimizers()


def held_by(module: nn.Module) -> dict[str, SparseWeight]:
    """The weights under training in one module, by attribute."""
    found: dict[str, SparseWeight] = module.__dict__.get(HELD, {})
    return found


def refresh(weight: SparseWeight) -> None:
    """Before a forward pass: write values that changed; compiled code relies on the hook on optimizers alone."""
    if not torch.compiler.is_compiling():
        weight.write_if_changed()


_is_watching: list[Any] = []


def _watch_optimizers() -> None:
    """Write the values after each step of any optimizer of torch."""
    if not _is_watching:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        _is_watching.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Any, *_: object) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for weight in list(_live):
        if any(id(parameter) in stepped for _, parameter in weight.trained()):
            weight.write()
