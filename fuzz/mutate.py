"""Changes at random: of bytes, of JSON values, and of texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

SIZES = [
    0,
    1,
    2,
    3,
    5,
    7,
    15,
    16,
    17,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
NUMBERS: list[Any] = [*SIZES, -1, -(2**63), 0.5, -0.0, 1.0, 1e308, 5e-324, 10**400]
# Controls, reordering, bidi isolates, markup, half a surrogate pair, other planes, paths, formats, long.
TEXTS = [
    "", " ", "\n", "\r\x1b[2K\x1b]0;x\x07", "a\u202eb\u2066c", "\u2028\x85\x00", "<script>alert(1)</script>&'\"", "\ud800", "\U000e0001é語",
    "../../x", "/dev/zero", "C:\\x", "{0.__class__}%s%n", "a" * 1025, "[/bold]$(id)`id`", "__metadata__", "w#values", "x/y", "-o",
]  # fmt: skip
_BYTES = [0, 1, 2, 3, 127, 128, 129, 254, 255]


def text(random: Random, among: Sequence[str] = ()) -> str:
    """A text that somebody chose to do harm, or one of those given, or both joined."""
    pool = [*TEXTS, *among] if random.random() < 0.5 or not among else list(among)
    found = random.choice(pool)
    return found + random.choice(pool) if random.random() < 0.2 else found


def mutated_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """With up to ``most`` places flipped, overwritten by a number, cut, doubled or filled in."""
    found = bytearray(data)
    for _ in range(random.randint(1, most)):
        at = random.randint(0, len(found))
        until = min(len(found), at + random.choice([1, 1, 2, 4, 8, 64]))
        how = random.choice(["flip", "byte", "number", "cut", "end", "double", "insert"])
        if how == "flip" and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif how == "byte" and at < len(found):
            found[at] = random.choice(_BYTES)
        elif how == "number":
            width = random.choice([2, 4, 8])
            found[at : at + width] = (random.choice(SIZES) % (1 << 8 * width)).to_bytes(width, "little")
        elif how == "cut":
            del found[at:until]
        elif how == "end" and random.random() < 0.3:
            del found[at:]
        elif how == "double":
            found[at:at] = found[at:until]
        elif how == "insert":
            found[at:at] = bytes(random.choices(_BYTES, k=random.randint(1, 8)))
    return bytes(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: Sequence[Any]) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def mutated_json(
    random: Random, original: Any, keys: Sequence[str], values: Sequence[Any] = (), most: int = 3
) -> Any:
    """With up to ``most`` places set, removed, added, exchanged or doubled; values are numbers, texts, others of it, and ``values``."""
    value = copy.deepcopy(original)
    for _ in range(random.randint(1, most)):
        paths = list(places(value))
        if not paths:
            break
        *path, last = random.choice(paths)
        holder = at(value, path)
        how = random.choice(["set", "set", "set", "near", "near", "remove", "add", "other", "twice"])
        if how == "near" and type(holder[last]) is int:
            holder[last] = max(holder[last] + random.choice([-2, -1, 1, 2]), random.choice([0, -1]))
        elif how in ("set", "near"):
            holder[last] = _new(random, values)
        elif how == "remove":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[random.choice(keys) if random.random() < 0.8 else text(random)] = _new(random, values)
        elif how == "add" or (how == "twice" and isinstance(holder, list)):
            holder.append(_new(random, values) if how == "add" else copy.deepcopy(holder[last]))
        elif how == "other":
            holder[last] = copy.deepcopy(at(value, random.choice(paths)))
    return value


def _new(random: Random, values: Sequence[Any]) -> Any:
    pool = random.choice([NUMBERS, TEXTS, [None, True, False, {}, [], [[]]], list(values) or NUMBERS])
    return copy.deepcopy(random.choice(pool))
