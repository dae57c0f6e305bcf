"""Expressions over module names give what Python's ``re`` gives under PEFT's rules, and never take long."""

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slora_jax.adapters.names import BadExpression, Expressions, NamePatterns, ends

NAMES = [
    f"model.layers.{layer}.{path}_proj" for layer in (0, 1, 10) for path in ("self_attn.q", "self_attn.v", "mlp.up")
]
PIECES = [
    "q", "v", "up", "_proj", ".", r"\.", ".*", ".+?", "(", "(?:", ")", "|", "[qv]", "[^q]", "?", "{1,2}", r"\d", r"\w+",
    "layers", "0", "1", "self_attn", "mlp", "model", "^", "$", "(?!", "(?<=", r"\b", "q_proj", "self_attn.q_proj",
    "layers.1.", "-", "[0-1]",
]  # fmt: skip
expressions = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
many = settings(max_examples=3000, deadline=None, derandomize=True, database=None)


def first_by_re(keys: list[str], name: str) -> int | None:
    return next((i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), None)


@many
@given(st.lists(expressions, min_size=1, max_size=3, unique=True))
def test_the_first_match_is_the_one_that_re_finds(keys):
    # Python's own matcher takes for ever for some of those.
    assume(not any(re.search(r"\)(?:[+*{])", key) for key in keys))
    try:
        patterns = NamePatterns([(key, i) for i, key in enumerate(keys)], Expressions())
    except BadExpression:
        return
    for name in NAMES:
        assert patterns.get(name, None) == first_by_re(keys, name), (keys, name)


@many
@given(expressions)
def test_whole_matches_are_those_of_re(text):
    assume(not re.search(r"\)(?:[+*{])", text))
    try:
        expression = Expressions().compile(text)
    except BadExpression:
        return
    for name in NAMES:
        assert expression.fullmatch(name) == (re.fullmatch(text, name) is not None), (text, name)


@pytest.mark.parametrize("text", ["(a+)+b", "(.*)*(.*)*(.*)*x", ".*.*.*.*.*.*.*.*.*.*x", "(l|a|y|e|r|s|.)*" * 20 + "x"])
def test_what_backtracks_for_ever_elsewhere_does_not_here(text):
    patterns = NamePatterns([(text, 1)], Expressions())
    start = time.thread_time()
    assert all(patterns.get("model.layers." + "a" * 60, 0) == 0 for _ in range(100))
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    "text", ["a" + "?" * 500 + "\0", "(" * 900, "[" + "a-" * 400, "\\" * 999, "{" * 500, "(?" * 400]
)
def test_what_is_no_expression_is_refused_at_once(text):
    start = time.thread_time()
    with pytest.raises(BadExpression):
        Expressions().compile(text)
    assert time.thread_time() - start < 1


def test_ends():
    assert ends("a.bc.d") == ("a.bc.d", "bc.d", "d")
