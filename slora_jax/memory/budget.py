"""Who may take how many of the pool's pages: the rule that makes the pool *unified*, in one place.

The scheduler asks a budget, not the page allocator, whether there is room and for pages. The paper's pool has no shares
(section 5.1): KV cache and adapters each take what the other leaves. An experiment with fixed shares is another budget.
"""

from slora_jax.memory.pages import PageAllocator


class PageBudget:
    """The unified pool: every page is for whoever comes first.

    Attributes:
      pages: the allocator whose pages it gives out.
      allows_prefix_cache: whether pages of finished prompts may stay as blocks.
    """

    allows_prefix_cache = True

    def __init__(self, pages: PageAllocator):
        self.pages = pages

    @property
    def max_pinned_pages(self) -> int:
        """Most pages that pinned adapters may take together: half, so that requests always have the other half."""
        return self.pages.total // 2

    def allocate_kv(self, count: int) -> list[int] | None:
        """Takes ``count`` pages for a KV cache; None, changing nothing, if there are not that many."""
        return self.pages.allocate(count)

    def allocate_adapter(self, count: int) -> list[int] | None:
        """Takes ``count`` pages for an adapter; None, changing nothing, if there are not that many."""
        return self.pages.allocate(count)

    def has_room(self, kv_pages: int, adapter_pages: int) -> bool:
        """Whether so many pages can be had now for a KV cache, and beside them so many for an adapter."""
        return kv_pages + adapter_pages <= self.pages.num_available

    def may_copy(self, adapter_pages: int) -> bool:
        """Whether an adapter's copy may be considered now. If not, its sequences wait and all others pass them.

        Here it always may: if pages lack, nobody passes, so that a large adapter is not kept waiting for ever.
        """
        return True

    def spare_for_adapters(self, num_running: int) -> int:
        """Pages that adapters copied ahead of need may take: running sequences keep a page each to grow."""
        return self.pages.num_available - num_running

    def refusal(self, kv_pages: int, adapter_pages: int, pinned_pages: int) -> str | None:
        """Why a sequence can never run, however little else does; None if it can.

        Args:
          kv_pages: of its prompt and output.
          adapter_pages: of its adapter; 0 for the base model, and for a pinned adapter.
          pinned_pages: that pinned adapters take.
        """
        needed = kv_pages + adapter_pages
        if needed <= self.pages.total - pinned_pages:
            return None
        pinned = f", {pinned_pages} of them for pinned adapters" if pinned_pages else ""
        return (
            f"the request needs {needed} pages (prompt, output and adapter), but the pool has {self.pages.total}"
            f"{pinned}; lower max_tokens or start the server with a larger pool"
        )
