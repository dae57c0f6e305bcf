"""Attention of a ragged batch over paged K and V, and the write of new K and V into their pages."""

from pallas_kernels.paged_attention.api import paged_attention, write_kv

__all__ = ["paged_attention", "write_kv"]
