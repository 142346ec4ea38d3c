"""Whether a merged checkpoint holds a LoRA or an adapter, and at which strength, tensor by tensor.

A merge that did nothing, skipped layers or used another scale shows only in the weights. So each merged weight is compared with
what it should be, given the base and the update. Which strengths fit an entry, and how that gives a verdict, is in
:mod:`shira_analysis.merging.check.fit`. A few tiles are in memory at a time, whatever the size of the checkpoint.

The verdict on a tensor:

========== ==========================================================================================================
verified   every entry fits the expected strength, and the base alone does not explain the entries
absent     every entry fits strength 0 and not the expected one: the weight is the base's
strength   every entry fits another strength
different  no strength fits every entry: something else was added, or the base was another one
missing    the checkpoint has no such tensor
unclear    every entry fits both the expected strength and 0 (rounding hides the update), or too few entries changed
========== ==========================================================================================================

The answer for the checkpoint is *no* if a tensor is absent, of another strength, different or missing, if a tensor that the
adapter does not change has changed, or if the keys are those of a PEFT model that was never unloaded; *inconclusive* if no
tensor is verified, or if the unclear ones hold 1 % or more of the update's energy (the sum of squares); else *yes*. New and
missing tensors among those that the adapter does not change are reported, but do not count: loading the model reveals them.
A tensor that is tied to an adapted one changes with it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

from shira_analysis.merging.check.answer import conclude
from shira_analysis.merging.check.fit import fit_strength
from shira_analysis.merging.check.layers import judge
from shira_analysis.merging.check.names import MergedNames, renamed
from shira_analysis.merging.check.report import LayerVerdict, MergeVerdict, Others, Verdict
from shira_analysis.merging.check.scan import MergedWeight
from shira_analysis.merging.check.sources import ExpectedChange, Source, open_source
from shira_analysis.merging.check.stored import compare_replaced, same_tensor, unchanged
from shira_format._core.arrays import Array
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.peft_model import refuse_unmerged
from shira_format.checkpoints.quantised import Quantised, any_quantised, belongs_to_quantised, find_quantised
from shira_format.checkpoints.wrapped import unwrapped
from shira_format.convert.pairing import in_form_of
from shira_format.convert.unused import check_all_used
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter
from shira_format.storage.paths import resolve_path
from shira_format.tensors import numel


def check_merge(
    merged: str | os.PathLike[str] | Checkpoint,
    base: str | os.PathLike[str] | Checkpoint,
    *,
    adapter: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    strength: float | None = None,
    layers_only: bool = False,
    dialect: str | None = None,
    prefix: str | None = None,
    merged_prefix: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    threads: int | None = None,
    progress: Progress = lambda _: None,
    on_start: Callable[[int], object] = lambda _: None,
) -> MergeVerdict:
    """Whether ``merged`` holds an adapter or a LoRA: yes, no or inconclusive, with a verdict on each tensor.

    Args:
        merged: the checkpoint after the merge, in any layout.
        base: the checkpoint before the merge.
        adapter: the adapter file that should have been merged.
        lora: the LoRA that should have been merged, instead of an adapter; an adapter file is accepted, too.
        strength: the expected strength of the merge (default: 1; of an adapter file, its alpha).
        layers_only: do not compare the tensors that the adapter does not change.
        dialect: of the LoRA (default: detected from its keys).
        prefix: of the base's names, if the LoRA or adapter could be for several parts of the base.
        merged_prefix: of the names in ``merged``, if several parts of it could be the base.
        rank: of PEFT's weights without ``adapter_config.json``; all others state their own.
        alpha: likewise; the scale is ``alpha / rank``.
        include: regexes; a tensor is checked only if one of them is found in its name.
        exclude: regexes; a tensor is not checked if one of them is found in its name.
        allow_unused: go on although the adapter's or the merged checkpoint's folder has weight files that are not used.
        threads: all cores by default, but at most 16.
        progress: called with the number of entries that were compared since the last call.
        on_start: called with what all calls of ``progress`` will add up to.

    Raises:
        SourceError: not one of ``adapter`` and ``lora``; an input that cannot be read, or does not fit the base.
        FormatError: a safetensors file is damaged.
        BaseMismatch: the adapter was made for another base.
    """
    update = adapter if lora is None else lora
    if update is None or (adapter is not None and lora is not None):
        raise SourceError("name what should have been merged: either adapter or lora")
    before, after = open_checkpoint(base), open_checkpoint(merged)
    source = open_source(
        update, before, dialect=dialect, prefix=prefix, rank=rank, alpha=alpha, allow_unused=allow_unused
    )
    if not isinstance(merged, Checkpoint):
        unused = check_all_used(resolve_path(merged), [*after.files, *before.files], [after], allow=allow_unused)
        source.notices.extend(notice for notice in unused if notice not in after.notices)
    chosen = name_filter(include, exclude)
    check = MergeCheck(
        before,
        source,
        after,
        strength=strength,
        chosen=chosen,
        others=not layers_only,
        merged_prefix=merged_prefix,
    )
    on_start(check.size)
    return check.run(threads, progress)


class MergeCheck:
    """A check whose inputs are open and whose names are matched."""

    def __init__(
        self,
        base: Checkpoint,
        source: Source,
        merged: Checkpoint,
        *,
        strength: float | None = None,
        chosen: Callable[[str], bool] = lambda _: True,
        others: bool = True,
        merged_prefix: str | None = None,
    ) -> None:
        """Find the tensors of both checkpoints that belong together.

        Args:
            base: the checkpoint before.
            source: the update that should have been merged.
            merged: the checkpoint after.
            strength: the expected strength; by default what ``source`` is meant for, usually 1.
            chosen: whether a tensor is checked, given its name in the base.
            merged_prefix: the prefix of the names in ``merged``, if several parts of it could be the base.
            others: whether to compare the tensors that ``source`` does not change.

        Raises:
            SourceError: no tensor is left, the checkpoints have no adapted name in common, or ``base`` is a PEFT model.
        """
        refuse_unmerged(base, merged)
        merged, self._form = in_form_of(base, unwrapped(merged, base), "the merged checkpoint")
        self.base, self.merged, self.source = base, merged, source
        self.expected = source.strength if strength is None else strength
        if not math.isfinite(self.expected) or self.expected == 0:
            raise SourceError(f"strength {self.expected:g}: must be a number other than 0")
        self.changes = [change for change in source.changes if chosen(change.update.name)]
        self.whole = {name: values for name, values in source.whole.items() if chosen(name)}
        if not self.changes and not self.whole:
            raise SourceError("no adapted tensor is left by the choice of names")
        adapted = [*(change.update.name for change in source.changes), *source.whole]
        self.names: MergedNames = renamed(adapted, base, merged, merged_prefix)
        self._adapted = set(adapted)
        left_alone = [
            name for name in base if name not in self._adapted and chosen(name) and name not in source.removed
        ]
        self._left_alone = left_alone if others and not self.names.alone else None
        self._chosen = chosen

    @property
    def size(self) -> int:
        """Elements to compare."""
        names = self._left_alone or ()
        return sum(numel(change.update.shape) for change in self.changes) + sum(
            numel(self.base.shape(n)) for n in names
        )

    def run(self, threads: int | None = None, progress: Progress = lambda _: None) -> MergeVerdict:
        """Compare all tensors.

        Raises:
            SourceError: a tensor cannot be read, or cannot be compared.
        """
        with Workers(threads) as workers:
            layers = [self._layer(change, workers, progress) for change in self.changes]
            layers += [self._replaced(name, values) for name, values in self.whole.items()]
            others = (
                None if self._left_alone is None else self._others(self._left_alone, layers, workers, progress)
            )
        notices = [
            *self.base.notices,
            *self.merged.notices,
            *self._form,
            *self.source.notices,
            *self.names.notices,
        ]
        answer, sentence, strength = conclude(layers, others, self.expected, self.names, self.source.facts)
        return MergeVerdict(answer, sentence, self.expected, strength, layers, others, notices)

    def _layer(self, change: ExpectedChange, workers: Workers, progress: Progress) -> LayerVerdict:
        name, shape = change.update.name, change.update.shape
        merged_name, reason = self._find(name, change.base_name)
        if (codes := self._codes(name, change.base_name, merged_name)) is not None:
            progress(numel(shape))
            # Of unknown energy: it counts as all of it.
            return LayerVerdict(name, merged_name, change.kind, "unclear", energy=math.inf, reason=f"quantised with scales: {codes}")  # fmt: skip
        if merged_name is None:
            progress(numel(shape))
            return LayerVerdict(name, None, change.kind, "missing", reason="not in the merged checkpoint")
        if (found := self.merged.shape(merged_name)) != shape:
            progress(numel(shape))
            return LayerVerdict(
                name, merged_name, change.kind, "different", reason=f"has shape {list(found)}, not {list(shape)}"
            )
        weight = MergedWeight(
            change.update, self.base, change.base_name, self.merged, merged_name, change.exact, change.scales
        )
        if change.scales and self.expected != 1:
            progress(numel(shape))
            # Of unknown energy: it counts as all of it.
            return LayerVerdict(
                name, merged_name, change.kind, "unclear", energy=math.inf,
                reason="a weight-decomposed update is not linear in its strength: only 1 can be checked",
            )  # fmt: skip
        fit = fit_strength(weight, self.expected, workers, progress)
        quantised = self.base.is_quantised(change.base_name) or self.merged.is_quantised(merged_name)
        return judge(weight, change.kind, fit, self.expected, reason, quantised, workers)

    def _codes(self, name: str, base_name: str, merged_name: str | None) -> Quantised | None:
        """How an adapted weight is quantised in one of the two checkpoints; None if both have its values."""
        if (found := find_quantised(self.base, base_name)) is not None:
            return found
        if merged_name is not None:
            return find_quantised(self.merged, merged_name)
        # Its codes are there under the name of the module, whose prefix may be another one.
        return find_quantised(self.merged, name) or any_quantised(self.merged)

    def _find(self, name: str, base_name: str) -> tuple[str | None, str]:
        """The tensor of the merged checkpoint that belongs to ``name``, or the one that it is tied to."""
        if (merged_name := self.names.of(name)) is not None:
            return merged_name, ""
        if base_name in self.base:
            for other in self.base:
                twin = self.names.of(other)
                if twin is not None and other != base_name and same_tensor(self.base, base_name, self.base, other):
                    return twin, f"tied to {other!r}"
        return None, ""

    def _replaced(self, name: str, values: Array) -> LayerVerdict:
        merged_name = self.names.of(name)
        if (codes := self._codes(name, name, merged_name)) is not None:
            return LayerVerdict(name, merged_name, "whole", "unclear", energy=math.inf, reason=f"quantised with scales: {codes}")  # fmt: skip
        if merged_name is None:
            return LayerVerdict(name, None, "whole", "missing", reason="not in the merged checkpoint")
        if (found := self.merged.shape(merged_name)) != values.shape:
            return LayerVerdict(
                name,
                merged_name,
                "whole",
                "different",
                reason=f"has shape {list(found)}, not {list(values.shape)}",
            )
        fits, equal, off = compare_replaced(values, self.merged, merged_name)
        of_base = name in self.base and unchanged(self.base, name, self.merged, merged_name)
        verdict: Verdict = (
            "unclear" if fits and of_base else "verified" if fits else "absent" if of_base else "different"
        )
        reasons = {
            "unclear": "the base has the same values",
            "absent": "the base's values, not those that should replace them",
            "different": "neither the base's values nor those that should replace them",
        }
        return LayerVerdict(
            name, merged_name, "whole", verdict, equal=equal, off=off, reason=reasons.get(verdict, "")
        )

    def _others(
        self, names: Sequence[str], layers: Sequence[LayerVerdict], workers: Workers, progress: Progress
    ) -> Others:
        found = Others()
        used = {layer.merged_name: layer.name for layer in layers if layer.merged_name is not None}
        for name in names:
            merged_name = self.names.of(name)
            if merged_name is None:
                found.missing.append(name)
            elif merged_name in used:
                found.tied.append(name)
            elif self.base.shape(name) == self.merged.shape(merged_name) and unchanged(
                self.base, name, self.merged, merged_name, workers
            ):
                found.compared += 1
            else:
                found.compared += 1
                self._record_change(found, name, merged_name, used)
            progress(numel(self.base.shape(name)))
        known = {self.names.of(name) for name in (*self.base, *self._adapted)}
        found.new = [name for name in self.merged if name not in known and self._chosen(name)]
        return found

    def _record_change(self, found: Others, name: str, merged_name: str, used: Mapping[str, str]) -> None:
        """Record a tensor that changed although the adapter does not change it."""
        for other_merged, other in used.items():
            if (
                other in self.base
                and same_tensor(self.base, name, self.base, other)
                and same_tensor(self.merged, merged_name, self.merged, other_merged)
            ):
                found.tied.append(name)
                return
        hidden = self.base.is_quantised(name) or self.merged.is_quantised(merged_name)
        same_shape = self.base.shape(name) == self.merged.shape(merged_name)
        codes = belongs_to_quantised(self.base, name) or belongs_to_quantised(self.merged, merged_name)
        (found.unclear if codes or (hidden and same_shape) else found.changed).append(name)
