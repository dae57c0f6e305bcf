"""Fairness by a virtual token counter (VTC, arXiv 2401.00588): tenants with work waiting get tokens in their shares."""

import heapq
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slora_jax.scheduler.policies.base import Entry, LazyHeap, Ordered, by_arrival
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence


@dataclass(slots=True, eq=False)
class _Tenant:
    """``counter`` is what it was served, priced and divided by its weight.

    ``planned`` is what the entries taken in this plan would add. ``queued_at`` is its key among the tenants with
    something waiting; None if it is not there.
    """

    weight: float
    waiting: LazyHeap = field(default_factory=lambda: LazyHeap(by_arrival))
    counter: float = 0.0
    planned: float = 0.0
    queued_at: float | None = None
    num_running: int = 0


class VirtualTokenCounter(Ordered):
    """The tenant with the smallest counter goes next, with its first request to come.

    A tenant is an adapter's name. Its counter grows by the prompt's price when a request starts (tokens found in the
    prefix cache are free, and so is what a preemption makes it compute again) and by the output's price with each
    token. A tenant that returns after it had nothing waiting is lifted to the smallest counter of those who have, so
    that no credit is saved up.
    """

    def __init__(self, weights: Mapping[str, float], input_price: float, output_price: float):
        super().__init__(by_arrival)
        self._weights = dict(weights)
        self._input_price = input_price
        self._output_price = output_price
        self._tenants: dict[str, _Tenant] = {}
        self._limit = 1024
        # Keys may be too small, for counters grow, and are mended when they surface.
        self._queue: list[tuple[float, int, _Tenant]] = []
        self._queue_limit = 1024
        self._ticks = itertools.count()
        self._taken_from: list[_Tenant] = []
        self._last_started: _Tenant | None = None

    def push(self, entry: Entry) -> None:
        tenant = self._tenant(entry.sequence)
        if tenant.waiting.peek() is None and not tenant.planned:
            tenant.counter = max(tenant.counter, self._floor())
        tenant.waiting.push(entry)
        if tenant.queued_at is None:
            self._enqueue(tenant)

    def take(self) -> Entry | None:
        tenant = self._first()
        if tenant is None:
            return None
        entry = tenant.waiting.take()
        assert entry is not None, "a tenant without waiting sequences was first"
        tenant.planned += self._price(entry.sequence, tenant, 0)
        self._taken_from.append(tenant)
        return entry

    def begin(self, now: float) -> Iterable[Sequence]:
        for tenant in self._taken_from:
            tenant.planned = 0.0
            if tenant.waiting.peek() is not None and (tenant.queued_at is None or tenant.queued_at > tenant.counter):
                self._enqueue(tenant)
        self._taken_from.clear()
        if len(self._tenants) > self._limit:
            self._forget_idle()
        return ()

    def started(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        tenant.num_running += 1
        tenant.planned = max(0.0, tenant.planned - self._price(sequence, tenant, 0))
        tenant.counter += self._price(sequence, tenant, sequence.cached_tokens)
        self._last_started = tenant

    def stopped(self, sequence: Sequence) -> None:
        self._tenant(sequence).num_running -= 1

    def computed(self, entries: Iterable[ScheduledSequence], now: float) -> None:
        for entry in entries:
            if entry.samples:
                tenant = self._tenant(entry.sequence)
                tenant.counter += self._output_price / tenant.weight

    def _price(self, sequence: Sequence, tenant: _Tenant, cached_tokens: int) -> float:
        """Of starting it."""
        if sequence.epoch:
            return 0.0
        return self._input_price * (sequence.num_prompt - cached_tokens) / tenant.weight

    def _tenant(self, sequence: Sequence) -> _Tenant:
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            tenant = self._tenants[sequence.tenant] = _Tenant(self._weights.get(sequence.tenant, 1.0))
        return tenant

    def _enqueue(self, tenant: _Tenant) -> None:
        tenant.queued_at = tenant.counter + tenant.planned
        heapq.heappush(self._queue, (tenant.queued_at, next(self._ticks), tenant))
        if len(self._queue) > self._queue_limit:
            # Rid of keys that were replaced; in the long run a constant time for each.
            self._queue = list({id(item[2]): item for item in self._queue if item[0] == item[2].queued_at}.values())
            heapq.heapify(self._queue)
            self._queue_limit = 2 * len(self._queue) + 1024

    def _first(self) -> _Tenant | None:
        """The tenant with the smallest counter of those with something waiting."""
        while self._queue:
            key, _, tenant = self._queue[0]
            if key != tenant.queued_at:
                heapq.heappop(self._queue)
            elif tenant.waiting.peek() is None:
                heapq.heappop(self._queue)
                tenant.queued_at = None
                # What it had waiting may have been taken by age, and be put back.
                self._taken_from.append(tenant)
            elif tenant.counter + tenant.planned > key:
                heapq.heappop(self._queue)
                self._enqueue(tenant)
            else:
                return tenant
        return None

    def _floor(self) -> float:
        """The least that a tenant that returns has been served."""
        first = self._first()
        if first is not None:
            return first.counter
        return self._last_started.counter if self._last_started else 0.0

    def _forget_idle(self) -> None:
        """Drops tenants that would be lifted anyway, in the long run a constant time for each that comes."""
        floor = self._floor()
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.num_running or tenant.queued_at is not None or tenant.counter > floor
        }
        self._limit = 2 * len(self._tenants) + 1024
