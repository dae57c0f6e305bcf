"""A plan's entries as padded arrays: one int32 buffer a step, and the static shape that says how to read it.

One buffer, because each further argument of a jitted call costs host time, and one copy moves faster than ten.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LoraSegments
from pallas_kernels.pool import owner
from slora_jax.adapters.peft import MAX_RANK
from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import MODULES
from slora_jax.memory.pages import TRASH_PAGE
from slora_jax.model.llama import TokenBatch
from slora_jax.scheduler.sequence import ScheduledSequence

_ALIGNMENT = 32
"""Fields of the packed buffer begin at multiples of this many int32: kernels get slices of it as they lie, and expect
them aligned to 16 bytes at least."""


@dataclass(frozen=True)
class AdapterSlice:
    """What a batch must know of one adapter in the pool; per-module tuples in ``MODULES`` order."""

    pages: tuple[int, ...]
    ranks: tuple[int, ...]
    start_a: tuple[int, ...]
    start_b: tuple[int, ...]
    scales: tuple[float, ...]

    @cached_property
    def page_bytes(self) -> bytes:
        """``pages`` as int32, for joining."""
        return np.array(self.pages, np.int32).tobytes()

    @cached_property
    def module_bytes(self) -> bytes:
        """``[4, len(MODULES)]`` int32, for joining: ranks, start_a, start_b, and the bits of the float32 scales."""
        ints = np.array([self.ranks, self.start_a, self.start_b], np.int32)
        return ints.tobytes() + np.array(self.scales, np.float32).tobytes()


@dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to: few on a CPU, where compiling is slow, many on a GPU.

    Attributes:
      sizes: allowed numbers of tokens and of sequences, increasing.
      total_ranks: allowed sums of ranks of a step's distinct adapters, increasing.
    """

    sizes: tuple[int, ...]
    total_ranks: tuple[int, ...]

    @classmethod
    def geometric(cls, largest: int, ratio: int, smallest: int = 4) -> "Buckets":
        """Sizes ``smallest, smallest * ratio, ...`` with ``largest`` as the last."""
        sizes = [smallest]
        while sizes[-1] * ratio < largest:
            sizes.append(sizes[-1] * ratio)
        if sizes[-1] < largest:
            sizes.append(largest)
        return cls(tuple(sizes), tuple(64 * 4**i for i in range(8)))

    def size(self, needed: int) -> int:
        return _first_at_least(self.sizes, needed)

    def total_rank(self, needed: int) -> int:
        return _first_at_least(self.total_ranks, needed)


def _first_at_least(values: Sequence[int], needed: int) -> int:
    for value in values:
        if value >= needed:
            return value
    raise AssertionError(f"no bucket holds {needed}; the largest is {values[-1]}")


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of one padded batch: the compiled forward's key.

    Attributes:
      tokens, sequences: padded T and S.
      table_width: pages a sequence can have.
      total_rank: padded sum of ranks of the distinct adapters; 0 when no token has an adapter.
      adapter_pages: padded pages of the distinct adapters.
      decode_only: every sequence has one token, and T = S.
    """

    tokens: int
    sequences: int
    table_width: int
    total_rank: int
    adapter_pages: int
    decode_only: bool

    @cached_property
    def _fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        t, s, m = self.tokens, self.sequences, len(MODULES)
        int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
        fields = {
            "token_ids": ((t,), int32),
            "page_table": ((s, self.table_width), int32),
            "query_start": ((s + 1,), int32),
            "context_len": ((s,), int32),
        }
        if self.total_rank:
            fields |= {
                "token_start": ((s + 1,), int32),
                "page_start": ((s + 1,), int32),
                "pages": ((self.adapter_pages,), int32),
                "rank": ((s, m), int32),
                "start_a": ((s, m), int32),
                "start_b": ((s, m), int32),
                "scale": ((s, m), float32),
            }
        return fields

    def pack(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """One int32 vector of all fields; float32 fields keep their bits."""
        parts = []
        for name, (shape, dtype) in self._fields.items():
            assert arrays[name].shape == shape and arrays[name].dtype == dtype, name
            part = arrays[name].reshape(-1).view(np.int32)
            parts += [part, np.zeros(-part.size % _ALIGNMENT, np.int32)]
        return np.concatenate(parts)

    def unpack(self, packed: jax.Array, previous_tokens: jax.Array) -> TokenBatch:
        """Inverse of ``pack``, inside jit.

        Negative token ids refer to the previous step: ``-1 - i`` is ``previous_tokens[i]``.
        """
        arrays, offset = {}, 0
        for name, (shape, dtype) in self._fields.items():
            size = int(np.prod(shape))
            piece = packed[offset : offset + size].reshape(shape)
            arrays[name] = jax.lax.bitcast_convert_type(piece, dtype) if dtype != np.int32 else piece
            offset += size + -size % _ALIGNMENT
        token_ids = arrays.pop("token_ids")
        token_ids = jnp.where(token_ids < 0, previous_tokens[jnp.maximum(-1 - token_ids, 0)], token_ids)
        page_table, query_start, context_len = (arrays.pop(n) for n in ("page_table", "query_start", "context_len"))
        positions, rows = _place_tokens(self.tokens, page_table, query_start, context_len)
        lora = None
        if self.total_rank:
            lora = LoraSegments(**arrays, max_rank=min(MAX_RANK, self.total_rank), total_rank=self.total_rank)
        return TokenBatch(token_ids, positions, rows, page_table, query_start, context_len, lora, self.decode_only)


def _place_tokens(num_tokens, page_table, query_start, context_len):
    """Position ``[T]`` of each token in its sequence, and pool row ``[T]`` of its K and V; padding: 0, a trash row."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = owner(query_start, token)
    real = sequence < context_len.shape[0]
    sequence = jnp.minimum(sequence, context_len.shape[0] - 1)
    position = jnp.where(real, context_len[sequence] - query_start[sequence + 1] + token, 0)
    page = jnp.where(real, page_table[sequence, position // PAGE_SIZE], TRASH_PAGE)
    return position, page * PAGE_SIZE + position % PAGE_SIZE


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A plan laid out for the device.

    Attributes:
      shape: the static shape.
      packed: the buffer of ``shape.pack``.
      entries: the plan's entries in row order: row i of every per-sequence array.
    """

    shape: BatchShape
    packed: np.ndarray
    entries: tuple[ScheduledSequence, ...]


def build_batch(
    entries: Sequence[ScheduledSequence],
    adapters: dict[object, AdapterSlice],
    pending_rows: dict[int, int],
    buckets: Buckets,
    table_width: int,
) -> HostBatch:
    """Pads a plan's entries to a bucket, ordered so that each adapter's tokens are contiguous.

    Args:
      entries: the plan's.
      adapters: by ``sequence.adapter_key``: every adapter of the entries.
      pending_rows: by ``sequence_id``: the row that sampled the sequence's pending token in the previous step.
      buckets: allowed sizes.
      table_width: pages of the longest sequence allowed.
    """
    num_adapters = len(adapters)
    # Sequences without an adapter come last, behind every segment.
    order = dict(zip(adapters, range(num_adapters), strict=True)) | {None: num_adapters}
    segment_of = [order[e.sequence.adapter_key] for e in entries]
    rows = sorted(range(len(segment_of)), key=segment_of.__getitem__)
    entries = tuple([entries[i] for i in rows])
    segment_of = np.array(segment_of, np.int32)[rows]
    sequences, first_tokens, counts, _, _ = zip(*entries, strict=True)
    counts = np.array(counts, np.int32)
    starts = np.zeros(len(entries) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    num_real_tokens = int(starts[-1])
    decode_only = num_real_tokens == len(entries)
    num_sequences = buckets.size(len(entries))
    total_rank = 0
    if adapters:
        modules = np.frombuffer(b"".join([a.module_bytes for a in adapters.values()]), np.int32)
        modules = modules.reshape(num_adapters, 4, len(MODULES))
        total_rank = buckets.total_rank(int(modules[:, 0].sum(axis=0).max()))
    shape = BatchShape(
        tokens=num_sequences if decode_only else buckets.size(num_real_tokens),
        sequences=num_sequences,
        table_width=table_width,
        total_rank=total_rank,
        adapter_pages=_next_power_of_four(sum([len(a.pages) for a in adapters.values()])),
        decode_only=decode_only,
    )
    packed, arrays = _empty_fields(shape)
    arrays["token_ids"][:num_real_tokens] = _token_ids(entries, pending_rows)
    arrays["query_start"][: len(starts)] = starts
    arrays["query_start"][len(starts) :] = num_real_tokens
    np.add(first_tokens, counts, out=arrays["context_len"][: len(entries)])
    # Copied as they lie, a row at a time: tables are mostly empty, and a whole one can be 16 MiB.
    table = memoryview(arrays["page_table"].reshape(-1))
    place = 0
    for sequence in sequences:
        pages = sequence.pages
        table[place : place + len(pages)] = pages
        place += table_width
    if adapters:
        _fill_segments(arrays, adapters, modules, np.bincount(segment_of, counts, num_adapters + 1)[:num_adapters])
    return HostBatch(shape, packed, entries)


def _empty_fields(shape: BatchShape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The buffer that ``BatchShape.pack`` would make of zeros, and views of its fields to fill."""
    size, places = _places(shape)
    # Untouched parts cost nothing to make: the system hands out zeroed memory. They are right as padding, tables too.
    assert TRASH_PAGE == 0
    packed = np.zeros(size, np.int32)
    return packed, {name: packed[part].view(dtype).reshape(dims) for name, part, dims, dtype in places}


@lru_cache(maxsize=1024)
def _places(shape: BatchShape) -> tuple[int, list[tuple[str, slice, tuple[int, ...], np.dtype]]]:
    """The packed buffer's size, and where each field is in it."""
    places, size = [], 0
    for name, (dims, dtype) in shape._fields.items():
        length = math.prod(dims)
        places.append((name, slice(size, size + length), dims, dtype))
        size += length + -length % _ALIGNMENT
    return size, places


def _token_ids(entries: Sequence[ScheduledSequence], pending_rows: dict[int, int]) -> list[int]:
    """Ids of all tokens of the entries; a pending one, always its sequence's last, by its row in the previous step."""
    ids = []
    for sequence, start, count, _, _ in entries:
        tokens = sequence.tokens
        end = start + count
        if end > len(tokens):
            if count > 1:
                ids += tokens[start:]
            ids.append(-1 - pending_rows[sequence.sequence_id])
        elif count == 1:
            ids.append(tokens[start])
        else:
            ids += tokens[start:end]
    return ids


def _fill_segments(
    arrays: dict[str, np.ndarray], adapters: dict[object, AdapterSlice], modules: np.ndarray, num_tokens: np.ndarray
) -> None:
    """Fills the fields of ``LoraSegments``.

    Args:
      modules: ``[len(adapters), 4, len(MODULES)]`` int32, of each adapter's ``module_bytes``.
      num_tokens: ``[len(adapters)]``.
    """
    num_adapters = len(adapters)
    pages = np.frombuffer(b"".join([a.page_bytes for a in adapters.values()]), np.int32)
    num_pages = [len(a.pages) for a in adapters.values()]
    for name, sizes in (("token_start", num_tokens), ("page_start", num_pages)):
        ends = np.cumsum(sizes)
        arrays[name][1 : num_adapters + 1] = ends
        arrays[name][num_adapters + 1 :] = ends[-1]
    arrays["pages"][: len(pages)] = pages
    for i, name in enumerate(("rank", "start_a", "start_b")):
        arrays[name][:num_adapters] = modules[:, i]
    arrays["scale"][:num_adapters] = modules[:, 3].view(np.float32)


def _next_power_of_four(needed: int, smallest: int = 64) -> int:
    size = smallest
    while size < needed:
        size *= 4
    return size
