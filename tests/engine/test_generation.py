"""Tokens to text, without an engine."""

import pytest

from slora_jax.engine.generation import OutputText
from slora_jax.request import Request, SamplingParams
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.small_tokenizers import byte_level


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_string_that_is_a_special_token_ends_the_answer(ignore_eos):
    tokenizer = Tokenizer(byte_level())
    tokens = tokenizer.encode("hello w<|im_end|>orld")
    sampling = SamplingParams(max_tokens=20, stop=("<|im_end|>", "zzz"), ignore_eos=ignore_eos)
    output = OutputText(Request((1,), sampling=sampling), 0, 20, (), tokenizer)
    deltas = []
    for token in tokens:
        deltas.append(output.push(token, None))
        if deltas[-1].finish_reason:
            break
    assert "".join(delta.text for delta in deltas) == "hello w"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].token_ids == (tokenizer.token_id("<|im_end|>"),)
