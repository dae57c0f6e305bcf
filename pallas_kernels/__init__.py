"""Kernels over the unified pool and quantised weights, each with a plain-JAX reference. Knows nothing of the engine.

The *pool* is one array ``[layers, 2, rows, W]``, rows grouped in pages of ``PAGE_SIZE``; see each function. What all
layers of a step share is worked out once, by ``plan_attention`` and ``plan_lora``.
"""

from pallas_kernels.backend import Backend, choose_backend
from pallas_kernels.collectives import (
    Collectives,
    PeerMemory,
    all_gather,
    all_reduce,
    all_reduce_norm,
    open_peer_memory,
)
from pallas_kernels.float8 import Float8Rows, ScaledProduct, add_norm_round, round_rows, silu_round
from pallas_kernels.grouped_matmul import grouped_matmul, inputs_of_block, pack_integers, unpack_integers
from pallas_kernels.lora import (
    LoraPlan,
    LoraSegments,
    SentSums,
    lora_delta,
    lora_expand,
    lora_receive,
    lora_send,
    lora_shrink,
    plan_lora,
)
from pallas_kernels.norm import rms_norm
from pallas_kernels.paged_attention import AttentionPlan, paged_attention, plan_attention, rotary_write_kv
from pallas_kernels.pool import PAGE_SIZE
from pallas_kernels.products import dot

__all__ = [
    "PAGE_SIZE",
    "AttentionPlan",
    "Backend",
    "Collectives",
    "Float8Rows",
    "LoraPlan",
    "LoraSegments",
    "PeerMemory",
    "ScaledProduct",
    "SentSums",
    "add_norm_round",
    "all_gather",
    "all_reduce",
    "all_reduce_norm",
    "choose_backend",
    "dot",
    "grouped_matmul",
    "inputs_of_block",
    "lora_delta",
    "lora_expand",
    "lora_receive",
    "lora_send",
    "lora_shrink",
    "open_peer_memory",
    "pack_integers",
    "paged_attention",
    "plan_attention",
    "plan_lora",
    "rms_norm",
    "rotary_write_kv",
    "round_rows",
    "silu_round",
    "unpack_integers",
]
