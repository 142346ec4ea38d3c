r"""Regular expressions from strangers' files, matched against names in time that is proportional to their sizes.

``re`` backtracks: ``([a-z]+)+!`` takes twice as long for each more letter of a name. Here all ways to match are followed at
once (Thompson's construction, https://swtch.com/~rsc/regexp/regexp1.html), and the states that come after one are kept, so
that names with the same beginning cost little. Matched is exactly what ``re`` matches; what would need backtracking
(backreferences), and what names do not need (lookbehind, flags), is refused.

Understood are characters, ``.``, ``[...]``, ``\d \D \s \S \w \W``, groups, ``|``, ``* + ? {m,n}`` and their lazy forms, ``^ $ \A
\Z \b``, and lookahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MOST_CHARACTERS = 100_000  # of a pattern
_MOST_STATES = 200_000
_MOST_DEPTH = 60  # of groups
_MOST_STEPS = 2_000_000  # some seconds

Accepts = Callable[[str], bool]


class PatternError(ValueError):
    """Not a regular expression, or one that is not supported or takes too long."""


class UnsupportedPattern(PatternError):
    """It may be a regular expression, but is not one that is matched here."""


@dataclass(slots=True)
class _State:
    """A state of the machine: one of the kinds below.

    Attributes:
        accepts: reads a character, and goes to ``next``.
        other: a second state that is reached without reading.
        holds: goes to ``next`` where this is true of text and position.
        ahead: a machine that must match here, or, if ``negated``, must not.
    """

    next: int = -1
    accepts: Accepts | None = None
    other: int = -1
    holds: Callable[[str, int], bool] | None = None
    ahead: int = -1
    negated: bool = False


class Steps:
    """How much work the patterns of one option may still take together."""

    def __init__(self) -> None:
        self._left = _MOST_STEPS

    def count(self, steps: int) -> None:
        """Raises UnsupportedPattern if no more is left."""
        self._left -= steps
        if self._left < 0:
            raise UnsupportedPattern("it takes too long to match")


_END = 0  # the number of the state that is reached at the end of a match


class Pattern:
    """A compiled pattern; it shares ``steps`` with others.

    Raises:
        PatternError: it is not a regular expression, not supported, or too long.
    """

    def __init__(self, text: str, steps: Steps | None = None) -> None:
        self._count = (steps or Steps()).count
        parser = _Parser(text, self._count)
        self._start = parser.parse()
        self._states = parser.states
        self._has_ahead = any(state.ahead >= 0 for state in self._states)
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def match(self, name: str) -> bool:
        """Whether the beginning of ``name`` matches, as with ``re.match``; errors as for :meth:`fullmatch`."""
        return self._run(self._start, name, 0, whole=False)

    def fullmatch(self, name: str) -> bool:
        """Whether all of ``name`` matches, as with ``re.fullmatch``.

        Raises:
            UnsupportedPattern: all matches together take too long.
        """
        return self._run(self._start, name, 0, whole=True)

    def _run(self, start: int, text: str, at: int, *, whole: bool) -> bool:
        now = self._first(start, text, at)
        while now:
            if _END in now and (not whole or at == len(text)):
                return True
            if at == len(text):
                return False
            now, at = self._after(now, text, at), at + 1
        return False

    def _first(self, start: int, text: str, at: int) -> frozenset[int]:
        first = frozenset([start])
        if self._has_ahead or at:
            return self._closed(first, text, at)
        key = first, "^" + text[:2]
        if key not in self._known:
            self._known[key] = self._closed(first, text, 0)
        return self._known[key]

    def _after(self, states: frozenset[int], text: str, at: int) -> frozenset[int]:
        """The states after reading one character. What follows it decides on ``$`` and a boundary; lookahead may read on."""
        self._count(1)
        key = states, text[at : at + 3]
        found = None if self._has_ahead else self._known.get(key)
        if found is None:
            char = text[at]
            self._count(len(states))
            reached = frozenset(
                self._states[n].next
                for n in states
                if (accepts := self._states[n].accepts) is not None and accepts(char)
            )
            found = self._closed(reached, text, at + 1)
            if not self._has_ahead:
                self._known[key] = found
        return found

    def _closed(self, states: frozenset[int], text: str, at: int) -> frozenset[int]:
        """These states, and those that are reached from them without reading."""
        found, left = set(states), list(states)
        while left:
            self._count(1)
            state = self._states[left.pop()]
            if state.accepts is not None:
                continue
            if state.holds is not None and not state.holds(text, at):
                continue
            if state.ahead >= 0 and self._run(state.ahead, text, at, whole=False) == state.negated:
                continue
            for reached in (state.next, state.other):
                if reached >= 0 and reached not in found:
                    found.add(reached)
                    left.append(reached)
        return frozenset(found)


def is_literal(text: str) -> bool:
    """Whether a pattern has no special character but the dot, as names of modules."""
    return not any(char in "\\^$*+?{}[]()|" for char in text)


def matches_literally(literal: str, text: str) -> bool:
    """Whether all of ``text`` matches a pattern that :func:`is_literal`, in which a dot is any character but a line's end."""
    return len(literal) == len(text) and all(
        a == b or (a == "." and b != "\n") for a, b in zip(literal, text, strict=True)
    )


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _at_end(text: str, at: int) -> bool:
    return at == len(text) or (at == len(text) - 1 and text[at] == "\n")


def _at_boundary(text: str, at: int) -> bool:
    before, after = at > 0 and _is_word(text[at - 1]), at < len(text) and _is_word(text[at])
    return before != after


def _not(accepts: Accepts) -> Accepts:
    return lambda char: not accepts(char)


_CLASSES: dict[str, Accepts] = {
    "d": str.isdecimal, "D": _not(str.isdecimal), "s": str.isspace, "S": _not(str.isspace), "w": _is_word, "W": _not(_is_word),
}  # fmt: skip
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_PLACES: dict[str, Callable[[str, int], bool]] = {
    "^": lambda _, at: at == 0, "A": lambda _, at: at == 0, "$": _at_end, "Z": lambda text, at: at == len(text),
    "b": _at_boundary,
}  # fmt: skip

# A part of a pattern: given the state after it, makes its states and returns the first.
_Part = Callable[[int], int]


@dataclass
class _Parser:
    """Reads a pattern by recursive descent, as ``re`` does."""

    text: str
    count: Callable[[int], None]
    at: int = 0
    depth: int = 0
    work: int = 0
    states: list[_State] = field(default_factory=lambda: [_State()])

    def parse(self) -> int:
        """Make all states; returns the first."""
        if len(self.text) > MOST_CHARACTERS:
            raise UnsupportedPattern(f"it has {len(self.text)} characters; at most {MOST_CHARACTERS} are read")
        part = self._alternatives()
        if self.at < len(self.text):
            raise PatternError(f"unbalanced parenthesis at position {self.at}")
        return part(_END)

    def _alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else lambda after: self._any([part(after) for part in parts])

    def _any(self, starts: list[int]) -> int:
        first = starts[-1]
        for start in reversed(starts[:-1]):
            first = self._add(_State(start, other=first))
        return first

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self._repeated())

        def made(after: int) -> int:
            for part in reversed(parts):
                after = part(after)
            return after

        return made

    def _repeated(self) -> _Part:
        begin = self.at
        part, may_repeat = self._one()
        least, most = 1, 1
        if (bounds := self._bounds()) is not None:
            if not may_repeat and self.text[begin] == "(":
                raise UnsupportedPattern("repeated lookahead is not supported")
            if not may_repeat:
                raise PatternError(f"nothing to repeat at position {begin}")
            least, most = bounds
            if self._take("+"):
                raise UnsupportedPattern("possessive repetition is not supported")
            self._take("?")  # lazy: matches the same names
            if self._bounds() is not None:
                raise PatternError(f"multiple repeat at position {self.at - 1}")
        return part if (least, most) == (1, 1) else lambda after: self._repeat(part, least, most, after)

    def _bounds(self) -> tuple[int, int] | None:
        """How often the part before may occur, the most being -1 for any number; None: nothing is said here."""
        for char, bounds in (("*", (0, -1)), ("+", (1, -1)), ("?", (0, 1))):
            if self._take(char):
                return bounds
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : end].partition(",")
        is_braced = self.text.startswith("{", self.at) and end > self.at + 1
        if not is_braced or not all(not n or (n.isascii() and n.isdecimal()) for n in (low, high)):
            return None  # a brace that means itself
        if not comma and not low:
            return None
        if max(len(low), len(high)) > 6:
            raise UnsupportedPattern(f"repetition {self.text[self.at : end + 1][:40]} is too large")
        self.at = end + 1
        least = int(low or 0)
        most = (int(high) if high else -1) if comma else least
        if 0 <= most < least:
            raise PatternError(f"min repeat greater than max repeat at position {self.at}")
        return least, most

    def _repeat(self, part: _Part, least: int, most: int, after: int) -> int:
        if most < 0:
            loop = self._add(_State(other=after))
            self.states[loop].next = part(loop)
            first = loop
        else:
            first = after
            for _ in range(most - least):
                self._work()
                first = self._add(_State(part(first), other=after))
        for _ in range(least):
            self._work()
            first = part(first)
        return first

    def _one(self) -> tuple[_Part, bool]:
        """One character, class, group or place, and whether it may be repeated."""
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._reading(self._set()), True
        if char == ".":
            return self._reading(lambda c: c != "\n"), True
        if char in "^$":
            return self._placed(char), False
        if char in "*+?":
            raise PatternError(f"nothing to repeat at position {self.at - 1}")
        if char == "{":
            self.at -= 1
            if self._bounds() is not None:
                raise PatternError(f"nothing to repeat at position {self.at - 1}")
            self.at += 1
        if char != "\\":
            return self._reading(char.__eq__), True
        char = self._next("bad escape")
        if char in "AZb":
            return self._placed(char), False
        return self._reading(self._escape(char)), True

    def _group(self) -> tuple[_Part, bool]:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise UnsupportedPattern(f"groups are nested more than {_MOST_DEPTH} deep")
        ahead = negated = False
        if self._take("?"):
            if self._take("P<"):
                end = self.text.find(">", self.at)
                if end < 0 or not self.text[self.at : end].isidentifier():
                    raise PatternError(f"bad name of a group at position {self.at}")
                self.at = end + 1
            elif self._take("=") or self._take("!"):
                ahead, negated = True, self.text[self.at - 1] == "!"
            elif not self._take(":"):
                raise UnsupportedPattern(f"the group (?{self.text[self.at : self.at + 2]} is not supported")
        inner = self._alternatives()
        if not self._take(")"):
            raise PatternError("missing ), unterminated group")
        self.depth -= 1
        if ahead:
            return lambda after: self._add(_State(after, ahead=inner(_END), negated=negated)), False
        return inner, True

    def _set(self) -> Accepts:
        negated = self._take("^")
        single: set[str] = set()
        others: list[Accepts] = []
        begin = self.at
        while not (self.at > begin and self._take("]")):
            first = self._in_set()
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                last = self._in_set()
                if not isinstance(first, str) or not isinstance(last, str) or last < first:
                    raise PatternError(f"bad character range at position {self.at}")
                others.append(_between(first, last))
            elif isinstance(first, str):
                single.add(first)
            else:
                others.append(first)
        found: Accepts = lambda char: char in single or any(other(char) for other in others)  # noqa: E731
        return _not(found) if negated else found

    def _in_set(self) -> str | Accepts:
        char = self._next("unterminated character set")
        if char != "\\":
            return char
        char = self._next("unterminated character set")
        return _CLASSES[char] if char in _CLASSES else self._literal(char)

    def _escape(self, char: str) -> Accepts:
        return _CLASSES[char] if char in _CLASSES else self._literal(char).__eq__

    def _literal(self, char: str) -> str:
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char.isascii() and char.isalnum():
            raise UnsupportedPattern(f"\\{char} is not supported")
        return char

    def _reading(self, accepts: Accepts) -> _Part:
        return lambda after: self._add(_State(after, accepts=accepts))

    def _placed(self, char: str) -> _Part:
        return lambda after: self._add(_State(after, holds=_PLACES[char]))

    def _add(self, state: _State) -> int:
        self._work()
        self.states.append(state)
        return len(self.states) - 1

    def _work(self) -> None:
        """Count a step of the construction; repetitions of repetitions could be endless."""
        self.count(1)
        self.work += 1
        if self.work > _MOST_STATES:
            raise UnsupportedPattern("its repetitions are too large")

    def _next(self, missing: str = "unexpected end") -> str:
        if self.at == len(self.text):
            raise PatternError(f"{missing} at the end of the pattern")
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, word: str) -> bool:
        if not self.text.startswith(word, self.at):
            return False
        self.at += len(word)
        return True


def _between(first: str, last: str) -> Accepts:
    return lambda char: first <= char <= last
