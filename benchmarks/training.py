"""A training step of each method, with as many trained parameters: its time and its peak of memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.apart import Run, apart
from benchmarks.table import Row

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Ours, and what is demanded of its step time and peak of memory, as shares of those of a LoRA.
OURS = {"sparse": (0.9, 0.8), "runs": (0.8, 0.8), "rows": (0.8, 0.8), "columns": (0.8, 0.8), "hook": None}
PEERS = {
    "lora": "PEFT's LoRA", "dora": "PEFT's DoRA", "miss": "PEFT's MiSS", "peft shira": "PEFT's SHiRA", "full": "full fine-tuning",
    "frozen": "the frozen model",
}  # fmt: skip
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What a step is.

    Attributes:
        hidden: width of the model.
        layers: its blocks.
        batch: texts.
        tokens: of each text.
        rank: of the LoRA; all others have as many parameters, but for MiSS and full fine-tuning.
        dtype: of the model and of all that is trained.
        steps: that are timed.
    """

    hidden: int = 1024
    layers: int = 8
    batch: int = 4
    tokens: int = 256
    rank: int = 8
    dtype: str = "float32"
    steps: int = 5


def rows(*, quick: bool, methods: tuple[str, ...] = (*OURS, *PEERS)) -> Iterator[Row]:
    """Two rows, time and memory, for each of ours beside the LoRA, and for our unstructured mask beside each peer."""
    small = {"hidden": 256, "layers": 2, "batch": 2, "tokens": 64, "steps": 2} if quick else {}
    for dtype in ("float32", "bfloat16"):
        for rank in (8,) if quick else (8, 32):
            setting = Setting(**small, rank=rank, dtype=dtype)
            found = {method: apart("train", method=method, setting=asdict(setting)) for method in methods}
            where = f"{'fp32' if dtype == 'float32' else 'bf16'}, r {rank}"
            yield from _rows(found, where, quick=quick)


def _rows(found: dict[str, Run], where: str, *, quick: bool) -> Iterator[Row]:
    pairs = [(ours, "lora") for ours in OURS if ours in found]
    pairs += [("sparse", peer) for peer in PEERS if peer != "lora" and peer in found]
    for ours, peer in pairs:
        mine, theirs = found[ours], found[peer]
        limits = OURS[ours] if peer == "lora" and not quick else None
        for what, a, b, unit, place in (
            ("step", mine.seconds, theirs.seconds, "s", 0),
            ("peak", mine.peak / 2**20, theirs.peak / 2**20, "MiB", 1),
        ):
            demand = "" if limits is None else f"<= {limits[place]} x"
            met = None if limits is None else a <= limits[place] * b
            yield Row(f"training {what}, {where}: {ours}", a, b, unit, PEERS[peer], demand, met)


def train(clock: Any, method: str, setting: dict[str, Any]) -> None:
    """One process: a step to warm up, which makes the optimizer's state, and then steps under the clock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of = Setting(**setting)
        model, parameters = made(method, of)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        inputs = torch.randint(0, 1000, (of.batch, of.tokens), generator=torch.Generator().manual_seed(SEED))

        def step() -> None:
            model(input_ids=inputs, labels=inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        _trim()
        with clock:
            for _ in range(of.steps):
                step()
    clock.seconds /= of.steps


def _trim() -> None:
    """Give memory that making model and mask took back to the system, where it can be given back: it is not the step's."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def made(method: str, of: Setting) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model under one method, and what is trained."""
    model = _model(of)
    if method == "full":
        names = [f"{target}.weight" for target in TARGETS]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(tuple(names)))
    elif method in OURS:
        return model, _ours(model, method, of.rank)
    elif method == "frozen":
        return model, _nothing(model)
    else:
        model = _peft(model, method, of)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _nothing(model: Any) -> list[torch.nn.Parameter]:
    """Gradients go back as far as any method of these needs them, to what the first layer's projections give, and to no weight."""
    model.requires_grad_(False)
    for target in TARGETS[:3]:
        module = model.get_submodule(f"model.layers.0.self_attn.{target}")
        module.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    return [torch.nn.Parameter(torch.zeros(1))]


def _model(of: Setting) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=of.hidden, num_hidden_layers=of.layers, num_attention_heads=of.hidden // 64,
        num_key_value_heads=of.hidden // 64, intermediate_size=of.hidden * 11 // 4, max_position_embeddings=of.tokens, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, of.dtype)).train()


def _ours(model: Any, method: str, rank: int) -> list[torch.nn.Parameter]:
    from shira_format.masks import Struct, make_mask
    from shira_format.training.hook import attach
    from shira_format.training.sparse import sparse_parameters

    include = [rf"{target}\.weight$" for target in TARGETS]
    rule: Any = (
        Struct(method, diagonal=None) if method in {"rows", "columns"} else "wm" if method == "runs" else "rand"
    )
    mask = make_mask(model, rule, rank=rank, include=include, runs=16 if method == "runs" else 1)
    trained = attach(model, mask) if method == "hook" else sparse_parameters(model, mask)
    return trained.parameters()


def _peft(model: Any, method: str, of: Setting) -> Any:
    import peft

    configs = {
        "lora": lambda: peft.LoraConfig(r=of.rank, target_modules=TARGETS),
        "dora": lambda: peft.LoraConfig(r=of.rank, target_modules=TARGETS, use_dora=True),
        # One factor of r x out_features: twice the rank has about as many parameters as a LoRA.
        "miss": lambda: peft.MissConfig(r=2 * of.rank, target_modules=TARGETS),
        "peft shira": lambda: peft.ShiraConfig(r=of.rank, target_modules=TARGETS, random_seed=SEED),
    }
    found = peft.get_peft_model(model, configs[method](), autocast_adapter_dtype=False)
    return found.train()
