"""Continuous batching over the unified pool: the plan of every step, and what its results mean for the pages.

Order of a plan: running sequences decode one token each; unfinished prompts go on in chunks; then waiting sequences
are admitted, in the order of a policy, while the token budget, the sequence limit and the pages allow. Running
sequences outrank waiting ones; when pages run out the last arrived one is preempted and later recomputed, under
priorities one of the lowest. Other policies order the waiting only: an order among running sequences that changes as
they run would let two of them preempt each other in turn, and preempting the oldest would lose the most work.

Adapters come in two steps, both in the background. From disk to host memory: their sequences are parked, and the
others pass them. From host memory to the pool: a sequence is admitted with all its pages, so that nobody can take
them meanwhile, but is not computed until ``adapter_arrived``. Adapters of the sequences next in line are copied ahead.
One that is in the pool needs neither.

Host memory is bounded, so an adapter is held there only from the time that a sequence near the front wants it until its
copy has arrived. What is held can always go on, or is let go: the first of the sequences near the front whose adapter
is there starts unless pages lack, and pages lack only while others run; and as soon as nothing runs, nothing is held
but for sequences near the front and parked ones, whose loads thus find room.
"""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from slora_jax.config import PAGE_SIZE, SchedulerConfig
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.capacity import Capacity, capacity
from slora_jax.scheduler.policies import create_policy
from slora_jax.scheduler.queue import LOOK_AHEAD, WaitingQueue
from slora_jax.scheduler.sequence import (
    NOT_FINITE,
    AdapterHandle,
    AdapterLoad,
    Emitted,
    ScheduledSequence,
    Sequence,
    State,
    StepPlan,
)

MAX_HELD_ADAPTERS = 2 * LOOK_AHEAD
"""Adapters held in host memory, or on their way there, for waiting sequences."""

_HOLD_PLANS = 32
"""Plans for which an adapter stays held though its sequences are not near the front (any more)."""

_MAX_MOVES = 256
"""Most sequences that one plan parks, and most that it queues again: each costs a few microseconds."""

_COPY_SHARE = 32
"""Copies under way have room in device memory of their own; all together at most one page in this many of the pool."""


class Scheduler:
    """Plans steps and owns the pages' accounting.

    ``slora_jax.engine.core`` is the loop that drives it: call ``plan``, start the plan's ``loads``, run its entries,
    call ``commit`` with what they sampled, and ``adapter_arrived`` once a load's copy is ordered before all steps to
    come. A plan may be made before the previous one is committed, but no further ahead.

    Args:
      clock: seconds; the same that ``Sequence.arrival`` is read from.
      costs: which of the pages that nobody uses go first.
      budget: who may take how many of the pages; None for the unified pool.

    Attributes:
      num_prefetch_hits: adapters copied ahead that were there when their first sequence started.
      num_prefetch_late: sequences that had to wait for their adapter's copy.
      num_prefetch_wasted: adapters copied ahead that were evicted before anybody used them.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pages: PageAllocator,
        clock: Callable[[], float],
        *,
        costs: PageCosts = EQUAL_COSTS,
        budget: PageBudget | None = None,
    ):
        self._costs = costs
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
        # The plan that last wanted each; the longest unwanted one first.
        self._held: dict[AdapterHandle, int] = {}
        self._num_plans = 0
        self._pinned: tuple[AdapterHandle, ...] = ()
        # Blocks owned for pins, by adapter.
        self._pin_keys: dict[AdapterHandle, Hashable] = {}
        self._num_waiting = 0
        self._arriving: dict[Hashable, AdapterLoad] = {}
        self._arriving_pages = 0
        self._prefetched: set[Hashable] = set()
        self.num_prefetch_hits = 0
        self.num_prefetch_late = 0
        self.num_prefetch_wasted = 0
        self._num_evictions_seen = 0

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
        pinned_pages = self._pages_by_pin()
        takes_pages = adapter is not None and _content(adapter) not in pinned_pages
        return self._budget.refusal(
            PoolLayout.token_pages(num_tokens),
            adapter.num_pages if takes_pages else 0,
            sum(pinned_pages.values()),
        )

    def capacity(self, num_tokens: int, adapter: AdapterHandle | None) -> Capacity:
        """How many more sequences of ``num_tokens`` each, prompt and output, could start now."""
        pinned_pages = self._pages_by_pin()
        arrived = {_content(pin) for pin in self._pin_keys}
        to_come = sum(pages for content, pages in pinned_pages.items() if content not in arrived)
        adapter_pages = 0
        # Without an owner its pages are among those available.
        if (
            adapter is not None
            and _content(adapter) not in pinned_pages
            and (not self._is_resident(adapter) or self._pages.is_cached(_key(adapter)))
        ):
            adapter_pages = adapter.num_pages
        pages = max(self._pages.num_available - to_come, 0)
        sequences = max(self._config.max_sequences - len(self._running), 0)
        return capacity(num_tokens, adapter_pages, pages, sequences)

    def pin(self, adapters: tuple[AdapterHandle, ...]) -> None:
        """Says which adapters are to be brought to the pool and to stay there; all others are not.

        They come with the next plans.
        """
        self._pinned = adapters
        assert sum(self._pages_by_pin().values()) <= self._budget.max_pinned_pages, "too many pinned pages"
        for adapter in [a for a in self._pin_keys if a not in adapters]:
            self._release_adapter(self._pin_keys.pop(adapter), adapter)

    def _pages_by_pin(self) -> dict[Hashable, int]:
        """Pages that pinned adapters take or will take; those of equal weights share them."""
        return {_content(adapter): adapter.num_pages for adapter in self._pinned if adapter.status != "failed"}

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

    def forsake(self, sequence: Sequence) -> None:
        """Ends a sequence and leaves its pages as they are: for a scheduler that is about to be abandoned."""
        sequence.state = State.FINISHED

    def abandon(self) -> None:
        """Lets all adapters in host memory go: this scheduler will not plan again.

        Its pages are left as they are, whatever state they are in. ``take_over`` gives the sequences that are to go on
        to another scheduler, with pages of its own.
        """
        held = (*self._held, *(load.adapter for load in self._arriving.values()))
        self._held.clear()
        self._arriving.clear()
        for adapter in held:
            adapter.let_go()

    def counts(self) -> dict[str, int]:
        """What happened to adapters and pages since this scheduler was made."""
        return {
            "adapter_prefetch_hits": self.num_prefetch_hits,
            "adapter_prefetch_late": self.num_prefetch_late,
            "adapter_prefetch_wasted": self.num_prefetch_wasted,
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
        self._num_plans += 1
        builder = _PlanBuilder(self._config.max_batch_tokens)
        builder.late.extend(self._waiting.begin(self._clock()))
        self._unpark(builder)
        pins_have_pages = self._bring_pinned(builder)
        self._continue_running(builder)
        if pins_have_pages:
            self._admit(builder)
            self._prefetch(builder)
        self._let_unwanted_go(stalled=not (self._running or self._arriving))
        if self._pages.num_evictions != self._num_evictions_seen:
            self._num_evictions_seen = self._pages.num_evictions
            for key in [key for key in self._prefetched if self._pages.lookup(key) is None]:
                self._note_wasted(key)
        return builder.build()

    def adapter_arrived(self, load: AdapterLoad) -> None:
        """Notes that steps to come find the load's weights in its pages. Once for each load of a plan."""
        del self._arriving[load.key]
        self._arriving_pages -= len(load.pages)
        # The copy's own ownership; sequences admitted meanwhile have theirs.
        self._release_adapter(load.key, load.adapter)
        load.adapter.let_go()

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
        emitted = []
        for place, (entry, token) in enumerate(zip(plan.entries, tokens, strict=True)):
            sequence = entry.sequence
            if entry.samples:
                sequence.num_pending -= 1
                if sequence.state is not State.FINISHED:
                    emitted.append(_take_token(sequence, token, place))
            if sequence.state is State.RUNNING and entry.epoch == sequence.epoch:
                self._note_computed(sequence, entry.start + entry.count)
        for token in emitted:
            if token.reason is not None:
                self.finish(token.sequence)
        return emitted

    def _note_computed(self, sequence: Sequence, done: int) -> None:
        """Notes that the KV of the sequence's first ``done`` tokens is in the pool."""
        before = sequence.num_done
        if done > before:
            sequence.num_done = done
            if self._config.prefix_cache and done // PAGE_SIZE > before // PAGE_SIZE:
                self._publish_full_pages(sequence)
        if sequence.followers and sequence.num_done >= sequence.num_prompt:
            self._release_followers(sequence)

    # Running sequences

    def _continue_running(self, builder: "_PlanBuilder") -> None:
        prompts = []
        arriving = self._arriving
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
                and (not arriving or sequence.adapter_key not in arriving)
            ):
                if scheduled < len(sequence.pages) * PAGE_SIZE:
                    builder.add(sequence, 1)
                else:
                    self._schedule(sequence, 1, builder)
        for sequence in prompts:
            if builder.budget == 0:
                break
            if sequence.state is State.RUNNING and not self._is_arriving(sequence):
                self._schedule(sequence, min(builder.budget, sequence.num_tokens - sequence.num_scheduled), builder)

    def _is_arriving(self, sequence: Sequence) -> bool:
        """Whether its adapter's copy is under way."""
        return sequence.adapter_key in self._arriving

    def _schedule(self, sequence: Sequence, count: int, builder: "_PlanBuilder") -> None:
        """Adds ``count`` tokens of a running sequence, preempting those after it (or itself) if pages run out."""
        needed = PoolLayout.token_pages(sequence.num_scheduled + count) - len(sequence.pages)
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
            self._release_adapter(sequence.adapter_key, sequence.adapter)
            sequence.adapter_key = None

    def _release_adapter(self, key: Hashable, adapter: AdapterHandle) -> None:
        in_host_memory = adapter.status == "ready"
        cost = self._costs.adapter if in_host_memory else self._costs.adapter_from_disk
        self._pages.release_block(key, cost)

    def _publish_full_pages(self, sequence: Sequence) -> None:
        full = min(sequence.num_done, len(sequence.tokens)) // PAGE_SIZE
        for i in range(full - 1, -1, -1):
            if sequence.page_keys[i] is not None:
                break
            key = sequence.prefix_key(i)
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
            self._want(adapter)
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

    def _bring_pinned(self, builder: "_PlanBuilder") -> bool:
        """Copies pinned adapters; False if one lacks pages, which then nobody else may take who is not running."""
        for adapter in self._pinned:
            if adapter in self._pin_keys or adapter.status == "failed":
                continue
            if not self._is_resident(adapter):
                if not self._want(adapter) or adapter.status != "ready" or not self._can_copy(adapter):
                    continue
                if not self._budget.has_room(0, adapter.num_pages):
                    return False
                self._start_copy(adapter, builder)
            key = self._pin_keys[adapter] = _key(adapter)
            self._pages.acquire(key)
            self._prefetched.discard(key)
        return True

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
            if self._pinned and (reason := self.refusal(sequence.num_prompt + sequence.max_tokens, adapter)):
                moves -= 1
                builder.failed.append((self._waiting.pop(place), reason))
                continue
            if adapter is not None and not self._is_resident(adapter):
                if not self._want(adapter):
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
                if copy_waits or not self._can_copy(adapter):
                    # The copies under way are enough for now. Those that need none pass; no other copy does, or a
                    # large adapter would wait for ever.
                    copy_waits = True
                    place += 1
                    continue
            is_new = not sequence.was_admitted
            if sequence.num_pending or not self._try_start(sequence, builder):
                # Nobody overtakes the head for want of pages, or a large request would wait for ever.
                return
            self._waiting.start(place)
            insort(self._running, sequence, key=self._standing)
            self._num_waiting -= 1
            if not self._is_arriving(sequence):
                builder.add(sequence, min(builder.budget, sequence.num_tokens - sequence.num_scheduled))
            elif is_new:
                self.num_prefetch_late += 1
        builder.is_cut |= moves == 0

    def _try_start(self, sequence: Sequence, builder: "_PlanBuilder") -> bool:
        """Takes the pages a sequence needs to compute all its known tokens, and its adapter's, or nothing."""
        adapter = sequence.adapter
        adapter_key = _key(adapter) if adapter else None
        adapter_resident = adapter is not None and self._is_resident(adapter)
        prefix = self._cached_prefix(sequence)
        kv_pages = PoolLayout.token_pages(sequence.num_tokens) - len(prefix)
        # Acquiring cached blocks takes them from what is available, so count them in.
        revived = sum(self._pages.is_cached(key) for key in prefix)
        takes_adapter = adapter is not None and (not adapter_resident or self._pages.is_cached(adapter_key))
        if not self._budget.has_room(kv_pages + revived, adapter.num_pages if takes_adapter else 0):
            return False
        for key in prefix:
            sequence.pages.extend(self._pages.acquire(key))
            sequence.page_keys.append(key)
        if adapter is not None:
            if not adapter_resident:
                self._start_copy(adapter, builder)
            elif adapter_key in self._prefetched:
                self._prefetched.remove(adapter_key)
                self.num_prefetch_hits += adapter_key not in self._arriving
            self._pages.acquire(adapter_key)
        sequence.adapter_key = adapter_key
        sequence.pages.extend(self._budget.allocate_kv(kv_pages))
        sequence.page_keys.extend([None] * kv_pages)
        sequence.num_scheduled = sequence.num_done = len(prefix) * PAGE_SIZE
        sequence.state = State.RUNNING
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.cached_tokens = sequence.num_done
        return True

    # Adapters on their way to the pool

    def _is_resident(self, adapter: AdapterHandle) -> bool:
        """Whether its weights are in the pool or on their way there; a copy in host memory is not needed then."""
        return adapter.content_hash is not None and self._pages.lookup(_key(adapter)) is not None

    def _want(self, adapter: AdapterHandle) -> bool:
        """Holds an adapter in host memory for this plan and some more; False if that are too many."""
        if self._held.pop(adapter, None) is None:
            if len(self._held) >= MAX_HELD_ADAPTERS:
                longest = next(iter(self._held))
                if self._held[longest] >= self._num_plans - 1:
                    return False
                del self._held[longest]
                longest.let_go()
            adapter.hold()
        self._held[adapter] = self._num_plans
        return True

    def _let_unwanted_go(self, stalled: bool) -> None:
        last = self._num_plans - (1 if stalled else _HOLD_PLANS)
        while self._held:
            adapter = next(iter(self._held))
            if self._held[adapter] > last:
                return
            del self._held[adapter]
            adapter.let_go()

    def _can_copy(self, adapter: AdapterHandle) -> bool:
        """Whether the copies under way leave room for this one; one may always be."""
        num_pages = adapter.num_pages
        fits_beside = not self._arriving or self._arriving_pages + num_pages <= self._pages.total // _COPY_SHARE
        return fits_beside and self._budget.may_copy(num_pages)

    def _start_copy(self, adapter: AdapterHandle, builder: "_PlanBuilder") -> None:
        """Takes an adapter's pages, which must be available; the copy owns them until it has arrived."""
        key = _key(adapter)
        self._note_wasted(key)
        # Held until the copy has arrived, though the weights are in use no longer than that.
        if self._held.pop(adapter, None) is None:
            adapter.hold()
        pages = self._budget.allocate_adapter(adapter.num_pages)
        self._pages.publish(key, pages)
        load = AdapterLoad(adapter, tuple(pages), key)
        self._arriving[key] = load
        self._arriving_pages += len(pages)
        builder.loads.append(load)

    def _note_wasted(self, key: Hashable) -> None:
        """Of an adapter that is not in the pool."""
        if key in self._prefetched:
            self._prefetched.remove(key)
            self.num_prefetch_wasted += 1

    def _prefetch(self, builder: "_PlanBuilder") -> None:
        """Loads and copies adapters of the sequences next in line, while that takes nothing from anybody.

        Neither from the running sequences, which keep a page each to grow, nor from adapters in the pool that others
        next in line want: those count as used now, the first one's last.
        """
        wanted: dict[Hashable, AdapterHandle] = {}
        for sequence in self._waiting.look_ahead():
            adapter = sequence.adapter
            if adapter is None:
                continue
            if self._is_resident(adapter) or (
                adapter.status != "failed" and self._want(adapter) and adapter.status == "ready"
            ):
                wanted.setdefault(_key(adapter), adapter)
        # Owned meanwhile, so that copying one does not evict another; and wanted just now when released.
        cached = [key for key in wanted if self._pages.is_cached(key)]
        for key in cached:
            self._pages.acquire(key)
        spare = self._budget.spare_for_adapters(len(self._running))
        for key, adapter in wanted.items():
            if self._pages.lookup(key) is not None:
                continue
            spare -= adapter.num_pages
            if spare < 0 or not self._can_copy(adapter):
                break
            self._start_copy(adapter, builder)
            self._prefetched.add(key)
        for key in reversed(cached):
            self._release_adapter(key, wanted[key])

    def _cached_prefix(self, sequence: Sequence) -> list[Hashable]:
        """Keys of the leading pages found in the prefix cache; the last token is always left to compute."""
        keys: list[Hashable] = []
        if self._config.prefix_cache:
            for page in range((len(sequence.tokens) - 1) // PAGE_SIZE):
                key = sequence.prefix_key(page)
                if self._pages.lookup(key) is None:
                    break
                keys.append(key)
        return keys

    def adapter_pages(self, sequence: Sequence) -> tuple[int, ...]:
        """Pool pages of a running sequence's adapter; () for the base model."""
        if sequence.adapter_key is None:
            return ()
        return self._pages.lookup(sequence.adapter_key)


def _content(adapter: AdapterHandle) -> Hashable:
    """Equal for adapters that are known to have equal weights."""
    return adapter.content_hash or adapter


def _key(adapter: AdapterHandle) -> Hashable:
    """Of the block of an adapter whose content is known: equal weights share it."""
    return ("adapter", adapter.content_hash)


def _take_token(sequence: Sequence, token: int, place: int) -> Emitted:
    """Appends a sampled token, and says whether the sequence ends with it."""
    if token == NOT_FINITE:
        return Emitted(sequence, token, place, "error")
    sequence.tokens.append(token)
    if token in sequence.end_token_ids:
        return Emitted(sequence, token, place, "stop")
    if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
        return Emitted(sequence, token, place, "length")
    return Emitted(sequence, token, place, None)


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
