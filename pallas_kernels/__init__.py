"""Kernels over the unified pool, each with a plain-JAX reference. Knows nothing of the engine: arrays in, arrays out.

The *pool* is one array ``[layers, 2, rows, W]``, rows grouped in pages of ``PAGE_SIZE``; see each function.
"""

from pallas_kernels.lora import LoraSegments, lora_expand, lora_shrink
from pallas_kernels.paged_attention import paged_attention, write_kv
from pallas_kernels.pool import PAGE_SIZE

__all__ = ["PAGE_SIZE", "LoraSegments", "lora_expand", "lora_shrink", "paged_attention", "write_kv"]
