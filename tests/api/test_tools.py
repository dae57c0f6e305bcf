"""Tools: what clients send of them, what the chat template is given, and calls found in answers as they grow."""

import json

import pytest

from slora_jax.api.app import create_app
from slora_jax.api.tools import CallReader, Tools, format_of_template, read_tools
from slora_jax.errors import InvalidRequest
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tool_engine import TAGGED, TEMPLATE, running_tool_engine

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def engine(tmp_path):
    with running_tool_engine(tmp_path) as engine:
        yield engine


def reads(tools: Tools, form, text: str, size: int):
    """What a reader makes of a text that comes in pieces of so many characters."""
    reader, content, calls = CallReader(tools, form), "", []
    for first in range(0, len(text), size):
        more, found = reader.push(text[first : first + size])
        content, calls = content + more, calls + found
    more, found = reader.finish()
    calls += found
    return content + more, [(call.name, json.loads(call.arguments)) for call in calls]


FREE = read_tools([WEATHER, CLOCK], "auto", None)
ONE = '{"name": "weather", "parameters": {"city": "Oslo"}}'
OSLO = ("weather", {"city": "Oslo"})


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (ONE, "", [OSLO]),
        (f" \n{ONE}\n", "", [OSLO]),
        (f"<|python_tag|>{ONE}", "", [OSLO]),
        (f'{ONE}; {{"name": "clock", "parameters": {{}}}}', "", [OSLO, ("clock", {})]),
        ("It rains.", "It rains.", []),
        ("{curly} words", "{curly} words", []),
        ('{"name": "weather"}', '{"name": "weather"}', []),
        ('{"answer": 42}', '{"answer": 42}', []),
        (f"{ONE} and more", f"{ONE} and more", []),
        ("", "", []),
        (ONE[:-5], ONE[:-5], []),
        ("[" * 3000, "[" * 3000, []),
    ],
)
def test_an_answer_that_is_a_call_as_a_whole(text, content, calls, size):
    assert reads(FREE, "llama3_json", text, size) == (content, calls)


TAGS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (TAGS, "", [OSLO]),
        (f"I look. {TAGS}", "I look. ", [OSLO]),
        (f"{TAGS}\n{TAGS}", "", [OSLO, OSLO]),
        ("a < b, <tool and <tool_cal", "a < b, <tool and <tool_cal", []),
        ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ("<tool_call>{", "<tool_call>{", []),
        (f"<tool_call>x</tool_call>{TAGS}", "<tool_call>x</tool_call>", [OSLO]),
    ],
)
def test_calls_between_tags(text, content, calls, size):
    assert reads(FREE, "hermes", text, size) == (content, calls)


def test_one_call_at_most_where_the_client_says_so():
    alone = read_tools([WEATHER, CLOCK], "auto", False)
    assert reads(alone, "hermes", TAGS + TAGS, 5) == ("", [OSLO])
    assert reads(alone, "llama3_json", f"{ONE}; {ONE}", 5) == ("", [OSLO])


def test_the_form_is_the_templates():
    assert (format_of_template(TEMPLATE), format_of_template(TAGGED)) == ("llama3_json", "hermes")


def test_what_must_be_called_is_a_grammar():
    named = {"type": "function", "function": {"name": "weather"}}
    schema = json.loads(read_tools([WEATHER, CLOCK], named, None).grammar("hermes").text)
    assert schema["properties"]["name"] == {"const": "weather"}
    assert schema["properties"]["arguments"] == WEATHER["function"]["parameters"]
    any_of = json.loads(read_tools([WEATHER, CLOCK], "required", None).grammar("llama3_json").text)["anyOf"]
    assert [call["properties"]["name"]["const"] for call in any_of] == ["weather", "clock"]
    assert all("parameters" in call["properties"] for call in any_of)
    assert FREE.grammar("hermes") is None


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ({}, None, "tools"),
        (["weather"], None, "tools[0]"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "x", "parameters": []}}], None, "tools[0].function.parameters"),
        ([{"type": "web_search"}], None, "tools[0]"),
        ([WEATHER, WEATHER], None, "tools"),
        ([WEATHER] * 129, None, "tools"),
        ([], "required", "tool_choice"),
        ([WEATHER], "any", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "nobody"}}, "tool_choice"),
        ([WEATHER], 5, "tool_choice"),
    ],
)
def test_tools_that_are_not_understood(tools, choice, param):
    with pytest.raises(InvalidRequest) as refusal:
        read_tools(tools, choice, None)
    assert (refusal.value.param == param and "got" in str(refusal.value)) or "tool" in str(refusal.value)


@pytest.mark.parametrize(("tools", "choice"), [(None, None), ([], "auto"), ([WEATHER], "none"), (None, "none")])
def test_forms_that_ask_for_nothing(tools, choice):
    assert read_tools(tools, choice, True) is None


def ask(engine, **fields):
    client = create_app(engine).test_client()
    body = {"model": "base", "messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER, CLOCK]}
    return client.post("/v1/chat/completions", json={"max_tokens": 90} | body | fields)


def test_an_answer_with_a_call(engine):
    engine.says = ONE
    (choice,) = ask(engine).json["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert choice["message"]["content"] is None
    assert engine.generations[-1].prompt_text.startswith("Tools: weather clock")


def test_a_stream_with_a_call(engine):
    engine.says = ONE
    chunks = [line[6:] for line in ask(engine, stream=True).text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    told = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in told] == [(0, "weather")]
    assert not any(delta.get("content") for delta in deltas)


def test_calls_and_their_results_are_handed_to_the_template(engine):
    engine.says = "It rains."
    messages = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "wet"},
    ]
    (choice,) = ask(engine, messages=messages).json["choices"]
    assert choice["message"]["content"] == "It rains." and "tool_calls" not in choice["message"]
    prompt = engine.generations[-1].prompt_text  # whose tokenizer has no line breaks
    assert 'assistant:  calls weather({"city": "Oslo"})tool: wet' in prompt


@pytest.mark.parametrize("arguments", ["[1]", "{", 5, "1"])
def test_arguments_that_are_no_object(engine, arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = ask(engine, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert answer.status_code == 400 and "arguments" in answer.json["error"]["message"]


def test_a_template_without_tools_is_no_place_for_them(tmp_path):
    engine = FakeEngine(tmp_path)
    engine.start()
    try:
        answer = ask(engine)
        assert answer.status_code == 400 and answer.json["error"]["param"] == "tools"
        assert ask(engine, tool_choice="none").status_code == 200
    finally:
        engine.close()


def test_tokenize_shows_the_tools_to_the_template(engine):
    client = create_app(engine).test_client()
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
    tokens = client.post("/tokenize", json=body).get_json()["tokens"]
    assert engine.tokenizer.decode(tokens).startswith("Tools: weather")
    asked = body | {"model": "base", "max_tokens": 1, "return_token_ids": True}
    answer = client.post("/v1/chat/completions", json=asked).get_json()
    assert answer["choices"][0]["prompt_token_ids"] == tokens
