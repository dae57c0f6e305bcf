"""What the scheduler asks a policy, and the heap that all policies are made of."""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from slora_jax.scheduler.sequence import ScheduledSequence, Sequence

MAX_ABORTS = 256
"""Most sequences that one plan gives up; the others are looked at by the next plans."""


@dataclass(slots=True, eq=False)
class Entry:
    """One stay of a sequence in the queue. A sequence that comes back has a new one.

    Attributes:
      is_out: it left the queue; whoever still holds the entry drops it.
      homes: heaps to put it back to, of an entry that was taken to be looked at.
    """

    sequence: Sequence
    is_out: bool = False
    homes: list["LazyHeap"] = field(default_factory=list)

    @property
    def is_dead(self) -> bool:
        return self.is_out or not self.sequence.is_waiting

    def put_back(self) -> None:
        homes, self.homes = self.homes, []
        for heap in homes:
            heap.push(self)


class LazyHeap:
    """Entries by a key that is fixed when they come; ties by arrival. Dead ones are dropped when they surface.

    An entry may be in several heaps: taken from one, it is passed over by the others until it is put back.
    """

    def __init__(self, key: Callable[[Sequence], Any]):
        self._key = key
        self._heap: list[tuple[Any, int, int, Entry]] = []
        self._ticks = itertools.count()
        self._limit = 1024

    def push(self, entry: Entry) -> None:
        heapq.heappush(self._heap, (self._key(entry.sequence), entry.sequence.sequence_id, next(self._ticks), entry))
        if len(self._heap) > self._limit:
            # Rid of those that died deep inside; in the long run a constant time for each push.
            self._heap = [item for item in self._heap if not item[3].is_dead]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + 1024

    def peek(self) -> Entry | None:
        """The first entry, left in place."""
        heap = self._heap
        while heap:
            entry = heap[0][3]
            if not entry.is_dead and not entry.homes:
                return entry
            heapq.heappop(heap)
            if entry.homes and not entry.is_dead:
                entry.homes.append(self)
        return None

    def take(self) -> Entry | None:
        """The first entry, until it is put back."""
        entry = self.peek()
        if entry is not None:
            heapq.heappop(self._heap)
            entry.homes.append(self)
        return entry


class Policy(Protocol):
    """The order in which waiting sequences go. One instance belongs to one scheduler; pure bookkeeping, no clock.

    Each plan begins with ``begin``; then entries are taken, in order, to be looked at. Those whose sequence is neither
    started nor parked are put back before the next ``begin``. Every call costs a logarithm of what waits, at most.
    """

    def push(self, entry: Entry) -> None:
        """Takes in a sequence that arrived, or that comes back from an adapter's load or a preemption."""
        ...

    def take(self) -> Entry | None:
        """The entry that goes next, until it is put back; None if nothing (more) waits."""
        ...

    def begin(self, now: float) -> Iterable[Sequence]:
        """Notes that a plan begins at ``now`` (seconds, the scheduler's clock).

        Returns:
          At most ``MAX_ABORTS`` waiting sequences to be given up, parked ones included.
        """
        ...

    def started(self, sequence: Sequence) -> None:
        """A sequence was taken into the running batch."""
        ...

    def stopped(self, sequence: Sequence) -> None:
        """A running sequence ended or was preempted."""
        ...

    def computed(self, entries: Iterable[ScheduledSequence], now: float) -> None:
        """A step has run."""
        ...

    def standing(self, sequence: Sequence) -> Any:
        """Among running sequences: the greatest (then the last to arrive) is preempted first. Never changes."""
        ...


class Ordered:
    """A policy whose order is fixed when a sequence arrives. Also the base of others: it reacts to nothing."""

    def __init__(self, key: Callable[[Sequence], Any]):
        self._heap = LazyHeap(key)

    def push(self, entry: Entry) -> None:
        self._heap.push(entry)

    def take(self) -> Entry | None:
        return self._heap.take()

    def begin(self, now: float) -> Iterable[Sequence]:
        return ()

    def started(self, sequence: Sequence) -> None:
        pass

    def stopped(self, sequence: Sequence) -> None:
        pass

    def computed(self, entries: Iterable[ScheduledSequence], now: float) -> None:
        pass

    def standing(self, sequence: Sequence) -> Any:
        return 0


def by_arrival(sequence: Sequence) -> int:
    return sequence.sequence_id


def by_last_arrival(sequence: Sequence) -> int:
    return -sequence.sequence_id
