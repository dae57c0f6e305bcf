"""Orders that are known when a request arrives: first come, last come, priorities."""

from slora_jax.scheduler.policies.base import Ordered, by_arrival, by_last_arrival
from slora_jax.scheduler.sequence import Sequence


def first_come() -> Ordered:
    """First come, first served."""
    return Ordered(by_arrival)


def last_come() -> Ordered:
    """Last come, first served: what the paper compares early abort with (section 5.3)."""
    return Ordered(by_last_arrival)


class Priorities(Ordered):
    """Higher ``Sequence.priority`` first, then first come. The lowest priority is preempted first."""

    def __init__(self):
        super().__init__(_lower_first)

    def standing(self, sequence: Sequence) -> int:
        return -sequence.priority


def _lower_first(sequence: Sequence) -> int:
    return -sequence.priority
