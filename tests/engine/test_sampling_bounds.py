"""Whatever ``SamplingParams`` takes, the sampler's arrays hold it and a token of the vocabulary comes out."""

import functools
import math
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.engine.sampling import build_sampler_inputs, sample
from slora_jax.errors import InvalidRequest
from slora_jax.request import BOUNDS, MAX_STOP_LENGTH, MAX_STOPS, MIN_TEMPERATURE, Request, SamplingParams
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence

VOCABULARY = 64
OF_LISTS = ("stop_token_ids", "allowed_token_ids", "logit_bias", "prompt")
SAMPLING = [name for name in BOUNDS if name not in (*OF_LISTS, "priority", "slo_ms")]

sampled = functools.partial(jax.jit, static_argnames=("shape", "num_tokens_out"))(sample)


def draw(logits: np.ndarray, rules: list[SamplingParams], history: list[int]) -> tuple[np.ndarray, object]:
    """One token a rule, of the same logits; and the inputs that the sampler got."""
    sequences = [
        Sequence(i, list(history), 1, rule.max_tokens, rule, seed=rule.seed or 0) for i, rule in enumerate(rules)
    ]
    entries = [ScheduledSequence(sequence, len(history) - 1, 1, True, 0) for sequence in sequences]
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise"):
        warnings.simplefilter("error")
        shape, inputs = build_sampler_inputs(entries, {}, len(rules), VOCABULARY)
        out = sampled(np.tile(logits, (len(rules), 1)), inputs, np.zeros(1, np.int32), shape, len(rules))
    return np.asarray(out.tokens), inputs


def edges(name: str) -> list:
    """The bounds themselves, and what is next to them on either side, in float32 and in Python."""
    low, high = BOUNDS[name].least, BOUNDS[name].most
    if BOUNDS[name].kind is int:
        return [low, low + 1, high - 1, high]
    return [low, math.nextafter(low, high), float(np.nextafter(np.float32(low), np.float32(high))), high, 1e-46, -0.0]


def hostile(name: str) -> list:
    low, high = BOUNDS[name].least, BOUNDS[name].most
    beyond = (
        [low - 1, high + 1, 1.5, 1.0]
        if BOUNDS[name].kind is int
        else [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
    )
    floats = [math.nan, math.inf, -math.inf, 1e308]
    integers = [10**400, -(10**400), 10**5000, 2**64 + 1]
    return [*beyond, *floats, *integers, True, False, "1", "", [1], {}, b"1", 1j, np.float32(1), object()]


@pytest.mark.parametrize("name", SAMPLING)
def test_numbers_beyond_the_bounds_are_refused_by_name(name):
    for value in hostile(name):
        with pytest.raises(InvalidRequest, match=f"^{name} must be a") as refusal:
            SamplingParams(**{name: value})
        assert refusal.value.param == name
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("name", ["priority", "slo_ms"])
def test_numbers_of_requests_are_checked_too(name):
    for value in hostile(name):
        with pytest.raises(InvalidRequest, match=f"^{name} must be a"):
            Request((1,), **{name: value})


@pytest.mark.parametrize("prompt", ["text", b"text", 5, None, [1.0], [2**31], [-(2**31) - 1], ["a"], [None], [10**400]])
def test_prompts_that_are_no_token_ids(prompt):
    with pytest.raises(InvalidRequest, match="prompt must be token ids"):
        Request(prompt)


@pytest.mark.parametrize("value", [5, None, {"a": 1}.values, [""], ["x", 5], ["\ud800"], ["x" * (MAX_STOP_LENGTH + 1)]])
def test_stops_that_can_never_match(value):
    with pytest.raises(InvalidRequest, match=r"^stop") as refusal:
        SamplingParams(stop=value)
    assert refusal.value.param == "stop"


@pytest.mark.parametrize("value", [5, None, ["1"], [-1], [2**31], [1.0], [True], [10**5000]])
def test_stop_tokens_that_are_none(value):
    with pytest.raises(InvalidRequest, match=r"^stop_token_ids must be"):
        SamplingParams(stop_token_ids=value)


@pytest.mark.parametrize("value", [5, ["1"], [-1], [2**31], [1.0], [True], [10**5000], []])
def test_allowed_tokens_that_are_none(value):
    with pytest.raises(InvalidRequest, match=r"^allowed_token_ids must"):
        SamplingParams(allowed_token_ids=value)


@pytest.mark.parametrize(
    "value",
    [5, None, [1], ["ab1"], {"1": 1.0}, {1: "x"}, {1: 100.5}, {1: math.nan}, {-1: 1.0}, {2**31: 1.0}, {True: 1.0}],
)
def test_biases_that_are_none(value):
    with pytest.raises(InvalidRequest, match=r"^logit_bias must"):
        SamplingParams(logit_bias=value)


def test_a_minimum_of_tokens_above_the_maximum():
    assert SamplingParams(max_tokens=3, min_tokens=3).limits_tokens
    with pytest.raises(InvalidRequest, match=r"^min_tokens \(4\) must be at most max_tokens \(3\)") as refusal:
        SamplingParams(max_tokens=3, min_tokens=4)
    assert refusal.value.param == "min_tokens"


def test_stops_are_bounded():
    assert SamplingParams(stop=["x" * MAX_STOP_LENGTH] * MAX_STOPS, stop_token_ids=range(MAX_STOPS))
    for name, entries in (("stop", ["x"]), ("stop_token_ids", [1])):
        with pytest.raises(InvalidRequest, match=f"{name} may have at most {MAX_STOPS} entries"):
            SamplingParams(**{name: entries * (MAX_STOPS + 1)})


def test_a_temperature_too_low_to_divide_by_is_greedy():
    for value in (0, -0.0, 1e-320, 1e-46, 1e-40, math.nextafter(MIN_TEMPERATURE, 0)):
        assert SamplingParams(temperature=value).temperature == 0
    assert SamplingParams(temperature=MIN_TEMPERATURE).temperature == MIN_TEMPERATURE


LOGITS = st.sampled_from(
    [
        np.linspace(-30, 30, VOCABULARY, dtype=np.float32),
        np.zeros(VOCABULARY, np.float32),
        np.full(VOCABULARY, -1e30, np.float32),
        np.where(np.arange(VOCABULARY) % 2, 1e30, -1e30).astype(np.float32),
        np.where(np.arange(VOCABULARY) == 5, 1e-30, 0).astype(np.float32),
    ]
)


@st.composite
def rules(draw_value) -> SamplingParams:
    fields = {}
    for name in SAMPLING:
        bounds = BOUNDS[name]
        values = st.sampled_from([value for value in edges(name) if bounds.allow(value)])
        between = (
            st.integers(bounds.least, bounds.most)
            if bounds.kind is int
            else st.floats(bounds.least, bounds.most, exclude_min=bounds.above_least)
        )
        fields[name] = draw_value(values | between)
    fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
    token = st.integers(0, VOCABULARY - 1)
    fields["allowed_token_ids"] = draw_value(st.none() | st.lists(token, min_size=1))
    fields["logit_bias"] = draw_value(st.dictionaries(token, st.floats(-100, 100), max_size=5))
    return SamplingParams(**fields)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(logits=LOGITS, chosen=st.lists(rules(), min_size=4, max_size=4), history=st.sampled_from([[3] * 8, [*range(8)]]))
def test_every_rule_allowed_gives_a_token_of_the_vocabulary(logits, chosen, history):
    tokens, inputs = draw(logits, chosen, history)
    assert ((tokens >= 0) & (tokens < VOCABULARY)).all()
    for rule, token in zip(chosen, tokens.tolist(), strict=True):
        assert rule.allowed_token_ids is None or token in rule.allowed_token_ids
    for rule, position in zip(chosen, range(len(chosen)), strict=True):
        for name in ("temperature", "top_p", "min_p"):
            value = np.asarray(getattr(inputs, name))[position]
            assert np.isfinite(value)
            assert rule.temperature == 0 or value == np.float32(getattr(rule, name))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rules())
def test_no_rule_allowed_draws_what_has_no_probability(rule):
    """With a NaN on the way, the token would be the first one."""
    logits = np.where(np.arange(VOCABULARY) % 2, 1e30, -1e30).astype(np.float32)
    rule = rule.replace(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, allowed_token_ids=None)
    tokens, _ = draw(logits, [rule], [3])
    assert tokens[0] % 2 == 1


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 1, 2**31 - 1])
def test_a_top_k_beyond_the_vocabulary_keeps_all(top_k):
    logits = np.linspace(-1, 1, VOCABULARY, dtype=np.float32)
    everything = [SamplingParams(seed=seed, min_p=1e-9) for seed in range(16)]
    without, _ = draw(logits, everything, [1])
    with_k, _ = draw(logits, [rule.replace(top_k=top_k) for rule in everything], [1])
    assert (without == with_k).all()
    assert len(set(without.tolist())) > 4


def test_seeds_of_either_sign_are_64_bits():
    logits = np.linspace(-1, 1, VOCABULARY, dtype=np.float32)
    pairs = [(-1, 2**64 - 1), (-(2**63), 2**63), (0, 0)]
    tokens, inputs = draw(logits, [SamplingParams(seed=seed) for pair in pairs for seed in pair], [1])
    assert (np.asarray(inputs.seed)[::2] == np.asarray(inputs.seed)[1::2]).all()
    assert (tokens[::2] == tokens[1::2]).all()
    assert np.asarray(inputs.seed)[0].tolist() == [2**32 - 1, 2**32 - 1]


@pytest.mark.parametrize("penalty", [BOUNDS["repetition_penalty"].least, BOUNDS["repetition_penalty"].most])
def test_the_largest_penalties_keep_logits_in_order(penalty):
    """A seen token of the largest logit: divided by 100 it loses, multiplied by 100 it still wins."""
    logits = np.array([5.0, 4.0] + [0.0] * (VOCABULARY - 2), np.float32)
    tokens, _ = draw(logits, [SamplingParams(temperature=0, repetition_penalty=penalty)], [0])
    assert tokens.tolist() == [int(penalty > 1)]
