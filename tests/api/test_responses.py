"""The Responses API: what its bodies come to, and its answers, whole and as events."""

import json

import pytest

from slora_jax.api.app import create_app
from tests.helpers.fake_engine import FAILS, LATE
from tests.helpers.tool_engine import TAGGED, running_tool_engine

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'
TAGGED_CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def respond(client, **body):
    return client.post("/v1/responses", json={"model": "base", "input": "hello", "max_output_tokens": 12} | body)


def events(response):
    """Of a stream, which must number and name them as OpenAI does."""
    assert response.status_code == 200, response.text
    assert response.content_type == "text/event-stream; charset=utf-8"
    *whole, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for event in whole:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def kinds(found):
    """Their types, less what all begin with, and each only once in a row."""
    names = [event["type"].removeprefix("response.") for event in found]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def refusal(response, param, status=400):
    assert response.status_code == status, response.text
    error = response.json["error"]
    assert error["param"] == param, error
    return error["message"]


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta"]
MESSAGE_ENDS = ["output_text.done", "content_part.done", "output_item.done"]
ONE_CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


# ---- whole answers


def test_a_response(client, engine):
    body = respond(client, model="pirate", metadata={"a": "b"}, temperature=0.5, top_p=0.25).json
    assert body["id"].startswith("resp_")
    (item,) = body["output"]
    assert item["id"].startswith("msg_")
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    (part,) = item["content"]
    assert part == {"type": "output_text", "text": "pirate says ", "annotations": [], "logprobs": []}
    prompt = len(engine.generations[-1].request.prompt)
    assert body["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 12,
    }
    said = {
        "object": "response",
        "model": "pirate",
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "error": None,
        "temperature": 0.5,
        "top_p": 0.25,
        "max_output_tokens": 12,
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    }
    assert {name: body[name] for name in said} == said


def test_a_response_that_is_complete(client):
    body = respond(client, stop=" says").json
    assert (body["status"], body["incomplete_details"]) == ("completed", None)
    assert body["completed_at"] >= body["created_at"]
    assert body["output"][0]["status"] == "completed" and body["output"][0]["content"][0]["text"] == "base"


def test_without_a_limit_an_answer_fills_the_context(client, engine):
    body = respond(client, max_output_tokens=None).json
    assert body["usage"]["total_tokens"] == engine.max_model_len
    assert body["max_output_tokens"] is None


def test_log_probabilities(client):
    for asked in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}):
        tokens = respond(client, max_output_tokens=3, **asked).json["output"][0]["content"][0]["logprobs"]
        assert len(tokens) == 3 and set(tokens[0]) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(tokens[1]["top_logprobs"]) == 2
    (tokens,) = (
        item["content"][0]["logprobs"]
        for item in respond(client, include=["message.output_text.logprobs"]).json["output"]
    )
    assert [token["top_logprobs"] for token in tokens] == [[]] * 12


def test_the_same_answer_as_a_chat(client):
    chat = {"model": "json", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}
    text = client.post("/v1/chat/completions", json=chat).json["choices"][0]["message"]["content"]
    body = respond(client, model="json", max_output_tokens=50).json
    assert body["output"][0]["content"][0]["text"] == text


# ---- input


def test_items_are_the_messages_of_a_chat(tmp_path):
    with running_tool_engine(tmp_path) as engine:
        engine.says = "wet"
        client = create_app(engine).test_client()
        items = [
            {"role": "developer", "content": "Sing."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
            {
                "type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None,
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
            },
            {
                "type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather",
                "arguments": '{"city": "Oslo"}', "status": "completed", "caller": None,
            },
            {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "wet"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
        ]  # fmt: skip
        assert respond(client, instructions="Be brief.", input=items, tools=[WEATHER]).status_code == 200
        prompt = engine.generations[-1].prompt_text  # whose tokenizer has no line breaks
        assert prompt.startswith("Tools: weather")
        said = prompt.partition("weather")[2]
        for each in ("system: Be brief.", "system: Sing.", "Rain?", "I look.", "tool: wet", "noon", "assistant: "):
            _, found, said = said.partition(each)
            assert found, (each, prompt)
        # Both calls are of the one message that says the text before them.
        assert ' calls weather({"city": "Oslo"}) calls clock({})' in prompt


def test_fields_of_a_chat_mean_what_they_mean_there(client, engine):
    fields = {"temperature": 0.5, "top_k": 7, "seed": 3, "min_p": 0.1, "ignore_eos": True}
    assert respond(client, **fields, user="me", store=True, max_tool_calls=3, reasoning={"effort": "none"}).json
    sampling = engine.generations[-1].request.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_forms_of_the_answer(client, engine):
    def grammar(form):
        assert respond(client, text={"format": form}).status_code == 200
        return engine.generations[-1].request.sampling.grammar

    assert grammar({"type": "text"}) is None
    assert json.loads(grammar({"type": "json_object"}).text) == {"type": "object"}
    named = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    assert json.loads(grammar(named).text) == SCHEMA
    assert respond(client, text={"format": named}).json["text"]["format"] == named


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "nobody", "content": "x"}], "instructions": "y"}, "input[0].role"),
        ({"input": [{"role": [], "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "tool_calls": 5}]}, "input[0].tool_calls"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": {}, "summary": []}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": "x"}, {"type": "function_call", "name": "f", "arguments": "{}"}]},
            "input[1].call_id",
        ),
        (
            {
                "input": [
                    {"role": "assistant", "content": "x"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call", "call_id": "d", "name": "f", "arguments": "["},
                ]
            },
            "input[2].arguments",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "call_id": 5, "output": "x"}]}, "input[0].call_id"),
        ({"instructions": ["x"]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"text": "json"}, "text"),
        ({"text": {"form": 1}}, "text.form"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [5]}, "tools[0].type"),
        ({"tools": [WEATHER | {"name": ""}]}, "tools[0].name"),
        ({"tools": [WEATHER | {"parameters": []}]}, "tools[0].parameters"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"include": "x"}, "include"),
        ({"include": [{}]}, "include"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_refused_by_its_own_name(client, body, param):
    message = refusal(respond(client, **body), param)
    assert not any(name in message for name in ("messages[", "response_format", "max_completion_tokens", ".function"))
    if "stream_options" not in body:
        assert respond(client, **body, stream=True).status_code == 400


def test_other_refusals_are_those_of_a_chat(client):
    assert refusal(respond(client, model="nobody"), "model", 404)
    assert "context_length_exceeded" in refusal(respond(client, input="x" * 300), "input")
    assert client.post("/v1/responses", json=[]).status_code == 400
    assert client.get("/v1/responses/resp_1").status_code == 404


# ---- streams


def test_the_events_of_a_message(client):
    found = events(respond(client, stream=True, stop=" says", top_logprobs=0))
    assert kinds(found) == ["created", "in_progress", *MESSAGE, *MESSAGE_ENDS, "completed"]
    created, done = found[0]["response"], found[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (done["status"], done["id"]) == ("completed", created["id"])
    assert done["usage"]["input_tokens_details"]["cached_tokens"] == 3
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "base"
    (item,) = done["output"]
    places = {(event["item_id"], event["output_index"], event["content_index"]) for event in deltas}
    assert places == {(item["id"], 0, 0)}
    tokens = [token for event in deltas for token in event["logprobs"]]
    assert len(tokens) == done["usage"]["output_tokens"]
    assert item["content"] == [{"type": "output_text", "text": "base", "annotations": [], "logprobs": tokens}]
    by_type = {event["type"].removeprefix("response."): event for event in found}
    assert by_type["output_item.added"]["item"] == item | {"status": "in_progress", "content": []}
    assert by_type["output_item.done"]["item"] == item
    assert by_type["content_part.done"]["part"] == item["content"][0]
    assert by_type["output_text.done"]["text"] == "base"


def test_a_stream_says_what_a_whole_answer_says(client):
    whole = respond(client, max_output_tokens=40, instructions="Sing.", top_logprobs=1).json
    streamed = events(respond(client, max_output_tokens=40, instructions="Sing.", top_logprobs=1, stream=True))[-1]
    assert streamed["type"] == "response.incomplete"
    for body in (whole, streamed["response"]):
        del body["id"], body["created_at"], body["output"][0]["id"]
    assert streamed["response"] == whole


def test_an_empty_answer_is_an_empty_message(client):
    asked = {"stop": "base"}
    (item,) = respond(client, **asked).json["output"]
    assert item["content"][0]["text"] == ""
    found = events(respond(client, **asked, stream=True))
    assert kinds(found) == ["created", "in_progress", *MESSAGE[:2], *MESSAGE_ENDS, "completed"]
    assert found[-1]["response"]["output"][0]["content"] == item["content"]


def test_a_stream_that_fails(client, engine):
    engine.tokenizer.apply_chat_template = lambda *args, **kwargs: FAILS
    found = events(respond(client, stream=True))
    assert found[-1]["type"] == "response.failed"
    response = found[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "the logits are not finite"}
    engine.tokenizer.apply_chat_template = lambda *args, **kwargs: LATE
    found = events(respond(client, stream=True))
    assert found[-1]["response"]["error"]["code"] == "rate_limit_exceeded"


# ---- tools


def ask(engine, **body):
    return respond(create_app(engine).test_client(), **{"tools": [WEATHER], "max_output_tokens": 200} | body)


def test_calls(tmp_path):
    with running_tool_engine(tmp_path) as engine:
        engine.says = CALL
        body = ask(engine, parallel_tool_calls=False).json
        (item,) = body["output"]
        assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
        assert json.loads(item["arguments"]) == {"city": "Oslo"}
        assert item["id"].startswith("fc_") and item["call_id"].startswith("call_")
        assert (body["tools"], body["parallel_tool_calls"]) == ([WEATHER], False)
        found = events(ask(engine, stream=True, top_logprobs=1))
        assert kinds(found) == ["created", "in_progress", *ONE_CALL, "incomplete"]
        (streamed,) = found[-1]["response"]["output"]
        assert found[2]["item"] == streamed | {"arguments": "", "status": "in_progress"}
        assert found[3]["delta"] == found[4]["arguments"] == streamed["arguments"] == item["arguments"]
        engine.says = "It rains."
        assert kinds(events(ask(engine, stream=True)))[2:-1] == [*MESSAGE, *MESSAGE_ENDS]


def test_words_between_calls(tmp_path):
    with running_tool_engine(tmp_path, TAGGED) as engine:
        engine.says = f"I look. {TAGGED_CALL}{TAGGED_CALL} Done."
        assert [item["type"] for item in ask(engine).json["output"]] == ["message", "function_call", "function_call"]
        found = events(ask(engine, stream=True))
        message = [*MESSAGE, *MESSAGE_ENDS]
        assert kinds(found)[2:-1] == [*message, *ONE_CALL, *ONE_CALL, *message]
        items = found[-1]["response"]["output"]
        assert [item["type"] for item in items] == ["message", "function_call", "function_call", "message"]
        assert [event["output_index"] for event in found if event["type"] == "response.output_item.done"] == [
            0, 1, 2, 3,
        ]  # fmt: skip
        assert [items[0]["content"][0]["text"], items[3]["content"][0]["text"]] == ["I look. ", "Done."]


def test_what_must_be_called(tmp_path):
    with running_tool_engine(tmp_path) as engine:
        engine.says = CALL
        for choice in ("required", {"type": "function", "name": "weather"}):
            body = ask(engine, tool_choice=choice).json
            assert body["tool_choice"] == choice
            assert [item["type"] for item in body["output"]] == ["function_call"]
            schema = json.loads(engine.generations[-1].request.sampling.grammar.text)
            assert schema["properties"]["name"] == {"const": "weather"}
