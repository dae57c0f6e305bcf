"""Low-rank updates of a ragged batch in which every sequence has its own adapter and rank."""

from pallas_kernels.lora.api import LoraSegments, lora_expand, lora_shrink

__all__ = ["LoraSegments", "lora_expand", "lora_shrink"]
