"""Which replica of several answers a request: rules that know how busy each is, and which adapter is asked for.

Pure functions of what they are told, so that the Ray Serve application, the simulation and the tests run the same ones.
"""

import hashlib
import random
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

type Rule = Literal["affinity_with_spill", "affinity", "least_queue", "random"]
RULES: tuple[Rule, ...] = get_args(Rule.__value__)

OVER = 1.25
"""How many times the mean load a replica may have, and still get more of the adapters that are at home there."""


class Routing(Protocol):
    """A rule."""

    def order(self, adapter: str | None, load: Mapping[str, int]) -> list[str]:
        """The replicas in the order in which they should be offered a request.

        Args:
          adapter: that it asks for; None for the base model, which every replica has.
          load: requests that each replica answers now, by its name. There is at least one.
        """
        ...


class Random:
    """Any replica."""

    def __init__(self, seed: int | None = None):
        self._draws = random.Random(seed)

    def order(self, adapter: str | None, load: Mapping[str, int]) -> list[str]:
        return self._draws.sample(list(load), len(load))


class LeastQueue:
    """The replica that answers fewest requests; one of them at random."""

    def __init__(self, seed: int | None = None):
        self._draws = random.Random(seed)

    def order(self, adapter: str | None, load: Mapping[str, int]) -> list[str]:
        return sorted(load, key=lambda replica: (load[replica], self._draws.random()))


class Affinity:
    """An adapter's home, however busy it is.

    Homes are given by rendezvous hashing: whoever knows the replicas' names comes to the same order, and where one
    replica comes or goes, only its own adapters move.
    """

    def __init__(self, seed: int | None = None):
        self._base = LeastQueue(seed)

    def order(self, adapter: str | None, load: Mapping[str, int]) -> list[str]:
        if adapter is None:
            return self._base.order(None, load)
        return sorted(load, key=lambda replica: _score(adapter, replica), reverse=True)


class AffinityWithSpill:
    """An adapter's home unless that is busier than others, then its second home, and so on.

    This is rendezvous hashing with bounded loads. A replica takes no more than ``OVER`` times the mean load, so an
    adapter with more traffic than that has as many homes as it needs, always the same ones; all others have one.

    Args:
      spill_at: requests that a replica answers beside each other as easily as fewer: with fewer than so many it is not
        busy, whatever the others do.
    """

    def __init__(self, spill_at: int, seed: int | None = None):
        self._spill_at = spill_at
        self._homes = Affinity(seed)

    def order(self, adapter: str | None, load: Mapping[str, int]) -> list[str]:
        order = self._homes.order(adapter, load)
        if adapter is None:
            return order
        # One more, for the request itself. OVER is above 1, so there is always a replica below the limit.
        limit = max(self._spill_at, OVER * (sum(load.values()) + 1) / len(load))
        roomy = [replica for replica in order if load[replica] < limit]
        return roomy + sorted((replica for replica in order if load[replica] >= limit), key=load.__getitem__)


def create_routing(rule: Rule, spill_at: int, seed: int | None = None) -> Routing:
    """The rule of this name; ``spill_at`` is of those that spill, ``seed`` of those that draw."""
    match rule:
        case "affinity_with_spill":
            return AffinityWithSpill(spill_at, seed)
        case "affinity":
            return Affinity(seed)
        case "least_queue":
            return LeastQueue(seed)
        case "random":
            return Random(seed)


def _score(adapter: str, replica: str) -> bytes:
    # Not hash(), whose values differ from process to process.
    return hashlib.blake2b(f"{adapter}\0{replica}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
