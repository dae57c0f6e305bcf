"""Low-rank updates of a ragged batch in which every sequence has its own adapter and rank."""

from pallas_kernels.lora.api import (
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

__all__ = [
    "LoraPlan",
    "LoraSegments",
    "SentSums",
    "lora_delta",
    "lora_expand",
    "lora_receive",
    "lora_send",
    "lora_shrink",
    "plan_lora",
]
