"""Continuous batching over the unified pool: the plan of every step, and what its results mean for the pages.

Order of a plan: running sequences decode one token each; unfinished prompts go on in chunks; then waiting sequences
are admitted, in the order of a policy, while the token budget, the sequence limit and the pages allow. Running
sequences outrank waiting ones; when pages run out the last arrived one is preempted and later recomputed, under
priorities one of the lowest. Other policies order the waiting only: an order among running sequences that changes as
they run would let two of them preempt each other in turn, and preempting the oldest would lose the most work.

Adapters come in the background, in two stretches that ``traffic`` owns. While one is loaded from disk its sequences
are parked, and the others pass them. While it is copied to the pool, its sequences are admitted with all their pages,
so that nobody can take them meanwhile, but are not computed until ``adapter_arrived``.
"""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from slora_jax.config import PAGE_SIZE, SchedulerConfig
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.layout import cdiv
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.capacity import Capacity, capacity
from slora_jax.scheduler.policies import create_policy
from slora_jax.scheduler.queue import WaitingQueue
from slora_jax.scheduler.sequence import (
    NOT_FINITE,
    AdapterHandle,
    AdapterLoad,
    Emitted,
    EndReason,
    ScheduledSequence,
    Sequence,
    State,
    StepPlan,
)
from slora_jax.scheduler.traffic import AdapterTraffic, Whereabouts, adapter_key
from slora_jax.scheduler.view import PoolView, view_pool

_MAX_MOVES = 256
"""Most sequences that one plan parks, and most that it queues again: each costs a few microseconds."""


class Scheduler:
    """Plans steps and owns the pages' accounting.

    ``slora_jax.engine.core`` is the loop that drives it: call ``plan``, start the plan's ``loads``, run its entries,
    call ``commit`` with what they sampled, and ``adapter_arrived`` once a load's copy is ordered before all steps to
    come. A plan may be made before the previous one is committed, but no further ahead.

    Args:
      clock: seconds; the same that ``Sequence.arrival`` is read from.
      costs: which of the pages that nobody uses go first.
      budget: who may take how many of the pages; None for the unified pool.
      page_tokens: tokens whose KV a page holds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pages: PageAllocator,
        clock: Callable[[], float],
        *,
        costs: PageCosts = EQUAL_COSTS,
        budget: PageBudget | None = None,
        page_tokens: int = PAGE_SIZE,
    ):
        self._costs = costs
        self._page_tokens = page_tokens
        self._config = config
        self._pages = pages
        self._budget = budget or PageBudget(pages)
        if config.prefix_cache and not self._budget.allows_prefix_cache:
            raise ValueError("this budget of pages has no room for a prefix cache; turn prefix_cache off")
        self._clock = clock
        self._policy = create_policy(config)
        # In order of standing, so that the last one is the one to preempt.
        self._running: list[Sequence] = []
        self._waiting = WaitingQueue(self._policy, config.max_wait_s)
        self._parked: dict[AdapterHandle, deque[Sequence]] = {}
        self._num_waiting = 0
        self._adapters = AdapterTraffic(self._budget, costs)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences not running: queued, parked until their adapter is loaded, or behind a leader."""
        return self._num_waiting

    @property
    def is_idle(self) -> bool:
        """No sequence at all, parked ones included."""
        return not self._running and self._num_waiting == 0

    def refusal(self, num_tokens: int, adapter: AdapterHandle | None) -> str | None:
        """Why a sequence of this length can never run, however little else does; None if it can."""
        return self._budget.refusal(
            self._token_pages(num_tokens),
            0 if adapter is None or self._adapters.is_pinned(adapter) else adapter.num_pages,
            self._adapters.pinned_pages,
        )

    def capacity(self, num_tokens: int, adapter: AdapterHandle | None) -> Capacity:
        """How many more sequences of ``num_tokens`` each, prompt and output, could start now."""
        adapter_pages = 0
        if adapter is not None and not self._adapters.is_pinned(adapter):
            adapter_pages = self._adapters.pages_to_take(adapter)
        pages = max(self._pages.num_available - self._adapters.pinned_pages_to_come, 0)
        sequences = max(self._config.max_sequences - len(self._running), 0)
        return capacity(self._token_pages(num_tokens), adapter_pages, pages, sequences)

    def _token_pages(self, num_tokens: int) -> int:
        """Pages that hold the KV of so many tokens of one sequence."""
        return cdiv(num_tokens, self._page_tokens)

    def whereabouts(self, adapter: AdapterHandle) -> Whereabouts:
        """Where an adapter is, between disk and the pool."""
        return self._adapters.whereabouts(adapter)

    def is_resident(self, adapter: AdapterHandle) -> bool:
        """Whether an adapter is in the pool, ready to compute with. From any thread."""
        return self._adapters.whereabouts(adapter).pool in ("used", "cached")

    def view(self, adapters: Iterable[tuple[str, AdapterHandle]]) -> PoolView:
        """Who owns which page now, with the adapters' names. From any thread."""
        names = {adapter_key(adapter): name for name, adapter in adapters}
        return view_pool(self._pages, self._running.copy(), names)

    def pin(self, adapters: tuple[AdapterHandle, ...]) -> None:
        """Says which adapters are to be brought to the pool and to stay there; all others are not.

        They come with the next plans.
        """
        self._adapters.pin(adapters)

    def retire(self, adapter: AdapterHandle | None, content_hash: str | None) -> None:
        """Says that no new sequence will ask for an adapter; see ``AdapterTraffic.retire``."""
        self._adapters.retire(adapter, content_hash)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. One with a leader is held until the leader's prompt is in the prefix cache."""
        self._num_waiting += 1
        leader = sequence.leader
        if leader is not None and leader.state is not State.FINISHED and self._config.prefix_cache:
            leader.followers.append(sequence)
        else:
            self._waiting.push(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, in whatever state it is, and gives its pages back. Idempotent.

        Steps in flight may still write to its pages: the device runs steps in order, so whoever gets the pages next
        writes after them.
        """
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        else:
            # Queued entries are dropped when they surface: see WaitingQueue and _unpark.
            self._num_waiting -= 1
        sequence.state = State.FINISHED
        self._release_followers(sequence)
        # Whoever keeps a finished sequence, such as a dead entry of the queue, must not keep weights in host memory.
        sequence.adapter = None

    def forsake(self, sequence: Sequence) -> None:
        """Ends a sequence and leaves its pages as they are: for a scheduler that is about to be abandoned."""
        sequence.state = State.FINISHED

    def abandon(self) -> None:
        """Lets all adapters in host memory go: this scheduler will not plan again.

        Its pages are left as they are, whatever state they are in. ``take_over`` gives the sequences that are to go on
        to another scheduler, with pages of its own.
        """
        self._adapters.abandon()

    def counts(self) -> dict[str, int]:
        """What happened to adapters and pages since this scheduler was made.

        ``adapter_prefetch_hits`` counts adapters copied ahead that were there when their first sequence started,
        ``adapter_prefetch_late`` sequences that had to wait for their adapter's copy, ``adapter_prefetch_wasted``
        adapters copied ahead that were evicted before anybody used them, and ``evictions`` blocks of adapters and
        prompts that lost their pages.
        """
        return {
            "adapter_prefetch_hits": self._adapters.num_prefetch_hits,
            "adapter_prefetch_late": self._adapters.num_prefetch_late,
            "adapter_prefetch_wasted": self._adapters.num_prefetch_wasted,
            "evictions": self._pages.num_evictions,
        }

    def take_over(self, sequence: Sequence) -> None:
        """Queues an unfinished sequence of a scheduler that was abandoned. Its known tokens are computed again.

        Leaders go before those that follow them.
        """
        sequence.state = State.WAITING
        sequence.num_scheduled = sequence.num_done = sequence.num_pending = 0
        sequence.epoch += 1
        sequence.pages = array("i")
        sequence.page_keys = []
        sequence.adapter_key = None
        sequence.followers = []
        self.add(sequence)

    def plan(self) -> StepPlan:
        """Decides the next step. Empty when nothing can run now."""
        self._adapters.begin()
        builder = _PlanBuilder(self._config.max_batch_tokens)
        builder.late.extend(self._waiting.begin(self._clock()))
        self._unpark(builder)
        pins_have_pages = self._adapters.bring_pinned()
        self._continue_running(builder)
        if pins_have_pages:
            self._admit(builder)
            next_in_line = (sequence.adapter for sequence in self._waiting.look_ahead())
            self._adapters.prefetch(filter(None, next_in_line), len(self._running))
        builder.loads = self._adapters.end(is_stalled=not self._running)
        return builder.build()

    def adapter_arrived(self, load: AdapterLoad) -> None:
        """Notes that steps to come find the load's weights in its pages. Once for each load of a plan."""
        self._adapters.arrived(load)

    def commit(self, plan: StepPlan, tokens: Iterable[int]) -> list[Emitted]:
        """Takes in what a plan's step gave. Sequences that end with it give their pages back.

        Full pages become blocks of the prefix cache, and sequences that waited for a prompt to be computed are queued.

        Args:
          plan: each is committed once, in the order in which they were made.
          tokens: for each entry of the plan the token it sampled, or ``NOT_FINITE``; anything where it samples none.

        Returns:
          The tokens of the sequences that were not finished before, in the order of the plan's entries.
        """
        self._policy.computed(plan.entries, self._clock())
        emitted: list[Emitted] = []
        ended: list[Sequence] = []
        prefix_cache = self._config.prefix_cache
        # Hundreds of entries a step, each for a millisecond's worth of the GPU: hence no calls for the usual ones.
        for place, (entry, token) in enumerate(zip(plan.entries, tokens, strict=True)):
            sequence, start, count, samples, epoch = entry
            if samples:
                sequence.num_pending -= 1
                if sequence.state is not State.FINISHED:
                    known = sequence.tokens
                    reason: EndReason | None = None
                    if token == NOT_FINITE:
                        reason = "error"
                    else:
                        known.append(token)
                        if token in sequence.end_token_ids:
                            reason = "stop"
                        elif sequence.constraint is not None and sequence.constraint.accept(token):
                            reason = "complete"
                        elif len(known) - sequence.num_prompt >= sequence.max_tokens:
                            reason = "length"
                    emitted.append(Emitted(sequence, token, place, reason))
                    if reason is not None:
                        ended.append(sequence)
            if sequence.state is not State.RUNNING or epoch != sequence.epoch:
                continue
            before, done = sequence.num_done, start + count
            if done > before:
                sequence.num_done = done
                if prefix_cache and done // self._page_tokens > before // self._page_tokens:
                    self._publish_full_pages(sequence)
            if sequence.followers and sequence.num_done >= sequence.num_prompt:
                self._release_followers(sequence)
        for sequence in ended:
            self.finish(sequence)
        return emitted

    # Running sequences

    def _continue_running(self, builder: "_PlanBuilder") -> None:
        prompts = []
        is_arriving = self._adapters.is_arriving
        any_arriving = self._adapters.is_any_arriving
        # A copy, and the state looked at each time: scheduling one may preempt others.
        for sequence in list(self._running):
            num_tokens = len(sequence.tokens) + sequence.num_pending
            scheduled = sequence.num_scheduled
            # The last token allowed is sampled but its KV never needed.
            if scheduled >= num_tokens or num_tokens - sequence.num_prompt >= sequence.max_tokens:
                continue
            if scheduled < sequence.num_prompt or num_tokens - scheduled > 1:
                prompts.append(sequence)
            elif (
                builder.budget > 0
                and sequence.state is State.RUNNING
                and not (any_arriving and is_arriving(sequence.adapter_key))
            ):
                if scheduled < len(sequence.pages) * self._page_tokens:
                    builder.add(sequence, 1)
                else:
                    self._schedule(sequence, 1, builder)
        for sequence in prompts:
            if builder.budget == 0:
                break
            if sequence.state is State.RUNNING and not is_arriving(sequence.adapter_key):
                self._schedule(sequence, self._piece_of_prompt(sequence, builder.budget), builder)

    def _piece_of_prompt(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of its prompt a sequence computes in a step with room for ``budget``.

        While others wait, a prompt of several steps takes half of each: else nobody could start before it is done.
        """
        left, most = sequence.num_tokens - sequence.num_scheduled, self._config.max_batch_tokens
        if left > most and self._num_waiting:
            budget = min(budget, -(-most // 2))
        return min(budget, left)

    def _schedule(self, sequence: Sequence, count: int, builder: "_PlanBuilder") -> None:
        """Adds ``count`` tokens of a running sequence, preempting those after it (or itself) if pages run out."""
        needed = self._token_pages(sequence.num_scheduled + count) - len(sequence.pages)
        while needed > 0:
            pages = self._budget.allocate_kv(needed)
            if pages is not None:
                sequence.pages.extend(pages)
                sequence.page_keys.extend([None] * needed)
                break
            planned = builder.planned()
            victim = next(s for s in reversed(self._running) if s.sequence_id not in planned)
            self._preempt(victim)
            builder.num_preempted += 1
            if victim is sequence:
                return
        builder.add(sequence, count)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.num_scheduled = sequence.num_done = 0
        sequence.epoch += 1
        sequence.state = State.WAITING
        self._num_waiting += 1
        self._waiting.push(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._policy.stopped(sequence)
        self._give_back(sequence)

    def _standing(self, sequence: Sequence) -> Any:
        return not sequence.is_overdue, self._policy.standing(sequence), sequence.sequence_id

    def _give_back(self, sequence: Sequence) -> None:
        # Last page first: the start of a prefix is worth more, so it is the last of equals to go.
        for page, key in zip(reversed(sequence.pages), reversed(sequence.page_keys), strict=True):
            if key is None:
                self._pages.release([page])
            else:
                self._pages.release_block(key, self._costs.prefix)
        del sequence.pages[:]
        sequence.page_keys = []
        if sequence.adapter_key is not None:
            assert sequence.adapter is not None
            self._adapters.release(sequence.adapter_key, sequence.adapter)
            sequence.adapter_key = None

    def _publish_full_pages(self, sequence: Sequence) -> None:
        full = min(sequence.num_done, len(sequence.tokens)) // self._page_tokens
        for i in range(full - 1, -1, -1):
            if sequence.page_keys[i] is not None:
                break
            key = sequence.prefix_key(i, self._page_tokens)
            if self._pages.publish(key, [sequence.pages[i]]):
                sequence.page_keys[i] = key

    # Waiting sequences

    def _release_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            if follower.state is State.WAITING:
                self._waiting.push(follower)
        leader.followers = []

    def _unpark(self, builder: "_PlanBuilder") -> None:
        moves = _MAX_MOVES
        for adapter in list(self._parked):
            self._adapters.want(adapter)
            if adapter.status not in ("ready", "failed"):
                continue
            sequences = self._parked[adapter]
            while sequences and moves:
                moves -= 1
                sequence = sequences.popleft()
                if sequence.state is not State.WAITING:
                    continue
                if adapter.status == "ready":
                    self._waiting.push(sequence)
                else:
                    builder.failed.append((sequence, adapter.failure))
            if not sequences:
                del self._parked[adapter]
        builder.is_cut |= moves == 0

    def _admit(self, builder: "_PlanBuilder") -> None:
        moves = _MAX_MOVES
        place = 0
        copy_waits = False
        given_up = {sequence.sequence_id for sequence in builder.late}
        while (
            builder.budget > 0
            and len(self._running) < self._config.max_sequences
            and moves > 0
            and (sequence := self._waiting.peek(place)) is not None
        ):
            if sequence.sequence_id in given_up:
                place += 1
                continue
            adapter = sequence.adapter
            # Adapters may have been pinned since it came.
            if self._adapters.has_pins and (reason := self.refusal(sequence.num_prompt + sequence.max_tokens, adapter)):
                moves -= 1
                builder.failed.append((self._waiting.pop(place), reason))
                continue
            if adapter is not None and not self._adapters.is_resident(adapter):
                if not self._adapters.want(adapter):
                    place += 1
                    continue
                if adapter.status == "failed":
                    moves -= 1
                    builder.failed.append((self._waiting.pop(place), adapter.failure))
                    continue
                if adapter.status != "ready":
                    moves -= 1
                    self._parked.setdefault(adapter, deque()).append(self._waiting.pop(place))
                    continue
                if copy_waits or not self._adapters.can_copy(adapter):
                    # The copies under way are enough for now. Those that need none pass; no other copy does, or a
                    # large adapter would wait for ever.
                    copy_waits = True
                    place += 1
                    continue
            is_new = not sequence.was_admitted
            if sequence.num_pending or not self._try_start(sequence):
                # Nobody overtakes the head for want of pages, or a large request would wait for ever.
                return
            self._waiting.start(place)
            insort(self._running, sequence, key=self._standing)
            self._num_waiting -= 1
            if not self._adapters.is_arriving(sequence.adapter_key):
                builder.add(sequence, self._piece_of_prompt(sequence, builder.budget))
            elif is_new:
                self._adapters.num_prefetch_late += 1
        builder.is_cut |= moves == 0

    def _try_start(self, sequence: Sequence) -> bool:
        """Takes the pages a sequence needs to compute all its known tokens, and its adapter's, or nothing."""
        adapter = sequence.adapter
        prefix = self._cached_prefix(sequence)
        kv_pages = self._token_pages(sequence.num_tokens) - len(prefix)
        # Acquiring cached blocks takes them from what is available, so count them in.
        revived = sum(self._pages.is_cached(key) for key in prefix)
        adapter_pages = self._adapters.pages_to_take(adapter) if adapter else 0
        if not self._budget.has_room(kv_pages + revived, adapter_pages):
            return False
        for key in prefix:
            sequence.pages.extend(self._pages.acquire(key))  # type: ignore[arg-type]  # never None for a cached key
            sequence.page_keys.append(key)
        if adapter is not None:
            sequence.adapter_key = self._adapters.acquire(adapter)
        pages = self._budget.allocate_kv(kv_pages)
        assert pages is not None, "there was room before the prefix was acquired"
        sequence.pages.extend(pages)
        sequence.page_keys.extend([None] * kv_pages)
        sequence.num_scheduled = sequence.num_done = len(prefix) * self._page_tokens
        sequence.state = State.RUNNING
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.started = self._clock()
            sequence.cached_tokens = sequence.num_done
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[Hashable]:
        """Keys of the leading pages found in the prefix cache; the last token is always left to compute."""
        keys: list[Hashable] = []
        if self._config.prefix_cache and not sequence.scores_prompt:
            for page in range((len(sequence.tokens) - 1) // self._page_tokens):
                key = sequence.prefix_key(page, self._page_tokens)
                if self._pages.lookup(key) is None:
                    break
                keys.append(key)
        return keys


class _PlanBuilder:
    """A plan being made. Adding an entry moves the sequence's ``num_scheduled`` and ``num_pending``."""

    def __init__(self, budget: int):
        self.budget = budget
        self.loads: list[AdapterLoad] = []
        self.failed: list[tuple[Sequence, str]] = []
        self.late: list[Sequence] = []
        self.num_preempted = 0
        self.is_cut = False
        self._entries: list[ScheduledSequence] = []

    def planned(self) -> set[int]:
        """Ids of the sequences in it so far."""
        return {entry.sequence.sequence_id for entry in self._entries}

    def add(self, sequence: Sequence, count: int) -> None:
        start = sequence.num_scheduled
        end = start + count
        samples = end == len(sequence.tokens) + sequence.num_pending
        self._entries.append(ScheduledSequence(sequence, start, count, samples, sequence.epoch))
        sequence.num_scheduled = end
        self.budget -= count

    def build(self) -> StepPlan:
        for entry in self._entries:
            if entry.samples:
                entry.sequence.num_pending += 1
        return StepPlan(
            entries=tuple(self._entries),
            loads=tuple(self.loads),
            failed=tuple(self.failed),
            num_preempted=self.num_preempted,
            late=tuple(self.late),
            is_cut=self.is_cut,
        )
