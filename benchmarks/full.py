"""Full checkpoints: what lies between two, and back, beside reading them, a script with torch.topk, and arc_v3."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import shira_format
from benchmarks.apart import ARC, Run, apart
from benchmarks.model import Shape
from benchmarks.steps import Pair, make_pairs, weight_files
from benchmarks.table import Row
from shira_format._core.arrays import Array
from shira_format._core.system import usable_cores

RUNS = 3
DENSITY = 0.01
FRESH, AGAIN = "reading both, file.read(), one thread", "reading both into one buffer, all cores"
_Runs = dict[str, Run]
_Jobs = dict[str, Callable[[], Run]]


def rows(shape: Shape, folder: Path) -> Iterator[Row]:
    """Conversion of a training step and of a fine-tune, restoring, and sizes."""
    folder = folder / "full"
    step, fine = make_pairs(shape, folder)
    # A model of a few million parameters is all start-up; only the large one says anything about the rate.
    large = step.elements > 5e8
    for kind, pair in (("step", step), ("fine-tune", fine)):
        share = pair.changed / pair.elements
        print(f"{kind}: {share:.2%} of {pair.elements / 1e9:.2f} G entries change", file=sys.stderr, flush=True)
    yield from _step(step, folder, large=large)
    yield from _fine_tune(fine, folder)
    yield from _restoring(step, folder)
    yield from _arc(step, folder)


def _step(pair: Pair, folder: Path, *, large: bool) -> Iterator[Row]:
    exact, top_k = folder / "exact.st", folder / "top-k.st"
    found = _in_turns(
        _readings(pair)
        | {
            "exact": _converting(pair, exact, "exact"),
            "exact, no result digests": _converting(pair, folder / "bare.st", "exact", digests=False),
            "top-k 1 %": _converting(pair, top_k, "top-k", density=DENSITY),
            "top-k 1 %, global scope": _converting(
                pair, folder / "global.st", "top-k", density=DENSITY, scope="global"
            ),
            "top-k, 90 % of the energy": _converting(
                pair, folder / "energy.st", "top-k", density=None, energy=0.9
            ),
        }
    )
    what = f"{pair.elements / 1e9:.2f} G bf16, {pair.changed / pair.elements:.1%} changed by one step"
    for case in ("exact", "exact, no result digests", "top-k 1 %"):
        yield from _beside_reading(f"{case} ({what})", found, case, large=large)
    for case in ("top-k 1 %, global scope", "top-k, 90 % of the energy"):
        yield Row(f"{case} ({what})", found[case].seconds, found[FRESH].seconds, "s", FRESH)
    for case in ("exact", "top-k 1 %"):
        peak = found[case].peak
        yield Row(
            f"  peak resident memory, {case}", peak / 1e6, 1500, "MB", "the limit", "< 1500 MB", peak < 1.5e9
        )
    yield from _beside_script("step", pair, top_k, found["top-k 1 %"], folder, large=large)


def _fine_tune(pair: Pair, folder: Path) -> Iterator[Row]:
    """Where most entries change, and many by the same amount, as bf16 numbers are few."""
    top_k, case = folder / "top-k.st", "top-k 1 %"
    found = _in_turns(_readings(pair) | {case: _converting(pair, top_k, "top-k", density=DENSITY)})
    what = f"{pair.elements / 1e9:.2f} G bf16, {pair.changed / pair.elements:.0%} changed by a fine-tune"
    yield from _beside_reading(f"{case} ({what})", found, case, large=False)
    yield Row(f"  peak resident memory, {case}", found[case].peak / 1e6, 1500, "MB", "the limit")
    yield from _beside_script("fine-tune", pair, top_k, found[case], folder, large=False)


def _readings(pair: Pair) -> _Jobs:
    files = [*pair.before, *pair.after]
    return {
        FRESH: partial(apart, "read", files=files),
        AGAIN: partial(apart, "read again", files=files, threads=usable_cores()),
    }


def _converting(pair: Pair, out: Path, rule: str, **options: Any) -> Callable[[], Run]:
    return partial(apart, "convert", base=pair.base, tuned=pair.tuned, out=out, rule=rule, options=options)


def _in_turns(jobs: _Jobs, runs: int = RUNS) -> _Runs:
    """The best time and the largest peak of each; in turns, so that whatever else the machine does falls on all."""
    if AGAIN in jobs:
        jobs[AGAIN]()  # a warm-up: it brings the files into the page cache
    done = [{case: job() for case, job in jobs.items()} for _ in range(runs)]
    return {
        case: Run(min(turn[case].seconds for turn in done), max(turn[case].peak for turn in done)) for case in jobs
    }


def _beside_reading(name: str, found: _Runs, case: str, *, large: bool) -> Iterator[Row]:
    taken, reading = found[case].seconds, found[FRESH].seconds
    demand = ("at most twice the time", taken <= 2 * reading) if large else ("", None)
    yield Row(name, taken, reading, "s", FRESH, *demand)
    yield Row("  the same", taken, found[AGAIN].seconds, "s", AGAIN)


def _beside_script(kind: str, pair: Pair, ours: Path, run: Run, folder: Path, *, large: bool) -> Iterator[Row]:
    theirs = folder / "script.safetensors"
    script = apart("top-k script", base=pair.before, tuned=pair.after, out=theirs, density=DENSITY)
    same = _same_choice(pair, ours, theirs)
    case = f"top-k 1 % per tensor, {kind}, beside a script"
    fast = run.seconds * 8 <= script.seconds
    demand = ("8 times as fast, same magnitudes", same and fast) if large else ("same magnitudes", same)
    yield Row(case, run.seconds, script.seconds, "s", "load_file, torch.topk, save_file", *demand)
    yield Row(
        "  peak resident memory", run.peak / 1e6, script.peak / 1e6, "MB", "the script, mapped files included"
    )


def _same_choice(pair: Pair, ours: Path, script: Path) -> bool:
    """Whether both keep as many entries of each tensor, of the same magnitudes, with the tuned values.

    Which of several equal ones are kept may differ. The script also keeps changes of 0 if there are too few others.
    """
    adapter = shira_format.load(ours)
    with safe_open(script, "pt") as opened:
        for before, after in zip(pair.before, pair.after, strict=True):
            with safe_open(before, "pt") as base, safe_open(after, "pt") as tuned:
                for name in tuned.keys():  # noqa: SIM118 - not a mapping
                    target = tuned.get_tensor(name).flatten()
                    change = (target.float() - base.get_tensor(name).float().flatten()).abs().numpy()
                    theirs = change[opened.get_tensor(f"{name}#indices").numpy()]
                    theirs = theirs[theirs > 0]
                    if name not in adapter:
                        if theirs.size:
                            return False
                        continue
                    tensor = adapter[name]
                    mine = change[tensor.indices]
                    values = target.view(torch.int16).numpy()[tensor.indices]
                    if not _equal(np.sort(mine), np.sort(theirs)) or not _equal(
                        tensor.values.view(np.int16), values
                    ):
                        return False
    return True


def _equal(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b))


def _restoring(pair: Pair, folder: Path) -> Iterator[Row]:
    out, copy = folder / "restored", folder / "copy"
    found = _in_turns(
        {
            "restore": partial(apart, "restore", adapter=folder / "exact.st", base=pair.base, out=out),
            "copy": partial(apart, "copy", files=pair.before, out=copy),
        }
    )
    same = _same_weights(out, pair.tuned)
    for path in (out, copy):
        shutil.rmtree(path)
    taken, copying = found["restore"].seconds, found["copy"].seconds
    case = "shira_to_full of the exact patch, digests checked"
    yield Row(case, taken, copying, "s", "copying the base's files, flushed", "equal to the tuned one", same)
    yield Row("  peak resident memory", found["restore"].peak / 1e6, 1500, "MB", "the limit")


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two folders have the same shards with the same tensors, bit for bit."""
    if [file.name for file in weight_files(a)] != [file.name for file in weight_files(b)]:
        return False
    for first, second in zip(weight_files(a), weight_files(b), strict=True):
        with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
            if set(one.keys()) != set(other.keys()):
                return False
            for name in one.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(
                    one.get_tensor(name).view(torch.int16), other.get_tensor(name).view(torch.int16)
                ):
                    return False
    return True


def _arc(pair: Pair, folder: Path) -> Iterator[Row]:
    """Beside ``fireworks-delta-compression``, one tensor after the other, as its functions do by default.

    Each decoding checks that it has the tuned weights, after the clock has stopped.
    """
    diffs = folder / "arc"
    both = {"base": pair.before, "tuned": pair.after}
    compact = folder / "compact.st"
    encoded = _in_turns(
        {
            "plain": _converting(pair, folder / "exact.st", "exact"),
            "compact": _converting(pair, compact, "exact", compact=True),
        },
        2,
    )
    exact = encoded["plain"]
    encode = apart("arc encode", **both, out=diffs)
    files = weight_files(diffs)
    found = _in_turns(
        {
            "apply": partial(apart, "apply", adapter=folder / "exact.st", **both),
            "apply compact": partial(apart, "apply compact", adapter=compact, **both),
            "decode": partial(apart, "arc decode", **both, diffs=files),
            "in place": partial(apart, "arc in place", **both, diffs=files, out=folder / "in-place"),
        }
    )
    apply, decode, in_place = found["apply"], found["decode"], found["in place"]
    ours, theirs = (folder / "exact.st").stat().st_size, sum(file.stat().st_size for file in files)
    per = 8 / pair.changed
    yield Row("file of the step, all told", ours * per, theirs * per, "bits/changed entry", ARC)
    yield Row("encode the step, files to file", exact.seconds, encode.seconds, "s", ARC)
    yield Row("  peak resident memory", exact.peak / 1e6, encode.peak / 1e6, "MB", f"{ARC}, mapped files included")
    yield Row("apply the step to weights in memory", apply.seconds, decode.seconds, "s", f"{ARC}, to new tensors")
    yield Row("  peak resident memory, base included", apply.peak / 1e6, decode.peak / 1e6, "MB", ARC)
    yield Row("  the same", apply.seconds, in_place.seconds, "s", f"{ARC}, in place in mapped files, not flushed")
    bits, taken, applied = compact.stat().st_size * per, encoded["compact"].seconds, found["apply compact"].seconds
    large = pair.elements > 5e8
    yield Row(
        "compact file of the step, all told", bits, theirs * per, "bits/changed entry", ARC, "<= 6.5", bits <= 6.5
    )
    demand = ("<= 3 s", taken <= 3) if large else ("", None)
    yield Row("encode the step compact, files to file", taken, encode.seconds, "s", ARC, *demand)
    demand = ("<= 1.5 s", applied <= 1.5) if large else ("", None)
    yield Row(
        "apply the compact step to weights in memory",
        applied,
        decode.seconds,
        "s",
        f"{ARC}, to new tensors",
        *demand,
    )
    shutil.rmtree(folder / "in-place")
