"""The server as an application of Ray Serve: one address in front of many replicas, each with an engine of its own.

``app`` is what ``serve run`` and ``serve deploy`` build. An ``Ingress`` reads which adapter a request asks for, and
hands the request on as it came. A ``Replica`` answers it with the same routes as ``serve.py``. ``Changes`` knows what
was loaded and unloaded at run time, for replicas to come. Needs the extra ``ray``.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from slora_jax.api.access import ADMIN_PATHS
from slora_jax.api.app import create_app, error_body
from slora_jax.api.bounds import useful_body_bytes
from slora_jax.api.logs import set_up_logging
from slora_jax.api.server import SPARE_THREADS, ServerConfig, rules
from slora_jax.api.tracing import tracing_to
from slora_jax.config import EngineConfig
from slora_jax.demo import with_demo
from slora_jax.fleet.changes import Change, with_change
from slora_jax.fleet.config import FleetConfig, read_settings
from slora_jax.fleet.forwarding import About, lost_event, partly_refused
from slora_jax.fleet.metrics import merged
from slora_jax.fleet.routing import Rule, create_routing
from slora_jax.fleet.wsgi import Answer, Head, Sent, WsgiThreads

ACCEPT_SECONDS = 30.0
"""How long a request waits for a replica that takes it, before it is answered 503."""

CHANGE_SECONDS = 120.0
"""How long the replicas may take to load an adapter at run time."""

_ATTEMPTS = 2
"""Replicas that are asked, one after the other, if they end before they have begun to answer."""

_SECONDS_BETWEEN_LOOKS = 2.0
"""How often a replica asks for changes that it was not told of, since it started while they were made."""

_HEALTH_SECONDS = 2.0
_INGRESS_REQUESTS = 10_000
_BROKEN = (RayActorError, DeploymentUnavailableError)
"""How a call ends whose replica ended."""

_log = logging.getLogger(__name__)


class AdapterRouter(RequestRouter):
    """Orders the replicas for each request by a rule of ``routing``; Ray gives it to the first that has room."""

    def initialize_state(self, rule: Rule, spill_at: int) -> None:
        self._routing = create_routing(rule, spill_at)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        adapter = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if all are full
            adapter = pending_request.metadata.multiplexed_model_id or None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # What is not known was not asked of late, and so has nothing of ours to do.
        load = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in self._routing.order(adapter, load)] if load else []


class Replica:
    """One engine and the application of ``serve.py`` in front of it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engine: EngineConfig, server: ServerConfig, changes: DeploymentHandle
    ):
        from slora_jax.engine.engine import Engine, leave_alone_what_exists

        self._end = contextlib.ExitStack()
        set_up_logging(server.log_level, server.log_json)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._changes = changes
        self._known: list[Change] = []
        self._lock = asyncio.Lock()
        access, folders = rules(server)
        tracing = self._end.enter_context(tracing_to(server.otlp_traces_endpoint))

        def load() -> Engine:
            loaded = Engine.create(with_demo(engine), progress=False)
            loaded.warm_up()
            leave_alone_what_exists()
            loaded.start()
            return loaded

        # In a thread, for Ray asks meanwhile how it goes.
        self._engine = await asyncio.to_thread(load)
        self._end.callback(self._engine.close)
        self._about = About(
            self._engine.model_name, server.max_body_bytes or useful_body_bytes(self._engine.max_model_len)
        )
        application = create_app(
            self._engine,
            max_streams=server.max_streams,
            max_body_bytes=self._about.max_body_bytes,
            access=access,
            folders=folders,
            resolve_adapters=server.resolve_adapters,
            tracing=tracing,
        )
        self._threads = WsgiThreads(application, server.max_streams + SPARE_THREADS)
        self._end.callback(self._threads.close)
        await self.catch_up()
        looking = asyncio.create_task(self._look())
        self._end.callback(looking.cancel)

    async def about(self) -> About:
        return self._about

    async def answer(self, sent: Sent) -> AsyncIterator[Head | bytes | None]:
        """None as soon as the request is taken; then as ``WsgiThreads.answer``."""
        yield None
        async with contextlib.aclosing(self._threads.answer(sent)) as pieces:
            async for piece in pieces:
                yield piece

    async def whole(self, sent: Sent) -> tuple[str, Answer]:
        """This replica's name, and its answer to a request that is for all."""
        return self._name, await self._threads.whole(sent)

    async def change(self, sent: Sent) -> tuple[str, Answer]:
        """This replica's name, and its answer to a request that changes adapters, as the first that is asked."""
        await self.catch_up()
        async with self._lock:
            return self._name, await self._threads.whole(sent)

    async def catch_up(self) -> list[Answer]:
        """Makes the changes that were made elsewhere; returns the answers to those that are refused here."""
        async with self._lock:
            refused = []
            for change in await self._changes.since.remote(_last(self._known)):
                if change.first != self._name:
                    answer = await self._threads.whole(change.sent)
                    if answer.head.status != 200:
                        _log.warning("change %d of the adapters is refused here: %r", change.number, answer.body[:500])
                        refused.append(answer)
                self._known = with_change(self._known, change)
            return refused

    async def known(self) -> list[Change]:
        """The changes that a new replica must make, as far as this one knows."""
        return self._known

    async def check_health(self) -> None:
        """Raises if the engine cannot go on; Ray then starts another replica in place of this one."""
        if not self._engine.is_running:
            raise RuntimeError("the engine is not running")

    def __del__(self) -> None:
        self._end.close()  # Ray calls this when the requests that ran have ended

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            try:
                await self.catch_up()
            except Exception as failure:  # it is being started again, and remembers what replicas know
                _log.info("changes of the adapters cannot be asked for now: %s", failure)


class Changes:
    """Makes changes of the adapters one after the other, on all replicas, and knows them for those that start later."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
        self._lock = asyncio.Lock()
        self._log: list[Change] = []
        # If this process was started again, replicas know what was changed before.
        with contextlib.suppress(Exception):
            known = await self._replicas().broadcast("known").results_async(timeout_s=5, return_exceptions=True)
            self._log = max((log for log in known if isinstance(log, list)), key=_last, default=[])

    async def since(self, number: int) -> list[Change]:
        """The changes after that of this number."""
        return [change for change in self._log if change.number > number]

    async def make(self, sent: Sent) -> Answer:
        """One replica's refusal; else the change is made on all, and if any refuses it then, that is said."""
        async with self._lock:
            first, answer = await asyncio.wait_for(self._replicas().change.remote(sent), CHANGE_SECONDS)
            if answer.head.status != 200:
                return answer
            self._log = with_change(self._log, Change(_last(self._log) + 1, sent, first))
            told = (
                await self._replicas()
                .broadcast("catch_up")
                .results_async(timeout_s=CHANGE_SECONDS, return_exceptions=True)
            )
            refused = [refusals[-1] for refusals in told if isinstance(refusals, list) and refusals]
            return partly_refused(refused, len(told)) if refused else answer

    def _replicas(self) -> DeploymentHandle:
        return serve.get_deployment_handle(Replica.__name__, serve.get_replica_context().app_name)


def _last(log: list[Change]) -> int:
    """The number of the last change; 0 if there is none."""
    return log[-1].number if log else 0


class Ingress:
    """Takes requests, and hands each to the replicas that should answer it."""

    def __init__(self, replicas: DeploymentHandle, changes: DeploymentHandle):
        self._replicas = replicas
        self._changes = changes
        self._about: About | None = None

    async def __call__(self, request: Request) -> Response:
        try:
            about = await self._know()
            sent = await _received(request, about.max_body_bytes)
            if sent.method == "POST" and sent.path in ADMIN_PATHS:
                return _response(await self._changes.make.remote(sent))
            if sent.method == "GET" and sent.path == "/metrics":
                return _response(await self._metrics(sent))
            return await self._handed_on(sent, about.adapter_of(sent))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except (*_BROKEN, TimeoutError) as failure:
            _log.warning("no replica answers: %s", failure)
            return _unavailable("no replica could answer; try again later")

    async def _know(self) -> About:
        if self._about is None:
            about: About = await asyncio.wait_for(self._replicas.about.remote(), ACCEPT_SECONDS)
            self._about = about
        return self._about

    async def _metrics(self, sent: Sent) -> Answer:
        """Those of all replicas; a refusal, if they refuse to tell."""
        told = await self._replicas.broadcast("whole", sent).results_async(
            timeout_s=ACCEPT_SECONDS, return_exceptions=True
        )
        answers: dict[str, Answer] = dict(one for one in told if isinstance(one, tuple))
        if not answers:
            raise TimeoutError("no replica told its metrics")
        for answer in answers.values():
            if answer.head.status != 200:
                return answer
        head = next(iter(answers.values())).head
        headers = tuple(header for header in head.headers if header[0].lower() != "content-length")
        return Answer(Head(200, headers), merged({name: answer.body for name, answer in answers.items()}))

    async def _handed_on(self, sent: Sent, adapter: str) -> Response:
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        for attempt in range(_ATTEMPTS):
            pieces = handle.answer.remote(sent)
            try:
                await asyncio.wait_for(anext(pieces), ACCEPT_SECONDS)
                head = await anext(pieces)
                break
            except _BROKEN:
                if attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                pieces.cancel()
                raise
        return _streaming(head, _body(pieces, sent, head))


async def _body(pieces: DeploymentResponseGenerator[Any], sent: Sent, head: Head) -> AsyncIterator[bytes]:
    """The pieces, and if the replica ends before them, what a stream says of a failure."""
    events = 0
    try:
        async for piece in pieces:
            events += piece.count(b"data: ")
            yield piece
    except _BROKEN:
        if not _is_stream(head):
            raise  # whose length was told; the connection breaks
        yield lost_event(sent.path, events)
    finally:
        pieces.cancel()  # which does nothing where all came


async def _received(request: Request, most_bytes: int) -> Sent:
    """The request, with one byte more of its body than may be read if there are more."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            break
    return Sent(
        request.method,
        request.scope.get("raw_path", request.scope["path"].encode()).decode("latin-1"),
        request.scope["query_string"].decode("latin-1"),
        tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw),
        bytes(body[: most_bytes + 1]),
    )


def _unavailable(message: str) -> Response:
    return Response(error_body(message, 503), 503, {"Retry-After": "1"}, "application/json")


def _response(answer: Answer) -> Response:
    return _with_headers(Response(answer.body, answer.head.status), answer.head)


def _streaming(head: Head, body: AsyncIterator[bytes]) -> Response:
    return _with_headers(StreamingResponse(body, head.status), head)


def _with_headers(response: Response, head: Head) -> Response:
    """The same answer, with the headers that the replica gave it; Ray itself adds the request's id."""
    response.raw_headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in head.headers
        if name.lower() != "x-request-id"
    ]
    return response


def _is_stream(head: Head) -> bool:
    return dict(head.headers).get("Content-Type", "").startswith("text/event-stream")


def app(args: dict[str, Any]) -> serve.Application:
    """Builds the application; Ray Serve's commands call it.

    Args:
      args: fields of ``configs/server.yaml``, and a section ``fleet`` with those of ``FleetConfig``. Keys may be in the
        environment, as for ``serve.py``.

    Raises:
      InvalidRequest: unknown keys or bad values; the message names each by its path.
    """
    # Ray logs the arguments, and whoever sees its dashboard reads them: no place for keys.
    engine, server, fleet = read_settings(args, os.environ)
    changes = serve.deployment(Changes).options(ray_actor_options={"num_cpus": 0}).bind()
    replicas = (
        serve.deployment(Replica)
        .options(
            **_size(fleet),
            # A replica refuses what is too much for it in its own words; none of it waits in Ray.
            max_ongoing_requests=server.max_streams + SPARE_THREADS,
            ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": _gpus(engine, fleet)},
            request_router_config=RequestRouterConfig(
                request_router_class=f"{AdapterRouter.__module__}.{AdapterRouter.__name__}",
                request_router_kwargs={"rule": fleet.routing, "spill_at": fleet.spill_at},
            ),
            health_check_period_s=_HEALTH_SECONDS,
            graceful_shutdown_timeout_s=server.grace_s,
        )
        .bind(engine, server, changes)
    )
    return (
        serve.deployment(Ingress)
        .options(max_ongoing_requests=_INGRESS_REQUESTS, ray_actor_options={"num_cpus": 0})
        .bind(replicas, changes)
    )


def _size(fleet: FleetConfig) -> dict[str, Any]:
    if fleet.max_replicas is None:
        return {"num_replicas": fleet.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=fleet.replicas,
            max_replicas=fleet.max_replicas,
            target_ongoing_requests=fleet.target_ongoing_requests,
        )
    }


def _gpus(engine: EngineConfig, fleet: FleetConfig) -> int:
    if fleet.gpus is not None:
        return fleet.gpus
    return engine.mesh.tp if ray.cluster_resources().get("GPU") else 0
