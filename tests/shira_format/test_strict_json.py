"""Strict JSON: the fast way and the slow way agree, and neither lets pass what the specification refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shira_format._core import strict_json
from shira_format._core.strict_json import is_uint, parse_object
from shira_format.errors import FormatError


@pytest.mark.parametrize(
    ("value", "expected"), [(0, True), (5, True), (-1, False), (True, False), (1.0, False), ("1", False)]
)
def test_integers_of_json(value: Any, expected: bool) -> None:
    assert expected == is_uint(value)


def test_depth_is_counted_in_lists_and_objects() -> None:
    assert {"a": json.loads("[" * 31 + "]" * 31)} == parse_object(b'{"a":' + b"[" * 31 + b"]" * 31 + b"}", "rule")
    with pytest.raises(FormatError, match="nested more than 32 deep"):
        parse_object(b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "rule")
    text = json.dumps({"a": "[" * 100, "b": ["}" * 5, "\\"]})
    assert json.loads(text) == parse_object(text.encode(), "rule")


@pytest.mark.parametrize("text", ["-0", "[-0]", '{"a":-0}', " -0 "])
def test_minus_zero_is_no_integer(text: str) -> None:
    found = parse_object(b'{"x":' + text.encode() + b',"y":[-0.0,0,-1,"-0,"]}', "rule")
    inner = found["x"]
    while not isinstance(inner, float):
        inner = inner[0] if isinstance(inner, list) else inner["a"]
    assert "-0.0" == str(inner)
    assert [float, int, int, str] == [type(one) for one in found["y"]]


TOKENS = [
    '"',
    "\\",
    ":",
    ",",
    "{",
    "}",
    "[",
    "]",
    " ",
    "\n",
    "a",
    "\\u0061",
    "\\ud83e",
    "\\udde0",
    '\\"',
    '"a"',
    '"b":',
    '"a":1',
]
TOKENS += [
    '{"a":0}',
    "-0",
    "0",
    "1e999",
    "NaN",
    "-Infinity",
    "9" * 4400,
    "true",
    "é",
    '"":',
    '\\":',
    '\\\\":',
    '"a":"\\":"',
]


@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=8))
@example(tokens=['"a"', ":", "0", ",", '"a"', " ", ":", "1"])
@example(tokens=['"a":1', ",", "\n", '"a":1', ",", '"b":', '"a":"\\":"'[4:]])
@example(tokens=['"a"', "\t:", "1", ',"\\u0061":1'])
@example(tokens=['"\\\\":1,', '"\\\\":2'])
@example(tokens=['"a":"', '\\":', '\\":', '","a":1'])
def test_the_fast_way_takes_only_what_the_slow_way_takes(tokens: list[str]) -> None:
    text = ("{" + "".join(tokens) + "}").encode()
    fast = strict_json._parse_plain(text)
    try:
        slow: Any = strict_json._parse_slowly(text, "rule")
    except FormatError:
        slow = None
    assert fast is None or repr(slow) == repr(fast)


@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
@pytest.mark.parametrize("indent", [None, 1])
def test_what_json_writes_is_read(value: Any, indent: int | None) -> None:
    text = json.dumps({"a": value}, indent=indent)
    assert json.loads(text) == parse_object(text.encode(), "rule")


def test_the_usual_is_read_the_fast_way() -> None:
    manifest = {
        "tensors": [{"name": "a.b", "shape": [1, 2], "alpha": 0.5}] * 3,
        "description": "see https://x.y: z",
    }
    for text in (
        json.dumps(manifest),
        json.dumps({"__metadata__": {"shira": json.dumps(manifest, separators=(",", ":"))}}),
    ):
        assert strict_json._parse_plain(text.replace('": ', '":').encode()) is not None
