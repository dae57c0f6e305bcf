"""Attention of a ragged batch over paged K and V; rotary embedding and the write of new K and V into their pages."""

from pallas_kernels.paged_attention.api import AttentionPlan, paged_attention, plan_attention, rotary_write_kv

__all__ = ["AttentionPlan", "paged_attention", "plan_attention", "rotary_write_kv"]
