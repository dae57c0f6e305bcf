"""Adapter clustering (S-LoRA, section 4.1 and appendix A): few adapters in a batch, at some cost in order."""

import heapq
from collections import Counter
from collections.abc import Iterable

from slora_jax.scheduler.policies.base import Entry, LazyHeap, Ordered, by_arrival
from slora_jax.scheduler.sequence import AdapterHandle, Sequence


class Clustering(Ordered):
    """First come, until ``batch_adapters`` adapters are in the running batch: from then on requests of these first.

    The base model's requests bring no adapter, so they count as one that is in the batch.
    """

    def __init__(self, batch_adapters: int):
        super().__init__(by_arrival)
        self._batch_adapters = batch_adapters
        self._waiting: dict[AdapterHandle | None, LazyHeap] = {}
        self._limit = 1024
        self._running: Counter[AdapterHandle] = Counter()
        # The first waiting sequence of each adapter in the batch; None until a plan asks for it.
        self._firsts: list[tuple[int, int, AdapterHandle | None]] | None = None

    def push(self, entry: Entry) -> None:
        super().push(entry)
        adapter = entry.sequence.adapter
        if adapter not in self._waiting:
            self._waiting[adapter] = LazyHeap(by_arrival)
        self._waiting[adapter].push(entry)

    def take(self) -> Entry | None:
        if len(self._running) >= self._batch_adapters and (entry := self._take_of_batch()) is not None:
            return entry
        return super().take()

    def begin(self, now: float) -> Iterable[Sequence]:
        self._firsts = None
        if len(self._waiting) > self._limit:
            self._waiting = {adapter: heap for adapter, heap in self._waiting.items() if heap.peek() is not None}
            self._limit = 2 * len(self._waiting) + 1024
        return ()

    def started(self, sequence: Sequence) -> None:
        adapter = sequence.adapter
        if adapter is not None:
            self._running[adapter] += 1
            if self._running[adapter] == 1 and self._firsts is not None:
                self._note_first(adapter)

    def stopped(self, sequence: Sequence) -> None:
        adapter = sequence.adapter
        if adapter is not None:
            self._running[adapter] -= 1
            if self._running[adapter] == 0:
                del self._running[adapter]

    def _take_of_batch(self) -> Entry | None:
        if self._firsts is None:
            self._firsts = []
            for adapter in (*self._running, None):
                self._note_first(adapter)
        while self._firsts:
            sequence_id, _, adapter = heapq.heappop(self._firsts)
            entry = self._waiting[adapter].peek()
            # Not the one noted if that went as the first to come.
            noted = entry is not None and entry.sequence.sequence_id == sequence_id
            if noted:
                self._waiting[adapter].take()
            self._note_first(adapter)
            if noted:
                return entry
        return None

    def _note_first(self, adapter: AdapterHandle | None) -> None:
        entry = self._waiting[adapter].peek() if adapter in self._waiting else None
        if entry is not None:
            assert self._firsts is not None, "noted before the heap is made"
            heapq.heappush(self._firsts, (entry.sequence.sequence_id, id(adapter), adapter))
