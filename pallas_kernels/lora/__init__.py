"""Low-rank updates of a ragged batch in which every sequence has its own adapter and rank."""

from pallas_kernels.lora.api import LoraPlan, LoraSegments, lora_expand, lora_shrink, lora_update, plan_lora

__all__ = ["LoraPlan", "LoraSegments", "lora_expand", "lora_shrink", "lora_update", "plan_lora"]
