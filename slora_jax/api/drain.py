"""The time between the word to stop and the end: requests that run go on, and new ones are sent elsewhere."""

import contextlib
import threading
from collections.abc import Iterator

from slora_jax.errors import SLoRAError


class Draining(SLoRAError):
    """The server is about to stop and takes no new requests."""


class Drain:
    """Counts the requests that run, and says when a server that is to stop has none left. Thread-safe."""

    def __init__(self) -> None:
        self._has_begun = False
        self._running = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """From now on no new request is taken. From a signal handler too: it takes no lock."""
        self._has_begun = True

    @property
    def has_begun(self) -> bool:
        return self._has_begun

    @property
    def is_done(self) -> bool:
        """Whether it has begun, and every request taken before has ended."""
        return self._has_begun and not self._running

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts a request for as long as the context lasts.

        Raises:
          Draining: no new ones are taken.
        """
        with self._lock:
            # Counted first: whoever sees that none runs after ``begin`` can then be sure that none will.
            self._running += 1
        try:
            if self._has_begun:
                raise Draining("this server is about to stop and takes no new requests; send it to another, or later")
            yield
        finally:
            with self._lock:
                self._running -= 1
