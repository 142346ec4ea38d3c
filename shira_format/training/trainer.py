"""Checkpoints of transformers' Trainer, and of trainers made from it, that hold the adapter and not the model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.training.sparse import SparseParameters, take_adapter
from shira_format.training.state import load_resumable
from shira_format.training.trained import training_of

ADAPTER = "adapter.st"


def adapter_trainer(trainer: type | None = None) -> Any:
    """A subclass of a trainer whose checkpoints are adapter files, with what resuming needs beside them.

    ``resume_from_checkpoint`` and ``load_best_model_at_end`` work as ever; the model must be the base under
    :func:`shira_format.training.sparse.sparse_parameters` with the same mask.

    Args:
        trainer: a class made from transformers' ``Trainer`` (the default), such as TRL's ``SFTTrainer``.

    Raises:
        SourceError: transformers is not installed.

    Example:
        >>> training = sparse_parameters(model, "mask.st")
        >>> adapter_trainer()(model, arguments, train_dataset=texts).train()
    """
    if trainer is None:
        with optional_import("transformers' Trainer needs transformers and accelerate", "train"):
            import accelerate  # noqa: F401
            from transformers import Trainer
        trainer = Trainer
    return _made(trainer)


@cache
def _made(trainer: Any) -> Any:
    class AdapterTrainer(trainer):  # type: ignore[misc]
        """Saves and loads the adapter in place of the model."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            _under_training(self.model).save_state(folder / ADAPTER)
            if (tokenizer := getattr(self, "processing_class", None)) is not None:
                tokenizer.save_pretrained(folder)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_checkpoint(model or self.model, Path(resume_from_checkpoint))

        def _load_best_model(self) -> None:
            load_checkpoint(self.model, Path(self.state.best_model_checkpoint))

    return AdapterTrainer


def load_checkpoint(model: nn.Module, folder: Path) -> None:
    """Put the adapter of a checkpoint into a model under training.

    Raises:
        SourceError: the folder has none, or of another mask.
    """
    path = folder / ADAPTER
    if not path.is_file():
        raise SourceError(f"{folder}: has no {ADAPTER}, which checkpoints of this trainer have")
    take_adapter(_under_training(model), *load_resumable(path))


def _under_training(model: Any) -> SparseParameters:
    found = training_of(model)
    if not isinstance(found, SparseParameters):
        raise SourceError("the model is not under sparse_parameters, whose adapter this trainer saves")
    return found
