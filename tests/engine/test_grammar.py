"""Answers that must have a form: whatever the model would rather say, beside others that have none."""

import json
import re

import pytest

from slora_jax.errors import InvalidRequest
from slora_jax.request import Grammar
from tests.helpers.engine_cases import FIXTURES, greedy, make_engine, run

CASE = FIXTURES / "smollm_gqa3"
PROMPT = tuple(range(5, 25))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    return make_engine(CASE / "model", CASE / "adapters", pages=200)


def answer(engine, *requests):
    return [result.completions[0] for result in run(engine, *(engine.submit(request) for request in requests))]


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() == SCHEMA["properties"].keys()
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 2
        and {*value["tags"]} <= {"a", "b"}
    )


COLOURS = ["red", "green", 'with "quotes" and \\']
GRAMMARS = {
    "json_schema": (json.dumps(SCHEMA), is_of_schema),
    "regex": (r"(yes|no), [a-z]{3,6}\.", re.compile(r"(yes|no), [a-z]{3,6}\.").fullmatch),
    "choice": (
        json.dumps(["red", "green", 'with "quotes" and \\']),
        ["red", "green", 'with "quotes" and \\'].__contains__,
    ),
    "lark": ('start: "(" start ")" | "x" NUMBER\nNUMBER: /[0-9]{2}/', re.compile(r"\(*x[0-9]{2}\)*").fullmatch),
}


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_model_that_was_never_trained_answers_in_the_form(engine, kind, temperature):
    text, has_form = GRAMMARS[kind]
    # Nested as deep as the random model likes: it is made to come to an end in time.
    requests = [
        greedy(PROMPT, adapter, 120, temperature=temperature, seed=seed, grammar=Grammar(kind, text))
        for seed, adapter in enumerate((None, *engine.adapters()))
    ]
    for completion in answer(engine, *requests):
        if completion.finish_reason == "length" and kind in ("lark", "json_schema"):
            continue  # spaces and brackets for ever, which the form allows
        assert completion.finish_reason == "stop", completion.error
        assert has_form(completion.text), completion.text


def test_json_has_no_endless_space_between_its_parts(engine):
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 3, "maxItems": 3}
    for space, longest in ((" ", 16), ("\n", 1)):
        wish = {"logit_bias": ((engine.tokenizer.encode(space)[-1], 100.0),)}
        (completion,) = answer(
            engine, greedy(PROMPT, None, 200, **wish, grammar=Grammar("json_schema", json.dumps(schema)))
        )
        assert completion.finish_reason == "stop" and len(json.loads(completion.text)) == 3
        runs = [len(run) for run in re.findall(f"{space}+", completion.text)]
        assert runs and max(runs) <= longest


def test_others_in_the_batch_answer_as_they_would_alone(engine):
    free = [greedy(PROMPT[i:], adapter, 40) for i, adapter in enumerate((None, *engine.adapters()))]
    alone = [answer(engine, request)[0].token_ids for request in free]
    bound = [greedy(PROMPT, None, 40, grammar=Grammar(kind, text)) for kind, (text, _) in GRAMMARS.items()]
    together = answer(engine, *(request for pair in zip(free, bound, strict=False) for request in pair))
    assert [completion.token_ids for completion in together[::2]] == alone[: len(together[::2])]


def test_each_of_n_answers_has_the_form_and_its_own_text(engine):
    grammar = Grammar("regex", "[a-z]{12}")
    (result,) = run(engine, engine.submit(greedy(PROMPT, None, 40, temperature=1.0, seed=1, n=4, grammar=grammar)))
    texts = [completion.text for completion in result.completions]
    assert all(re.fullmatch("[a-z]{12}", text) for text in texts) and len(set(texts)) == 4


def test_a_bias_brings_a_token_and_a_minimum_keeps_the_end_away(engine):
    free = answer(engine, greedy(PROMPT, None, 8))[0].token_ids
    wanted = next(t for t in range(40, 60) if t not in free)
    assert answer(engine, greedy(PROMPT, None, 8, logit_bias=((wanted, 100.0),)))[0].token_ids == (wanted,) * 8
    without = answer(engine, greedy(PROMPT, None, 8, logit_bias=((free[0], -100.0),)))[0].token_ids
    assert free[0] not in without
    # The token that would come third ends the answer, and cannot come before the sixth.
    end = free[2]
    first = free.index(end)
    assert len(answer(engine, greedy(PROMPT, None, 8, stop_token_ids=(end,)))[0].token_ids) == first + 1
    late = answer(engine, greedy(PROMPT, None, 8, stop_token_ids=(end,), min_tokens=6))[0].token_ids
    assert len(late) > 6 and end not in late[:6]


def test_an_answer_that_is_complete_ends_whatever_minimum_was_asked_for(engine):
    request = greedy(PROMPT, None, 40, min_tokens=30, grammar=Grammar("regex", "(ab?){1,2}"))
    (completion,) = answer(engine, request)
    assert completion.finish_reason == "stop" and re.fullmatch("(ab?){1,2}", completion.text), completion.error


def test_a_grammar_and_a_list_of_tokens_exclude_each_other():
    with pytest.raises(InvalidRequest, match="allowed_token_ids and a grammar can leave no token"):
        greedy(PROMPT, None, 8, allowed_token_ids=(5,), grammar=Grammar("regex", "a"))


def test_only_allowed_tokens_come(engine):
    allowed = tuple(range(30, 40))
    tokens = answer(engine, greedy(PROMPT, None, 30, temperature=2.0, seed=2, allowed_token_ids=allowed))[0].token_ids
    assert set(tokens) <= set(allowed) and len(set(tokens)) > 2


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type": "foo"}', "the json schema cannot be used: .*foo"),
        ("json_schema", "[1]", r"it must be a JSON object, got \[1\]"),
        ("json_schema", "{", "it is not valid JSON"),
        ("regex", "(", "the regex cannot be used: .*unclosed group"),
        ("lark", "start: foo", 'the lark cannot be used: .*unknown name: "foo"'),
        ("choice", "[]", "a JSON list of texts that are not empty"),
        ("choice", '["a", 1]', "a JSON list of texts"),
    ],
)
def test_a_grammar_that_is_not_valid_gets_a_sentence(engine, kind, text, message):
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(greedy(PROMPT, None, 8, grammar=Grammar(kind, text)))
    assert engine.stats()["waiting"] == 0


def test_without_a_tokenizer_there_is_no_text_to_have_a_form():
    engine = make_engine(FIXTURES / "llama3_gqa" / "model")
    with pytest.raises(InvalidRequest, match="this model has no tokenizer"):
        engine.submit(greedy(PROMPT, None, 8, grammar=Grammar("regex", "a+")))


def test_tokens_of_no_vocabulary_are_refused(engine):
    vocabulary = engine.model_config.vocab_size
    for field, value in (("logit_bias", ((vocabulary, 1.0),)), ("allowed_token_ids", (vocabulary,))):
        with pytest.raises(InvalidRequest, match=f"{field}: token id {vocabulary} is outside the vocabulary"):
            engine.submit(greedy(PROMPT, None, 8, **{field: value}))
