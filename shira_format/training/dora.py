"""SHiRA-DoRA: direction and magnitude of a weight, masked (*Sparse High Rank Adapters*, section 5; DoRA: arXiv 2402.09353).

DoRA writes a weight as ``m_i V_i / |V_i|`` with one magnitude and one direction for each output ``i``. Here the direction is the
base with trained entries, ``V = W + S``, and of the result only the entries of the mask are taken: ``W + M (m V / |V| - W)``.
Since ``|V_i|^2 = |W_i|^2 - sum w^2 + sum v^2`` over the entries of the row, all of it is arithmetic of the entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shira_format.training.weight import SparseWeight


class DoraWeight(SparseWeight):
    """Entries ``m_i v / |V_i|``, with the entries of the direction ``v`` and the magnitudes ``m`` as parameters.

    As in DoRA, no gradient goes through the norm (section 4.3 there). Outputs are rows, except in transformers' ``Conv1D``.
    """

    _outputs_last = False

    def initial(self, now: Tensor) -> dict[str, Tensor]:
        """``{"values": [K], "magnitudes": [outputs that have entries]}``; the weight stays what it is."""
        weight = self.weight.detach()
        if weight.ndim < 2:
            raise ValueError(f"{self.path}: a weight of one dimension has no directions")
        self._outputs_last = type(self.places[0][0]).__name__ in ("Conv1D", "SparseConv1D")
        which = self.pattern.column if self._outputs_last else self.pattern.row
        self._outputs, self._of = np.unique(which, return_inverse=True)
        squares = self._squares(weight)
        # What the frozen entries of each output add to the square of the norm.
        self._frozen = (squares - self._trained(now)).clamp_(min=0)
        return {"values": now.clone(), "magnitudes": self._lengths(now)}

    def values(self) -> Tensor:
        """``[K]``: the entries of the masked result."""
        direction, magnitude = self.parameter("values"), self.parameter("magnitudes")
        lengths = self._lengths(direction.detach())
        scale = (magnitude / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).index_select(
            0, self._which(direction)
        )
        return (direction.to(scale.dtype) * scale).to(direction.dtype)

    def set_values(self, values: Tensor) -> None:
        """Take over entries that were trained before: as direction, with magnitudes that leave them as they are."""
        with torch.no_grad():
            self.parameter("values").copy_(values)
            self.parameter("magnitudes").copy_(self._lengths(self.parameter("values")))
        self.write()

    def _lengths(self, direction: Tensor) -> Tensor:
        """``[outputs]``: the norms of the outputs that have entries."""
        return (self._frozen.to(direction.device) + self._trained(direction)).sqrt()

    def _trained(self, direction: Tensor) -> Tensor:
        """``[outputs]`` in float32 or wider: what the entries add to the squares of these norms."""
        wide = direction.to(torch.promote_types(direction.dtype, torch.float32)).square()
        zeros = torch.zeros(len(self._outputs), dtype=wide.dtype, device=wide.device)
        return zeros.index_add_(0, self._which(direction), wide)

    def _which(self, direction: Tensor) -> Tensor:
        return torch.from_numpy(self._of).to(direction.device)

    def _squares(self, weight: Tensor) -> Tensor:
        """``[outputs]`` in float32 or wider: the sum of squares of each output that has entries."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.reshape(self.pattern.shape)
        dim = 0 if self._outputs_last else 1
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim, dtype=wide)
        return norms.square().index_select(0, torch.from_numpy(self._outputs).to(weight.device))
