"""Sequences that wait, in a policy's order, and a bound on their waiting that holds under every policy."""

from collections.abc import Iterable, Iterator

from slora_jax.scheduler.policies import Entry, Policy
from slora_jax.scheduler.policies.base import LazyHeap, by_arrival
from slora_jax.scheduler.sequence import Sequence

LOOK_AHEAD = 64
"""Sequences at the front that a plan may look at."""

OVERDUE_TURN = 8
"""Every one of so many starts belongs to a sequence that has waited for too long, if there is one."""


class WaitingQueue:
    """What a plan sees of the waiting sequences: the first ``LOOK_AHEAD`` in the policy's order.

    The bound: a sequence is *overdue* once ``max_wait_s`` have passed since it arrived. Of every ``OVERDUE_TURN``
    starts one belongs to the oldest overdue sequence in the queue, whatever the policy says. So one that is overdue
    together with k older ones starts after at most ``OVERDUE_TURN * (k + 1)`` starts; and what starts so is preempted
    only for older ones of its kind. A turn in so many, and not all of them: with more requests than can be served
    everybody is overdue in the end, and a bound that always went first would turn every policy into first come.

    Sequences that ended while they waited are dropped when they get to the front. A plan costs the same however many
    wait.
    """

    def __init__(self, policy: Policy, max_wait_s: float):
        self._policy = policy
        self._max_wait_s = max_wait_s
        self._by_age = LazyHeap(by_arrival)
        self._front: list[Entry] = []
        self._due: Entry | None = None
        self._starts = 0
        self._now = 0.0

    def push(self, sequence: Sequence) -> None:
        """Queues a sequence that is not queued, whether it is new or comes back."""
        entry = Entry(sequence)
        self._policy.push(entry)
        self._by_age.push(entry)

    def begin(self, now: float) -> Iterable[Sequence]:
        """Begins a plan: the order is taken anew.

        Returns:
          Waiting sequences that the policy gives up.
        """
        self._now = now
        for entry in self._front:
            entry.put_back()
        self._front.clear()
        late = self._policy.begin(now)
        self._due = None
        self._call_overdue(0)
        return late

    def peek(self, place: int) -> Sequence | None:
        """The sequence at this place from the front; None if there are fewer, or beyond ``LOOK_AHEAD``."""
        while place < LOOK_AHEAD:
            while len(self._front) <= place:
                entry = self._policy.take()
                if entry is None:
                    return None
                self._front.append(entry)
            if not self._front[place].is_dead:
                return self._front[place].sequence
            del self._front[place]
        return None

    def pop(self, place: int) -> Sequence:
        """Takes out the sequence that ``peek`` showed at this place, not to start it."""
        entry = self._take_out(place)
        if entry is self._due:
            self._due = None
            self._call_overdue(place)
        return entry.sequence

    def start(self, place: int) -> None:
        """Takes out the sequence at this place, which starts."""
        entry = self._take_out(place)
        self._policy.started(entry.sequence)
        if entry is self._due:
            entry.sequence.is_overdue = True
            self._due = None
            self._starts = 0
        else:
            self._starts += 1
            self._call_overdue(place)

    def look_ahead(self) -> Iterator[Sequence]:
        """The first ``LOOK_AHEAD`` sequences, left in place."""
        place = 0
        while (sequence := self.peek(place)) is not None:
            yield sequence
            place += 1

    def _take_out(self, place: int) -> Entry:
        entry = self._front.pop(place)
        entry.is_out = True
        return entry

    def _call_overdue(self, place: int) -> None:
        """If it is their turn, puts the oldest overdue sequence here, or leaves it at the place where it was passed."""
        if self._due is not None or self._starts < OVERDUE_TURN - 1:
            return
        for entry in self._front[place:]:
            entry.put_back()
        del self._front[place:]
        oldest = self._by_age.peek()
        passed = min(self._front, key=lambda entry: by_arrival(entry.sequence), default=None)
        if passed is not None and (oldest is None or by_arrival(passed.sequence) < by_arrival(oldest.sequence)):
            oldest = passed
        if oldest is None or self._now - oldest.sequence.arrival < self._max_wait_s:
            return
        self._due = oldest
        if oldest is not passed:
            taken = self._by_age.take()
            assert taken is oldest, "the oldest changed while it was looked at"
            self._front.insert(place, oldest)
