"""A plan's entries as padded arrays: one int32 buffer a step, and the static shape that says how to read it.

One buffer, because each further argument of a jitted call costs host time, and one copy moves faster than ten.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LoraSegments
from pallas_kernels.pool import owner
from slora_jax.adapters.peft import MAX_RANK
from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import cdiv
from slora_jax.memory.pages import TRASH_PAGE
from slora_jax.model.llama import TokenBatch
from slora_jax.model.modules import MODULES
from slora_jax.scheduler.sequence import ScheduledSequence

_ALIGNMENT = 32
"""Fields of the packed buffer begin at multiples of this many int32: kernels get slices of it as they lie, and expect
them aligned to 16 bytes at least."""

_NARROW_WIDTH = 512
"""Pages of the narrow page table: 8,192 tokens, or twice as many in float8. With 512 sequences it takes 1 MiB, where
that of a model of 131,072 tokens takes 16, which the host would fill and every step would copy over PCIe."""


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
class AdapterRoom:
    """What a step has room for in its adapters, wanted or not. It only grows, so that the shapes of steps settle.

    Attributes:
      active: modules that the adapters may change, increasing.
      max_rank: the largest rank, padded.
      pages: of each sequence's adapter, padded.
    """

    active: tuple[int, ...] = ()
    max_rank: int = MAX_RANK
    pages: int = 16

    def including(self, active: Iterable[int], max_rank: int, pages: int) -> "AdapterRoom":
        """Room for adapters that change these modules, of up to this rank and so many pages each, too."""
        return AdapterRoom(
            tuple(sorted({*self.active, *active})),
            max(self.max_rank, padded_rank(max_rank)),
            max(self.pages, _next_power_of_two(pages)),
        )


@dataclass(frozen=True)
class Buckets:
    """The shapes that batches are padded to: few on a CPU, where compiling is slow, many on a GPU.

    Attributes:
      decode: numbers of sequences, and of tokens, of steps in which every sequence has one token; increasing.
      tokens, sequences: those of the other steps; increasing.
      total_ranks: sums of ranks of a step's distinct adapters; increasing.
      few_ahead: compile ahead only what steps of a few short requests need: up to 256 tokens and 16 sequences, with as
        many ranks as one adapter has.
      narrow_width: pages of each sequence that a step's page table has room for, unless one of its sequences has more;
        None if all tables have room for the longest sequence allowed.
      wide: sizes of the steps in which one has more, whose tables have room for the longest allowed; the largest of
        them must be as large as those here. None if ``narrow_width`` is.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    total_ranks: tuple[int, ...]
    few_ahead: bool = False
    narrow_width: int | None = None
    wide: "Buckets | None" = None

    def __post_init__(self):
        assert (self.narrow_width is None) == (self.wide is None), "steps with longer sequences need sizes"

    @classmethod
    def coarse(cls, max_tokens: int, max_sequences: int, few_ahead: bool = True) -> "Buckets":
        """Powers of four: 4, 16, 64, ... sequences that decode, and from 16 on tokens and sequences beside prompts."""
        tokens = [4]
        while tokens[-1] * 4 < max_tokens:
            tokens.append(tokens[-1] * 4)
        if tokens[-1] < max_tokens:
            tokens.append(max_tokens)
        decode = tuple(tokens[: tokens.index(_first_at_least(tokens, max_sequences)) + 1])
        # A prompt takes as long among four sequences as among sixteen, or nearly.
        sequences = decode[1:] or (tokens[1],)
        return cls(decode, tuple(tokens[1:]), sequences, tuple(32 * 4**i for i in range(7)), few_ahead)

    @classmethod
    def fine(cls, max_tokens: int, max_sequences: int, least_rows: int = 2) -> "Buckets":
        """Close sizes, as a GPU's time follows them; steps with prompts have one S, and all steps one sum of ranks.

        Those two cost the Triton kernels nothing: their work follows the batch, not its padding. Page tables are narrow
        in most steps; a wide one takes longer to fill and copy than a small step takes.

        Args:
          max_tokens, max_sequences: of a step.
          least_rows: that the products of a step have, padding included.
        """
        # A product of one row is slower than one of two: XLA takes another path (H200: 123 against 115 µs a layer, 7B).
        sizes = [
            2,
            8,
            16,
            *range(32, 257, 32),
            *range(320, 513, 64),
            640,
            768,
            *range(1024, max_tokens + 512, 512),
        ]
        sizes = [size for size in sizes if size >= least_rows]
        decode = tuple(size for size in sizes if size < max_sequences)
        room = _first_at_least(sizes, max_sequences)
        tokens = tuple(size for size in sizes if 64 <= size < max_tokens)
        most = max(64, max_tokens)
        # Each size is compiled before the first step, and steps with a long sequence are rare and long anyway: for them
        # there are a fifth as many. 16 rows are the last with XLA's own kernels (``runner.compiler_options``); up to
        # 128 a step mostly reads the weights, whatever its rows; beyond 256 its time follows the rows, so that steps
        # with prompts are padded to at most four times theirs. As sizes of narrow steps they share those' samplers.
        wide = cls(
            (*(size for size in (16, 128) if size < room), room),
            (*(size for size in (256, 1024, 4096) if size < most), most),
            (room,),
            (MAX_RANK * max_sequences,),
        )
        return cls((*decode, room), (*tokens, most), (room,), wide.total_ranks, False, _NARROW_WIDTH, wide)

    @property
    def max_sequences(self) -> int:
        """The largest S of any step."""
        return max(self.decode[-1], self.sequences[-1])

    @property
    def max_tokens(self) -> int:
        """The largest T of any step."""
        return max(self.decode[-1], self.tokens[-1])

    def shape(
        self,
        num_tokens: int,
        num_sequences: int,
        num_pages: int,
        table_width: int,
        total_rank: int = 0,
        room: AdapterRoom = AdapterRoom(),
    ) -> "BatchShape":
        """The smallest shape that holds a batch.

        Args:
          num_tokens, num_sequences, total_rank: as in ``BatchShape``, without padding.
          num_pages: most pages that the step reads or writes of one sequence.
          table_width: pages of the longest sequence allowed.
          room: what the shape has room for if there are adapters.
        """
        assert num_pages <= table_width, f"a sequence of {num_pages} pages, where the longest allowed has {table_width}"
        width = self._width(table_width)
        if num_pages > width:
            assert self.wide is not None, "without narrow tables, all have the full width"
            return self.wide.shape(num_tokens, num_sequences, num_pages, table_width, total_rank, room)
        decode_only = num_tokens == num_sequences
        sequences = _first_at_least(self.decode if decode_only else self.sequences, num_sequences)
        tokens = sequences if decode_only else _first_at_least(self.tokens, num_tokens)
        total_rank = _first_at_least(self.total_ranks, total_rank) if total_rank else 0
        return BatchShape.with_room(tokens, sequences, width, decode_only, total_rank, room)

    def _width(self, table_width: int) -> int:
        """Pages in the tables of the steps that are not wide."""
        return table_width if self.narrow_width is None else min(self.narrow_width, table_width)

    def all_shapes(self, table_width: int, room: AdapterRoom) -> "list[BatchShape]":
        """Every shape that ``shape`` gives with this room; without active modules, those of steps without adapters."""
        width = self._width(table_width)
        wide = self.wide.all_shapes(table_width, room) if self.wide is not None and width < table_width else []
        sizes = [(n, n) for n in self.decode]
        # A step that is not of this kind has at least one token more than sequences.
        fewest = (0, *self.sequences)
        sizes += [
            (t, s) for t in self.tokens for s, below in zip(self.sequences, fewest, strict=False) if t > below + 1
        ]
        num_decode = len(self.decode)
        return [
            BatchShape.with_room(t, s, width, i < num_decode, total_rank, room)
            for total_rank in ((0, *self.total_ranks) if room.active else (0,))
            for i, (t, s) in enumerate(sizes)
        ] + wide

    def shapes_ahead(self, table_width: int, room: AdapterRoom, max_rank: int) -> "list[BatchShape]":
        """The shapes to compile before the first step.

        Args:
          table_width, room: as for ``all_shapes``.
          max_rank: of the adapters there are, without padding.
        """
        shapes = self.all_shapes(table_width, room)
        if not self.few_ahead:
            return shapes
        ranks = (0, _first_at_least(self.total_ranks, max_rank))
        return [s for s in shapes if s.tokens <= 256 and s.sequences <= 16 and s.total_rank in ranks]


def _first_at_least(values: Sequence[int], needed: int) -> int:
    for value in values:
        if value >= needed:
            return value
    raise AssertionError(f"no bucket holds {needed}; the largest is {values[-1]}")


def padded_rank(rank: int) -> int:
    """The next power of two, at least 8: few shapes of steps, and room for what is registered later."""
    return max(8, _next_power_of_two(rank))


def _next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of one padded batch: the compiled forward's key.

    Attributes:
      tokens, sequences: padded T and S.
      table_width: pages that the page table has room for of each sequence.
      total_rank: padded sum of ranks of the distinct adapters; 0 when no token has an adapter.
      adapter_pages: padded pages of the distinct adapters; 0 when no token has an adapter.
      active: modules that the adapters may change, increasing; () when no token has an adapter.
      decode_only: every sequence has one token, and T = S.
      max_rank: padded largest rank, which devices that share a model send each other; 0 when no token has an adapter.
    """

    tokens: int
    sequences: int
    table_width: int
    total_rank: int
    adapter_pages: int
    active: tuple[int, ...]
    decode_only: bool
    max_rank: int

    @classmethod
    def with_room(
        cls, tokens: int, sequences: int, table_width: int, decode_only: bool, total_rank: int, room: AdapterRoom
    ) -> "BatchShape":
        """The shape of these sizes, which are padded, with room for adapters unless the sum of ranks is 0."""
        if not total_rank:
            return cls(tokens, sequences, table_width, 0, 0, (), decode_only, 0)
        pages = _next_power_of_two(room.pages * sequences)
        return cls(tokens, sequences, table_width, total_rank, pages, room.active, decode_only, room.max_rank)

    @property
    def words(self) -> str:
        """What to call such a step in a log."""
        with_adapters = " with adapters" if self.total_rank else ""
        return f"programs for steps of up to {self.tokens} tokens{with_adapters}"

    @property
    def _fields(self) -> dict[str, tuple[slice, tuple[int, ...], np.dtype]]:
        return _places(self)

    @property
    def packed_size(self) -> int:
        """Length of the packed vector."""
        last, _, _ = list(self._fields.values())[-1]
        return last.stop + -last.stop % _ALIGNMENT

    def zeros(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A packed int32 vector of zeros, and its fields by name: views to be filled; float32 ones keep their bits.

        Zeros are right as padding, in tables too. Untouched parts cost nothing: the system hands out zeroed memory.
        """
        assert TRASH_PAGE == 0
        packed = np.zeros(self.packed_size, np.int32)
        fields = self._fields.items()
        return packed, {name: packed[at].view(dtype).reshape(shape) for name, (at, shape, dtype) in fields}

    def unpack(self, packed: jax.Array, previous_tokens: jax.Array, tokens_per_row: int = 1) -> TokenBatch:
        """The batch of a packed vector, inside jit.

        Negative token ids refer to the previous step: ``-1 - i`` is ``previous_tokens[i]``. ``tokens_per_row`` is the
        pool's.
        """
        arrays = {}
        for name, (at, shape, dtype) in self._fields.items():
            piece = packed[at].reshape(shape)
            arrays[name] = jax.lax.bitcast_convert_type(piece, dtype) if dtype != np.int32 else piece
        token_ids = arrays.pop("token_ids")
        token_ids = jnp.where(token_ids < 0, previous_tokens[jnp.maximum(-1 - token_ids, 0)], token_ids)
        page_table, query_start, context_len = (arrays.pop(n) for n in ("page_table", "query_start", "context_len"))
        positions, rows = _place_tokens(self.tokens, page_table, query_start, context_len, PAGE_SIZE * tokens_per_row)
        lora = None
        if self.total_rank:
            lora = LoraSegments(
                **arrays,
                active=self.active,
                max_rank=min(self.max_rank, self.total_rank),
                total_rank=self.total_rank,
            )
        return TokenBatch(token_ids, positions, rows, page_table, query_start, context_len, lora, self.decode_only)


@lru_cache(maxsize=1024)
def _places(batch: BatchShape) -> dict[str, tuple[slice, tuple[int, ...], np.dtype]]:
    """By name: where a field lies in the packed vector, its shape, its dtype."""
    t, s, m = batch.tokens, batch.sequences, len(MODULES)
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
    fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "token_ids": ((t,), int32),
        "page_table": ((s, batch.table_width), int32),
        "query_start": ((s + 1,), int32),
        "context_len": ((s,), int32),
    }
    if batch.total_rank:
        fields |= {
            "token_start": ((s + 1,), int32),
            "page_start": ((s + 1,), int32),
            "pages": ((batch.adapter_pages,), int32),
            "rank": ((s, m), int32),
            "start_a": ((s, m), int32),
            "start_b": ((s, m), int32),
            "scale": ((s, m), float32),
        }
    begin, places = 0, {}
    for name, (shape, dtype) in fields.items():
        size = math.prod(shape)
        places[name] = (slice(begin, begin + size), shape, dtype)
        begin += size + -size % _ALIGNMENT
    return places


def _place_tokens(num_tokens, page_table, query_start, context_len, page_tokens):
    """Position ``[T]`` of each token in its sequence, and token row ``[T]`` of its K and V; padding: 0, a trash row."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = owner(query_start, token)
    real = sequence < context_len.shape[0]
    sequence = jnp.minimum(sequence, context_len.shape[0] - 1)
    position = jnp.where(real, context_len[sequence] - query_start[sequence + 1] + token, 0)
    page = jnp.where(real, page_table[sequence, position // page_tokens], TRASH_PAGE)
    return position, page * page_tokens + position % page_tokens


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A plan laid out for the device.

    Attributes:
      shape: the static shape.
      packed: as of ``shape.zeros``, filled.
      entries: the plan's entries in row order: row i of every per-sequence array.
      entry_of_row: the place of each row's entry in the plan, ``[len(entries)]``.
      room: what there was room for, with what this batch's adapters need.
    """

    shape: BatchShape
    packed: np.ndarray
    entries: tuple[ScheduledSequence, ...]
    entry_of_row: np.ndarray
    room: AdapterRoom


def build_batch(
    entries: Sequence[ScheduledSequence],
    adapters: dict[object, AdapterSlice],
    pending_rows: dict[int, int],
    buckets: Buckets,
    table_width: int,
    page_tokens: int,
    room: AdapterRoom = AdapterRoom(),
) -> HostBatch:
    """Pads a plan's entries to a bucket, ordered so that each adapter's tokens are contiguous.

    Args:
      entries: the plan's.
      adapters: by ``sequence.adapter_key``: every adapter of the entries.
      pending_rows: by ``sequence_id``: the row that sampled the sequence's pending token in the previous step.
      buckets: allowed sizes.
      table_width: pages of the longest sequence allowed.
      page_tokens: tokens whose K and V one page holds.
      room: what to have room for in any case.
    """
    num_adapters = len(adapters)
    # Sequences without an adapter come last, behind every segment.
    order = dict(zip(adapters, range(num_adapters), strict=True)) | {None: num_adapters}
    segments = [order[e.sequence.adapter_key] for e in entries]
    rows = sorted(range(len(segments)), key=segments.__getitem__)
    entries = tuple([entries[i] for i in rows])
    segment_of = np.array(segments, np.int32)[rows]
    sequences, first_tokens, num_tokens, _, _ = zip(*entries, strict=True)
    counts = np.array(num_tokens, np.int32)
    starts = np.zeros(len(entries) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    num_real_tokens = int(starts[-1])
    contexts = np.add(first_tokens, counts)
    total_rank = 0
    if adapters:
        flat = np.frombuffer(b"".join([a.module_bytes for a in adapters.values()]), np.int32)
        modules = flat.reshape(num_adapters, 4, len(MODULES))
        total_rank = int(modules[:, 0].sum(axis=0).max())
        changed = np.flatnonzero(modules[:, 0].any(axis=0)).tolist()
        most_pages = max([len(a.pages) for a in adapters.values()])
        room = room.including(changed, int(modules[:, 0].max()), most_pages)
    shape = buckets.shape(
        num_tokens=num_real_tokens,
        num_sequences=len(entries),
        # A sequence may have pages already for tokens of its prompt that later steps compute.
        num_pages=cdiv(int(contexts.max()), page_tokens),
        table_width=table_width,
        total_rank=total_rank,
        room=room,
    )
    packed, arrays = shape.zeros()
    arrays["token_ids"][:num_real_tokens] = _token_ids(entries, pending_rows)
    arrays["query_start"][: len(starts)] = starts
    arrays["query_start"][len(starts) :] = num_real_tokens
    arrays["context_len"][: len(entries)] = contexts
    # Copied as they lie, a row at a time: tables are mostly empty, and a whole one can be 16 MiB.
    table = memoryview(arrays["page_table"].reshape(-1))
    width = shape.table_width
    place = 0
    for sequence in sequences:
        pages = sequence.pages if len(sequence.pages) <= width else sequence.pages[:width]
        table[place : place + len(pages)] = pages
        place += width
    if adapters:
        _fill_segments(arrays, adapters, modules, np.bincount(segment_of, counts, num_adapters + 1)[:num_adapters])
    return HostBatch(shape, packed, entries, np.array(rows), room)


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
