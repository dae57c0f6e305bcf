"""Tools that a chat's model may call: what clients send of them, and the calls in its answers.

A model writes a call as text, in the form that its chat template shows it: Llama 3's, an answer that is one JSON object
``{"name": ..., "parameters": {...}}``, or Hermes', such objects with ``arguments`` between ``<tool_call>`` tags, in the
midst of other text. Where a client says that a tool must be called, a grammar makes the answer one such object.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from slora_jax.errors import InvalidRequest, shown
from slora_jax.request import Grammar

MAX_TOOLS = 128
"""Most tools of one request (OpenAI's limit)."""

CallFormat = Literal["llama3_json", "hermes"]
CALL_FORMATS: tuple[CallFormat, ...] = ("llama3_json", "hermes")

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_JSON = json.JSONDecoder()
_MAX_NAME = 64


class ToolCall(NamedTuple):
    """One call in an answer; ``arguments`` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one chat, and how freely its model chooses among them.

    Attributes:
      tools: as sent, for the chat template.
      forced: names of those of which one must be called; empty where the model may answer in words.
      is_named: whether the client chose the one that is called.
      parallel: an answer may have several calls.
    """

    tools: tuple[Mapping[str, Any], ...]
    forced: tuple[str, ...] = ()
    is_named: bool = False
    parallel: bool = True

    def grammar(self, form: CallFormat) -> Grammar | None:
        """What an answer that must be a call looks like; None where it need not be one."""
        if not self.forced:
            return None
        key = _ARGUMENTS[form]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    key: function.get("parameters") or {"type": "object", "properties": {}},
                },
                "required": ["name", key],
                "additionalProperties": False,
            }
            for function in (tool["function"] for tool in self.tools)
            if (name := function["name"]) in self.forced
        ]
        return Grammar("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}))


_ARGUMENTS: dict[CallFormat, str] = {"llama3_json": "parameters", "hermes": "arguments"}


def read_tools(tools: Any, choice: Any, parallel: Any) -> Tools | None:
    """What a body says of tools; None where its model is to know of none.

    Raises:
      InvalidRequest: it is not understood; ``param`` names the field.
    """
    if parallel is not None and not isinstance(parallel, bool):
        raise InvalidRequest(f"parallel_tool_calls must be true or false, got {shown(parallel)}", "parallel_tool_calls")
    if tools is None:
        tools = []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be a list of at most {MAX_TOOLS} tools, got {shown(tools)}", "tools")
    read = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"tools has {shown(twice)} twice; name each tool differently", "tools")
    # Even where they are not to be called, so that a mistake does not wait for the day they are.
    forced, is_named = _read_choice(choice, names)
    if not read or choice == "none":
        return None
    return Tools(read, forced, is_named, parallel is not False)


def _read_tool(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        message = f'{where} must be {{"type": "function", "function": {{"name": ...}}}}, got {shown(tool)}'
        raise InvalidRequest(message, where)
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        message = f"{where}.function.name must be a name of 1 to {_MAX_NAME} characters, got {shown(name)}"
        raise InvalidRequest(message, f"{where}.function.name")
    for field, kind, what in (("description", str, "a string"), ("parameters", Mapping, "a JSON schema")):
        value = function.get(field)
        if value is not None and not isinstance(value, kind):
            raise InvalidRequest(
                f"{where}.function.{field} must be {what}, got {shown(value)}", f"{where}.function.{field}"
            )
    return {"type": "function", "function": dict(function)}


def _read_choice(choice: Any, names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The tools of which one must be called, and whether it was named."""
    if choice in (None, "none", "auto"):
        return (), False
    if choice == "required":
        if not names:
            raise InvalidRequest("tool_choice is required, but there are no tools; send some", "tool_choice")
        return tuple(names), False
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        message = (
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
            f"got {shown(choice)}"
        )
        raise InvalidRequest(message, "tool_choice")
    if name not in names:
        raise InvalidRequest(f"tool_choice names {shown(name)}, which is none of the tools", "tool_choice")
    return (name,), True


def format_of_template(source: str) -> CallFormat:
    """The form of calls that a chat template shows its model."""
    return "hermes" if _OPEN in source else "llama3_json"


class CallReader:
    """Finds the calls in an answer as it grows. What is none is content, handed on as soon as that is sure.

    Args:
      tools: of the chat.
      form: of the calls.
    """

    def __init__(self, tools: Tools, form: CallFormat):
        self._tools = tools
        self._in_tags = form == "hermes" and not tools.forced
        self._held = ""
        self._is_call: bool | None = None if not tools.forced else True
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Takes more of the answer; returns content, and the calls that are complete with it."""
        self._held += text
        return self._tagged() if self._in_tags else self._whole()

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Ends the answer; returns the rest of both."""
        if self._in_tags or not self._is_call:
            held, self._held = self._held, ""
            return held, []
        text = self._held.strip().removeprefix(_PYTHON_TAG)
        calls, rest = self._calls_at_front(text)
        held, self._held = self._held, ""
        if not calls or (rest and not self._tools.forced):
            return held, []
        return "", self._counted(calls)

    def _whole(self) -> tuple[str, list[ToolCall]]:
        """Llama 3's form: an answer that begins like a call is one, or else is content as a whole."""
        if self._is_call is None:
            start = self._held.lstrip()
            if not start or (len(start) < len(_PYTHON_TAG) and _PYTHON_TAG.startswith(start)):
                return "", []
            self._is_call = start.startswith(("{", _PYTHON_TAG))
        if self._is_call:
            return "", []
        held, self._held = self._held, ""
        return held, []

    def _tagged(self) -> tuple[str, list[ToolCall]]:
        """Hermes' form: calls between tags, content around them."""
        content, calls = "", []
        while True:
            before, opening, after = self._held.partition(_OPEN)
            if not opening:
                # The beginning of a tag may be there, to go on with the next piece.
                kept = max(n for n in range(len(_OPEN)) if before.endswith(_OPEN[:n]))
                content += before[: len(before) - kept]
                self._held = before[len(before) - kept :]
                break
            inside, closing, rest = after.partition(_CLOSE)
            if not closing:
                content, self._held = content + before, _OPEN + after
                break
            found, left = self._calls_at_front(inside.strip())
            if not found or left:
                content += before + _OPEN + inside + _CLOSE
            else:
                content += before
                calls += found
            self._held = rest
        # White space around calls is none of the answer.
        return ("" if self.num_calls + len(calls) and not content.strip() else content), self._counted(calls)

    def _calls_at_front(self, text: str) -> tuple[list[ToolCall], str]:
        """The calls that the text begins with, and what is left behind them."""
        calls = []
        while text.startswith("{"):
            try:
                value, end = _JSON.raw_decode(text)
            except (ValueError, RecursionError):
                break
            call = _as_call(value)
            if call is None:
                break
            calls.append(call)
            text = text[end:].lstrip().removeprefix(";").lstrip()
        return calls, text

    def _counted(self, calls: list[ToolCall]) -> list[ToolCall]:
        if not self._tools.parallel:
            calls = calls[: max(0, 1 - self.num_calls)]
        self.num_calls += len(calls)
        return calls


def _as_call(value: dict[str, Any]) -> ToolCall | None:
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", value["name"], json.dumps(arguments, ensure_ascii=False))
