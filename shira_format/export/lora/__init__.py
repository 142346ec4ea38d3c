"""The best low-rank approximation of an adapter, as a LoRA in PEFT's own format.

A LoRA of rank r can hold no more of an adapter than its r largest singular triplets (Eckart and Young; lemma 4.2 of the paper),
and ``shira_to_lora`` writes these: for programs that load LoRAs alone, and to see what a low rank would have cost. For each
weight:

* S is what the adapter adds, at its strength alpha: target - base in the working type, as a matrix ``[shape[0], all others]``.
* ``lora_B @ lora_A`` is the nearest matrix to S of the rank asked for, or of the least rank that keeps the energy asked for. The
  factors are float32, singular values shared evenly, scale 1: ``lora_alpha`` is the rank, also by ``alpha_pattern``.
* Weights whose update is zero are left out. Tensors that a LoRA cannot hold go to ``modules_to_save`` where PEFT can replace
  their module; whatever cannot be held is refused before anything is computed (:mod:`shira_format.export.lora.plan`).
"""

from __future__ import annotations

from shira_format.export.lora.export import shira_to_lora
from shira_format.export.lora.factors import Factors, best_factors
from shira_format.export.lora.plan import EMBEDDING
from shira_format.export.lora.report import LayerReport, LoraReport

__all__ = ["EMBEDDING", "Factors", "LayerReport", "LoraReport", "best_factors", "shira_to_lora"]
