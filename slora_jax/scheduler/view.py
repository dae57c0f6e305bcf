"""Who owns the unified pool, as a picture for people to look at: of each page, the number of its owner in a list.

It is made by whoever looks, in a thread of its own while the loop goes on, so it may be a step out of date here and
there. It takes copies that Python makes in one piece, and rests between pieces of its work, so that the loop does not
wait for it.
"""

import time
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from slora_jax.memory.pages import TRASH_PAGE, PageAllocator
from slora_jax.scheduler.sequence import Sequence

type Kind = Literal["free", "kv", "prefix", "adapters"]
"""What a page holds: nothing; the KV of running sequences; that of prompts, kept for later ones; or an adapter."""

KINDS: tuple[Kind, ...] = get_args(Kind.__value__)

_PIECE = 1000
"""Blocks or sequences looked at between two rests."""


class Owner(NamedTuple):
    """Whose a page is.

    Attributes:
      kind: what it holds.
      adapter: the adapter that it holds, or whose sequence's KV; None for the base model's, for prompts, and for an
        adapter that has no name any more.
    """

    kind: Kind
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """The pool's pages at one time.

    Attributes:
      owners: the owners that there are; the first is nobody.
      pages: ``[pages]`` int32, for each page but the trash page the index of its owner.
    """

    owners: tuple[Owner, ...]
    pages: np.ndarray

    def count(self) -> dict[Kind, int]:
        """Pages by kind; their sum is all."""
        counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for owner, number in zip(self.owners, self._by_owner(), strict=True):
            counts[owner.kind] += number
        return counts

    def count_adapters(self) -> dict[Owner, int]:
        """Pages by owner, of those that are an adapter's weights or its sequences' KV."""
        return {owner: number for owner, number in zip(self.owners, self._by_owner(), strict=True) if owner.adapter}

    def runs(self, most_cells: int) -> tuple[int, list[int]]:
        """The pages as a picture of at most so many cells, run-length encoded.

        Returns:
          How many pages a cell stands for (its first one is shown), and owner, length, owner, length, ...
        """
        pages_per_cell = -(-len(self.pages) // most_cells)
        cells = self.pages[::pages_per_cell]
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        lengths = np.diff(starts, append=len(cells))
        return pages_per_cell, np.stack([cells[starts], lengths], axis=1).ravel().tolist()

    def _by_owner(self) -> list[int]:
        return np.bincount(self.pages, minlength=len(self.owners)).tolist()


def view_pool(pages: PageAllocator, running: Iterable[Sequence], names: Mapping[Hashable, str]) -> PoolView:
    """Looks at the pool.

    Args:
      pages: its accounting.
      running: the sequences that run.
      names: of adapters, by the keys of their blocks.
    """
    indices: dict[Owner, int] = {Owner("free"): 0}
    seen = array("i", bytes(4 * pages.num_pages))  # a Python loop writes it thrice as fast as NumPy's arrays

    def index(owner: Owner) -> int:
        return indices.setdefault(owner, len(indices))

    prefix = index(Owner("prefix"))
    for key, block in _rested(pages.blocks()):
        is_adapter = isinstance(key, tuple) and key[0] == "adapter"
        mark = index(Owner("adapters", names.get(key))) if is_adapter else prefix
        for page in block:
            seen[page] = mark
    # Last, as sequences also own pages of blocks: what they compute with is theirs.
    for sequence in _rested(running):
        mark = index(Owner("kv", sequence.tenant if sequence.adapter else None))
        for page in sequence.pages.tolist():
            seen[page] = mark
    return PoolView(tuple(indices), np.delete(np.frombuffer(seen, np.int32), TRASH_PAGE))


def _rested[Item](items: Iterable[Item]) -> Iterator[Item]:
    for number, item in enumerate(items):
        if number % _PIECE == _PIECE - 1:
            time.sleep(0)
        yield item
