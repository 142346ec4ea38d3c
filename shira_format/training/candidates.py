"""Gradients of entries that are not trained, summed where they are largest: what regrowth chooses from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira_format._core.arrays import Indices, as_array
from shira_format.selection.topk import largest


class Candidates:
    """The entries of the largest gradients in one backward pass, and the sums of their gradients over this one and later ones.

    No more than one weight's dense gradient is held at a time, and that until its backward pass is complete.

    Attributes:
        count: how many candidates there are; the authors of SpIEL take as many as there are trained entries.
        indices: flat, int64 ``[count]``, strictly increasing; None before the first pass.
        sums: float32 ``[count]``, on the CPU, of the loss as it is scaled and averaged for the backward pass.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.indices: Indices | None = None
        self.sums: Tensor | None = None
        self._pass: Tensor | None = None
        self._listening: Any = None

    def listen(self, values: nn.Parameter) -> None:
        """Take a backward pass for complete when the gradient of ``values`` is."""
        if self._listening is None and values.requires_grad:
            self._listening = values.register_post_accumulate_grad_hook(lambda _: self.close())  # type: ignore[no-untyped-call]

    def add(self, gradient: Tensor) -> None:
        """One use of the weight in this pass: its dense gradient, of as many elements as the weight has."""
        flat = gradient.detach().reshape(-1).to(torch.float32)
        self._pass = flat if self._pass is None else self._pass + flat

    def close(self) -> None:
        """The pass is complete. One with a gradient that is no number counts as none, as a loss scaler skips its step."""
        found, self._pass = self._pass, None
        if found is None or not bool(torch.isfinite(found).all()):
            return
        if self.indices is None:
            self.indices = np.flatnonzero(largest(as_array(found.abs()), self.count))
            self.sums = found[self._on(found)].cpu()
        else:
            assert self.sums is not None
            self.sums += found[self._on(found)].cpu()

    def stop(self) -> None:
        """Take no more passes."""
        if self._listening is not None:
            self._listening.remove()
        self._listening = self._pass = None

    def _on(self, like: Tensor) -> Tensor:
        assert self.indices is not None
        return torch.from_numpy(self.indices).to(like.device)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model listens to its own values."""
        return self.__dict__ | {"_listening": None, "_pass": None}
