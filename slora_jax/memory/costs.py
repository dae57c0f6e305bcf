"""What it takes to bring a page back that was evicted: the weights of the eviction order."""

from dataclasses import dataclass

from slora_jax.config import PAGE_SIZE
from slora_jax.model.config import ModelConfig

# Orders of magnitude: only their ratios matter. A GPU's were measured on one H200, a CPU's and a disk's are guesses.
_GPU_PRODUCTS = 6e14
"""Operations a second of a step of many tokens, on each GPU."""
_GPU_LINK = 5e10
"""Bytes a second from page-locked host memory, to each GPU."""
_CPU_PRODUCTS = 1e11
_CPU_LINK = 5e9
_DISK = 1e9
"""Bytes a second of an adapter that is read, checked, hashed and laid out."""


@dataclass(frozen=True, slots=True)
class PageCosts:
    """Seconds for each page of a block, all pages having as many bytes.

    Attributes:
      prefix: computing a page's tokens of a prompt again.
      adapter: copying an adapter from host memory.
      adapter_from_disk: reading it from disk before that.
    """

    prefix: float
    adapter: float
    adapter_from_disk: float

    @classmethod
    def estimate(
        cls, model: ModelConfig, page_bytes: int, num_devices: int, on_gpu: bool, page_tokens: int = PAGE_SIZE
    ) -> "PageCosts":
        """For a base model.

        Args:
          page_bytes: of a page on one device.
          num_devices: that share model and pool, each with a link of its own.
          on_gpu: whether they are GPUs.
          page_tokens: whose KV a page holds.
        """
        products, link = (_GPU_PRODUCTS, _GPU_LINK) if on_gpu else (_CPU_PRODUCTS, _CPU_LINK)
        copying = page_bytes / link
        return cls(
            prefix=2 * model.num_params() * page_tokens / (products * num_devices),
            adapter=copying,
            adapter_from_disk=copying + page_bytes * num_devices / _DISK,
        )


EQUAL_COSTS = PageCosts(0.0, 0.0, 0.0)
"""Nothing but recency counts."""
