"""The HTTP routes. This package alone knows status codes: ``_ERRORS`` gives each exception its own."""

import contextlib
import dataclasses
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flask
from werkzeug.exceptions import HTTPException

from slora_jax.api.body import UnsupportedBody, read_json
from slora_jax.api.bounds import check_parts, useful_body_bytes
from slora_jax.api.deltas import (
    ClientGone,
    GenerationFailed,
    raise_failure,
    submit_all,
    wait_all,
    watch,
    without_failure,
)
from slora_jax.api.metrics import Onlooker, add_metrics
from slora_jax.api.openai import (
    Call,
    ChatReply,
    CompletionReply,
    Reply,
    parse_chat,
    parse_completion,
    resolve_model,
)
from slora_jax.api.page_routes import add_page
from slora_jax.api.traffic import Followed, Traffic, noting, requests_log
from slora_jax.errors import (
    BadAdapter,
    EngineStopped,
    InvalidRequest,
    ObjectiveMissed,
    Overloaded,
    PromptTooLong,
    UnknownAdapter,
    shown,
)
from slora_jax.request import Delta

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine, Generation

RETRY_AFTER_SECONDS = 1

PAUSE_SECONDS_PER_STREAM = 0.0002
"""After each event a stream rests this long for every request open, and then sends all that came meanwhile.

One stream notices nothing (0.2 ms); of 512, each sends an event every 0.1 s. Without it 512 threads wake at
every step of the engine and hold it up, for they and the engine's loop share one interpreter lock: with 512
streams and a step each 20 ms it halved the tokens per second."""

_ITEMS_PER_PIECE = 32
"""Items of a long list that are written as JSON at a time; each may be a token with twenty alternatives."""

OWNER = "slora-jax"

_log = logging.getLogger(__name__)


class _Slots:
    """Counts the requests being answered."""

    def __init__(self, limit: int):
        self._taken = 0
        self._limit = limit
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Takes one for as long as the context lasts.

        Raises:
          Overloaded: all are taken.
        """
        with self._lock:
            if self._taken == self._limit:
                raise Overloaded("all of this server's streams are taken; try again later")
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1

    def pause(self) -> float:
        """Seconds to rest after an event."""
        return self._taken * PAUSE_SECONDS_PER_STREAM


class _Forbidden(Exception):
    """The server was started without this route's permission."""


class _Rule(NamedTuple):
    error: type[Exception]
    status: int
    kind: str
    code: str | None = None


_ERRORS = (
    _Rule(PromptTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    _Rule(InvalidRequest, 400, "invalid_request_error"),
    _Rule(UnsupportedBody, 415, "invalid_request_error"),
    _Rule(BadAdapter, 400, "invalid_request_error", "bad_adapter"),
    _Rule(_Forbidden, 403, "permission_error", "adapter_loading_not_allowed"),
    _Rule(UnknownAdapter, 404, "invalid_request_error", "model_not_found"),
    _Rule(ObjectiveMissed, 429, "rate_limit_error", "objective_missed"),
    _Rule(Overloaded, 429, "rate_limit_error", "engine_overloaded"),
    _Rule(EngineStopped, 503, "service_unavailable_error", "engine_stopped"),
    _Rule(GenerationFailed, 500, "server_error", "generation_failed"),
)
_UNEXPECTED = _Rule(Exception, 500, "server_error", "internal_error")


def create_app(
    engine: "Engine",
    *,
    allow_adapter_loading: bool = False,
    max_streams: int = 512,
    max_body_bytes: int | None = None,
) -> flask.Flask:
    """Builds the WSGI application around a running engine.

    Args:
      allow_adapter_loading: let clients register adapters from this machine's folders.
      max_streams: most requests answered at a time; one more gets 429. The server needs a thread for each,
        and a few more so that the refusals and ``/health`` are answered too.
      max_body_bytes: larger bodies get 413; ``useful_body_bytes`` of the model's context if None.
    """
    app = flask.Flask("slora_jax")
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes or useful_body_bytes(engine.max_model_len)
    app.url_map.merge_slashes = False  # `//health` is not found, rather than somewhere else

    @app.before_request
    def no_empty_first_part():
        if flask.request.environ["PATH_INFO"].startswith("//"):  # which Werkzeug would pass over
            flask.abort(404)

    slots = _Slots(max_streams)
    started = int(time.time())
    traffic, onlooker = Traffic(engine.model_name), Onlooker(engine)
    add_metrics(app, engine, traffic, onlooker)
    add_page(app, engine, traffic, onlooker, _json)

    @app.post("/v1/completions")
    def completions():
        return _generate(engine, slots, traffic, parse_completion, CompletionReply)

    @app.post("/v1/chat/completions")
    def chat_completions():
        return _generate(engine, slots, traffic, parse_chat, ChatReply)

    @app.get("/v1/models")
    def models():
        cards = [_base_card(engine, started), *(_adapter_card(engine, a) for a in engine.adapters().values())]
        return _json({"object": "list", "data": cards})

    @app.get("/v1/models/<path:name>")
    def model(name: str):
        adapter = resolve_model(name, engine)
        return _json(_base_card(engine, started) if adapter is None else _adapter_card(engine, engine.adapter(adapter)))

    @app.get("/v1/capacity")
    def capacity():
        arguments = flask.request.args
        if unknown := [name for name in arguments if name not in ("adapter", "prompt_tokens", "max_tokens")]:
            raise InvalidRequest(f"unknown parameter: {shown(unknown[0])}; leave it out", unknown[0][:80])
        if twice := [name for name in arguments if len(arguments.getlist(name)) > 1]:
            raise InvalidRequest(f"{twice[0]} is given more than once; give it once", twice[0])
        lengths = [_count(arguments.get(name, ""), name) for name in ("prompt_tokens", "max_tokens")]
        adapter = resolve_model(arguments.get("adapter", engine.model_name), engine)
        return _json(dataclasses.asdict(engine.capacity(adapter, sum(lengths))))

    @app.get("/health")
    def health():
        if not engine.is_running:
            raise EngineStopped("the engine is not running")
        return _json({"status": "ok", **engine.stats()})

    @app.post("/v1/load_lora_adapter")
    def load_lora_adapter():
        body = _adapter_fields(("lora_name", "lora_path"), optional=("pinned",))
        pinned = body.get("pinned", False)
        if not isinstance(pinned, bool):
            raise InvalidRequest(f"pinned must be true or false, got {shown(pinned)}", "pinned")
        with slots.one():  # a slow disk must not keep the threads that are left for /health and refusals
            adapter = engine.register_adapter(body["lora_name"], body["lora_path"], pinned)
        return _json(_adapter_card(engine, adapter))

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter():
        name = _adapter_fields(("lora_name",))["lora_name"]
        adapter = resolve_model(name, engine)
        if adapter is None:
            raise InvalidRequest(f"{name!r} is the base model, which stays; name an adapter", "lora_name")
        with slots.one():
            engine.unregister_adapter(adapter)
        return _json({"id": adapter, "object": "model", "deleted": True})

    def _adapter_fields(names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        if not allow_adapter_loading:
            raise _Forbidden("this server does not load adapters on request; start it with --allow-adapter-loading")
        body = _json_body()
        if not isinstance(body, dict):
            raise InvalidRequest(f"the body must be a JSON object, got {shown(body)}")
        if unknown := [name for name in body if name not in (*names, *optional)]:
            raise InvalidRequest(f"unknown field: {shown(unknown[0])}; leave it out", unknown[0][:80])
        for name in names:
            if not isinstance(body.get(name), str) or not body[name]:
                raise InvalidRequest(f"{name} must be a non-empty string, got {shown(body.get(name))}", name)
        return body

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException):
        status = error.code or 500
        message = f"{flask.request.method[:80]} {flask.request.path[:80]}: {error.description}"
        response = _json(_error_body(message, "invalid_request_error" if status < 500 else "server_error"), status)
        if allow := error.get_response().headers.get("Allow"):
            response.headers["Allow"] = allow
        return response

    @app.errorhandler(Exception)
    def any_error(error: Exception):
        rule = _rule(error)
        response = _json(_error_of(error, rule), rule.status)
        _log_refusal(rule, getattr(error, "param", None))
        if rule.status == 429:
            response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        return response

    return app


def _log_refusal(rule: _Rule, param: str | None) -> None:
    """Of a request that was refused; without its message, which may show what the client sent."""
    route = flask.request.url_rule.rule if flask.request.url_rule else "-"
    said = {"route": route, "status": rule.status, "code": rule.code or rule.kind, "param": param}
    requests_log.info("refused %s", " ".join(f"{k}={v or '-'}" for k, v in said.items()), extra={"fields": said})


def error_body(message: str, status: int) -> bytes:
    """An error in OpenAI's shape, for failures before any route is reached."""
    return _dumps(_error_body(message, "invalid_request_error" if status < 500 else "server_error"))


def _generate(
    engine: "Engine",
    slots: "_Slots",
    traffic: Traffic,
    parse: Callable[[Any, "Engine"], Call],
    reply_type: type[Reply],
) -> flask.Response:
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(slots.one())
        call = parse(_json_body(), engine)
        reply = reply_type(call, engine.tokenizer)
        generations = submit_all(engine, call.requests)
        followed = [traffic.follow(generation, reply.id) for generation in generations]
        for generation, one in zip(generations, followed, strict=True):
            cleanup.callback(generation.cancel)
            cleanup.callback(one.end)
        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        if not call.stream:
            try:
                return _json(reply.whole(wait_all(generations, gone, noting(followed, slots.pause))))
            except ClientGone:
                return flask.Response(status=499)  # nobody reads it
        pieces = watch(generations, gone)
        if engine.gives_up_late:
            # Once a stream has begun its status is 200: wait for what comes first.
            try:
                pieces = _begun(pieces)
            except ClientGone:
                return flask.Response(status=499)
        response = flask.Response(
            _events(call, reply, generations, followed, pieces, slots), mimetype="text/event-stream"
        )
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        # Runs when the stream has ended, failed, or was dropped before its first event.
        response.call_on_close(cleanup.pop_all().close)
        return response


def _begun(pieces: Iterator[tuple[int, list[Delta]]]) -> Iterator[tuple[int, list[Delta]]]:
    """The same, once the first piece is there.

    Raises:
      ObjectiveMissed: it says that the request was given up.
    """
    for first in pieces:
        for delta in first[1]:
            if delta.finish_reason == "late":
                raise_failure(delta)
        return itertools.chain([first], pieces)
    return pieces


def _events(
    call: Call,
    reply: Reply,
    generations: Sequence["Generation"],
    followed: Sequence[Followed],
    pieces: Iterator[tuple[int, list[Delta]]],
    slots: "_Slots",
) -> Iterator[bytes]:
    """The server-sent events of one stream. Errors cannot change the status any more, so they are events."""
    completion_tokens = 0
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        for index, deltas in pieces:
            completion_tokens += sum(len(delta.token_ids) for delta in deltas)
            followed[index].note()
            chunks = [said for delta in deltas if (said := reply.chunk(index, without_failure(delta))) is not None]
            if call.usage_in_every_chunk:
                usage = reply.usage(*_used(generations, completion_tokens))
                chunks = [chunk | usage for chunk in chunks]
            if chunks:
                yield b"".join(map(_event, chunks))
            for delta in deltas:
                raise_failure(delta)
            time.sleep(slots.pause())
        if call.include_usage:
            yield _event(reply.usage_chunk(*_used(generations, completion_tokens)))
        yield b"data: [DONE]\n\n"
    except ClientGone:
        return
    except Exception as error:
        yield _event(_error_of(error, _rule(error)))


def _used(generations: Sequence["Generation"], completion_tokens: int) -> tuple[int, int, int]:
    """Tokens of the prompts, of the answers so far, and of the prompts that came from the prefix cache."""
    prompt_tokens = sum(len(generation.prompt_token_ids) for generation in generations)
    return prompt_tokens, completion_tokens, sum(generation.cached_tokens for generation in generations)


def _rule(error: Exception) -> _Rule:
    for rule in _ERRORS:
        if isinstance(error, rule.error):
            return rule
    _log.error("unexpected error while serving a request", exc_info=error)
    return _UNEXPECTED


def _error_of(error: Exception, rule: _Rule) -> dict[str, Any]:
    message = "internal server error; see the server's log" if rule is _UNEXPECTED else str(error)
    param = getattr(error, "param", None) or ("model" if rule.error is UnknownAdapter else None)
    return _error_body(message, rule.kind, param, rule.code)


def _error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise InvalidRequest(f"{name} must be a whole number above 0, got {text[:20]!r}", name)
    return int(text)


def _json_body() -> Any:
    headers = flask.request.headers
    body = flask.request.get_data()
    check_parts(body)
    return read_json(body, headers.get("Content-Type"), headers.get("Content-Encoding"))


def _base_card(engine: "Engine", created: int) -> dict[str, Any]:
    return _card(engine, engine.model_name, created) | {"parent": None}


def _adapter_card(engine: "Engine", adapter) -> dict[str, Any]:
    return _card(engine, adapter.name, int(adapter.created)) | {
        "parent": engine.model_name,
        "rank": adapter.rank,
        "pinned": adapter.pinned,
    }


def _card(engine: "Engine", name: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": engine.model_name,
        "max_model_len": engine.max_model_len,
    }


def _json(value: Any, status: int = 200) -> flask.Response:
    return flask.Response("".join(_pieces(value)).encode("utf-8", "replace"), status, mimetype="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + _dumps(value) + b"\n\n"


def _dumps(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "replace")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Raises ValueError for a NaN or an infinity, which JSON cannot hold."""


def _pieces(value: Any, depth: int = 4) -> Iterator[str]:
    """JSON, each piece of little work: encoding a reply of many choices at once would keep everybody waiting.

    ``depth`` is how deep an answer's long lists are (choices, choice, logprobs, tokens).
    """
    if isinstance(value, dict) and depth:
        comma = ""
        yield "{"
        for key, item in value.items():
            yield f"{comma}{_encode(key)}:"
            yield from _pieces(item, depth - 1)
            comma = ","
        yield "}"
    elif isinstance(value, list) and depth:
        comma = ""
        yield "["
        for item in value:
            yield comma
            yield from _pieces(item, depth - 1)
            comma = ","
        yield "]"
    elif isinstance(value, list):
        comma = ""
        yield "["
        for start in range(0, len(value), _ITEMS_PER_PIECE):
            yield comma
            yield _encode(value[start : start + _ITEMS_PER_PIECE])[1:-1]
            comma = ","
        yield "]"
    else:
        yield _encode(value)
