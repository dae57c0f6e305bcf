"""Continuous batching over the unified pool: the plan of every step, and what its results mean for the pages.

Order of a plan: running sequences decode one token each; unfinished prompts go on in chunks; then waiting sequences
are admitted, first come first served, while the token budget, the sequence limit and the pages allow. Running
sequences outrank waiting ones; when pages run out the last arrived one is preempted and later recomputed.
"""

import heapq
from collections.abc import Hashable

from slora_jax.config import PAGE_SIZE, SchedulerConfig
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.scheduler.sequence import AdapterHandle, AdapterLoad, ScheduledSequence, Sequence, State, StepPlan

MAX_LOADING_ADAPTERS = 32
"""Adapters on the way to host memory at once; admission looks no further down the queue than this many."""


class Scheduler:
    """Plans steps and owns the pages' accounting.

    Call ``plan``, run the plan, call ``commit`` with what was sampled. A plan may be made before the previous one is
    committed, but no further ahead.
    """

    def __init__(self, config: SchedulerConfig, pages: PageAllocator):
        self._config = config
        self._pages = pages
        self._running: list[Sequence] = []
        self._waiting: list[tuple[int, Sequence]] = []
        self._parked: dict[AdapterHandle, list[Sequence]] = {}
        self._num_waiting = 0

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

    def pages_needed(self, num_tokens: int, adapter: AdapterHandle | None) -> int:
        """Pages that a sequence of this length takes when it runs alone. Pure."""
        return PoolLayout.token_pages(num_tokens) + (adapter.num_pages if adapter else 0)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. One with a leader is held until the leader's prompt is in the prefix cache."""
        self._num_waiting += 1
        leader = sequence.leader
        if leader is not None and leader.state is not State.FINISHED and self._config.prefix_cache:
            leader.followers.append(sequence)
        else:
            self._enqueue(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, in whatever state it is, and gives its pages back. Idempotent.

        Steps in flight may still write to its pages: the device runs steps in order, so whoever gets the pages next
        writes after them.
        """
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            # Queued entries are dropped when they surface: see _next_waiting and _unpark.
            self._num_waiting -= 1
        sequence.state = State.FINISHED
        self._release_followers(sequence)

    def plan(self) -> StepPlan:
        """Decides the next step. Empty when nothing can run now."""
        builder = _PlanBuilder(self._config.max_batch_tokens)
        self._unpark(builder)
        self._continue_running(builder)
        self._admit(builder)
        return builder.build()

    def commit(self, plan: StepPlan) -> None:
        """Notes that a plan's step has run: full pages become prefix-cache blocks, prompts done free followers."""
        for entry in plan.entries:
            sequence = entry.sequence
            if sequence.state is not State.RUNNING or entry.epoch != sequence.epoch:
                continue
            sequence.num_done = max(sequence.num_done, entry.start + entry.count)
            if self._config.prefix_cache:
                self._publish_full_pages(sequence)
            if sequence.followers and sequence.num_done >= sequence.num_prompt:
                self._release_followers(sequence)

    # Running sequences

    def _continue_running(self, builder: "_PlanBuilder") -> None:
        decoding = [s for s in self._running if s.num_scheduled >= s.num_prompt and s.num_tokens - s.num_scheduled == 1]
        for sequence in decoding:
            if sequence.state is State.RUNNING and self._has_tokens_to_compute(sequence) and builder.budget > 0:
                self._schedule(sequence, 1, builder)
        for sequence in list(self._running):
            if sequence.state is not State.RUNNING or builder.budget == 0 or builder.contains(sequence):
                continue
            if self._has_tokens_to_compute(sequence):
                self._schedule(sequence, min(builder.budget, sequence.num_tokens - sequence.num_scheduled), builder)

    @staticmethod
    def _has_tokens_to_compute(sequence: Sequence) -> bool:
        """The last token allowed is sampled but its KV never needed."""
        return sequence.num_scheduled < sequence.num_tokens and sequence.can_grow

    def _schedule(self, sequence: Sequence, count: int, builder: "_PlanBuilder") -> None:
        """Adds ``count`` tokens of a running sequence, preempting later arrivals (or itself) if pages run out."""
        needed = PoolLayout.token_pages(sequence.num_scheduled + count) - len(sequence.pages)
        while needed > 0:
            pages = self._pages.allocate(needed)
            if pages is not None:
                sequence.pages.extend(pages)
                sequence.page_keys.extend([None] * needed)
                break
            victim = next(s for s in reversed(self._running) if not builder.contains(s))
            self._preempt(victim)
            builder.num_preempted += 1
            if victim is sequence:
                return
        builder.add(sequence, count)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.num_scheduled = sequence.num_done = 0
        sequence.epoch += 1
        sequence.state = State.WAITING
        self._num_waiting += 1
        self._enqueue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        # Last page first: the start of a prefix is worth more, so it becomes the warmest.
        for page, key in zip(reversed(sequence.pages), reversed(sequence.page_keys), strict=True):
            if key is None:
                self._pages.release([page])
            else:
                self._pages.release_block(key)
        sequence.pages, sequence.page_keys = [], []
        if sequence.adapter_key is not None:
            self._pages.release_block(sequence.adapter_key)
            sequence.adapter_key = None

    def _publish_full_pages(self, sequence: Sequence) -> None:
        full = min(sequence.num_done, len(sequence.tokens)) // PAGE_SIZE
        for i in range(full - 1, -1, -1):
            if sequence.page_keys[i] is not None:
                break
            key = sequence.prefix_key(i)
            if self._pages.publish(key, [sequence.pages[i]]):
                sequence.page_keys[i] = key

    # Waiting sequences

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.sequence_id, sequence))

    def _release_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            if follower.state is State.WAITING:
                self._enqueue(follower)
        leader.followers = []

    def _unpark(self, builder: "_PlanBuilder") -> None:
        for adapter in [a for a in self._parked if a.status in ("ready", "failed")]:
            for sequence in self._parked.pop(adapter):
                if sequence.state is not State.WAITING:
                    continue
                if adapter.status == "ready":
                    self._enqueue(sequence)
                else:
                    builder.failed.append((sequence, adapter.failure))

    def _next_waiting(self) -> Sequence | None:
        """The head of the queue, left in place."""
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _admit(self, builder: "_PlanBuilder") -> None:
        while (
            builder.budget > 0
            and len(self._running) < self._config.max_sequences
            and len(self._parked) < MAX_LOADING_ADAPTERS
            and (sequence := self._next_waiting()) is not None
        ):
            adapter = sequence.adapter
            if adapter is not None and adapter.status != "ready":
                heapq.heappop(self._waiting)
                adapter.prefetch()
                self._parked.setdefault(adapter, []).append(sequence)
                continue
            if sequence.num_pending or not self._try_start(sequence, builder):
                # Nobody overtakes the head for want of pages, or a large request would wait for ever.
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            builder.add(sequence, min(builder.budget, sequence.num_tokens - sequence.num_scheduled))

    def _try_start(self, sequence: Sequence, builder: "_PlanBuilder") -> bool:
        """Takes the pages a sequence needs to compute all its known tokens, and its adapter's, or nothing."""
        adapter = sequence.adapter
        adapter_key = ("adapter", adapter.content_hash) if adapter else None
        adapter_resident = adapter_key is not None and self._pages.lookup(adapter_key) is not None
        prefix = self._cached_prefix(sequence)
        kv_pages = PoolLayout.token_pages(sequence.num_tokens) - len(prefix)
        new_pages = kv_pages + (adapter.num_pages if adapter and not adapter_resident else 0)
        # Acquiring cached blocks takes them from what is available, so count them in.
        revived = sum(self._pages.is_cached(key) for key in prefix)
        if adapter_resident and self._pages.is_cached(adapter_key):
            revived += adapter.num_pages
        if new_pages + revived > self._pages.num_available:
            return False
        for key in prefix:
            sequence.pages.extend(self._pages.acquire(key))
            sequence.page_keys.append(key)
        if adapter_resident:
            self._pages.acquire(adapter_key)
        elif adapter is not None:
            adapter_pages = self._pages.allocate(adapter.num_pages)
            self._pages.publish(adapter_key, adapter_pages)
            builder.loads.append(AdapterLoad(adapter, tuple(adapter_pages)))
        sequence.adapter_key = adapter_key
        sequence.pages.extend(self._pages.allocate(kv_pages))
        sequence.page_keys.extend([None] * kv_pages)
        sequence.num_scheduled = sequence.num_done = len(prefix) * PAGE_SIZE
        sequence.state = State.RUNNING
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.cached_tokens = sequence.num_done
        # Kept in order of arrival, so that the last one is the one to preempt.
        self._running.append(sequence)
        self._running.sort(key=lambda s: s.sequence_id)
        return True

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


class _PlanBuilder:
    """A plan being made. Adding an entry moves the sequence's ``num_scheduled`` and ``num_pending``."""

    def __init__(self, budget: int):
        self.budget = budget
        self.loads: list[AdapterLoad] = []
        self.failed: list[tuple[Sequence, str]] = []
        self.num_preempted = 0
        self._entries: list[ScheduledSequence] = []
        self._planned: set[int] = set()

    def contains(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._planned

    def add(self, sequence: Sequence, count: int) -> None:
        samples = sequence.num_scheduled + count == sequence.num_tokens
        self._entries.append(ScheduledSequence(sequence, sequence.num_scheduled, count, samples, sequence.epoch))
        self._planned.add(sequence.sequence_id)
        sequence.num_scheduled += count
        self.budget -= count

    def build(self) -> StepPlan:
        for entry in self._entries:
            entry.sequence.num_pending += entry.samples
        return StepPlan(tuple(self._entries), tuple(self.loads), tuple(self.failed), self.num_preempted)
