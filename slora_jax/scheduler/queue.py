"""Sequences that wait, in order of arrival. Its cost per plan does not depend on how many there are."""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from slora_jax.scheduler.sequence import Sequence, State

LOOK_AHEAD = 64
"""Sequences at the front that a plan may look at."""

_BY_ARRIVAL = attrgetter("sequence_id")


class WaitingQueue:
    """The first sequences as a sorted list, fed by a queue of those that came in order and a heap of the others.

    Sequences that ended while they waited are dropped when they get to the front.
    """

    def __init__(self):
        self._front: list[Sequence] = []
        self._arrivals: deque[Sequence] = deque()
        self._returned: list[tuple[int, Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence at its place in the order of arrival, wherever it was before."""
        if self._front and sequence.sequence_id < self._front[-1].sequence_id:
            insort(self._front, sequence, key=_BY_ARRIVAL)
            if len(self._front) > 2 * LOOK_AHEAD:
                last = self._front.pop()
                heapq.heappush(self._returned, (last.sequence_id, last))
        elif not self._arrivals or sequence.sequence_id > self._arrivals[-1].sequence_id:
            self._arrivals.append(sequence)
        else:
            heapq.heappush(self._returned, (sequence.sequence_id, sequence))

    def peek(self, place: int) -> Sequence | None:
        """The sequence at this place from the front; None if there are fewer, or beyond ``LOOK_AHEAD``."""
        if place >= LOOK_AHEAD:
            return None
        while True:
            while len(self._front) <= place and (self._arrivals or self._returned):
                self._front.append(self._next())
            if place >= len(self._front):
                return None
            if self._front[place].state is State.WAITING:
                return self._front[place]
            del self._front[place]

    def _next(self) -> Sequence:
        if not self._returned or (self._arrivals and self._arrivals[0].sequence_id < self._returned[0][0]):
            return self._arrivals.popleft()
        return heapq.heappop(self._returned)[1]

    def pop(self, place: int) -> Sequence:
        """Takes out the sequence that ``peek`` showed at this place."""
        return self._front.pop(place)

    def look_ahead(self) -> Iterator[Sequence]:
        """The first ``LOOK_AHEAD`` sequences, left in place."""
        place = 0
        while (sequence := self.peek(place)) is not None:
            yield sequence
            place += 1
