"""A pool in two fixed shares, for adapters and for the KV cache: the paper's ablation "without unified memory"."""

from slora_jax.memory.budget import PageBudget
from slora_jax.memory.pages import PageAllocator

ADAPTER_SHARE = 0.25


class FixedShares(PageBudget):
    """Adapters have a quarter of the pages, and the KV cache has the rest. Neither takes from the other.

    It is for a scheduler without prefix cache and without pins, so that all blocks of the allocator are adapters'.

    Attributes:
      adapter_pages: pages of the adapters' share.
    """

    allows_prefix_cache = False

    def __init__(self, pages: PageAllocator):
        super().__init__(pages)
        self.adapter_pages = int(ADAPTER_SHARE * pages.total)

    def allocate_kv(self, count: int) -> list[int] | None:
        return self.pages.allocate(count) if count <= self._available_for_kv else None

    def allocate_adapter(self, count: int) -> list[int] | None:
        if count > self._available_for_adapters:
            return None
        while self._in_blocks + count > self.adapter_pages:
            self.pages.evict()
        # Free pages then suffice: the KV cache holds no more than its own share.
        return self.pages.allocate(count)

    def has_room(self, kv_pages: int, adapter_pages: int) -> bool:
        return kv_pages <= self._available_for_kv and adapter_pages <= self._available_for_adapters

    def may_copy(self, adapter_pages: int) -> bool:
        """Adapters that find no room in their share wait for one in use to end; the others pass them."""
        return adapter_pages <= self._available_for_adapters

    def spare_for_adapters(self, num_running: int) -> int:
        return self._available_for_adapters

    def refusal(self, kv_pages: int, adapter_pages: int, pinned_pages: int) -> str | None:
        for what, needed, share in (
            ("prompt and output", kv_pages, self.pages.total - self.adapter_pages),
            ("its adapter", adapter_pages, self.adapter_pages),
        ):
            if needed > share:
                return (
                    f"the request needs {needed} pages for {what}, but that share of the pool has {share}; "
                    "ask for less or take a larger pool"
                )
        return None

    @property
    def _available_for_kv(self) -> int:
        return self.pages.total - self.adapter_pages - self.pages.num_private

    @property
    def _available_for_adapters(self) -> int:
        return self.adapter_pages - (self._in_blocks - self.pages.num_cached)

    @property
    def _in_blocks(self) -> int:
        """Pages of adapters, in use or not."""
        return self.pages.total - self.pages.num_free - self.pages.num_private
