"""An adapter, in memory or read lazily from a file: an ordered mapping of sparse tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from shira_format.tensors import DenseTensor, SparseTensor

_T = TypeVar("_T", SparseTensor, DenseTensor)
_V = TypeVar("_V")


class Adapter(Mapping[str, SparseTensor]):
    """An ordered mapping from tensor name to :class:`SparseTensor`, plus dense tensors and a manifest.

    An adapter loaded from a file reads a tensor at each access and keeps none.

    Attributes:
        dense: the tensors that are replaced whole, by name.
        manifest: the manifest as plain JSON values. In a new adapter, provenance only (``base_model``,
            ``source``, ``alpha``, ...): ``save`` adds what it derives from the tensors.

    Example:
        >>> adapter = Adapter([SparseTensor("w", (2, 3), [1, 4], np.float32([1, 2]), base=np.float32([0, 0]))])
        >>> adapter["w"].nnz
        2
    """

    def __init__(
        self,
        tensors: Mapping[str, SparseTensor] | Iterable[SparseTensor] = (),
        *,
        dense: Mapping[str, DenseTensor] | Iterable[DenseTensor] = (),
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self._tensors = tensors if isinstance(tensors, Mapping) else _by_name(tensors)
        self.dense: Mapping[str, DenseTensor] = dense if isinstance(dense, Mapping) else _by_name(dense)
        self.manifest: dict[str, Any] = dict(manifest or {})

    @property
    def alpha(self) -> float:
        """The strength at which the adapter should be applied."""
        return float(self.manifest.get("alpha", 1.0))

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of base tensors that a patch removes (spec, section 3.5)."""
        return tuple(self.manifest.get("removed", ()))

    def __getitem__(self, name: str) -> SparseTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading the tensor

    def __eq__(self, other: object) -> bool:
        """Equal content: the same tensors and strength; codecs, order and provenance may differ."""
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            self.alpha == other.alpha
            and set(self.removed) == set(other.removed)
            and self.keys() == other.keys()
            and self.dense.keys() == other.dense.keys()
            and all(self[name] == other[name] for name in self)
            and all(self.dense[name] == other.dense[name] for name in self.dense)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Adapter({len(self)} sparse tensors, {len(self.dense)} dense tensors)"


class LazyMapping(Mapping[str, _V]):
    """A mapping whose values are read or computed at each access, and not kept."""

    def __init__(self, names: Collection[str], read: Callable[[str], _V]) -> None:
        """Args: ``names``, in order, which may be a mapping; ``read`` gives the value of one."""
        self._names = names if isinstance(names, Mapping) else dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> _V:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _by_name(tensors: Iterable[_T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise ValueError(f"two tensors are named {tensor.name!r}")
        found[tensor.name] = tensor
    return found
