"""Rotary embedding and KV write for NVIDIA GPUs, from Ampere on, in Triton: the launch. See ``api`` for the contract.

The work is bound by the bytes of ``qkv``, read once and written once, and by the launch when there are few tokens. So a
program takes one token and a block of its heads, whatever these are, and one launch does q, k and v.
"""

import jax
import triton

from pallas_kernels import launch
from pallas_kernels.float8.types import ScaledProduct, operands_of
from pallas_kernels.paged_attention import rotary_triton_kernel
from pallas_kernels.pool import FLOAT8_MAX, layer_array
from pallas_kernels.tuning import block_sizes, device_kind


def rotary_write_kv(qkv, rope, pool, layer, rows, *, num_kv_heads, head_dim, tokens_per_row=1):
    """Rotates q and k, and writes K and V; ``api.rotary_write_kv`` has the arguments' meaning."""
    q_dtype = pool.dtype if isinstance(qkv, ScaledProduct) else qkv.dtype
    num_tokens, width = qkv.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    sizes = block_sizes("rotary_write_kv", device_kind(), "any")
    pool_ref = jax.new_ref(pool)
    q = launch.triton_call(
        *operands_of(qkv),
        *rope,
        rows,
        layer_array(layer),
        pool.shape[2] * tokens_per_row,
        pool_ref,
        kernel=rotary_triton_kernel._rotary_write_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), q_dtype),
        grid=(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, sizes["block_h"])),
        num_warps=sizes["num_warps"],
        num_stages=1,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_H=sizes["block_h"],
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        FLOAT8_MAX=FLOAT8_MAX if tokens_per_row > 1 else None,
    )
    return q, jax.freeze(pool_ref)
