"""Asks the server with OpenAI's own client."""

import asyncio
import json

import openai
from served import (
    ANSWER,
    BASE,
    CONTEXT,
    KEY,
    LONG,
    QUESTION,
    TOOLED,
    URL,
    Fact,
    Weather,
    check_fact,
    key_of_one_request,
)

MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT = {"model": "pirate", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
RESPONSE = {"model": "pirate", "input": QUESTION, "max_output_tokens": 30, "temperature": 0}
TOOL = openai.pydantic_function_tool(Weather)
FLAT_TOOL = {"type": "function", **TOOL["function"]}


def client(key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=URL, api_key=key, max_retries=0)


def refused(kind: type[openai.APIStatusError], ask, **fields) -> openai.APIStatusError:
    try:
        ask(**fields)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} for {fields}")


def models() -> None:
    names = [model.id for model in client().models.list()]
    assert names[0] == BASE and {"pirate", "json", "haiku", "emoji", TOOLED} <= set(names)
    assert client().models.retrieve("pirate").model_extra["parent"] == BASE


def chats() -> None:
    whole = client().chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    stream = list(client().chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == ANSWER
    assert stream[-1].usage.total_tokens == whole.usage.total_tokens
    several = client().chat.completions.create(**CHAT | {"n": 2, "max_tokens": 5, "seed": 1, "temperature": 1})
    assert [choice.index for choice in several.choices] == [0, 1]
    scored = client().chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in scored).startswith(ANSWER)
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.logprob for token in scored)
    choice = client().chat.completions.create(**CHAT, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")
    named = client().with_options(default_headers={"X-Request-Id": "mine"}).chat.completions.create(**CHAT)
    assert named._request_id == "mine"


def forms() -> None:
    asked = CHAT | {"model": "json", "max_tokens": 80}
    check_fact(client().chat.completions.parse(**asked, response_format=Fact).choices[0].message.parsed)
    text = client().chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0].message.content
    assert isinstance(json.loads(text), dict)
    with client().chat.completions.stream(**asked, response_format=Fact) as stream:
        check_fact(stream.get_final_completion().choices[0].message.parsed)


def tools() -> None:
    asked = CHAT | {"model": TOOLED, "max_tokens": 100, "tools": [TOOL]}
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        message = client().chat.completions.parse(**asked, tool_choice=choice).choices[0].message
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
    with client().chat.completions.stream(**asked, tool_choice="required") as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    asked["messages"] = [*MESSAGES, message.to_dict(exclude_unset=False), result]
    assert client().chat.completions.create(**asked).choices[0].message.content
    assert client().chat.completions.create(**CHAT, tools=[TOOL], tool_choice="none").choices[0].message.content


def completions() -> None:
    asked = {"model": "pirate", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client().completions.create(**asked)
    stream = client().completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    pair = client().completions.create(**asked | {"prompt": ["Once upon a time", "Ahoy"]}, logprobs=2, echo=False)
    assert pair.choices[0].text == whole.choices[0].text
    assert len(pair.choices[1].logprobs.tokens) == len(pair.choices[1].logprobs.top_logprobs)


def responses() -> None:
    whole = client().responses.create(**RESPONSE)
    assert (whole.output_text, whole.status) == (ANSWER, "completed")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client().responses.create(**RESPONSE, stream=True))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1].type == "response.completed" and events[-1].response.output_text == ANSWER
    with client().responses.stream(**RESPONSE, instructions="Be brief.") as stream:
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert said == stream.get_final_response().output_text
    short = client().responses.create(**RESPONSE | {"max_output_tokens": 3})
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    fact = RESPONSE | {"model": "json", "max_output_tokens": 80}
    check_fact(client().responses.parse(**fact, text_format=Fact).output_parsed)
    with client().responses.stream(**fact, text_format=Fact) as stream:
        check_fact(stream.get_final_response().output_parsed)
    scored = client().responses.create(**RESPONSE, include=["message.output_text.logprobs"], top_logprobs=2)
    assert len(scored.output[0].content[0].logprobs[0].top_logprobs) == 2


def responses_with_tools() -> None:
    asked = RESPONSE | {"model": TOOLED, "max_output_tokens": 100, "tools": [FLAT_TOOL]}
    first = client().responses.create(**asked, tool_choice="required")
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "Weather") and Weather.model_validate_json(call.arguments)
    with client().responses.stream(**asked, tool_choice={"type": "function", "name": "Weather"}) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.type, streamed.arguments) == ("function_call", call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client().responses.create(**asked | {"input": [{"role": "user", "content": "Rain?"}, call, result]})
    assert second.output_text
    third = [{"role": "user", "content": "Rain?"}, *second.output, {"role": "user", "content": "Sure?"}]
    assert client().responses.create(**asked | {"input": third}).output_text


async def all_at_once() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as ask:

        async def chat() -> str:
            return (await ask.chat.completions.create(**CHAT)).choices[0].message.content

        async def streamed_chat() -> str:
            stream = await ask.chat.completions.create(**CHAT, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def response() -> str:
            return (await ask.responses.create(**RESPONSE)).output_text

        async def streamed_response() -> str:
            async with ask.responses.stream(**RESPONSE) as stream:
                return (await stream.get_final_response()).output_text

        assert await asyncio.gather(chat(), streamed_chat(), response(), streamed_response()) == [ANSWER] * 4


def refusals() -> None:
    chat, complete, respond = client().chat.completions.create, client().completions.create, client().responses.create
    for error in (
        refused(openai.BadRequestError, chat, **CHAT | {"messages": [{"role": "user", "content": LONG}]}),
        refused(openai.BadRequestError, chat, **CHAT | {"max_tokens": CONTEXT}),
        refused(openai.BadRequestError, complete, model="pirate", prompt=LONG),
        refused(openai.BadRequestError, complete, model="pirate", prompt="x", max_tokens=CONTEXT),
        refused(openai.BadRequestError, respond, **RESPONSE | {"input": LONG}),
        refused(openai.BadRequestError, respond, **RESPONSE | {"max_output_tokens": CONTEXT}),
    ):
        assert error.code == "context_length_exceeded" and str(CONTEXT) in error.message
    for ask, asked in ((chat, CHAT), (respond, RESPONSE)):
        assert refused(openai.NotFoundError, ask, **asked | {"model": "nobody"}).code == "model_not_found"
    assert refused(openai.BadRequestError, respond, **RESPONSE, previous_response_id="resp_1").param
    assert (
        refused(openai.AuthenticationError, client("sk-wrong").responses.create, **RESPONSE).code == "invalid_api_key"
    )
    limited = client(key_of_one_request("openai"))
    assert limited.responses.create(**RESPONSE).output_text == ANSWER
    too_many = refused(openai.RateLimitError, limited.chat.completions.create, **CHAT)
    assert too_many.code == "rate_limit_exceeded" and 0 < int(too_many.response.headers["Retry-After"]) <= 60


if __name__ == "__main__":
    for check in (models, chats, forms, tools, completions, responses, responses_with_tools, refusals):
        check()
    asyncio.run(all_at_once())
