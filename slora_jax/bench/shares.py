"""A pool in two fixed shares, for adapters and for the KV cache: the paper's ablation "without unified memory"."""

from collections.abc import Callable

from slora_jax.config import SchedulerConfig
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterHandle

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
        if count > self.num_available_for_adapters:
            return None
        while self._num_of_blocks + count > self.adapter_pages:
            self._evict()
        # Free pages then suffice: the KV cache holds no more than its own share.
        pages = [self._free.pop() for _ in range(count)]
        self._private.update(pages)
        return pages

    @property
    def num_available_for_adapters(self) -> int:
        """Pages that adapters could be given now."""
        return self.adapter_pages - (self._num_of_blocks - self.num_cached)

    @property
    def _num_of_blocks(self) -> int:
        return self.total - self.num_free - len(self._private)


class _AdapterPages:
    """Stands for the pages while an adapter is given its own."""

    def __init__(self, pages: SplitPages):
        self.allocate = pages.allocate_for_adapter
        self.publish = pages.publish


class SplitScheduler(Scheduler):
    """Adapters that find no room in their share wait, and others pass them; none takes KV pages, nor the reverse.

    Nothing is pinned here.
    """

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

    def refusal(self, num_tokens: int, adapter: AdapterHandle | None) -> str | None:
        for what, needed, share in (
            ("prompt and output", PoolLayout.token_pages(num_tokens), self._pages.total - self._pages.adapter_pages),
            ("its adapter", adapter.num_pages if adapter else 0, self._pages.adapter_pages),
        ):
            if needed > share:
                return (
                    f"the request needs {needed} pages for {what}, but that share of the pool has {share}; "
                    "ask for less or take a larger pool"
                )
        return None

    def _has_room(self, kv_pages: int, adapter_pages: int) -> bool:
        return kv_pages <= self._pages.num_available and adapter_pages <= self._pages.num_available_for_adapters

    def _spare_for_adapters(self) -> int:
        return self._pages.num_available_for_adapters

    def _can_copy(self, adapter) -> bool:
        return super()._can_copy(adapter) and self._has_room(0, adapter.num_pages)

    def _start_copy(self, adapter, builder) -> None:
        pages, self._pages = self._pages, _AdapterPages(self._pages)
        super()._start_copy(adapter, builder)
        self._pages = pages
