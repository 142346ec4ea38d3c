"""Experts of mixtures: one by one, as transformers before 5 names them and checkpoints have them, and fused in 3-D tensors.

The rules are those of transformers' ``conversion_mapping.py``: ``gate_up_proj`` is ``[experts, 2 * inner, hidden]``, of each expert
the rows of ``gate_proj`` and then those of ``up_proj``; ``down_proj`` is ``[experts, hidden, inner]``. Single ones are called
``gate_proj``, ``up_proj``, ``down_proj``, or ``w1``, ``w3``, ``w2``, or ``fc1``, ``fc3``, ``fc2``; a module without gates has
``up_proj`` alone. What models of Mixtral's kind call ``block_sparse_moe`` on disk is ``mlp`` in memory.

Some models keep ``[experts, in, out]`` in their 3-D tensors (GPT-OSS, which also interleaves gate and up; Llama 4; Qwen3-VL-MoE
on disk). A single expert is not rows of these; :func:`why_not` says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from shira_format.names.row_blocks import Location, RowBlock

Shape = Callable[[str], tuple[int, ...]]

SINGLE = re.compile(
    r"(?P<module>(?:.*\.)?experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>gate_proj|up_proj|down_proj|w[123]|fc[123])\.weight"
)
_FUSED = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<part>gate_up_proj|up_proj|down_proj)")
# The names of gate, up and down, and whether they can stand without the gate.
_PROJ, _W, _FC = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2")
_ON_DISK, _IN_MEMORY = ".block_sparse_moe.", ".mlp."
_ROUTERS = {"gate.": "router."}  # on disk, in memory: Phi-MoE
# Other tensors that only change their names, on disk and in memory: Granite-MoE's and Aria's.
_OTHERS = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
    "mlp.experts.fc1.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.fc2.weight": "mlp.experts.down_proj",
}
_BOTH_WAYS = _OTHERS | {new: old for old, new in _OTHERS.items() if old.startswith("block")}
_UNGATED = re.compile(r".*\bmixer\.experts")  # Nemotron-H


def experts(names: Collection[str], shape: Shape) -> Mapping[str, Location]:
    """The tensors of experts that another version of transformers has, and of what is renamed along with them.

    Args:
        names: a checkpoint's tensors.
        shape: of one of them.
    """
    found: dict[str, Location] = {}
    modules = _modules(names)
    homes: set[str | None] = set()
    for module, singles in modules.singles.items():
        ways = dict(_fused(module, singles, shape)).items()
        if fused := {name: way for name, way in ways if isinstance(way, Location)}:
            found |= fused
            homes.add(_home(module))
    for module, parts in modules.fused.items():
        if _why(module, parts, shape) is None:
            found.update(_singles(module, parts, shape))
            homes.add(_home(module))
    found.update((new, _whole(name, shape)) for name, new in (*_renamed(names, homes - {None}), *_others(names)))
    return {name: location for name, location in found.items() if name not in names}


def why_not(name: str, names: Collection[str], shape: Shape) -> str | None:
    """Why a checkpoint's experts, which are stored in another way, do not have a tensor in their rows.

    Args:
        name: the tensor of a single expert, or a 3-D one.
        names: the checkpoint's tensors.
        shape: of one of them.

    Returns:
        The reason, or None if the checkpoint has no such experts, or has the tensor.
    """
    modules = _modules(names)
    if match := SINGLE.fullmatch(name):
        reasons = [
            _why(module, parts, shape)
            for module, parts in modules.fused.items()
            if _are_one(match["module"], module)
        ]
    elif match := _FUSED.fullmatch(name):
        reasons = [
            way
            for module, parts in modules.singles.items()
            if _are_one(match["module"], module)
            for fused, way in _fused(module, parts, shape)
            if isinstance(way, str) and fused.endswith(f".{match['part']}")
        ]
    else:
        reasons = []
    return next(filter(None, reasons), None)


def _are_one(module: str, other: str) -> bool:
    """Whether two names are of one module, but for a prefix."""
    ours, theirs = (f".{name.replace(_ON_DISK, _IN_MEMORY)}" for name in (module, other))
    return ours.endswith(theirs) or theirs.endswith(ours)


@dataclass(frozen=True)
class _Modules:
    """Modules of experts in a checkpoint: the tensors of single experts by part and expert, and the 3-D ones by part."""

    singles: dict[str, dict[str, dict[int, str]]]
    fused: dict[str, dict[str, str]]


def _modules(names: Collection[str]) -> _Modules:
    found = _Modules({}, {})
    for name in names:
        if "experts." not in name:
            continue
        if match := SINGLE.fullmatch(name):
            parts = found.singles.setdefault(match["module"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = name
        elif match := _FUSED.fullmatch(name):
            found.fused.setdefault(match["module"], {})[match["part"]] = name
    return found


def _fused(
    module: str, parts: Mapping[str, Mapping[int, str]], shape: Shape
) -> Iterator[tuple[str, Location | str]]:
    """The 3-D tensors of a module of single experts, or why they cannot be made."""
    target = module.replace(_ON_DISK, _IN_MEMORY)
    for gate, up, down in (_PROJ, _W, _FC):
        if up not in parts or down not in parts or (gate not in parts and gate != "gate_proj"):
            continue
        joined = [("gate_up_proj", [gate, up])] if gate in parts else [("up_proj", [up])]
        for name, inner in [*joined, ("down_proj", [down])]:
            yield f"{target}.{name}", _stack([parts[part] for part in inner], shape)


def _stack(parts: list[Mapping[int, str]], shape: Shape) -> Location | str:
    """The parts of all experts, expert after expert, or why they cannot be stacked."""
    count = 1 + max(map(max, parts))
    first = [next(iter(part.values())) for part in parts]
    if any(len(part) != count for part in parts):
        return f"experts are missing: not all {count} have what {first[0]!r} has"
    heights, columns = [], set()
    for part, name in zip(parts, first, strict=True):
        shapes = {shape(other) for other in part.values()}
        if len(shapes) > 1 or len(shape(name)) != 2:
            return f"{name!r} and others of its kind differ in shape"
        heights.append(shape(name)[0])
        columns.add(shape(name)[1])
    if len(columns) != 1:
        return f"{', '.join(first)} cannot be stacked: they differ in columns"
    blocks, row = [], 0
    for expert in range(count):
        for part, height in zip(parts, heights, strict=True):
            blocks.append(RowBlock(part[expert], 0, ((row, row + height),)))
            row += height
    return Location((count, sum(heights), columns.pop()), tuple(blocks))


def _singles(module: str, parts: Mapping[str, str], shape: Shape) -> Iterator[tuple[str, Location]]:
    """The single experts of a module of 3-D tensors; a block's rows are those of a single tensor, from its first."""
    count, hidden, inner = shape(parts["down_proj"])
    on_disk = module.replace(_IN_MEMORY, _ON_DISK)
    gated = "gate_up_proj" in parts
    slots = [("gate_up_proj", 0, 0), ("gate_up_proj", 1, 1)] if gated else [("up_proj", 0, 1)]
    # The 3-D tensor, the part's place in an expert's rows, the part's name, its size.
    for place, (part, offset, which) in enumerate([*slots, ("down_proj", 0, 2)]):
        del place
        height = hidden if part == "down_proj" else inner
        columns = inner if part == "down_proj" else hidden
        step = shape(parts[part])[1]
        for expert in range(count):
            start = expert * step + offset * height
            location = Location((height, columns), (RowBlock(parts[part], start, ((0, height),)),))
            yield f"{module}.{expert}.{_PROJ[which]}.weight", location
            if gated:
                yield f"{on_disk}.{expert}.{_W[which]}.weight", location


def _why(module: str, parts: Mapping[str, str], shape: Shape) -> str | None:
    """Why a module's 3-D tensors are not ``[experts, out, in]``; None if they are."""
    up = "gate_up_proj" if "gate_up_proj" in parts else "up_proj"
    if up not in parts or "down_proj" not in parts:
        return f"{next(iter(parts.values()))!r} stands alone, so that how it is stored is unknown"
    of_up, of_down = shape(parts[up]), shape(parts["down_proj"])
    shapes = f"{parts[up]!r} has shape {list(of_up)} and {parts['down_proj']!r} {list(of_down)}"
    if len(of_up) != 3 or len(of_down) != 3:
        return f"{shapes}: not 3-D tensors of experts"
    factor = 2 if up == "gate_up_proj" else 1
    if of_up == (of_down[0], factor * of_down[2], of_down[1]):
        if up == "up_proj" and not _UNGATED.fullmatch(module):
            return f"{shapes}: which is [experts, out, in] as well as [experts, in, out]"
        return None
    if of_up == (of_down[0], of_down[2], factor * of_down[1]):
        return f"{shapes}: they are [experts, in, out], so that an expert's gate and up are not rows of them"
    return f"{shapes}: they do not fit each other"


def _home(module: str) -> str | None:
    """What of a module's name is renamed on the way between disk and memory, or None."""
    for word in (_ON_DISK, _IN_MEMORY):
        if f".{module}".endswith(f"{word}experts"):
            return module.removesuffix("experts")
    return None


def _renamed(names: Collection[str], homes: Collection[str | None]) -> Iterator[tuple[str, str]]:
    """Names beside experts, such as the router's, and what they are called elsewhere."""
    if not homes:
        return
    for name in names:
        for here, there, routers in (
            (_ON_DISK, _IN_MEMORY, _ROUTERS),
            (_IN_MEMORY, _ON_DISK, {new: old for old, new in _ROUTERS.items()}),
        ):
            start, word, rest = f".{name}".rpartition(here)
            if not word or rest.startswith("experts.") or f"{start}{word}"[1:] not in homes:
                continue
            yield name, f"{start}{there}{rest}"[1:]
            for old, new in routers.items():
                if rest.startswith(old):
                    yield name, f"{start}{there}{new}{rest.removeprefix(old)}"[1:]


def _others(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names of single tensors of mixtures, and what they are called elsewhere."""
    for name in names:
        if "experts." not in name and "block_sparse_moe." not in name:
            continue
        for depth in (3, 4):
            tail = ".".join(name.split(".")[-depth:])
            if new := _BOTH_WAYS.get(tail):
                yield name, name.removesuffix(tail) + new


def _whole(name: str, shape: Shape) -> Location:
    one = shape(name)
    rows = 1
    for size in one[:-1] if len(one) == 3 else one[:1]:
        rows *= size
    return Location(one, (RowBlock(name, 0, ((0, rows),)),))
