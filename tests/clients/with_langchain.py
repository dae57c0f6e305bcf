"""Asks the server with LangChain."""

import asyncio
import warnings

from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelNotFoundError,
    ModelRateLimitError,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from served import ANSWER, CONTEXT, KEY, LONG, QUESTION, TOOLED, URL, Fact, Weather, check_fact, key_of_one_request

COMMON = {"model": "pirate", "base_url": URL, "api_key": KEY, "max_retries": 0, "temperature": 0}

KINDS: list[dict] = [{}, {"use_responses_api": True}]
"""Both APIs by which it asks for chats."""


def chat(**fields) -> ChatOpenAI:
    return ChatOpenAI(**COMMON | {"max_tokens": 30} | fields)


def refused(kind: type[Exception], model: ChatOpenAI, question: str = QUESTION) -> None:
    for ask in (model.invoke, lambda text: list(model.stream(text))):
        try:
            ask(question)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} from {model.model_name}")


def chats(**kind) -> None:
    whole = chat(**kind).invoke(QUESTION)
    assert whole.text == ANSWER
    assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0
    pieces = list(chat(**kind, stream_usage=True).stream(QUESTION))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == ANSWER
    assert (
        sum(piece.usage_metadata["total_tokens"] for piece in pieces if piece.usage_metadata)
        == (whole.usage_metadata["total_tokens"])
    )
    conversation = [HumanMessage(QUESTION), whole, HumanMessage("And of Spain?")]
    assert "Madrid" in chat(**kind).invoke(conversation).text
    assert [answer.text for answer in chat(**kind).batch([QUESTION, QUESTION])] == [ANSWER, ANSWER]


async def chats_at_once(*kinds: dict) -> None:
    async def whole(kind: dict) -> str:
        return (await chat(**kind).ainvoke(QUESTION)).text

    async def streamed(kind: dict) -> str:
        return "".join([piece.text async for piece in chat(**kind).astream(QUESTION)])

    texts = await asyncio.gather(*(ask(kind) for ask in (whole, streamed) for kind in kinds))
    assert texts == [ANSWER] * 2 * len(kinds)


def forms(**kind) -> None:
    asked = chat(model="json", max_tokens=80, **kind)
    for method in ("json_schema", "json_mode"):
        check_fact(asked.with_structured_output(Fact, method=method).invoke(QUESTION))
    check_fact(list(asked.with_structured_output(Fact, method="json_schema").stream(QUESTION))[-1])
    by_calling = chat(model=TOOLED, max_tokens=80, **kind).with_structured_output(Weather, method="function_calling")
    assert isinstance(by_calling.invoke("How is the weather in Oslo?"), Weather)


def tools(**kind) -> None:
    question = HumanMessage("How is the weather in Oslo?")
    model = chat(model=TOOLED, max_tokens=100, **kind)
    for choice in ("any", "Weather"):
        answer = model.bind_tools([Weather], tool_choice=choice).invoke([question])
        (call,) = answer.tool_calls
        assert call["name"] == "Weather" and Weather(**call["args"])
    summed = None
    for piece in model.bind_tools([Weather], tool_choice="any").stream([question]):
        summed = piece if summed is None else summed + piece
    assert [each["args"] for each in summed.tool_calls] == [call["args"]]
    said = model.bind_tools([Weather]).invoke([question, answer, ToolMessage("rain", tool_call_id=call["id"])])
    assert said.text


def scores() -> None:
    tokens = chat(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(ANSWER)


def completions() -> None:
    model = OpenAI(**COMMON | {"max_tokens": 8})
    text = model.invoke("Once upon a time")
    assert text and "".join(model.stream("Once upon a time")) == text
    (first,), (second,) = model.generate(["Once upon a time", "Ahoy"]).generations
    assert first.text == text and second.text


def refusals() -> None:
    for kind in KINDS:
        refused(ContextOverflowError, chat(**kind), LONG)
        refused(ContextOverflowError, chat(max_tokens=CONTEXT, **kind))
        refused(ModelNotFoundError, chat(model="nobody", **kind))
        refused(ModelAuthenticationError, chat(api_key="sk-wrong", **kind))
    limited = chat(api_key=key_of_one_request("langchain"))
    assert limited.invoke(QUESTION).text == ANSWER
    refused(ModelRateLimitError, limited)


if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)  # it warns of what it adds to bodies
    for kind in KINDS:
        chats(**kind)
        forms(**kind)
        tools(**kind)
    asyncio.run(chats_at_once(*KINDS))
    scores()
    completions()
    refusals()
