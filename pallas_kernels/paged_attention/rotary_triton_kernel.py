"""The Triton kernel of rotary embedding and KV write; ``rotary_triton`` launches it.

Semantics, for token t and ``i < D / 2``, each row of ``qkv [T, (H + 2 * K) * D]`` seen as H heads q, K heads k, K heads
v::

    rotate(x)[i], rotate(x)[i + D / 2] = x[i] * cos - x[i + D / 2] * sin,  x[i + D / 2] * cos + x[i] * sin
    q[t, h] = rotate(q_h),    pool[layer, 0, rows[t], h] = rotate(k_h),    pool[layer, 1, rows[t], h] = v_h
"""

import triton
import triton.language as tl


@triton.jit
def _rotary_write_kernel(
    sums,  # [T, HEADS + 2 * KV_HEADS, 2 * HALF]: qkv, or the sums of a product whose scales are to be applied
    row_scale,  # [T] float32, or None
    column_scale,  # [HEADS + 2 * KV_HEADS, 2 * HALF] float32, or None
    update,  # [T, HEADS + 2 * KV_HEADS, 2 * HALF], added behind the scales; None for zeros
    cos,  # [T, HALF] float32
    sin,  # [T, HALF] float32
    rows,  # [T]
    layer,  # [1]
    num_rows,
    pool,  # [2 * layers, num_rows, KV_HEADS, 2 * HALF], or the memory of such an array of float8
    q,  # [T, HEADS, 2 * HALF]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,  # its largest number where K and V are float8, else None
):
    """One program does one token and ``BLOCK_H`` of its heads, whichever of q, k and v these are."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    inside = i[None, :] < HALF
    exists = (head[:, None] < HEADS + 2 * KV_HEADS) & inside
    in_row = head[:, None] * (2 * HALF) + i[None, :]
    source = token * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + in_row
    first = tl.load(sums + source, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(sums + source + HALF, mask=exists, other=0.0).to(tl.float32)
    if column_scale is not None:
        of_row = tl.load(row_scale + token)
        first *= of_row * tl.load(column_scale + in_row, mask=exists, other=0.0)
        second *= of_row * tl.load(column_scale + in_row + HALF, mask=exists, other=0.0)
    if update is not None:
        first += tl.load(update + source, mask=exists, other=0.0).to(tl.float32)
        second += tl.load(update + source + HALF, mask=exists, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * HALF + i, mask=i < HALF, other=0.0)[None, :]
    sine = tl.load(sin + token * HALF + i, mask=i < HALF, other=0.0)[None, :]
    # Not cos = 1 and sin = 0 for v: its own second half may be infinite.
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    turned_first = tl.where(is_v, first, first * cosine - second * sine)
    turned_second = tl.where(is_v, second, second * cosine + first * sine)

    target = q + (token * HEADS + head[:, None]) * (2 * HALF) + i[None, :]
    is_q = (head < HEADS)[:, None] & inside
    tl.store(target, turned_first.to(q.dtype.element_ty), mask=is_q)
    tl.store(target + HALF, turned_second.to(q.dtype.element_ty), mask=is_q)

    # K's plane is followed by V's, so k and v heads are alike but for the plane.
    kv_head = tl.maximum(head - HEADS, 0)
    plane = 2 * tl.load(layer).to(tl.int64) + kv_head // KV_HEADS
    row = plane * num_rows + tl.load(rows + token)
    if FLOAT8_MAX is not None:
        pool = pool.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        turned_first = tl.clamp(turned_first, -FLOAT8_MAX, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
        turned_second = tl.clamp(turned_second, -FLOAT8_MAX, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    target = pool + (row * KV_HEADS + kv_head % KV_HEADS)[:, None] * (2 * HALF) + i[None, :]
    is_kv = (head >= HEADS)[:, None] & exists
    tl.store(target, turned_first.to(pool.dtype.element_ty), mask=is_kv)
    tl.store(target + HALF, turned_second.to(pool.dtype.element_ty), mask=is_kv)
