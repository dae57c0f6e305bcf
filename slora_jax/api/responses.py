"""OpenAI's Responses API for text: a body of ``/v1/responses`` as one of a chat, and a chat's answer as a response.

A response is a list of items: messages, and calls of functions. Nothing is kept of it when it has been sent, so
whatever names an earlier response is refused, and so are the tools that OpenAI itself runs.
"""

import dataclasses
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slora_jax.api.openai import Call, chat_schema, meant_fields, parse_chat, refuse_unknown, schema_of_rest
from slora_jax.api.replies import ChatReply
from slora_jax.errors import InvalidRequest, shown
from slora_jax.request import Delta, RequestOutput
from slora_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

_AS_IN_CHATS = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "priority",
    "slo_ms",
)
"""Fields that mean what they mean in a chat."""

_OWN = (
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "tools",
    "tool_choice",
    "include",
    "top_logprobs",
    "stream_options",
)

_WITHOUT_MEANING = ("store", "max_tool_calls", "prompt_cache_options")
"""Fields that are taken at any value: nothing is stored, and there are no tools or caches that they speak of."""

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
}
"""OpenAI's fields that are not computed here, each with the values (besides null) that change nothing."""

_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    _LOGPROBS,
    # What never occurs here is included at no cost.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)

_OF_ITEMS = ("type", "id", "status", "phase")
"""Fields of items that OpenAI's answers have, and that say nothing to a model that reads them."""

_TEXT_PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class ResponseCall(Call):
    """A request for a response, understood.

    Attributes:
      asked: fields of the body that the response repeats, as they were sent.
    """

    asked: Mapping[str, Any] = field(default_factory=dict)


def parse_response(body: Any, engine: "Engine") -> ResponseCall:
    """Understands the body of ``POST /v1/responses``.

    Raises:
      InvalidRequest: with the field at fault in ``param``.
      UnknownAdapter: ``model`` names neither the base model nor an adapter.
    """
    sent = meant_fields(body, (*_AS_IN_CHATS, *_OWN, *_WITHOUT_MEANING), _DEFAULTS)
    if "input" not in sent:
        raise InvalidRequest("input is missing; send a text or a list of items", "input")
    chat = {name: sent[name] for name in _AS_IN_CHATS if name in sent}
    conversation = _Conversation(sent.get("instructions"), sent["input"])
    chat["messages"] = conversation.messages
    if "max_output_tokens" in sent:
        chat["max_completion_tokens"] = sent["max_output_tokens"]
    chat |= _form_of_answer(sent.get("text"))
    if "tools" in sent:
        chat["tools"] = _tools(sent["tools"])
    if "tool_choice" in sent:
        chat["tool_choice"] = _tool_choice(sent["tool_choice"])
    if _LOGPROBS in _included(sent.get("include", [])) or "top_logprobs" in sent:
        chat |= {"logprobs": True, "top_logprobs": sent.get("top_logprobs", 0)}
    if "stream_options" in sent:
        if isinstance(sent["stream_options"], Mapping):
            refuse_unknown(sent["stream_options"], ("include_obfuscation",), "stream_options.")
        chat["stream_options"] = sent["stream_options"]
    with conversation.named_as_sent():
        call = parse_chat(chat, engine)
    understood = {each.name: getattr(call, each.name) for each in dataclasses.fields(Call)}
    return ResponseCall(**understood, asked=_labels(body) | {name: sent[name] for name in _OWN if name in sent})


def response_schema() -> dict[str, Any]:
    """JSON schema of the body of ``POST /v1/responses``."""
    schema = chat_schema()
    chat = schema["properties"]
    own: dict[str, Any] = {
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": chat["max_completion_tokens"],
        "include": {"anyOf": [{"type": "array", "items": {"enum": list(_INCLUDABLE)}}, {"type": "null"}]},
        "text": {"type": ["object", "null"]},
        "tools": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
        "tool_choice": {"type": ["string", "object", "null"]},
        "top_logprobs": chat["top_logprobs"],
        "stream_options": {"type": ["object", "null"]},
    }
    assert own.keys() == set(_OWN), "every field is described"
    as_in_chats = {name: chat[name] for name in _AS_IN_CHATS}
    rest = schema_of_rest(_DEFAULTS) | {name: {} for name in _WITHOUT_MEANING}
    return schema | {
        "title": "ResponseBody",
        "properties": as_in_chats | own | rest,
        "required": ["model", "input"],
    }


def _labels(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the body says of its sender, which the response repeats."""
    kinds = {"metadata": Mapping, "user": str, "safety_identifier": str, "prompt_cache_key": str}
    return {name: body[name] for name, kind in kinds.items() if isinstance(body.get(name), kind)}


class _Conversation:
    """The messages of a chat that say what instructions and items of input say.

    Args:
      instructions, items: the fields of the body; instructions may be None.

    Raises:
      InvalidRequest: an item is of a kind that is not known here, or has a field that is not.
    """

    def __init__(self, instructions: Any, items: Any):
        self.messages: list[dict[str, Any]] = []
        self._places: list[str] = []  # of what each message was made of
        self._calls: list[list[str]] = []  # and of each of its calls
        if instructions is not None:
            if not isinstance(instructions, str):
                raise InvalidRequest(f"instructions must be a string, got {shown(instructions)}", "instructions")
            self._add("instructions", {"role": "system", "content": instructions})
        if isinstance(items, str):
            self._add("input", {"role": "user", "content": items})
        elif isinstance(items, list) and items:
            for i, item in enumerate(items):
                self._add_item(f"input[{i}]", item)
        else:
            raise InvalidRequest(f"input must be a string or a non-empty list of items, got {shown(items)}", "input")

    @contextmanager
    def named_as_sent(self) -> Iterator[None]:
        """What is wrong with the chat is told by the names that the client of a response knows."""
        try:
            yield
        except InvalidRequest as error:
            message, param = str(error), error.param
            if param is not None:
                own = self._own_name(param)
                message, param = message.replace(param, own), own
            raise type(error)(_in_own_words(message), param) from None

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._places.append(place)
        self._calls.append([])

    def _add_item(self, place: str, item: Any) -> None:
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{place} must be an object, got {shown(item)}", place)
        kind = item.get("type", "message")
        item = {name: value for name, value in item.items() if value is not None and name not in _OF_ITEMS}
        if kind == "message":
            refuse_unknown(item, ("role", "content", "name"), f"{place}.")
            self._add(place, item | {"content": _parts(item.get("content"))})
        elif kind == "function_call":
            refuse_unknown(item, ("call_id", "name", "arguments"), f"{place}.")
            identity, name, arguments = (_string(item, field, place) for field in ("call_id", "name", "arguments"))
            call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            # An answer's text and its calls are several items, and one message.
            if not self.messages or self.messages[-1].get("role") != "assistant":
                self._add(place, {"role": "assistant", "content": None})
            self.messages[-1].setdefault("tool_calls", []).append(call)
            self._calls[-1].append(place)
        elif kind == "function_call_output":
            refuse_unknown(item, ("call_id", "name", "output"), f"{place}.")
            result = {"tool_call_id": _string(item, "call_id", place), "content": _parts(item.get("output"))}
            self._add(place, {"role": "tool", **result})
        else:
            message = f"{place}.type must be message, function_call or function_call_output, got {shown(kind)}"
            raise InvalidRequest(message, f"{place}.type")

    def _own_name(self, param: str) -> str:
        found = re.fullmatch(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\])?(.*)", param, re.DOTALL)
        if found is None:
            return "input" if param in ("messages", "prompt") else _in_own_words(param)
        message, call, rest = found.groups()
        if call is None:
            # Beside its content nothing can be wrong with a tool's message.
            is_output = self.messages[int(message)].get("role") == "tool"
            return self._places[int(message)] + (rest.replace(".content", ".output", 1) if is_output else rest)
        return self._calls[int(message)][int(call)] + rest.removeprefix(".function")


def _string(item: Mapping[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}.{name} must be a string, got {shown(value)}", f"{place}.{name}")
    return value


_IN_OWN_WORDS = (
    (re.compile(r"response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"max_completion_tokens"), "max_output_tokens"),
    (re.compile(r"(tools\[\d+\]|tool_choice)\.function"), r"\1"),
)


def _in_own_words(text: str) -> str:
    for of_chats, own in _IN_OWN_WORDS:
        text = of_chats.sub(own, text)
    return text


def _parts(content: Any) -> Any:
    """The content of a message with its parts as a chat has them; what is no text is left for the chat to refuse."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS
        else part
        for part in content
    ]


def _form_of_answer(text: Any) -> dict[str, Any]:
    if text is None:
        return {}
    if not isinstance(text, Mapping):
        raise InvalidRequest(f'text must be an object such as {{"format": {{...}}}}, got {shown(text)}', "text")
    refuse_unknown(text, ("format", "verbosity"), "text.")
    if text.get("verbosity") not in (None, "medium"):
        message = f"text.verbosity={shown(text['verbosity'])} is not supported by this server; leave it out"
        raise InvalidRequest(message, "text.verbosity")
    form = text.get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return {} if form is None else {"response_format": form}


def _tools(tools: Any) -> Any:
    if not isinstance(tools, list):
        return tools  # which the chat refuses
    read = []
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            message = f"tools[{i}].type must be function, for tools that the client runs, got {shown(kind)}"
            raise InvalidRequest(message, f"tools[{i}].type")
        said = {name: value for name, value in tool.items() if value is not None and value is not False}
        refuse_unknown(said, ("type", "name", "description", "parameters", "strict"), f"tools[{i}].")
        read.append({"type": "function", "function": {name: said[name] for name in said if name != "type"}})
    return read


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice  # a word, as chats have them
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        message = 'tool_choice must be "none", "auto", "required" or {"type": "function", "name": ...}'
        raise InvalidRequest(f"{message}, got {shown(choice)}", "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}


def _included(sent: Any) -> Sequence[str]:
    if not isinstance(sent, list):
        raise InvalidRequest(f"include must be a list of strings, got {shown(sent)}", "include")
    for name in sent:
        if name not in _INCLUDABLE:
            message = f"include: {shown(name)} is not known; it may have {_LOGPROBS}"
            raise InvalidRequest(message, "include")
    return sent


class ResponseReply(ChatReply):
    """``/v1/responses``: the chat's answer as items, and as the events that tell of them.

    An item is a message, or a call of a function. Each begins with ``response.output_item.added`` and ends with
    ``response.output_item.done``; there is one at a time.
    """

    id_prefix = "resp_"
    last_words = b""
    is_stateless = False  # events are numbered
    depth = 5  # items, item, parts, part, tokens

    def __init__(self, call: ResponseCall, tokenizer: Tokenizer | None):
        super().__init__(call, tokenizer)
        sampling = call.requests[0].sampling
        self._asked = call.asked
        self._format = call.asked.get("text", {}).get("format") or {"type": "text"}
        self._created = int(time.time())
        self._sampled_by = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        self._sequence_number = 0
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # the last item, a message that grows
        self._ahead: list[dict[str, Any]] = []  # tokens whose text is not told yet
        self._ended_for: str | None = None

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        answer = super().whole(outputs)
        (choice,) = answer["choices"]
        message, reason = choice["message"], choice["finish_reason"]
        calls = message.get("tool_calls", [])
        items = []
        if message["content"] or not calls:
            tokens = choice["logprobs"]["content"] if choice["logprobs"] else []
            items.append(_message(_item_status(reason), [_text_part(message["content"], tokens)]))
        items += [_function_call(call) for call in calls]
        used = answer["usage"]
        usage = _usage(used["prompt_tokens"], used["completion_tokens"], used["prompt_tokens_details"]["cached_tokens"])
        return self._response(_item_status(reason), items, usage)

    def opening(self) -> list[dict[str, Any]]:
        response = self._response("in_progress", [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def events(self, prompt_index: int, delta: Delta) -> list[dict[str, Any]]:
        chunk = self.chunk(prompt_index, delta)
        if chunk is None:
            return []
        (choice,) = chunk["choices"]
        said, reason = choice["delta"], choice["finish_reason"]
        content = said.get("content", "")
        if choice["logprobs"]:
            self._ahead += choice["logprobs"]["content"]
        events: list[dict[str, Any]] = []
        # The tokens of a call that is not complete are none of a message's.
        if content or (self._ahead and self._call.tools is None):
            events += self._grow(content)
        for call in said.get("tool_calls", []):
            events += self._close("completed") + self._whole_call(call)
        if reason is not None:
            self._ended_for = reason
            if not self._items:
                events += self._open()
            events += self._close(_item_status(reason))
        return events

    def closing(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> list[dict[str, Any]]:
        status = _item_status(self._ended_for)
        response = self._response(status, self._items, _usage(prompt_tokens, completion_tokens, cached_tokens))
        return [self._event(f"response.{status}", response=response)]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        told = error["error"]
        code = "rate_limit_exceeded" if told["type"] == "rate_limit_error" else "server_error"
        failed = {"error": {"code": code, "message": told["message"]}}
        return self._event("response.failed", response=self._response("failed", self._items) | failed)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number = self._sequence_number
        self._sequence_number += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _open(self) -> list[dict[str, Any]]:
        """Begins a message."""
        self._is_open = True
        self._items.append(_message("in_progress", []))
        added = self._event("response.output_item.added", output_index=self._last, item=dict(self._items[-1]))
        self._items[-1]["content"] = [_text_part("", [])]
        return [added, self._event("response.content_part.added", **self._place, part=_text_part("", []))]

    def _grow(self, text: str) -> list[dict[str, Any]]:
        """Adds text to the message, which begins with it if there is none."""
        events = [] if self._is_open else self._open()
        tokens, self._ahead = self._ahead, []
        (part,) = self._items[-1]["content"]
        part["text"] += text
        part["logprobs"] += tokens
        return [*events, self._event("response.output_text.delta", **self._place, delta=text, logprobs=tokens)]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """Ends the message, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        (part,) = item["content"]
        return [
            self._event("response.output_text.done", **self._place, text=part["text"], logprobs=part["logprobs"]),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", output_index=self._last, item=item),
        ]

    def _whole_call(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        item = _function_call(call)
        self._items.append(item)
        arguments, place = item["arguments"], {"item_id": item["id"], "output_index": self._last}
        empty = item | {"arguments": "", "status": "in_progress"}
        return [
            self._event("response.output_item.added", output_index=self._last, item=empty),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=self._last, item=item),
        ]

    @property
    def _last(self) -> int:
        return len(self._items) - 1

    @property
    def _place(self) -> dict[str, Any]:
        """Of the message's only part."""
        return {"item_id": self._items[-1]["id"], "output_index": self._last, "content_index": 0}

    def _response(
        self, status: str, items: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "model": self._call.model,
            "output": list(items),
            "usage": usage,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._sampled_by,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "text": {"verbosity": "medium"} | asked.get("text", {}) | {"format": self._format},
            "tools": asked.get("tools", []),
            "tool_choice": asked.get("tool_choice", "auto"),
            "parallel_tool_calls": self._call.tools is None or self._call.tools.parallel,
            "top_logprobs": asked.get("top_logprobs", 0),
            "metadata": asked.get("metadata", {}),
            "user": asked.get("user"),
            "safety_identifier": asked.get("safety_identifier"),
            "prompt_cache_key": asked.get("prompt_cache_key"),
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
        }


def _item_status(reason: str | None) -> str:
    """Of a response or a message that ended for a chat's reason; ``length`` is the only one that cuts it short."""
    return "incomplete" if reason == "length" else "completed"


def _message(status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    identity = f"msg_{uuid.uuid4().hex}"
    return {"id": identity, "type": "message", "status": status, "role": "assistant", "content": content}


def _text_part(text: str, tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(tokens)}


def _function_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """The item of a chat's call."""
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        **call["function"],
    }


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }
