"""Adapters on their way from disk to the pool's pages: one owner, and one place to look at when one gets lost.

Two stretches lie between them, both travelled in the background. From disk to host memory: an adapter is *held* there,
from the time that a sequence near the front wants it until its copy has arrived. From host memory to the pool: its copy
*arrives* in pages that were taken for it. In the pool it is a block of the page allocator, owned by the sequences that
run with it and by its pin, and else cached.

Host memory is bounded, so what is held must always go on or be let go: the first of the sequences near the front whose
adapter is there starts unless pages lack, and pages lack only while others run; and as soon as nothing runs, nothing is
held but for sequences near the front and parked ones, whose loads thus find room.
"""

import weakref
from collections.abc import Hashable, Iterable
from typing import Literal, NamedTuple

from slora_jax.memory.budget import PageBudget
from slora_jax.memory.costs import PageCosts
from slora_jax.scheduler.queue import LOOK_AHEAD
from slora_jax.scheduler.sequence import AdapterHandle, AdapterLoad

MAX_HELD_ADAPTERS = 2 * LOOK_AHEAD
"""Adapters held in host memory, or on their way there, for waiting sequences."""

_HOLD_PLANS = 32
"""Plans for which an adapter stays held though its sequences are not near the front (any more)."""

COPY_SHARE = 32
"""Copies under way have room in device memory of their own; all together at most one page in this many of the pool."""


type Place = Literal["absent", "arriving", "used", "cached"]
"""See ``Whereabouts``."""


class Whereabouts(NamedTuple):
    """Where an adapter is.

    Attributes:
      host: its status in host memory; see ``AdapterHandle``.
      is_held: waiting sequences, or a pin, want it in host memory now.
      pool: "absent"; "arriving", while its copy is under way; "used", while a sequence or a pin owns its pages; or
        "cached", until its pages are needed.
    """

    host: str
    is_held: bool
    pool: Place


class AdapterTraffic:
    """Decides which adapters come to host memory and to the pool, and owns their pages while nobody else does.

    A plan begins with ``begin``, moves adapters by the other methods, and ends with ``end``.

    Args:
      budget: the pool's pages.
      costs: what it costs to bring pages back.

    Attributes:
      num_prefetch_hits, num_prefetch_late, num_prefetch_wasted: see ``Scheduler``.
    """

    def __init__(self, budget: PageBudget, costs: PageCosts):
        self._budget = budget
        self._pages = budget.pages
        self._costs = costs
        # The plan that last wanted each; the longest unwanted one first.
        self._held: dict[AdapterHandle, int] = {}
        self._arriving: dict[Hashable, AdapterLoad] = {}
        self._arriving_pages = 0
        self._pinned: tuple[AdapterHandle, ...] = ()
        # Blocks owned for pins, by adapter.
        self._pin_keys: dict[AdapterHandle, Hashable] = {}
        # Weakly: host memory is given back with the last other reference.
        self._retired: weakref.WeakSet[AdapterHandle] = weakref.WeakSet()
        self._prefetched: set[Hashable] = set()
        self._loads: list[AdapterLoad] = []
        self._num_plans = 0
        self._num_evictions_seen = 0
        self.num_prefetch_hits = 0
        self.num_prefetch_late = 0
        self.num_prefetch_wasted = 0

    def whereabouts(self, adapter: AdapterHandle) -> Whereabouts:
        """Where an adapter is now. Changes nothing."""
        place: Place
        if not self.is_resident(adapter):
            place = "absent"
        elif adapter_key(adapter) in self._arriving:
            place = "arriving"
        else:
            place = "cached" if self._pages.is_cached(adapter_key(adapter)) else "used"
        return Whereabouts(adapter.status, adapter in self._held, place)

    # Pins

    def pin(self, adapters: tuple[AdapterHandle, ...]) -> None:
        """Says which adapters are to be brought to the pool and to stay there; all others are not."""
        self._pinned = adapters
        assert self.pinned_pages <= self._budget.max_pinned_pages, "too many pinned pages"
        for adapter in [a for a in self._pin_keys if a not in adapters]:
            self.release(self._pin_keys.pop(adapter), adapter)

    @property
    def has_pins(self) -> bool:
        return bool(self._pinned)

    @property
    def pinned_pages(self) -> int:
        """Pages that pinned adapters take or will take; those of equal weights share them."""
        return sum(self._pages_by_pin().values())

    @property
    def pinned_pages_to_come(self) -> int:
        """Those among them that are not taken yet."""
        taken = {_content(pin) for pin in self._pin_keys}
        return sum(pages for content, pages in self._pages_by_pin().items() if content not in taken)

    def is_pinned(self, adapter: AdapterHandle) -> bool:
        """Whether an adapter of these weights is pinned."""
        return _content(adapter) in self._pages_by_pin()

    def _pages_by_pin(self) -> dict[Hashable, int]:
        return {_content(adapter): adapter.num_pages for adapter in self._pinned if adapter.status != "failed"}

    def retire(self, adapter: AdapterHandle | None, content_hash: str | None) -> None:
        """Says that no new sequence will ask for an adapter: its pages are free as soon as nobody owns them.

        Args:
          adapter: None if nobody has a handle of it any more.
          content_hash: the adapter's, if it is known.
        """
        if adapter is not None:
            self._retired.add(adapter)
        if self._pages.is_cached(_key(content_hash)):
            self._pages.drop(_key(content_hash))

    # Plans

    def begin(self) -> None:
        """Begins a plan."""
        self._num_plans += 1

    def end(self, is_stalled: bool) -> list[AdapterLoad]:
        """Ends a plan.

        Args:
          is_stalled: nothing runs: what nobody wanted in this plan is let go at once.

        Returns:
          The copies to start.
        """
        self._let_unwanted_go(is_stalled and not self._arriving)
        if self._pages.num_evictions != self._num_evictions_seen:
            self._num_evictions_seen = self._pages.num_evictions
            for key in [key for key in self._prefetched if self._pages.lookup(key) is None]:
                self._note_wasted(key)
        loads, self._loads = self._loads, []
        return loads

    def bring_pinned(self) -> bool:
        """Copies pinned adapters; False if one lacks pages, which then nobody else may take who is not running."""
        for adapter in self._pinned:
            if adapter in self._pin_keys or adapter.status == "failed":
                continue
            if not self.is_resident(adapter):
                if not self.want(adapter) or adapter.status != "ready" or not self.can_copy(adapter):
                    continue
                if not self._budget.has_room(0, adapter.num_pages):
                    return False
                self._start_copy(adapter)
            key = self._pin_keys[adapter] = adapter_key(adapter)
            self._pages.acquire(key)
            self._prefetched.discard(key)
        return True

    def is_resident(self, adapter: AdapterHandle) -> bool:
        """Whether its weights are in the pool or on their way there; a copy in host memory is not needed then."""
        return adapter.content_hash is not None and self._pages.lookup(adapter_key(adapter)) is not None

    def is_arriving(self, key: Hashable) -> bool:
        """Whether the copy to this block is under way."""
        return key in self._arriving

    @property
    def is_any_arriving(self) -> bool:
        return bool(self._arriving)

    def want(self, adapter: AdapterHandle) -> bool:
        """Holds an adapter in host memory for this plan and some more; False if that are too many."""
        if self._held.pop(adapter, None) is None:
            if len(self._held) >= MAX_HELD_ADAPTERS:
                longest = next(iter(self._held))
                if self._held[longest] >= self._num_plans - 1:
                    return False
                del self._held[longest]
                longest.let_go()
            adapter.hold()
        self._held[adapter] = self._num_plans
        return True

    def can_copy(self, adapter: AdapterHandle) -> bool:
        """Whether the copies under way leave room for this one; one may always be."""
        num_pages = adapter.num_pages
        fits_beside = not self._arriving or self._arriving_pages + num_pages <= self._pages.total // COPY_SHARE
        return fits_beside and self._budget.may_copy(num_pages)

    def pages_to_take(self, adapter: AdapterHandle) -> int:
        """Available pages that ``acquire`` would take: none if its block is there and owned."""
        if self.is_resident(adapter) and not self._pages.is_cached(adapter_key(adapter)):
            return 0
        return adapter.num_pages

    def acquire(self, adapter: AdapterHandle) -> Hashable:
        """Becomes an owner of an adapter's block, which is copied to the pool if need be. There must be room.

        Returns:
          The block's key.
        """
        key = adapter_key(adapter)
        if not self.is_resident(adapter):
            self._start_copy(adapter)
        elif key in self._prefetched:
            self._prefetched.remove(key)
            self.num_prefetch_hits += key not in self._arriving
        self._pages.acquire(key)
        return key

    def release(self, key: Hashable, adapter: AdapterHandle) -> None:
        """Gives up one ownership of an adapter's block."""
        in_host_memory = adapter.status == "ready"
        self._pages.release_block(key, self._costs.adapter if in_host_memory else self._costs.adapter_from_disk)
        if adapter in self._retired and self._pages.is_cached(key):
            self._pages.drop(key)

    def prefetch(self, adapters: Iterable[AdapterHandle], num_running: int) -> None:
        """Loads and copies adapters of the sequences next in line, while that takes nothing from anybody.

        Neither from the running sequences, which keep a page each to grow, nor from adapters in the pool that others
        next in line want: those count as used now, the first one's last.

        Args:
          adapters: in the order of their sequences; may repeat.
          num_running: sequences that run.
        """
        wanted: dict[Hashable, AdapterHandle] = {}
        for adapter in adapters:
            if self.is_resident(adapter) or (
                adapter.status != "failed" and self.want(adapter) and adapter.status == "ready"
            ):
                wanted.setdefault(adapter_key(adapter), adapter)
        # Owned meanwhile, so that copying one does not evict another; and wanted just now when released.
        cached = [key for key in wanted if self._pages.is_cached(key)]
        for key in cached:
            self._pages.acquire(key)
        spare = self._budget.spare_for_adapters(num_running)
        for key, adapter in wanted.items():
            if self._pages.lookup(key) is not None:
                continue
            spare -= adapter.num_pages
            if spare < 0 or not self.can_copy(adapter):
                break
            self._start_copy(adapter)
            self._prefetched.add(key)
        for key in reversed(cached):
            self.release(key, wanted[key])

    def arrived(self, load: AdapterLoad) -> None:
        """Notes that steps to come find the load's weights in its pages. Once for each load."""
        del self._arriving[load.key]
        self._arriving_pages -= len(load.pages)
        # The copy's own ownership; sequences admitted meanwhile have theirs.
        self.release(load.key, load.adapter)
        load.adapter.let_go()

    def abandon(self) -> None:
        """Lets all adapters in host memory go. The pages are left as they are; no plan follows."""
        held = (*self._held, *(load.adapter for load in self._arriving.values()))
        self._held.clear()
        self._arriving.clear()
        for adapter in held:
            adapter.let_go()

    def _let_unwanted_go(self, at_once: bool) -> None:
        last = self._num_plans - (1 if at_once else _HOLD_PLANS)
        while self._held:
            adapter = next(iter(self._held))
            if self._held[adapter] > last:
                return
            del self._held[adapter]
            adapter.let_go()

    def _start_copy(self, adapter: AdapterHandle) -> None:
        """Takes an adapter's pages, which must be available; the copy owns them until it has arrived."""
        key = adapter_key(adapter)
        self._note_wasted(key)
        # Held until the copy has arrived, though the weights are in use no longer than that.
        if self._held.pop(adapter, None) is None:
            adapter.hold()
        pages = self._budget.allocate_adapter(adapter.num_pages)
        assert pages is not None, "a load was started that has no room"
        self._pages.publish(key, pages)
        load = AdapterLoad(adapter, tuple(pages), key)
        self._arriving[key] = load
        self._arriving_pages += len(pages)
        self._loads.append(load)

    def _note_wasted(self, key: Hashable) -> None:
        """Of an adapter that is not in the pool."""
        if key in self._prefetched:
            self._prefetched.remove(key)
            self.num_prefetch_wasted += 1


def _content(adapter: AdapterHandle) -> Hashable:
    """Equal for adapters that are known to have equal weights."""
    return adapter.content_hash or adapter


def adapter_key(adapter: AdapterHandle) -> Hashable:
    """Of the block of an adapter whose content is known: equal weights share it."""
    return _key(adapter.content_hash)


def _key(content_hash: str | None) -> Hashable:
    return ("adapter", content_hash)
