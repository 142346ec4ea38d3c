"""The exceptions of this package: one small hierarchy, each message one line that names file, tensor and rule."""

from __future__ import annotations

from pathlib import Path


class ShiraError(Exception):
    """Base class of all errors that this package raises about its inputs."""


class FormatError(ShiraError, ValueError):
    """An adapter file, or an adapter that is to be written, breaks a rule of the format.

    Attributes:
        rule: the rule's name as in section 10 of ``spec/SPEC.md``, for example ``"out-of-range"``.
        reason: what is wrong, in words.
        file: the file, if known.
        tensor: the tensor or stream, if the rule is about one.
    """

    def __init__(self, rule: str, reason: str, *, file: Path | None = None, tensor: str | None = None) -> None:
        super().__init__(rule, reason)
        self.rule = rule
        self.reason = reason
        self.file = file
        self.tensor = tensor

    def at(self, *, file: Path | None = None, tensor: str | None = None) -> FormatError:
        """Add the file and the tensor where they are not yet set; returns the error itself."""
        self.file = self.file or file
        self.tensor = self.tensor or tensor
        return self

    def __str__(self) -> str:
        where = [str(self.file)] if self.file else []
        where += [f"tensor {self.tensor!r}"] if self.tensor else []
        return ": ".join([*where, f"{self.reason} (rule: {self.rule})"])


class SourceError(ShiraError):
    """A LoRA, a checkpoint or another input cannot be converted; nothing was written."""


class WorkError(ShiraError):
    """A conversion cannot continue: unusable saved parts, a cluster that fails; nothing was written."""


class BaseMismatch(ShiraError):
    """The base is not the one that the adapter was made for; no weight was changed.

    Attributes:
        rule: as for :class:`FormatError`.
    """

    rule = "base-mismatch"


class BaseRequired(ShiraError):
    """Deltas of target values need the base values, which are neither in the file nor given."""
