"""kohya's LoRA: ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`` and the like, in one file.

The rules are those of ``networks/lora.py`` (kohya-ss/sd-scripts): ``delta W = alpha / rank * up @ down``, where the rank is
that of the layer's ``lora_down``, and alpha is the rank if it is 0 or missing. Other programs (OneTrainer, ComfyUI, the
authors of few-step LoRAs) write the same parts behind other prefixes, or behind names with dots. Rank and alpha in the header
are the trainer's arguments, and are kept as provenance only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Lora
from shira_format.lora.keyed import Groups, Scale, Scaling, dialect_of, read_keyed

# Keys of the header that go into the provenance.
_HEADER = ("ss_network_dim", "ss_network_alpha", "ss_base_model_version")
_MOST_SHOWN = 80  # characters of a header's value


class Kohya:
    """Files of kohya's sd-scripts, and of programs that follow it."""

    name = "kohya"

    def recognises(self, path: Path) -> bool:
        return dialect_of(path) == self.name

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        return read_keyed(path, base, self.name, prefix, scaling=WithHeader())


class WithHeader(Scaling):
    """kohya's rule, and the trainer's arguments as provenance."""

    def __init__(self) -> None:
        self._header: dict[str, str] = {}

    def of_components(self, components: Mapping[str, Groups], tensors: Checkpoint, path: Path) -> dict[str, Scale]:
        self._header = tensors.metadata(path.name)
        return super().of_components(components, tensors, path)

    def source(self) -> dict[str, Any]:
        """Only short and printable text, since it comes from others."""
        found = {key: self._header.get(key) for key in _HEADER}
        return {
            key: value
            for key, value in found.items()
            if isinstance(value, str) and 0 < len(value) <= _MOST_SHOWN and value.isprintable()
        }
