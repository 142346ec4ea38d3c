"""mlx-lm's LoRA and DoRA: ``adapters.safetensors`` with ``adapter_config.json``.

The rules are those of ``mlx_lm/tuner/lora.py`` and ``dora.py`` (ml-explore/mlx-lm): a linear layer computes
``W x + scale * ((x @ lora_a) @ lora_b)``, so that ``delta W = scale * lora_b.T @ lora_a.T``; an embedding has
``delta W = scale * lora_a @ lora_b``; layers of experts (``LoRASwitchLinear``) have ``scale * lora_b[e] @ lora_a[e]``.
DoRA scales the rows of the sum to norm ``m``. mlx-lm names modules as Hugging Face does, except those that it stacks,
splits or renames when it loads a model: of these, experts are read, the others are refused as missing in the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.files import is_number, is_rank, read_json, read_tensors
from shira_format.lora.keys import by_pattern, group_keys
from shira_format.lora.products import LowRank, Stacked, fits_factors, low_rank
from shira_format.lora.rope import CONFIG as MODEL_CONFIG
from shira_format.names.prefixes import AmbiguousNames, Renaming, match_names
from shira_format.storage.paths import is_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_WEIGHTS = re.compile(rf"([0-9]+_)?{re.escape(WEIGHTS)}")
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_EXPERTS = re.compile(r"(?P<parent>.+)\.(?:switch_mlp|experts)\.(?P<projection>\w+)")
# Hugging Face's names of an expert's projections in most models, in Mixtral, Phi-MoE and MiniMax, and in Nemotron-H.
_PROJECTIONS: list[dict[str, str]] = [
    {},
    {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    {"fc1": "up_proj", "fc2": "down_proj"},
]
_EMBEDDING = re.compile(r"(?:.*emb.*|wte|wpe)")

# The names of a module's weights in the base, given the number of experts (None: no layer of experts).
_Naming = Callable[[str, int | None], list[str]]


class Mlx:
    """Files that mlx-lm writes."""

    name = "mlx"

    def recognises(self, path: Path) -> bool:
        return _find(path) is not None

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        found = _find(path)
        if found is None:
            raise SourceError(f"{path}: no LoRA of mlx-lm: need {CONFIG} beside {WEIGHTS}")
        weights, config = found
        return _Reader(weights, read_json(config), base, prefix).read([weights, config])


def _find(path: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration; checkpoints of a run are called ``0000100_adapters.safetensors``."""
    weights = path if path.is_file() else path / WEIGHTS
    config = weights.with_name(CONFIG)
    found = _WEIGHTS.fullmatch(weights.name) and is_file(weights) and is_file(config)
    return (weights, config) if found else None


class _Reader:
    """Turns the tensors of one adapter into updates."""

    def __init__(self, path: Path, config: Mapping[str, Any], base: Checkpoint, prefix: str | None) -> None:
        self.prefix = prefix
        self.path = path
        self.base = base
        where = path.with_name(CONFIG)
        self.kind = _kind(config, where)
        self.rank, self.scale = _parameters(config, where)
        self.model = config.get("model")

    def read(self, files: list[Path]) -> Lora:
        modules = self._modules(read_tensors(self.path, self.base)[0])
        naming, rename = self._names(modules)
        updates: list[Update] = []
        for module, parts in modules.items():
            names = [rename(name) for name in naming(module, _experts(parts))]
            updates += self._updates(module, parts, names)
        return Lora(
            updates=updates,
            source={"kind": "lora", "dialect": "mlx", "r": self.rank, "scale": self.scale, "fine_tune_type": self.kind},
            base_model={"id": self.model} if isinstance(self.model, str) and self.model else {},
            files=files,
            notices=rename.notices("the LoRA"),
        )  # fmt: skip

    def _modules(self, tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        for key, array in tensors.items():
            if not array.size:
                raise SourceError(f"{self.path}: {key!r} of shape {list(array.shape)} has no elements")
        groups = group_keys(tensors, by_pattern(_KEY), self.path, "it ends neither in lora_a nor lora_b nor m")
        needed = {"lora_a", "lora_b"} | ({"m"} if self.kind == "dora" else set())
        for module, parts in groups.items():
            if parts.keys() != needed:
                raise SourceError(
                    f"{self.path}: {module!r} has {', '.join(sorted(parts))}; "
                    f"{self.kind} needs {', '.join(sorted(needed))}"
                )
        return {module: {part: tensors[key] for part, key in parts.items()} for module, parts in groups.items()}

    def _names(self, modules: Mapping[str, Mapping[str, Array]]) -> tuple[_Naming, Renaming]:
        """The base's names of these modules' weights: the first way in which the base has all of them."""
        first: SourceError | None = None
        experts = [module for module, parts in modules.items() if _experts(parts) is not None]
        for naming in (_stacked, *map(_separate, _PROJECTIONS)):
            by_name = {
                name: parts for module, parts in modules.items() for name in naming(module, _experts(parts))
            }

            def fits(name: str, found: str, by_name: Mapping[str, Mapping[str, Array]] = by_name) -> bool:
                a, b = by_name[name]["lora_a"], by_name[name]["lora_b"]
                return b.ndim != 2 or fits_factors(self.base.shape(found), b.T, a.T)

            try:
                return naming, match_names(by_name, self.base, self.path, fits=fits, prefix=self.prefix)
            except AmbiguousNames:
                raise
            except SourceError as error:
                first = first or error
                if not experts:
                    break
        assert first is not None
        if experts and all(f"{module}.weight" in self.base for module in modules if module not in experts):
            raise SourceError(
                f"{self.path}: the base has neither one weight per expert of {experts[0]!r} nor one for all of them, as "
                "mlx-lm has: and it has them in no 3-D tensors of which they are rows"
            )
        raise first

    def _updates(self, module: str, parts: Mapping[str, Array], names: list[str]) -> list[Update]:
        for name in names:
            self._check_base(name)
        a, b, where = parts["lora_a"], parts["lora_b"], f"{self.path}: {module!r}"
        count = _experts(parts)
        if count is None:
            return [self._layer(where, names[0], a, b, parts.get("m"))]
        if self.kind == "dora":
            raise SourceError(f"{where}: mlx-lm has no DoRA of experts")
        # Before October 2025 lora_a was [E r, in], expert after expert.
        if a.ndim == 2 and count and a.shape[0] % count == 0:
            a = a.reshape(count, -1, a.shape[1])
        if a.ndim != 3 or a.shape[0] != count or not count:
            raise SourceError(
                f"{where}: lora_a has shape {list(parts['lora_a'].shape)}, lora_b {list(b.shape)}: "
                "not factors of equally many experts"
            )
        self._check_rank(where, a.shape[1], b.shape[2])
        if len(names) == 1 and len(shape := self.base.shape(names[0])) == 3:
            if shape[0] != count:
                raise SourceError(f"{where}: {count} experts, the base's {names[0]!r} has shape {list(shape)}")
            rows = [low_rank(names[0], shape[1:], b[e], a[e], self.scale, where) for e in range(count)]
            return [Stacked(names[0], shape, rows, [shape[1]] * count)]
        following = _following(names)
        if following in self.base:
            raise SourceError(f"{where}: {count} experts, the base has more of them ({following!r})")
        return [
            low_rank(name, self.base.shape(name), b[e], a[e], self.scale, where) for e, name in enumerate(names)
        ]

    def _layer(self, where: str, name: str, a: Array, b: Array, m: Array | None) -> Update:
        """The update of an embedding or a linear layer, which the base may store as ``[in, out]`` (GPT-2)."""
        if a.ndim != 2 or b.ndim != 2:
            raise SourceError(
                f"{where}: lora_a has shape {list(a.shape)}, lora_b {list(b.shape)}: not two matrices"
            )
        self._check_rank(where, a.shape[1], b.shape[0])
        shape, linear = self.base.shape(name), (b.shape[1], a.shape[0])
        # lora_a @ lora_b is an embedding's update, and the transpose of a linear layer's.
        is_transposed = shape == linear[::-1]
        if is_transposed and shape == linear:
            if _EMBEDDING.fullmatch(name.split(".")[-2]) or self._has_conv1d():
                raise SourceError(
                    f"{where}: the base's {name!r} is square, and may be an embedding or stored as [in, out] (Conv1D): "
                    "whether to transpose its update cannot be determined"
                )
            is_transposed = False
        up, down = (a, b) if is_transposed else (b.T, a.T)
        update = low_rank(name, shape, up, down, self.scale, where)
        return update if m is None else self._decomposed(where, update, m, linear, is_transposed)

    def _decomposed(
        self, where: str, update: LowRank, m: Array, linear: tuple[int, int], is_transposed: bool
    ) -> Decomposed:
        """``m / norm`` for each output of a linear layer, or each row of an embedding; the norm has no epsilon."""
        by_column = is_transposed and m.shape == (linear[0],)
        if not by_column and m.shape != update.shape[:1]:
            raise SourceError(f"{where}: m has shape {list(m.shape)}, the weight {list(update.shape)}")
        return Decomposed(update, self.base, m.astype(update.dtype), by_column=by_column)

    def _check_rank(self, where: str, *ranks: int) -> None:
        if set(ranks) != {self.rank}:
            raise SourceError(
                f"{where}: should have rank {self.rank} by {CONFIG}, lora_a has {ranks[0]} and lora_b {ranks[1]}"
            )

    def _check_base(self, name: str) -> None:
        stem = name.removesuffix("weight")
        if f"{stem}scales" in self.base:
            raise SourceError(
                f"{self.base.path}: {name!r} is quantised by MLX: the base must be the float model that it was quantised from"
            )
        if name.endswith("lm_head.weight") and self._normalises_head():
            raise SourceError(
                f"{self.path}: mlx-lm normalises {name!r} of this model on loading, so the update is not one of the base's "
                "weight"
            )

    def _normalises_head(self) -> bool:
        """Whether mlx-lm normalises ``lm_head``: Baichuan-M1, and Bailing (Ling) with ``norm_head``."""
        path = None if self.base.folder is None else self.base.folder / MODEL_CONFIG
        if path is None or not is_file(path):
            return False
        config = read_json(path)
        return bool(config.get("norm_head")) or str(config.get("model_type")).startswith("baichuan")

    def _has_conv1d(self) -> bool:
        """Whether some weight of the base has the length of its bias as columns, not as rows."""
        for name in self.base:
            bias = f"{name.removesuffix('weight')}bias"
            if name.endswith(".weight") and bias in self.base and len(shape := self.base.shape(name)) == 2:
                length = self.base.shape(bias)
                if length == shape[1:] and length != shape[:1]:
                    return True
        return False


def _kind(config: Mapping[str, Any], where: Path) -> str:
    # Before October 2024 the option was use_dora.
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind == "full":
        raise SourceError(
            f"{where}: fine_tune_type is 'full': these are whole weights, not a LoRA; fuse them into the model with "
            "mlx_lm.fuse and convert that as a full fine-tune (full_to_shira)"
        )
    if kind not in ("lora", "dora"):
        raise SourceError(f"{where}: fine_tune_type is {kind!r}, not 'lora' or 'dora'")
    return str(kind)


def _parameters(config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    """Rank and scale. There are no defaults: mlx-lm refuses an adapter without them, too."""
    found = config.get("lora_parameters")
    if not isinstance(found, dict) or not is_rank(found.get("rank")) or not is_number(found.get("scale")):
        raise SourceError(f"{where}: lora_parameters must have a rank, a positive integer, and a scale, a number")
    rank, scale, alpha = found["rank"], float(found["scale"]), found.get("alpha", found["rank"])
    # Before June 2024 the scale was scale * alpha / rank. alpha is ignored since, but was written until 2025. Files from
    # before October 2024 have lora_layers instead of num_layers, so these may be from before or after June.
    if "lora_layers" in config and "num_layers" not in config and alpha != rank:
        raise SourceError(
            f"{where}: lora_parameters has alpha {alpha!r}, which mlx-lm multiplied into the scale (scale * alpha / rank) "
            "until June 2024 and has ignored since; the file may be from before or after. If it is from after, remove alpha "
            "from lora_parameters; if it is from before, also multiply scale by alpha / rank"
        )
    return rank, scale


def _experts(parts: Mapping[str, Array]) -> int | None:
    """Number of experts; None if the module is no layer of experts."""
    b = parts["lora_b"]
    return int(b.shape[0]) if b.ndim == 3 else None


def _stacked(module: str, _: int | None) -> list[str]:
    """As mlx-lm stores them: one weight for all experts."""
    return [f"{module}.weight"]


def _separate(projections: Mapping[str, str]) -> _Naming:
    """As Hugging Face stores them: one weight per expert."""

    def naming(module: str, experts: int | None) -> list[str]:
        match = _EXPERTS.fullmatch(module)
        if experts is None or match is None:
            return [f"{module}.weight"]
        projection = projections.get(match["projection"], match["projection"])
        return [f"{match['parent']}.experts.{e}.{projection}.weight" for e in range(experts)]

    return naming


def _following(names: list[str]) -> str:
    """The name that a next expert's weight would have."""
    return re.sub(rf"\.experts\.{len(names) - 1}\.", f".experts.{len(names)}.", names[-1])
