"""From what people have to an adapter file: LoRAs and full fine-tunes, through one pipeline."""

from __future__ import annotations

from shira_format.convert.exact import Exact
from shira_format.convert.full import FullJob, full_to_shira
from shira_format.convert.lora import LoraJob, lora_to_shira
from shira_format.convert.pipeline import convert, work_of
from shira_format.convert.report import ConversionReport, TensorReport

__all__ = [
    "ConversionReport",
    "Exact",
    "FullJob",
    "LoraJob",
    "TensorReport",
    "convert",
    "full_to_shira",
    "lora_to_shira",
    "work_of",
]
