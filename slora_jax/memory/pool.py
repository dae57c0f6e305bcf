"""The unified pool's device array, and the copy of adapters into it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import TRASH_PAGE

_PAGES_PER_COPY = 8
"""Adapters are copied in pieces of this many pages, so that one compiled function serves every size."""


class UnifiedPool:
    """Owns the array ``[layers, 2, rows, W]``.

    Each update donates the array and replaces it: take ``array`` anew for every step, and give back what the step
    returns.
    """

    def __init__(self, layout: PoolLayout, num_pages: int, dtype: jnp.dtype):
        self.num_pages = num_pages
        self.array = jnp.zeros(layout.pool_shape(num_pages), dtype)

    def write_adapter(self, packed: np.ndarray, pages: Sequence[int]) -> None:
        """Copies an adapter's weights into its pages.

        Args:
          packed: ``[layers, 2, PAGE_SIZE * len(pages), W]`` as from ``AdapterLayout.pack``, in the pool's dtype.
          pages: page numbers, in the order of ``packed``'s rows.
        """
        layers, _, _, width = self.array.shape
        expected = (layers, 2, PAGE_SIZE * len(pages), width)
        if packed.shape != expected or packed.dtype != self.array.dtype:
            raise ValueError(f"packed must be {self.array.dtype} {expected}, got {packed.dtype} {packed.shape}")
        for start in range(0, len(pages), _PAGES_PER_COPY):
            piece = packed[:, :, start * PAGE_SIZE : (start + _PAGES_PER_COPY) * PAGE_SIZE]
            numbers = np.full(_PAGES_PER_COPY, TRASH_PAGE, np.int32)
            some = pages[start : start + _PAGES_PER_COPY]
            numbers[: len(some)] = some
            missing = _PAGES_PER_COPY * PAGE_SIZE - piece.shape[2]
            if missing:
                piece = np.pad(piece, ((0, 0), (0, 0), (0, missing), (0, 0)))
            self.array = _write_pages(self.array, numbers, piece)


@partial(jax.jit, donate_argnums=0)
def _write_pages(pool: jax.Array, pages: jax.Array, values: jax.Array) -> jax.Array:
    rows = (pages[:, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)).reshape(-1)
    return pool.at[:, :, rows].set(values, mode="promise_in_bounds")
