"""The HTTP routes. This package alone knows status codes: ``_ERRORS`` gives each exception its own."""

import contextlib
import dataclasses
import itertools
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flask
from werkzeug.exceptions import HTTPException

import slora_jax
from slora_jax.api.access import Access, Caller, Forbidden, RateLimited, Unauthorized
from slora_jax.api.adapter_bodies import LoadAdapter, PinAdapter, UnloadAdapter
from slora_jax.api.body import BodyTooLarge, UnsupportedBody, inflated, read_json
from slora_jax.api.bounds import check_parts, useful_body_bytes
from slora_jax.api.deltas import (
    ClientGone,
    GenerationFailed,
    News,
    Piece,
    look,
    raise_failure,
    submit_all,
    wait_all,
    without_failure,
)
from slora_jax.api.drain import Drain, Draining
from slora_jax.api.folders import AdapterFolders, NoSuchFolder
from slora_jax.api.metrics import Onlooker, add_metrics
from slora_jax.api.openai import (
    Call,
    parse_chat,
    parse_completion,
    read_body,
    resolve_model,
)
from slora_jax.api.openapi import add_openapi
from slora_jax.api.page_routes import add_page
from slora_jax.api.replies import ChatReply, CompletionReply, Reply
from slora_jax.api.resolving import AdapterResolver
from slora_jax.api.responses import ResponseReply, parse_response
from slora_jax.api.streaming import WIRE, Sender, Wire, pulled
from slora_jax.api.tokens import detokenized, tokenized
from slora_jax.api.tracing import Tracing
from slora_jax.api.traffic import Followed, Traffic, noting, requests_log
from slora_jax.errors import (
    AdapterExists,
    BadAdapter,
    EngineStopped,
    InvalidRequest,
    ObjectiveMissed,
    Overloaded,
    PromptTooLong,
    UnknownAdapter,
    shown,
)
from slora_jax.request import Delta, Request

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine, Generation

RETRY_AFTER_SECONDS = 1

PAUSE_SECONDS_PER_REQUEST = 0.0002
"""A thread that waits for tokens rests this long for every request open before it looks again.

A request alone notices nothing (0.2 ms); with 512, each is looked at every 0.1 s. Without it 512 threads would wake at
every step of the engine and hold it up, for they and the engine's loop share one interpreter lock. Streams need it only
under a server that has no ``streaming.Wire``.
"""

_ITEMS_PER_PIECE = 32
"""Items of a long list that are written as JSON at a time; each may be a token with twenty alternatives."""

OWNER = "slora-jax"

_REQUEST_ID = re.compile(r"[ -~]{1,128}")

_log = logging.getLogger(__name__)


class _Slots:
    """Counts the requests being answered."""

    def __init__(self, limit: int, drain: Drain):
        self._drain = drain
        self._taken = 0
        self._limit = limit
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Takes one for as long as the context lasts.

        Raises:
          Overloaded: all are taken.
          Draining: the server is about to stop.
        """
        with self._drain.running(), self._taking():
            yield

    @contextlib.contextmanager
    def _taking(self) -> Iterator[None]:
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
        """Seconds to rest before looking for tokens again."""
        return self._taken * PAUSE_SECONDS_PER_REQUEST


class _Bill:
    """What a caller pays for some generations' tokens, while they are read and at last for all that were."""

    def __init__(self, caller: Caller, generations: Sequence["Generation"]):
        self._caller = caller
        self._generations = generations
        self._paid = 0

    def pay(self, tokens: int) -> None:
        self._paid += tokens
        self._caller.spend(tokens)

    def settle(self) -> None:
        for generation in self._generations:
            while generation.next_delta(0) is not None:  # what nobody read, of one that was hung up
                pass
        self.pay(max(0, sum(generation.num_generated for generation in self._generations) - self._paid))


class _Rule(NamedTuple):
    error: type[Exception]
    status: int
    kind: str
    code: str | None = None


_ERRORS = (
    _Rule(PromptTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    _Rule(InvalidRequest, 400, "invalid_request_error"),
    _Rule(UnsupportedBody, 415, "invalid_request_error"),
    _Rule(BodyTooLarge, 413, "invalid_request_error"),
    _Rule(Unauthorized, 401, "invalid_request_error", "invalid_api_key"),
    _Rule(Forbidden, 403, "permission_error"),
    _Rule(RateLimited, 429, "rate_limit_error", "rate_limit_exceeded"),
    _Rule(NoSuchFolder, 404, "invalid_request_error", "adapter_not_found"),
    _Rule(AdapterExists, 400, "invalid_request_error", "adapter_exists"),
    _Rule(BadAdapter, 400, "invalid_request_error", "bad_adapter"),
    _Rule(UnknownAdapter, 404, "invalid_request_error", "model_not_found"),
    _Rule(ObjectiveMissed, 429, "rate_limit_error", "objective_missed"),
    _Rule(Overloaded, 429, "rate_limit_error", "engine_overloaded"),
    _Rule(Draining, 503, "service_unavailable_error", "draining"),
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
    access: Access | None = None,
    folders: AdapterFolders | None = None,
    resolve_adapters: bool = False,
    drain: Drain | None = None,
    tracing: Tracing | None = None,
) -> flask.Flask:
    """Builds the WSGI application around a running engine.

    Args:
      allow_adapter_loading: let clients register adapters from this machine's folders; meant if there is no ``access``.
      max_streams: most requests answered at a time; one more gets 429. The server needs a thread for each,
        and a few more so that the refusals and ``/health`` are answered too.
      max_body_bytes: larger bodies get 413, and so do gzip bodies that become larger; ``useful_body_bytes`` of the
        model's context if None.
      access: who may do what; everybody everything if None, but for registering adapters.
      folders: where those may be; anywhere on this machine if None.
      resolve_adapters: register an adapter when a request names one that is in ``folders``.
      drain: once it has begun, new requests get 503.
      tracing: makes a span of each request; None for none.
    """
    app = flask.Flask("slora_jax")
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes or useful_body_bytes(engine.max_model_len)
    app.url_map.merge_slashes = False  # `//health` is not found, rather than somewhere else
    access = access or Access(allow_adapter_loading=allow_adapter_loading)
    folders = folders or AdapterFolders()
    drain = drain or Drain()
    resolver = AdapterResolver(engine, folders) if resolve_adapters else None
    slots, sender = _Slots(max_streams, drain), Sender()
    started = int(time.time())
    traffic, onlooker = Traffic(engine.model_name), Onlooker(engine)
    add_metrics(app, engine, traffic, onlooker)
    add_page(app, engine, traffic, onlooker, _json)
    add_openapi(app, {rule.status for rule in _ERRORS}, _json)

    @app.before_request
    def come_in():
        request, headers = flask.request, flask.request.headers
        flask.g.request_id = _request_id(headers.get("X-Request-Id"))
        if request.environ["PATH_INFO"].startswith("//"):  # which Werkzeug would pass over
            flask.abort(404)
        if request.method == "OPTIONS":
            return flask.Response(status=204) if "Access-Control-Request-Method" in headers else None
        path = request.url_rule.rule if request.url_rule else request.path
        flask.g.caller = access.identify(headers.get("Authorization"), path)
        if request.method == "POST":
            access.check_sender(
                path,
                host=headers.get("Host", ""),
                origin=headers.get("Origin"),
                content_type=headers.get("Content-Type"),
            )
        return None

    @app.after_request
    def go_out(response: flask.Response) -> flask.Response:
        headers = flask.request.headers
        is_preflight = flask.request.method == "OPTIONS"
        response.headers["X-Request-Id"] = flask.g.request_id
        response.headers.update(
            access.cross_origin_headers(
                host=headers.get("Host", ""),
                origin=headers.get("Origin"),
                method=headers.get("Access-Control-Request-Method") if is_preflight else None,
                headers=headers.get("Access-Control-Request-Headers") if is_preflight else None,
            )
        )
        return response

    def resolve(name: str) -> str | None:
        """The adapter, or None for the base model; as ``resolve_model``, for what the caller may use."""
        _check_model(name, engine)
        return resolve_model(name, engine)

    def use(name: str) -> None:
        """Raises Forbidden if the caller may not use a model; else sees to it that an adapter is registered."""
        _check_model(name, engine)
        if resolver is not None:
            resolver.look_for(name.removeprefix(f"{engine.model_name}:"))

    def resolve_or_load(name: str) -> str | None:
        use(name)
        return resolve_model(name, engine)

    @app.post("/v1/completions")
    def completions():
        return _generate(engine, slots, sender, traffic, tracing, use, parse_completion, CompletionReply)

    @app.post("/v1/chat/completions")
    def chat_completions():
        return _generate(engine, slots, sender, traffic, tracing, use, parse_chat, ChatReply)

    @app.post("/v1/responses")
    def responses():
        return _generate(engine, slots, sender, traffic, tracing, use, parse_response, ResponseReply)

    @app.get("/v1/models")
    def models():
        cards = [_base_card(engine, started), *(_adapter_card(engine, a) for a in engine.adapters().values())]
        cards = [card for card in cards if flask.g.caller.may_use(card["id"])]
        return _json({"object": "list", "data": cards})

    @app.get("/v1/models/<path:name>")
    def model(name: str):
        adapter = resolve(name)
        return _json(_base_card(engine, started) if adapter is None else _adapter_card(engine, engine.adapter(adapter)))

    @app.get("/v1/capacity")
    def capacity():
        arguments = flask.request.args
        if unknown := [name for name in arguments if name not in ("adapter", "prompt_tokens", "max_tokens")]:
            raise InvalidRequest(f"unknown parameter: {shown(unknown[0])}; leave it out", unknown[0][:80])
        if twice := [name for name in arguments if len(arguments.getlist(name)) > 1]:
            raise InvalidRequest(f"{twice[0]} is given more than once; give it once", twice[0])
        lengths = [_count(arguments.get(name, ""), name) for name in ("prompt_tokens", "max_tokens")]
        adapter = resolve(arguments.get("adapter", engine.model_name))
        return _json(dataclasses.asdict(engine.capacity(adapter, sum(lengths))))

    @app.get("/health")
    def health():
        if not engine.is_running:
            raise EngineStopped("the engine is not running")
        return _json({"status": "ok", **engine.stats()})

    @app.route("/ping", methods=["GET", "POST"])
    def ping():
        if not engine.is_running:
            raise EngineStopped("the engine is not running")
        return _json({})

    @app.get("/ready")
    def ready():
        if drain.has_begun:
            raise Draining("this server is about to stop")
        if not engine.is_running:
            raise EngineStopped("the engine is not running")
        return _json({"status": "ready"})

    @app.get("/version")
    def version():
        return _json({"version": slora_jax.__version__})

    @app.post("/tokenize")
    def tokenize():
        with slots.one():
            flask.g.caller.admit()
            return _json(tokenized(_json_body(), engine, resolve_or_load))

    @app.post("/detokenize")
    def detokenize():
        with slots.one():
            flask.g.caller.admit()
            return _json(detokenized(_json_body(), engine, resolve_or_load))

    @app.post("/v1/load_lora_adapter")
    def load_lora_adapter():
        body = read_body(LoadAdapter, _json_body())
        if body.is_3d_lora_weight:
            raise InvalidRequest("is_3d_lora_weight is for mixtures of experts; leave it out", "is_3d_lora_weight")
        name = body.lora_name
        with slots.one():  # a slow disk must not keep the threads that are left for /health and refusals
            path = folders.checked(body.lora_path)
            try:
                adapter = engine.register_adapter(name, path, body.pinned, body.load_inplace)
            except AdapterExists:
                raise AdapterExists(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True."
                ) from None
        return _json(_adapter_card(engine, adapter) | _success(name, "added"))

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter():
        name = _registered(read_body(UnloadAdapter, _json_body()))
        with slots.one():
            engine.unregister_adapter(name)
        return _json({"id": name, "object": "model", "deleted": True} | _success(name, "removed"))

    @app.post("/v1/pin_lora_adapter")
    def pin_lora_adapter():
        name = _registered(read_body(PinAdapter, _json_body()))
        return _json(_adapter_card(engine, engine.pin_adapter(name)) | _success(name, "pinned"))

    @app.post("/v1/unpin_lora_adapter")
    def unpin_lora_adapter():
        name = _registered(read_body(PinAdapter, _json_body()))
        return _json(_adapter_card(engine, engine.unpin_adapter(name)) | _success(name, "unpinned"))

    def _registered(body: PinAdapter) -> str:
        name = resolve_model(body.lora_name, engine)
        if name is None:
            raise InvalidRequest(f"{body.lora_name!r} is the base model, which stays; name an adapter", "lora_name")
        return name

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
        if rule.status == 429 or rule.error is Draining:
            response.headers["Retry-After"] = str(getattr(error, "retry_after", RETRY_AFTER_SECONDS))
        if rule.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
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
    sender: Sender,
    traffic: Traffic,
    tracing: Tracing | None,
    use: Callable[[str], None],
    parse: Callable[[Any, "Engine"], Call],
    reply_type: type[Reply],
) -> flask.Response:
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(slots.one())
        caller: Caller = flask.g.caller
        caller.admit()
        body = _json_body()
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            use(body["model"])  # before anything tells whether there is such a model
        call = _of_caller(parse(body, engine), caller, engine)
        reply = reply_type(call, engine.tokenizer)
        generations = submit_all(engine, call.requests)
        if tracing is not None:
            route = str(flask.request.url_rule)
            cleanup.callback(tracing.begin(dict(flask.request.headers), route, call, reply.id, generations))
        bill = _Bill(caller, generations)
        caller.spend(sum(len(request.prompt) for request in call.requests))
        cleanup.callback(bill.settle)
        followed = [traffic.follow(generation, reply.id) for generation in generations]
        for generation, one in zip(generations, followed, strict=True):
            cleanup.callback(generation.cancel)
            cleanup.callback(one.end)
        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        if not call.stream:
            try:
                outputs = wait_all(generations, gone, noting(followed, slots.pause))
                return _json(reply.whole(outputs), depth=reply.depth)
            except ClientGone:
                return flask.Response(status=499)  # nobody reads it
        looks = look(generations, gone)
        if engine.gives_up_late:
            # Once a stream has begun its status is 200: wait for what comes first.
            try:
                looks = _begun(looks, News(generations))
            except ClientGone:
                return flask.Response(status=499)
        # Runs when the stream has ended, failed, or was dropped before its first event.
        end = cleanup.pop_all().close
        events = _events(call, reply, generations, followed, looks, bill, end)
        wire: Wire | None = flask.request.environ.get(WIRE)
        body = pulled(events, generations, slots.pause) if wire is None else sender.sent(events, generations, wire)
        response = flask.Response(body, mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        response.call_on_close(end)
        return response


def _begun(looks: Iterator[list[Piece]], news: News) -> Iterator[list[Piece]]:
    """The same, once there is something.

    Raises:
      ObjectiveMissed: it says that the request was given up.
    """
    for first in looks:
        if not first:
            news.wait()
            continue
        for _, deltas in first:
            for delta in deltas:
                if delta.finish_reason == "late":
                    raise_failure(delta)
        return itertools.chain([first], looks)
    return looks


def _events(
    call: Call,
    reply: Reply,
    generations: Sequence["Generation"],
    followed: Sequence[Followed],
    looks: Iterator[list[Piece]],
    bill: _Bill,
    end: Callable[[], None],
) -> Iterator[bytes]:
    """The server-sent events of one stream: whenever it is asked those that there are, b"" for none. It never waits.

    Errors cannot change the status any more, so they are events. ``end`` is called ahead of the last ones: whoever has
    read them may ask again at once, and finds the stream's place free.
    """
    completion_tokens = 0
    writer = _EventWriter(reply)
    try:
        said = [_event(event) for event in reply.opening()]
        for pieces in looks:
            for index, deltas in pieces:
                new_tokens = sum([len(delta.token_ids) for delta in deltas])
                completion_tokens += new_tokens
                bill.pay(new_tokens)
                followed[index].note()
                usage = reply.usage(*_used(generations, completion_tokens)) if call.usage_in_every_chunk else {}
                said += [writer.events(index, delta, usage) for delta in deltas]
            yield b"".join(said)
            said = []
            for _, deltas in pieces:
                for delta in deltas:
                    raise_failure(delta)
        end()
        yield b"".join(map(_event, reply.closing(*_used(generations, completion_tokens)))) + reply.last_words
    except ClientGone:
        return
    except Exception as error:
        end()
        yield _event(reply.failure(_error_of(error, _rule(error))))


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
    if rule.error is PromptTooLong:
        # OpenAI's client makes its exception of the words alone, and LangChain looks for the code there.
        message += f" ({rule.code})"
    param = getattr(error, "param", None) or ("model" if rule.error is UnknownAdapter else None)
    return _error_body(message, rule.kind, param, error.code if isinstance(error, Forbidden) else rule.code)


def _error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise InvalidRequest(f"{name} must be a whole number above 0, got {text[:20]!r}", name)
    return int(text)


def _json_body() -> Any:
    headers = flask.request.headers
    most_bytes = flask.current_app.config["MAX_CONTENT_LENGTH"]
    body, encoding = inflated(flask.request.get_data(), headers.get("Content-Encoding"), most_bytes)
    check_parts(body)
    return read_json(body, headers.get("Content-Type"), encoding)


def _success(name: str, done: str) -> dict[str, str]:
    """What scripts written for vLLM look for in the answer's text."""
    return {"message": f"Success: LoRA adapter '{name}' {done} successfully."}


def _check_model(name: str, engine: "Engine") -> None:
    """Raises Forbidden if the caller may not use the model of this name, in whichever way it is written."""
    caller: Caller = flask.g.caller
    caller.check_model(name.removeprefix(f"{engine.model_name}:"))


def _of_caller(call: Call, caller: Caller, engine: "Engine") -> Call:
    """The same call, with the HTTP request's id and no higher a priority than the caller may have."""

    def own(request: Request) -> Request:
        priority = caller.allowed_priority(request.priority) if engine.orders_by_priority else request.priority
        return dataclasses.replace(request, request_id=flask.g.request_id, priority=priority)

    return dataclasses.replace(call, requests=tuple(map(own, call.requests)))


def _request_id(sent: str | None) -> str:
    """The client's name for its request, if it is one that can be shown; else a new one."""
    return sent if sent and _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


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


def _json(value: Any, status: int = 200, depth: int = Reply.depth) -> flask.Response:
    body = "".join(_pieces(value, depth)).encode("utf-8", "replace")
    return flask.Response(body, status, mimetype="application/json")


def _event(value: dict[str, Any]) -> bytes:
    """One event of a stream. One that has a type has it ahead of its data too, as OpenAI's newer streams do."""
    if "type" not in value:
        return b"data: " + _dumps(value) + b"\n\n"
    # The last ones repeat the whole answer, one object deeper than it is without a stream.
    data = "".join(_pieces(value, ResponseReply.depth + 1)).encode("utf-8", "replace")
    return f"event: {value['type']}\n".encode() + b"data: " + data + b"\n\n"


class _EventWriter:
    """Writes what the deltas of one stream add, as events. Of those that bring nothing but text, most of a stream, only
    the text is written anew for each."""

    _TEXT = "\0text\0"

    def __init__(self, reply: Reply):
        self._reply = reply
        self._around: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # the text, by prompt and completion

    def events(self, index: int, delta: Delta, usage: dict[str, Any]) -> bytes:
        """Of a delta of the prompt ``index``; ``usage`` are further fields of each event."""
        is_text = delta.text and delta.finish_reason is None and not delta.logprobs
        if is_text and not usage and self._reply.is_stateless:
            around = self._around.get((index, delta.index))
            if around is None:
                around = self._around[index, delta.index] = self._surroundings(index, delta.index)
            return around[0] + _encode(delta.text).encode("utf-8", "replace") + around[1]
        return b"".join([_event(event | usage) for event in self._reply.events(index, without_failure(delta))])

    def _surroundings(self, index: int, completion: int) -> tuple[bytes, bytes]:
        """What an event has ahead of its text, and behind it."""
        (event,) = self._reply.events(index, Delta(completion, self._TEXT))
        before, _, after = _event(event).rpartition(_dumps(self._TEXT))
        return before, after


def _dumps(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "replace")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Raises ValueError for a NaN or an infinity, which JSON cannot hold."""


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """JSON, each piece of little work: encoding a reply of many choices at once would keep everybody waiting.

    ``depth`` is how deep an answer's long lists are; see ``Reply``.
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
