"""A sharded bf16 checkpoint, what one training step makes of it, and what a fine-tune does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.model import Shape, header_of, tensor_sizes, weight_of

SHARDS = 3
# By how much a weight of about 0.02 moves, root mean square. A step: what Adam does at the learning rates of
# reinforcement learning, about 1e-6; such steps are what gets shipped, and 1 to 3 % of the bf16 entries change in one,
# as people report. A fine-tune: 1 %, which most of the entries show.
MOVES = {"step": 6e-7, "fine-tune": 2e-4}


@dataclass(frozen=True)
class Pair:
    """Two folders of one layout.

    Attributes:
        base: before.
        tuned: after.
        elements: entries of all tensors.
        changed: how many of them have other bits after.
    """

    base: Path
    tuned: Path
    elements: int
    changed: int

    @property
    def before(self) -> list[Path]:
        """The base's weight files, in order."""
        return weight_files(self.base)

    @property
    def after(self) -> list[Path]:
        """The other one's."""
        return weight_files(self.tuned)


def make_pairs(shape: Shape, folder: Path) -> tuple[Pair, Pair]:
    """Write a base with the step and the fine-tune of it, one tensor in memory at a time.

    All are the bf16 rounding of weights in float32, as trainers hold them: each weight moves by a normal number of
    :data:`MOVES`. In a step that is most often too little to reach the next bf16 number, and farther than that where
    the weight is small. Norms of 1 do not move in it at all.
    """
    sizes = tensor_sizes(shape)
    random = torch.Generator().manual_seed(2)
    folders = [folder / name for name in ("base", *MOVES)]
    changed = dict.fromkeys(MOVES, 0)
    weight_map: dict[str, str] = {}
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        shape.config().save_pretrained(path)
    for number, names in enumerate(_shards(sizes), 1):
        shard = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        header = header_of({name: sizes[name] for name in names})
        with ExitStack() as stack:
            files = [stack.enter_context(open(path / shard, "wb")) for path in folders]
            for file in files:
                file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                weight = weight_of(sizes[name], random)
                old = weight.bfloat16().view(torch.int16)
                files[0].write(old.numpy().data)
                for file, (kind, move) in zip(files[1:], MOVES.items(), strict=True):
                    weight.add_(torch.randn(sizes[name], generator=random), alpha=move)
                    new = weight.bfloat16().view(torch.int16)
                    file.write(new.numpy().data)
                    changed[kind] += int(torch.count_nonzero(old != new))
                weight_map[name] = shard
    elements = sum(map(_numel, sizes.values()))
    index = {"metadata": {"total_size": 2 * elements}, "weight_map": weight_map}
    for path in folders:
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    step, fine = (Pair(folders[0], folder / kind, elements, changed[kind]) for kind in MOVES)
    return step, fine


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder, in order."""
    return sorted(folder.glob("*.safetensors"))


def _shards(sizes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that follow each other, in groups of about the same size."""
    limit = sum(map(_numel, sizes.values())) / SHARDS
    group: list[str] = []
    done, made = 0, 0
    for name, size in sizes.items():
        group.append(name)
        done += _numel(size)
        if made < SHARDS - 1 and done >= (made + 1) * limit:
            yield group
            group, made = [], made + 1
    yield group


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()
