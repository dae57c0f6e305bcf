"""Gathered LoRA for NVIDIA GPUs, from Ampere on, in Triton: plan and launches. See ``api`` for the contract.

Two kernels of ``triton_kernels`` do it: *shrink* multiplies with A, *expand* with B.

The unit of work is a *tile*: at most ``token_tile`` consecutive tokens of one segment. A tile of one token, the rule
when every sequence decodes with an adapter of its own, multiplies and adds in float32 as the rows arrive; a tile of
more reads A and B once and multiplies with the matrix unit. To shrink, the modules' rank rows are *stacked*, one after
the other, so that small ranks share a block of rows and one pass over x. What a program takes on next is an *item*: a
block of stacked rows of a tile, and for tiles of more tokens one of a few ranges of d_in, so that a batch that
shares one adapter still fills the GPU. The items of a step are counted by the real ranks and shared out in a row to a
fixed number of programs: rank is never padded, neither in bytes nor in programs. A block that is cut by the rank reads
its last row again, which costs no memory traffic, and drops the result.

Padding: tokens without an adapter are tiles of rank 0: no item of shrink is theirs, and expand writes zeros. Sums over
splits are taken in order: results do not depend on timing.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from flax import struct

from pallas_kernels import launch
from pallas_kernels.collectives.triton import mail_capacity, mail_constants
from pallas_kernels.lora import triton_kernels
from pallas_kernels.pool import PAGE_SIZE, layer_array, owner
from pallas_kernels.tuning import block_sizes, device_kind

FIELDS = 8
"""Integers of a record: first token, tokens, rank, start_a, start_b, page_start, rows in a plane, scale's bits."""

_WIDE_INPUT = 4096
"""Columns of x from which on a row of A is enough on its way for a program; of narrower ones it takes more rows."""

_LEAST_COLUMNS = 256
"""Output columns of a program of expand at the least: 512 bytes of each row of B."""


@struct.dataclass
class TritonLoraPlan:
    """What every layer of a step needs to know of its adapters.

    Attributes:
      records: ``[tiles, M, FIELDS]`` int32; a tile of no tokens is padding.
      pages: the segments' ``pages``.
      active: the segments' ``active``.
      widths: ``(d_in, d_out)`` of each module.
      token_tile: most tokens of a tile.
      max_rank: width of the partial sums.
    """

    records: jax.Array
    pages: jax.Array
    active: tuple[int, ...] = struct.field(pytree_node=False)
    widths: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    token_tile: int = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)


def plan(segments, *, num_tokens, row_width, widths):
    """Cuts the batch into tiles; ``api.plan_lora`` has the arguments' meaning."""
    del row_width
    token_tile = block_sizes("lora_plan", device_kind(), _kind(num_tokens))["token_tile"]
    # The tokens before the first and after the last segment are two more intervals, without an adapter.
    ends = jnp.clip(segments.token_start, 0, num_tokens)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    ends = jnp.concatenate([ends, jnp.full(1, num_tokens, jnp.int32)])
    tiles_before = jnp.cumulative_sum(-(-(ends - starts) // token_tile), include_initial=True).astype(jnp.int32)
    num_tiles = min(num_tokens, num_tokens // token_tile + starts.shape[0])
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    interval = jnp.minimum(owner(tiles_before, tile), starts.shape[0] - 1)
    first = starts[interval] + (tile - tiles_before[interval]) * token_tile
    tokens = jnp.clip(ends[interval] - first, 0, token_tile)
    last = segments.rank.shape[0] - 1
    segment = jnp.clip(interval - 1, 0, last)
    has_segment = (interval >= 1) & (interval - 1 <= last)

    def of_module(values):
        return jnp.broadcast_to(values[:, None], (num_tiles, len(widths)))

    num_pages = segments.page_start[segment + 1] - segments.page_start[segment]
    records = jnp.stack(
        [
            of_module(first),
            of_module(tokens),
            jnp.where(has_segment[:, None], segments.rank[segment], 0),
            segments.start_a[segment],
            segments.start_b[segment],
            of_module(segments.page_start[segment]),
            of_module(num_pages * PAGE_SIZE),
            jax.lax.bitcast_convert_type(segments.scale[segment].astype(jnp.float32), jnp.int32),
        ],
        axis=-1,
    )
    return TritonLoraPlan(
        records,
        segments.pages,
        active=segments.active,
        widths=tuple(widths),
        token_tile=token_tile,
        max_rank=segments.max_rank,
    )


class _Mail(NamedTuple):
    """How kernels on several devices bring their partial sums together.

    Attributes:
      peers: the devices' table.
      constants: of the kernels.
      by_rank: what the devices share out of A: its ranks, else its input.
      max_rank: width of what one device sends.
    """

    peers: jax.Array
    constants: dict[str, int]
    by_rank: bool
    max_rank: int


_ALONE = {"peers": None, "N": 1, "CHANNEL": 0, "HEAD": 0, "SLOT": 0, "CALLERS": 0}
"""Constants of kernels that send nothing."""


def _mail(group, by_rank: bool, max_rank: int) -> _Mail:
    # Between two sums of the base model there is one piece of mail of each kind.
    return _Mail(group.table.reshape(-1), mail_constants(0 if by_rank else 1, group), by_rank, max_rank)


def can_mail(num_tokens: int, modules, max_rank: int, group) -> bool:
    """Whether devices can send partial sums ``[num_tokens, len(modules), max_rank]`` by kernels."""
    return group.table is not None and _most_splits(num_tokens, modules, max_rank, group) > 0


def _most_splits(num_tokens: int, modules, max_rank: int, group) -> int:
    most = block_sizes("lora_shrink", device_kind(), _kind(num_tokens))["max_splits"]
    return min(most, mail_capacity(group) // (num_tokens * len(modules) * max_rank * 4))


def lora_send(x, pool, layer, plan: TritonLoraPlan, modules, group, by_rank: bool):
    """Writes every token's partial sums into all devices' memory; returns what ``lora_receive`` takes."""
    max_splits = _most_splits(x.shape[0], modules, plan.max_rank, group)
    mail = _mail(group, by_rank, plan.max_rank)
    return _shrink(x, pool, layer, plan, modules, max_splits=max_splits, mail=mail)


def lora_receive(y, sent, pool, layer, plan: TritonLoraPlan, modules, sent_rank: int, group, by_rank: bool):
    """Adds to y the updates by what all devices sent; ``sent_rank`` is the ``max_rank`` of the plan that sent."""
    ref = jax.new_ref(y)
    mail = _mail(group, by_rank, sent_rank)
    _expand(sent, y.shape[0], y.dtype, pool, layer, plan, modules, mail=mail, updated=ref)
    return jax.freeze(ref)


def lora_shrink(x, pool, layer, plan: TritonLoraPlan, modules):
    """Projects every token to its adapter's rank; ``api.lora_shrink`` has the arguments' meaning."""
    out = jnp.zeros((1, x.shape[0], len(modules), plan.max_rank), jnp.float32)
    return _shrink(x, pool, layer, plan, modules, max_splits=1, out=out)[0][0]


def lora_expand(partial_sums, pool, layer, plan: TritonLoraPlan, modules, dtype):
    """Computes every token's low-rank update; ``api.lora_expand`` has the arguments' meaning."""
    sums = partial_sums[None], jnp.ones(1, jnp.int32)
    return _expand(sums, partial_sums.shape[0], dtype, pool, layer, plan, modules)


def lora_delta(x, pool, layer, plan: TritonLoraPlan, modules):
    """Shrinks and expands; ``api.lora_delta`` has the arguments' meaning.

    With no collective between the two, the sum over splits is left to expand.
    """
    max_splits = block_sizes("lora_shrink", device_kind(), _kind(x.shape[0]))["max_splits"]
    sums = _shrink(x, pool, layer, plan, modules, max_splits=max_splits)
    return _expand(sums, x.shape[0], x.dtype, pool, layer, plan, modules)


class _Shares(NamedTuple):
    """Which items of a call of shrink each of its P programs does. Items are counted by what they cost.

    Attributes:
      begins: ``[P + 1, 2]`` int32: the number of a share's first item, and that item's tile.
      ends: ``[tiles]`` int32: the number behind a tile's last item.
      splits: ``[1]`` int32: ranges of d_in for tiles of more tokens than one.
      tile_cost: ``[1]`` int32: numbers that an item of such a tile takes up; an item of a tile of one token takes one.
    """

    begins: jax.Array
    ends: jax.Array
    splits: jax.Array
    tile_cost: jax.Array


def _share_out(plan: TritonLoraPlan, modules, ranks: int, tile_ranks: int, programs: int, max_splits: int) -> _Shares:
    """Shares out the blocks of ``ranks`` stacked rows of tiles of one token, and of ``tile_ranks`` of all others.

    There are as many splits as give every program an item of the latter. Beside tiles of one token there are more, so
    that an item is half of a program's share at most: else few programs would still be at work on such items when all
    the others have done many small ones.
    """
    rank = jnp.sum(plan.records[:, jnp.array(modules), 2], axis=1)
    tokens = plan.records[:, 0, 1]
    of_one = tokens == 1
    blocks = jnp.where(tokens > 0, jnp.where(of_one, triton.cdiv(rank, ranks), triton.cdiv(rank, tile_ranks)), 0)
    # Of a block of a tile of more tokens, in blocks of a tile of one: about as the bytes of A that they read.
    block_cost = max(tile_ranks // ranks, 1)
    small = jnp.sum(jnp.where(of_one, blocks, 0))
    cost = jnp.maximum(small + block_cost * jnp.sum(jnp.where(of_one, 0, blocks)), 1)
    of_share = block_cost * programs
    splits = jnp.where(8 * small > cost, triton.cdiv(2 * of_share, cost), of_share // cost)
    splits = jnp.clip(splits, 1, max_splits).astype(jnp.int32)
    tile_cost = jnp.maximum(block_cost // splits, 1)
    ends = jnp.cumulative_sum(blocks * jnp.where(of_one, 1, splits * tile_cost)).astype(jnp.int32)
    # ends[-1] * i // programs, of which the product may be too large for 32 bits.
    share, rest = ends[-1] // programs, ends[-1] % programs
    i = jnp.arange(programs + 1, dtype=jnp.int32)
    begin = share * i + rest * i // programs
    tile = jnp.sum(ends <= begin[:, None], axis=1, dtype=jnp.int32)
    return _Shares(jnp.stack([begin, tile], axis=1), ends, splits.reshape(1), tile_cost.reshape(1))


def _shrink(x, pool, layer, plan, modules, *, max_splits, out=None, mail: _Mail | None = None):
    """Returns partial sums ``[max_splits, T, M, max_rank]`` and the number of splits ``[1]`` int32 that were made.

    A tile of one token writes the first split only, the others all that were made. Nothing is written past a tile's
    rank: there ``out`` shows through, or whatever memory held. With ``mail`` they are in the devices' memory, and what
    is returned stands for them: ``[1]``.
    """
    num_tokens, d_in = x.shape
    num_rows, width = pool.shape[2:]
    block = block_sizes("lora_shrink", device_kind(), _kind(num_tokens))
    columns = _columns(block["columns"] // _wide(x, pool), width)
    tile_columns = _columns(block["tile_columns"] // _wide(x, pool), width)
    ranks = block["ranks"] * max(1, _WIDE_INPUT // max(triton.next_power_of_2(d_in), 1024))
    tile_ranks = block["tile_ranks"]
    matmul_dtype = _matmul_dtype(x, pool)
    if matmul_dtype == tl.float32:
        tile_ranks, tile_columns = min(tile_ranks, 32), min(tile_columns, 32)
    shares = _share_out(plan, modules, ranks, tile_ranks, block["programs"], max_splits)
    splits = shares.splits
    arguments = (
        x,
        pool,
        plan.records,
        plan.pages,
        shares.begins,
        shares.ends,
        splits,
        shares.tile_cost,
        layer_array(layer),
        num_rows,
        num_tokens,
    )
    # The kernel's last two: peers, and where partial sums go.
    out_type: jax.ShapeDtypeStruct | tuple[()] = ()
    ref = None if out is None else jax.new_ref(out)
    last: list[jax.Array | jax.Ref] = []
    if mail is not None:
        last = [mail.peers]
        out_type = jax.ShapeDtypeStruct((1,), jnp.float32)
    elif ref is not None:
        last = [ref]
    else:
        out_type = jax.ShapeDtypeStruct((max_splits, num_tokens, len(modules), plan.max_rank), jnp.float32)
    result = launch.triton_call(
        *arguments,
        *last,
        kernel=triton_kernels._shrink_kernel,
        out_type=out_type,
        grid=(block["programs"],),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.widths),
        FIELDS=FIELDS,
        PROGRAMS=block["programs"],
        PAGE=PAGE_SIZE,
        D_IN=d_in,
        W=width,
        MAX_RANK=plan.max_rank,
        TOKENS=plan.token_tile,
        RANKS=ranks,
        COLUMNS=columns,
        # Ranges of d_in begin where a block of columns does.
        SPLIT_UNIT=width if width % tile_columns else tile_columns,
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        DTYPE=matmul_dtype,
        **(_ALONE if mail is None else mail.constants),
    )
    return result if ref is None else jax.freeze(ref), splits


def _expand(sums, num_tokens, dtype, pool, layer, plan, modules, *, mail: _Mail | None = None, updated=None):
    """Sums up partial sums and multiplies with B.

    Args:
      sums: what ``_shrink`` returned.
      dtype: of the updates ``[T, sum of d_out]``, which are returned.
      updated: with ``mail``, a reference to what they are added to instead.
    """
    num_rows, width = pool.shape[2:]
    widths = tuple(plan.widths[m][1] for m in modules)
    block = block_sizes("lora_expand", device_kind(), _kind(num_tokens))
    num_tiles = plan.records.shape[0]
    columns, ranks = _columns(block["columns"], width), block["ranks"]
    # A program's rank rows come one after the other, so it is better to have more programs than longer ones: they take
    # fewer columns of more rows at a time.
    while columns > _LEAST_COLUMNS and _first_blocks(widths, width, columns)[-1] * num_tiles < block["least_programs"]:
        columns, ranks = columns // 2, ranks * 2
    tile_columns = min(block["tile_columns"], columns)
    bound = triton.next_power_of_2(plan.max_rank)
    tile_ranks = min(block["tile_ranks"], max(16, bound))
    matmul_dtype = _matmul_dtype(jax.ShapeDtypeStruct((), dtype), pool)
    if matmul_dtype == tl.float32:
        tile_ranks, tile_columns = min(tile_ranks, 32), min(tile_columns, 64)
    first_block = _first_blocks(widths, width, columns)
    first_column = (0, *itertools.accumulate(widths))
    partial_sums, splits = sums
    row = first_column[-1] if updated is None else updated.shape[1]
    # The kernel's last two: peers, and where updates go.
    last = [] if mail is None else [mail.peers, updated]
    return launch.triton_call(
        partial_sums,
        pool,
        plan.records,
        plan.pages,
        splits,
        layer_array(layer),
        num_rows,
        num_tokens,
        *last,
        kernel=triton_kernels._expand_kernel,
        out_type=() if mail is not None else jax.ShapeDtypeStruct((num_tokens, row), dtype),
        grid=(first_block[-1], num_tiles),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.widths),
        FIELDS=FIELDS,
        PAGE=PAGE_SIZE,
        WIDTHS=widths,
        FIRST_BLOCK=first_block,
        FIRST_COLUMN=first_column,
        W=width,
        MAX_RANK=plan.max_rank if mail is None else mail.max_rank,
        TOKENS=plan.token_tile,
        RANKS=min(ranks, bound),
        COLUMNS=columns,
        STAGES=block["stages"],
        SMALL_RANK=16,
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        MASKED=width % columns > 0 or any(d_out % columns for d_out in widths),
        DTYPE=matmul_dtype,
        ROW=row,
        BY_RANK=mail is not None and mail.by_rank,
        **(_ALONE if mail is None else mail.constants),
    )


def _first_blocks(widths, width: int, columns: int) -> tuple[int, ...]:
    """Returns how many blocks of columns come before each module's outputs, and how many there are in all.

    Blocks begin anew with each pool row, which holds ``width`` columns.
    """
    blocks = (d_out // width * triton.cdiv(width, columns) + triton.cdiv(d_out % width, columns) for d_out in widths)
    return 0, *itertools.accumulate(blocks)


def _kind(num_tokens):
    """Returns the key of the block sizes: that of a step that mostly decodes, or of one with prompts in it."""
    return "decode" if num_tokens <= 1024 else "prefill"


def _columns(wanted, width):
    """Returns how many columns of a pool row to take at a time.

    It is a power of two, one that divides the row if that is not too small.
    """
    divisor = width & -width
    if divisor >= min(wanted, 128):
        return min(wanted, divisor)
    return max(16, min(wanted, triton.next_power_of_2(width)))


def _wide(x, pool):
    """Returns by how much a block must be narrower for its elements' size: 2 for 32-bit elements, else 1."""
    return 2 if max(x.dtype.itemsize, pool.dtype.itemsize) > 2 else 1


def _matmul_dtype(array, pool):
    """Returns the dtype in which the matrix unit multiplies: float32 unless both are of the same 16-bit type."""
    if array.dtype == pool.dtype and pool.dtype in (jnp.bfloat16, jnp.float16):
        return tl.bfloat16 if pool.dtype == jnp.bfloat16 else tl.float16
    return tl.float32
