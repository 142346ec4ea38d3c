"""Masks: which entries of a model's weights an adapter may change, by the rules of the SHiRA paper and of later ones.

>>> import shira_format as shira
>>> from shira_format.masks import Struct, difference
>>> mask = shira.make_mask("my-model", "wm", density=0.01)
>>> shira.save(mask, "mask.st")
>>> rows = shira.make_mask("my-model", Struct("rows", offset=1), rank=8)
>>> other = difference(mask, rows)

A rule is a small class in a file of its own, with a line in :mod:`shira_format.masks.registry`.
"""

from shira_format.masks.algebra import difference, intersection, union
from shira_format.masks.base import PlacedRule, Rule, ScoredRule
from shira_format.masks.gallop import Gallop
from shira_format.masks.given import Given, GradUpdate
from shira_format.masks.grad import Grad
from shira_format.masks.gradients import SummedGradients, sum_gradients
from shira_format.masks.lift import Lift
from shira_format.masks.make import make_mask
from shira_format.masks.neuroada import NeuroAda
from shira_format.masks.peft import peft_mask_fn
from shira_format.masks.rand import Rand
from shira_format.masks.registry import RULES
from shira_format.masks.scores import Scores
from shira_format.masks.size import Size
from shira_format.masks.snip import Snip
from shira_format.masks.struct import Struct
from shira_format.masks.talos import Talos
from shira_format.masks.weights import Weight, weights_of
from shira_format.masks.wm import WM

__all__ = [
    "RULES", "WM", "Gallop", "Given", "Grad", "GradUpdate", "Lift", "NeuroAda", "PlacedRule", "Rand", "Rule", "ScoredRule",
    "Scores", "Size", "Snip", "Struct", "SummedGradients", "Talos", "Weight", "difference", "intersection", "make_mask",
    "peft_mask_fn", "sum_gradients", "union", "weights_of",
]  # fmt: skip
