"""A pool in two fixed shares, for adapters and for the KV cache: the paper's ablation "without unified memory"."""

from collections.abc import Callable

from slora_jax.config import SchedulerConfig
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.scheduler import Scheduler

ADAPTER_SHARE = 0.25


class SplitPages(PageAllocator):
    """Pages of which adapters have ``adapter_pages`` and the KV cache the rest. Every block is an adapter's here."""

    def __init__(self, num_pages: int):
        super().__init__(num_pages)
        self.adapter_pages = int(ADAPTER_SHARE * self.total)

    @property
    def num_available(self) -> int:
        """Pages that a KV cache could be given now."""
        return self.total - self.adapter_pages - len(self._private)

    def allocate(self, count: int) -> list[int] | None:
        return super().allocate(count) if count <= self.num_available else None

    def allocate_for_adapter(self, count: int) -> list[int] | None:
        """Takes pages of the adapters' share, evicting cold adapters; None if those in use leave too few."""
        in_use = self._num_of_blocks - self.num_cached
        if in_use + count > self.adapter_pages:
            return None
        while self._num_of_blocks + count > self.adapter_pages:
            self._evict()
        # Free pages then suffice: the KV cache holds no more than its own share.
        pages = [self._free.pop() for _ in range(count)]
        self._private.update(pages)
        return pages

    def has_room_for_adapter(self, count: int) -> bool:
        return self._num_of_blocks - self.num_cached + count <= self.adapter_pages

    @property
    def _num_of_blocks(self) -> int:
        return self.total - self.num_free - len(self._private)


class _AdapterPages:
    """Stands for the pages while an adapter is given its own."""

    def __init__(self, pages: SplitPages):
        self.allocate = pages.allocate_for_adapter
        self.publish = pages.publish


class SplitScheduler(Scheduler):
    """Adapters that find no room in their share wait, and others pass them; none takes KV pages, nor the reverse."""

    def __init__(
        self,
        config: SchedulerConfig,
        pages: SplitPages,
        clock: Callable[[], float],
        *,
        costs: PageCosts = EQUAL_COSTS,
    ):
        if config.prefix_cache:
            raise ValueError("a split pool has no prefix cache; turn prefix_cache off")
        super().__init__(config, pages, clock, costs=costs)

    def _can_copy(self, adapter) -> bool:
        return super()._can_copy(adapter) and self._pages.has_room_for_adapter(adapter.num_pages)

    def _start_copy(self, adapter, builder) -> None:
        pages, self._pages = self._pages, _AdapterPages(self._pages)
        super()._start_copy(adapter, builder)
        self._pages = pages
