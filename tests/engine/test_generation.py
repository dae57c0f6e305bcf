"""Stop strings that are special tokens: the tokenizer knows their ids, and the engine ends at them."""

from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.engine_cases import greedy, run
from tests.helpers.small_tokenizers import byte_level


def test_a_special_token_as_stop_string_is_a_token_id():
    tokenizer = Tokenizer(byte_level())
    (expected,) = tokenizer.encode("<|im_end|>")
    assert tokenizer.stop_token_ids(("<|im_end|>", "zzz")) == {expected}


def test_an_answer_ends_at_a_special_token_that_is_a_stop_string(tiny_case, monkeypatch):
    engine = tiny_case.engine()
    prompt = tiny_case.requests[0]["prompt"]
    (free,) = run(engine, engine.submit(greedy(prompt, None, 12)))
    tokens = free.completions[0].token_ids
    place = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    # Stands for a special token: the tiny model never gives one of its own.
    monkeypatch.setattr(engine.tokenizer, "stop_token_ids", lambda stops: {tokens[place]} if stops else set())
    (stopped,) = run(engine, engine.submit(greedy(prompt, None, 12, stop=("<|im_end|>",))))
    (completion,) = stopped.completions
    assert completion.finish_reason == "stop" and completion.token_ids == tokens[: place + 1]
    assert completion.text == engine.tokenizer.decode(tokens[:place])
