"""Strict JSON, the same for headers, manifests and indexes (spec, section 2.1)."""

from __future__ import annotations

import json
import re
from itertools import compress
from typing import Any

from shira_format.errors import FormatError

MAX_DEPTH = 32
_NESTED = {dict, list}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MINUS_ZERO = re.compile(rb"-0[\s,}\]]")  # begins with what is rare, which makes the search fast


def is_uint(value: Any) -> bool:
    """Whether a parsed JSON value is an integer >= 0 (``true`` is not)."""
    return type(value) is int and value >= 0


def parse_object(text: bytes | bytearray, rule: str) -> dict[str, Any]:
    """Parse one JSON object, which only spaces may follow: valid UTF-8, Unicode strings, no repeated keys, at most 32 levels.

    A text without anything unusual is parsed at the speed of the C parser; see :func:`_pairs_at_most`.

    Raises:
        FormatError: with the given rule.
    """
    if not text.startswith(b"{"):
        raise FormatError(rule, "the JSON text does not start with '{'")
    if not text.rstrip(b" ").endswith(b"}"):
        raise FormatError(rule, "the JSON object is not closed, or something other than spaces follows it")
    parsed = _parse_plain(text)
    return _parse_slowly(text, rule) if parsed is None else parsed


def _parse_plain(text: bytes | bytearray) -> dict[str, Any] | None:
    """The object, if it is certain without a closer look that it keeps all rules; else None."""
    escapes = b"\\" in text
    if _MINUS_ZERO.search(text) or (escapes and _SURROGATE.search(text)):
        return None
    try:
        parsed: dict[str, Any] = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):  # the other parser says what is wrong, or reads numbers of any length
        return None
    depth, pairs = _measure(parsed)
    if depth <= MAX_DEPTH and (pairs == text.count(b":") or pairs == _pairs_at_most(text)):
        return parsed
    return None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _pairs_at_most(text: bytes | bytearray) -> int:
    """An upper bound on the pairs of key and value in a JSON text; exact for all but unusual texts.

    A pair has a colon outside of strings, after a quote or white space. Where that quote is escaped the colon is inside a
    string, unless the backslash is itself escaped. If the parsed text has as many pairs, no key occurs twice.
    """
    bound = text.count(b'":') - text.count(b'\\":') + text.count(b'\\\\":')
    return bound + sum(text.count(space + b":") for space in (b" ", b"\n", b"\t", b"\r"))


def _parse_slowly(text: bytes | bytearray, rule: str) -> dict[str, Any]:
    """Parse with a check at each object and number."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(rule, f"the key {twice!r} occurs twice")
        return found

    def integer(digits: str) -> int | float:
        # -0 is no integer. Python refuses very long ones; cut to 400 digits, they are still beyond every limit of the format.
        return -0.0 if digits == "-0" else int(digits[:400])

    try:
        parsed: dict[str, Any] = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse, parse_int=integer
        )
        depth, _ = _measure(parsed)
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(rule, "a string has half of a surrogate pair, which is no Unicode") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, FormatError):
            raise
        raise FormatError(rule, f"invalid JSON: {error}") from None
    if depth > MAX_DEPTH:
        raise FormatError(rule, f"nested more than {MAX_DEPTH} deep")
    return parsed


def _measure(parsed: Any) -> tuple[int, int]:
    """Levels of objects and lists, and pairs of key and value in all objects, counted without recursion."""
    depth = pairs = 0
    level = [parsed]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            if type(item) is dict:
                pairs += len(item)
                inner += item.values()
            else:
                inner += item
        level = list(compress(inner, map(_NESTED.__contains__, map(type, inner))))
    return depth, pairs
