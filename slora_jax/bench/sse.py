"""Clients of an OpenAI-compatible server that read streams of server-sent events: many at a time, in one process.

One asyncio protocol a request, on a connection of its own, with the standard library alone. A general HTTP client costs
several times as much for each event, and what this process takes from the machine's cores is taken from the server.
"""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_TIMEOUT_SECONDS = 600
_MOST_HEAD_BYTES = 64 * 2**10


class Ask(NamedTuple):
    """One request to send.

    Attributes:
      path: such as ``/v1/completions``.
      body: JSON.
      at: when it is sent, on ``time.monotonic``; None for as soon as a client is free.
    """

    path: str
    body: bytes
    at: float | None = None


class Heard(NamedTuple):
    """What a client heard of one request. Times are seconds on ``time.monotonic``.

    Attributes:
      due: when it was to be sent.
      sent: when it was.
      events: when each event that brought tokens came.
      tokens: of the answer, as the server counts them; the number of events if it does not say.
      is_counted: whether the server said.
      prompt_tokens: likewise; None if it does not say.
      end: when the answer was complete, or failed.
      error: what went wrong, in words that are the same for the same cause; None if nothing did.
    """

    due: float
    sent: float
    events: list[float]
    tokens: int
    is_counted: bool
    prompt_tokens: int | None
    end: float
    error: str | None


class Run(NamedTuple):
    """What one process did: what it heard, in the order of what it asked, and the CPU seconds that took."""

    heard: list[Heard]
    cpu_seconds: float


def run_clients(url: str, asks: Sequence[Ask], clients: int | None, start: float, api_key: str | None = None) -> Run:
    """Sends all requests and reads their answers to the end.

    Args:
      url: of the server, ``http`` or ``https``, without a path.
      clients: so many requests at a time, each client sending its next one when it has its answer; None to send
        each at its own time, however many run.
      start: when to begin, on ``time.monotonic``.
    """
    return asyncio.run(_run(url, asks, clients, start, api_key))


async def _run(url: str, asks: Sequence[Ask], clients: int | None, start: float, api_key: str | None) -> Run:
    await asyncio.sleep(max(0.0, start - time.monotonic()))
    cpu = time.process_time()
    heard: list[Heard | None] = [None] * len(asks)
    waiting = iter(enumerate(asks))

    async def client() -> None:
        for place, ask in waiting:
            heard[place] = await _ask(url, ask, time.monotonic(), api_key)

    async def one(place: int, ask: Ask) -> None:
        due = start if ask.at is None else ask.at
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        heard[place] = await _ask(url, ask, due, api_key)

    tasks = [one(*numbered) for numbered in waiting] if clients is None else [client() for _ in range(clients)]
    await asyncio.gather(*tasks)
    return Run([one for one in heard if one is not None], time.process_time() - cpu)


async def _ask(url: str, ask: Ask, due: float, api_key: str | None) -> Heard:
    parts = urllib.parse.urlsplit(url)
    is_tls = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if is_tls else 80)
    head = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(ask.body)),
        "Accept": "text/event-stream",
        "Connection": "close",
    }
    if api_key is not None:
        head["Authorization"] = f"Bearer {api_key}"
    lines = [f"POST {ask.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    sent = time.monotonic()
    stream = _Stream("\r\n".join(lines).encode() + ask.body)
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: stream, host, port, ssl=is_tls or None)
            await stream.done
    except TimeoutError:
        stream.fail(f"no end within {_TIMEOUT_SECONDS} s")
    except OSError as error:
        stream.fail(f"no connection: {error.strerror or type(error).__name__}")
    return stream.heard(due, sent)


class _Stream(asyncio.Protocol):
    """One request and the events of its answer.

    Attributes:
      done: is set when the answer has ended, however it did.
    """

    def __init__(self, request: bytes):
        self._request = request
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._status = 0
        self._chunks: ChunkedReader | None = None
        self._events = EventReader()
        self._refusal = b""
        self._times: list[float] = []
        self._usage: dict[str, Any] = {}
        self._end = 0.0
        self._error: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._status:
            data = self._read_head(data)
        if self._chunks is not None:
            data = self._chunks.push(data)
        if not data:
            return
        if self._status != 200:
            self._refusal += data
            return
        for event in self._events.push(data):
            self._take(event, now)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._status > 200:
            self.fail(f"HTTP {self._status}: {_message(self._refusal)}")
        self.fail("broken off: the connection ended ahead of the answer")  # of one that has ended this says nothing

    def fail(self, error: str) -> None:
        """Ends what has not ended yet."""
        if not self._end:
            self._error = error
            self._finish(time.monotonic())

    def heard(self, due: float, sent: float) -> Heard:
        counted = self._usage.get("completion_tokens")
        return Heard(
            due=due,
            sent=sent,
            events=self._times,
            tokens=len(self._times) if counted is None else counted,
            is_counted=counted is not None,
            prompt_tokens=self._usage.get("prompt_tokens"),
            end=self._end,
            error=self._error,
        )

    def _read_head(self, data: bytes) -> bytes:
        """Returns what is behind the head, once that is complete."""
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if not end:
            if len(head) > _MOST_HEAD_BYTES:
                self.fail("the answer is not HTTP")
            return b""
        first, *lines = head.split(b"\r\n")
        words = first.split(None, 2)
        self._status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 1
        if any(line.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for line in lines):
            self._chunks = ChunkedReader()
        return rest

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._finish(now)
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.fail("an event that is not JSON")
            return
        if error := event.get("error"):
            self.fail(f"an error as event: {_shown(error)}")
            return
        if usage := event.get("usage"):
            self._usage = usage
        if any(_has_tokens(choice) for choice in event.get("choices", ())):
            self._times.append(now)

    def _finish(self, now: float) -> None:
        self._end = now
        if not self.done.done():
            self.done.set_result(None)
        if self._transport is not None:
            self._transport.close()


class ChunkedReader:
    """Takes HTTP's chunked encoding off a body that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0  # bytes of the chunk that are still to come, with its line break

    def push(self, data: bytes) -> bytes:
        """Returns what the next bytes hold of the body."""
        data = self._rest + data
        content, at = [], 0
        while at < len(data):
            if not self._left:
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                size = int(data[at:end].partition(b";")[0] or b"0", 16)
                if not size:  # the last chunk; there may be trailers behind it, which nobody needs
                    at = len(data)
                    break
                self._left, at = size + 2, end + 2
            piece = data[at : at + self._left]
            at += len(piece)
            content.append(piece[: max(0, self._left - 2)])
            self._left -= len(piece)
        self._rest = data[at:]
        return b"".join(content)


class EventReader:
    """Cuts a body that comes in pieces into the data of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, body: bytes) -> Iterator[bytes]:
        """Yields the data of each event that is complete."""
        *whole, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Whether an event tells of tokens: of their text, or of nothing else, as servers without a tokenizer do."""
    said = choice.get("delta", choice)
    is_text = said.get("text") or said.get("content") or said.get("reasoning_content") or said.get("tool_calls")
    return bool(is_text) or (choice.get("finish_reason") is None and "role" not in said)


def _message(body: bytes) -> str:
    """Of a refusal; any body will do."""
    with contextlib.suppress(ValueError, AttributeError):
        return _shown(json.loads(body)["error"] if b'"error"' in body else json.loads(body))
    return body[:80].decode("utf-8", "replace")


def _shown(error: Any) -> str:
    said = error.get("message", error) if isinstance(error, dict) else error
    return str(said)[:120]
