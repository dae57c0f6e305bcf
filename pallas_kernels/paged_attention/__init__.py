"""Attention of a ragged batch over paged K and V, and the write of new K and V into their pages."""

from pallas_kernels.paged_attention.api import AttentionPlan, paged_attention, plan_attention, write_kv

__all__ = ["AttentionPlan", "paged_attention", "plan_attention", "write_kv"]
