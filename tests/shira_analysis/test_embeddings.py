"""Embeddings against the model asked by hand, and laws of their cosine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModel, AutoTokenizer

from shira_analysis.measures.embeddings import embed, mean_cosine
from tests.models import minilm

TEXTS = [
    "A cat sat on the mat, and would not be moved by anybody at all.",
    "Yes.",
    "The kitten is on the rug.",
    "",
]
ROWS = arrays(np.float32, (3, 5), elements=st.floats(0.125, 100, width=32))


@pytest.fixture(scope="module")
def encoder() -> tuple:
    return AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())


def by_hand(encoder: tuple, text: str, length: int = 128) -> np.ndarray:
    """Without any padding, so that the mean is over all states."""
    model, tokenizer = encoder
    with torch.no_grad():
        states = model(
            **tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        ).last_hidden_state
    mean = states[0].numpy().mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_padding_and_order_change_nothing(encoder: tuple, batch: int) -> None:
    found = embed(*encoder, TEXTS, batch=batch)
    assert (np.float32, (len(TEXTS), 384)) == (found.dtype, found.shape)
    np.testing.assert_allclose(found, [by_hand(encoder, text) for text in TEXTS], atol=2e-6)


def test_long_texts_are_cut(encoder: tuple) -> None:
    long = "one two three four five six seven eight"
    found = embed(*encoder, [long], length=6)
    np.testing.assert_allclose(found[0], by_hand(encoder, long, 6), atol=2e-6)
    assert mean_cosine(found, embed(*encoder, [long])) < 0.99


def test_dropout_is_off(encoder: tuple) -> None:
    encoder[0].train()
    np.testing.assert_array_equal(embed(*encoder, TEXTS), embed(*encoder, TEXTS))


def test_like_texts_are_near(encoder: tuple) -> None:
    found = embed(*encoder, TEXTS)
    assert mean_cosine(found[:1], found[2:3]) > mean_cosine(found[:1], found[1:2]) + 0.2


@given(ROWS, st.floats(0.01, 100))
def test_the_ends_of_the_scale(a: np.ndarray, scale: float) -> None:
    assert pytest.approx(1) == mean_cosine(a, scale * a)
    assert pytest.approx(-1) == mean_cosine(a, -scale * a)


@given(ROWS, ROWS)
def test_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    assert mean_cosine(a, b) == mean_cosine(b, a)
    assert -1 - 1e-12 <= mean_cosine(a, b) <= 1 + 1e-12


def test_each_row_counts_the_same_whatever_its_length() -> None:
    a = np.array([[1.0, 0.0], [1000.0, 0.0]])
    assert 0.5 == mean_cosine(a, np.array([[2.0, 0.0], [0.0, 3.0]]))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.ones(3), np.ones(3)),
        (np.ones((0, 3)), np.ones((0, 3))),
        (np.ones((2, 3)), np.zeros((2, 3))),
        (np.full((2, 3), np.nan), np.ones((2, 3))),
    ],
)
def test_what_has_no_cosine_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"row by row|cosine is undefined"):
        mean_cosine(a, b)
