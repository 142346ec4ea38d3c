"""GGUF files, written number by number: counts, lengths, types, shapes and offsets that are right or not."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import gguf  # noqa: F401 - ahead of the cases, whose time it would take

from fuzz.mutate import SIZES, mutated_bytes
from fuzz.mutate import text as odd_text
from shira_format.checkpoints import open_checkpoint

FILE = "model.gguf"
_NAMES = [
    "token_embd.weight", "output_norm.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_norm.weight",
    "blk.0.ffn_down.weight", "blk.1.attn_q.bias", "rope_freqs.weight",
]  # fmt: skip
_PLAIN = {0: 4, 1: 2, 30: 2, 24: 1, 28: 8}  # types: bytes of an element
_BLOCKS = {
    2: (32, 18),
    8: (32, 34),
    12: (256, 144),
    14: (256, 210),
    10: (256, 84),
}  # types: elements and bytes of a block


def make(random: Random, folder: Path) -> None:
    """One file, or two parts of one."""
    data = _file(random)
    if random.random() < 0.3:
        data = mutated_bytes(random, data)
    (folder / FILE).write_bytes(data)


def check(folder: Path) -> None:
    """Open it and read every tensor."""
    checkpoint = open_checkpoint(folder / FILE)
    for name in checkpoint:
        checkpoint.shape(name), checkpoint.dtype(name), checkpoint.is_quantised(name)
        checkpoint[name].tobytes()


class _Writer:
    """Numbers, of which a few are others than they should be."""

    def __init__(self, random: Random) -> None:
        self._random, self.data = random, b""
        self._wrong = random.choice([0.0, 0.0, 0.01, 0.05])

    def number(self, code: str, value: int) -> None:
        if self._random.random() < self._wrong:
            value = self._random.choice([*SIZES, value + 1, max(0, value - 1)]) % (1 << 8 * struct.calcsize(code))
        self.data += struct.pack(f"<{code}", value)

    def text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.number("Q", len(data))
        self.data += data


def _file(random: Random) -> bytes:
    writer = _Writer(random)
    names = random.sample(_NAMES, k=random.randint(0, len(_NAMES)))
    names += [odd_text(random, _NAMES) for _ in range(random.choice([0, 0, 0, 1]))]
    keys: dict[str, object] = {
        "general.architecture": random.choice(["llama", "llama", "gpt2", "qwen2", "\u202e", "no"]), "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": random.choice([1, 2, 3, 0]), "tokenizer.ggml.tokens": ["a", "b", "\ud800"],
        "general.alignment": random.choice([32, 32, 32, 1, 0, 3, 2**31]), odd_text(random): random.choice([1, "x" * 2000, [1, 2]]),
    }  # fmt: skip
    writer.data = b"GGUF"
    writer.number("I", random.choice([3, 3, 3, 2, 1, 4]))
    writer.number("Q", len(names))
    writer.number("Q", len(keys))
    for key, value in keys.items():
        writer.text(key)
        _value(writer, value)
    offset = 0
    for name in names:
        kind, shape, size = _tensor(random)
        writer.text(name)
        writer.number("I", len(shape))
        for side in reversed(shape):
            writer.number("Q", side)
        writer.number("I", kind)
        writer.number("Q", offset)
        offset += -(-size // 32) * 32
    writer.data += bytes(-len(writer.data) % 32)
    return writer.data + random.randbytes(offset)


def _value(writer: _Writer, value: object) -> None:
    if isinstance(value, str):
        writer.number("I", 8)
        writer.text(value)
    elif isinstance(value, list):
        writer.number("I", 9)
        writer.number("I", 8 if isinstance(value[0], str) else 4)
        writer.number("Q", len(value))
        for one in value:
            writer.text(one) if isinstance(one, str) else writer.number("I", one)
    elif isinstance(value, int):
        writer.number("I", 4)
        writer.number("I", value)


def _tensor(random: Random) -> tuple[int, list[int], int]:
    """Its type, its shape and its bytes."""
    if random.random() < 0.5:
        kind = random.choice(sorted(_PLAIN))
        shape = [random.choice([1, 2, 4, 6, 64]) for _ in range(random.choice([1, 2, 2, 3]))]
        width = _PLAIN[kind]
    else:
        kind = random.choice(sorted(_BLOCKS))
        block, width = _BLOCKS[kind]
        shape = [random.choice([1, 2, 4]), block * random.choice([1, 2])]
        return kind, shape, shape[0] * shape[1] // block * width
    size = width
    for side in shape:
        size *= side
    return kind, shape, size
