"""What an answer must look like, under the names by which OpenAI's and vLLM's clients ask for it."""

import json

import pytest

from slora_jax.request import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


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


def test_vllms_fields_at_values_that_change_nothing(client, engine):
    harmless = {"bad_words": [], "use_beam_search": False, "length_penalty": 1.0, "prompt_logprobs": None}
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert asked(client, engine, path, spaces_between_special_tokens=True, **harmless)
    refused = client.post("/v1/completions", json={"model": "base", "prompt": "x", "length_penalty": 2.0})
    assert refused.status_code == 400 and refused.json["error"]["param"] == "length_penalty"


def test_the_end_of_a_prompt_is_kept(client, engine):
    for prompt, kept in (("abcdef", 2), ([5, 6, 7, 8], 3), ([[5] * 1000], -1)):
        body = {"model": "base", "prompt": prompt, "max_tokens": 1, "truncate_prompt_tokens": kept}
        assert client.post("/v1/completions", json=body).status_code == 200
        sent = engine.generations[-1].request.prompt
        whole = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if kept == -1:
            assert sent == (5,) * (engine.max_model_len - 1)
            assert client.post("/v1/completions", json=body | {"max_tokens": 40}).status_code == 200
            assert engine.generations[-1].request.prompt == (5,) * (engine.max_model_len - 40)
        else:
            assert sent == tuple(whole[-kept:])
    for wrong in (0, -2, 10**6, 1.5, True):
        body = {"model": "base", "prompt": "abc", "truncate_prompt_tokens": wrong}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400 and answer.json["error"]["param"] == "truncate_prompt_tokens"


def test_an_answer_goes_on_from_the_last_message(client, engine):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    body = {"model": "base", "max_tokens": 2, "messages": messages, "continue_final_message": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.generations[-1].prompt_text.endswith("Well, ")
    for wrong in (messages[:1], []):
        answer = client.post("/v1/chat/completions", json=body | {"messages": wrong})
        assert answer.status_code == 400


def test_variables_of_the_chat_template(client, engine):
    assert asked(client, engine, chat_template_kwargs={"date": "today"}, add_generation_prompt=False)
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json["error"]["param"] == "chat_template_kwargs.messages"


def test_usage_in_every_chunk(client, engine):
    body = {"model": "base", "prompt": "hello", "max_tokens": 9, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = client.post("/v1/completions", json=body | {"stream_options": options}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 9 and len(counts) > 1
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(engine.generations[-1].request.prompt)}


def test_offsets_count_the_text_not_how_a_part_of_a_character_is_shown(client, engine, monkeypatch):
    """Four tokens make one character; the next token begins behind it."""
    text = "😀a"
    monkeypatch.setattr(engine, "answer", lambda request: engine.tokenizer.encode(text))
    body = {"model": "base", "prompt": "x", "max_tokens": 20, "logprobs": 0}
    shape = client.post("/v1/completions", json=body).json["choices"][0]["logprobs"]
    whole = {0: 0, len(shape["tokens"]) - 1: 1}
    assert {place: shape["text_offset"][place] for place in whole} == whole
    assert set(shape["text_offset"][:-1]) == {0}
