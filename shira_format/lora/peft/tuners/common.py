"""What the tuners share: the layers of an adapter, as the reader hands them over, and what they make of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.files import is_number, is_rank
from shira_format.lora.peft.end_patterns import EndPatterns
from shira_format.names.patterns import Pattern, PatternError


@dataclass(frozen=True)
class Options:
    """The options of an adapter.

    Attributes:
        path: of ``adapter_config.json``.
        raw: its content.
    """

    path: Path
    raw: Mapping[str, Any]
    _patterns: dict[str, EndPatterns] = field(default_factory=dict, init=False, repr=False, compare=False)
    _compiled: dict[str, Pattern] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, option: str) -> Any:
        return self.raw.get(option)

    def flag(self, option: str, default: bool = False) -> bool:
        """An option that is true or false.

        Raises:
            SourceError: it is neither.
        """
        value = self.raw.get(option, default)
        if not isinstance(value, bool):
            raise SourceError(f"{self.path}: {option} must be true or false, not {value!r}")
        return value

    def number(self, option: str) -> float:
        """An option that is a number.

        Raises:
            SourceError: it is missing or not finite.
        """
        value = self.raw.get(option)
        if not is_number(value):
            raise SourceError(f"{self.path}: {option} must be a number, not {value!r}")
        return float(value)  # type: ignore[arg-type]

    def size(self, option: str) -> int:
        """An option that is a positive integer.

        Raises:
            SourceError: it is not.
        """
        value = self.raw.get(option)
        if not is_rank(value):
            raise SourceError(f"{self.path}: {option} must be a positive integer, not {value!r}")
        return int(value)  # type: ignore[arg-type]

    def rank(self, module: str) -> int:
        """The rank of a module: ``r``, or what ``rank_pattern`` says.

        Raises:
            SourceError: it is no positive integer.
        """
        found = self.by_pattern("rank_pattern", module, self.size("r"))
        if found != int(found) or found < 1:
            raise SourceError(
                f"{self.path}: the rank of {module} must be a positive integer, not {found:g} by rank_pattern"
            )
        return int(found)

    def by_pattern(self, option: str, module: str, default: float, *, after_dot: bool = False) -> float:
        """See :class:`shira_format.lora.peft.end_patterns.EndPatterns`.

        Raises:
            SourceError: the option is no such map.
        """
        if option not in self._patterns:
            self._patterns[option] = self._read_patterns(option, after_dot)
        return self._patterns[option].number(module, default)

    def _read_patterns(self, option: str, after_dot: bool) -> EndPatterns:
        patterns = self.raw.get(option) or {}
        if not isinstance(patterns, dict) or not all(map(is_number, patterns.values())):
            raise SourceError(f"{self.path}: {option} must map module names to numbers")
        return EndPatterns(self.path, option, patterns, after_dot=after_dot)

    def fullmatches(self, option: str, text: str, module: str) -> bool:
        """Whether the regular expression of an option matches the name of a module.

        Raises:
            SourceError: it is none, or not supported.
        """
        try:
            if option not in self._compiled:
                self._compiled[option] = Pattern(text)
            return self._compiled[option].fullmatch(module)
        except PatternError as error:
            raise SourceError(f"{self.path}: {option} {text[:200]!r}: {error}") from None

    @property
    def version(self) -> tuple[int, int] | None:
        """Of PEFT that wrote the file, which records it since 0.18."""
        match = re.match(r"(\d+)\.(\d+)", str(self["peft_version"] or ""))
        return None if match is None else (int(match[1]), int(match[2]))


@dataclass(frozen=True)
class TunerLayer:
    """One adapted layer.

    Attributes:
        where: file and module, for messages.
        module: its name in the trained model.
        parts: its tensors by PEFT's name.
        shared: the adapter's tensors that belong to no layer.
        name: of the weight in the base.
        shape: of the weight.
        bias: the name that the bias has, if the base has it.
        base: the checkpoint.
        options: of the adapter.
        turned: whether the base certainly holds other weights as ``[in, out]``.
    """

    where: str
    module: str
    parts: Mapping[str, Array]
    shared: Mapping[str, Array]
    name: str
    shape: tuple[int, ...]
    bias: str
    base: Checkpoint
    options: Options
    turned: bool

    def part(self, name: str, dimensions: int) -> Array:
        """A part that must be there.

        Raises:
            SourceError: it is not, or has another number of dimensions.
        """
        if name not in self.parts:
            raise SourceError(f"{self.where} has {', '.join(sorted(self.parts))} without {name}")
        found = self.parts[name]
        if found.ndim != dimensions:
            raise SourceError(f"{self.where}: {name} has shape {list(found.shape)}, not {dimensions} dimensions")
        return found

    def misfit(self, made: object) -> SourceError:
        """That the layer's tensors do not fit the weight; ``made`` says what they change."""
        return SourceError(f"{self.where}: changes {made}, the base's {self.name!r} has shape {list(self.shape)}")

    def is_transposed(self, outputs: int, inputs: int) -> bool:
        """Whether the base holds the weight as ``[in, out]`` (transformers' ``Conv1D``).

        The shape decides, or for a square weight ``fan_in_fan_out``, which PEFT corrects by the layer's class.

        Raises:
            SourceError: the weight has another shape, or how a square weight is stored is not certain.
        """
        wanted = (outputs, inputs)
        if self.shape not in (wanted, wanted[::-1]):
            raise self.misfit(f"a weight of shape {list(wanted)}")
        if outputs != inputs:
            return self.shape != wanted
        stored = self.options.flag("fan_in_fan_out")
        if stored != self.turned:
            raise SourceError(
                f"{self.where}: changes a square weight, fan_in_fan_out is {stored}, and other weights of the base contradict "
                "that (Conv1D or Linear): how this one is stored is unknown; set fan_in_fan_out to what is true of it"
            )
        return stored


@dataclass(frozen=True)
class Effect:
    """What a layer changes.

    Attributes:
        update: of its weight.
        bias: addition to its bias.
        whole: new values of its parameters, by their names in the module.
    """

    update: Update | None = None
    bias: Array | None = None
    whole: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuner:
    """A kind of adapter.

    Attributes:
        parts: what a layer's keys end in, after the module's name.
        effect: what a layer changes; raises SourceError if its tensors or options do not fit.
        options: those that ``effect`` reads.
        harmless: those that only matter in training, or that the tensors' shapes show, too.
        refused: why some options, if set, are not supported.
        shared: names of tensors that belong to no layer.
        check: raises SourceError if the options are not supported.
        trains_rows: whether rows of embeddings are trained, which change a tied head, too.
    """

    parts: tuple[str, ...]
    effect: Callable[[TunerLayer], Effect]
    options: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset(("init_weights",))
    refused: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    check: Callable[[Options], None] | None = None
    trains_rows: bool = False
