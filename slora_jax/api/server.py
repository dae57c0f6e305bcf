"""The production WSGI server: waitress, set up to hold hundreds of open streams and to end cleanly.

Waitress reads requests in one thread and answers each in a thread of its own, so every stream holds one
thread; ``max_streams`` of them may be taken, and ``SPARE_THREADS`` more answer ``/health``, ``/v1/models``
and refusals meanwhile. A stream's thread sleeps while one thread sends the events of all: see ``streaming``.

Connections are bounded too. One that has no request running, be it kept alive, half-sent or not read by its
client, is closed when its place is needed, the one that was answered (or accepted) longest ago first.
"""

import contextlib
import heapq
import logging
import math
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Literal

import pydantic
import waitress.channel
import waitress.server
import waitress.task
import waitress.wasyncore

from slora_jax.api.access import Access, is_loopback
from slora_jax.api.app import error_body
from slora_jax.api.drain import Drain
from slora_jax.api.folders import AdapterFolders
from slora_jax.api.parsing import RequestParser
from slora_jax.api.streaming import WIRE
from slora_jax.config import Secret, Section, Text

with contextlib.suppress(ImportError):  # not on Windows
    import resource

SPARE_THREADS = 16
GRACE_SECONDS = 30.0
"""How long after the first signal open streams may take to hear that the server stops."""

MOST_BODY_BYTES = 64 * 2**20
"""Larger bodies are read by no server, whatever it is told."""

_MOST_HEADER_BYTES = 64 * 2**10
_DEAD_CLIENT_SECONDS = 60
_LINGER_SECONDS = 2.0
"""How long a client may go on sending a body that was refused, before it must have read why."""

_MOST_ANSWER_BYTES = 2**30
"""A larger answer is kept in a temporary file until its client has read it."""

_ACCEPTS_PER_TURN = 64
"""Clients accepted between two looks at the other connections: one alone would make a crowd wait for seconds,
because every look costs time in proportion to the connections."""

_log = logging.getLogger(__name__)


class ServerConfig(Section):
    """What the HTTP server is told; ``server:`` of a config file.

    Attributes:
      host, port: where to listen; port 0 takes a free one.
      max_streams: most requests answered at a time, streamed or not; one more gets 429.
      max_body_bytes: larger request bodies get 413, unread; None for what the model's context has use for
        (``bounds.useful_body_bytes``).
      allow_adapter_loading: let clients register adapters from this machine's folders by path, without an admin key;
        only where none but this machine's own programs reach the server, and there are no API keys.
      adapter_roots: folders within which the adapters must be that are registered so; with none, anywhere on this
        machine if only its own programs reach the server, and else nowhere.
      adapter_hubs: organisations of the Hugging Face hub whose adapters may be registered so.
      resolve_adapters: register an adapter when a request asks for it whose name is that of a folder within an
        ``adapter_root``, or of a repository of an ``adapter_hub``.
      api_keys, api_keys_file: what requests must bring; see ``access``.
      admin_key: what those must bring that change what is served.
      allowed_hosts, allowed_origins: see ``access.Access``.
      grace_s: seconds that running requests may take to end after SIGTERM.
      log_level: of this program's log on stderr.
      log_json: write the log as one JSON object a line.
      otlp_traces_endpoint: URL of the OpenTelemetry collector that gets a span of each request; None for none.
    """

    host: Text = "127.0.0.1"
    port: int = pydantic.Field(8000, ge=0, le=65535)
    max_streams: int = pydantic.Field(512, ge=1, le=10_000)
    max_body_bytes: int | None = pydantic.Field(None, ge=1024, le=MOST_BODY_BYTES)
    allow_adapter_loading: bool = False
    adapter_roots: tuple[Text, ...] = ()
    adapter_hubs: tuple[Text, ...] = ()
    resolve_adapters: bool = False
    api_keys: tuple[Secret, ...] = ()
    api_keys_file: Text | None = None
    admin_key: Secret | None = None
    allowed_hosts: tuple[Text, ...] = ()
    allowed_origins: tuple[Text, ...] = ()
    grace_s: float = pydantic.Field(30.0, ge=0, le=86_400, allow_inf_nan=False)
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    log_json: bool = False
    otlp_traces_endpoint: Text | None = None

    @pydantic.model_validator(mode="after")
    def _adapters_are_somewhere(self):
        if self.resolve_adapters and not (self.adapter_roots or self.adapter_hubs):
            raise ValueError("resolve_adapters needs an adapter_root or an adapter_hub in which they are looked for")
        return self

    @pydantic.model_validator(mode="after")
    def _strangers_do_not_administer(self):
        if self.allow_adapter_loading and self.admin_key is None:
            if self.api_keys or self.api_keys_file is not None:
                raise ValueError(
                    "allow_adapter_loading beside API keys needs an admin_key: their holders are no admins"
                )
            if not is_loopback(self.host):
                raise ValueError(
                    f"allow_adapter_loading needs an admin_key on the address {self.host}, which other machines reach"
                )
        return self

    @pydantic.field_validator("allowed_origins")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+/?", origin.lower()):
                raise ValueError(f"must be origins such as https://example.org, or *; {origin} is none")
        return origins


def rules(config: ServerConfig) -> tuple[Access, AdapterFolders]:
    """Who may do what, and which adapters may be registered on request.

    Raises:
      InvalidRequest: the keys file cannot be used.
    """
    access = Access(
        keys=[key.get_secret_value() for key in config.api_keys],
        keys_file=config.api_keys_file,
        admin_key=None if config.admin_key is None else config.admin_key.get_secret_value(),
        allow_adapter_loading=config.allow_adapter_loading,
        host=config.host,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
    )
    # Whoever runs programs on this machine sees its folders anyway.
    roots = config.adapter_roots or (None if is_loopback(config.host) else ())
    return access, AdapterFolders(roots, config.adapter_hubs)


def listen(host: str, port: int, max_streams: int = 512) -> socket.socket:
    """Takes the port, so that a taken one fails before anything slow; connections wait until the server runs.

    Raises:
      OSError: the address is in use, not allowed, or not this machine's.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = sorted(found, key=lambda info: info[0] != socket.AF_INET)[0]
    return socket.create_server(address[:2], family=family, backlog=_backlog(max_streams))


class Server:
    """One listening socket and the application behind it.

    Args:
      sock: from ``listen``; the server closes it.
      max_connections: most connections kept, 2 x ``max_streams`` + 256 if None; fewer if the process may not open
        as many files.
      max_body_bytes: a request with a larger body is answered 413 once its headers, or too many bytes, are there.
      on_stop: called once, in a thread of its own, when the server stops accepting: it must make running
        requests end (``engine.close``).
      grace: seconds that they may take to hear of it.
      drain: the application's, for the method of this name.
    """

    def __init__(
        self,
        app,
        sock: socket.socket,
        *,
        max_streams: int = 512,
        max_connections: int | None = None,
        max_body_bytes: int = MOST_BODY_BYTES,
        on_stop: Callable[[], None] | None = None,
        grace: float = GRACE_SECONDS,
        drain: Drain | None = None,
    ):
        self._room = _allow_open_files(max_connections or 2 * max_streams + 256)
        if self._room < max_streams:
            _log.warning("this process may open %d connections only, fewer than max_streams", self._room)
        self._was_full = False
        self.host, self.port = sock.getsockname()[:2]
        self._on_stop = on_stop or (lambda: None)
        self._grace = grace
        self._stopping = False
        self._drain_state = drain or Drain()
        self._drain_until = math.inf
        self._map: dict[int, waitress.wasyncore.dispatcher] = {}
        self._waitress = _Listener(
            app,
            map=self._map,
            _sock=sock,
            bind_socket=False,
            sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
            threads=max_streams + SPARE_THREADS,
            # Reached only if every connection has a request running: then nobody else is accepted.
            connection_limit=self._room + _ACCEPTS_PER_TURN,
            backlog=_backlog(max_streams),
            asyncore_use_poll=True,  # select() ends at descriptor 1024
            channel_request_lookahead=1,  # keeps reading while a request runs, and so sees the client go
            max_request_header_size=_MOST_HEADER_BYTES,
            max_request_body_size=max_body_bytes + 1,  # the first size that is refused
            # Never to a temporary file: it would cost a descriptor, and the accepting thread would wait for a disk.
            inbuf_overflow=max_body_bytes + 1,
            outbuf_overflow=_MOST_ANSWER_BYTES,
            log_socket_errors=False,
            clear_untrusted_proxy_headers=True,
            ident="slora-jax",
        )
        self._waitress.adj.socket_options = list(_socket_options())
        # Every stream is answered at once or refused by the application; a passing queue is no news.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def drain(self, grace: float) -> None:
        """Stops when the running requests have ended, or after ``grace`` seconds; returns at once, as ``stop``.

        Until then probes and clients are answered, but no request that would run.
        """
        if not self._drain_state.has_begun:
            self._drain_until = time.monotonic() + grace
            self._drain_state.begin()
            self._waitress.pull_trigger()

    def stop(self) -> None:
        """Begins the clean end; returns at once. From any thread or a signal handler."""
        if not self._stopping:
            self._stopping = True
            self._waitress.pull_trigger()

    def run(self) -> None:
        """Serves until ``stop``; then lets open streams hear of it, and returns when all are told."""
        try:
            while not self._stopping:
                if self._drain_state.has_begun and self._is_drained():
                    self._stopping = True
                else:
                    self._turn(0.05 if self._drain_state.has_begun else 1.0)
            self._tell()
        except KeyboardInterrupt:
            _log.warning("interrupted while stopping; open streams are dropped")
        finally:
            self.close()

    def close(self) -> None:
        """Closes every socket, told or not; ``run`` ends with it."""
        self._stopping = True
        dispatcher = self._waitress.task_dispatcher
        dispatcher.shutdown(timeout=5)
        if not dispatcher.threads:  # one still running could write to a descriptor that was given away
            waitress.wasyncore.dispatcher.close(self._waitress)
            waitress.wasyncore.close_all(self._map, ignore_all=True)

    def _turn(self, timeout: float) -> None:
        self._make_room()
        waitress.wasyncore.loop(timeout=timeout, use_poll=True, map=self._map, count=1)

    def _make_room(self) -> None:
        """Closes idle connections beyond the room for them; between two turns, when no event waits for any."""
        excess = len(self._waitress.active_channels) - self._room
        if excess <= 0:
            return
        if not self._was_full:
            self._was_full = True
            _log.warning("%d connections are open; idle ones are closed from now on, oldest first", self._room)
        idle = [channel for channel in self._waitress.active_channels.values() if not channel.requests]
        for channel in heapq.nsmallest(excess, idle, key=lambda channel: channel.used):
            channel.handle_close()

    def _is_drained(self) -> bool:
        late = time.monotonic() > self._drain_until
        if late:
            _log.warning("some requests did not end within the grace period; they are told that the server stops")
        return late or self._drain_state.is_done

    def _tell(self) -> None:
        """Stops accepting, has running requests end, and waits until all answers are sent."""
        waitress.wasyncore.dispatcher.close(self._waitress)  # the listening socket alone
        stopper = threading.Thread(target=self._on_stop, name="slora-jax-stop", daemon=True)
        stopper.start()
        deadline = time.monotonic() + self._grace
        while stopper.is_alive() or self._busy():
            if time.monotonic() > deadline:
                _log.warning("open streams did not end within %g seconds; they are dropped", self._grace)
                break
            self._turn(0.05)

    def _busy(self) -> bool:
        """Whether any request is running or any answer is not yet sent."""
        return any(c.requests or c.total_outbufs_len for c in list(self._waitress.active_channels.values()))


def run_server(
    app,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    max_streams: int = 512,
    max_body_bytes: int = MOST_BODY_BYTES,
    sock: socket.socket | None = None,
    on_stop: Callable[[], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
    drain: Drain | None = None,
    grace_s: float = 0.0,
) -> None:
    """Serves ``app`` until Ctrl-C or SIGTERM, then ends cleanly; a second Ctrl-C does not wait.

    SIGTERM lets running requests end for ``grace_s`` seconds first, and a second signal cuts that short.

    Args:
      sock: an already listening socket (``listen``); None takes ``host`` and ``port`` now.
      max_body_bytes, on_stop: see ``Server``.
      on_ready: called with the URL before the first request is read.
      drain: the application's.
    """
    server = Server(
        app,
        sock or listen(host, port, max_streams),
        max_streams=max_streams,
        max_body_bytes=max_body_bytes,
        on_stop=on_stop,
        drain=drain,
    )
    with contextlib.closing(server), _stopped_by_signals(server, grace_s):
        if on_ready is not None:
            on_ready(server.url)
        server.run()


_SAME_SIGNAL_SECONDS = 1.0
"""One Ctrl-C can arrive twice: from the terminal, and from a launcher such as uv that passes it on."""


@contextlib.contextmanager
def _stopped_by_signals(server: Server, grace_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    last: tuple[int, float] | None = None
    stopped = False

    def handle(number, frame):
        nonlocal last, stopped
        now = time.monotonic()
        if last is not None and (stopped or number == last[0]) and now - last[1] <= _SAME_SIGNAL_SECONDS:
            return
        if stopped:
            raise KeyboardInterrupt
        if last is None and number == signal.SIGTERM and grace_s > 0:
            server.drain(grace_s)
        else:
            stopped = True
            server.stop()
        last = number, now

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ErrorTask(waitress.task.ErrorTask):
    """Waitress's own refusals (malformed HTTP, a body far too large), in OpenAI's shape."""

    def execute(self):
        error = self.request.error
        body = error_body(f"{error.reason}: {error.body}", error.code)
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.response_headers.append(("X-Request-Id", uuid.uuid4().hex))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        self.channel.will_linger()


class _Task(waitress.task.WSGITask):
    """One request, whose answer may also be sent from another thread while its own waits: see ``streaming.Wire``."""

    def get_environment(self):
        environ = super().get_environment()
        environ[WIRE] = self
        return environ

    @property
    def is_full(self) -> bool:
        """Whether the client has not taken yet what was sent."""
        return self.channel.total_outbufs_len > 0

    def send(self, data: bytes) -> None:
        """Sends a part of the body, without waiting if the wire is not full.

        Raises:
          ClientDisconnected: nobody reads it.
        """
        if not self.wrote_header:
            self.write(b"")
        self.channel.send_now(self.framed(data))

    def framed(self, data: bytes) -> bytes:
        """The bytes that ``send`` writes for these, behind the header."""
        return b"%X\r\n%b\r\n" % (len(data), data) if self.chunked_response else data

    def fileno(self) -> int:
        """The descriptor of the client's socket.

        Raises:
          ClientDisconnected: it is closed.
        """
        if not self.channel.connected:
            raise self.gone()
        return self.channel.socket.fileno()

    def gone(self) -> Exception:
        """What says that nobody reads the answer any more."""
        return waitress.channel.ClientDisconnected()


class _Channel(waitress.channel.HTTPChannel):
    """One connection.

    Attributes:
      used: when something was last written for its client, or when it was accepted; monotonic seconds. What the
        client sends does not count: one that sends a byte now and then is as idle as one that sends none.
    """

    task_class = _Task
    error_task_class = _ErrorTask
    parser_class = RequestParser

    def __init__(self, *args, **kwargs):
        self.used = time.monotonic()
        self._lingers = False
        self._lingers_until = math.inf
        super().__init__(*args, **kwargs)

    def will_linger(self) -> None:
        """Has the end wait for the client, which may still be sending what is not read.

        A connection that is closed with bytes unread is reset, and a client that is told so loses the answer that it
        has not read yet.
        """
        self._lingers = True

    def handle_close(self):
        if self._lingers and self.connected:
            self._lingers, self.will_close = False, False
            self._lingers_until = time.monotonic() + _LINGER_SECONDS
            with contextlib.suppress(OSError):  # the client is gone
                self.socket.shutdown(socket.SHUT_WR)
                return
        super().handle_close()

    def readable(self):
        if self._lingers_until == math.inf:
            return super().readable()
        if time.monotonic() > self._lingers_until:
            self.will_close = True
        return not self.will_close

    def handle_read(self):
        if self._lingers_until == math.inf:
            super().handle_read()
        else:
            try:
                self.recv(self.adj.recv_bytes)  # which closes when the client has
            except OSError:
                self.handle_close()

    def write_soon(self, data):
        self.used = time.monotonic()
        return super().write_soon(data)

    def send_now(self, data: bytes) -> None:
        """As ``write_soon``, but bytes that the kernel takes go there straight away: into no buffer on the way."""
        with self.outbuf_lock:
            if not self.total_outbufs_len and self.connected:
                self.used = time.monotonic()
                with contextlib.suppress(OSError):  # full, or broken: who sends the rest meets it again, and says so
                    data = data[self.socket.send(data) :]
            if data:
                self.write_soon(data)


class _Listener(waitress.server.TcpWSGIServer):
    """The listening socket, which accepts a whole crowd at a time."""

    channel_class = _Channel

    def handle_accept(self):
        for _ in range(_ACCEPTS_PER_TURN):
            before = len(self.active_channels)
            super().handle_accept()
            if len(self.active_channels) == before:  # nobody waits any more
                break


def _backlog(max_streams: int) -> int:
    return max(1024, 2 * max_streams)


def _socket_options() -> Iterator[tuple[int, int, int]]:
    """Small events go out at once, and the kernel gives up a client that vanished or reads nothing."""
    yield socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    yield socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
    for name, value in {
        "TCP_KEEPIDLE": _DEAD_CLIENT_SECONDS,
        "TCP_KEEPINTVL": 15,
        "TCP_USER_TIMEOUT": _DEAD_CLIENT_SECONDS * 1000,
    }.items():
        if hasattr(socket, name):
            yield socket.IPPROTO_TCP, getattr(socket, name), value


def _allow_open_files(connections: int, others: int = 256) -> int:
    """Raises the soft limit on open files as far as needed and allowed; returns the connections it allows."""
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except NameError:
        return connections
    wanted = connections + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    return max(soft - others, soft // 2)
