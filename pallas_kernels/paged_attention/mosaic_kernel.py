"""The Pallas Mosaic GPU kernel of ragged paged attention, for many query tokens on Hopper; ``hopper`` launches it.

Semantics, for every query token t of a tile, at position p of sequence s, head h of KV head
``g = h // (H // num_kv_heads)``::

    w[c]      = softmax over c in [0, p] of  scale * q[t, h] . K[row(s, c), g]
    out[t, h] = sum over c of  w[c] * V[row(s, c), g]

Tokens of a tile before all keys are padding and give 0; tokens of no tile are not written.

A program has three warpgroups. One only copies: the K and V of a block of keys come page by page, each page a TMA copy
into its rows of a swizzled tile, all of them counted by one barrier. The other two have 64 queries each and take turns:
one's softmax runs while the other's matmuls keep the tensor cores busy. A turn issues the matmul with V of one block
and the matmul with K of the next together.

TMA copies have fixed sizes, and a swizzled tile takes them only at multiples of 8 rows, but a tile of queries may begin
at any token and have any number of them. So queries and outputs pass through a buffer of plain rows. The queries of a
tile that ends the batch are read from further up, where 128 rows exist; outputs leave in copies of 64, 32, .. 1 rows.

Keys past the context are those of its last page again, masked. Their values are set to 0: rows that nobody has written
may hold NaN, which no weight hides.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pool import PAGE_SIZE

QUERY_TILE = 128
"""Most tokens of a tile."""

_ROWS = QUERY_TILE // 2
# Type checkers take a method that these classes leave to their base for one that is missing.
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
# Of 65,536 registers, in threads' shares: two computing warpgroups and one that copies.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40


class Sizes(NamedTuple):
    """How the work is cut.

    Attributes:
      block_n: keys of a block, a multiple of 64.
      stages: blocks in shared memory.
      programs: how many there are; where they are more than tiles times heads, some have nothing to do.
      turns: whether the computing warpgroups take turns.
    """

    block_n: int
    stages: int
    programs: int
    turns: int


def buffers(sizes: Sizes, head_dim: int, dtype: jnp.dtype) -> dict[str, Any]:
    """What a program has in shared memory: the ``buffers`` of ``attend``."""
    block = plgpu.SMEM((sizes.stages, sizes.block_n, head_dim), dtype, transforms=_SWIZZLED)
    loaded = plgpu.Barrier(num_arrivals=sizes.block_n // PAGE_SIZE, num_barriers=sizes.stages)
    consumed = plgpu.Barrier(num_arrivals=2, num_barriers=sizes.stages)
    return {
        "staged": plgpu.SMEM((2, _ROWS, head_dim), dtype),
        "staged_loaded": plgpu.Barrier(num_barriers=2),
        "queries": plgpu.SMEM((2, _ROWS, head_dim), dtype, transforms=_SWIZZLED),
        "k": block,
        "k_loaded": loaded,
        "k_consumed": consumed,
        "v": block,
        "v_loaded": loaded,
        "v_consumed": consumed,
        "turn": plgpu.Barrier(num_arrivals=2),
    }


class _Tile(NamedTuple):
    """What a program does at a time: a tile's tokens of one head. The last of them sees the keys before ``end``."""

    head: jax.Array
    token: jax.Array
    num_tokens: jax.Array
    sequence: jax.Array
    position: jax.Array
    end: jax.Array


def attend(
    q,  # [T, H, D]
    pool,  # [layers * 2 * num_rows, W]
    page_table,  # [S, P]
    tiles,  # [N, 4]
    num_tiles,  # [1]
    layer,  # [1]
    num_tokens,  # [1]
    out,  # [T, H, D]
    **options,
):
    """The kernel: one program does some of the tiles of some heads, the longest first.

    It is compiled for T, N and S that are larger than what is there, so none of its code may depend on them. Queries
    and outputs have ``num_tokens`` rows, at least ``QUERY_TILE``. TMA copies would reach what lies behind these, as
    their descriptors know T alone. But none comes so far: a copy of queries ends at ``num_tokens`` at the latest, and
    copies of outputs have exactly a tile's rows.

    ``options`` are ``num_rows`` (the pool's), ``num_kv_heads``, ``scale``, ``sizes``, ``interpret`` (the interpreter's
    parameters, None on a GPU) and ``buffers``.
    """
    num_heads = q.shape[1]
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    num_programs = lax.axis_size("program")

    def item_of(i):
        """Forth and back through the programs, so that none always gets the longer tiles."""
        return i * num_programs + jnp.where(_rem(i, 2) == 0, program, num_programs - 1 - program)

    def tile_of(i):
        item = item_of(i)
        # The last tiles of a sequence see the most keys: they come first.
        index = num_tiles[0] - 1 - _div(item, num_heads)
        token, num_tokens, sequence, position = (tiles[index, field] for field in range(4))
        end = jnp.maximum(position + num_tokens, 0)
        return _Tile(_rem(item, num_heads), token, num_tokens, sequence, position, end)

    num_items = num_tiles[0] * num_heads
    rounds = _div(num_items, num_programs)
    num_mine = rounds + jnp.where(item_of(rounds) < num_items, 1, 0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy = _copier(pool, page_table, layer[0], num_heads=num_heads, **options)
        num_blocks = lax.fori_loop(0, num_mine, lambda i, before: copy(tile_of(i), before), jnp.int32(0))
        _drain(num_blocks, **options)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        attend_tile = _attender(q, out, num_tokens, warpgroup, **options)
        # Half a turn apart.
        pl.when(warpgroup == 1)(partial(_switch, **options))
        lax.fori_loop(0, num_mine, lambda i, before: attend_tile(tile_of(i), before), jnp.int32(0))
        pl.when(warpgroup == 0)(partial(_switch, **options))
        plgpu.wait_smem_to_gmem(0)


def _copier(pool, page_table, layer, *, num_heads, num_rows, num_kv_heads, sizes, buffers, **_):
    """Returns a function that copies the keys and values of a tile's blocks, and counts all blocks so far."""
    head_dim = pool.shape[1] // num_kv_heads
    pages_in_block = sizes.block_n // PAGE_SIZE

    def copy_tile(tile: _Tile, before):
        columns = pl.ds(_div(tile.head, num_heads // num_kv_heads) * head_dim, head_dim)
        last_page = _div(tile.end - 1, PAGE_SIZE)
        num_blocks = _num_blocks(tile, sizes)

        def copy_block(block, _):
            index = block * pages_in_block
            pages = [page_table[tile.sequence, jnp.minimum(index + i, last_page)] for i in range(pages_in_block)]
            slot = _rem(before + block, sizes.stages)
            for plane, name in enumerate("kv"):
                pl.when(before + block >= sizes.stages)(
                    lambda name=name: plgpu.barrier_wait(buffers[f"{name}_consumed"].at[slot])
                )
                base = (2 * layer + plane) * num_rows
                for i, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        pool.at[pl.ds(base + page * PAGE_SIZE, PAGE_SIZE), columns],
                        buffers[name].at[slot, pl.ds(i * PAGE_SIZE, PAGE_SIZE)],
                        buffers[f"{name}_loaded"].at[slot],
                    )

        lax.fori_loop(0, num_blocks, copy_block, None)
        return before + num_blocks

    return copy_tile


def _drain(num_blocks, *, sizes, buffers, **_):
    """Waits until the last blocks are consumed. A GPU could do without; the interpreter wants every phase seen."""
    for slot in range(sizes.stages):

        @pl.when(num_blocks > slot)
        def _(slot=slot):
            for name in "kv":
                plgpu.barrier_wait(buffers[f"{name}_consumed"].at[slot])


def _attender(q, out, num_tokens, warpgroup, *, scale, sizes, interpret, buffers, **_):
    """Returns a function that does this warpgroup's queries of a tile, and counts all blocks so far."""
    head_dim = q.shape[2]
    block_n = sizes.block_n
    exponent = scale * math.log2(math.e)
    staged, queries = buffers["staged"].at[warpgroup], buffers["queries"].at[warpgroup]
    switch = partial(_switch, sizes=sizes, buffers=buffers)

    def attend_tile(tile: _Tile, before):
        # Where 128 rows would pass the end of the batch they begin earlier. Those that are not the tile's are computed
        # like the others, and not stored.
        start = jnp.minimum(tile.token, num_tokens[0] - QUERY_TILE) + warpgroup * _ROWS
        position = tile.position + start - tile.token
        num_blocks = _num_blocks(tile, sizes)

        def slot_of(block):
            return _rem(before + block, sizes.stages)

        def add_block(block, carry, masked=False, last=False):
            scores, acc, total, top = carry
            if masked:
                row, column = (
                    plgpu.broadcasted_iota(jnp.int32, scores.shape, i, layout=plgpu.Layout.WGMMA) for i in range(2)
                )
                scores = jnp.where(row + position >= column + block * block_n, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1) * exponent)
            weights = jnp.exp2(scores * exponent - _rows(new_top, block_n))
            decay = jnp.exp2(top - new_top)
            acc = acc * _rows(decay, head_dim)
            total = total * decay + weights.sum(axis=1)
            # Nothing of this may move into the turn.
            acc, total, top, weights = lax.optimization_barrier((acc, total, new_top, weights.astype(q.dtype)))
            slot, next_slot = slot_of(block), slot_of(block + 1)
            values = buffers["v"].at[slot]
            plgpu.barrier_wait(buffers["v_loaded"].at[slot])
            if last:
                _clear_from(values, tile.end - block * block_n)
                switch()
                (acc,) = _matmuls((acc, weights, values), then=switch, interpret=interpret)
                scores = ()
            else:
                plgpu.barrier_wait(buffers["k_loaded"].at[next_slot])
                switch()
                keys = buffers["k"].at[next_slot].transpose((1, 0))
                # The scores first: the next softmax waits for them.
                zeros = _full((_ROWS, block_n), 0)
                scores, acc = _matmuls((zeros, queries, keys), (acc, weights, values), then=switch, interpret=interpret)
                plgpu.barrier_arrive(buffers["k_consumed"].at[next_slot])
            plgpu.barrier_arrive(buffers["v_consumed"].at[slot])
            return scores, acc, total, top

        @pl.when(num_blocks == 0)
        def _():
            staged[...] = _full((_ROWS, head_dim), 0, q.dtype)

        @pl.when(num_blocks > 0)
        def _():
            plgpu.copy_gmem_to_smem(
                q.at[pl.ds(start, _ROWS), tile.head], staged, buffers["staged_loaded"].at[warpgroup]
            )
            plgpu.barrier_wait(buffers["staged_loaded"].at[warpgroup])
            queries[...] = plgpu.load(staged, layout=plgpu.Layout.WGMMA, optimized=False)
            plgpu.commit_smem()
            first_slot = slot_of(0)
            plgpu.barrier_wait(buffers["k_loaded"].at[first_slot])
            switch()

            keys = buffers["k"].at[first_slot].transpose((1, 0))
            zeros = _full((_ROWS, block_n), 0)
            (scores,) = _matmuls((zeros, queries, keys), then=switch, interpret=interpret)
            plgpu.barrier_arrive(buffers["k_consumed"].at[first_slot])
            # Keys of the first so many blocks are seen by every query.
            whole = jnp.minimum(_div(tile.position + 1, block_n), num_blocks - 1)
            carry = scores, _full((_ROWS, head_dim), 0), _full((_ROWS,), 0), _full((_ROWS,), -jnp.inf)
            carry = lax.fori_loop(0, whole, add_block, carry)
            carry = lax.fori_loop(whole, num_blocks - 1, partial(add_block, masked=True), carry)
            _, acc, total, _ = add_block(num_blocks - 1, carry, masked=True, last=True)
            staged[...] = (acc / _rows(total, head_dim)).astype(q.dtype)

        plgpu.commit_smem()
        row = jnp.clip(tile.token - start, 0, _ROWS)
        count = jnp.clip(tile.token + tile.num_tokens - start, 0, _ROWS) - row
        for size in (2**i for i in reversed(range(_ROWS.bit_length()))):

            @pl.when(count & size != 0)
            def _(row=row, size=size):
                rows = pl.ds(start + row, size)
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, size)], out.at[rows, tile.head])

            row = row + (count & size)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return before + num_blocks

    return attend_tile


def _matmuls(*operands, then, interpret):
    """``start + a @ b`` for each triple; calls ``then`` when all of them are under way."""
    if interpret is not None:
        # The interpreter knows neither accumulators that begin with a value nor factors in registers.
        then()
        return [start + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for start, a, b in operands]

    def issue(refs):
        for ref, (_, a, b) in zip(refs, operands, strict=True):
            plgpu.wgmma(ref, a, b)
        then()

    return pl.run_state(issue)([plgpu.ACC.init(start) for start, *_ in operands])


def _clear_from(values, count):
    """Sets the rows from ``count`` on to 0, in both warpgroups: to each the other's writes change nothing."""
    num_rows, num_columns = values.shape

    @pl.when(count < num_rows)
    def _():
        # In parts, as registers are scarce.
        for part in range(num_rows // 64):
            rows = values.at[pl.ds(part * 64, 64)]
            block = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)
            row = plgpu.broadcasted_iota(jnp.int32, (64, num_columns), 0, layout=plgpu.Layout.WGMMA)
            rows[...] = jnp.where(row + part * 64 < count, block, jnp.zeros_like(block))
        plgpu.commit_smem()


def _switch(*, sizes, buffers, **_):
    """Begins or ends a turn at the tensor cores: waits until the other warpgroup ends or begins its own."""
    if sizes.turns:
        plgpu.barrier_arrive(buffers["turn"])
        plgpu.barrier_wait(buffers["turn"])


def _num_blocks(tile: _Tile, sizes):
    return _div(tile.end + sizes.block_n - 1, sizes.block_n)


def _full(shape, value, dtype=jnp.float32):
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def _rows(column, width):
    """Broadcasts ``[rows]`` to ``[rows, width]``."""
    return lax.broadcast_in_dim(column, (column.shape[0], width), (0,))


def _div(a, b: int):
    """Returns the quotient of numbers that are not negative, without the corrections of ``//``."""
    return lax.div(a, jnp.int32(b))


def _rem(a, b: int):
    return lax.rem(a, jnp.int32(b))
