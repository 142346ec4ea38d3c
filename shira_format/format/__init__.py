"""Adapter files: reading (mapped, lazy) and writing (streamed, atomic), both checked by every rule of the spec."""

from __future__ import annotations

from shira_format.format.reader import AdapterFile, load
from shira_format.format.writer import AdapterWriter, Prepared, save

__all__ = ["AdapterFile", "AdapterWriter", "Prepared", "load", "save"]
