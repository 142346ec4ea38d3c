"""Options of PEFT that map the ends of modules' names, as regular expressions, to numbers: ``rank_pattern`` and its like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shira_format.errors import SourceError
from shira_format.names.patterns import (
    Pattern,
    PatternError,
    Steps,
    UnsupportedPattern,
    is_literal,
    matches_literally,
)

MOST_PATTERNS = 10_000  # of one option


class EndPatterns:
    """The patterns of one option, compiled.

    As PEFT's ``get_pattern_key``: the end of the name matches, after a dot or from its start. PEFT and diffusers sort the
    patterns when they save, so that the first hit in the file need not be that in training.

    Args:
        where: the file, for messages.
        option: its name.
        numbers: by pattern.
        after_dot: a pattern matches only what follows a dot, or a name that it equals, as in FourierFT.

    Raises:
        SourceError: a pattern is no regular expression, not supported, or there are too many.
    """

    def __init__(
        self, where: object, option: str, numbers: Mapping[str, float], *, after_dot: bool = False
    ) -> None:
        self._where, self._option, self._numbers, self._after_dot = where, option, numbers, after_dot
        self._is_sorted = list(numbers) == sorted(numbers)
        if len(numbers) > MOST_PATTERNS:
            raise SourceError(f"{where}: {option} has {len(numbers)} patterns; at most {MOST_PATTERNS} are read")
        self._steps = Steps()
        self._literal: dict[int, list[tuple[int, str]]] = {}  # by length, with their places in the file
        self._compiled: list[tuple[int, str, Pattern]] = []
        self._known: dict[str, dict[str, float]] = {}
        for place, text in enumerate(numbers):
            if is_literal(text):
                self._literal.setdefault(len(text), []).append((place, text))
                continue
            full = rf".*\.{text}$" if after_dot else rf"(.*\.)?({text})$"
            try:
                self._compiled.append((place, text, Pattern(full, self._steps)))
            except PatternError as error:
                raise self._refused(text, error) from None

    def number(self, module: str, default: float) -> float:
        """The number of the first pattern that matches the name of a module; ``default`` if none does.

        Raises:
            SourceError: several alphas match, in an order that tells nothing; or matching takes too long.
        """
        if module not in self._known:
            self._known[module] = {text: self._numbers[text] for _, text in sorted(self._hits(module))}
        hits = self._known[module]
        if self._option == "alpha_pattern" and len(set(hits.values())) > 1 and self._is_sorted:
            found = " and ".join(f"{pattern!r} ({value:g})" for pattern, value in hits.items())
            raise SourceError(
                f"{self._where}: {module!r} is matched by several patterns of {self._option}, {found}: the first one counted in "
                "training, and the file has them sorted; leave only the one that counted, or write the patterns so that one matches"
            )
        return next(iter(hits.values()), default)

    def _hits(self, module: str) -> Iterator[tuple[int, str]]:
        text = ""
        try:
            for end in _ends(module, whole=not self._after_dot):
                candidates = self._literal.get(len(end), ())
                self._steps.count(len(candidates))
                yield from ((place, text) for place, text in candidates if matches_literally(text, end))
            for place, text, pattern in self._compiled:
                if pattern.match(module):
                    yield place, text
            if self._after_dot and module in self._numbers:
                yield list(self._numbers).index(module), module
        except PatternError as error:
            raise self._refused(text, error) from None

    def _refused(self, text: str, error: PatternError) -> SourceError:
        more = "; write the names of modules instead" if isinstance(error, UnsupportedPattern) else ""
        return SourceError(f"{self._where}: {self._option} {text[:200]!r}: {error}{more}")


NO_PATTERNS = EndPatterns("", "", {})


def _ends(module: str, *, whole: bool) -> Iterator[str]:
    """What a pattern may match: the name if ``whole``, and what follows one of its dots; without a last line's end, as ``$`` allows."""
    for name in {module, module.removesuffix("\n")}:
        if whole:
            yield name
        at = name.find(".")
        while at >= 0:
            if "\n" not in name[:at]:
                yield name[at + 1 :]
            at = name.find(".", at + 1)
