"""Checkpoints of a PEFT model whose adapter was never merged: base weights and factors under the wrapper's names."""

from __future__ import annotations

import re

from shira_format.checkpoints.base import Checkpoint
from shira_format.errors import SourceError

# What PEFT's wrapper adds to the names of a model's tensors.
_WRAPPER = re.compile(
    r"(^|\.)(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|original_module|"
    r"ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_[RrSs]|vera_lambda_[bd]|shira_(weight|indices))(\.|$)"
)


def refuse_unmerged(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Refuse a PEFT model that was not unloaded; a model that itself has such layers is one in ``other`` too.

    Raises:
        SourceError: the checkpoint has names of PEFT's wrapper that ``other`` lacks.
    """
    found = [name for name in checkpoint if _WRAPPER.search(name) and name not in other]
    if found:
        raise SourceError(
            f"{checkpoint.path}: a PEFT model whose adapter was not merged, with tensors like {found[0]!r}: save what "
            "merge_and_unload() returns, or convert the adapter alone with lora_to_shira"
        )
