"""Who goes next: one small module for each rule, behind ``Policy``. Pure bookkeeping."""

from slora_jax.config import SchedulerConfig
from slora_jax.scheduler.policies.abort import EarlyAbort
from slora_jax.scheduler.policies.base import Entry, Policy
from slora_jax.scheduler.policies.cluster import Clustering
from slora_jax.scheduler.policies.fair import VirtualTokenCounter
from slora_jax.scheduler.policies.order import Priorities, first_come, last_come

__all__ = ["Entry", "Policy", "create_policy"]


def create_policy(config: SchedulerConfig) -> Policy:
    """The policy named by ``config.policy``, with its options there."""
    match config.policy:
        case "fcfs":
            return first_come()
        case "lcfs":
            return last_come()
        case "priority":
            return Priorities()
        case "cluster":
            return Clustering(config.batch_adapters)
        case "vtc":
            return VirtualTokenCounter(config.fair_weights, config.input_price, config.output_price)
        case "abort":
            return EarlyAbort(config.slo_ms / 1000)
