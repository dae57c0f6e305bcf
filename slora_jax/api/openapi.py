"""``/openapi.json``: the routes that speak JSON, as an OpenAPI 3.1 document.

What a request may hold comes from the types and tables by which it is checked. What comes back is written down here,
for answers are put together by plain code; the tests hold every answer to it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flask
import pydantic

import slora_jax
from slora_jax.api.access import ADMIN_PATHS, OPEN_PATHS
from slora_jax.api.adapter_bodies import LoadAdapter, PinAdapter, UnloadAdapter
from slora_jax.api.openai import chat_schema, completion_schema, small_schema
from slora_jax.api.responses import response_schema
from slora_jax.api.tokens import ChatToTokens, TextToTokens, TokensToText

PATH = "/openapi.json"

type _Number = int | float
type _Reason = Literal["stop", "length"]


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class _PromptTokens(_Answer):
    cached_tokens: int


class _Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptTokens


class _Ranked(_Answer):
    logprob: float
    rank: int
    decoded_token: str


type _PromptLogprobs = list[dict[str, _Ranked] | None]


class _CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: _CompletionLogprobs | None
    finish_reason: _Reason
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: _PromptLogprobs = []


class _Completion(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[_CompletionChoice]
    usage: _Usage


class _Likely(_Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class _ChatToken(_Likely):
    top_logprobs: list[_Likely]


class _ChatLogprobs(_Answer):
    content: list[_ChatToken]
    refusal: None


class _Called(_Answer):
    name: str
    arguments: str


class _ToolCall(_Answer):
    id: str
    type: Literal["function"]
    function: _Called


class _AnswerMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[_ToolCall] = []


class _ChatChoice(_Answer):
    index: int
    message: _AnswerMessage
    logprobs: _ChatLogprobs | None
    finish_reason: Literal[_Reason, "tool_calls"]
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class _Chat(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[_ChatChoice]
    usage: _Usage
    prompt_logprobs: _PromptLogprobs = []


class _OutputText(_Answer):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], pydantic.Field(max_length=0)]
    logprobs: list[_ChatToken]


class _OutputMessage(_Answer):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[_OutputText]


class _FunctionCall(_Answer):
    id: str
    type: Literal["function_call"]
    status: Literal["completed"]
    call_id: str
    name: str
    arguments: str


class _InputDetails(_Answer):
    cached_tokens: int
    cache_write_tokens: int


class _OutputDetails(_Answer):
    reasoning_tokens: int


class _ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class _Response(_Answer):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    model: str
    output: list[_OutputMessage | _FunctionCall]
    usage: _ResponseUsage
    error: None
    incomplete_details: dict[str, str] | None
    temperature: float
    top_p: float
    instructions: str | None
    max_output_tokens: int | None
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    top_logprobs: int
    metadata: dict[str, Any]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    background: Literal[False]
    previous_response_id: None
    reasoning: dict[str, None]
    service_tier: Literal["default"]
    store: Literal[False]
    truncation: Literal["disabled"]


class _Card(_Answer):
    """A model. An adapter has a ``parent``, and ``rank`` and ``pinned``."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    parent: str | None
    rank: int = 0
    pinned: bool = False


class _Cards(_Answer):
    object: Literal["list"]
    data: list[_Card]


class _ChangedCard(_Card):
    message: str


class _Unloaded(_Answer):
    id: str
    object: Literal["model"]
    deleted: Literal[True]
    message: str


class _Capacity(_Answer):
    requests: int
    pages_each: int
    adapter_pages: int
    pages_available: int
    sequences_available: int


class _Health(pydantic.BaseModel):
    """``status``, and counters."""

    __pydantic_extra__: dict[str, _Number]
    model_config = pydantic.ConfigDict(extra="allow")

    status: Literal["ok"]


class _Ready(_Answer):
    status: Literal["ready"]


class _Version(_Answer):
    version: str


class _Nothing(_Answer):
    pass


class _Tokens(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class _TextOfTokens(_Answer):
    prompt: str


class _Served(_Answer):
    requests: int
    tokens: int


class _ListedAdapter(_Served):
    name: str
    tier: Literal["pool", "host", "disk"]
    rank: int
    pages: int
    pinned: bool


class _Owner(_Answer):
    kind: str
    adapter: str | None


class _Waited(_Answer):
    count: int
    p50: float | None
    p95: float | None


class _Pool(_Answer):
    """What the page at ``/`` shows. ``runs`` are pairs of an owner's place in ``owners`` and a number of cells."""

    model: str
    takes_text: bool
    takes_chats: bool
    page_tokens: int
    pages: dict[str, int]
    pages_per_cell: int
    owners: list[_Owner]
    runs: list[int]
    tiers: dict[str, int]
    adapters: list[_ListedAdapter]
    base: _Served
    stats: dict[str, _Number]
    first_token: _Waited


class _ErrorFields(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class _Error(_Answer):
    error: _ErrorFields


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one route.

    Attributes:
      summary: what it does.
      answer: what is answered with status 200.
      bodies: JSON schemas any of which the request's body has; none for a request without.
      streams: whether ``stream: true`` in the body has the answer come as events.
      parameters: of the path and the query.
    """

    summary: str
    answer: type[pydantic.BaseModel]
    bodies: tuple[Callable[[], dict[str, Any]], ...] = ()
    streams: bool = False
    parameters: tuple[dict[str, Any], ...] = ()


def _count(name: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": 10**9 - 1}
    return {"name": name, "in": "query", "required": True, "schema": schema}


_OPERATIONS = {
    ("post", "/v1/completions"): _Operation("Continues a text.", _Completion, (completion_schema,), streams=True),
    ("post", "/v1/chat/completions"): _Operation("Answers a chat.", _Chat, (chat_schema,), streams=True),
    ("post", "/v1/responses"): _Operation("Answers, in items.", _Response, (response_schema,), streams=True),
    ("get", "/v1/models"): _Operation("Lists the base model and its adapters.", _Cards),
    ("get", "/v1/models/{name}"): _Operation(
        "Shows one of them.",
        _Card,
        parameters=({"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}},),
    ),
    ("get", "/v1/capacity"): _Operation(
        "Says how many more requests of a length could start now.",
        _Capacity,
        parameters=(
            {"name": "adapter", "in": "query", "schema": {"type": "string"}},
            _count("prompt_tokens"),
            _count("max_tokens"),
        ),
    ),
    ("get", "/v1/pool"): _Operation("Shows the pool, the adapters and their traffic.", _Pool),
    ("get", "/health"): _Operation("Says whether the engine runs, with its counters.", _Health),
    ("get", "/ping"): _Operation("Says whether the engine runs.", _Nothing),
    ("post", "/ping"): _Operation("Says whether the engine runs.", _Nothing),
    ("get", "/ready"): _Operation("Says whether new requests are taken.", _Ready),
    ("get", "/version"): _Operation("Says which version this is.", _Version),
    ("post", "/tokenize"): _Operation(
        "Turns a text, or a chat, into tokens.",
        _Tokens,
        (lambda: small_schema(TextToTokens), lambda: small_schema(ChatToTokens)),
    ),
    ("post", "/detokenize"): _Operation(
        "Turns tokens into text.", _TextOfTokens, (lambda: small_schema(TokensToText),)
    ),
    ("post", "/v1/load_lora_adapter"): _Operation(
        "Makes an adapter available.", _ChangedCard, (lambda: small_schema(LoadAdapter),)
    ),
    ("post", "/v1/unload_lora_adapter"): _Operation(
        "Forgets an adapter.", _Unloaded, (lambda: small_schema(UnloadAdapter),)
    ),
    ("post", "/v1/pin_lora_adapter"): _Operation(
        "Brings an adapter to the pool, and keeps it there.", _ChangedCard, (lambda: small_schema(PinAdapter),)
    ),
    ("post", "/v1/unpin_lora_adapter"): _Operation(
        "Lets an adapter leave the pool again.", _ChangedCard, (lambda: small_schema(PinAdapter),)
    ),
}


def add_openapi(app: flask.Flask, statuses: Collection[int], as_json: Callable[[Any], flask.Response]) -> None:
    """Adds the route to an application.

    Args:
      statuses: with which errors are answered.
      as_json: makes an answer of a value.
    """
    document: dict[str, Any] = {}

    @app.get(PATH)
    def openapi():
        if not document:
            document.update(_document(statuses))
        return as_json(document)


def _document(statuses: Collection[int]) -> dict[str, Any]:
    components = _Components()
    error = {"description": "Why not.", "content": _json_of(components.add(_Error.model_json_schema(), "Error"))}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        name = operation.answer.__name__.removeprefix("_")
        content = _json_of(components.add(operation.answer.model_json_schema(), name))
        if operation.streams:
            content["text/event-stream"] = {}  # as OpenAI's clients know them
        described: dict[str, Any] = {
            "summary": operation.summary,
            "operationId": f"{method}{path}".translate(str.maketrans("/", "_", "{}")),
            "responses": {"200": {"description": "Done.", "content": content}}
            | {str(status): error for status in sorted(statuses)},
        }
        if operation.parameters:
            described["parameters"] = list(operation.parameters)
        if operation.bodies:
            bodies = [components.add(schema(), None) for schema in operation.bodies]
            described["requestBody"] = {
                "required": True,
                "content": _json_of(bodies[0] if len(bodies) == 1 else {"anyOf": bodies}),
            }
        if path in OPEN_PATHS:
            described["security"] = []
        elif path in ADMIN_PATHS:
            described["security"] = [{}, {"admin_key": []}]
        paths.setdefault(path, {})[method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "slora-jax", "version": slora_jax.__version__},
        "paths": paths,
        # A server without keys asks for none.
        "security": [{}, {"api_key": []}],
        "components": {
            "schemas": components.schemas,
            "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("api_key", "admin_key")},
        },
    }


class _Components:
    """The schemas that others refer to, gathered from those that have their own."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}

    def add(self, schema: dict[str, Any], name: str | None) -> dict[str, Any]:
        """A schema that refers to these for its parts; under a name, a reference to it."""
        parts = {part: part.removeprefix("_") for part in schema.get("$defs", {})}
        whole = _renamed(schema, parts)
        for part, definition in whole.pop("$defs", {}).items():
            known = self.schemas.setdefault(parts[part], definition)
            assert known == definition, f"two schemas are called {parts[part]}"
        if name is None:
            return whole
        self.schemas[name] = whole
        return {"$ref": f"#/components/schemas/{name}"}


def _renamed(value: Any, parts: dict[str, str]) -> Any:
    """The same schema, with references to where the parts are, and public names."""
    if isinstance(value, list):
        return [_renamed(item, parts) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(item, parts) for key, item in value.items()}
    if isinstance(title := value.get("title"), str):
        renamed["title"] = title.removeprefix("_")
    if isinstance(reference := value.get("$ref"), str):
        renamed["$ref"] = f"#/components/schemas/{parts[reference.removeprefix('#/$defs/')]}"
    return renamed


def _json_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
