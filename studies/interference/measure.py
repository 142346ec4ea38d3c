"""The measures of one pair of adapters."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from shira_analysis.measures.deltas import delta_matrix
from shira_analysis.measures.interference import Interference, interference
from shira_analysis.measures.orthogonality import Orthogonality, orthogonality
from shira_analysis.measures.overlap import Overlap, overlap
from shira_format._core.arrays import Array
from shira_format.calibration.moments import collect_moments
from shira_format.tensors import SparseTensor
from studies.bank import train
from studies.bank.encoder import base_model
from studies.bank.forms import FORMS
from studies.bank.plan import BankRun
from studies.fusion import fuse
from studies.interference.plan import PairRun

INPUTS = 128  # of each layer
TEXTS = 64  # of each task, which no adapter was trained on

start = fuse.start


@lru_cache(maxsize=16)
def _inputs(task: str) -> dict[str, Array]:
    """Inputs of the base's layers on texts of a task, by weight: ``[inputs, in]``."""
    tokens = train.tokens(task)["validation"][slice(0, TEXTS)]
    model = base_model(fuse.place().base)
    batches = [{"input_ids": one.ids, "attention_mask": one.mask} for one in tokens.batches(16)]
    modules = [name.removesuffix(".weight") for name in _weights()]
    moments = collect_moments(model, batches, modules, block=1, dtype="float32", inputs=INPUTS, seed=0)
    found = {}
    for name, one in moments.items():
        assert one.inputs is not None
        found[name] = one.inputs[:, 0]
    return found


def _weights() -> list[str]:
    import re

    from studies.masks import MATRICES

    model = base_model(fuse.place().base)
    return [name for name, _ in model.named_parameters() if re.search(MATRICES, name)]


def _tensors(run: BankRun) -> Iterator[tuple[str, SparseTensor]]:
    """The deltas of an adapter; those of a LoRA with all elements."""
    if FORMS[run.form].kind != "lora":
        yield from fuse.adapter(run).items()
        return
    for name, update in fuse.loras(run.seed).updates(run.task).items():
        values = update.numpy().reshape(-1)
        yield name, SparseTensor(name, tuple(update.shape), np.arange(values.size), values, value_kind="delta")


def _product(first: SparseTensor, second: SparseTensor, matrices: tuple[Any, Any]) -> Orthogonality:
    """The measures of ``A1^T A2``; of dense deltas by a dense product."""
    if first.nnz < first.numel or second.nnz < second.numel:
        return orthogonality(*matrices)
    product = matrices[0].toarray().T @ matrices[1].toarray()
    energy, cells = float(np.square(product).sum()), product.size
    return Orthogonality(cells, int(np.count_nonzero(product)), cells, energy, cells, cells, 0.0)


def work(run: PairRun) -> dict[str, Any]:
    """Do one run."""
    begin = time.perf_counter()
    one, other = (dict(_tensors(BankRun(task, run.form, run.seed))) for task in (run.first, run.second))
    inputs = _inputs(run.first), _inputs(run.second)
    common, product = Overlap(), Orthogonality()
    fed = [Interference(), Interference()]
    for name in _weights():
        a, b = one.get(name), other.get(name)
        if a is None and b is None:
            continue
        common += overlap(a, b)
        if a is None or b is None:
            continue
        matrices = delta_matrix(a), delta_matrix(b)
        product += _product(a, b, matrices)
        fed = [so_far + interference(*matrices, some[name]) for so_far, some in zip(fed, inputs, strict=True)]
    return {
        "directed": [
            _directed(run.first, run.second, common, product, fed[0], mine=0),
            _directed(run.second, run.first, common, product, fed[1], mine=1),
        ],
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _directed(
    task: str, other: str, common: Overlap, product: Orthogonality, fed: Interference, *, mine: int
) -> dict[str, Any]:
    """How the adapter of ``task`` may be disturbed by that of ``other``, the larger the more; inputs are of the texts of ``task``."""
    assert common.distances is not None
    between, *norms = common.distances
    own, its = norms[mine], norms[1 - mine]
    energy, of_other = (fed.first, fed.second) if mine == 0 else (fed.second, fed.first)
    return {
        "task": task, "other": other,
        "overlap": common.jaccard, "cosine": abs(common.cosine or 0.0), "size": its / own,
        "awom": product.awom, "awom_relative": product.awom / (own * its), "awor": 1 - (product.awor or 0.0),
        "feature_cosine": abs(fed.cosine or 0.0), "feature_size": math.sqrt(of_other / energy),
        "disturbed": fed.disturbed[mine], "disturbed_each": fed.disturbed_each[mine],
        "norm": own, "norm_other": its, "between": between,
    }  # fmt: skip
