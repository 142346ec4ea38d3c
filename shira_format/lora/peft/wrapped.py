"""Patterns of ranks and alphas beside names with the words of wrappers."""

from __future__ import annotations

from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.wrapped import UnwrappedCheckpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.config import Scales


def check_patterns(scales: Scales, tensors: Checkpoint, prefix: str) -> None:
    """Refuse patterns that a name with the words of wrappers and the name without them match in different ways.

    Which of them PEFT matched depends on whether the model was wrapped before or after PEFT. Words before the prefix are of wrappers
    around PEFT's model, which patterns do not see.

    Args:
        scales: the options.
        tensors: the file.
        prefix: what keys of the model begin with.

    Raises:
        SourceError: there is such a pattern; the message names a module.
    """
    if not isinstance(tensors, UnwrappedCheckpoint):
        return
    for short, key in tensors.names.items():
        if not short.startswith(prefix) or not key.startswith(prefix):
            continue
        module, wrapped = (name.removeprefix(prefix).partition(".lora_")[0] for name in (short, key))
        if scales.scale(module) != scales.scale(wrapped):
            raise SourceError(
                f"{scales.where}: rank_pattern or alpha_pattern gives {wrapped!r}, the name in {tensors.path.name}, another scale than "
                f"{module!r}, the name without words of wrappers: write patterns that match both or neither"
            )
