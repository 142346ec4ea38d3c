"""From LoRAs, full fine-tunes, PEFT's sparse adapters and matrices to adapter files."""

from __future__ import annotations

from shira_format.convert.full import full_to_shira
from shira_format.convert.lora import lora_to_shira
from shira_format.convert.report import ConversionReport, TensorReport

__all__ = ["ConversionReport", "TensorReport", "full_to_shira", "lora_to_shira"]
