"""Which part of a PEFT LoRA each tensor of an adapter becomes, or why none: decided before anything is computed.

PEFT decides by the classes of modules; an adapter's file has only names and shapes. So:

* **Embeddings** are known by their names (:data:`EMBEDDING`, or a regex of the user's).
* **transformers' Conv1D** (GPT-2) stores ``[in, out]``. It always has a bias, of out elements. So a weight whose module has no bias
  in the base is none, and one that is not square tells by the bias's length. Square ones follow the others of the base if
  those agree. Otherwise the user must decide.
* **Convolutions** are the weights of 3 to 5 dimensions. Groups and dilation are not visible.

Decisions without proof are reported in a notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from shira_format._core.dtypes import FLOATS
from shira_format.checkpoints import Checkpoint
from shira_format.entries.base_check import check_frame
from shira_format.errors import SourceError
from shira_format.format.items import SparseEntry
from shira_format.format.manifest import Manifest
from shira_format.names.filters import compiled
from shira_format.names.patterns import PatternError, is_inside_for_peft

Kind = Literal["linear", "conv1d", "conv", "embedding"]

# Names of embeddings in transformers and its ancestors.
EMBEDDING = (
    r"(^|\.)(embed_tokens\w*|embed_in|embed_positions|tok_embeddings|(word|position|token_type|token|tok|pos)_embeddings?"
    r"|wte|wpe|shared|relative_attention_bias|embeddings?)\.weight$"
)
# Embeddings that no head shares.
_UNTIED = re.compile(r"pos|type|wpe|relative")
# Names of Conv1D layers in GPT-2 and similar models; other models use them for Linear layers.
_LIKE_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class LayerPlan:
    """A weight that the LoRA adapts: the adapter's tensor, the live model's module, and what that is."""

    entry: SparseEntry
    module: str
    kind: Kind


@dataclass(frozen=True)
class Saved:
    """A tensor of a module that PEFT replaces as a whole: its name in the live model, and where its values are."""

    name: str
    key: str
    origin: Literal["whole", "sparse", "base"]


@dataclass
class LoraPlan:
    """What the LoRA will hold.

    Attributes:
        layers: the adapted weights; those whose update is zero still drop out.
        saved: the tensors of ``modules_to_save``, by module.
        modules: names of all modules of the live model that are known; None without a base.
        notices: what a user should know.
    """

    layers: list[LayerPlan] = field(default_factory=list)
    saved: dict[str, list[Saved]] = field(default_factory=dict)
    modules: set[str] | None = None
    notices: list[str] = field(default_factory=list)


class Planner:
    """Makes a plan; see :meth:`plan`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        base: Checkpoint | None,
        chosen: Callable[[str], bool],
        *,
        prefix: str,
        embedding: str,
        fan_in_fan_out: str | None,
    ) -> None:
        """Set up.

        Args:
            path: the adapter's file, for messages.
            manifest: of the adapter.
            base: the checkpoint, if it is at hand.
            chosen: whether a tensor, by name, is to be taken.
            prefix: what the live model's names have before those of the base.
            embedding: a regex found in the names of embeddings.
            fan_in_fan_out: a regex found in the names of weights that are stored ``[in, out]``; None: not said.
        """
        self.path, self.manifest, self.base, self.chosen, self.prefix = path, manifest, base, chosen, prefix
        self._embedding = _regex("embedding", embedding)
        self._transposed = None if fan_in_fan_out is None else _regex("fan-in-fan-out", fan_in_fan_out)
        self._component = ""
        self._unproved: list[str] = []  # assumed to be [out, in]
        self._followed: list[str] = []  # square, [in, out] like all others

    def plan(self) -> LoraPlan:
        """The plan.

        Raises:
            SourceError: something that a LoRA cannot hold, or that cannot be decided.
            BaseMismatch: the base lacks a tensor, or has another shape.
        """
        entries = [entry for name, entry in self.manifest.tensors.items() if self.chosen(name)]
        whole = [name for name in self.manifest.whole if self.chosen(name)]
        if removed := [name for name in self.manifest.removed if self.chosen(name)]:
            raise self._error(removed[0], "is removed by the adapter, which a LoRA cannot do")
        if not entries and not whole:
            raise SourceError(f"{self.path}: no tensor is left by the choice of names")
        self._component = self._one_component([*(entry.name for entry in entries), *whole])
        plan = LoraPlan()
        if self._component:
            plan.notices.append(f"the LoRA is for the component {self._component.removesuffix('/')!r} alone")
        if self.base is not None:
            names = (self._own(name) for name in self.base if name.startswith(self._component))
            plan.modules = {self.prefix + module for name in names for module in _above(name)}
        vectors = [entry for entry in entries if len(entry.shape) < 2]
        for entry in entries:
            self._check(entry)
        plan.layers = [self._layer(entry) for entry in entries if len(entry.shape) >= 2]
        self._save(plan, whole, vectors)
        self._add_notices(plan)
        return plan

    def _error(self, name: str, reason: str) -> SourceError:
        return SourceError(f"{self.path}: tensor {name!r} {reason}; --exclude leaves it out")

    def _one_component(self, names: list[str]) -> str:
        """``"unet/"``, the prefix of all names in an adapter of a pipeline; otherwise empty."""
        if not self.manifest.raw.get("components"):
            return ""
        found = sorted({name.partition("/")[0] for name in names})
        if len(found) > 1:
            raise SourceError(
                f"{self.path}: holds changes of {', '.join(found)}, and a PEFT folder is for one model: "
                f"take one at a time, such as with --include '^{found[0]}/'"
            )
        return f"{found[0]}/"

    def _own(self, name: str) -> str:
        return name.removeprefix(self._component)

    def _check(self, entry: SparseEntry) -> None:
        name = entry.name
        if entry.values == "none":
            raise self._error(name, "is a mask: there is nothing to approximate")
        if entry.is_patch:
            raise self._error(name, "is part of a patch that renames or resizes, which a LoRA cannot do")
        if self.base is None:
            if entry.values == "target" and not entry.base_values:
                raise SourceError(
                    f"{self.path}: tensor {name!r} holds target values without those of the base: pass --base"
                )
            return
        check_frame(f"tensor {name!r}", name, entry.shape, FLOATS[entry.dtype], self.base, any_float=True)

    def _layer(self, entry: SparseEntry) -> LayerPlan:
        name, dimensions = entry.name, len(entry.shape)
        own = self._own(name)
        module = own.removesuffix(_WEIGHT)
        if module == own or not module:
            reason = f"has {dimensions} dimensions and is not the weight of a module"
            if dimensions == 3:
                reason += " (the experts of a mixture, perhaps, for which PEFT has target_parameters; they are not written)"
            raise self._error(name, reason)
        if dimensions > 5:
            raise self._error(name, f"has {dimensions} dimensions, and PEFT adapts at most 5")
        kind: Kind = "linear"
        if self._embedding.search(name) and dimensions == 2:
            kind = "embedding"
        elif dimensions > 2:
            kind = "conv"
            if (bias := self._bias(name)) not in (None, entry.shape[0]):
                raise self._error(
                    name,
                    f"has shape {list(entry.shape)} and a bias of {bias}: a transposed convolution, which PEFT does not adapt",
                )
        elif self._is_transposed(entry):
            kind = "conv1d"
        return LayerPlan(entry, self.prefix + module, kind)

    def _bias(self, weight: str) -> int | None:
        """Elements of the bias that belongs to a weight, if the base has it."""
        name = f"{weight.removesuffix('weight')}bias"
        if self.base is None or name not in self.base or len(shape := self.base.shape(name)) != 1:
            return None
        return shape[0]

    def _is_transposed(self, entry: SparseEntry) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        name, shape = entry.name, entry.shape
        said = None if self._transposed is None else bool(self._transposed.search(name))
        bias = self._bias(name)
        if bias is not None and bias not in shape:
            raise self._error(name, f"has shape {list(shape)} and a bias of {bias}: not a linear layer")
        if bias is not None and shape[0] != shape[1]:
            if said and bias == shape[0]:
                raise SourceError(
                    f"{self.path}: tensor {name!r} is [in, out] by --fan-in-fan-out, but its shape is {list(shape)} and its bias "
                    f"has {bias} elements"
                )
            return bias == shape[1]
        if said is not None:
            return said
        if self.base is not None:
            return bias is not None and self._as_others(name)
        if _LIKE_CONV1D.search(name):
            raise SourceError(
                f"{self.path}: tensor {name!r} may be stored as [in, out] (transformers' Conv1D) or as [out, in]: "
                "pass --base or --fan-in-fan-out"
            )
        self._unproved.append(name)
        return False

    def _as_others(self, name: str) -> bool:
        """Whether the weight is stored like the base's other weights with a bias that are not square."""
        found = self._others
        if found == {True, False}:
            raise SourceError(
                f"{self.path}: tensor {name!r} is square, and the base has layers that store [in, out] and layers that store "
                "[out, in]: name the former by --fan-in-fan-out REGEX"
            )
        (self._followed if found == {True} else self._unproved if not found else []).append(name)
        return found == {True}

    @cached_property
    def _others(self) -> set[bool]:
        found = set()
        for name in self.base or ():
            assert self.base is not None
            shape, bias = self.base.shape(name), self._bias(name)
            if name.endswith(_WEIGHT) and len(shape) == 2 and shape[0] != shape[1] and bias in shape:
                found.add(bias == shape[1])
        return found

    def _save(self, plan: LoraPlan, whole: list[str], vectors: list[SparseEntry]) -> None:
        """Tensors that PEFT can only replace with their whole module: ``modules_to_save``."""
        changed: dict[str, Literal["whole", "sparse"]] = dict.fromkeys(whole, "whole")
        changed |= {entry.name: "sparse" for entry in vectors}
        adapted = {layer.module: layer.entry.name for layer in plan.layers}
        held: dict[str, set[str]] = {}
        for name in self.base or ():
            held.setdefault(name.rpartition(".")[0], set()).add(name)
        for name, origin in changed.items():
            what = "is replaced as a whole" if origin == "whole" else "is no matrix"
            inside = name.rpartition(".")[0]
            if not self._own(inside):
                raise self._error(name, f"{what}, and it belongs to no module that PEFT could save")
            # What the checkpoint lacks, such as a head on top, has the name of the live model already.
            prefix = self.prefix if self.base is None or inside in held else ""
            module = prefix + self._own(inside)
            if module in adapted:
                raise self._error(
                    name,
                    f"{what}, and PEFT replaces whole modules only: this one is adapted ({adapted[module]!r})",
                )
            if self.base is None:
                raise SourceError(
                    f"{self.path}: tensor {name!r} {what}, and PEFT replaces whole modules only: "
                    "what else this one holds is in the base (--base)"
                )
            if below := [other for other in held if other.startswith(f"{inside}.")]:
                raise self._error(
                    name, f"belongs to a module that holds others ({below[0]!r}), which PEFT would replace with it"
                )
            if module not in plan.saved:
                others = sorted(held.get(inside, set()) - changed.keys())
                plan.saved[module] = [Saved(prefix + self._own(other), other, "base") for other in others]
            plan.saved[module].append(Saved(prefix + self._own(name), name, origin))
        for module in plan.saved:
            self._check_saved(module, plan, adapted)

    def _check_saved(self, module: str, plan: LoraPlan, adapted: Collection[str]) -> None:
        """PEFT takes names in ``modules_to_save`` as ends of names, and as regexes that keep the LoRA away."""
        assert plan.modules is not None
        others = [other for other in plan.modules if other != module and other.endswith(module)]
        try:
            others += [other for other in adapted if is_inside_for_peft(module, other)]
        except PatternError as error:
            raise self._error(plan.saved[module][0].key, f"is of the module {module!r}: {error}") from None
        if others:
            raise self._error(
                plan.saved[module][0].key,
                f"is of the module {module!r}, which PEFT cannot tell from {others[0]!r}",
            )

    def _add_notices(self, plan: LoraPlan) -> None:
        kinds: dict[str, list[str]] = {}
        for layer in plan.layers:
            kinds.setdefault(layer.kind, []).append(layer.entry.name)
        if names := kinds.get("embedding"):
            plan.notices.append(f"taken as embeddings, by their names (--embedding): {_some(names)}")
        if tied := [name for name in names or () if not _UNTIED.search(name) and not self._has_twin(name)]:
            plan.notices.append(
                f"if the model's head shares the weight of {tied[0]!r}, as many do: the adapter changes both, the LoRA the "
                "embedding alone, unless PEFT merges it"
            )
        if names := kinds.get("conv"):
            plan.notices.append(
                f"taken as convolutions without groups and dilation, which PEFT's LoRA does not do: {_some(names)}"
            )
        if names := self._followed:
            plan.notices.append(f"square, and taken as [in, out] like the base's other layers: {_some(names)}")
        if names := self._unproved:
            plan.notices.append(
                f"taken as [out, in], as torch.nn.Linear stores them, without proof (--fan-in-fan-out): {_some(names)}"
            )

    def _has_twin(self, name: str) -> bool:
        """Whether the base has another matrix of this shape: then the head may have its own weight."""
        if self.base is None:
            return False
        shape = self.base.shape(name)
        return any(other != name and self.base.shape(other) == shape for other in self.base)


def targets(modules: list[str], known: set[str] | None) -> list[str] | str:
    """``target_modules`` that name these modules and no others of the live model.

    PEFT also matches a name in a list with the end of a module's name. So a list is used if the known modules make it
    unambiguous, else a regex, which PEFT matches with whole names.
    """
    if known is not None:
        wanted = set(modules)
        ends = (
            ".".join(parts[i:])
            for name in known - wanted
            for parts in [name.split(".")]
            for i in range(1, len(parts))
        )
        if not any(end in wanted for end in ends):
            return sorted(wanted)
    return "|".join(map(re.escape, sorted(modules)))


def pattern(module: str) -> str:
    """A key of ``rank_pattern`` that matches only this module: PEFT's own regex also matches names that end with it."""
    return f"^{re.escape(module)}"


def _regex(option: str, text: str) -> re.Pattern[str]:
    return compiled(text, f"--{option} ")


def _above(name: str) -> Iterator[str]:
    """Names of the modules that hold a tensor."""
    while name := name.rpartition(".")[0]:
        yield name


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])}, ... ({len(names)} tensors)"
