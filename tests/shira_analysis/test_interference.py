"""Interference on inputs: predicted from moments, measured on inputs, and what it says of two real adapters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from shira_analysis.measures import interference as module
from shira_analysis.measures.interference import Interference, interference
from shira_format.calibration.moments import Moment
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

CELLS = st.sampled_from([0, 0, 0, 1, -1, 2, -0.5])


@pytest.fixture(params=["numba", "numpy", "numpy, all long"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each law holds in all ways to form the products."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "numba":
            patch.setitem(sys.modules, "shira_analysis.measures.product_kernels", None)
            patch.setattr(module, "_PAIRS", 4)
            patch.setattr(module, "_LONG", 1 if request.param.endswith("long") else 6)
        yield request.param


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two deltas ``[out, in]`` and inputs ``[samples, in]``."""
    out, width, samples = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    a, b = (draw(arrays(np.float64, (out, width), elements=CELLS)) for _ in range(2))
    return a, b, draw(arrays(np.float64, (samples, width), elements=st.floats(-3, 3, width=16)))


def moment(inputs: np.ndarray, size: int | None = None, *, inputs_first: bool = False) -> Moment:
    samples, width = inputs.shape
    size = size or width
    number = -(-width // size)
    wide = np.zeros((number * size, number * size))
    wide[:width, :width] = inputs.T @ inputs / samples
    blocks = [wide[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(number)]
    return Moment("w", np.stack(blocks)[None], width, samples, inputs_first)


def csr(dense: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(dense)


@given(cases())
def test_predicted_is_measured(case: tuple) -> None:
    a, b, x = case
    predicted, measured = interference(csr(a), csr(b), moment(x)), interference(csr(a), csr(b), x)
    y1, y2 = x @ a.T, x @ b.T
    means = [np.mean(np.sum(u * v, axis=1)) for u, v in ((y1, y2), (y1, y1), (y2, y2))]
    for found in (predicted, measured):
        assert [found.inner, found.first, found.second] == pytest.approx(means, rel=1e-9, abs=1e-9)
    along = [(u @ v) ** 2 / (u @ u) if u.any() else 0 for u, v in zip(y1, y2, strict=True)]
    assert measured.projected_first == pytest.approx(np.mean(along), rel=1e-9, abs=1e-9)
    assert predicted.projected_first is predicted.disturbed_first_each is None
    # The other layout of the weight.
    turned = interference(csr(a.T), csr(b.T), moment(x, inputs_first=True))
    assert [turned.inner, turned.first] == pytest.approx(means[:2], rel=1e-9, abs=1e-9)
    again = interference(csr(a.T), csr(b.T), x, inputs_first=True)
    assert [again.inner, again.second] == pytest.approx([means[0], means[2]], rel=1e-9, abs=1e-9)


@given(cases(), st.integers(1, 7))
def test_blocks_leave_out_the_rest(case: tuple, size: int) -> None:
    a, b, x = case
    size = min(size, x.shape[1])
    c = x.T @ x / len(x)
    of_block = np.arange(x.shape[1]) // size
    c = c * (of_block[:, None] == of_block[None, :])
    found = interference(csr(a), csr(b), moment(x, size))
    wanted = [np.trace(u @ c @ v.T) for u, v in ((a, b), (a, a), (b, b))]
    assert [found.inner, found.first, found.second] == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(cases())
def test_symmetric_and_bounded(case: tuple) -> None:
    a, b, x = case
    for inputs in (x, moment(x)):
        one, other = interference(csr(a), csr(b), inputs), interference(csr(b), csr(a), inputs)
        assert (one.inner, one.first) == pytest.approx((other.inner, other.second), rel=1e-9, abs=1e-9)
        assert one.first >= 0
        if one.first > 1e-6 and one.second > 1e-6:
            assert one.cosine is not None
            assert abs(one.cosine) <= 1 + 1e-6
            assert one.disturbed_first == pytest.approx(one.cosine**2 * one.second / one.first)
    if one.first > 1e-6:
        same = interference(csr(a), csr(a), x)
        assert (same.cosine, same.along_first, same.disturbed_first_each) == pytest.approx((1, 1, 1))


@given(cases())
def test_each_input_by_itself_is_never_less(case: tuple) -> None:
    a, b, x = case
    found = interference(csr(a), csr(b), x)
    if found.first > 1e-6:
        assert found.disturbed_first is not None
        assert found.disturbed_first_each is not None
        assert found.disturbed_first <= found.disturbed_first_each * (1 + 1e-9) + 1e-9


def test_one_that_cancels_the_other_and_one_that_doubles_it() -> None:
    a, x = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [1.0, 3.0]])
    undone, doubled = (interference(csr(a), csr(sign * a), moment(x)) for sign in (-1, 1))
    assert (undone.along_first, undone.cosine, undone.disturbed_first) == pytest.approx((-1, -1, 1))
    assert doubled.along_second == pytest.approx(1)
    nothing = interference(csr(a), csr(0 * a), moment(x))
    assert (nothing.cosine, nothing.disturbed_first, nothing.disturbed_second) == (None, 0, None)


def test_orthogonal_weights_may_interfere_and_others_not() -> None:
    """The inputs decide: two features that always come together, and two that never do."""
    a, b = csr(np.array([[1.0, 0.0]])), csr(np.array([[0.0, 1.0]]))
    together = np.array([[1.0, 1.0], [-2.0, -2.0]])
    assert interference(a, b, moment(together)).cosine == pytest.approx(1)
    c, d = csr(np.array([[1.0, 1.0]])), csr(np.array([[1.0, -1.0]]))
    never = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert interference(c, d, never).cosine == pytest.approx((1 - 4) / (1 + 4))


def test_sums_over_layers() -> None:
    parts = Interference(1, 2, 3, 0.5, 1 / 3, 4, 5) + Interference(1, 2, 3, 0.5, 1 / 3, None, 5)
    assert parts == Interference(2, 4, 6, 1, 2 / 3, None, 10)
    assert parts.cosine == pytest.approx(2 / np.sqrt(24))
    # A layer in which the two agree does not hide one in which they oppose each other.
    a, x = csr(np.array([[1.0, 2.0]])), np.array([[1.0, 1.0], [0.0, 1.0]])
    both = interference(a, a, x) + interference(a, -a, x)
    assert (both.cosine, both.disturbed_first, both.disturbed_second) == pytest.approx((0, 1, 1))
    # Small ones do not vanish.
    small = interference(a * 1e-90, a * 1e-100, x)
    assert small.disturbed_first == pytest.approx(1e-20)


def test_many_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a, b, x = random.standard_normal((3, 4)), random.standard_normal((3, 4)), random.standard_normal((50, 4))
    whole = interference(csr(a), csr(b), x)
    monkeypatch.setattr(module, "_CELLS", 12)
    assert interference(csr(a), csr(b), x).as_json() == pytest.approx(whole.as_json())


def test_refusals() -> None:
    a = csr(np.ones((2, 3)))
    good = np.ones((4, 3))
    for rule, call in {
        "different shapes": lambda: interference(a, csr(np.ones((3, 2))), good),
        "have 2 inputs": lambda: interference(a, a, moment(good[:, :2])),
        "in 3 groups": lambda: interference(a, a, Moment("w", np.stack([np.eye(3)] * 3)[:, None], 3, 1)),
        r"inputs have shape \[4, 2\]": lambda: interference(a, a, good[:, :2]),
        r"inputs have shape \[0, 3\]": lambda: interference(a, a, good[:0]),
        "NaN": lambda: interference(a, a, good * np.nan),
        "mask": lambda: interference(SparseTensor("w", (2, 3), [0], value_kind="none"), a, good),
        "too large": lambda: interference(1e200 * a, a, moment(good)),
    }.items():
        with pytest.raises(SourceError, match=rule):
            call()


def test_two_real_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The shipped LoRAs of MiniLM at 1 %, on the shipped texts: weights say one thing, inputs another.

    In the last layer's output the deltas point the same way a little as weights, and against each other on the inputs.
    """
    monkeypatch.undo()
    if way != "numba":
        return  # the ways were compared; the model runs once
    import torch
    from transformers import AutoModel, AutoTokenizer

    from shira_analysis.measures.classifier import LabelledTexts
    from shira_analysis.measures.deltas import delta_matrix, open_deltas
    from shira_analysis.measures.orthogonality import orthogonality
    from shira_analysis.measures.overlap import overlap
    from shira_format.calibration.moments import collect_moments
    from shira_format.convert import lora_to_shira
    from tests.models import LORAS, minilm

    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    files = []
    for task in ("spam", "genre"):
        lora_to_shira(LORAS / task, minilm(), tmp_path / task, density=0.01, self_contained=True)
        files.append(open_deltas(tmp_path / task))
    layer = "encoder.layer.5.output.dense"
    a, b = (file.tensor(f"{layer}.weight") for file in files)
    model, tokenizer = AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    data = LORAS.parent / "text"
    texts = [text for task in ("spam", "genre") for text in LabelledTexts.read(data / f"{task}.jsonl").texts[:12]]
    batches = [
        tokenizer(texts[i : i + 8], padding=True, truncation=True, max_length=64, return_tensors="pt")
        for i in range(0, 24, 8)
    ]
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    predicted = interference(a, b, collect_moments(model, batches, [layer])[f"{layer}.weight"])
    hook.remove()
    inputs = (
        torch.cat([x[batch["attention_mask"] != 0] for x, batch in zip(seen, batches, strict=True)])
        .double()
        .numpy()
    )
    first, second = (delta_matrix(side).toarray() @ inputs.T for side in (a, b))
    assert predicted.inner == pytest.approx(np.mean(np.sum(first * second, axis=0)), rel=1e-9)
    assert predicted.first == pytest.approx(np.mean(np.sum(first**2, axis=0)), rel=1e-9)
    weights, product = overlap(a, b), orthogonality(a, b)
    assert weights.cosine is not None
    assert predicted.cosine is not None
    assert product.awor is not None
    # AWOR has them nearly orthogonal; AWOM several times what chance gives; and the inputs turn the sign.
    assert product.awor > 0.95
    assert product.awom > 3 * product.awom_if_independent
    assert weights.cosine > 0.03
    assert predicted.cosine < -0.05
