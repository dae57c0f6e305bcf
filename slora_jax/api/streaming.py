"""How the events of streams get to their clients while the engine's loop goes on.

Hundreds of threads that wake at every step of the engine, each to send one event, hold its loop up: all of them and the
loop share one interpreter lock. So under a server that lets an application send from a thread of its choice (a
``Wire``), one thread sends the events of all streams: it wakes once a step, looks at each of them, and hands what it
finds to a process that writes to their sockets (``relay``). A stream's own thread sleeps until its stream has ended.
Under any other WSGI server it sends its events itself.

Either way the events are an iterator that never waits: it yields b"" where there is nothing to send yet.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from slora_jax.api.deltas import POLL_SECONDS, News
from slora_jax.api.relay import Relay, RelayedStream

if TYPE_CHECKING:
    from slora_jax.engine.generation import Generation

_log = logging.getLogger(__name__)

WIRE = "slora_jax.wire"
"""Where the environment of a WSGI request has the ``Wire`` to its client, if its server has such."""

_MOST_RELAYS = 5
"""A process that writes to clients and has ended is followed by another, but not for ever: then it is a fault."""

_FULL_SECONDS = 0.02
"""How long a client that reads slowly may have taken what was sent before it gets more."""


class Wire(Protocol):
    """The way to one client, for one thread at a time. The request's own thread must not write meanwhile."""

    @property
    def is_full(self) -> bool:
        """Whether something that was sent before has not got to the client's side yet."""
        ...

    def send(self, data: bytes) -> None:
        """Sends a part of the answer's body. Does not wait if the wire is not full.

        Raises:
          Exception: the client is gone.
        """
        ...

    def framed(self, data: bytes) -> bytes:
        """The bytes that ``send`` would write for these, once it has written something."""
        ...

    def fileno(self) -> int:
        """The descriptor of its socket, to which ``framed`` bytes can be written while the wire is not full.

        Raises:
          Exception: the client is gone.
        """
        ...

    def gone(self) -> Exception:
        """What ``send`` raises when the client is gone."""
        ...


def pulled(events: Iterator[bytes], generations: Sequence["Generation"], pause: Callable[[], float]) -> Iterator[bytes]:
    """The body of a stream whose server asks for its parts, with a rest of ``pause()`` seconds after each."""
    news = News(generations)
    for event in events:
        if event:
            yield event
            time.sleep(pause())
        else:
            news.wait()


class _Bell:
    """What wakes the thread that sends. It knows nothing of it, so that what rings it keeps no sender alive."""

    def __init__(self) -> None:
        self._rung = threading.Event()
        self._has_rung = False

    def ring(self) -> None:
        """Says that there is news."""
        if not self._has_rung:  # which costs less than to wake again, for every token
            self._has_rung = True
            self._rung.set()

    def call(self) -> None:
        """Wakes the thread without news."""
        self._rung.set()

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Waits to be woken. Returns whether that came in time, and whether there is news since the last call."""
        was_woken = self._rung.wait(seconds)
        self._rung.clear()
        if not self._has_rung:
            return was_woken, False
        # Before the streams are looked at: what comes meanwhile is news again. Never else, or news that come between
        # the two lines were forgotten.
        self._has_rung = False
        return was_woken, True


class Sender:
    """Sends the events of any number of streams, in one thread that runs while there are any. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[_Stream] = []
        self._runs = False
        self._bell = _Bell()
        self._relay: Relay | None = None
        self._relays_left = _MOST_RELAYS

    def sent(self, events: Iterator[bytes], generations: Sequence["Generation"], wire: Wire) -> Iterator[bytes]:
        """The body of a stream whose parts are sent meanwhile: it has none left for its server, and ends with them.

        Raises:
          Exception: what ``wire.send`` raised.
        """
        stream = _Stream(events, generations, wire)
        for generation in generations:
            generation.tell(self._bell.ring)
        with self._lock:
            self._new.append(stream)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="slora-jax-streams", daemon=True).start()
        self._bell.call()
        stream.ended.wait()
        failure, stream.failure = stream.failure, None  # or each would keep the other alive
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        yield from ()

    def _run(self) -> None:
        streams: list[_Stream] = []
        has_news = False
        while True:
            with self._lock:
                new, self._new = self._new, []
                if not (streams or new):
                    self._runs = False
                    return
            relay = self._running_relay()
            # All are looked at once a step, or when some were full; in between, only those that are new.
            if has_news:
                streams = [stream for stream in streams if stream.advance(relay)]
            # Of what came before ``tell`` there is no news, and a look may take a part: new ones are looked at twice.
            streams += [stream for stream in new if stream.advance(relay) and stream.advance(relay)]
            if relay is not None:
                relay.flush()
            waits = any(stream.is_full for stream in streams)
            seconds = 0.0 if not streams else _FULL_SECONDS if waits else POLL_SECONDS
            was_woken, was_told = self._bell.wait(seconds)
            has_news = waits or was_told or not was_woken

    def _running_relay(self) -> Relay | None:
        """The relay, a new one if there is none or its process has ended; None where none can be had."""
        if self._relay is not None and not self._relay.is_lost:
            return self._relay
        self._relay = None
        if self._relays_left:
            self._relays_left -= 1
            try:
                self._relay = Relay(self._bell.ring)
            except OSError as error:
                self._relays_left = 0
                _log.error("the server writes to clients itself, for no process can be started to do so: %s", error)
            else:
                if not self._relays_left:
                    _log.warning("a process that writes to clients is started for the last time; all others have ended")
        return self._relay


class _Stream:
    """One stream that is being sent.

    Attributes:
      ended: set when nothing more will be sent.
      failure: why, if the events did not come to their end.
    """

    def __init__(self, events: Iterator[bytes], generations: Sequence["Generation"], wire: Wire):
        self._events = events
        self._generations = generations
        self._wire = wire
        self._has_begun = False
        self._relayed: RelayedStream | None = None
        self.ended = threading.Event()
        self.failure: Exception | None = None

    @property
    def is_full(self) -> bool:
        """Whether something that was sent before has not got to the client's side yet."""
        return self._wire.is_full if self._relayed is None else self._relayed.is_full

    def advance(self, relay: Relay | None) -> bool:
        """Sends what there is; returns whether more will come."""
        try:
            while not self.is_full:
                if event := next(self._events):
                    self._send(event, relay)
                for generation in self._generations:
                    if not generation.finished:
                        return True
        except StopIteration:
            self._end()
            return False
        except Exception as failure:  # the client is gone, as a rule; one stream's end must not be that of all
            self.failure = failure
            self._end()
            return False
        return True

    def _send(self, event: bytes, relay: Relay | None) -> None:
        if self._relayed is None and self._has_begun and relay is not None:
            # The header has gone, and whatever was sent with it: the wire is not full.
            self._relayed = relay.open(self._wire.fileno())
        self._has_begun = True
        if self._relayed is None:
            self._wire.send(event)
        elif self._relayed.is_gone:
            raise self._wire.gone()
        else:
            self._relayed.send(self._wire.framed(event))

    def _end(self) -> None:
        if self._relayed is None:
            self.ended.set()
        else:
            self._relayed.end(partial(self._end_relayed, self._relayed))

    def _end_relayed(self, relayed: RelayedStream) -> None:
        if relayed.is_gone and self.failure is None:
            # Part of the answer has not got there. Its server must close the connection, not end the body as if whole.
            self.failure = self._wire.gone()
        self.ended.set()
