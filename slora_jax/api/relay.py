"""Streams' bytes on their way to clients through a process of its own.

Each write to a socket gives Python's interpreter lock away and waits to have it back, behind the engine's loop. With
hundreds of streams a step these waits are longer than the step, so that streams fall behind, and each hand-over holds
the loop up. Here the server writes once for all streams of a step, to ``relay_process``, which writes to each client.
"""

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from slora_jax.api import relay_process
from slora_jax.api.relay_process import CLOSE, CLOSED, DATA, EMPTY, FULL, GONE, OPEN, ORDER, STATUS

_log = logging.getLogger(__name__)


class Relay:
    """The connection to the process, which is started with it and ends with it.

    For one thread, which sends; ``on_news`` is called from another.
    """

    def __init__(self, on_news: Callable[[], None]):
        """
        Args:
          on_news: called when the state of a stream has changed; it must return at once.

        Raises:
          OSError: the process cannot be started.
        """
        if not hasattr(socket, "send_fds"):
            raise OSError("this system has no way to hand a socket to another process")
        self._on_news = on_news
        self._streams: dict[int, RelayedStream] = {}
        self._last = 0
        self._orders: list[bytes] = []
        self.is_lost = False
        self._server, process = _started()
        threading.Thread(
            target=_listen, args=(weakref.ref(self), self._server), name="slora-jax-relay", daemon=True
        ).start()
        self.close = weakref.finalize(self, _end, self._server, process)

    def open(self, descriptor: int) -> "RelayedStream":
        """Begins a stream to the socket of this descriptor, of which the process gets one of its own.

        Nobody else may write to the socket until the stream has ended.

        Raises:
          OSError: there is no such socket any more, or the process has ended.
        """
        self._last = (self._last + 1) % 2**32
        stream = self._streams[self._last] = RelayedStream(self, self._last)
        socket.send_fds(self._server, [ORDER.pack(self._last, OPEN, 0)], [descriptor])
        return stream

    def flush(self) -> None:
        """Hands over what all streams were given since the last call; waits while the process is behind."""
        orders, self._orders = self._orders, []
        if orders and not self.is_lost:
            with contextlib.suppress(OSError):  # the listening thread learns of it, too
                self._server.sendall(b"".join(orders))

    def order(self, number: int, order: int, data: bytes = b"") -> None:
        """For streams: says something with the next ``flush``."""
        self._orders += ORDER.pack(number, order, len(data)), data

    def heard(self, number: int, status: int) -> None:
        """For the listening thread."""
        stream = self._streams.get(number)
        if stream is None:
            return
        if status in (FULL, EMPTY):
            stream.is_full = status == FULL
        elif status == GONE:
            stream.is_gone = True
        elif status == CLOSED:
            del self._streams[number]
            stream.ended()
        self._on_news()

    def lost(self) -> None:
        """For the listening thread: the process has ended."""
        self.is_lost = True
        if self.close.alive:
            _log.error("the process that writes to clients has ended; %d streams end with it", len(self._streams))
        for stream in list(self._streams.values()):
            stream.is_gone, stream.is_full = True, False  # nothing waits any more: who would send learns of the end
            stream.ended()
        self._streams.clear()
        self._on_news()


class RelayedStream:
    """One client's stream.

    Attributes:
      is_full: the client has not taken yet what was sent.
      is_gone: nothing that is sent gets to the client any more.
    """

    def __init__(self, relay: Relay, number: int):
        self._relay = relay
        self._number = number
        self._on_end: Callable[[], None] = lambda: None
        self.is_full = False
        self.is_gone = False

    def send(self, data: bytes) -> None:
        """Sends bytes with the relay's next ``flush``."""
        self._relay.order(self._number, DATA, data)

    def end(self, on_end: Callable[[], None]) -> None:
        """Has ``on_end`` called when the socket has taken all, or cannot: then others may write to it again.

        In the second case ``is_gone`` is set before.
        """
        self._on_end = on_end
        self._relay.order(self._number, CLOSE)
        if self._relay.is_lost:
            self.is_gone = True
            self.ended()

    def ended(self) -> None:
        """For the relay."""
        on_end, self._on_end = self._on_end, lambda: None  # it may know of this stream: or each kept the other alive
        on_end()


def _started() -> tuple[socket.socket, subprocess.Popen]:
    """A new process, and the connection to it."""
    server, theirs = socket.socketpair()
    with contextlib.ExitStack() as on_failure, theirs:
        on_failure.callback(server.close)
        # Not in the terminal's group: Ctrl-C is for the server, which then lets its streams end.
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(relay_process.__file__)), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        on_failure.pop_all()
    return server, process


def _listen(relay: weakref.ref[Relay], server: socket.socket) -> None:
    rest = b""
    while True:
        try:
            data = server.recv(1 << 16)
        except OSError:
            data = b""
        there = relay()
        if there is None:
            return
        if not data:
            there.lost()
            return
        rest += data
        whole = len(rest) // STATUS.size * STATUS.size
        for number, status in STATUS.iter_unpack(rest[:whole]):
            there.heard(number, status)
        rest = rest[whole:]
        del there


def _end(server: socket.socket, process: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)
    server.close()
    process.wait()
