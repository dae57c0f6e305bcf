"""OpenAI's JSON to ``Request``, for ``/v1/completions`` and ``/v1/chat/completions``.

A field that would change the answer and is not computed here is refused by name; so is a field nobody knows.
Beside OpenAI's fields both endpoints take ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``,
``ignore_eos``, ``return_token_ids``, ``priority`` (higher goes first) and ``slo_ms`` (first-token objective), and
vLLM's ``min_tokens``, ``allowed_token_ids``, ``bad_words``, ``structured_outputs``, ``guided_json``, ``guided_regex``,
``guided_choice`` and ``guided_grammar``.
"""

import dataclasses
import itertools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import pydantic

from slora_jax.api.tools import MAX_TOOLS, CallFormat, Tools, format_of_template, read_tools
from slora_jax.errors import InvalidRequest, PromptTooLong, UnknownAdapter, shown
from slora_jax.request import (
    ANSWER_TOKENS,
    BOUNDS,
    MAX_BAD_WORDS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Bounds,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    check_number,
)
from slora_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

MAX_CHOICES = 2048
"""Most completions of one HTTP request, over all of its prompts and ``n``."""

MAX_MESSAGES = 10_000
"""Most messages of one chat, and most text parts of one message."""

_MOST_NAMED = 5
"""Unknown fields named in one error."""

_VLLM_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "beam_search": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}
"""vLLM's fields that are not computed here, each with the values (besides null) that change nothing."""

_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""Fields that describe the caller and never change the answer: taken and ignored."""

_GUIDED = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}
"""Kinds of grammar by vLLM's names for them: fields of ``structured_outputs``, and with ``guided_`` of the body."""

_COMPLETION_DEFAULTS = {"suffix": ("",), **_VLLM_DEFAULTS}
_CHAT_DEFAULTS = {
    **_VLLM_DEFAULTS,
    "documents": ([],),
    "echo": (False,),
    "include_reasoning": (True, False),
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that are not computed here, each with the values (besides null) that change nothing."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_MESSAGE_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "annotations": ([],),
}


class Best(NamedTuple):
    """Of each prompt's completions the ``n`` that the model finds likeliest, shown with so many ``logprobs``."""

    n: int
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, understood.

    Attributes:
      model: the name the client used; it is sent back.
      requests: one per prompt.
      echo: the prompts' texts, to be put before the answers; empty if not asked for.
      tools: which the answers may call, in the form ``call_format``; None for none.
      best: which completions are sent back; None for all of them.
      prompt_logprobs: how many of the most likely tokens to show beside each of the prompts', as vLLM has it; None for
        no such list.
    """

    model: str
    requests: tuple[Request, ...]
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    echo: tuple[str, ...] = ()
    usage_in_every_chunk: bool = False
    tools: Tools | None = None
    call_format: CallFormat = "llama3_json"
    prompt_logprobs: int | None = None
    best: Best | None = None

    @property
    def n(self) -> int:
        return self.requests[0].sampling.n if self.best is None else self.best.n

    @property
    def logprobs(self) -> int | None:
        return self.requests[0].sampling.logprobs if self.best is None else self.best.logprobs


class Body(pydantic.BaseModel):
    """What a client sends. Types are those of JSON, and nothing is converted."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


type _Stops[T] = Annotated[list[T], pydantic.Field(max_length=MAX_STOPS), pydantic.FailFast()]


class Form:
    """What a field looks like that is read by code of its own rather than by pydantic, for the API's schema.

    The fuzzer holds it to that: what does not look so must be refused.
    """

    def __init__(self, kind: Any):
        self._kind = kind

    def __get_pydantic_json_schema__(self, schema: Any, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(pydantic.TypeAdapter(self._kind).core_schema)


type _StopText = Annotated[str, pydantic.Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _Text(pydantic.BaseModel):
    type: Literal["text"]


class _JsonObject(pydantic.BaseModel):
    type: Literal["json_object"]


class _NamedSchema(pydantic.BaseModel):
    name: Any = None
    schema_: Annotated[dict[str, Any], pydantic.Field(alias="schema")]


class _JsonSchema(pydantic.BaseModel):
    type: Literal["json_schema"]
    json_schema: _NamedSchema


class _StructuredOutputs(Body):
    json_: Annotated[str | dict[str, Any] | None, pydantic.Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: str | list[str] | None = None
    grammar: str | None = None


class _Generate(Body):
    """Fields of both endpoints. Ranges are checked by ``SamplingParams`` and ``Request``, by ``BOUNDS``."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Annotated[
        _Stops[str],
        pydantic.BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
        Form(_StopText | _Stops[_StopText]),
    ] = []
    stop_token_ids: _Stops[int] = []
    ignore_eos: bool = False
    n: int = 1
    stream: bool = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool = False
    priority: int = 0
    slo_ms: float | None = None
    min_tokens: int = 0
    logit_bias: Annotated[Any, Form(dict[str, float])] = None
    allowed_token_ids: list[int] | None = None
    bad_words: Annotated[list[_StopText], pydantic.Field(max_length=MAX_BAD_WORDS), pydantic.FailFast()] = []
    response_format: Annotated[Any, Form(_Text | _JsonObject | _JsonSchema)] = None
    structured_outputs: Annotated[Any, Form(_StructuredOutputs)] = None
    guided_json: Annotated[Any, Form(str | dict[str, Any])] = None
    guided_regex: Annotated[Any, Form(str)] = None
    guided_choice: Annotated[Any, Form(str | list[str])] = None
    guided_grammar: Annotated[Any, Form(str)] = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None

    @property
    def limit(self) -> tuple[str, int] | None:
        """The field that says how many tokens the answer may have at most, and what it says; None if none does."""
        raise NotImplementedError

    def request(self, prompt: tuple[int, ...], adapter: str | None, sampling: SamplingParams) -> Request:
        return Request(prompt, adapter, sampling, priority=self.priority, slo_ms=self.slo_ms)

    def sampling(self, max_tokens: int, logprobs: int | None, engine: "Engine") -> SamplingParams:
        """The engine's ``default_sampling`` stands for the fields that the body leaves out, or has null for."""
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            n=self.n,
            min_tokens=self.min_tokens,
            logit_bias=_read_logit_bias(self.logit_bias),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(self.bad_words),
            grammar=_read_grammar(self),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )
        defaults = engine.default_sampling
        left_out = defaults.keys() - self.model_fields_set - {"max_tokens"}
        if left_out:
            sampling = sampling.replace(**{name: defaults[name] for name in left_out})
        vocabulary = engine.model_config.vocab_size
        if outside := [token for token in sampling.stop_token_ids if token >= vocabulary]:
            message = (
                f"must be of the vocabulary [0, {vocabulary}), got {outside[0]}; leave it out, it would never come"
            )
            raise InvalidRequest(f"stop_token_ids {message}", "stop_token_ids")
        return sampling


def _read_logit_bias(sent: Any) -> tuple[tuple[int, float], ...]:
    """OpenAI's object from token ids, which JSON has as strings, to what is added to their logits."""
    if sent is None:
        return ()
    if not isinstance(sent, Mapping):
        raise InvalidRequest(f"logit_bias must be an object from token ids to numbers, got {shown(sent)}", "logit_bias")
    for token in sent:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise InvalidRequest(f"logit_bias: {shown(token)} is not a token id; name tokens by number", "logit_bias")
    return tuple((int(token), bias) for token, bias in sent.items())


def _read_grammar(fields: _Generate) -> Grammar | None:
    """The grammar that a body asks for, by OpenAI's name or one of vLLM's.

    Raises:
      InvalidRequest: it asks for two, or for none that is known.
    """
    found = []
    if fields.response_format is not None:
        found.append(("response_format", _of_response_format(fields.response_format)))
    if fields.structured_outputs is not None:
        found.append(("structured_outputs", _of_structured_outputs(fields.structured_outputs)))
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(fields, f"guided_{name}")
        if value is not None:
            found.append((f"guided_{name}", _grammar(name, value, f"guided_{name}")))
    asked = [(name, grammar) for name, grammar in found if grammar is not None]
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise InvalidRequest(f"{names} cannot both say what the answer looks like; send one", asked[1][0])
    return asked[0][1] if asked else None


def _of_response_format(sent: Any) -> Grammar | None:
    kind = sent.get("type") if isinstance(sent, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _grammar("json_object", True, "response_format")
    if kind == "json_schema":
        described = sent.get("json_schema")
        if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
            message = f'response_format.json_schema must be {{"name": ..., "schema": {{...}}}}, got {shown(described)}'
            raise InvalidRequest(message, "response_format.json_schema")
        return _grammar("json", described["schema"], "response_format.json_schema.schema")
    raise InvalidRequest(
        f'response_format must have type "text", "json_object" or "json_schema", got {shown(sent)}', "response_format"
    )


def _of_structured_outputs(sent: Any) -> Grammar | None:
    if not isinstance(sent, Mapping):
        raise InvalidRequest(f"structured_outputs must be an object, got {shown(sent)}", "structured_outputs")
    refuse_unknown(sent, _GUIDED, "structured_outputs.")
    asked = {name: value for name, value in sent.items() if value is not None and value is not False}
    if len(asked) != 1:
        message = f"structured_outputs must have one of {', '.join(_GUIDED)}, got {shown(sent)}"
        raise InvalidRequest(message, "structured_outputs")
    ((name, value),) = asked.items()
    return _grammar(name, value, f"structured_outputs.{name}")


def _grammar(name: str, value: Any, param: str) -> Grammar:
    """Of vLLM's kind ``name``, from a value as JSON has it."""
    if name == "json_object":
        if value is not True:
            raise InvalidRequest(f"{param} must be true, got {shown(value)}", param)
        text = '{"type": "object"}'
    elif name in ("json", "choice") and not isinstance(value, str):
        text = json.dumps(value)
    elif isinstance(value, str):
        text = value
    else:
        raise InvalidRequest(f"{param} must be a string, got {shown(value)}", param)
    try:
        return Grammar(cast(GrammarKind, _GUIDED[name]), text)
    except InvalidRequest as e:
        raise InvalidRequest(f"{param}: {e}", param) from None


class _TextPart(pydantic.BaseModel):
    type: Literal["text"]
    text: str


class _CalledFunction(pydantic.BaseModel):
    name: str
    arguments: str | None = None


class _MadeCall(pydantic.BaseModel):
    id: str = ""
    function: _CalledFunction


class _Message(pydantic.BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_TextPart], pydantic.Field(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    tool_calls: list[_MadeCall] | None = None
    tool_call_id: str | None = None


class _Function(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(pydantic.BaseModel):
    type: Literal["function"]
    function: _Function


class _FunctionName(pydantic.BaseModel):
    name: str


class _NamedTool(pydantic.BaseModel):
    type: Literal["function"]
    function: _FunctionName


class _CompletionBody(_Generate):
    prompt: Annotated[Any, Form(str | list[str] | list[int] | list[list[int]])]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    @property
    def limit(self) -> tuple[str, int] | None:
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)


class ChatTemplating(Body):
    """How a chat becomes a prompt."""

    messages: Annotated[Any, Form(Annotated[list[_Message], pydantic.Field(min_length=1, max_length=MAX_MESSAGES)])]
    tools: Annotated[Any, Form(Annotated[list[_Tool], pydantic.Field(max_length=MAX_TOOLS)])] = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class _ChatBody(ChatTemplating, _Generate):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tool_choice: Annotated[Any, Form(Literal["none", "auto", "required"] | _NamedTool)] = None
    parallel_tool_calls: Annotated[Any, Form(bool)] = None

    @property
    def limit(self) -> tuple[str, int] | None:
        limits = (("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens))
        return next(((name, limit) for name, limit in limits if limit is not None), None)


def parse_completion(body: Any, engine: "Engine") -> Call:
    """Understands the body of ``POST /v1/completions``.

    Raises:
      InvalidRequest: with the field at fault in ``param``.
      UnknownAdapter: ``model`` names neither the base model nor an adapter.
    """
    fields = _validated(_CompletionBody, body, _COMPLETION_DEFAULTS)
    adapter = resolve_model(fields.model, engine)
    check_number("n", fields.n)
    best = _read_best_of(fields)
    default = engine.default_sampling.get("max_tokens", 16)
    sampling = fields.sampling(default if fields.max_tokens is None else fields.max_tokens, fields.logprobs, engine)
    if fields.echo and fields.logprobs is not None:
        if fields.stream:
            message = "echo with logprobs cannot be streamed: the prompt's are known when all of it is read"
            raise InvalidRequest(f"{message}; send stream: false", "echo")
        most = max(fields.logprobs, sampling.prompt_logprobs or 0)
        sampling = sampling.replace(prompt_logprobs=most)
    if best is not None:
        # What is shown of the log-probabilities is another matter: see ``Best``.
        sampling = sampling.replace(n=fields.best_of, logprobs=fields.logprobs or 0)
    prompts = _completion_prompts(fields, sampling.n, engine)
    requests = []
    for prompt in prompts:
        room = _room(prompt, engine, "prompt", _least_room(fields))
        _check_limit(fields, room, engine)
        is_short = fields.max_tokens is None and room < sampling.max_tokens
        requests.append(fields.request(prompt, adapter, sampling.replace(max_tokens=room) if is_short else sampling))
    echo = _prompt_texts(fields.prompt, prompts, engine) if fields.echo else ()
    return dataclasses.replace(_call(fields, tuple(requests), echo), best=best)


def _read_best_of(fields: _CompletionBody) -> Best | None:
    """None where there is nothing to choose from."""
    if fields.best_of is None:
        return None
    check_number("best_of", fields.best_of, BOUNDS["n"])
    if fields.best_of < fields.n:
        raise InvalidRequest(f"best_of ({fields.best_of}) must be at least n ({fields.n})", "best_of")
    if fields.best_of == fields.n:
        return None
    if fields.stream:
        message = "best_of above n cannot be streamed: the best are known when all are complete; send stream: false"
        raise InvalidRequest(message, "best_of")
    return Best(fields.n, fields.logprobs)


def parse_chat(body: Any, engine: "Engine") -> Call:
    """Understands the body of ``POST /v1/chat/completions``; raises as ``parse_completion``."""
    fields = _validated(_ChatBody, body, _CHAT_DEFAULTS)
    adapter = resolve_model(fields.model, engine)
    if fields.top_logprobs is not None:
        check_number("top_logprobs", fields.top_logprobs, BOUNDS["logprobs"])
        if not fields.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    limits = (fields.max_completion_tokens, fields.max_tokens)
    for name, limit in zip(("max_completion_tokens", "max_tokens"), limits, strict=True):
        if limit is not None:
            check_number(name, limit, ANSWER_TOKENS)
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    most = engine.default_sampling.get("max_tokens", BOUNDS["max_tokens"].most)
    sampling = fields.sampling(most if fields.limit is None else fields.limit[1], logprobs, engine)
    messages = read_messages(fields.messages)
    tools = read_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    tokenizer = _tokenizer(engine, "messages", adapter)
    call_format: CallFormat = "llama3_json"
    if tools is not None:
        call_format = format_of_template(source_for_tools(tokenizer))
        if (grammar := tools.grammar(call_format)) is not None:
            if sampling.grammar is not None:
                message = "a tool that must be called and another form of the answer exclude each other; send one"
                raise InvalidRequest(message, "tool_choice")
            sampling = sampling.replace(grammar=grammar)
    ids = encode_chat(fields, messages, tools, tokenizer, _most_read(fields, engine))
    prompt = _checked_ids(_truncated(ids, fields, engine), engine, "messages")
    room = _room(prompt, engine, "messages")
    _check_limit(fields, room, engine)
    if fields.limit is None:
        sampling = sampling.replace(max_tokens=min(room, most))
    call = _call(fields, (fields.request(prompt, adapter, sampling),))
    return dataclasses.replace(call, tools=tools, call_format=call_format)


_TEMPLATES_OWN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
_TO_GO_ON = "\N{OBJECT REPLACEMENT CHARACTER}goes on here\N{OBJECT REPLACEMENT CHARACTER}"


def source_for_tools(tokenizer: Tokenizer) -> str:
    """The chat template that shows tools to the model.

    Raises:
      InvalidRequest: there is none.
    """
    source = tokenizer.template_source(with_tools=True)
    if "tools" not in source:
        message = "the chat template of this model has no place for tools, so the model would not know them"
        raise InvalidRequest(message, "tools")
    return source


def encode_chat(
    fields: ChatTemplating,
    messages: list[dict[str, Any]],
    tools: Tools | None,
    tokenizer: Tokenizer,
    most: int | None = None,
    add_special_tokens: bool = False,
) -> list[int]:
    """The chat as token ids, rendered by its template.

    Args:
      fields: of the body.
      messages, tools: as ``read_messages`` and ``read_tools`` give them.
      most: tokens above which it is refused, if not None.
      add_special_tokens: add what the tokenizer puts around a text, although templates write their own.

    Raises:
      InvalidRequest: the template cannot render it, or not as ``fields`` ask; ``param`` names the field.
    """
    text = _rendered(fields, messages, tools, tokenizer)
    try:
        return tokenizer.encode(text, add_special_tokens, max_tokens=most)
    except InvalidRequest as e:
        e.param = "messages"
        raise


def _rendered(fields: ChatTemplating, messages: list[dict[str, Any]], tools: Tools | None, tokenizer: Tokenizer) -> str:
    if own := next((name for name in fields.chat_template_kwargs if name in _TEMPLATES_OWN), None):
        message = f"chat_template_kwargs.{own} is not for clients to set; leave it out"
        raise InvalidRequest(message, f"chat_template_kwargs.{own}")
    options = {**fields.chat_template_kwargs, "tools": None if tools is None else list(tools.tools)}
    if not fields.continue_final_message:
        return tokenizer.apply_chat_template(messages, fields.add_generation_prompt, **options)
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        message = "continue_final_message needs a last message of the assistant, with text to go on from"
        raise InvalidRequest(message, "continue_final_message")
    # A mark shows where in the rendered chat the message's text ends, whatever the template writes behind it.
    marked = [*messages[:-1], {**last, "content": last["content"] + _TO_GO_ON}]
    text, found, _ = tokenizer.apply_chat_template(marked, False, **options).rpartition(_TO_GO_ON)
    if not found:
        message = "continue_final_message: this model's chat template does not show the last message as it is"
        raise InvalidRequest(message, "continue_final_message")
    return text


def completion_schema() -> dict[str, Any]:
    """JSON schema of the body of ``POST /v1/completions``."""
    return _body_schema(_CompletionBody, _COMPLETION_DEFAULTS, {**BOUNDS, "best_of": BOUNDS["n"]})


def chat_schema() -> dict[str, Any]:
    """JSON schema of the body of ``POST /v1/chat/completions``."""
    limits = {"max_tokens": ANSWER_TOKENS, "max_completion_tokens": ANSWER_TOKENS, "top_logprobs": BOUNDS["logprobs"]}
    return _body_schema(_ChatBody, _CHAT_DEFAULTS, {**BOUNDS, "logprobs": None, **limits})


def small_schema(kind: type[Body]) -> dict[str, Any]:
    """JSON schema of a body that ``read_body`` takes."""
    return _body_schema(kind, {}, {}, ())


def _body_schema(
    kind: type[Body],
    defaults: Mapping[str, tuple[Any, ...]],
    bounds: Mapping[str, Bounds | None],
    labels: Iterable[str] = frozenset(_LABELS),
) -> dict[str, Any]:
    """Of what ``_validated`` takes: each field that need not be there may be null, and so may those not computed."""
    schema = kind.model_json_schema()
    fields = schema["properties"]
    for name, field in fields.items():
        if (bound := bounds.get(name)) is not None:
            _bound(field, bound._replace(least=-1) if name == "top_k" else bound)
        if name not in schema.get("required", ()):
            fields[name] = _or_null(field)
    fields |= schema_of_rest(defaults, labels)
    return schema


def schema_of_rest(
    defaults: Mapping[str, tuple[Any, ...]], labels: Iterable[str] = frozenset(_LABELS)
) -> dict[str, dict[str, Any]]:
    """Schemas of the fields that ``meant_fields`` drops."""
    values = {name: {"enum": [None, *values]} for name, values in defaults.items()}
    return values | {name: {} for name in sorted(labels)}


def _bound(field: dict[str, Any], bound: Bounds) -> None:
    """Adds the bounds of a number, or of those in a list."""
    for part in (field, *field.get("anyOf", ()), field.get("items", {})):
        if part.get("type") in ("integer", "number"):
            part["exclusiveMinimum" if bound.above_least else "minimum"] = bound.least
            part["maximum"] = bound.most


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    told = {name: field.pop(name) for name in ("title", "default", "description") if name in field}
    if told.get("default", ...) is None:
        del told["default"]
    choices = field.pop("anyOf", None) or [field]
    return told | {"anyOf": choices if {"type": "null"} in choices else [*choices, {"type": "null"}]}


def resolve_model(name: str, engine: "Engine") -> str | None:
    """The adapter that ``name`` asks for: ``base`` is None, ``adapter`` or ``base:adapter`` the adapter.

    Every route that is given the name of a model asks this.

    Raises:
      UnknownAdapter: neither.
    """
    if name == engine.model_name:
        return None
    # No adapter's own name begins so: see ``Engine.register_adapter``.
    adapter = name.removeprefix(f"{engine.model_name}:")
    try:
        return engine.adapter(adapter).name
    except UnknownAdapter:
        raise UnknownAdapter(
            f"the model {name[:200]!r} does not exist; GET /v1/models lists the base model and its adapters"
        ) from None


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages, each content a string or a list of text parts, ready for a chat template.

    Raises:
      InvalidRequest: not a list of messages, or something other than text in one.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"messages must be a non-empty list of messages, got {shown(messages)}", "messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages may be at most {MAX_MESSAGES}, got {len(messages)}; join or drop some", "messages"
        )
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, got {shown(message)}", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}; got {shown(role)}", f"{where}.role")
    content = message.get("content")
    calls = _read_calls(message.get("tool_calls"), f"{where}.tool_calls") if role == "assistant" else []
    read: dict[str, Any] = {"role": _ROLES[role]}
    # An answer that is calls alone has no content.
    read["content"] = "" if calls and content is None else _read_content(content, f"{where}.content")
    if calls:
        read["tool_calls"] = calls
    for name, value in message.items():
        if name in ("role", "content") or value is None or (name == "tool_calls" and role == "assistant"):
            continue
        if name == "tool_call_id" and role == "tool":
            if not isinstance(value, str):
                message_text = f"{where}.tool_call_id must be a string, got {shown(value)}"
                raise InvalidRequest(message_text, f"{where}.tool_call_id")
            read["tool_call_id"] = value
        elif name == "name":
            if not isinstance(value, str):
                raise InvalidRequest(f"{where}.name must be a string, got {shown(value)}", f"{where}.name")
            read["name"] = value
        elif name not in _MESSAGE_DEFAULTS:
            raise InvalidRequest(f"{where} has an unknown field {shown(name)}; leave it out", f"{where}.{name[:80]}")
        elif not _is_one_of(value, _MESSAGE_DEFAULTS[name]):
            raise InvalidRequest(
                f"{where}.{name}={shown(value)} is not supported by this server; leave it out", f"{where}.{name}"
            )
    return read


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """An earlier answer's calls, with their arguments as objects, which is how chat templates take them."""
    if calls is None:
        return []
    if not isinstance(calls, list) or len(calls) > MAX_MESSAGES:
        raise InvalidRequest(f"{where} must be a list of calls, got {shown(calls)}", where)
    read = []
    for i, call in enumerate(calls):
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not isinstance(call.get("id", ""), str):
            message = f'{where}[{i}] must be {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}'
            raise InvalidRequest(f"{message}, got {shown(calls[i])}", f"{where}[{i}]")
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            field = f"{where}[{i}].function.arguments"
            message = f"{field} must be a JSON object as a string, got {shown(function.get('arguments'))}"
            raise InvalidRequest(message, field)
        read.append({"id": call.get("id", ""), "type": "function", "function": {"name": name, "arguments": arguments}})
    return read


def _read_content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts, got {shown(content)}", where)
    if len(content) > MAX_MESSAGES:
        raise InvalidRequest(f"{where} may have at most {MAX_MESSAGES} parts, got {len(content)}; join some", where)
    parts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where}[{i}] must be {{"type": "text", "text": ...}}; other parts are not supported, '
                f"got {shown(part)}",
                f"{where}[{i}]",
            )
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _call(fields: _Generate, requests: tuple[Request, ...], echo: tuple[str, ...] = ()) -> Call:
    options = fields.stream_options or _StreamOptions()
    return Call(
        fields.model,
        requests,
        fields.stream,
        options.include_usage,
        fields.return_token_ids,
        echo,
        usage_in_every_chunk=options.include_usage and options.continuous_usage_stats,
        prompt_logprobs=fields.prompt_logprobs,
    )


def _validated[B: _Generate](kind: type[B], body: Any, defaults: Mapping[str, tuple]) -> B:
    """What ``meant_fields`` leaves of the body, with the types of the fields checked."""
    fields = meant_fields(body, kind.model_fields, defaults)
    if isinstance(options := fields.get("stream_options"), dict):
        refuse_unknown(options, _StreamOptions.model_fields, "stream_options.")
    try:
        valid = kind.model_validate(fields)
    except pydantic.ValidationError as e:
        raise first_problem(e) from None
    if valid.stream_options is not None and not valid.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    if valid.prompt_logprobs is not None and valid.stream:
        message = "prompt_logprobs cannot be streamed: they are known when all of the prompt is read"
        raise InvalidRequest(f"{message}; send stream: false", "prompt_logprobs")
    return valid


def read_body[B: Body](kind: type[B], body: Any) -> B:
    """The fields of a small body: those that are null are as if left out.

    Raises:
      InvalidRequest: it is no object, or has a field that is missing, unknown or of another type; ``param`` names it.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(body)}")
    refuse_unknown(body, kind.model_fields)
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except pydantic.ValidationError as e:
        raise first_problem(e) from None


def meant_fields(body: Any, computed: Iterable[str], defaults: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a body that say something: not those that are null, describe the caller, or change nothing.

    Args:
      computed: names of the fields that the server does something with.
      defaults: of other fields, each with the values (besides null) that change nothing.

    Raises:
      InvalidRequest: there is a field that nobody knows, or one of ``defaults`` at another value.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(body)}")
    refuse_unknown(body, {*computed, *defaults, *_LABELS})
    fields = {}
    for name, value in body.items():
        if value is None or name in _LABELS:
            continue
        if name not in defaults:
            fields[name] = value
        elif not _is_one_of(value, defaults[name]):
            raise InvalidRequest(f"{name}={shown(value)} is not supported by this server; leave it out", name)
    return fields


def refuse_unknown(fields: Mapping[str, Any], known: Container[str], prefix: str = "") -> None:
    """Raises InvalidRequest, with the first few names, if a client's object has fields other than those known.

    Here and not by pydantic, which would make an error for each of a million.
    """
    found = itertools.islice((name for name in fields if name not in known), _MOST_NAMED + 1)
    unknown = [prefix + name[:80] for name in found]
    if unknown:
        names = ", ".join(unknown[:_MOST_NAMED]) + ", ..." * (len(unknown) > _MOST_NAMED)
        what = "unknown fields" if len(unknown) > 1 else "unknown field"
        raise InvalidRequest(f"{what}: {names}; leave out what is not meant", unknown[0])


def _is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """Whether the value is one of these as JSON has them, where 1 is not true."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def first_problem(error: pydantic.ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_context=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in problem["loc"])[1:]
    if problem["type"] == "missing":
        return InvalidRequest(f"{field} is missing", field)
    return InvalidRequest(f"{field}: {problem['msg']}, got {shown(problem['input'])}", field)


def _completion_prompts(fields: _CompletionBody, n: int, engine: "Engine") -> list[tuple[int, ...]]:
    """Token ids of each prompt, whichever of OpenAI's four forms was sent; ``n`` completions are made of each."""
    prompt = fields.prompt
    if isinstance(prompt, str):
        return [_text_prompt(prompt, fields, engine)]
    if isinstance(prompt, list) and prompt:
        if type(prompt[0]) is int and fields.truncate_prompt_tokens is None:
            _room(prompt, engine, "prompt", _least_room(fields))  # before each of a million ids is looked at
        if all(type(p) is int for p in prompt):
            return [_checked_ids(_truncated(prompt, fields, engine), engine)]
        if len(prompt) * n > MAX_CHOICES:
            message = f"{len(prompt)} prompts x n={n} are more than {MAX_CHOICES} completions; send several requests"
            raise InvalidRequest(f"prompt: {message}", "prompt")
        if all(isinstance(p, str) for p in prompt):
            return [_text_prompt(p, fields, engine) for p in prompt]
        if all(isinstance(p, list) and all(type(i) is int for i in p) for p in prompt):
            return [_checked_ids(_truncated(p, fields, engine), engine) for p in prompt]
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids; "
        f"got {shown(prompt)}",
        "prompt",
    )


def _prompt_texts(sent: Any, prompts: Sequence[tuple[int, ...]], engine: "Engine") -> tuple[str, ...]:
    if isinstance(sent, str):
        return (sent,)
    if isinstance(sent[0], str):
        return tuple(sent)
    tokenizer = _tokenizer(engine, "echo")
    return tuple(tokenizer.decode(prompt) for prompt in prompts)


def _text_prompt(text: str, fields: _CompletionBody, engine: "Engine") -> tuple[int, ...]:
    tokenizer = _tokenizer(engine, "prompt")
    ids = tokenizer.encode(text, fields.add_special_tokens, max_tokens=_most_read(fields, engine))
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    return _checked_ids(_truncated(ids, fields, engine), engine)


def _most_read(fields: _Generate, engine: "Engine") -> int | None:
    """Tokens above which a text is refused, unless only its end is wanted."""
    return engine.max_model_len if fields.truncate_prompt_tokens is None else None


def _truncated(ids: Sequence[int], fields: _Generate, engine: "Engine") -> Sequence[int]:
    """The last ``truncate_prompt_tokens`` of a prompt; -1 stands for as many as leave room for the answer."""
    most = fields.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        asked = 1 if fields.limit is None else fields.limit[1]
        most = max(1, engine.max_model_len - asked)
    if not 0 < most <= engine.max_model_len:
        message = f"truncate_prompt_tokens must be -1 or from 1 to {engine.max_model_len}, got {shown(most)}"
        raise InvalidRequest(message, "truncate_prompt_tokens")
    return ids[-most:]


def _checked_ids(ids: Sequence[int], engine: "Engine", param: str = "prompt") -> tuple[int, ...]:
    if not ids:
        raise InvalidRequest(f"{param}: the prompt is empty; send at least one token", param)
    vocabulary = engine.model_config.vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        bad = next(i for i in ids if not 0 <= i < vocabulary)
        raise InvalidRequest(f"{param}: token id {shown(bad)} is outside the vocabulary [0, {vocabulary})", param)
    return tuple(ids)


def _tokenizer(engine: "Engine", param: str, adapter: str | None = None) -> Tokenizer:
    tokenizer = engine.tokenizer_of(adapter)
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer (dummy weights): send token ids to /v1/completions", param)
    return tokenizer


def _least_room(fields: _CompletionBody) -> int:
    """Tokens that must be left for the answer: none where only the prompt's are scored."""
    return 0 if fields.max_tokens == 0 else 1


def _room(prompt: Sequence[int], engine: "Engine", param: str, least: int = 1) -> int:
    """Tokens left for the answer."""
    room = engine.max_model_len - len(prompt)
    if room < least:
        raise PromptTooLong(
            f"This model's maximum context length is {engine.max_model_len} tokens. However, your {param} resulted in "
            f"{len(prompt)} tokens{', and at least one must be left for the answer' if least else ''}. "
            f"Please reduce the length of the {param}.",
            param,
        )
    return room


def _check_limit(fields: _Generate, room: int, engine: "Engine") -> None:
    """Raises PromptTooLong if more tokens are asked for than the prompt leaves ``room`` for."""
    if fields.limit is None or fields.limit[1] <= room:
        return
    name, limit = fields.limit
    context, prompt = engine.max_model_len, engine.max_model_len - room
    raise PromptTooLong(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + limit} tokens "
        f"({prompt} in the prompt, {limit} for the answer). Please reduce the length of the prompt, or {name}.",
        name,
    )
