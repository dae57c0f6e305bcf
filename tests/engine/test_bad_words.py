"""Words that must not come: the rule by itself, and answers of a real engine."""

import numpy as np
import pytest

from slora_jax import Request, SamplingParams
from slora_jax.errors import InvalidRequest
from slora_jax.request import MAX_BAD_WORDS, Grammar
from slora_jax.text.bad_words import NoBadWords, spellings
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.engine_cases import FIXTURES, Case
from tests.helpers.small_tokenizers import byte_level_folder

LENGTH = 24


def forbidden(rule: NoBadWords, vocabulary: int = 100) -> set[int]:
    words = np.zeros(-(-vocabulary // 32), np.int32)
    rule.allow(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:vocabulary] == 0).tolist())


def test_only_what_would_complete_a_sequence_is_forbidden():
    rule = NoBadWords([(1,), (33,), (5, 63), (5, 31), (6, 5, 99)])
    assert forbidden(rule) == {1, 33}
    for token, then in ((6, {1, 33}), (5, {1, 33, 63, 31, 99}), (5, {1, 33, 63, 31}), (7, {1, 33}), (63, {1, 33})):
        assert rule.accept(token) is False
        assert forbidden(rule) == then
    assert forbidden(NoBadWords([])) == set()


def test_a_word_counts_at_the_beginning_and_after_a_space(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path))

    def encoded(text):
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    hello, spaced = encoded("hello"), encoded(" hello")
    found = spellings(["hello", "  hello", "xyz", "", " "], tokenizer)
    assert found[0] == hello and found.count(hello) == 1
    assert (spaced in found) == (len(spaced) == len(hello))
    assert encoded("xyz") in found and () not in found


@pytest.fixture(scope="module")
def engine():
    engine = Case(FIXTURES / "smollm_gqa3").engine()
    engine.start()
    yield engine
    engine.close()


def answer(engine, **sampling):
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **({"temperature": 0} | sampling))
    return engine.submit(Request((5, 6, 7, 8), "qv-r8", params)).result(60).completions


def has(tokens, sequence) -> bool:
    return any(tuple(tokens[i : i + len(sequence)]) == sequence for i in range(len(tokens)))


def test_an_answer_goes_another_way_where_a_word_would_be_complete(engine):
    free = answer(engine)[0].token_ids
    words = [
        text
        for i in range(LENGTH - 1)
        if "\ufffd" not in (text := engine.tokenizer.decode(free[i : i + 2]))
        and tuple(engine.tokenizer.encode(text, add_special_tokens=False)) == free[i : i + 2]
        and text == text.strip()
        and text
    ]
    assert words, "a word of two tokens is in the answer"
    sequence = tuple(engine.tokenizer.encode(words[0], add_special_tokens=False))
    place = next(i for i in range(LENGTH) if has(free[: i + 1], sequence))
    bound = answer(engine, bad_words=(words[0],))[0].token_ids
    assert bound[:place] == free[:place] and bound[place] != free[place], "until then it is the same"
    assert not has(bound, sequence)
    assert bound == answer(engine, bad_words=(words[0],))[0].token_ids
    drawn = answer(engine, bad_words=tuple(words), temperature=1.0, seed=1, n=4)
    for completion in drawn:
        for word in words:
            assert not has(completion.token_ids, tuple(engine.tokenizer.encode(word, add_special_tokens=False)))
    assert len({completion.token_ids for completion in drawn}) == 4, "each answer has a rule of its own"
    assert answer(engine)[0].token_ids == free


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": ("",)},
        {"bad_words": (5,)},
        {"bad_words": ("x" * 257,)},
        {"bad_words": ("\ud800",)},
        {"bad_words": ("x",) * (MAX_BAD_WORDS + 1)},
        {"bad_words": 5},
        {"bad_words": ("x",), "grammar": Grammar("regex", "a")},
        {"bad_words": ("x",), "allowed_token_ids": (5,)},
    ],
)
def test_refused(fields):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**fields)
    assert refusal.value.param == "bad_words"
