"""LoRAs of many dialects with their configurations: names, shapes, ranks and options that contradict each other, patterns of a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz import safetensors
from fuzz.mutate import mutated_json, text
from fuzz.oracle import Violation, aside
from shira_format.convert import lora_to_shira
from shira_format.errors import ShiraError
from shira_format.format import load

BASE, LORA, OUT = "base.safetensors", "lora", "adapter.st"
_MODULES = {
    "model.embed_tokens": (12, 8), "model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.self_attn.k_proj": (4, 8),
    "model.layers.0.mlp.up_proj": (16, 8), "model.layers.1.self_attn.q_proj": (8, 8), "model.layers.1.mlp.down_proj": (8, 16),
    "lm_head": (12, 8),
}  # fmt: skip
_ATOMS = [
    "q_proj",
    "self_attn",
    "layers",
    "0",
    "1",
    ".",
    r"\.",
    "[0-9]",
    r"\d",
    r"\w",
    "[a-z_]",
    "[^.]",
    "a",
    "^",
    "$",
    r"\b",
    "(?=q)",
    "model",
    "proj",
]
_TYPES = [
    "LORA", "LORA", "LORA", "LOHA", "LOKR", "IA3", "ADALORA", "VERA", "OFT", "BOFT", "HRA", "FOURIERFT", "C3A", "LN_TUNING", "MISS",
    "SHIRA", "ROAD", "RANDLORA", "DELORA", "TRAINABLE_TOKENS", "XLORA", "nonsense",
]  # fmt: skip
_KEYS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save",
    "target_parameters", "layer_replication", "trainable_token_indices", "init_lora_weights", "peft_type", "target_modules", "alpha",
    "decompose_both", "feedforward_modules", "n_frequency", "oft_block_size", "block_size", "base_model_name_or_path", "use_qalora",
]  # fmt: skip


def pattern(random: Random, depth: int = 3) -> str:
    """A regular expression of a grammar, some of which would take a backtracking matcher for ever."""
    kind = random.choice(["atom", "atom", "join", "join", "either", "star", "count"]) if depth else "atom"
    if kind == "join":
        return "".join(pattern(random, depth - 1) for _ in range(random.randint(1, 4)))
    if kind == "either":
        return f"({pattern(random, depth - 1)}|{pattern(random, depth - 1)})"
    if kind == "star":
        return f"({pattern(random, depth - 1)}){random.choice(['*', '+', '?', '*?', '+?'])}"
    if kind == "count":
        return f"(?:{pattern(random, depth - 1)}){{{random.choice(['2', '1,3', '0,40', ',5', '900'])}}}"
    return random.choice(_ATOMS)


def make(random: Random, folder: Path) -> None:
    """A base, and a LoRA of it in some dialect."""
    base = {f"{module}.weight": safetensors.some(random, *shape) for module, shape in _MODULES.items()}
    (folder / BASE).write_bytes(safetensors.content(base))
    (folder / LORA).mkdir()
    _DIALECTS[random.choice(sorted(_DIALECTS))](random, folder / LORA)


def check(folder: Path) -> None:
    """Convert it: there is an adapter that can be read afterwards, or nothing."""
    out = folder / OUT
    out.unlink(missing_ok=True)
    try:
        lora_to_shira(folder / LORA, folder / BASE, out, density=0.5, threads=1)
    except ShiraError as error:
        if sorted(path.name for path in folder.iterdir()) != sorted([BASE, LORA]):
            raise Violation(f"refused, and something was written: {error}") from error
        raise
    with aside():
        adapter = load(out)
        for name in adapter:
            adapter[name].indices.tobytes()


def _chosen(random: Random) -> list[str]:
    return random.sample(sorted(_MODULES), k=random.randint(1, 4))


def _rank(random: Random) -> int:
    return random.choice([1, 2, 2, 2, 4])


def _odd(random: Random, arrays: dict[str, Any]) -> dict[str, Any]:
    """Now and then one tensor fewer, more, of another name or another shape."""
    found = dict(arrays)
    for _ in range(random.choice([0, 0, 0, 0, 0, 1, 2])):
        name = random.choice(sorted(found)) if found else "x"
        how = random.choice(["gone", "renamed", "shape", "more"])
        array = found.pop(name) if how != "more" and found else safetensors.some(random, 2, 8)
        if how == "renamed":
            found[name + text(random, [".default", ".weight", ".0"])] = array
        elif how == "more":
            found[
                text(
                    random,
                    [
                        f"{module}.{key}"
                        for module in _MODULES
                        for key in ("alpha", "lora_A.weight", "diff", "bias")
                    ],
                )
            ] = array
        elif how == "shape":
            found[name] = array.reshape(random.choice([(-1,), (1, -1), (-1, 1), (1, 1, -1)]))
    return {name.encode("utf-8", "replace").decode(): array for name, array in found.items()}


def _peft(random: Random, folder: Path) -> None:
    rank = _rank(random)
    arrays: dict[str, Any] = {}
    tuner = random.choice(["LORA"] * 5 + ["DORA", "LOHA", "LOHA", "LOKR", "IA3", random.choice(_TYPES)])
    for module in _chosen(random):
        kind = tuner if random.random() < 0.97 else random.choice(_TYPES)
        place = f"base_model.model.{module}."
        arrays |= {
            place + part: safetensors.some(random, *shape)
            for part, shape in _parts(kind, rank, *_MODULES[module]).items()
        }
    config: dict[str, Any] = {"peft_type": "LORA" if tuner == "DORA" else tuner, "target_modules": ["q_proj"]}
    if tuner in ("LORA", "DORA", "LOHA", "LOKR"):
        alpha = random.choice([rank, 16, 0.5])
        config |= (
            {"r": rank, "lora_alpha": alpha, "use_dora": tuner == "DORA"}
            if "ORA" in tuner
            else {"r": rank, "alpha": alpha}
        )
        for key in ("rank_pattern", "alpha_pattern"):
            if random.random() < 0.3:
                numbers = [rank, rank, rank, 1, 4] if key == "rank_pattern" else [1, 2, 0.5, 16]
                config[key] = {
                    pattern(random): random.choice(numbers) for _ in range(random.choice([1, 1, 2, 40]))
                }
    if random.random() < 0.3:
        config["target_modules"] = pattern(random)
    if random.random() < 0.25:
        config = mutated_json(
            random, config, _KEYS, [pattern(random), {pattern(random): 2}, [[0, 2]], True, "all", "pissa"]
        )
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "adapter_model.safetensors").write_bytes(
        safetensors.damaged(random, _odd(random, arrays), {"format": "pt"})
    )


def _parts(kind: str, rank: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer by a tuner, and their shapes."""
    pair: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
    known: dict[str, dict[str, tuple[int, ...]]] = {
        "LORA": pair if (rows, columns) != _MODULES["model.embed_tokens"] else {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)},
        "DORA": pair | {"lora_magnitude_vector": (rows,)}, "IA3": {"ia3_l": (rows, 1)}, "HRA": {"hra_u": (columns, rank)},
        "LOHA": {"hada_w1_a": (rows, rank), "hada_w1_b": (rank, columns), "hada_w2_a": (rows, rank), "hada_w2_b": (rank, columns)},
        "LOKR": {"lokr_w1": (2, 2), "lokr_w2": (rows // 2, columns // 2)}, "OFT": {"oft_R.weight": (columns // rank, rank * (rank - 1) // 2)},
        "MISS": {"miss_block": (rank, rows)}, "ROAD": {"road_theta": (rows,), "road_alpha": (rows,)}, "LN_TUNING": {"weight": (rows,)},
        "ADALORA": {"lora_A": (rank, columns), "lora_B": (rows, rank), "lora_E": (rank, 1), "ranknum": ()}, "FOURIERFT": {"fourierft_spectrum": (rank,)},
        "C3A": {"c3a_kernel": (rows // 4, columns // 4, 4)}, "DELORA": {"delora_A": (rank, columns), "delora_B": (rows, rank), "delora_lambda": (1,)},
    }  # fmt: skip
    return known.get(kind, pair)


def _pairs(random: Random, down: str, up: str, name: Callable[[str], str], more: Callable[[str, int], dict[str, Any]] | None = None, *, turned: bool = False) -> dict[str, Any]:  # fmt: skip
    rank = 2 if random.random() < 0.8 else _rank(random)
    arrays: dict[str, Any] = {}
    for module in _chosen(random):
        rows, columns = _MODULES[module]
        shapes = ((columns, rank), (rank, rows)) if turned else ((rank, columns), (rows, rank))
        arrays[name(module) + down], arrays[name(module) + up] = (
            safetensors.some(random, *shape) for shape in shapes
        )
        arrays |= {} if more is None else more(name(module), rank)
    return _odd(random, arrays)


def _kohya(random: Random, folder: Path) -> None:
    prefix = random.choice(["lora_unet_", "lora_te_", "lycoris_", "lora_te1_"])

    def more(name: str, rank: int) -> dict[str, Any]:
        found = {f"{name}.alpha": safetensors.some(random)} if random.random() < 0.8 else {}
        kind = random.choice(
            [*[""] * 8, "dora_scale", "lora_mid.weight", "hada_w1_a", "lokr_w1", "oft_blocks", "diff", "scalar"]
        )
        return found | ({f"{name}.{kind}": safetensors.some(random, rank, random.choice([1, 8]))} if kind else {})

    arrays = _pairs(
        random, ".lora_down.weight", ".lora_up.weight", lambda module: prefix + module.replace(".", "_"), more
    )
    metadata = {
        "ss_network_dim": text(random, ["2"]),
        "ss_network_args": json.dumps({"algo": text(random, ["lora", "loha"])}),
    }
    metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    (folder / "kohya.safetensors").write_bytes(safetensors.damaged(random, arrays, metadata))


def _diffusers(random: Random, folder: Path) -> None:
    prefix = random.choice(["unet.", "transformer.", "text_encoder.", ""])
    endings = random.choice(
        [
            (".lora_A.weight", ".lora_B.weight"),
            (".lora.down.weight", ".lora.up.weight"),
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ]
    )
    arrays = _pairs(random, *endings, lambda module: prefix + module)
    config: dict[str, Any] = {
        f"{prefix}r": 2,
        f"{prefix}lora_alpha": 4,
        f"{prefix}rank_pattern": {pattern(random): 2},
    }
    if random.random() < 0.4:
        config = mutated_json(random, config, ["transformer.r", "unet.alpha_pattern"], [{pattern(random): 2}, 2])
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(
        safetensors.damaged(
            random, arrays, {"lora_adapter_metadata": json.dumps(config)} if random.random() < 0.7 else None
        )
    )


def _mlx(random: Random, folder: Path) -> None:
    arrays = _pairs(random, ".lora_a", ".lora_b", lambda module: module, turned=True)
    config: Any = {
        "fine_tune_type": random.choice(["lora", "lora", "lora", "dora", "full"]),
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["q_proj"]},
        "num_layers": 2,
    }
    if random.random() < 0.4:
        config = mutated_json(random, config, ["rank", "scale", "num_layers", "lora_layers"], [2, 0.5])
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "adapters.safetensors").write_bytes(safetensors.damaged(random, arrays))


def _bare(random: Random, folder: Path) -> None:
    style = random.choice(["xlabs", "torchtune", "processor"])
    if style == "torchtune":
        arrays = _pairs(
            random,
            ".lora_a.weight",
            ".lora_b.weight",
            lambda module: module.replace("model.", "").replace("self_attn", "attn"),
        )
        config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(
            json.dumps(mutated_json(random, config, _KEYS) if random.random() < 0.3 else config), "utf-8"
        )
    else:
        place = (
            "double_blocks.0.processor.qkv_lora1" if style == "xlabs" else "unet.down_blocks.0.processor.to_q_lora"
        )
        arrays = _pairs(random, ".down.weight", ".up.weight", lambda module: f"{place}.{module}")
    (folder / ("adapter_0.safetensors" if style == "torchtune" else "lora.safetensors")).write_bytes(
        safetensors.damaged(random, arrays)
    )


_DIALECTS: dict[str, Callable[[Random, Path], None]] = {
    "peft": _peft, "peft again": _peft, "kohya": _kohya, "diffusers": _diffusers, "mlx": _mlx, "bare": _bare,
}  # fmt: skip
