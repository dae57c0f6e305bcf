"""A device for the loop that computes nothing, and checks of each step that attention would read what it must."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from slora_jax.config import PAGE_SIZE, SchedulerConfig
from slora_jax.engine.core import Core, StepResult
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterLoad, ScheduledSequence, Sequence, State, StepPlan


def next_token(tokens: list[int]) -> int:
    """What the model that is not there answers."""
    return (tokens[-1] * 7 + len(tokens)) % 1000


@dataclass
class NumberStep:
    """A step in flight: its tokens are a function of the tokens before, which are known when it is read."""

    entries: tuple[ScheduledSequence, ...]

    def draw(self) -> None:
        """By now whatever constrains a sequence must have been told all tokens before the one that is drawn."""
        for entry in self.entries:
            sequence = entry.sequence
            if entry.samples and sequence.constraint is not None and sequence.state is not State.FINISHED:
                assert len(sequence.tokens) == entry.start + entry.count
                assert sequence.constraint.told == sequence.tokens[sequence.num_prompt :]

    def read(self) -> StepResult:
        return StepResult([next_token(entry.sequence.tokens) for entry in self.entries], {}, {})


@dataclass
class CheckingDevice:
    """Keeps a model of the pool's content, and asserts that each step finds there what it reads.

    Attributes:
      copy_turns: turns of the loop after which a copy has arrived.
      page_tokens: tokens that a page holds.
      kv: by page, the (adapter, page of the sequence, tokens up to and including its rows) that it holds.
      weights: by page, the adapter whose weights it holds.
    """

    copy_turns: int = 1
    page_tokens: int = PAGE_SIZE
    pages: PageAllocator | None = None
    kv: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    copies: deque[tuple[int, AdapterLoad]] = field(default_factory=deque)
    num_turns: int = 0
    num_resets: int = 0

    def start_copy(self, load: AdapterLoad) -> None:
        assert load.adapter.status == "ready"
        assert load.adapter.holds, "its weights could leave host memory while they are copied"
        self.copies.append((self.num_turns + self.copy_turns, load))

    def arrived(self) -> list[AdapterLoad]:
        self.num_turns += 1
        loads = []
        while self.copies and self.copies[0][0] <= self.num_turns:
            load = self.copies.popleft()[1]
            assert self.pages.lookup(load.key) == load.pages, "evicted while it was copied"
            for page in load.pages:
                self.weights[page] = load.adapter.content_hash
                self.kv.pop(page, None)
            loads.append(load)
        return loads

    @property
    def is_copying(self) -> bool:
        return bool(self.copies)

    def wait_for_copy(self) -> None:
        pass  # time is counted in turns

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> tuple[ScheduledSequence, ...]:
        assert len({entry.sequence.sequence_id for entry in entries}) == len(entries)
        return entries

    def launch(self, batch: tuple[ScheduledSequence, ...]) -> NumberStep:
        for entry in batch:
            sequence = entry.sequence
            assert sequence.state is State.RUNNING
            assert entry.count > 0 and (entry.start + entry.count) <= len(sequence.pages) * self.page_tokens
            self._write(entry)
            if sequence.adapter is not None:
                adapter_pages = self.pages.lookup(sequence.adapter_key)
                assert len(adapter_pages) == sequence.adapter.num_pages
                assert {self.weights[p] for p in adapter_pages} == {sequence.adapter.content_hash}
        return NumberStep(batch)

    def reset(self) -> None:
        self.num_resets += 1
        self.kv.clear()
        self.weights.clear()
        self.copies.clear()

    def _write(self, entry: ScheduledSequence) -> None:
        """Computes KV as attention would: every earlier row must hold this very sequence's prefix."""
        sequence = entry.sequence
        tokens = [*sequence.tokens, *(["pending"] * sequence.num_pending)][: entry.start + entry.count]
        identity = sequence.adapter.content_hash if sequence.adapter else None
        for position in range(entry.start + entry.count):
            page = sequence.pages[position // self.page_tokens]
            if position >= entry.start:
                if position % self.page_tokens == 0:
                    self.weights.pop(page, None)
                    self.kv[page] = (identity, position // self.page_tokens, [])
                self.kv[page][2][position % self.page_tokens :] = [tokens[position]]
            held_by, index, held = self.kv[page]
            assert (held_by, index) == (identity, position // self.page_tokens)
            assert held[position % self.page_tokens] in (tokens[position], "pending")


class RecordingScheduler(Scheduler):
    """A scheduler that keeps its last plan for tests to look at."""

    last_plan = StepPlan()

    def plan(self) -> StepPlan:
        self.last_plan = super().plan()
        return self.last_plan


class CheckedLoop:
    """The engine's loop over a ``CheckingDevice``; the accounting of pages is checked after every turn.

    Args:
      config: of the scheduler.
      num_pages: of the pool.
      clock: of the scheduler; by default it stands still.
      device: in place of a plain ``CheckingDevice``.
      kind: of the scheduler.
      costs: of the scheduler.
      page_tokens: of the scheduler, and of a plain device.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_pages: int,
        clock: Callable[[], float] = lambda: 0.0,
        device: CheckingDevice | None = None,
        kind: type[RecordingScheduler] = RecordingScheduler,
        costs: PageCosts = EQUAL_COSTS,
        page_tokens: int = PAGE_SIZE,
    ):
        self.device = device or CheckingDevice(page_tokens=page_tokens)
        self.memory = None

        def create() -> RecordingScheduler:
            self.pages = self.device.pages = PageAllocator(num_pages)
            return kind(config, self.pages, clock, costs=costs, page_tokens=page_tokens)

        self.core = Core(create, self.device)
        self.computed_tokens = 0
        self.preempted = 0

    @property
    def scheduler(self) -> RecordingScheduler:
        return self.core.scheduler

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.core.add(sequence)

    def step(self) -> StepPlan:
        """One turn; returns its plan."""
        self.turn()
        return self.scheduler.last_plan

    def turn(self):
        """One turn; returns what it brought about."""
        outcome = self.core.step()
        plan = self.scheduler.last_plan
        self.pages.check_integrity()
        if self.memory:
            self.memory.step()
        self.computed_tokens += plan.num_tokens
        self.preempted += plan.num_preempted
        return outcome

    def run(self, limit: int = 2000) -> None:
        """Turns until nothing is left to do."""
        for _ in range(limit):
            self.step()
            if self.core.is_idle:
                return
        raise AssertionError("the queue did not drain")
