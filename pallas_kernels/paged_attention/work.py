"""How a ragged batch is cut into work for a GPU's attention kernels, on the device, once a step.

A sequence with one query token *decodes*. Its attention is bound by the bytes of K and V, so one program reads a
*chunk* of its context once for all query heads of one KV head. Contexts are cut so that few long sequences and many
short ones both give about as many programs as the GPU runs at once; the parts of a context of several chunks have to be
put together afterwards.

Every other sequence is cut into *tiles* of consecutive query tokens. Their attention is bound by operations, so one
program holds a tile's queries of one head and walks the keys up to the diagonal.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.pool import owner

ITEM_FIELDS = 8
"""Integers of a work item: token, sequence, first key, end of keys, whether it is one part of several; unused."""
ROW_FIELDS = 4
"""Integers of a decoding row: token or -1, first item, number of items; unused."""
TILE_FIELDS = 4
"""Integers of a tile: first token, number of tokens, sequence, position of the first token."""
ITEM_LEVELS = tuple(2**i for i in range(5, 12))
"""Numbers of chunks the decoding contexts can be cut into; which ones a kernel takes follows from its KV heads."""

_CHUNK_UNIT = 64
_FEW_ROWS = 16
"""Up to so many decoding rows all run at once, and putting them in order costs more than it saves."""


@struct.dataclass
class DecodeItems:
    """The contexts of the decoding sequences, cut into chunks.

    Attributes:
      items: ``[N, ITEM_FIELDS]`` int32; an item without keys is padding.
      rows: ``[R, ROW_FIELDS]`` int32, one row for each decoding token; a row without items is a padding token.
      level: static; the contexts are cut into at most ``level + R`` chunks.
    """

    items: jax.Array
    rows: jax.Array
    level: int = struct.field(pytree_node=False)


@struct.dataclass
class Tiles:
    """The query tokens of the sequences that have several, and the padding tokens, cut into tiles.

    The padding tokens are a last sequence whose positions lie before all keys, so that they see none.

    Attributes:
      records: ``[N, TILE_FIELDS]`` int32; those from ``count`` on are padding.
      count: ``[1]`` int32, how many tiles there are.
      size: static; the most tokens that a tile has.
    """

    records: jax.Array
    count: jax.Array
    size: int = struct.field(pytree_node=False)


@struct.dataclass
class Work:
    """All the work of a step, the same in every layer.

    Attributes:
      page_table: ``[S, P]`` int32, no entry negative.
      decode: the decoding sequences' contexts, cut at each level that was asked for. Under jit, what no layer uses is
        never computed.
      tiles: the other sequences' tokens; None when no sequence has several tokens.
    """

    page_table: jax.Array
    decode: tuple[DecodeItems, ...]
    tiles: Tiles | None


def cut(
    page_table: jax.Array,
    query_start: jax.Array,
    context_len: jax.Array,
    *,
    num_tokens: int,
    max_query_len: int | None,
    query_tile: int,
    min_chunk: int,
    levels: Sequence[int],
) -> Work:
    """Cuts a batch into work; the arrays and the first two sizes are those of ``plan_attention``.

    Args:
      page_table: ``[S, P]`` int32 page numbers.
      query_start: ``[S + 1]`` int32, the first query token of each sequence.
      context_len: ``[S]`` int32, the tokens of each sequence.
      num_tokens: the step's tokens with padding; static.
      max_query_len: upper bound of query tokens a sequence, None if not known; 1 leaves out the tiles. Static.
      query_tile: most tokens of a tile; static.
      min_chunk: fewest keys of a chunk of a context that has as many; static.
      levels: of ``ITEM_LEVELS``, those at which to cut the decoding contexts; static.
    """
    # A buffer of its own: XLA hands a kernel a slice of a larger buffer in place, and Triton needs 16-byte alignment.
    page_table = jnp.maximum(page_table, 0)
    num_sequences = page_table.shape[0]
    counts = jnp.diff(query_start)
    if max_query_len == 1:
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        sequence = owner(query_start, token)
        real = sequence < num_sequences
        sequence = jnp.minimum(sequence, num_sequences - 1)
        length = jnp.where(real, context_len[sequence], 0)
        tiles = None
    else:
        sequence = jnp.arange(num_sequences, dtype=jnp.int32)
        single = counts == 1
        token = jnp.where(single, query_start[:-1], -1)
        length = jnp.where(single, context_len, 0)
        tiles = cut_tiles(query_start, context_len, num_tokens=num_tokens, size=query_tile)
    decode = tuple(_decode_items(token, sequence, length, level, min_chunk) for level in levels)
    return Work(page_table, decode, tiles)


def _decode_items(token, sequence, length, level, min_chunk) -> DecodeItems:
    """Cuts contexts of ``length [R]`` into at most ``level + R`` chunks, those of one context of about one size."""
    num_rows = token.shape[0]
    if num_rows > _FEW_ROWS:
        # The longest first, so that what ends last is short.
        order = jnp.argsort(-length)
        token, sequence, length = token[order], sequence[order], length[order]
    chunk = jnp.maximum(_round_up((jnp.sum(length) + (level - 1)) // level, _CHUNK_UNIT), min_chunk)
    parts = -(-length // chunk)
    first = jnp.cumulative_sum(parts, include_initial=True).astype(jnp.int32)
    item = jnp.arange(level + num_rows, dtype=jnp.int32)
    row = owner(first, item)
    real = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    size = _round_up(-(-length // jnp.maximum(parts, 1)), _CHUNK_UNIT)[row]
    begin = (item - first[row]) * size
    end = jnp.where(real, jnp.minimum(begin + size, length[row]), begin)
    zero = jnp.zeros_like(item)
    items = jnp.stack([token[row], sequence[row], begin, end, (parts > 1)[row].astype(jnp.int32), *[zero] * 3], axis=1)
    rows = jnp.stack([token, first[:-1], parts, jnp.zeros_like(token)], axis=1)
    return DecodeItems(items, rows, level)


def cut_tiles(query_start: jax.Array, context_len: jax.Array, *, num_tokens: int, size: int) -> Tiles:
    """Cuts the tokens of sequences that have several, and the padding tokens, into tiles of at most ``size`` tokens.

    Args:
      query_start: ``[S + 1]`` int32, the first query token of each sequence.
      context_len: ``[S]`` int32, the tokens of each sequence.
      num_tokens: the step's tokens with padding; static.
      size: static.
    """
    num_sequences = context_len.shape[0]
    starts = query_start
    ends = jnp.append(query_start[1:], num_tokens).astype(jnp.int32)
    counts = ends - starts
    position = jnp.append(context_len - counts[:-1], -num_tokens).astype(jnp.int32)
    counts = jnp.where((counts == 1) & (jnp.arange(num_sequences + 1) < num_sequences), 0, counts)
    first = jnp.cumulative_sum(-(-counts // size), include_initial=True).astype(jnp.int32)
    tile = jnp.arange(num_tokens // size + num_sequences + 1, dtype=jnp.int32)
    sequence = jnp.minimum(owner(first, tile), num_sequences)
    offset = (tile - first[sequence]) * size
    count = jnp.clip(counts[sequence] - offset, 0, size)
    table_row = jnp.minimum(sequence, num_sequences - 1)
    records = jnp.stack([starts[sequence] + offset, count, table_row, position[sequence] + offset], axis=1)
    return Tiles(records, first[-1:], size)


def _round_up(value, unit):
    return -(-value // unit) * unit
