"""How the events of streams get to their clients while the engine's loop goes on.

Hundreds of threads that wake at every step of the engine, each to send one event, hold its loop up: all of them and the
loop share one interpreter lock. So under a server that lets an application send from a thread of its choice (a
``Wire``), one thread sends the events of all streams: it wakes once a step, and looks at each of them. A stream's own
thread sleeps until its stream has ended. Under any other WSGI server it sends its events itself.

Either way the events are an iterator that never waits: it yields b"" where there is nothing to send yet.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from slora_jax.api.deltas import POLL_SECONDS, News

if TYPE_CHECKING:
    from slora_jax.engine.generation import Generation

WIRE = "slora_jax.wire"
"""Where the environment of a WSGI request has the ``Wire`` to its client, if its server has such."""

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


def pulled(events: Iterator[bytes], generations: Sequence["Generation"], pause: Callable[[], float]) -> Iterator[bytes]:
    """The body of a stream whose server asks for its parts, with a rest of ``pause()`` seconds after each."""
    news = News(generations)
    for event in events:
        if event:
            yield event
            time.sleep(pause())
        else:
            news.wait()


class Sender:
    """Sends the events of any number of streams, in one thread that runs while there are any. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[_Stream] = []
        self._runs = False
        self._wake = threading.Event()
        self._has_news = False

    def sent(self, events: Iterator[bytes], generations: Sequence["Generation"], wire: Wire) -> Iterator[bytes]:
        """The body of a stream whose parts are sent meanwhile: it has none left for its server, and ends with them.

        Raises:
          Exception: what ``wire.send`` raised.
        """
        stream = _Stream(events, generations, wire)
        for generation in generations:
            generation.tell(self._tell)
        with self._lock:
            self._new.append(stream)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="slora-jax-streams", daemon=True).start()
        self._wake.set()
        stream.ended.wait()
        failure, stream.failure = stream.failure, None  # or each would keep the other alive
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        yield from ()

    def _tell(self) -> None:
        if not self._has_news:  # which costs less than to wake again, for every token
            self._has_news = True
            self._wake.set()

    def _run(self) -> None:
        streams: list[_Stream] = []
        has_news = False
        while True:
            with self._lock:
                new, self._new = self._new, []
                if not (streams or new):
                    self._runs = False
                    return
            # All are looked at once a step, or when some were full; in between, only those that are new.
            if has_news:
                streams = [stream for stream in streams if stream.advance()]
            # Of what came before ``tell`` there is no news, and a look may take a part: new ones are looked at twice.
            streams += [stream for stream in new if stream.advance() and stream.advance()]
            waits = any(stream.wire.is_full for stream in streams)
            was_woken = not streams or self._wake.wait(_FULL_SECONDS if waits else POLL_SECONDS)
            self._wake.clear()
            has_news = waits or not was_woken
            if self._has_news:
                # Before they are looked at: what comes meanwhile is news again. Never else, or news that come between
                # the two lines were forgotten.
                self._has_news, has_news = False, True


class _Stream:
    """One stream that is being sent.

    Attributes:
      ended: set when nothing more will be sent.
      failure: why, if the events did not come to their end.
    """

    def __init__(self, events: Iterator[bytes], generations: Sequence["Generation"], wire: Wire):
        self._events = events
        self._generations = generations
        self.wire = wire
        self.ended = threading.Event()
        self.failure: Exception | None = None

    def advance(self) -> bool:
        """Sends what there is; returns whether more will come."""
        try:
            while not self.wire.is_full:
                if event := next(self._events):
                    self.wire.send(event)
                for generation in self._generations:
                    if not generation.finished:
                        return True
        except StopIteration:
            self.ended.set()
            return False
        except Exception as failure:  # the client is gone, as a rule; one stream's end must not be that of all
            self.failure = failure
            self.ended.set()
            return False
        return True
