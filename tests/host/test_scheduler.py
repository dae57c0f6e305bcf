"""The scheduler against a stub model: a step "samples" the next number, and every plan is checked."""

import random
import statistics
import time
from collections import deque
from dataclasses import dataclass

import pytest

from slora_jax.adapters.host_cache import HostCache
from slora_jax.config import SchedulerConfig
from slora_jax.memory.costs import EQUAL_COSTS, PageCosts
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.capacity import Capacity, capacity
from slora_jax.scheduler.policies import create_policy
from slora_jax.scheduler.queue import LOOK_AHEAD, WaitingQueue
from slora_jax.scheduler.sequence import Sequence, State
from slora_jax.scheduler.traffic import MAX_HELD_ADAPTERS
from tests.helpers.checking_device import CheckedLoop, CheckingDevice, NumberStep, RecordingScheduler, next_token


@dataclass(eq=False)
class StubAdapter:
    """An adapter that gets ready when a test says so."""

    content_hash: str | None
    num_pages: int
    status: str = "ready"
    failure: str = ""
    holds: int = 0

    def hold(self):
        self.holds += 1
        if self.status == "registered":
            self.status = "loading"

    def let_go(self):
        assert self.holds > 0
        self.holds -= 1


class HostMemory:
    """A bounded host memory, as the store has it, that loads one adapter a step while it has room."""

    def __init__(self, room: int):
        self.cache = HostCache(room)
        self.queue = deque()
        self.loaded = []

    def step(self):
        while self.queue:
            adapter = self.queue[0]
            if adapter.holds:
                left = self.cache.add(adapter, adapter.num_pages)
                if left is None:
                    return
                for other in left:
                    other.status = "registered"
                adapter.content_hash = adapter.name
                adapter.status = "failed" if adapter.is_broken else "ready"
                if adapter.is_broken:
                    self.cache.remove(adapter)
                self.loaded.append(adapter)
            else:
                adapter.status = "registered"
            self.queue.popleft()
            if adapter.status != "registered":
                return


@dataclass(eq=False)
class CachedAdapter:
    """An adapter of a ``HostMemory``."""

    memory: HostMemory
    name: str
    num_pages: int
    is_broken: bool = False
    status: str = "registered"
    content_hash: str | None = None
    failure: str = "broken"
    holds: int = 0

    def hold(self):
        self.holds += 1
        if self.status == "ready":
            self.memory.cache.hold(self)
        elif self.status == "registered":
            self.status = "loading"
            self.memory.queue.append(self)

    def let_go(self):
        assert self.holds > 0, "let go more often than held"
        self.holds -= 1
        if not self.holds and self in self.memory.cache:
            self.memory.cache.let_go(self)


def make_loop(num_pages=100, costs=EQUAL_COSTS, page_tokens=16, **config):
    defaults = {"max_batch_tokens": 32, "max_sequences": 8}
    return CheckedLoop(SchedulerConfig(**(defaults | config)), num_pages, costs=costs, page_tokens=page_tokens)


def make_sequence(i, prompt, max_tokens=4, adapter=None, leader=None):
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(i, list(prompt), len(prompt), max_tokens, sampling, seed=i, adapter=adapter, leader=leader)


def expected_output(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_a_prompt_is_prefilled_in_chunks_then_decoded_one_token_a_step():
    loop = make_loop()
    sequence = make_sequence(0, range(70), max_tokens=3)
    loop.core.add(sequence)
    plans = []
    while sequence.state is not State.FINISHED:
        plans.append([(e.start, e.count, e.samples) for e in loop.step().entries])
    assert plans[:5] == [
        [(0, 32, False)],
        [(32, 32, False)],
        [(64, 6, True)],
        [(70, 1, True)],
        [(71, 1, True)],
    ]
    assert sequence.tokens[70:] == expected_output(range(70), 3)
    assert loop.pages.num_used == 0


def test_new_requests_join_the_next_step():
    loop = make_loop()
    loop.core.add(make_sequence(0, range(5), max_tokens=50))
    loop.step()
    loop.core.add(make_sequence(1, range(5), max_tokens=5))
    assert {e.sequence.sequence_id for e in loop.step().entries} == {0, 1}


def test_decoding_sequences_are_served_before_prompts():
    loop = make_loop(max_batch_tokens=16, max_sequences=8)
    for i in range(3):
        loop.core.add(make_sequence(i, [i] * 4, max_tokens=20))
    loop.step()
    loop.core.add(make_sequence(9, range(100)))
    plan = loop.step()
    assert [(e.sequence.sequence_id, e.count) for e in plan.entries] == [(0, 1), (1, 1), (2, 1), (9, 13)]


def test_prompt_pages_are_found_again_by_the_same_adapter_only():
    adapter, twin, other = StubAdapter("a", 2), StubAdapter("a", 2), StubAdapter("b", 2)
    loop = make_loop()
    for i, who in enumerate((adapter, twin, other, None)):
        sequence = make_sequence(i, range(40), adapter=who)
        loop.core.add(sequence)
        loop.run()
        assert sequence.cached_tokens == (32 if i == 1 else 0)


def test_the_whole_prompt_is_never_taken_from_the_cache():
    loop = make_loop()
    for i in range(2):
        sequence = make_sequence(i, range(32))
        loop.core.add(sequence)
        loop.run()
    assert sequence.cached_tokens == 16, "the last token must be computed to have logits"


def test_siblings_wait_for_the_leader_and_share_its_prompt():
    loop = make_loop()
    leader = make_sequence(0, range(64))
    loop.core.add(leader)
    siblings = [make_sequence(i, range(64), leader=leader) for i in (1, 2)]
    for sibling in siblings:
        loop.core.add(sibling)
    loop.run()
    assert [s.cached_tokens for s in siblings] == [48, 48]
    assert all(s.tokens == leader.tokens for s in siblings)


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_siblings_run_when_the_leader_is_cancelled(state):
    loop = make_loop()
    leader = make_sequence(0, range(64))
    sibling = make_sequence(1, range(64), leader=leader)
    loop.core.add(leader)
    loop.core.add(sibling)
    if state == "running":
        loop.step()
    loop.core.finish(leader)
    loop.run()
    assert sibling.tokens[64:] == expected_output(range(64), 4)


def test_a_loading_adapter_is_passed_by_others_and_then_served():
    slow = StubAdapter("slow", 3, status="registered")
    loop = make_loop()
    first, second = make_sequence(0, range(8), adapter=slow), make_sequence(1, range(8), max_tokens=9)
    loop.core.add(first)
    loop.core.add(second)
    assert [e.sequence.sequence_id for e in loop.step().entries] == [1]
    assert slow.holds == 1
    slow.status = "ready"
    assert [e.sequence.sequence_id for e in loop.step().entries] == [1], "its weights are on the way to the pool"
    assert [e.sequence.sequence_id for e in loop.step().entries] == [1, 0]
    loop.run()
    assert first.tokens[8:] == expected_output(range(8), 4)


def test_a_failed_adapter_fails_its_own_requests_only():
    broken = StubAdapter("broken", 3, status="registered", failure="truncated")
    loop = make_loop()
    mine, other = make_sequence(0, range(8), adapter=broken), make_sequence(1, range(8))
    loop.core.add(mine)
    loop.core.add(other)
    loop.step()
    broken.status = "failed"
    plan = loop.step()
    assert plan.failed == ((mine, "truncated"),)
    loop.core.finish(mine)
    loop.run()
    assert other.tokens[8:] == expected_output(range(8), 4)


def test_an_adapter_is_loaded_once_for_all_its_sequences_and_evicted_when_cold():
    loop = make_loop(num_pages=12)
    adapters = [StubAdapter(name, 4) for name in "abc"]
    loads = []
    for i in range(9):
        loop.core.add(make_sequence(2 * i, [i] * 5, adapter=adapters[i // 3]))
        loop.core.add(make_sequence(2 * i + 1, [i] * 5, adapter=adapters[i // 3]))
        while not loop.core.is_idle:
            loads += [load.adapter.content_hash for load in loop.step().loads]
    assert loads == ["a", "b", "c"]
    assert loop.pages.num_evictions > 0


def test_the_last_arrived_sequence_is_preempted_and_recomputed():
    loop = make_loop(num_pages=8, prefix_cache=False)
    sequences = [make_sequence(i, [i] * 16, max_tokens=60) for i in range(3)]
    for sequence in sequences:
        loop.core.add(sequence)
    loop.run()
    assert loop.preempted > 0
    assert sequences[0].epoch == 0, "the first arrival is never preempted"
    for i, sequence in enumerate(sequences):
        assert sequence.tokens[16:] == expected_output([i] * 16, 60)


def test_finish_gives_back_every_page_in_any_state():
    loop = make_loop()
    waiting, running = make_sequence(5, range(20)), make_sequence(0, range(20), adapter=StubAdapter("a", 2))
    loop.core.add(running)
    loop.step()
    loop.step()
    loop.core.add(waiting)
    for _ in range(2):
        loop.core.finish(waiting)
        loop.core.finish(running)
    assert loop.scheduler.is_idle
    assert loop.pages.num_used == 0
    loop.run()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("prefix_cache", "page_tokens"), [(True, 16), (False, 16), (True, 32)])
def test_random_traffic_in_a_tiny_pool_gives_everyone_the_right_tokens(seed, prefix_cache, page_tokens):
    rng = random.Random(seed)
    sizes = {"num_pages": 24 if page_tokens == 16 else 14, "page_tokens": page_tokens}
    loop = make_loop(**sizes, max_batch_tokens=24, max_sequences=6, prefix_cache=prefix_cache)
    loop.device.copy_turns = 1 + seed % 3
    adapters = [None, *(StubAdapter(name, rng.randrange(1, 6)) for name in "abcd")]
    shared = [rng.randrange(1000) for _ in range(60)]
    live, done = [], []
    for i in range(60):
        prompt = [*shared[: rng.randrange(0, 60)], rng.randrange(1000)]
        sequence = make_sequence(i, prompt, rng.randrange(1, 40), rng.choice(adapters))
        live.append(sequence)
        loop.core.add(sequence)
        for _ in range(rng.randrange(6)):
            loop.step()
        if rng.random() < 0.15:
            victim = rng.choice(live)
            if victim.state is not State.FINISHED:
                loop.core.finish(victim)
                live.remove(victim)
    loop.run()
    done = [s for s in live if s.state is State.FINISHED]
    assert len(done) == len(live)
    for sequence in done:
        prompt = sequence.tokens[: sequence.num_prompt]
        assert sequence.tokens[sequence.num_prompt :] == expected_output(prompt, sequence.max_tokens)
    assert loop.pages.num_used == 0


def test_pages_of_32_tokens_are_counted_published_and_found():
    loop = make_loop(num_pages=20, page_tokens=32)
    first, second = make_sequence(0, range(70)), make_sequence(1, range(70), max_tokens=60)
    loop.core.add(first)
    loop.run()
    loop.core.add(second)
    loop.step()
    assert second.cached_tokens == 64 and len(second.pages) == 3
    loop.run()
    assert second.tokens[70:] == expected_output(range(70), 60)
    assert loop.scheduler.capacity(32 * 19, None).requests == 1
    assert loop.scheduler.capacity(32 * 19 + 1, None).requests == 0
    assert loop.scheduler.refusal(32 * 19, None) is None and "needs 20 pages" in loop.scheduler.refusal(609, None)


# Adapters on their way to the pool


def test_a_copy_under_way_is_passed_by_others_and_its_pages_are_safe():
    loop = make_loop(num_pages=12)
    loop.device.copy_turns = 3
    slow = make_sequence(0, [1] * 20, adapter=StubAdapter("slow", 3))
    loop.core.add(slow)
    others = [make_sequence(i, [i] * 30, max_tokens=20) for i in range(1, 4)]
    for other in others:
        loop.core.add(other)
    started = [{e.sequence.sequence_id for e in loop.step().entries} for _ in range(4)]
    assert all(0 not in ids for ids in started[:3])
    assert started[0], "the others run meanwhile"
    assert 0 in started[3]
    loop.run()
    assert slow.epoch == 0, "the first arrival is not preempted"
    assert loop.scheduler.counts()["adapter_prefetch_late"] == 1


@pytest.mark.parametrize("when", ["copying", "arrived"])
def test_cancelling_a_sequence_that_waits_for_a_copy_leaks_nothing(when):
    loop = make_loop()
    loop.device.copy_turns = 2
    sequence = make_sequence(0, range(20), adapter=StubAdapter("a", 3))
    loop.core.add(sequence)
    for _ in range(1 if when == "copying" else 3):
        loop.step()
    loop.core.finish(sequence)
    loop.run()
    assert loop.pages.num_used == 0
    assert loop.pages.lookup(("adapter", "a")) is not None, "it stays in the pool for the next"


def test_adapters_of_those_next_in_line_are_copied_ahead():
    loop = make_loop(max_sequences=2, num_pages=400)
    for i in range(6):
        loop.core.add(make_sequence(i, [i] * 8, max_tokens=6, adapter=StubAdapter(str(i), 2)))
    loop.run()
    assert loop.scheduler.counts()["adapter_prefetch_hits"] == 4
    assert loop.scheduler.counts()["adapter_prefetch_late"] == 2
    assert loop.scheduler.counts()["adapter_prefetch_wasted"] == 0


def test_copying_ahead_leaves_running_sequences_room_and_keeps_adapters_that_are_wanted_sooner():
    loop = make_loop(max_sequences=1, num_pages=10)
    first, warm, later = (StubAdapter(name, n) for name, n in (("first", 1), ("warm", 3), ("later", 4)))
    loop.core.add(make_sequence(0, [0] * 8, max_tokens=2, adapter=warm))
    loop.run()
    running = make_sequence(1, [1] * 8, max_tokens=30, adapter=first)
    loop.core.add(running)
    loop.core.add(make_sequence(2, [2] * 8, adapter=warm))
    loop.core.add(make_sequence(3, [3] * 8, adapter=later))
    loads = [load.adapter for _ in range(20) for load in loop.step().loads]
    assert loads == [first], "9 pages: 2 run, 1 is to grow, 3 are wanted next, and 3 are too few for another 4"
    assert loop.pages.lookup(("adapter", "warm")) is not None
    loop.run()
    assert running.epoch == 0


def test_adapters_copied_ahead_for_nobody_are_wasted():
    loop = make_loop(max_sequences=1, num_pages=12)
    loop.core.add(make_sequence(0, [0] * 8, max_tokens=100))
    for i in range(1, 45):
        sequence = make_sequence(i, [i] * 8, adapter=StubAdapter(str(i), 2))
        loop.core.add(sequence)
        loads = [*loop.step().loads, *loop.step().loads]
        assert [load.adapter for load in loads] == [sequence.adapter], "copied ahead"
        loop.core.finish(sequence)
    loop.run()
    still_there = sum(loop.pages.lookup(("adapter", str(i))) is not None for i in range(1, 45))
    assert loop.scheduler.counts()["adapter_prefetch_wasted"] == 44 - still_there > 35
    assert loop.scheduler.counts()["adapter_prefetch_hits"] == loop.scheduler.counts()["adapter_prefetch_late"] == 0


def test_copies_under_way_are_bounded_and_a_large_adapter_is_not_passed_for_ever():
    loop = make_loop(num_pages=321, max_sequences=64, max_batch_tokens=512)
    loop.device.copy_turns = 2
    loop.core.add(make_sequence(0, [1] * 8, adapter=StubAdapter("small", 2)))
    large = StubAdapter("large", 30)
    loop.core.add(make_sequence(1, [1] * 8, adapter=large))
    for i in range(2, 40):
        loop.core.add(make_sequence(i, [1] * 8, adapter=StubAdapter(f"s{i}", 2)))
    order = []
    while not loop.core.is_idle:
        order += [load.adapter for load in loop.step().loads]
        assert sum(len(load.pages) for _, load in loop.device.copies) in (0, 2, 4, 6, 8, 10, 30)
    assert order[1] is large


# A bounded host memory


@pytest.mark.parametrize("policy", ["fcfs", "lcfs", "cluster", "vtc"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_in_a_tiny_pool_and_a_tiny_host_memory_ends(policy, seed):
    rng = random.Random(seed)
    loop = make_loop(num_pages=24, max_batch_tokens=24, max_sequences=6, policy=policy, prefix_cache=seed % 2 == 0)
    loop.device.copy_turns = 1 + seed % 3
    loop.memory = HostMemory(room=6)
    adapters = [CachedAdapter(loop.memory, f"a{i}", rng.randrange(1, 6), i % 10 == 7) for i in range(150)]
    everyone, cancelled, failing = [], [], []
    for i in range(400):
        adapter = rng.choice(adapters) if rng.random() < 0.9 else None
        sequence = make_sequence(i, [rng.randrange(1000)] * rng.randrange(1, 40), rng.randrange(1, 20), adapter)
        everyone.append(sequence)
        if adapter is not None and adapter.is_broken:
            failing.append(sequence)
        loop.core.add(sequence)
        if rng.random() < 0.1:
            loop.step()
        if rng.random() < 0.1:
            victim = rng.choice(everyone)
            if victim.state is not State.FINISHED:
                cancelled.append(victim)
            loop.core.finish(victim)
    loop.run(limit=20_000)
    for sequence in everyone:
        assert sequence.state is State.FINISHED
        assert sequence.adapter is None, "a finished sequence keeps nothing in host memory"
        if sequence not in cancelled and sequence not in failing:
            prompt = sequence.tokens[: sequence.num_prompt]
            assert sequence.tokens[sequence.num_prompt :] == expected_output(prompt, sequence.max_tokens)
    assert loop.pages.num_used == 0
    loop.step()
    assert not any(adapter.holds for adapter in adapters), "held for nobody"
    assert loop.memory.cache.used <= loop.memory.cache.capacity


def test_with_one_place_in_host_memory_hundreds_of_adapters_take_turns():
    loop = make_loop(num_pages=24)
    loop.memory = HostMemory(room=3)
    adapters = [CachedAdapter(loop.memory, f"a{i}", 3) for i in range(3 * LOOK_AHEAD)]
    for i, adapter in enumerate(adapters):
        loop.core.add(make_sequence(i, [i] * 20, adapter=adapter))
    loop.run(limit=5000)
    assert loop.memory.loaded == adapters, "each once, in order"


def test_an_adapter_in_the_pool_needs_no_host_memory():
    loop = make_loop()
    loop.memory = HostMemory(room=3)
    first, second = (CachedAdapter(loop.memory, name, 3) for name in "ab")
    for i, adapter in enumerate((first, second, first)):
        sequence = make_sequence(i, [i] * 20, adapter=adapter)
        loop.core.add(sequence)
        if i == 2:
            assert first.status == "registered"
            assert [e.sequence for e in loop.step().entries] == [sequence], "at once"
        loop.run()
    assert loop.memory.loaded == [first, second]


def test_adapters_of_sequences_that_others_overtake_give_host_memory_back():
    """Ready ones deep in a last-come queue, all of host memory, and newcomers that need it."""
    loop = make_loop(num_pages=24, policy="lcfs", max_sequences=1, max_batch_tokens=16)
    loop.memory = HostMemory(room=6)
    deep = [CachedAdapter(loop.memory, f"deep{i}", 3) for i in range(2)]
    loop.core.add(make_sequence(0, [0] * 8, max_tokens=12))
    for i, adapter in enumerate(deep, start=1):
        loop.core.add(make_sequence(i, [i] * 8, adapter=adapter))
    for _ in range(6):
        loop.step()
    new = [CachedAdapter(loop.memory, f"new{i}", 3) for i in range(2 * MAX_HELD_ADAPTERS)]
    for i, adapter in enumerate(new, start=10):
        loop.core.add(make_sequence(i, [i] * 8, adapter=adapter))
    loop.run(limit=20_000)
    assert not any(adapter.holds for adapter in (*deep, *new))


def test_when_nothing_runs_what_nobody_wants_is_let_go_at_once():
    loop = make_loop(max_sequences=1, num_pages=8)
    running = make_sequence(0, [0] * 8, max_tokens=50)
    loop.core.add(running)
    adapter = StubAdapter("a", 6)
    waiting = make_sequence(1, [1] * 8, adapter=adapter)
    loop.core.add(waiting)
    loop.step()
    loop.step()
    loop.core.finish(waiting)
    loop.step()
    assert adapter.holds == 1, "for some plans more: it may come back"
    loop.core.finish(running)
    loop.step()
    assert adapter.holds == 0


def test_a_ready_adapter_starts_though_no_more_may_be_held_for_those_before_it():
    loop = make_loop(policy="lcfs", max_sequences=8)
    loop.device.copy_turns = 3
    loop.core.add(make_sequence(0, [0] * 8, max_tokens=50, adapter=StubAdapter("large", 20)))
    loop.step()
    for i in range(1, MAX_HELD_ADAPTERS):
        loop.core.add(make_sequence(i, [i] * 8, adapter=StubAdapter(None, 2, status="registered")))
    ready, last = StubAdapter("ready", 2), StubAdapter(None, 2, status="registered")
    waiting = make_sequence(1000, [1] * 8, adapter=ready)
    loop.core.add(waiting)
    loop.step()
    assert ready.holds == 1 and not resident(loop, ready)[0], "the large one is still on its way"
    loop.core.add(make_sequence(1001, [2] * 8, adapter=last))
    loop.step()
    assert last.holds == 0 and ready.holds == 1
    loop.step()
    assert waiting.state is State.RUNNING


# Pins


def resident(loop, *adapters):
    return [loop.pages.lookup(("adapter", adapter.content_hash)) is not None for adapter in adapters]


def test_pinned_adapters_come_without_a_request_and_stay_until_unpinned():
    loop = make_loop(num_pages=24)
    loop.memory = HostMemory(room=4)
    pinned = [CachedAdapter(loop.memory, f"pinned{i}", 4) for i in range(2)]
    others = [CachedAdapter(loop.memory, f"a{i}", 4) for i in range(12)]
    loop.core.pin(tuple(pinned))
    for _ in range(8):
        loop.step()
    assert resident(loop, *pinned) == [True, True] and loop.pages.num_used == 8
    assert not any(adapter.holds for adapter in pinned), "no copy in host memory is needed"
    for i, adapter in enumerate(others):
        loop.core.add(make_sequence(i, [i] * 40, adapter=adapter))
    loop.run()
    assert resident(loop, *pinned) == [True, True] and loop.pages.num_evictions > 0
    loop.core.pin((pinned[0],))
    assert loop.pages.num_used == 4
    for i, adapter in enumerate(others, start=100):
        loop.core.add(make_sequence(i, [i] * 40, adapter=adapter))
    loop.run()
    assert resident(loop, *pinned) == [True, False]


def test_a_retired_adapter_leaves_the_pool_as_soon_as_no_sequence_needs_it():
    loop = make_loop(prefix_cache=False)
    loop.memory = HostMemory(room=12)
    idle, used, queued, kept = adapters = [CachedAdapter(loop.memory, f"a{i}", 3) for i in range(4)]
    for i, adapter in enumerate(adapters[:2]):
        loop.core.add(make_sequence(i, [i] * 20, max_tokens=2, adapter=adapter))
    loop.run()
    loop.core.add(make_sequence(10, [9] * 20, max_tokens=6, adapter=used))
    loop.step()
    loop.core.add(make_sequence(11, [8] * 20, max_tokens=2, adapter=queued))
    loop.core.add(make_sequence(12, [8] * 20, max_tokens=2, adapter=kept))
    evictions = loop.pages.num_evictions
    for adapter in (idle, used, queued):
        loop.core.scheduler.retire(adapter, adapter.content_hash)
    assert resident(loop, idle, used) == [False, True]
    loop.run()
    assert resident(loop, *adapters) == [False, False, False, True]
    assert loop.pages.num_free == loop.pages.total - 3 and loop.pages.num_evictions == evictions
    loop.pages.check_integrity()


def test_a_pin_gets_the_pages_that_running_sequences_give_back():
    loop = make_loop(num_pages=20, max_sequences=8)
    for i in range(40):
        loop.core.add(make_sequence(i, [i] * 30, max_tokens=20))
    for _ in range(10):
        loop.step()
    pinned = StubAdapter("pinned", 9)
    loop.core.pin((pinned,))
    for _ in range(60):
        loop.step()
    assert resident(loop, pinned) == [True] and loop.scheduler.num_waiting > 0, "ahead of those who wait"
    loop.run()
    assert loop.pages.num_used == 9


def test_a_request_that_no_longer_fits_beside_the_pins_fails_with_the_reason():
    loop = make_loop(num_pages=20, max_sequences=2)
    large, running, small = make_sequence(0, [1] * 200), make_sequence(1, [2] * 60, 150), make_sequence(2, [3] * 20)
    assert loop.scheduler.refusal(204, None) is None
    loop.core.add(running)
    loop.step()
    loop.core.pin((StubAdapter("pinned", 9),))
    assert "13 pages (prompt, output and adapter), but the pool has 19, 9 of them for pinned" in loop.scheduler.refusal(
        204, None
    )
    loop.core.add(large)
    loop.core.add(small)
    failed = {}
    for _ in range(400):
        failed |= dict(loop.step().failed)
    assert set(failed) == {large, running}, "the running one once it cannot grow"
    assert small.tokens[20:] == expected_output([3] * 20, 4)


def test_a_pinned_adapter_counts_once():
    loop = make_loop(num_pages=20)
    pinned = StubAdapter("pinned", 9)
    loop.core.pin((pinned,))
    for adapter in (pinned, StubAdapter("pinned", 9)):
        assert loop.scheduler.refusal(160, adapter) is None, "equal weights share their pages"
        assert loop.scheduler.refusal(161, adapter) is not None


def test_a_pin_that_failed_takes_nothing():
    loop = make_loop(num_pages=20)
    loop.core.pin((StubAdapter(None, 9, status="failed"),))
    assert loop.scheduler.refusal(16 * 19, None) is None


def test_a_pin_that_cannot_be_loaded_stops_nobody():
    loop = make_loop(num_pages=20)
    loop.memory = HostMemory(room=9)
    loop.core.pin((CachedAdapter(loop.memory, "broken", 9, is_broken=True),))
    sequence = make_sequence(0, range(20))
    loop.core.add(sequence)
    loop.run()
    assert sequence.tokens[20:] == expected_output(range(20), 4)


def test_a_plan_that_only_parked_says_that_the_next_goes_on():
    loop = make_loop(num_pages=1000, max_waiting=2000)
    cold = StubAdapter(None, 2, status="registered")
    for i in range(600):
        loop.core.add(make_sequence(i, [1] * 16, adapter=cold))
    behind = make_sequence(600, range(20))
    loop.core.add(behind)
    plans = [loop.scheduler.plan() for _ in range(3)]
    assert [plan.is_cut for plan in plans] == [True, True, False]
    assert [entry.sequence for entry in plans[2].entries] == [behind]


# How many more fit


@pytest.mark.parametrize("max_sequences", [4, 64])
@pytest.mark.parametrize("running", [0, 1])
@pytest.mark.parametrize("pinned", [False, True])
def test_capacity_is_what_then_really_starts(max_sequences, running, pinned):
    loop = make_loop(num_pages=60, max_sequences=max_sequences, max_batch_tokens=2048, prefix_cache=False)
    adapter, other = StubAdapter("a", 7), StubAdapter("b", 5)
    # Both are in the pool, cold.
    for i, who in enumerate((adapter, other)):
        loop.core.add(make_sequence(i, [i] * 8, max_tokens=1, adapter=who))
        loop.run()
    if pinned:
        loop.core.pin((adapter,))
        loop.step()
    for i in range(running):
        loop.core.add(make_sequence(10 + i, [i] * 20, max_tokens=28, adapter=adapter))
        loop.step()
    answer = loop.scheduler.capacity(40, adapter)
    assert answer.adapter_pages == (0 if running or pinned else 7)
    for i in range(100):
        loop.core.add(make_sequence(100 + i, [i] * 40, max_tokens=1, adapter=adapter))
    before = loop.scheduler.num_running
    loop.step()
    assert loop.scheduler.num_running - before == answer.requests > 2


def test_no_capacity_in_what_a_pin_is_to_have():
    loop = make_loop(num_pages=60)
    pinned = StubAdapter(None, 20, status="registered")
    loop.core.pin((pinned,))
    loop.step()
    assert loop.scheduler.capacity(16 * 39, None).requests == 1
    assert loop.scheduler.capacity(16 * 40, None).requests == 0
    assert loop.scheduler.capacity(16 * 39, pinned).requests == 1
    assert loop.scheduler.refusal(16 * 40, None) is not None


def test_no_capacity():
    assert capacity(2, 30, 30, 5) == Capacity(0, 2, 30, 30, 5)
    assert capacity(2, 40, 30, 5).requests == 0
    assert capacity(1, 0, 30, 0).requests == 0


# What goes first


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_an_adapter_goes_before_a_prefix_only_if_it_is_cheaper_to_bring_back(in_host_memory):
    """Nobody uses either, and the adapter was used last."""
    loop = make_loop(num_pages=10, costs=PageCosts(prefix=2.0, adapter=1.0, adapter_from_disk=9.0))
    adapter = StubAdapter("a", 4)
    for i, who in enumerate((None, adapter)):
        loop.core.add(make_sequence(i, [i] * 33, max_tokens=1, adapter=who))
        if i:
            loop.step()
            adapter.status = "ready" if in_host_memory else "registered"
        loop.run()
    assert loop.pages.num_cached == 8
    loop.pages.allocate(2)
    assert (loop.pages.lookup(("adapter", "a")) is None) == in_host_memory
    base = make_sequence(2, [0] * 33)
    assert (loop.pages.lookup(base.prefix_key(1, 16)) is None) == (not in_host_memory)


def test_estimated_costs_stand_in_the_order_that_was_measured():
    model = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128)
    page_bytes = PoolLayout.for_model(model).page_bytes(2)
    costs = PageCosts.estimate(model, page_bytes, 1, on_gpu=True)
    assert costs.adapter < costs.prefix < costs.adapter_from_disk
    shared = PageCosts.estimate(model, page_bytes // 2, 2, on_gpu=True)
    assert shared.prefix == costs.prefix / 2 and shared.adapter == costs.adapter / 2
    assert shared.adapter_from_disk - shared.adapter == costs.adapter_from_disk - costs.adapter


# A long queue


class CountingAdapter(StubAdapter):
    """Counts how often the scheduler looks at any adapter."""

    looks = 0

    def __getattribute__(self, name):
        if name == "status":
            CountingAdapter.looks += 1
        return super().__getattribute__(name)


def test_the_queue_keeps_the_order_of_arrival_whatever_comes_back():
    rng = random.Random(0)
    queue = WaitingQueue(create_policy(SchedulerConfig()), max_wait_s=60)
    inside, out, fresh = [], [], 0
    for _ in range(5000):
        queue.begin(0.0)
        action = rng.random()
        if action < 0.45:
            queue.push(make_sequence(fresh, [1]))
            inside.append(fresh)
            fresh += 1
        elif action < 0.7 and out:
            sequence = out.pop(rng.randrange(len(out)))
            queue.push(sequence)
            inside.append(sequence.sequence_id)
        elif inside:
            inside.sort()
            place = rng.randrange(min(len(inside), LOOK_AHEAD))
            assert queue.peek(place).sequence_id == inside.pop(place)
            out.append(queue.pop(place))
        inside.sort()
        assert [s.sequence_id for s in queue.look_ahead()] == inside[:LOOK_AHEAD]


class TrustingDevice(CheckingDevice):
    """Checks nothing, so that only planning and committing take time."""

    def launch(self, batch):
        return NumberStep(batch)


class CountedScheduler(RecordingScheduler):
    """Notes of each plan the seconds that it took, and how often an adapter was looked at."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.plans = []

    def plan(self):
        CountingAdapter.looks = 0
        start = time.perf_counter()
        plan = super().plan()
        self.plans.append((time.perf_counter() - start, CountingAdapter.looks))
        return plan


@pytest.mark.parametrize("status", ["ready", "loading"])
def test_a_plan_costs_the_same_however_many_wait(status):
    config = SchedulerConfig(max_batch_tokens=2048, max_sequences=512)
    loop = CheckedLoop(config, 20_000, device=TrustingDevice(copy_turns=0), kind=CountedScheduler)
    adapters = [CountingAdapter(str(i), 2, status=status) for i in range(10_000 if status == "ready" else 20)]
    for i in range(100_000):
        loop.core.add(make_sequence(i, [i] * 20, max_tokens=100, adapter=adapters[i % len(adapters)]))
    for turn in range(60):
        loop.core.step()
        if turn == 20:
            # They get ready all at once, with most of the queue behind them.
            for adapter in adapters:
                adapter.status = "ready"
    seconds, looks = zip(*loop.scheduler.plans, strict=True)
    assert loop.scheduler.num_running > 100
    assert max(looks) < 3_000
    # A plan takes 1 to 3 ms; only one whose work grows with the queue takes this long.
    assert statistics.median(seconds) < 0.02


def test_a_long_prompt_leaves_half_of_each_step_to_those_who_wait():
    loop = CheckedLoop(SchedulerConfig(max_batch_tokens=64, max_sequences=8), num_pages=200)
    long = make_sequence(0, range(1000), max_tokens=2)
    loop.add(long)
    loop.step()
    assert loop.scheduler.last_plan.num_tokens == 64
    shorts = [make_sequence(i, [i] * 20, max_tokens=3) for i in (1, 2, 3)]
    loop.add(*shorts)
    for _ in range(8):
        loop.step()
    assert all(short.state is State.FINISHED for short in shorts)
    assert long.num_done < long.num_prompt
    # And all of it again once nobody waits.
    loop.step()
    assert loop.scheduler.last_plan.num_tokens == 64


def test_a_prompt_of_one_step_is_not_cut_for_those_who_wait():
    loop = CheckedLoop(SchedulerConfig(max_batch_tokens=64, max_sequences=8), num_pages=200)
    loop.add(*(make_sequence(i, [i] * 60, max_tokens=2) for i in range(3)))
    loop.step()
    assert [entry.count for entry in loop.scheduler.last_plan.entries] == [60, 4]
