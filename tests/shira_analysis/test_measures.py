"""Measures of whole adapters: per tensor, per kind of layer, and in all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from shira_analysis.measures.adapter import AdapterMeasures, combine, measure, measure_tensor
from shira_analysis.measures.deltas import delta_values
from shira_analysis.measures.layer_kinds import KINDS
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import BaseRequired, SourceError
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor
from tests.models import LORAS, minilm
from tests.strategies import adapters

NAMES = [f"layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ("q_proj", "v_proj")] + [
    "layers.0.mlp.up_proj.weight"
]


def adapter(seed: int = 1) -> Adapter:
    random = np.random.default_rng(seed)
    tensors = []
    for name in NAMES:
        indices = np.sort(random.choice(120, 30, replace=False))
        base = random.standard_normal(30).astype(np.float32)
        values = base + random.standard_normal(30).astype(np.float32)
        tensors.append(SparseTensor(name, (10, 12), indices, values, base=base))
    mask = SparseTensor("lm_head.weight", (4, 4), [0, 5], value_kind="none")
    return Adapter([*tensors, mask], dense=[DenseTensor("b", np.float32([[1, 2]]))])


@pytest.fixture
def measured(tmp_path: Path) -> AdapterMeasures:
    save(adapter(), tmp_path / "a.st")
    seen: list[int] = []
    found = measure(tmp_path / "a.st", rank=True, progress=seen.append)
    assert [1] * 6 == seen
    return found


def test_kinds_and_sums(measured: AdapterMeasures) -> None:
    assert [*NAMES, "lm_head.weight"] == [tensor.name for tensor in measured.tensors]
    assert ["query", "value", "mlp up", "head"] == list(measured.kinds)
    assert ["b"] == list(measured.whole)
    assert 2 == measured.whole_numel
    kinds, total = measured.kinds.values(), measured.total
    assert total.norms is not None
    assert total.ranks is not None
    assert total.tensors == sum(kind.tensors for kind in kinds) == 6
    for count in ("nnz", "numel", "rows", "all_rows", "columns", "all_columns"):
        assert getattr(total.mask, count) == sum(getattr(kind.mask, count) for kind in kinds)
    norms = [kind.norms for kind in kinds if kind.norms is not None]
    ranks = [kind.ranks for kind in kinds if kind.ranks is not None]
    assert 3 == len(norms) == len(ranks)
    assert math.isclose(total.norms.energy, sum(part.energy for part in norms))
    assert math.isclose(total.norms.l1, sum(part.l1 for part in norms))
    assert total.norms.largest == max(part.largest for part in norms)
    assert sum(total.norms.histogram.values()) == sum(sum(part.histogram.values()) for part in norms) == 150
    for count in ("tensors", "full", "proven", "lower", "upper", "numerical"):
        assert getattr(total.ranks, count) == sum(getattr(part, count) for part in ranks)
    assert (5, 50) == (total.ranks.tensors, total.ranks.full)


def test_a_mask_has_places_and_no_size(measured: AdapterMeasures) -> None:
    head = measured.kinds["head"]
    assert (2, None, None) == (head.mask.nnz, head.norms, head.ranks)


def test_norms_are_those_of_all_deltas(measured: AdapterMeasures) -> None:
    deltas = np.concatenate([delta_values(adapter()[name]) for name in NAMES])
    assert measured.total.norms is not None
    assert math.isclose(float(np.linalg.norm(deltas)), measured.total.norms.frobenius)
    assert math.isclose(float(np.abs(deltas).sum()), measured.total.norms.l1)


def test_json(measured: AdapterMeasures) -> None:
    found = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    assert {"file", "total", "kinds", "tensors", "whole_tensors", "whole_numel"} == set(found)
    assert {"name", "kind", "shape", "dtype", "mask", "norms", "rank"} == set(found["tensors"][0])
    assert "rank" not in found["kinds"]["head"]
    assert found["kinds"]["head"]["norms"] is None


@given(adapters())
def test_any_tensor_is_measured_or_refused_in_words(drawn: Adapter) -> None:
    measured = []
    for tensor in drawn.values():
        try:
            measured.append(measure_tensor(tensor))
        except (BaseRequired, SourceError) as error:
            assert repr(tensor.name) in str(error)
    group = combine(measured)
    json.dumps([group.as_json(), *(tensor.as_json() for tensor in measured)], allow_nan=False)
    assert group.mask.nnz == sum(tensor.mask.nnz for tensor in measured)
    assert all(tensor.kind in KINDS for tensor in measured)


def test_errors_name_the_file(tmp_path: Path) -> None:
    bad = SparseTensor("w", (3,), [1], np.float32([np.inf]), base=np.float32([0]))
    save(Adapter([bad]), tmp_path / "a.st")
    with pytest.raises(SourceError, match=r"a\.st: tensor 'w': the delta at flat index 1"):
        measure(tmp_path / "a.st")


def test_the_real_adapter_with_its_base_and_without(tmp_path: Path) -> None:
    base = open_checkpoint(minilm())
    for name, own in (("a.st", True), ("b.st", False)):
        lora_to_shira(LORAS / "spam", minilm(), tmp_path / name, density=0.01, self_contained=own)
    with pytest.raises(BaseRequired, match=r"b\.st: tensor 'encoder"):
        measure(tmp_path / "b.st")
    alone, based = measure(tmp_path / "a.st"), measure(tmp_path / "b.st", base)
    assert alone.as_json() | {"file": ""} == based.as_json() | {"file": ""}
    assert ["query", "key", "value", "attention output", "mlp up", "mlp down"] == list(alone.kinds)
    assert (36, 106_176) == (alone.total.tensors, alone.total.mask.nnz)
    assert load(tmp_path / "a.st").dense.keys() == set(alone.whole)
    only = measure(tmp_path / "a.st", include=["query"], exclude=["layer.0"])
    assert (["query"], 5) == (list(only.kinds), only.total.tensors)
