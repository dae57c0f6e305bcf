"""The production WSGI server: waitress, set up to hold hundreds of open streams and to end cleanly.

Waitress reads requests in one thread and answers each in a thread of its own, so every stream holds one
thread; ``max_streams`` of them may be taken, and ``SPARE_THREADS`` more answer ``/health``, ``/v1/models``
and refusals meanwhile.
"""

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pydantic
import waitress.channel
import waitress.server
import waitress.task
import waitress.wasyncore

from slora_jax.api.app import error_body
from slora_jax.config import Section, Text, validated

with contextlib.suppress(ImportError):  # not on Windows
    import resource

SPARE_THREADS = 16
GRACE_SECONDS = 30.0
"""How long after the first signal open streams may take to hear that the server stops."""

_MAX_BODY_BYTES = 64 * 2**20
_DEAD_CLIENT_SECONDS = 60

_log = logging.getLogger(__name__)


class ServerConfig(Section):
    """What the HTTP server is told; ``server:`` of a config file.

    Attributes:
      host, port: where to listen; port 0 takes a free one.
      max_streams: most requests answered at a time, streamed or not; one more gets 429.
      max_body_bytes: larger request bodies get 413.
      allow_adapter_loading: let clients register adapters from this machine's folders by path.
      log_level: of this program's log on stderr.
    """

    host: Text = "127.0.0.1"
    port: int = pydantic.Field(8000, ge=0, le=65535)
    max_streams: int = pydantic.Field(512, ge=1, le=10_000)
    max_body_bytes: int = pydantic.Field(32 * 2**20, ge=1024, le=_MAX_BODY_BYTES)
    allow_adapter_loading: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


def build_server_config(fields: Mapping[str, Any]) -> ServerConfig:
    """Validates plain fields.

    Raises:
      InvalidRequest: an unknown key or a bad value; the message lists each.
    """
    return validated(ServerConfig, fields, section="server")


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
      on_stop: called once, in a thread of its own, when the server stops accepting: it must make running
        requests end (``engine.close``).
    """

    def __init__(
        self,
        app,
        sock: socket.socket,
        *,
        max_streams: int = 512,
        on_stop: Callable[[], None] | None = None,
        grace: float = GRACE_SECONDS,
    ):
        connections = _allow_open_files(2 * max_streams + 256)
        if connections < max_streams:
            _log.warning("this process may open %d connections only, fewer than max_streams", connections)
        self.host, self.port = sock.getsockname()[:2]
        self._on_stop = on_stop or (lambda: None)
        self._grace = grace
        self._stopping = False
        self._map: dict[int, waitress.wasyncore.dispatcher] = {}
        self._waitress = waitress.server.create_server(
            app,
            map=self._map,
            sockets=[sock],
            threads=max_streams + SPARE_THREADS,
            connection_limit=connections,
            backlog=_backlog(max_streams),
            asyncore_use_poll=True,  # select() ends at descriptor 1024
            channel_request_lookahead=1,  # keeps reading while a request runs, and so sees the client go
            max_request_body_size=_MAX_BODY_BYTES,
            log_socket_errors=False,
            clear_untrusted_proxy_headers=True,
            ident="slora-jax",
        )
        self._waitress.channel_class = _Channel
        self._waitress.adj.socket_options = list(_socket_options())
        # Every stream is answered at once or refused by the application; a passing queue is no news.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Begins the clean end; returns at once. From any thread or a signal handler."""
        if not self._stopping:
            self._stopping = True
            self._waitress.pull_trigger()

    def run(self) -> None:
        """Serves until ``stop``; then lets open streams hear of it, and returns when all are told."""
        try:
            while not self._stopping:
                self._turn(1.0)
            self._drain()
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
        waitress.wasyncore.loop(timeout=timeout, use_poll=True, map=self._map, count=1)

    def _drain(self) -> None:
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
    sock: socket.socket | None = None,
    on_stop: Callable[[], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves ``app`` until Ctrl-C or SIGTERM, then ends cleanly; a second Ctrl-C does not wait.

    Args:
      sock: an already listening socket (``listen``); None takes ``host`` and ``port`` now.
      on_stop: see ``Server``.
      on_ready: called with the URL before the first request is read.
    """
    server = Server(app, sock or listen(host, port, max_streams), max_streams=max_streams, on_stop=on_stop)
    with contextlib.closing(server), _stopped_by_signals(server):
        if on_ready is not None:
            on_ready(server.url)
        server.run()


_SAME_SIGNAL_SECONDS = 1.0
"""One Ctrl-C can arrive twice: from the terminal, and from a launcher such as uv that passes it on."""


@contextlib.contextmanager
def _stopped_by_signals(server: Server) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    first: float | None = None

    def handle(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
            server.stop()
        elif time.monotonic() - first > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

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
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(waitress.channel.HTTPChannel):
    error_task_class = _ErrorTask


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
