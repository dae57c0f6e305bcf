"""A WSGI application called from an event loop: every request has a thread, and its answer comes in pieces."""

import asyncio
import contextlib
import io
import sys
import threading
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Sent(NamedTuple):
    """A request as it came.

    Attributes:
      path, query: as they were written in the request, with their escapes.
      headers: names in lower case.
    """

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Head(NamedTuple):
    """What comes ahead of an answer's body."""

    status: int
    headers: tuple[tuple[str, str], ...]


class Answer(NamedTuple):
    """A whole answer."""

    head: Head
    body: bytes


class WsgiThreads:
    """Runs a WSGI application in threads of its own.

    Args:
      app: the application. It finds in its environment what waitress would put there for a client that hung up.
      threads: most requests that it answers at a time; more wait.
    """

    def __init__(self, app: Callable[..., Any], threads: int):
        self._app = app
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="slora-jax-request")

    async def answer(self, sent: Sent) -> AsyncGenerator[Head | bytes]:
        """The head of the answer, and then its body in pieces as they come.

        If the caller stops early or is cancelled, the application is told that the client is gone.
        """
        loop, gone = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[Head | bytes | BaseException | None] = asyncio.Queue()

        def put(piece: Head | bytes | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run() -> None:
            try:
                for piece in self._pieces(sent, gone.is_set):
                    put(piece)
            except Exception as failure:
                put(failure)
            else:
                put(None)

        self._threads.submit(run)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            gone.set()

    async def whole(self, sent: Sent) -> Answer:
        """The whole answer."""
        head, body = Head(500, ()), []
        async with contextlib.aclosing(self.answer(sent)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Head):
                    head = piece
                else:
                    body.append(piece)
        return Answer(head, b"".join(body))

    def close(self) -> None:
        """Takes no more requests; those that run go on."""
        self._threads.shutdown(wait=False)

    def _pieces(self, sent: Sent, gone: Callable[[], bool]) -> Iterator[Head | bytes]:
        heads: list[Head] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            heads[:] = [Head(int(status.split()[0]), tuple(headers))]

        answer = self._app(_environment(sent, gone), start_response)
        try:
            # The head goes ahead, as a stream's first piece may take long. An application may also say it with that.
            told = bool(heads)
            if told:
                yield heads[0]
            for piece in answer:
                if not told:
                    told = True
                    yield heads[0]
                if gone():
                    return
                if piece:
                    yield piece
            if not told:
                yield heads[0]
        finally:
            if hasattr(answer, "close"):
                answer.close()


def _environment(sent: Sent, gone: Callable[[], bool]) -> dict[str, Any]:
    """As PEP 3333 has it."""
    headers: dict[str, str] = {}
    for name, value in sent.headers:
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    # A server reads the body before it calls the application, which then need not know how it was sent.
    headers.pop("transfer-encoding", None)
    host, _, port = headers.get("host", "").rpartition(":")
    environment: dict[str, Any] = {
        "REQUEST_METHOD": sent.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": urllib.parse.unquote_to_bytes(sent.path).decode("latin-1"),
        "QUERY_STRING": sent.query,
        "CONTENT_LENGTH": str(len(sent.body)),
        "SERVER_NAME": host or "localhost",
        "SERVER_PORT": port if port.isdecimal() else "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(sent.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "waitress.client_disconnected": gone,
    }
    if "content-type" in headers:
        environment["CONTENT_TYPE"] = headers.pop("content-type")
    headers.pop("content-length", None)
    return environment | {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
