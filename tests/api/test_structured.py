"""What an answer must look like, under the names by which OpenAI's and vLLM's clients ask for it."""

import json

import pytest

from slora_jax.api.app import create_app
from slora_jax.request import Grammar
from tests.helpers.fake_engine import FakeEngine

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


@pytest.fixture
def engine(tmp_path):
    engine = FakeEngine(tmp_path)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def client(engine):
    return create_app(engine).test_client()


def asked(client, engine, path="/v1/chat/completions", **fields):
    """The sampling parameters that a body with these fields asks for."""
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = client.post(path, json={"model": "base", "max_tokens": 4, **prompt, **fields})
    assert answer.status_code == 200, answer.json
    return engine.generations[-1].request.sampling


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"guided_regex": "a|b"}, Grammar("regex", "a|b")),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar("regex", "a")),
    ],
)
def test_the_names_of_a_grammar(client, engine, path, fields, grammar):
    assert asked(client, engine, path, **fields).grammar == grammar


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_a_schema_is_one_however_it_is_sent(client, engine, fields):
    grammar = asked(client, engine, **fields).grammar
    assert grammar.kind == "json_schema" and json.loads(grammar.text) == SCHEMA


@pytest.mark.parametrize("fields", [{"structured_outputs": {"choice": ["x", "y"]}}, {"guided_choice": ["x", "y"]}])
def test_choices(client, engine, fields):
    grammar = asked(client, engine, **fields).grammar
    assert grammar.kind == "choice" and json.loads(grammar.text) == ["x", "y"]


def test_biases_and_limits_of_tokens(client, engine):
    sampling = asked(client, engine, logit_bias={"5": -100, "7": 1.5}, min_tokens=3, allowed_token_ids=[5, 9])
    assert sampling.logit_bias == ((5, -100), (7, 1.5))
    assert (sampling.min_tokens, sampling.allowed_token_ids) == (3, (5, 9))
