"""What an engine shows of itself to who looks on: the pool, and where each adapter is."""

from dataclasses import dataclass
from typing import Literal, get_args

from slora_jax.adapters.store import AdapterInfo
from slora_jax.scheduler.view import PoolView

type Tier = Literal["pool", "host", "disk"]
"""The fastest memory that has an adapter's weights: ready in the pool, in host memory, or its folder only."""

TIERS: tuple[Tier, ...] = get_args(Tier.__value__)


@dataclass(frozen=True, slots=True)
class AdapterSeen:
    """A registered adapter, and where it is."""

    info: AdapterInfo
    tier: Tier


@dataclass(frozen=True, slots=True)
class Observation:
    """An engine at one time, give or take a step.

    Attributes:
      pool: who owns which page.
      adapters: those registered, in that order.
      waiting: names of the adapters of waiting requests; of very many, those that came first.
    """

    pool: PoolView
    adapters: tuple[AdapterSeen, ...]
    waiting: tuple[str, ...]
