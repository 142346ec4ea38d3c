"""Options of a method for all layers, and other ones for some: ``density=0.5``, ``attention:density=0.2``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shira_format.errors import SourceError
from shira_format.merge.methods import Method

# Given beside the options: the weights of the adapters, which may differ by layer as well.
WEIGHTS = "weights"


class Settings:
    """What a method is told for each tensor.

    Attributes:
        method: the method.
    """

    def __init__(
        self,
        method: Method,
        weights: Sequence[float],
        options: Mapping[str, Any] | None = None,
        layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """Check all of it.

        Args:
            method: the method.
            weights: one for each adapter.
            options: of the method, for all tensors; some may be a sequence, of one for each adapter.
            layers: regexes with options (and ``"weights"``, a sequence) for tensors in whose name they are found; later
                ones are stronger.

        Raises:
            SourceError: an option or a value that the method does not know, or a regex that is none.
        """
        self.method, self._given, self._count = method, dict(options or {}), len(weights)
        self._weights = self._checked(weights)
        self._layers: list[tuple[re.Pattern[str], dict[str, Any]]] = []
        self._counted(method.settings(self._given))
        for pattern, some in layers:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise SourceError(f"not a regular expression: {pattern!r}: {error}") from None
            known = dict(some)
            if WEIGHTS in known:
                known[WEIGHTS] = self._checked(known[WEIGHTS])
            given = {key: value for key, value in known.items() if key != WEIGHTS}
            parsed = self._counted(method.settings(given))
            known |= {key: parsed[key] for key in given}
            self._layers.append((compiled, known))

    def of(self, name: str) -> tuple[list[float], dict[str, Any]]:
        """The adapters' weights and the method's options for one tensor."""
        weights, options = self._weights, dict(self._given)
        for pattern, some in self._layers:
            if pattern.search(name):
                options |= {key: value for key, value in some.items() if key != WEIGHTS}
                weights = some.get(WEIGHTS, weights)
        return weights, self.method.settings(options)

    def unused(self, names: Sequence[str]) -> list[str]:
        """Regexes that are found in none of these names."""
        return [p.pattern for p, _ in self._layers if not any(p.search(name) for name in names)]

    def told(self) -> dict[str, Any]:
        """All of it as JSON values, for the manifest."""
        found: dict[str, Any] = {"method": self.method.name, "options": _plain(self.method.settings(self._given))}
        if self._layers:
            found["layers"] = [{"pattern": pattern.pattern} | _plain(some) for pattern, some in self._layers]
        return found

    def _counted(self, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if isinstance(value, tuple) and len(value) != self._count:
                raise SourceError(f"{key}: {len(value)} values for {self._count} adapters")
        return options

    def _checked(self, weights: Any) -> list[float]:
        try:
            found = [float(weight) for weight in ([weights] if isinstance(weights, str) else weights)]
        except (TypeError, ValueError):
            raise SourceError(f"weights {weights!r} are not numbers") from None
        if len(found) != self._count:
            raise SourceError(f"{len(found)} weights for {self._count} adapters")
        if any(weight - weight != 0 for weight in found):
            raise SourceError(f"weights {found} are not all finite")
        if self.method.takes and any(weight not in (0.0, 1.0) for weight in found):
            raise SourceError(
                f"the method {self.method.name!r} takes entries as they are: its weights are 1, or 0 to leave an adapter out"
            )
        return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
