"""Early abort by a first-token objective (S-LoRA, section 5.3 and appendix B)."""

import heapq
from collections.abc import Iterable

from slora_jax.scheduler.policies.base import MAX_ABORTS, Entry, Ordered, by_last_arrival
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence

_KEPT = 0.7
"""The weight of the past in averages, as in the paper's code."""


class EarlyAbort(Ordered):
    """Gives up requests that cannot have their first token in time; of the others, the newest goes first.

    The paper takes the oldest first while no more arrive than are started. In simulation that keeps no more promises
    at any burstiness, and fewer in a pool that preempts: the oldest start with no time to spare.

    A request is given up once the time left is shorter than a prompt takes, from its start to its first token: a
    running average plus twice the deviation, in place of the paper's constant half second, and at most half of the
    objective, so that there is always something to measure. What has once started is never given up.
    """

    def __init__(self, slo_s: float):
        super().__init__(by_last_arrival)
        self._slo_s = slo_s
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._limit = 1024
        self._newest_id = -1
        self._hopeless: list[Entry] = []
        self._now = 0.0
        self._start_times: dict[int, float] = {}
        self._prefill_seconds: float | None = None
        self._deviation = 0.0

    def push(self, entry: Entry) -> None:
        super().push(entry)
        sequence = entry.sequence
        # Not those that come back, nor siblings: they come after their leader has begun to answer.
        if sequence.sequence_id > self._newest_id and sequence.leader is None:
            self._newest_id = sequence.sequence_id
            heapq.heappush(self._deadlines, (self._deadline(sequence), sequence.sequence_id, sequence))
            if len(self._deadlines) > self._limit:
                # Rid of those that started or ended; in the long run a constant time for each.
                self._deadlines = [item for item in self._deadlines if item[2].is_waiting and item[2].epoch == 0]
                heapq.heapify(self._deadlines)
                self._limit = 2 * len(self._deadlines) + 1024

    def take(self) -> Entry | None:
        while (entry := self._heap.take()) is not None:
            if not self._is_hopeless(entry.sequence):
                return entry
            self._hopeless.append(entry)
            if len(self._hopeless) == MAX_ABORTS:
                break
        return None

    def begin(self, now: float) -> Iterable[Sequence]:
        self._now = now
        for entry in self._hopeless:
            entry.put_back()
        self._hopeless.clear()
        late: list[Sequence] = []
        while self._deadlines and len(late) < MAX_ABORTS and self._deadlines[0][0] <= now + self._first_token_seconds:
            sequence = heapq.heappop(self._deadlines)[2]
            if self._is_hopeless(sequence):
                late.append(sequence)
        return late

    def started(self, sequence: Sequence) -> None:
        if sequence.epoch == 0 and sequence.leader is None:
            self._start_times[sequence.sequence_id] = self._now

    def stopped(self, sequence: Sequence) -> None:
        self._start_times.pop(sequence.sequence_id, None)

    def computed(self, entries: Iterable[ScheduledSequence], now: float) -> None:
        if not self._start_times:
            return
        for entry in entries:
            if entry.samples and (start := self._start_times.pop(entry.sequence.sequence_id, None)) is not None:
                self._average_prefill(now - start)

    @property
    def _first_token_seconds(self) -> float:
        """From a start to its first token, most likely at most."""
        return min((self._prefill_seconds or 0.0) + 2 * self._deviation, self._slo_s / 2)

    def _deadline(self, sequence: Sequence) -> float:
        return sequence.arrival + (self._slo_s if sequence.slo_s is None else sequence.slo_s)

    def _is_hopeless(self, sequence: Sequence) -> bool:
        return (
            sequence.is_waiting
            and sequence.epoch == 0
            and sequence.leader is None
            and self._deadline(sequence) <= self._now + self._first_token_seconds
        )

    def _average_prefill(self, seconds: float) -> None:
        if self._prefill_seconds is None:
            self._prefill_seconds = seconds
        self._deviation = _KEPT * self._deviation + (1 - _KEPT) * abs(seconds - self._prefill_seconds)
        self._prefill_seconds = _KEPT * self._prefill_seconds + (1 - _KEPT) * seconds
