"""The registry of adapters and their weights in host memory.

A name stands for its *current version*; a version is one immutable adapter, and its object is the handle that requests
hold. Registering a name in use puts a new version in the old one's place in one step, whatever the folder holds:
requests that asked for the name before keep the old version and its weights, in the pool or in host memory, later ones
get the new version, which is read anew. If its content turns out to be the same, it shares the old one's pages. An old
version whose files are no longer there when it must be read (again) fails with that reason.
The store refers only to current versions, so an old or unregistered one is freed, host memory and all, as soon as the
last request that holds it lets go.

Registering reads no weights. Weights come to host memory when somebody holds the version, brought by a few threads
that all adapters share. They stay while somebody holds it, and after that until others need the room: host memory is
bounded. A load without room waits, first come, first served, until enough is let go.
"""

import difflib
import logging
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from slora_jax.adapters.host_cache import HostCache
from slora_jax.adapters.peft import (
    CONFIG_FILE,
    MAX_RANK,
    AdapterHeader,
    AdapterLimits,
    AdapterShape,
    HostAdapter,
    load_adapter,
    printable,
    read_header,
)
from slora_jax.errors import AdapterExists, BadAdapter, UnknownAdapter
from slora_jax.histogram import Histogram
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig

logger = logging.getLogger(__name__)

Status = Literal["registered", "loading", "ready", "failed"]

_MAX_NAME_LENGTH = 200
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+=-]*")
_MAX_COMPARED_NAMES = 1000
_MAX_KNOWN_SHAPES = 1000


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What may be shown of an adapter.

    Attributes:
      path: its folder.
      rank: its largest rank.
      ranks: largest rank over the layers, by module.
      num_pages: pool pages that it takes when in use.
      created: when this version was registered, in seconds since 1970.
      content_hash: None until its weights were first loaded.
      pinned: it is to stay in the pool.
    """

    name: str
    path: Path
    rank: int
    ranks: Mapping[str, int]
    num_pages: int
    created: int
    content_hash: str | None = None
    pinned: bool = False


class AdapterVersion:
    """One version of an adapter: a handle, equal only to itself. Made by ``AdapterStore``; thread-safe.

    Attributes:
      header: what is known without its weights.
      info: the same, as it may be shown.
      status: "registered" (not in host memory), "loading" from the first ``hold`` on, "ready", and "registered" again
        when it had to leave host memory; or for ever "failed".
      failure: why it failed, else "".
    """

    __slots__ = ("__weakref__", "_holds", "_host", "_key", "_store", "failure", "header", "info", "status")

    def __init__(self, store: "AdapterStore", name: str, header: AdapterHeader):
        self._store = store
        self._host: HostAdapter | None = None
        self._holds = 0
        # In the cache, for one stay there: a dead reference equals only itself.
        self._key: weakref.ref[AdapterVersion] | None = None
        self.header = header
        self.info = AdapterInfo(
            name=name,
            path=header.path,
            rank=header.max_rank,
            ranks=header.ranks,
            num_pages=header.num_pages,
            created=int(time.time()),
        )
        self.status: Status = "registered"
        self.failure = ""

    @property
    def num_pages(self) -> int:
        return self.header.num_pages

    @property
    def content_hash(self) -> str | None:
        """Known once it was ready; see ``HostAdapter``."""
        return self.info.content_hash

    def hold(self) -> None:
        """Wants the weights in host memory until ``let_go``, one of which must follow each ``hold``. Does not wait.

        Starts loading them in the background if they are not there.
        """
        self._store._hold(self)

    def let_go(self) -> None:
        """Ends a ``hold``. Without any, the weights may leave host memory.

        Raises:
          RuntimeError: nobody holds it.
        """
        self._store._let_go(self)

    def host(self) -> HostAdapter | None:
        """The weights, as staged by the store's ``stage``; None while they are not there.

        Raises:
          BadAdapter: loading failed, and why. Registering the adapter again makes a version that is tried afresh.
        """
        if self.status == "failed":
            raise BadAdapter(self.failure)
        return self._host

    def wait(self, timeout: float | None = None) -> HostAdapter | None:
        """Loads the weights and waits for them, at most ``timeout`` seconds; else like ``host``."""
        self.hold()
        try:
            self._store._wait_until_loaded(self, timeout)
            return self.host()
        finally:
            self.let_go()

    def __repr__(self) -> str:
        return f"<AdapterVersion {self.info.name!r} {self.status} of {self.info.path}>"


class Retired(NamedTuple):
    """A version that no new request gets.

    Attributes:
      version: gives the version while somebody still holds it; it is freed without regard to this.
      content_hash: as it was known when the version lost its name.
    """

    version: "weakref.ref[AdapterVersion]"
    content_hash: str | None


class AdapterStore:
    """Adapters by name, and their weights in host memory. Thread-safe.

    Attributes:
      num_loads: reads of an adapter's weights from disk.
      load_seconds: how long those took that succeeded, checks and staging included.
      limits: of adapters that are registered.
      pinned: the versions that are to stay in the pool; another tuple whenever they change.
    """

    def __init__(
        self,
        model: ModelConfig,
        pool_layout: PoolLayout,
        dtype: np.dtype,
        loader_threads: int = 2,
        on_change: Callable[[], None] | None = None,
        stage: Callable[[np.ndarray], Any] | None = None,
        capacity: int | None = None,
        host_bytes: Callable[[int], int] | None = None,
        max_pinned_pages: int | None = None,
        base_name: str | None = None,
        confirm: Callable[[HostAdapter], None] | None = None,
        max_rank: int = MAX_RANK,
    ):
        """
        Args:
          model: the base model.
          pool_layout: its pool's layout.
          dtype: the pool's dtype.
          loader_threads: most adapters loaded at once.
          stage: makes of packed weights what is kept instead, as ``HostAdapter.packed``; called by the thread that
            loaded them, and thread-safe.
          on_change: called, by the thread that loaded it, each time an adapter got ready or failed. Should return soon.
          capacity: bytes of host memory for all adapters; None for no bound. Not counted are those registered with
            their weights, which never leave, and what the threads work on.
          max_pinned_pages: pool pages that pinned adapters may take together; None for no bound.
          base_name: the base model's, which no adapter may have, nor begin with it and a colon.
          host_bytes: bytes that ``stage`` keeps of an adapter of so many pages; by default those of its pages.
          max_rank: the largest rank that an adapter may have which is registered.
          confirm: asked about each adapter read from disk after it was staged, by the thread that loaded it, which it
            may keep waiting: raises BadAdapter if the adapter cannot be served after all.
        """
        self._model = model
        self._pool_layout = pool_layout
        self._dtype = np.dtype(dtype)
        self._base_name = base_name
        self._on_change = on_change
        self._stage = stage or (lambda packed: packed)
        self._confirm = confirm or (lambda host: None)
        self.limits = AdapterLimits.of_rank(max_rank, pool_layout)
        self._versions: dict[str, AdapterVersion] = {}
        # Checks done before: adapters trained alike share theirs.
        self._known_shapes: dict[bytes, AdapterShape] = {}
        self._loading: weakref.WeakSet[AdapterVersion] = weakref.WeakSet()
        # Loads that wait for room. Weakly, so that a version that nobody wants any more is not loaded.
        self._without_room: deque[weakref.ref[AdapterVersion]] = deque()
        self._cache = HostCache(sys.maxsize if capacity is None else capacity)
        page_bytes = pool_layout.shards.count * pool_layout.page_bytes(self._dtype.itemsize)
        self._host_bytes = host_bytes or (lambda num_pages: num_pages * page_bytes)
        # Keys in the cache of versions that were freed since. A version may die anywhere, so only noted then.
        self._dead: deque[weakref.ref[AdapterVersion]] = deque()
        self._loaders = ThreadPoolExecutor(loader_threads, thread_name_prefix="slora-adapter")
        self._retired: list[Retired] = []
        self._is_closed = False
        self.num_loads = 0
        self.load_seconds = Histogram()
        self.pinned: tuple[AdapterVersion, ...] = ()
        self._max_pinned_pages = sys.maxsize if max_pinned_pages is None else max_pinned_pages
        # Guards all of the above and every version's state.
        self._changed = threading.Condition()

    def register(self, name: str, path: Path | str, pinned: bool = False, replace: bool = True) -> AdapterInfo:
        """Makes an adapter available, checking all that can be checked without reading its weights.

        If the name stands for an adapter already, the same folder's or another's, this one takes its place for new
        requests, and its files are read anew; see the module's docstring.

        Args:
          name: what requests call it: letters, digits and ``._:@+=-``, in parts separated by ``/``.
          path: its PEFT folder.
          pinned: it is to stay in the pool.
          replace: whether it may take another's place.

        Raises:
          AdapterExists: it would take another's place, and may not; nothing changes then.
          BadAdapter: a bad name, the adapter cannot be served exactly as trained, it takes more than all of the host
            memory that adapters may take, or there is no room for the pin; nothing changes then.
        """
        self._check_name(name)
        if not replace:
            self._check_is_new(name)
        header = read_header(Path(path), self._model, self._pool_layout, self._known_shapes)
        try:
            self.limits.check_rank(header.max_rank)
        except BadAdapter as e:
            raise BadAdapter(f"adapter {header.path}: {e}") from None
        too_large = self._too_large(header)
        if too_large:
            raise BadAdapter(too_large)
        with self._changed:
            if len(self._known_shapes) > _MAX_KNOWN_SHAPES:
                self._known_shapes.clear()
            if not replace:
                self._check_is_new(name)  # again: another thread may have been faster
            version = AdapterVersion(self, name, header)
            self._set_current(name, version, pinned)
            return version.info

    def _check_is_new(self, name: str) -> None:
        if name in self:
            raise AdapterExists(f"adapter {name!r} is registered already; replace it, or choose another name")

    def _too_large(self, header: AdapterHeader) -> str:
        """Why the adapter can never be loaded, or ""."""
        size = self._host_bytes(header.num_pages)
        if size <= self._cache.capacity:
            return ""
        return (
            f"adapter {header.path}: it takes {size / 2**30:.3g} GiB of host memory, but all adapters may take "
            f"{self._cache.capacity / 2**30:.3g}; "
            f"raise host_adapter_gigabytes (--host-adapter-memory) to {_round_up(size / 2**30)} or more"
        )

    def pin(self, name: str) -> None:
        """Makes an adapter stay in the pool.

        Raises:
          UnknownAdapter: the name is not registered.
          BadAdapter: there is no room for the pin.
        """
        with self._changed:
            self._set_current(name, self.get(name), pinned=True)

    def unpin(self, name: str) -> None:
        """Lets an adapter leave the pool when others need its pages. One that is not pinned stays as it is.

        Raises:
          UnknownAdapter: the name is not registered.
        """
        with self._changed:
            self._set_current(name, self.get(name), pinned=False)

    def limit_pins(self, max_pages: int) -> None:
        """Bounds the pool pages that pinned adapters may take together from now on.

        Raises:
          ValueError: those that are pinned take more; nothing changes then.
        """
        with self._changed:
            used = sum(version.num_pages for version in self.pinned)
            if used > max_pages:
                raise ValueError(
                    f"pinned adapters take {used} pages, more than the {max_pages} they may of this pool; "
                    "unpin some, or take a larger pool"
                )
            self._max_pinned_pages = max_pages

    def _set_current(self, name: str, version: AdapterVersion, pinned: bool) -> None:
        """Needs the lock. Raises BadAdapter, changing nothing, if there is no room for the pin."""
        others = tuple(other for other in self.pinned if other.info.name != name)
        used = sum(other.num_pages for other in others if other.status != "failed")
        if pinned and used + version.num_pages > self._max_pinned_pages:
            raise BadAdapter(
                f"adapter {name} cannot be pinned: it takes {version.num_pages} pages, pinned ones may take "
                f"{self._max_pinned_pages} together and {used} are taken; pin fewer, or start with a larger pool"
            )
        before = self._versions.get(name)
        if before is not None and before is not version:
            self._retired.append(Retired(weakref.ref(before), before.content_hash))
        self._versions[name] = version
        if version.info.pinned != pinned:
            version.info = replace(version.info, pinned=pinned)
        after = (*others, version) if pinned else others
        if after != self.pinned:
            self.pinned = after

    def register_loaded(self, name: str, host: HostAdapter) -> AdapterInfo:
        """Makes an adapter available whose weights are in memory already: a benchmark's, a test's, a notebook's own.

        It is ready at once and takes the place of whatever the name stood for. Adapters that share a buffer also
        share what is kept of it.

        Args:
          name: as for ``register``.
          host: the adapter; its ``packed`` must not be written to afterwards.

        Raises:
          BadAdapter: a bad name; nothing changes then.
        """
        self._check_name(name)
        host = self._staged(host)
        with self._changed:
            version = AdapterVersion(self, name, host.header)
            self._finish(version, host, "")
            self._set_current(name, version, pinned=False)
            return version.info

    def register_dir(self, folder: Path | str) -> tuple[dict[str, AdapterInfo], dict[str, str]]:
        """Registers each subfolder that holds an ``adapter_config.json``, under the subfolder's name.

        Whatever is wrong with one subfolder costs that one only.

        Returns:
          The registered ones, and why the others were refused, both by name.

        Raises:
          BadAdapter: the folder itself cannot be read.
        """
        try:
            # A link that leads nowhere counts: it is refused, not passed over.
            subfolders = sorted(path for path in Path(folder).iterdir() if os.path.lexists(path / CONFIG_FILE))
        except OSError as e:
            raise BadAdapter(f"cannot read the folder of adapters {folder}: {e.strerror or e}") from None
        infos, refused = {}, {}
        for path in subfolders:
            try:
                infos[path.name] = self.register(path.name, path)
            except BadAdapter as e:
                refused[printable(path.name)] = str(e)
            except Exception as e:
                logger.exception("adapter %s: reading %s failed", printable(path.name), printable(str(path)))
                refused[printable(path.name)] = f"adapter {printable(str(path))}: {type(e).__name__}: {e}"
        return infos, refused

    def unregister(self, name: str) -> None:
        """Forgets a name. Requests that hold its version go on; its host memory is freed after the last of them.

        Raises:
          UnknownAdapter: the name is not registered.
        """
        with self._changed:
            version = self._versions.pop(name, None)
            if version is not None:
                if version.info.pinned:
                    self.pinned = tuple(other for other in self.pinned if other is not version)
                self._retired.append(Retired(weakref.ref(version), version.content_hash))
                return
        raise self._unknown(name)

    def take_retired(self) -> list[Retired]:
        """Versions whose names were forgotten or given to others since the last call.

        Those are left out whose weights a current version is known to have.
        """
        if not self._retired:
            return []
        with self._changed:
            retired, self._retired = self._retired, []
            current = {version.content_hash for version in self._versions.values()} - {None}
        return [one for one in retired if one.content_hash not in current]

    def get(self, name: str) -> AdapterVersion:
        """The name's current version.

        Raises:
          UnknownAdapter: the name is not registered; the message lists close ones.
        """
        with self._changed:
            version = self._versions.get(name)
        if version is None:
            raise self._unknown(name)
        return version

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._versions

    def infos(self) -> Mapping[str, AdapterInfo]:
        """A snapshot of the current versions by name, in the order of registration."""
        with self._changed:
            return {name: version.info for name, version in self._versions.items()}

    def versions(self) -> dict[str, AdapterVersion]:
        """A snapshot of the current versions themselves, by name."""
        with self._changed:
            return self._versions.copy()

    @property
    def host_bytes_used(self) -> int:
        """Of the bounded host memory, loads under way included."""
        with self._changed:
            self._remove_dead()
            return self._cache.used

    def close(self) -> None:
        """Waits for loads under way, and fails those not begun. Idempotent."""
        with self._changed:
            self._is_closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            for version in list(self._loading):
                self._finish(version, None, "the adapter store was closed")

    def _hold(self, version: AdapterVersion) -> None:
        with self._changed:
            version._holds += 1
            if version.status == "ready":
                self._cache.hold(version._key)
            elif version.status == "registered":
                self._start_loading(version)

    def _let_go(self, version: AdapterVersion) -> None:
        with self._changed:
            if version._holds == 0:
                raise RuntimeError(f"adapter {version.info.name} was let go more often than held")
            version._holds -= 1
            if version._holds == 0:
                if version.status == "ready" and version._key in self._cache:
                    self._cache.let_go(version._key)
                self._use_room()

    def _start_loading(self, version: AdapterVersion) -> None:
        """Needs the lock."""
        if self._is_closed:
            self._finish(version, None, "the adapter store was closed")
        else:
            version.status = "loading"
            self._loading.add(version)
            self._without_room.append(weakref.ref(version))
            self._use_room()

    def _use_room(self) -> None:
        """Starts the loads that wait, in their order, as far as there is room. Needs the lock."""
        self._remove_dead()
        while self._without_room and not self._is_closed:
            version = self._without_room[0]()
            if version is not None and version._holds:
                key = version._key = weakref.ref(version, self._dead.append)
                left = self._cache.add(key, self._host_bytes(version.num_pages))
                if left is None:
                    return
                for other in left:
                    assert isinstance(other, weakref.ref)  # as ``_key``
                    self._drop(other())
                self._loaders.submit(self._load, key)
            elif version is not None:
                self._loading.discard(version)
                version.status = "registered"
            self._without_room.popleft()

    def _remove_dead(self) -> None:
        """Gives back the room of versions that were freed. Needs the lock."""
        while self._dead:
            self._cache.remove(self._dead.popleft())

    def _drop(self, version: AdapterVersion | None) -> None:
        """Of what left the cache. Needs the lock."""
        if version is not None:
            self._loading.discard(version)
            version.status = "registered"
            version._host = None

    def _load(self, reference: "weakref.ref[AdapterVersion]") -> None:
        version = reference()
        with self._changed:
            if version is None or not version._holds:
                self._cache.remove(reference)
                self._drop(version)
                self._use_room()
                return
            self.num_loads += 1
        host, failure = None, ""
        start = time.monotonic()
        try:
            host = self._staged(load_adapter(version.header, self._dtype))
            if version.content_hash not in (None, host.content_hash):
                host = None
                failure = (
                    f"adapter {version.info.path}: its weights changed since they were first loaded; register it again"
                )
            else:
                self._confirm(host)
                self.load_seconds.add([time.monotonic() - start])
        except BadAdapter as e:
            host, failure = None, str(e)
            logger.warning("adapter %s failed to load: %s", version.info.name, failure)
        except Exception as e:
            # Whatever it was, one adapter must not leave its requests waiting for ever.
            logger.exception("loading adapter %s failed", version.info.name)
            host = None
            failure = f"adapter {version.info.path}: loading failed: {type(e).__name__}: {e}"
        with self._changed:
            self._finish(version, host, failure)
        if self._on_change is not None:
            try:
                self._on_change()
            except Exception:
                logger.exception("on_change failed")

    def _staged(self, host: HostAdapter) -> HostAdapter:
        return replace(host, packed=self._stage(host.packed))

    def _finish(self, version: AdapterVersion, host: HostAdapter | None, failure: str) -> None:
        """Needs the lock. The status goes last: it is read without the lock."""
        self._loading.discard(version)
        key = version._key
        if host is not None:
            version._host = host
            if version.content_hash is None:
                version.info = replace(version.info, content_hash=host.content_hash)
            version.status = "ready"
            if not version._holds and key in self._cache:
                self._cache.let_go(key)
        else:
            version.failure = failure
            version.status = "failed"
            self._cache.remove(key)
        self._use_room()
        self._changed.notify_all()

    def _wait_until_loaded(self, version: AdapterVersion, timeout: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: version.status in ("ready", "failed"), timeout)

    def _check_name(self, name: str) -> None:
        if len(name) > _MAX_NAME_LENGTH or not all(_NAME_PART.fullmatch(part) for part in name.split("/")):
            raise BadAdapter(
                f"adapter name {printable(name[:_MAX_NAME_LENGTH])!r} is not allowed: use at most {_MAX_NAME_LENGTH} "
                "letters, digits and ._:@+=-, in parts separated by '/' that begin with a letter, a digit or '_'"
            )
        if self._base_name is not None and (name == self._base_name or name.startswith(f"{self._base_name}:")):
            raise BadAdapter(
                f"adapter name {name!r} is taken: {self._base_name!r} is the base model, and names that begin with "
                f"{self._base_name + ':'!r} are its adapters'; choose another"
            )

    def _unknown(self, name: str) -> UnknownAdapter:
        shown = name[:_MAX_NAME_LENGTH]
        with self._changed:
            names = list(self._versions)
        if len(names) > _MAX_COMPARED_NAMES:
            # Comparing is slow; among very many, look only at names that begin alike.
            names = [other for other in names if other[:3] == shown[:3]][:_MAX_COMPARED_NAMES]
        close = difflib.get_close_matches(shown, names, n=3)
        hint = f"close names: {', '.join(close)}" if close else "register it first"
        return UnknownAdapter(f"no adapter is named {shown!r}; {hint}")


def _round_up(gigabytes: float) -> str:
    """Two digits, and not less."""
    unit = 10.0 ** (math.floor(math.log10(gigabytes)) - 1)
    return f"{math.ceil(gigabytes / unit) * unit:.2g}"
