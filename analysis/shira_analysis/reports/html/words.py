"""The sentences of a page on adapters, as plain text: what an adapter is, and what to know before using it."""

from __future__ import annotations

from typing import Any

from shira_analysis.figures.layers import LayerGrid
from shira_analysis.measures.pairs import Pair
from shira_analysis.reports.html.adapter_facts import AdapterFacts
from shira_analysis.reports.text import fit as fit_text
from shira_format._core.text import counted

LITTLE = 0.5  # share of the energy; the converters warn below it, too
DENSE = 0.2
APART = 5  # standard deviations that chance does not explain
ALIKE = 0.3  # cosine from which two adapters noticeably amplify or cancel each other
_LIST = 3


def summary(adapter: AdapterFacts, grid: LayerGrid) -> list[list[str]]:
    """Paragraphs of sentences."""
    info = adapter.info
    totals = info["totals"]
    if adapter.tensors and all(tensor["values"] == "none" for tensor in info["tensors"]):
        what = f"This is a mask: it marks {_entries(totals)}, and holds no values."
    elif (info["selection"] or {}).get("rule") == "exact":
        what = f"This is an exact patch: it sets every entry that differs between two checkpoints, {_entries(totals)}."
    elif adapter.tensors and all(tensor["values"] == "delta" for tensor in info["tensors"]):
        what = f"This adapter adds deltas to {_entries(totals)}; all others keep the base's values."
    else:
        what = f"This adapter sets {_entries(totals)}; all others keep the base's values."
    whole = totals["whole_tensors"]
    first = [what] + (
        [f"{counted(whole, 'further tensor')} {'is' if whole == 1 else 'are'} replaced as a whole."]
        if whole
        else []
    )
    first.append(base_words(info))
    return [first, made_words(info), undo_words(info), _where(adapter, grid)]


def base_words(info: dict[str, Any]) -> str:
    """Its base model, and whether it fits the given base."""
    model = info["base_model"] or {}
    named = model.get("id")
    stated = f"According to the file, its base model is {named}" + (
        f", revision {model['revision']}." if model.get("revision") else "."
    )
    text = stated if named else "The file does not name its base model."
    if "base" in info:
        if info["base"]["fits"]:
            return f"{text} It fits {info['base']['path']} by names, shapes, dtypes and digests."
        return f"{text} It does NOT fit {info['base']['path']}."
    return f"{text} No base was given to check that." if named else text


def made_words(info: dict[str, Any]) -> list[str]:
    """How it was made, according to the file, and how much of the source it keeps."""
    source, selection = info["source"] or {}, info["selection"] or {}
    found = []
    if source:
        kind = str(source.get("kind", "an unknown source"))
        kind = {"lora": "a LoRA", "full": "a full fine-tune", "shira": "a SHiRA"}.get(kind, kind)
        kind += f" in the dialect {source['dialect']}" if "dialect" in source else ""
        rank = f", rank {source['r']}" if isinstance(source.get("r"), int) else ""
        files = [str(item.get("name")) for item in source.get("files", [])]
        named = f" ({', '.join(files[:_LIST])}{', ...' if len(files) > _LIST else ''})" if files else ""
        found.append(f"According to the file, it was made from {kind}{rank}{named}.")
    else:
        found.append("The file does not say what it was made from.")
    if selection.get("rule") == "exact":
        return [*found, "It holds the whole change."]
    if info["fit"]:
        return [*found, *fit_words(info["fit"])]
    if selection:
        over = "of all tensors together" if selection.get("scope") == "global" else "of each tensor"
        if "energy" in selection:
            amount = f"the fewest entries {over} that hold {_percent(selection['energy'])} of the change's energy"
        elif "density" in selection:
            amount = f"{_percent(selection['density'])} of the entries {over}"
        elif "top_k" in selection:
            amount = f"{selection['top_k']:,} entries {over}"
        else:
            amount = f"some of the entries {over}"
        rule = selection.get("rule")
        how = "an unnamed rule" if rule is None else f"the rule {rule}"
        found.append(f"It keeps {amount}, {'the largest changes' if rule == 'top-k' else f'selected by {how}'}.")
    if info["mask"]:
        rule = info["mask"].get("rule")
        found.append("Its mask rule is not named." if rule is None else f"Its mask follows the rule {rule}.")
    if "energy_kept" in selection:
        found.append(
            f"They hold {_percent(selection['energy_kept'])} of the energy (the sum of squares) of the original change."
        )
    return found


def fit_words(fit: Any) -> list[str]:
    """That its entries were fitted, and how much of the effect they keep, according to the file."""
    facts = dict(fit_text.facts(fit))
    found = (
        [f"Its entries were fitted to what the source does to the model: {facts['fit']}."]
        if "fit" in facts
        else []
    )
    if "effect kept" in facts:
        found.append(f"Effect kept: {facts['effect kept']}.")
    if "outputs" in facts:
        found.append(f"Outputs: {facts['outputs']}.")
    return found


def undo_words(info: dict[str, Any]) -> list[str]:
    """Whether it can be undone, scaled and measured."""
    if not info["tensors"]:
        return []
    if info["self_contained"] and info["undo"] == "file":
        return [
            (
                "It can be undone: the file holds the base's values at its entries, and it can be scaled, measured and "
                "merged without the base."
            )
        ]
    if info["deltas"] is None:
        return []
    if info["deltas"] == "file":
        return [
            (
                "It can be scaled, measured and merged without the base, since the file holds deltas. To undo it, keep the values "
                "that it overwrites, as Switcher does, or use the base."
            )
        ]
    return [
        (
            "The file does not hold the base's values. To undo it, keep the values that it overwrites, as Switcher does, or use the "
            "base; to scale, measure or merge it, the base is needed."
        )
    ]


def _where(adapter: AdapterFacts, grid: LayerGrid) -> list[str]:
    if grid.energy is None or not grid.energy or not adapter.known:
        return []
    by_kind: dict[str, float] = {}
    for (row, _), cell in grid.cells.items():
        by_kind[grid.kinds[row]] = by_kind.get(grid.kinds[row], 0.0) + (cell.energy or 0.0) / grid.energy
    kind, share = max(by_kind.items(), key=lambda item: item[1])
    (_, block), cell = max(grid.cells.items(), key=lambda item: item[1].energy or 0.0)
    return [
        (
            f"Of its energy, {_percent(share)} is in layers of the kind “{kind}”; the largest single part, "
            f"{_percent((cell.energy or 0.0) / grid.energy)}, is in {grid.block(block)}."
        )
    ]


def warnings(adapter: AdapterFacts) -> list[str]:
    """What to know before using it."""
    info, found = adapter.info, []
    if "base" in info and not info["base"]["fits"]:
        reasons = info["base"]["reasons"]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        found.append(f"It does not fit the base {info['base']['path']}: {reasons[0]}{more}.")
    found += [f"A change cannot be measured: {reason}." for reason in adapter.broken[:_LIST]]
    if len(adapter.broken) > _LIST:
        found.append(f"{len(adapter.broken) - _LIST} more tensors have changes that cannot be measured.")
    kept = (info["selection"] or {}).get("energy_kept")
    if kept is not None and kept < LITTLE and not info["fit"]:
        found.append(
            f"It keeps only {_percent(kept)} of the original change's energy: expect a much weaker effect than the source's. "
            "A higher density keeps more; so does training a sparse adapter instead of sparsifying a dense one."
        )
    r2 = fit_text.effect_kept(info["fit"])
    if r2 is not None and r2 < LITTLE:
        found.append(
            f"It keeps only {r2:.3f} of the source's effect (R²): expect the model to do much less than with the source. A higher density "
            "keeps more."
        )
    loose = [t["name"] for t in info["tensors"] if t["base_digest"] is None and t["values"] != "none"]
    if loose:
        found.append(
            f"{_some(loose)} without a digest of the base's values: a wrong base will not be detected there."
        )
    empty = [t["name"] for t in info["tensors"] if not t["nnz"] and t["result_shape"] == t["shape"]]
    if empty:
        found.append(f"{_some(empty)} without entries: nothing changes there.")
    dense = info["totals"]["density"]
    if dense > DENSE:
        found.append(
            f"It sets {_percent(dense)} of the elements: it is not sparse, and not much smaller than the weights."
        )
    if info["removed"]:
        found.append(f"It removes tensors from the model: {', '.join(map(str, info['removed'][:_LIST]))}{', ...' if len(info['removed']) > _LIST else ''}.")  # fmt: skip
    if adapter.needs_base:
        found.append(
            "The size of its changes is not shown: the file does not hold the base's values, and no fitting base was given "
            "(--base)."
        )
    if not info["license"]:
        found.append("It names no licence.")
    return found


def pair_words(first: str, second: str, pair: Pair) -> list[str]:
    """How two adapters overlap and interfere."""
    whole = pair.whole
    common = whole.overlap
    if not whole.both:
        return [
            f"{first} and {second} change no weight in common: they cannot interfere within a layer.",
            *_replaced(pair),
        ]
    found = [f"{first} and {second} both change {counted(whole.both, 'weight')}"]
    if not common.shared:
        found[0] += ", and share no entry."
    else:
        smaller = min(common.first, common.second)
        found[0] += (
            f", and share {common.shared:,} entries, {_percent(common.shared / smaller)} of the smaller adapter's."
        )
        if common.expected:
            times = common.shared / common.expected
            chance = "consistent with chance" if common.surprise is None or abs(common.surprise) < APART else (
                "more than chance explains" if times > 1 else "fewer than chance explains"
            )  # fmt: skip
            found.append(f"That is {times:.3g} times the number expected for random masks, {chance}.")
    if common.sign_agreement is not None:
        found.append(f"Their signs agree at {_percent(common.sign_agreement)} of the shared entries.")
    if common.cosine is not None:
        cosine = common.cosine
        if abs(cosine) < ALIKE:
            verdict = "as changes of the weights they are nearly independent"
        elif cosine > 0:
            verdict = "applied together, they amplify each other"
        else:
            verdict = "applied together, they partly cancel each other"
        found.append(f"The cosine of the two changes is {cosine:+.3f}: {verdict}.")
    product = whole.product
    if product is not None and product.awor is not None:
        found.append(
            f"Of the cells of A₁ᵀA₂, {_percent(product.awor)} are zero (AWOR); uniform random masks of these densities would give "
            f"{_percent(product.awor_if_uniform or 0.0)}, and random masks with as many entries in each row "
            f"{_percent(product.awor_if_independent or 0.0)}."
        )
    return found + _replaced(pair)


def _replaced(pair: Pair) -> list[str]:
    """Sentences on tensors that the two cannot both replace or change."""
    if not pair.replaced:
        return []
    count = counted(len(pair.replaced), "tensor")
    names = f"{', '.join(pair.replaced[:_LIST])}{', ...' if len(pair.replaced) > _LIST else ''}"
    return [
        f"One of them replaces {count} as a whole that the other replaces or changes as well: {names}.",
        "There the two exclude each other; the measures on this page do not cover it.",
    ]


def _entries(totals: dict[str, Any]) -> str:
    weights = counted(totals["tensors"], "weight")
    return f"{totals['nnz']:,} of the {totals['numel']:,} elements of {weights} ({_percent(totals['density'])})"


def _some(names: list[str]) -> str:
    """The number of tensors, and the first of them, as the subject of a sentence."""
    if len(names) == 1:
        return f"1 tensor ({names[0]}) is"
    return f"{len(names):,} tensors (the first: {names[0]}) are"


def _percent(share: float) -> str:
    """A share of 1 in per cent, with a no-break space."""
    percent = 100 * share
    return f"{percent:.3g}\u00a0%" if percent < 99.95 or percent == 100 else f"{percent:.4g}\u00a0%"
