"""The live model that a fit runs: loaded from the base's folder, with the head that the source brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shira_format.convert.fit import outputs
from shira_format.convert.fit.sources import whole_tensors
from shira_format.convert.fit.task import Outputs
from shira_format.convert.inputs import ConversionInputs
from shira_format.errors import SourceError
from shira_format.lora.files import read_json
from shira_format.training.models import load_live_model

Kind = Literal["classifier", "causal", "embedding", "states"]
KINDS: tuple[Kind, ...] = ("classifier", "causal", "embedding", "states")
_OUTPUTS = {
    "classifier": outputs.logits,
    "causal": outputs.logits,
    "embedding": outputs.embeddings,
    "states": outputs.states,
}


@dataclass(frozen=True)
class LiveModel:
    """A model to fit with.

    Attributes:
        model: the base; it is as before when a fit ends.
        tokenizer: for texts; None: batches or arrays are given.
        outputs: what counts of an output.
        is_logits: whether these are logits.
        is_causal: whether these are a language model's, of the next token: it can write texts of its own.
        longest: tokens of a text at most; None if it is not known.
    """

    model: nn.Module
    tokenizer: Any = None
    outputs: Outputs = outputs.states
    is_logits: bool = False
    is_causal: bool = False
    longest: int | None = None


def load_base(inputs: ConversionInputs, kind: Kind | None = None) -> LiveModel:
    """Load the base with transformers, in float32.

    Args:
        inputs: of the conversion: its base, and a head that the source brings, which tells how many classes there are.
        kind: what is compared: the logits of a classifier or of a causal language model, embeddings (the mean of the last hidden
            states over a text's tokens), or the last hidden states; by default what the head or the base's configuration says.

    Raises:
        SourceError: transformers cannot load it, or weights of the model are in neither base nor source.
    """
    path = inputs.base.path
    base = path if path.is_dir() or path.suffix.lower() == ".gguf" else inputs.base.folder or path.parent
    whole = whole_tensors(inputs)
    heads = [values.shape[0] for name, values in whole.items() if name not in inputs.base and values.ndim == 2]
    kind = kind or _kind(base, has_head=bool(heads))
    if kind not in KINDS:
        raise SourceError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    more = {"num_labels": heads[-1]} if kind == "classifier" and heads else {}
    top: Any = "encoder" if kind in ("embedding", "states") else kind
    loaded = load_live_model(base, top, dtype=torch.float32, **more)
    if missing := [
        name for name in loaded.new if not any(name.endswith(end) or end.endswith(name) for end in whole)
    ]:
        raise SourceError(
            f"{base}: {missing[0]} of the model is neither in the base nor in the source: it would be random"
        )
    return LiveModel(
        loaded.model.eval(), loaded.tokenizer, _OUTPUTS[kind], kind in ("classifier", "causal"), kind == "causal", loaded.longest
    )  # fmt: skip


def _kind(base: Path, has_head: bool) -> Kind:
    if has_head:
        return "classifier"
    config = base / "config.json"
    if base.suffix.lower() == ".gguf" or not config.is_file():
        return "causal"
    found = read_json(config).get("architectures")
    names = found if isinstance(found, list) and found else [""]
    if str(names[0]).endswith("ForSequenceClassification"):
        return "classifier"
    return "causal" if str(names[0]).endswith(("ForCausalLM", "LMHeadModel")) else "embedding"
