"""Asks the server with LiteLLM, as a server of OpenAI's kind and as one of vLLM's."""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for prices on the net first

import litellm
from served import ANSWER, CONTEXT, KEY, LONG, QUESTION, TOOLED, URL, Fact, Weather, check_fact, key_of_one_request

MESSAGES = [{"role": "user", "content": QUESTION}]
COMMON = {"api_base": URL, "api_key": KEY, "num_retries": 0, "temperature": 0}
TOOL = {
    "type": "function",
    "function": {"name": "Weather", "description": Weather.__doc__, "parameters": Weather.model_json_schema()},
}


def asked(model: str, **fields) -> dict:
    return COMMON | {"model": model, "messages": MESSAGES, "max_tokens": 30} | fields


def refused(kind: type[Exception], ask, **fields) -> Exception:
    try:
        ask(**fields)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} for {fields['model']}")


def chats(provider: str) -> None:
    pirate, json = f"{provider}/pirate", f"{provider}/json"
    whole = litellm.completion(**asked(pirate))
    assert whole.choices[0].message.content == ANSWER and whole.usage.total_tokens > whole.usage.prompt_tokens
    stream = litellm.completion(**asked(pirate), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert litellm.stream_chunk_builder(chunks, MESSAGES).choices[0].message.content == ANSWER
    answer = litellm.completion(**asked(json, max_tokens=80, response_format=Fact))
    check_fact(Fact.model_validate_json(answer.choices[0].message.content))
    (call,) = (
        litellm.completion(**asked(f"{provider}/{TOOLED}", max_tokens=100, tools=[TOOL], tool_choice="required"))
        .choices[0]
        .message.tool_calls
    )
    assert call.function.name == "Weather" and Weather.model_validate_json(call.function.arguments)


async def chats_at_once(provider: str) -> None:
    async def streamed() -> str:
        stream = await litellm.acompletion(**asked(f"{provider}/pirate"), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    whole, text = await asyncio.gather(litellm.acompletion(**asked(f"{provider}/pirate")), streamed())
    assert whole.choices[0].message.content == text == ANSWER


def completions() -> None:
    fields = COMMON | {"model": "text-completion-openai/pirate", "prompt": "Once upon a time", "max_tokens": 8}
    text = litellm.text_completion(**fields).choices[0].text
    chunks = litellm.text_completion(**fields, stream=True)
    assert text and "".join(chunk.choices[0].text or "" for chunk in chunks) == text


def responses() -> None:
    fields = COMMON | {"model": "openai/pirate", "input": QUESTION, "max_output_tokens": 30}
    del fields["num_retries"]
    assert litellm.responses(**fields).output[0].content[0].text == ANSWER
    events = list(litellm.responses(**fields, stream=True))
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    refused(litellm.ContextWindowExceededError, litellm.responses, **fields | {"input": LONG})
    refused(litellm.NotFoundError, litellm.responses, **fields | {"model": "openai/nobody"})


def refusals(provider: str) -> None:
    complete, pirate = litellm.completion, f"{provider}/pirate"
    too_long = asked(pirate, messages=[{"role": "user", "content": LONG}])
    for fields in (too_long, too_long | {"stream": True}, asked(pirate, max_tokens=CONTEXT)):
        refused(litellm.ContextWindowExceededError, complete, **fields)
    refused(litellm.NotFoundError, complete, **asked(f"{provider}/nobody"))
    refused(litellm.AuthenticationError, complete, **asked(pirate, api_key="sk-wrong"))
    refused(litellm.BadRequestError, complete, **asked(pirate, temperature=-1))


def limits() -> None:
    key = key_of_one_request("litellm")
    assert litellm.completion(**asked("openai/pirate", api_key=key)).choices[0].message.content == ANSWER
    for provider in ("openai", "hosted_vllm"):
        refused(litellm.RateLimitError, litellm.completion, **asked(f"{provider}/pirate", api_key=key))


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    for provider in ("openai", "hosted_vllm"):
        chats(provider)
        asyncio.run(chats_at_once(provider))
        refusals(provider)
    completions()
    responses()
    limits()
