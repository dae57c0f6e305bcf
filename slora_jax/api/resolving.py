"""Adapters that are registered when first asked for: by the name of a folder within a root, or of a hub's repository.

Whoever may use a name can have it looked for. So each name is looked for once at a time, what cannot be served is not
tried again for a while, and of the hub only so many names are asked in that time.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from slora_jax.api.folders import AdapterFolders
from slora_jax.errors import AdapterExists, BadAdapter, Overloaded, UnknownAdapter, shown

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

REMEMBERED_SECONDS = 30.0
"""How long a name is not looked for again that could not be served."""

MAX_MISSES = 64
"""So many failures are remembered, and the hub is not asked for another name until one of them is forgotten."""

LONGEST_WAIT_SECONDS = 120.0
"""How long a request waits for another that has the same adapter downloaded."""


class _Miss(NamedTuple):
    until: float
    why: str | None  # for the client; None if it is told only that there is no such model


class AdapterResolver:
    """Registers adapters with an engine under the names by which requests ask for them. Thread-safe.

    Args:
      engine: of the adapters.
      folders: where they may be.
      clock: monotonic seconds.
    """

    def __init__(self, engine: "Engine", folders: AdapterFolders, clock: Callable[[], float] = time.monotonic):
        self._engine = engine
        self._folders = folders
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[None]] = {}
        self._misses: dict[str, _Miss] = {}

    def look_for(self, name: str) -> None:
        """Registers the adapter of this name if it is not, and if it is to be found; else does nothing.

        Args:
          name: of the adapter, without the base model's.

        Raises:
          BadAdapter: there is such a folder, and it cannot be served; the server's log says why.
          Overloaded: many names were looked for in vain of late.
        """
        if name == self._engine.model_name or self._is_registered(name):
            return
        with self._lock:
            if self._has_missed(name):
                return
            other = self._under_way.get(name)
            if other is None:
                mine = self._under_way[name] = Future()
        if other is not None:
            self._wait_for(other)
            with self._lock:
                self._has_missed(name)  # as whoever looked for it was told
            return
        try:
            self._register(name)
        finally:
            with self._lock:
                del self._under_way[name]
            mine.set_result(None)

    def _wait_for(self, other: Future[None]) -> None:
        try:
            other.result(LONGEST_WAIT_SECONDS)
        except TimeoutError:
            raise Overloaded("the adapter is still being downloaded; try again later") from None

    def _is_registered(self, name: str) -> bool:
        try:
            self._engine.adapter(name)
        except UnknownAdapter:
            return False
        return True

    def _has_missed(self, name: str) -> bool:
        """Whether the hub did not have it of late. Needs the lock. Raises BadAdapter as ``look_for``."""
        now = self._clock()
        self._misses = {other: miss for other, miss in self._misses.items() if miss.until > now}
        miss = self._misses.get(name)
        if miss is not None and miss.why is not None:
            raise BadAdapter(miss.why)
        return miss is not None

    def _register(self, name: str) -> None:
        is_hub = False
        try:
            place = self._folders.find(name)
            if place is None:
                return
            is_hub = place.is_hub
            if is_hub and len(self._misses) >= MAX_MISSES:
                raise Overloaded("many adapters were looked for in vain of late; try again later")
            self._engine.register_adapter(name, place.path, replace=False)
        except AdapterExists:  # registered by an administrator meanwhile
            return
        except BadAdapter:
            why = None if is_hub else f"the adapter {shown(name)} cannot be served; the server's log says why"
            with self._lock:
                self._misses[name] = _Miss(self._clock() + REMEMBERED_SECONDS, why)
            if why is not None:
                raise BadAdapter(why) from None
