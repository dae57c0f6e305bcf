"""Strategies for JSON values, harmless and hostile, and for the fields of the server's two endpoints."""

import math

from hypothesis import strategies as st

NUMBERS = (
    st.integers(-5, 300)
    | st.sampled_from([2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31) - 1, -(2**63)])
    | st.sampled_from([10**400, -(10**400), 10**4299])
    | st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-46, 1e-40, 1e-308, 5e-324, 1e38, 3.5e38, 1e308])
    | st.sampled_from([math.nan, math.inf, -math.inf])
    | st.floats()
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", "\ud800", "a\udfffb", "\x00", "base", "1", "é😀"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)

NAMES = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "n",
    "stream", "stream_options", "return_token_ids", "priority", "slo_ms", "logprobs", "top_logprobs", "echo", "best_of",
    "prompt_logprobs", "suffix", "logit_bias", "tools", "tool_choice", "response_format", "store",
    "parallel_tool_calls", "modalities", "user", "metadata", "self", "__class__", "model_config", "nobody",
)  # fmt: skip
"""Every field that either endpoint knows, and some that neither does."""

_MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]) | TEXTS, VALUES, max_size=4)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": VALUES})
    | VALUES,
    max_size=3,
)
_PROMPTS = st.lists(TEXTS | st.lists(NUMBERS, max_size=3) | NUMBERS, max_size=4)


def fields(most: int = 4) -> st.SearchStrategy[dict]:
    """Some fields with any values; prompts and messages are mostly near to what they should be."""
    special = {"messages": _MESSAGES, "prompt": _PROMPTS, "stop": _PROMPTS, "stop_token_ids": _PROMPTS}
    entry = st.sampled_from(NAMES).flatmap(
        lambda name: st.tuples(st.just(name), special.get(name, st.nothing()) | VALUES)
    )
    return st.lists(entry, max_size=most).map(dict)
