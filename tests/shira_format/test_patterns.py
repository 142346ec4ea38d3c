"""Strangers' regular expressions: what ``re`` matches, in bounded time; the rest is refused."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shira_format.errors import SourceError
from shira_format.lora.peft.end_patterns import MOST_PATTERNS, EndPatterns
from shira_format.names.patterns import Pattern, PatternError, UnsupportedPattern

TOKENS = [
    *"ab.|()*+?^$[]-{},1_\\\n", r"\d", r"\w", r"\s", r"\b", r"\.", "(?:", "(?=", "(?!", "(?P<n>", "[ab]", "[^a]", "[]a]", "[a-b_]",
    r"[\d_]", "{1,2}", "{2}", "{,2}", "{,}", "{}", "{a}", ".*", ".*?", r"\Z",
]  # fmt: skip
NAMES = [
    "",
    "a",
    "b",
    "ab",
    "aab",
    "abab",
    "a.b",
    "b.ab",
    "ba_1",
    "1",
    "a\n",
    "\n",
    "a-b",
    "}{",
    "{a}",
    "a{1",
    " ",
    "a b",
]


def by_re(text: str) -> re.Pattern[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what sets may mean in the future
        try:
            return re.compile(text)
        except re.error:
            return None


@given(st.lists(st.sampled_from(TOKENS), max_size=9).map("".join))
@example("(a|b)*?a{2}b")
@example("(?!.*b).*a")
@example("^(a|ab)(?=\\.)")
@example("((a*)*|b)+$")
@example("a**")
@example("[b-a]")
@example("(")
def test_patterns_match_what_re_matches(text: str) -> None:
    expected = by_re(text)
    try:
        pattern = Pattern(text)
    except UnsupportedPattern:
        return
    except PatternError:
        assert expected is None
        return
    assert expected is not None
    for name in NAMES:
        assert pattern.match(name) == bool(expected.match(name)), name
        assert pattern.fullmatch(name) == bool(expected.fullmatch(name)), name


UNSUPPORTED = [
    r"(a)\1", "(?<=a)b", "(?<!a)b", "(?i)a", "(?i:a)", "a*+", "(?>a)", "(?(1)a|b)", r"\x41", "(?=a)*", "(?#a)",
    "a{1000000}", "(a{1000}){1000}", "((){99999}){99999}", "(" * 100 + "a" + ")" * 100, "a" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("text", UNSUPPORTED, ids=lambda text: text[:20])
def test_what_is_not_matched_here_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedPattern):
        Pattern(text)


MODULES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(100) for p in "qkvo"]
# Each takes ``re`` longer than anyone waits.
ENDLESS = [
    "([a-z0-9._]+)+!", "(.*)*(.*)*(.*)*x{500}", "(a|a?)+!", "((.*.*)*.*)*!", "(?=(.*a.*)*!)(.*)*!", "(?=(?=(?=.*a).*a).*a).*" * 5,
]  # fmt: skip


@pytest.mark.parametrize("text", ENDLESS)
def test_patterns_that_would_take_for_ever(text: str) -> None:
    patterns = EndPatterns("c.json", "rank_pattern", {text: 3})
    started = time.process_time()
    try:
        for module in MODULES:
            assert patterns.number(module, 8) in (3, 8)
    except SourceError as error:
        assert "rank_pattern" in str(error) and "takes too long to match" in str(error)
    assert time.process_time() - started < 15


def test_many_patterns_share_one_limit() -> None:
    patterns = EndPatterns("c.json", "alpha_pattern", {f"{'(.*a)' * 40}{n}!": n for n in range(900)})
    started = time.process_time()
    with pytest.raises(SourceError, match="c.json: alpha_pattern .* takes too long to match"):
        for module in MODULES * 20:
            patterns.number(module + "a" * 500, 1)
    assert time.process_time() - started < 15
    with pytest.raises(
        SourceError, match=f"c.json: rank_pattern has 300000 patterns; at most {MOST_PATTERNS} are read"
    ):
        EndPatterns("c.json", "rank_pattern", dict.fromkeys(map(str, range(300_000)), 1))


def test_a_pattern_for_each_module_is_fast() -> None:
    """As diffusers writes them."""
    numbers = {module: 1 + n % 9 for n, module in enumerate(MODULES * 4)}
    patterns = EndPatterns("c.json", "rank_pattern", numbers)
    started = time.process_time()
    assert [patterns.number(module, 0) for module in numbers] == list(numbers.values())
    assert time.process_time() - started < 3


ENDS = st.lists(st.sampled_from([*"ab.|()*^$", "a.b", r"\.", ".*"]), min_size=1, max_size=5).map("".join)
MODULE = st.lists(st.sampled_from([*"ab.", "\n"]), max_size=6).map("".join)


@given(st.dictionaries(ENDS, st.integers(1, 9), max_size=4), MODULE, st.booleans())
def test_ends_match_as_in_peft(numbers: dict[str, int], module: str, after_dot: bool) -> None:
    form = r".*\.{}$" if after_dot else r"(.*\.)?({})$"
    compiled = {text: by_re(form.format(text)) for text in numbers}
    try:
        patterns = EndPatterns("c.json", "rank_pattern", numbers, after_dot=after_dot)
    except SourceError:
        assert None in compiled.values()
        return
    hits = [
        value
        for text, value in numbers.items()
        if compiled[text].match(module) or (after_dot and text == module)  # type: ignore[union-attr]
    ]
    assert patterns.number(module, 0) == next(iter(hits), 0)
