"""Options of a method, for all tensors or by name: ``density=0.5``, ``attention:density=0.2``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shira_format.errors import SourceError
from shira_format.merging.methods import Method
from shira_format.names.filters import compiled

# Given like an option for some tensors: the weights of the adapters.
WEIGHTS = "weights"


class Settings:
    """A method with its options and the adapters' weights, for each tensor.

    Attributes:
        method: the method.
        layers: compiled patterns with the options of the tensors whose names they match.
    """

    def __init__(
        self,
        method: Method,
        weights: Sequence[float],
        options: Mapping[str, Any] | None = None,
        layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """Check everything.

        Args:
            method: the method.
            weights: one for each adapter.
            options: of the method, for all tensors; some may be a sequence with one for each adapter.
            layers: regexes with options (and ``"weights"``, a sequence) for tensors whose names they match (``re.search``);
                later ones override earlier ones.

        Raises:
            SourceError: an unknown option, an invalid value, or an invalid regex.
        """
        self.method, self._given, self._count = method, dict(options or {}), len(weights)
        self._weights = self._checked(weights)
        self.layers: list[tuple[re.Pattern[str], dict[str, Any]]] = []
        self._counted(method.settings(self._given))
        for pattern, some in layers:
            known = dict(some)
            if WEIGHTS in known:
                known[WEIGHTS] = self._checked(known[WEIGHTS])
            given = {key: value for key, value in known.items() if key != WEIGHTS}
            parsed = self._counted(method.settings(given))
            known |= {key: parsed[key] for key in given}
            self.layers.append((compiled(pattern), known))

    def of(self, name: str) -> tuple[list[float], dict[str, Any]]:
        """The adapters' weights and the method's options for one tensor."""
        weights, options = self._weights, dict(self._given)
        for pattern, some in self.layers:
            if pattern.search(name):
                options |= {key: value for key, value in some.items() if key != WEIGHTS}
                weights = some.get(WEIGHTS, weights)
        return weights, self.method.settings(options)

    def unused(self, names: Sequence[str]) -> list[str]:
        """The regexes that match none of these names."""
        return [p.pattern for p, _ in self.layers if not any(p.search(name) for name in names)]

    def to_manifest(self) -> dict[str, Any]:
        """Method, options and layers as JSON values."""
        found: dict[str, Any] = {"method": self.method.name, "options": _plain(self.method.settings(self._given))}
        if self.layers:
            found["layers"] = [{"pattern": pattern.pattern} | _plain(some) for pattern, some in self.layers]
        return found

    def _counted(self, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if isinstance(value, tuple) and len(value) != self._count:
                raise SourceError(f"{key}: {len(value)} values for {self._count} adapters")
        return options

    def _checked(self, weights: Any) -> list[float]:
        try:
            found = [float(weight) for weight in ([weights] if isinstance(weights, str) else weights)]
        except (TypeError, ValueError, OverflowError):
            raise SourceError(f"weights {weights!r} are not numbers") from None
        if len(found) != self._count:
            raise SourceError(f"{len(found)} weights for {self._count} adapters")
        if any(weight - weight != 0 for weight in found):
            raise SourceError(f"weights {found} are not all finite")
        if self.method.copies and any(weight not in (0.0, 1.0) for weight in found):
            raise SourceError(
                f"the method {self.method.name!r} copies entries unscaled: a weight must be 1, or 0 to leave an adapter out"
            )
        return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
