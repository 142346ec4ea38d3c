"""Pickles by a generator of opcodes, which knows what is on the stack: most run for a while before something is wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random

from fuzz.oracle import Violation
from shira_format.checkpoints import open_checkpoint

RAN: list[str] = []  # what pickles made run: nothing ever


def ran(*_: object) -> None:
    """What every pickle tries to call."""
    RAN.append("a function of a pickle's choice")


Names = Sequence[tuple[str, str]]
_HARM: Names = [
    (__name__, "ran"),
    ("builtins", "exec"),
    ("os", "system"),
    ("builtins", "getattr"),
    ("nt", "system"),
]
_INTEGERS = [0, 1, 2, 3, 7, 64, 255, 2**31 - 1, -1]


def text(value: str) -> bytes:
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    """An integer of any size."""
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """What a function of a name returns for arguments."""
    return f"c{module}\n{name}\n".encode("utf-8", "surrogatepass") + b"(" + b"".join(arguments) + b"tR"


class Program:
    """A pickle at random.

    Args:
        random: of it.
        names: that the reader allows, with what else is tried.
        atoms: pickled values that mean something to the reader, such as a tensor.
    """

    def __init__(self, random: Random, names: Names, atoms: Sequence[bytes]) -> None:
        self._random, self._names, self._atoms = random, [*names, *_HARM], atoms
        self._memo = 0

    def pickled(self) -> bytes:
        """The whole pickle."""
        body = self._value(self._random.choice([1, 2, 3, 5]))
        if self._random.random() < 0.1:
            body = self._nested(body)
        noise = b"".join(
            self._random.choice([b"0", b"2", b"(", b"t", b"a", b"s", b"u", b"b", b"R", b"Q", b"\x93", b"."])
            for _ in range(3)
        )
        return b"\x80\x02" + body + (noise if self._random.random() < 0.15 else b"") + b"."

    def _value(self, depth: int) -> bytes:
        random = self._random
        kind = random.choice(
            ["atom", "atom", "plain", "dict", "dict", "list", "tuple", "call", "memo", "build"]
            if depth
            else ["atom", "plain", "memo"]
        )
        if kind == "atom" and self._atoms:
            return random.choice(self._atoms)
        if kind == "dict":
            items = b"".join(self._key() + self._value(depth - 1) for _ in range(random.randint(0, 4)))
            return b"}(" + items + b"u"
        if kind in ("list", "tuple"):
            items = b"".join(self._value(depth - 1) for _ in range(random.randint(0, 4)))
            return b"](" + items + b"e" if kind == "list" else b"(" + items + b"t"
        if kind == "call":
            module, name = random.choice(self._names)
            return called(
                module, name, *(self._value(depth - 1) for _ in range(random.choice([0, 1, 1, 2, 4, 6])))
            )
        if kind == "build":
            return self._value(depth - 1) + self._value(depth - 1) + b"b"
        if kind == "memo":
            return self._remembered()
        return self._plain()

    def _plain(self) -> bytes:
        random = self._random
        return random.choice([
            b"N", b"\x88", b"\x89", b"G" + struct.pack(">d", random.choice([0.5, float("nan"), float("inf")])), integer(random.choice(_INTEGERS)),
            integer(2 ** random.choice([40, 63, 64, 2000])), text(random.choice(["", "w", "w.weight", "state_dict", "\ud800", "\n", "../x", "a" * 300])),
            b"C\x03abc", b"U\x02ab",
        ])  # fmt: skip

    def _key(self) -> bytes:
        if self._random.random() < 0.1:
            return self._value(1)
        return text(
            self._random.choice(
                ["w", "b.weight", "state_dict", "model", "module", "_metadata", "x/y", "a\u202eb", ""]
            )
            + str(self._random.randrange(9))
        )

    def _remembered(self) -> bytes:
        """A value that is put into the memo, or got from there, at indices near and absurd."""
        if self._memo and self._random.random() < 0.7:
            return b"h" + bytes([self._random.randrange(min(self._memo + 1, 255))])
        at = self._memo if self._random.random() < 0.9 else 2**31 - 2
        self._memo += 1
        return b"N" + b"r" + struct.pack("<I", at)

    def _nested(self, body: bytes) -> bytes:
        """A list in itself, tuples of themselves twice and twice again, or brackets in brackets without end."""
        kind = self._random.choice(["itself", "twice", "deep"])
        if kind == "itself":
            return b"]q\x00h\x00a" + body + b"a"
        if kind == "twice":
            return body + b"".join(
                b"q" + bytes([n]) + b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60)
            )
        return body + b"\x85" * self._random.choice([100, 100_000])


def read_all(path: Path) -> None:
    """Open a checkpoint and read every tensor; no function of the file's choice may run.

    Raises:
        Violation: one did.
    """
    RAN.clear()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint.shape(name), checkpoint.dtype(name)
            checkpoint[name].tobytes()
    finally:
        if RAN:
            raise Violation("the file's code ran")
