"""Who owns which page of the unified pool: KV cache and adapter weights alike. Host only, no JAX.

A page is in one of three states::

    free   -- nothing worth keeping -->  allocate()  --> used
    used   -- held by `refs` owners;     release()   --> free, or cached if its block has a key
    cached -- kept under a key, no owner: acquire(key) --> used;  or evicted --> free, whenever allocate() needs room,
                                                                  or at once by drop(key)

What is kept under a key is a *block*: a group of pages that lives and dies together. A full page of a prompt's KV
is a block of one page; an adapter is a block of all its pages. Neither kind has a reserved share, and there is one
eviction order for both, GreedyDual-Size (Cao and Irani, 1997): a block that loses its last owner is worth what a page
of it costs to bring back, plus the *clock*, which is the worth of the last block evicted. The block worth least goes
first, among equals the one unused for longest. So what is cheap to bring back goes first, but what is dear goes too
once nobody wanted it for long enough; with equal costs this is least recently used.

Page 0 is the trash page: padding lanes write there, and it is never handed out.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from slora_jax.errors import PoolMisuse

TRASH_PAGE = 0

_MIN_GARBAGE = 64
"""Entries out of date that the eviction order may always have, so that small ones are not sorted all the time."""


@dataclass(slots=True)
class _Block:
    """Pages kept under one key. ``refs`` counts owners; 0 means cached. ``cost`` is a page's, to bring it back."""

    pages: tuple[int, ...]
    refs: int
    cost: float = 0.0


class PageAllocator:
    """Allocates, shares and evicts the pages ``1 .. num_pages - 1``.

    A page is owned either privately (from ``allocate`` until ``release`` or ``publish``) or through the block it was
    published in (``publish``, ``acquire`` ... ``release_block``).
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (one is the trash page), got {num_pages}")
        self.num_pages = num_pages
        # Popped from the end: low page numbers first, which keeps small tests readable.
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))
        self._private: set[int] = set()
        self._blocks: dict[Hashable, _Block] = {}
        # Cached blocks, each with the number of its entry in the heap; other entries there are out of date.
        self._cold: dict[Hashable, int] = {}
        self._by_worth: list[tuple[float, int, Hashable]] = []
        self._numbers = itertools.count()
        self._clock = 0.0
        self._num_cached = 0
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages of blocks without an owner: available, at the price of losing their content."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        return self.total - self.num_free - self.num_cached

    @property
    def num_private(self) -> int:
        """Pages that are owned, but not through a block."""
        return len(self._private)

    @property
    def total(self) -> int:
        """All pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Most pages that ``allocate`` could give now."""
        return len(self._free) + self._num_cached

    def allocate(self, count: int) -> list[int] | None:
        """Takes ``count`` pages for one owner, evicting cached blocks where free pages run out.

        All or nothing: None, and nothing is evicted, if there are not that many.
        """
        if count < 0:
            raise PoolMisuse(f"cannot allocate {count} pages")
        if count > self.num_available:
            return None
        while len(self._free) < count:
            self.evict()
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        self._private.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives back privately owned pages.

        Raises:
          PoolMisuse: a page is not privately owned (given back twice, published, or never handed out).
        """
        for page in pages:
            if page not in self._private:
                raise PoolMisuse(f"page {page} was released but is not privately owned")
            self._private.remove(page)
            self._free.append(page)

    def publish(self, key: Hashable, pages: Sequence[int]) -> bool:
        """Turns privately owned pages into a block under ``key``, still owned once by the caller.

        Returns:
          False, changing nothing, if the key already names a block (two sequences computed the same prompt page).
        """
        if key in self._blocks:
            return False
        missing = [page for page in pages if page not in self._private]
        if missing or not pages:
            raise PoolMisuse(f"pages {missing or pages} were published but are not privately owned")
        self._private.difference_update(pages)
        self._blocks[key] = _Block(tuple(pages), refs=1)
        return True

    def lookup(self, key: Hashable) -> tuple[int, ...] | None:
        """Pages of the block under ``key``, or None. Changes nothing."""
        block = self._blocks.get(key)
        return block.pages if block else None

    def blocks(self) -> Iterator[tuple[Hashable, tuple[int, ...]]]:
        """The blocks that there are when it begins: their keys and pages. From any thread."""
        for key, block in self._blocks.copy().items():
            yield key, block.pages

    def is_cached(self, key: Hashable) -> bool:
        """Whether the block exists and has no owner, so that acquiring it takes pages from ``num_available``."""
        return key in self._cold

    def acquire(self, key: Hashable) -> tuple[int, ...] | None:
        """Becomes one more owner of the block under ``key``; None if there is none."""
        block = self._blocks.get(key)
        if block is None:
            return None
        if block.refs == 0:
            del self._cold[key]
            self._num_cached -= len(block.pages)
        block.refs += 1
        return block.pages

    def release_block(self, key: Hashable, cost: float | None = None) -> None:
        """Gives up one ownership of a block. Without owners it is cached.

        Args:
          cost: of a page of it, to bring back, in any unit that is the same for all blocks; None for what it was, and 0
            in the beginning.

        Raises:
          PoolMisuse: no such block, or nobody owns it.
        """
        block = self._blocks.get(key)
        if block is None or block.refs == 0:
            raise PoolMisuse(f"block {key!r} was released but has no owner")
        block.refs -= 1
        if cost is not None:
            block.cost = cost
        if block.refs == 0:
            number = next(self._numbers)
            self._cold[key] = number
            heapq.heappush(self._by_worth, (self._clock + block.cost, number, key))
            self._num_cached += len(block.pages)
            if len(self._by_worth) > 2 * len(self._cold) + _MIN_GARBAGE:
                self._by_worth = [entry for entry in self._by_worth if self._is_current(entry)]
                heapq.heapify(self._by_worth)

    def drop(self, key: Hashable) -> None:
        """Frees the pages of a cached block that nobody will ask for again.

        Raises:
          PoolMisuse: no such block, or somebody owns it.
        """
        if key not in self._cold:
            raise PoolMisuse(f"block {key!r} was dropped but is not cached")
        del self._cold[key]
        self._free_block(key)

    def check_integrity(self) -> None:
        """Asserts that every page is owned exactly once and that the counts add up."""
        in_blocks = [page for block in self._blocks.values() for page in block.pages]
        everywhere = [*self._free, *self._private, *in_blocks]
        assert len(everywhere) == len(set(everywhere)) == self.total, "a page is lost or owned twice"
        assert set(everywhere) == set(range(TRASH_PAGE + 1, self.num_pages)), "a page number is out of range"
        cold = {key for key, block in self._blocks.items() if block.refs == 0}
        current = [key for _, _, key in filter(self._is_current, self._by_worth)]
        assert cold == set(self._cold) == set(current), "a block without owners is not in the eviction order"
        assert len(current) == len(cold) and len(self._by_worth) <= 2 * self.total + _MIN_GARBAGE
        assert self._num_cached == sum(len(self._blocks[key].pages) for key in cold)
        used = len(self._private) + sum(len(b.pages) for b in self._blocks.values() if b.refs)
        assert self.num_free + self.num_cached + used == self.total

    def _is_current(self, entry: tuple[float, int, Hashable]) -> bool:
        _, number, key = entry
        return self._cold.get(key) == number

    def evict(self) -> None:
        """Frees the pages of the cached block that is worth least; there must be one."""
        while not self._is_current(entry := heapq.heappop(self._by_worth)):
            pass
        self._clock, _, key = entry
        del self._cold[key]
        self._free_block(key)
        self.num_evictions += 1

    def _free_block(self, key: Hashable) -> None:
        block = self._blocks.pop(key)
        assert block.refs == 0
        self._num_cached -= len(block.pages)
        self._free.extend(block.pages)
