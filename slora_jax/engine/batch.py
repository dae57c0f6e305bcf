"""A plan's entries as padded arrays: one int32 buffer a step, and the static shape that says how to read it.

One buffer, because each further argument of a jitted call costs host time, and one copy moves faster than ten.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LoraSegments
from pallas_kernels.pool import owner
from slora_jax.adapters.peft import MAX_RANK
from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import MODULES, cdiv
from slora_jax.memory.pages import TRASH_PAGE
from slora_jax.model.llama import TokenBatch
from slora_jax.scheduler.sequence import ScheduledSequence

_ALIGNMENT = 32
"""Fields of the packed buffer begin at multiples of this many int32: kernels get slices of it as they lie, and expect
them aligned to 16 bytes at least."""


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """What a batch must know of one adapter in the pool; per-module tuples in ``MODULES`` order."""

    pages: tuple[int, ...]
    ranks: tuple[int, ...]
    start_a: tuple[int, ...]
    start_b: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Buckets:
    """The shapes that batches are padded to: few on a CPU, where compiling is slow, many on a GPU.

    Attributes:
      decode: numbers of sequences, and of tokens, of steps in which every sequence has one token; increasing.
      tokens, sequences: those of the other steps; increasing.
      total_ranks: sums of ranks of a step's distinct adapters; increasing.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    total_ranks: tuple[int, ...]

    @classmethod
    def geometric(cls, max_tokens: int, max_sequences: int, ratio: int, smallest: int = 4) -> "Buckets":
        """Sizes ``smallest, smallest * ratio, ...`` with ``max_tokens`` as the last."""
        tokens = [smallest]
        while tokens[-1] * ratio < max_tokens:
            tokens.append(tokens[-1] * ratio)
        if tokens[-1] < max_tokens:
            tokens.append(max_tokens)
        sequences = tuple(tokens[: tokens.index(_first_at_least(tokens, max_sequences)) + 1])
        return cls(sequences, tuple(tokens), sequences, tuple(64 * 4**i for i in range(8)))

    @classmethod
    def fine(cls, max_tokens: int, max_sequences: int) -> "Buckets":
        """Close sizes, as a GPU's time follows them; steps with prompts have one S, and all steps one sum of ranks.

        Those two cost the Triton kernels nothing: their work follows the batch, not its padding.
        """
        sizes = [
            1,
            2,
            4,
            8,
            16,
            *range(32, 257, 32),
            *range(320, 513, 64),
            640,
            768,
            *range(1024, max_tokens + 512, 512),
        ]
        decode = tuple(size for size in sizes if size < max_sequences)
        room = _first_at_least(sizes, max_sequences)
        tokens = tuple(size for size in sizes if 64 <= size < max_tokens)
        return cls((*decode, room), (*tokens, max(64, max_tokens)), (room,), (MAX_RANK * max_sequences,))

    @property
    def max_sequences(self) -> int:
        """The largest S of any step."""
        return max(self.decode[-1], self.sequences[-1])

    def shape(
        self, num_tokens: int, num_sequences: int, table_width: int, total_rank: int = 0, adapter_pages: int = 0
    ) -> "BatchShape":
        """The smallest shape that holds a batch; see ``BatchShape`` for the arguments, here without padding."""
        decode_only = num_tokens == num_sequences
        sequences = _first_at_least(self.decode if decode_only else self.sequences, num_sequences)
        tokens = sequences if decode_only else _first_at_least(self.tokens, num_tokens)
        if not total_rank:
            return BatchShape(tokens, sequences, table_width, 0, 0, decode_only)
        total_rank = _first_at_least(self.total_ranks, total_rank)
        return BatchShape(
            tokens, sequences, table_width, total_rank, _adapter_pages(sequences, adapter_pages), decode_only
        )

    def all_shapes(self, table_width: int, with_adapters: bool) -> "list[BatchShape]":
        """Every shape that ``shape`` gives, but for adapters of more than 16 pages a sequence."""
        sizes = [(n, n) for n in self.decode]
        # A step that is not of this kind has at least one token more than sequences.
        fewest = (0, *self.sequences)
        sizes += [
            (t, s) for t in self.tokens for s, below in zip(self.sequences, fewest, strict=False) if t > below + 1
        ]
        num_decode = len(self.decode)
        return [
            BatchShape(t, s, table_width, rank, _adapter_pages(s, 0) if rank else 0, decode_only=i < num_decode)
            for rank in ((0, *self.total_ranks) if with_adapters else (0,))
            for i, (t, s) in enumerate(sizes)
        ]


def _first_at_least(values: Sequence[int], needed: int) -> int:
    for value in values:
        if value >= needed:
            return value
    raise AssertionError(f"no bucket holds {needed}; the largest is {values[-1]}")


def _adapter_pages(num_sequences: int, needed: int) -> int:
    """Padded pages of a step's adapters: room for 16 a sequence, or four times, sixteen times, ... as many."""
    size = 1 << (16 * num_sequences - 1).bit_length()
    while size < needed:
        size *= 4
    return size


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of one padded batch: the compiled forward's key.

    Attributes:
      tokens, sequences: padded T and S.
      table_width: pages a sequence can have.
      total_rank: padded sum of ranks of the distinct adapters; 0 when no token has an adapter.
      adapter_pages: padded pages of the distinct adapters; 0 when no token has an adapter.
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

    @property
    def packed_size(self) -> int:
        """Length of the vector of ``pack``."""
        sizes = [math.prod(shape) for shape, _ in self._fields.values()]
        return sum(size + -size % _ALIGNMENT for size in sizes)

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
            lora = LoraSegments(
                **arrays,
                active=tuple(range(len(MODULES))),
                max_rank=min(MAX_RANK, self.total_rank),
                total_rank=self.total_rank,
            )
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
    order = {key: i for i, key in enumerate(adapters)}
    # Sequences without an adapter come last, behind every segment.
    entries = tuple(sorted(entries, key=lambda e: order.get(e.sequence.adapter_key, len(order))))
    counts = [e.count for e in entries]
    shape = buckets.shape(
        num_tokens=sum(counts),
        num_sequences=len(entries),
        table_width=table_width,
        total_rank=max(sum(a.ranks[m] for a in adapters.values()) for m in range(len(MODULES))),
        adapter_pages=sum(len(a.pages) for a in adapters.values()),
    )
    num_tokens, num_sequences = shape.tokens, shape.sequences
    starts = np.cumsum([0, *counts], dtype=np.int32)
    arrays = {
        "token_ids": np.zeros(num_tokens, np.int32),
        "page_table": np.full((num_sequences, table_width), TRASH_PAGE, np.int32),
        "query_start": np.full(num_sequences + 1, starts[-1], np.int32),
        "context_len": np.zeros(num_sequences, np.int32),
    }
    arrays["query_start"][: len(starts)] = starts
    for row, entry in enumerate(entries):
        sequence, end = entry.sequence, entry.start + entry.count
        ids = sequence.tokens[entry.start : end]
        if len(ids) < entry.count:
            ids.append(-1 - pending_rows[sequence.sequence_id])
        arrays["token_ids"][starts[row] : starts[row + 1]] = ids
        num_pages = cdiv(end, PAGE_SIZE)
        arrays["page_table"][row, :num_pages] = sequence.pages[:num_pages]
        arrays["context_len"][row] = end
    if adapters:
        arrays |= _segment_arrays(entries, starts, adapters, order, shape)
    return HostBatch(shape, shape.pack(arrays), entries)


def _segment_arrays(entries, starts, adapters, order, shape):
    segments, modules = shape.sequences, len(MODULES)
    tokens_of = np.zeros(len(adapters), np.int32)
    for row, entry in enumerate(entries):
        if entry.sequence.adapter_key is not None:
            tokens_of[order[entry.sequence.adapter_key]] += starts[row + 1] - starts[row]
    arrays = {
        "token_start": np.full(segments + 1, tokens_of.sum(), np.int32),
        "page_start": np.full(segments + 1, sum(len(a.pages) for a in adapters.values()), np.int32),
        "pages": np.full(shape.adapter_pages, TRASH_PAGE, np.int32),
        **{name: np.zeros((segments, modules), np.int32) for name in ("rank", "start_a", "start_b")},
        "scale": np.zeros((segments, modules), np.float32),
    }
    arrays["token_start"][: len(adapters) + 1] = np.cumsum([0, *tokens_of])
    arrays["page_start"][: len(adapters) + 1] = np.cumsum([0, *(len(a.pages) for a in adapters.values())])
    for g, adapter in enumerate(adapters.values()):
        start = arrays["page_start"][g]
        arrays["pages"][start : start + len(adapter.pages)] = adapter.pages
        arrays["rank"][g] = adapter.ranks
        arrays["start_a"][g] = adapter.start_a
        arrays["start_b"][g] = adapter.start_b
        arrays["scale"][g] = adapter.scales
    return arrays
