"""NeuroAda: the same number of entries for each neuron (arXiv 2510.18940; github.com/FightingFighting/NeuroAda)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shira_format.masks.wm import WM


@dataclass(frozen=True)
class NeuroAda(WM):
    """The largest ``|w|`` of each output's incoming weights; any other rule does the same with the scope ``"row"``."""

    name: ClassVar[str] = "neuroada"
    scope: ClassVar[str | None] = "row"
