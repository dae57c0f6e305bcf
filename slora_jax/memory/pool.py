"""The unified pool's device array, and the way of adapters into it: packed, staged, copied, written.

An adapter waits in host memory that the device copies from by itself (``stage``). From there it comes into device
memory while steps run (``start_copy``), and a short write puts it into its pages between two steps (``finish_copy``).
With several devices each has its columns of the rows, in host memory too, and page numbers are the same on all.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import TRASH_PAGE


class StagedAdapter:
    """An adapter's weights in page-locked host memory; freed with the last reference.

    Attributes:
      array: ``[layers, 2, PAGE_SIZE * B, N * W]``, B the number of pages rounded up to a power of two.
      num_pages: pages without the padding.
      nbytes: bytes without the padding.
    """

    __slots__ = ("__weakref__", "array", "nbytes", "num_pages")

    def __init__(self, array: jax.Array, num_pages: int, nbytes: int):
        self.array = array
        self.num_pages = num_pages
        self.nbytes = nbytes


@dataclass(frozen=True, slots=True)
class AdapterCopy:
    """A copy from host to device memory under way, and the pages it is for."""

    array: jax.Array
    pages: np.ndarray

    @property
    def is_ready(self) -> bool:
        """Whether it has arrived. Does not wait."""
        return self.array.is_ready()  # type: ignore[attr-defined]  # public, and missing from jax.Array's stub

    def wait(self) -> None:
        """Waits until it has arrived."""
        self.array.block_until_ready()


class UnifiedPool:
    """Owns the array ``[layers, 2, rows, N * W]`` on N devices.

    Each update donates the array and replaces it: take ``array`` anew for every step, and give back what the step
    returns.
    """

    def __init__(self, layout: PoolLayout, num_pages: int, dtype: jnp.dtype, sharding: NamedSharding | None = None):
        """
        Args:
          layout: rows of the pool.
          num_pages: its pages, the same on every device.
          dtype: its elements.
          sharding: where the slices of its rows live; None for one device, JAX's default.
        """
        self.num_pages = num_pages
        self.array = jnp.zeros(layout.pool_shape(num_pages), dtype, device=sharding)
        self._shape = self.array.shape
        self._dtype = self.array.dtype
        self._on_device = self.array.sharding
        self._on_host = self._on_device.with_memory_kind("pinned_host")
        self._staged: dict[int, tuple[weakref.ref, weakref.ref]] = {}
        self._staging = threading.Lock()

    def reset(self) -> None:
        """Makes the array anew, all zeros, whatever became of the old one; staged adapters stay."""
        if not self.array.is_deleted():
            self.array.delete()
        self.array = jnp.zeros(self._shape, self._dtype, device=self._on_device)
        self.array.block_until_ready()

    def stage(self, packed: np.ndarray) -> StagedAdapter:
        """Brings an adapter to where the device copies it from. Thread-safe; takes long, so not for the loop's thread.

        The same buffer, staged again while it lives, gives the same result.

        Args:
          packed: ``[layers, 2, PAGE_SIZE * pages, N * W]`` as from ``AdapterLayout.pack``, in the pool's dtype.

        Raises:
          ValueError: it has another shape or dtype.
        """
        with self._staging:
            _, result = self._staged.get(id(packed), (None, None))
            staged = result() if result else None
            if staged is None:
                staged = self._stage(packed)
                key = id(packed)
                owner = weakref.ref(packed, lambda _: self._staged.pop(key, None))
                self._staged[key] = (owner, weakref.ref(staged))
            return staged

    def _stage(self, packed: np.ndarray) -> StagedAdapter:
        layers, planes, _, width = self._shape
        rows = packed.shape[2] if packed.ndim == 4 else 0
        if packed.shape != (layers, planes, rows, width) or rows % PAGE_SIZE or not rows or packed.dtype != self._dtype:
            raise ValueError(
                f"packed must be {self._dtype} [{layers}, {planes}, {PAGE_SIZE} * pages, {width}], "
                f"got {packed.dtype} {list(packed.shape)}"
            )
        num_pages = rows // PAGE_SIZE
        padded_pages = _padded(num_pages)
        missing = padded_pages * PAGE_SIZE - rows
        padded = np.pad(packed, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else packed
        # Of several devices each gets its columns, and only those of this process's devices are touched.
        array = jax.make_array_from_callback(
            padded.shape, self._on_host, lambda index: np.ascontiguousarray(padded[index])
        ).block_until_ready()
        # Compiled here, in the loader's thread, so that the loop never waits for it.
        _compiled_write(self._shape, self._dtype, padded_pages, self._on_device)
        return StagedAdapter(array, num_pages, packed.nbytes)

    def staged_bytes(self, num_pages: int) -> int:
        """Bytes of this process's host memory that a staged adapter of so many pages takes, padding included."""
        layers, planes, _, width = self._shape
        numbers = layers * planes * _padded(num_pages) * PAGE_SIZE * width
        local, everywhere = len(self._on_device.addressable_devices), len(self._on_device.device_set)
        return numbers * self._dtype.itemsize * local // everywhere

    def start_copy(self, staged: StagedAdapter, pages: Sequence[int]) -> AdapterCopy:
        """Starts bringing an adapter to the device, and returns at once. The pages are not touched yet.

        Args:
          staged: the adapter.
          pages: its page numbers, in the order of its rows.

        Raises:
          ValueError: not as many pages as it has.
        """
        if len(pages) != staged.num_pages:
            raise ValueError(f"the adapter has {staged.num_pages} pages, but is to be copied into {len(pages)}")
        numbers = np.full(_padded(len(pages)), TRASH_PAGE, np.int32)
        numbers[: len(pages)] = pages
        return AdapterCopy(jax.device_put(staged.array, self._on_device), numbers)

    def finish_copy(self, copy: AdapterCopy) -> None:
        """Has the weights written into their pages, behind the steps launched before and ahead of those to come."""
        write = _compiled_write(self._shape, self._dtype, len(copy.pages), self._on_device)
        self.array = write(self.array, copy.pages, copy.array)


def _padded(num_pages: int) -> int:
    """The next power of two, so that a few compiled writes serve all sizes."""
    return 1 << (num_pages - 1).bit_length()


@lru_cache(maxsize=256)
def _compiled_write(shape: tuple[int, ...], dtype: np.dtype, num_pages: int, sharding: Sharding):
    layers, planes, _, width = shape
    values = (layers, planes, num_pages * PAGE_SIZE, width)
    write = _write_pages
    if isinstance(sharding, NamedSharding):
        write = jax.shard_map(
            write,
            mesh=sharding.mesh,
            in_specs=(sharding.spec, PartitionSpec(), sharding.spec),
            out_specs=sharding.spec,
            check_vma=False,
        )
    return (
        jax.jit(write, donate_argnums=0)
        .lower(
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),
            jax.ShapeDtypeStruct((num_pages,), np.int32),
            jax.ShapeDtypeStruct(values, dtype, sharding=sharding),
        )
        .compile()
    )


def _write_pages(pool: jax.Array, pages: jax.Array, values: jax.Array) -> jax.Array:
    rows = (pages[:, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)).reshape(-1)
    return pool.at[:, :, rows].set(values, mode="promise_in_bounds")
