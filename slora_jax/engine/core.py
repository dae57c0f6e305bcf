"""The loop: plan a step, start copies, launch, and take in what the step before gave. One step behind the device.

It knows neither JAX nor text, hosts or threads. What runs the steps is a ``Device``: the real one
(``slora_jax.engine.device``), one in simulated time (``slora_jax.bench.simulate``), or a test's.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from slora_jax.errors import EngineStopped
from slora_jax.request import FinishReason, TokenLogprob
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterHandle, AdapterLoad, Emitted, ScheduledSequence, Sequence, StepPlan

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""So many failures with no step that worked in between, and the loop gives up."""


class PromptScores(NamedTuple):
    """Log-probabilities of a piece of a sequence's prompt: of its tokens from position ``first`` on."""

    first: int
    logprobs: tuple[TokenLogprob, ...]


class StepResult(NamedTuple):
    """What a step gave, in the order of its entries.

    Attributes:
      tokens: the sampled token ids, or ``NOT_FINITE``; of no meaning for entries that do not sample.
      logprobs: by entry, for those whose sequence asked for log-probabilities.
      scores: by entry, for those whose sequence asked for log-probabilities of its prompt.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]
    scores: dict[int, PromptScores]


class Step(Protocol):
    """A step that the device is working on."""

    def draw(self) -> None:
        """Has it draw its tokens, if that was left open. Called once, when all steps before are taken in.

        What the tokens of some sequences may be is known only then; see ``Constraint``. The device computes the
        step's layers meanwhile, so it need not wait.
        """
        ...

    def read(self) -> StepResult:
        """Waits for the step and returns what it gave."""
        ...


class Device(Protocol):
    """Runs steps in the order of their launches, and brings adapters into the pool beside them.

    Any method may raise. ``lay_out`` changes nothing, so its failure concerns only the entries that it was given; after
    a failure of any other the loop calls ``reset``.
    """

    def start_copy(self, load: AdapterLoad) -> None:
        """Starts bringing an adapter's weights to the device. Does not wait."""
        ...

    def arrived(self) -> Iterable[AdapterLoad]:
        """The loads whose weights steps launched from now on find in their pages; each load once."""
        ...

    @property
    def is_copying(self) -> bool:
        """Whether some load has not arrived."""
        ...

    def wait_for_copy(self) -> None:
        """Waits until a load may have arrived. For when no step runs."""
        ...

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> Any:
        """Makes of a plan's entries what ``launch`` takes, on the host alone."""
        ...

    def launch(self, batch: Any) -> Step:
        """Starts a step. Does not wait for it."""
        ...

    def reset(self) -> None:
        """Forgets all that was launched and all that is in the pool. Raises if the device cannot go on."""
        ...


class Ended(NamedTuple):
    """A sequence that ended without a token: ``reason`` is "error" or "late", and ``error`` says why."""

    sequence: Sequence
    reason: FinishReason
    error: str


@dataclass(slots=True)
class Outcome:
    """What one turn of the loop brought about.

    Attributes:
      worked: whether anything was done; if not, nothing can go on until a request or an adapter arrives.
      emitted: tokens, in the order of the step's entries.
      logprobs: as in ``StepResult``, by ``Emitted.place``.
      scores: of prompts, each with its sequence. A sequence that was computed again is scored again.
      ended: sequences that ended without a token.
    """

    worked: bool = False
    emitted: list[Emitted] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    scores: list[tuple[Sequence, PromptScores]] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Core:
    """Drives one scheduler and one device. For one thread.

    A failure ends what it must and nothing else:

    - While a batch is laid out: the sequences whose own entries cannot be laid out. The others' step goes on.
    - While a step is launched, read or taken in: the sequences of that step. Then everything is made anew (the pool,
      the accounting of its pages, adapters in it, the prefix cache), and all other sequences go on.
    - While a step is planned, or a copy started: everything is made anew and nobody ends, for no step was lost. If the
      next plan fails too, the sequences end that cannot be planned even alone, or if there are none, all.

    A sequence that goes on is computed again from its known tokens: its next ones are what they would have been.
    After ``MAX_FAILURES`` in a row, or when the device cannot be made anew, the loop gives up.

    Args:
      create_scheduler: makes a scheduler with pages of its own, now and after failures.
      device: runs the steps.
      observe: is told, by name, each part of a turn as it begins: "plan", "copy", "build", "launch", "wait" (for the
        device), "commit", and "rest".

    Attributes:
      scheduler: the one in use.
      counts: of steps, tokens, loads and the like since the start.
    """

    def __init__(
        self,
        create_scheduler: Callable[[], Scheduler],
        device: Device,
        observe: Callable[[str], None] = lambda part: None,
    ):
        self._create_scheduler = create_scheduler
        self._device = device
        self._observe = observe
        self.scheduler = create_scheduler()
        self.counts = Counter(steps=0, prefill_tokens=0, decode_tokens=0, adapter_loads=0, preemptions=0, recoveries=0)
        self._pinned: tuple[AdapterHandle, ...] = ()
        self._unfinished: dict[int, Sequence] = {}
        # Launched and not read: one step, and two while the second is launched and the first is waited for.
        self._in_flight: deque[tuple[StepPlan, Step]] = deque()
        # The plan whose step is being launched, read or taken in.
        self._in_hand: StepPlan | None = None
        # The plan whose step was launched and has not drawn its tokens.
        self._not_drawn: StepPlan | None = None
        self._failures = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is no sequence, no step in flight and no copy under way."""
        return not (self._unfinished or self._in_flight or self._device.is_copying)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.scheduler.add(sequence)
        self._unfinished[sequence.sequence_id] = sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, in whatever state it is. Idempotent."""
        if self._unfinished.pop(sequence.sequence_id, None) is not None:
            self.scheduler.finish(sequence)

    def pin(self, adapters: tuple[AdapterHandle, ...]) -> None:
        """Says which adapters are to be in the pool and to stay there; all others are not."""
        if adapters is not self._pinned:
            self._pinned = adapters
            self.scheduler.pin(adapters)

    def step(self) -> Outcome:
        """Plans and launches one step while the one before runs, then takes in what that gave.

        Raises:
          EngineStopped: it cannot go on, and why.
        """
        outcome = Outcome()
        try:
            self._advance(outcome)
        except Exception as failure:
            self._recover(failure, outcome)
        self._observe("rest")
        return outcome

    def drain(self) -> None:
        """Waits for the steps in flight and drops what they give: nobody may be inside of a device that is closed."""
        while self._in_flight:
            try:
                self._in_flight.popleft()[1].read()
            except Exception as failure:
                logger.warning("a step in flight failed while the engine closed: %s", failure)

    def _advance(self, outcome: Outcome) -> None:
        self._observe("plan")
        for load in self._device.arrived():
            self.scheduler.adapter_arrived(load)
        plan = self.scheduler.plan()
        for sequence, error in plan.failed:
            self._end(sequence, "error", error, outcome)
        for sequence in plan.late:
            self._end(sequence, "late", "its first token could not come within its objective", outcome)
        self._observe("copy")
        for load in plan.loads:
            self._device.start_copy(load)
        self._count(plan)
        runs = bool(self._in_flight)
        step = self._launch(plan, outcome)
        if runs:
            self._take_in(outcome)
            self._failures = 0
        if step is not None:
            self._draw(step)
        elif not runs and self._device.is_copying:
            self._observe("wait")
            self._device.wait_for_copy()
            outcome.worked = True
        outcome.worked |= bool(self._in_flight or outcome.ended or plan.is_cut)

    def _launch(self, plan: StepPlan, outcome: Outcome) -> Step | None:
        if not plan.entries:
            return None
        self._observe("build")
        try:
            batch = self._device.lay_out(plan.entries)
        except Exception as failure:
            plan = self._without_causes(plan, failure, outcome)
            if not plan.entries:
                return None
            batch = self._device.lay_out(plan.entries)
        self._observe("launch")
        self._in_hand = plan
        step = self._device.launch(batch)
        self._in_flight.append((plan, step))
        self._in_hand, self._not_drawn = None, plan
        return step

    def _draw(self, step: Step) -> None:
        self._observe("launch")
        self._in_hand = self._not_drawn
        step.draw()
        self._in_hand = self._not_drawn = None

    def _take_in(self, outcome: Outcome) -> None:
        """Waits for the step that was launched first, and takes in what it gives."""
        self._in_hand, step = self._in_flight.popleft()
        self._observe("wait")
        result = step.read()
        self._observe("commit")
        entries = self._in_hand.entries
        outcome.scores = [(entries[place].sequence, scores) for place, scores in result.scores.items()]
        outcome.emitted = self.scheduler.commit(self._in_hand, result.tokens)
        outcome.logprobs = result.logprobs
        for emitted in outcome.emitted:
            if emitted.reason is not None:
                del self._unfinished[emitted.sequence.sequence_id]
        self._in_hand = None
        outcome.worked = True

    def _end(self, sequence: Sequence, reason: FinishReason, error: str, outcome: Outcome) -> None:
        if sequence.sequence_id in self._unfinished:
            outcome.ended.append(Ended(sequence, reason, error))
            self.finish(sequence)

    def _count(self, plan: StepPlan) -> None:
        counts = self.counts
        counts["adapter_loads"] += len(plan.loads)
        counts["preemptions"] += plan.num_preempted
        if plan.entries:
            prefill = 0
            for sequence, start, count, _, _ in plan.entries:
                if start < sequence.num_prompt:
                    prefill += min(count, sequence.num_prompt - start)
            counts["steps"] += 1
            counts["prefill_tokens"] += prefill
            counts["decode_tokens"] += plan.num_tokens - prefill

    # Failures

    def _without_causes(self, plan: StepPlan, failure: Exception, outcome: Outcome) -> StepPlan:
        """The plan without the sequences whose entries cannot be laid out even alone, which end; or without any."""
        logger.error("a batch could not be laid out", exc_info=failure)
        causes: dict[int, Exception] = {}
        for entry in plan.entries:
            try:
                self._device.lay_out((entry,))
            except Exception as own:
                causes[entry.sequence.sequence_id] = own
        causes = causes or {entry.sequence.sequence_id: failure for entry in plan.entries}
        for entry in plan.entries:
            if cause := causes.get(entry.sequence.sequence_id):
                self._end(entry.sequence, "error", f"its step could not be laid out: {in_words(cause)}", outcome)
        return plan.without(causes.keys())

    def _recover(self, failure: Exception, outcome: Outcome) -> None:
        """Makes everything anew and goes on with what need not end.

        Raises:
          EngineStopped: it gives up.
        """
        self._failures += 1
        self.counts["recoveries"] += 1
        logger.error("a step failed (%d in a row)", self._failures, exc_info=failure)
        if self._failures >= MAX_FAILURES:
            raise EngineStopped(f"the engine failed {self._failures} times in a row: {in_words(failure)}") from failure
        lost, self._in_hand = self._in_hand, None
        ended = self._sequences_of(lost)
        for sequence in ended.values():
            self.scheduler.forsake(sequence)
        while self._in_flight:
            plan, _ = self._in_flight[0]
            if plan is self._not_drawn:
                # It has no tokens that could be lost: its sequences are computed again.
                self._in_flight.popleft()
                continue
            try:
                self._take_in(outcome)
            except Exception:
                self._in_hand = None
                ended |= self._sequences_of(plan)
        self._not_drawn = None
        if lost is None and self._failures > 1:
            ended |= self._not_plannable() or self._unfinished
        try:
            self._device.reset()
        except Exception as again:
            raise EngineStopped(
                f"the engine failed ({in_words(failure)}) and could not start anew ({in_words(again)})"
            ) from failure
        self.scheduler.abandon()
        self.counts.update(self.scheduler.counts())
        self.scheduler = self._create_scheduler()
        self.scheduler.pin(self._pinned)
        for sequence in ended.values():
            self.scheduler.forsake(sequence)
            del self._unfinished[sequence.sequence_id]
            outcome.ended.append(Ended(sequence, "error", f"the engine failed and started anew: {in_words(failure)}"))
        for sequence in self._unfinished.values():
            self.scheduler.take_over(sequence)
        outcome.worked = True

    def _sequences_of(self, plan: StepPlan | None) -> dict[int, Sequence]:
        """The plan's unfinished sequences."""
        entries = plan.entries if plan else ()
        ids = [entry.sequence.sequence_id for entry in entries]
        return {i: self._unfinished[i] for i in ids if i in self._unfinished}

    def _not_plannable(self) -> dict[int, Sequence]:
        """The sequences that a scheduler of their own cannot plan."""
        found = {}
        for sequence_id, sequence in self._unfinished.items():
            alone = self._create_scheduler()
            try:
                alone.take_over(sequence)
                alone.plan()
            except Exception:
                found[sequence_id] = sequence
            alone.abandon()
        return found


def in_words(failure: BaseException) -> str:
    """The failure's kind and the first line of its message."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]
