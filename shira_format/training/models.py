"""Models to train, from a folder that transformers loads or from a GGUF file; no code in it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shira_format._core.optional import optional_import
from shira_format.calibration.texts import check_regular, silent
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import SourceError

Kind = Literal["classifier", "causal", "encoder"]
_CLASSES = {
    "classifier": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "encoder": "AutoModel",
}


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer and the files that it comes from.

    Attributes:
        model: in the dtype of its files.
        tokenizer: which has a token to pad with.
        checkpoint: the files.
        longest: tokens of a text at most; None if it is not known.
        new: the model's parameters that the files lack, such as a new head.
    """

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint
    longest: int | None
    new: tuple[str, ...]


def load_trained_model(base: Path, labels: Sequence[str], seed: int) -> TrainedModel:
    """Load a classifier of ``labels``, or a causal language model if there are none.

    Args:
        base: a folder, a ``.gguf`` file, or a folder with one of these and nothing else to load.
        labels: of the classifier, whose head is new unless the files have one of as many classes.
        seed: of a new head.

    Raises:
        SourceError: a package is missing, transformers cannot load the files, or weights of the model are missing.
    """
    with optional_import("training needs torch, transformers and accelerate", "train"):
        import accelerate  # noqa: F401 - transformers' Trainer asks for it late
    more: dict[str, Any] = {}
    if labels:
        more = {
            "num_labels": len(labels), "id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True,
            "label2id": {label: number for number, label in enumerate(labels)},
        }  # fmt: skip
    return load_live_model(base, "classifier" if labels else "causal", seed=seed, **more)


def load_live_model(base: Path, kind: Kind, *, dtype: Any = "auto", seed: int = 0, **more: Any) -> TrainedModel:
    """Load a model of one kind; no code in its folder is run, nothing is downloaded.

    Args:
        base: a folder, a ``.gguf`` file, or a folder with one of these and nothing else to load.
        kind: what is on top: a classification head, a language model's, or nothing.
        dtype: of its parameters; by default that of the files.
        seed: of a new head.
        more: for the model's configuration.

    Raises:
        SourceError: a package is missing, transformers cannot load the files, or weights of the model are missing.
    """
    with optional_import("running a model needs torch and transformers", "torch"):
        import torch
        import transformers
    folder, gguf = _place(base)
    if not gguf:
        check_regular(folder)
    options: dict[str, Any] = {"local_files_only": True} | ({"gguf_file": gguf} if gguf else {})
    made = getattr(transformers, _CLASSES[kind])
    with silent(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            torch.manual_seed(seed)
            model, info = made.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options, **more)
        except MemoryError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SourceError(f"{base}: transformers cannot load it: {reason}") from error
    if gguf:
        _dequantised(model)
    new = _new(base, model, info, kind)
    _pad(base, tokenizer, model)
    limits = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
    return TrainedModel(
        model, tokenizer, open_checkpoint(folder / gguf if gguf else base), min(known, default=None), new
    )


def _place(base: Path) -> tuple[Path, str | None]:
    """The folder, and the GGUF file in it that is to be loaded, if one is."""
    if base.suffix.lower() == ".gguf" and base.is_file():
        return base.parent, base.name
    if not base.is_dir():
        raise SourceError(f"{base}: no such folder")
    if (base / "config.json").exists():
        return base, None
    files = sorted(path.name for path in base.iterdir() if path.suffix.lower() == ".gguf")
    if len(files) != 1:
        found = f"has {len(files)} GGUF files: name one" if files else "has neither config.json nor a GGUF file"
        raise SourceError(f"{base}: {found}")
    return base, files[0]


def _new(base: Path, model: Any, info: Any, kind: Kind) -> tuple[str, ...]:
    """The parameters that the files lack; only those of a head may be missing, or of a pooler that nothing is done with."""
    mismatched = [name for name, *_ in info.get("mismatched_keys", ())]
    missing = sorted({*map(str, info["missing_keys"]), *map(str, mismatched)})
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inner = [name for name in missing if name.startswith(prefix)]
    if kind == "encoder":
        missing = [name for name in missing if not name.startswith("pooler.")]
    if (inner or missing) and kind != "classifier":
        raise SourceError(f"{base}: {len(missing)} weights are missing, such as {missing[0]!r}")
    if inner:
        raise SourceError(f"{base}: {len(inner)} weights are missing within the model, such as {inner[0]!r}")
    return tuple(missing)


def _dequantised(model: Any) -> None:
    """Weights of a GGUF file are floats once they are loaded; the model says that it is quantised nevertheless."""
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    model.is_quantized = False
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)


def _pad(base: Path, tokenizer: Any, model: Any) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SourceError(f"{base}: its tokenizer has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
