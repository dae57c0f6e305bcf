"""Who goes next under each policy, and the bound on waiting that holds under all; against models without heaps."""

import random
import time

import pytest

from slora_jax.config import POLICIES, SchedulerConfig
from slora_jax.memory.pages import PageAllocator
from slora_jax.request import SamplingParams
from slora_jax.scheduler.policies import create_policy
from slora_jax.scheduler.queue import LOOK_AHEAD, OVERDUE_TURN, WaitingQueue
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence, State
from tests.helpers.checking_device import CheckedLoop
from tests.helpers.memory import num_reachable


class Handle:
    """An adapter that is always ready."""

    status = "ready"
    failure = ""
    holds = 1

    def __init__(self, name, num_pages=1):
        self.content_hash, self.num_pages = name, num_pages

    def hold(self):
        pass

    def let_go(self):
        pass


class Waiters:
    """A queue under one policy, with a clock set by hand, from which sequences are started one at a time."""

    def __init__(self, policy, max_wait_s=1e9, **config):
        self.policy = create_policy(SchedulerConfig(policy=policy, **config))
        self.queue = WaitingQueue(self.policy, max_wait_s)
        self.adapters = {}
        self.now = 0.0
        self.count = 0
        self.late = []

    def arrive(self, tenant="base", prompt=10, **fields):
        adapter = None if tenant == "base" else self.adapters.setdefault(tenant, Handle(tenant))
        sequence = Sequence(
            self.count, [1] * prompt, prompt, 10, SamplingParams(), 0,
            adapter=adapter, arrival=self.now, tenant=tenant, **fields,
        )  # fmt: skip
        self.count += 1
        self.queue.push(sequence)
        return sequence

    def begin(self):
        for sequence in self.queue.begin(self.now):
            sequence.state = State.FINISHED
            self.late.append(sequence)

    def start(self, new_plan=True):
        """Starts whoever goes next; None if nobody waits."""
        if new_plan:
            self.begin()
        sequence = self.queue.peek(0)
        if sequence is not None:
            sequence.state = State.RUNNING
            self.queue.start(0)
        return sequence

    def compute(self, sequence, num_tokens=1):
        entry = ScheduledSequence(sequence, sequence.num_prompt - 1, 1, True, sequence.epoch)
        for _ in range(num_tokens):
            self.policy.computed([entry], self.now)

    def end(self, sequence):
        sequence.state = State.FINISHED
        self.policy.stopped(sequence)

    def preempt(self, sequence):
        self.policy.stopped(sequence)
        sequence.state = State.WAITING
        sequence.epoch += 1
        self.queue.push(sequence)


def orders(waiters, count):
    return [waiters.start().sequence_id for _ in range(count)]


def test_first_come_last_come_and_priorities():
    for policy, expected in (("fcfs", [0, 1, 2, 3]), ("lcfs", [3, 2, 1, 0]), ("priority", [1, 3, 0, 2])):
        waiters = Waiters(policy)
        for priority in (0, 5, -1, 5):
            waiters.arrive(priority=priority)
        assert orders(waiters, 4) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_everyone_is_started_once_whatever_ends_or_comes_back(policy):
    rng = random.Random(1)
    waiters = Waiters(policy, batch_adapters=2)
    waiting, running = set(), []
    for _ in range(4000):
        action = rng.random()
        if action < 0.4:
            waiting.add(waiters.arrive(rng.choice(["base", *"abcdef"]), rng.randrange(1, 50)))
        elif action < 0.5 and running:
            sequence = running.pop(rng.randrange(len(running)))
            waiters.preempt(sequence)
            waiting.add(sequence)
        elif action < 0.6 and running:
            waiters.end(running.pop())
        elif action < 0.65 and waiting:
            sequence = rng.choice(sorted(waiting, key=lambda s: s.sequence_id))
            sequence.state = State.FINISHED
            waiting.remove(sequence)
        elif action < 0.7:
            waiters.begin()
            ahead = list(waiters.queue.look_ahead())
            assert len(ahead) == len(set(ahead)) == min(LOOK_AHEAD, len(waiting)) and set(ahead) <= waiting
        else:
            new_plan = rng.random() < 0.5
            sequence = waiters.start(new_plan)
            if new_plan:
                assert (sequence is None) == (not waiting)
            if sequence is not None:
                waiting.remove(sequence)
                running.append(sequence)
                waiters.compute(sequence, rng.randrange(3))
    while waiting:
        waiting.remove(waiters.start())


def test_the_look_ahead_is_the_order_of_the_starts():
    for policy in POLICIES:
        waiters = Waiters(policy, batch_adapters=2)
        for i in range(100):
            waiters.arrive("abcdefgh"[i * i % 8], 10 + i % 7, priority=i % 3)
        for _ in range(3):
            waiters.start()
        waiters.begin()
        ahead = [s.sequence_id for s in waiters.queue.look_ahead()]
        assert ahead[:20] == [waiters.start().sequence_id for _ in range(20)], policy


# The bound


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_starves_whatever_arrives(policy):
    """One start a second, and two arrivals that the policy likes better than the victims."""
    liked = {"fair_weights": {"mice": 1e6}} if policy == "vtc" else {}
    waiters = Waiters(policy, max_wait_s=20, batch_adapters=1, slo_ms=1e9, **liked)
    running = [waiters.arrive("liked")]
    waiters.start()
    victims = [waiters.arrive("victim", 500, priority=-9) for _ in range(5)]
    started = {}
    for second in range(1, 300):
        waiters.now = second
        for kind in ("liked", "mice"):
            waiters.arrive(kind, 1, priority=9)
        sequence = waiters.start()
        started[sequence] = second
        running.append(sequence)
        if len(running) > 4:
            waiters.end(running.pop(1))
        if second > 20:
            for k, victim in enumerate(victims):
                limit = 20 + OVERDUE_TURN * (k + 1)
                assert second < limit or started.get(victim, second + 1) <= limit, (policy, k, second)
    assert all(victim in started for victim in victims)
    if policy != "fcfs":
        others = [s for s in started if s.tenant != "victim"]
        assert any(started[s] - s.arrival < 20 for s in others), "the policy still decides about most"


def test_one_start_in_eight_is_for_the_overdue_within_a_plan_too():
    waiters = Waiters("lcfs", max_wait_s=10)
    old = [waiters.arrive().sequence_id for _ in range(20)]
    waiters.now = 11.0
    new = [waiters.arrive().sequence_id for _ in range(100)]
    waiters.begin()
    order = [waiters.start(new_plan=False).sequence_id for _ in range(4 * OVERDUE_TURN)]
    assert [i for i, s in enumerate(order) if s in old] == [7, 15, 23, 31]
    assert [s for s in order if s in old] == old[:4]
    assert [s for s in order if s in new] == new[::-1][:28]


def test_what_started_overdue_is_preempted_last():
    now = 0.0
    config = SchedulerConfig(policy="priority", max_wait_s=5, max_batch_tokens=64, max_sequences=8, prefix_cache=False)
    loop = CheckedLoop(config, 8, lambda: now)
    sequences = []
    for i, priority in enumerate([-5, *[3] * 8]):
        sequences.append(Sequence(i, [i] * 16, 16, 60, SamplingParams(), 0, arrival=now, priority=priority))
        loop.core.add(sequences[-1])
        now = 6.0
    victim = sequences[0]
    for _ in range(600):
        loop.step()
        if victim.state is State.FINISHED:
            break
    assert victim.is_overdue and victim.epoch == 0
    assert any(s.epoch for s in sequences), "pages did run out"


def test_the_lowest_priority_is_preempted_first():
    config = SchedulerConfig(policy="priority", max_batch_tokens=64, max_sequences=8, prefix_cache=False)
    loop = CheckedLoop(config, 8)
    sequences = [Sequence(i, [i] * 16, 16, 60, SamplingParams(), 0, priority=p) for i, p in enumerate((0, 2, 1))]
    for sequence in sequences:
        loop.core.add(sequence)
    loop.run()
    assert sequences[0].epoch > 0 and sequences[1].epoch == 0


# Fair shares


def test_waiting_tenants_get_tokens_in_proportion_to_their_weights():
    waiters = Waiters("vtc", fair_weights={"b": 3.0})
    for _ in range(400):
        for tenant in "abc":
            waiters.arrive(tenant, 10 if tenant == "a" else 40)
    served = dict.fromkeys("abc", 0)
    for _ in range(400):
        sequence = waiters.start()
        outputs = 5 if sequence.tenant == "a" else 20
        waiters.compute(sequence, outputs)
        waiters.end(sequence)
        served[sequence.tenant] += sequence.num_prompt + 2 * outputs
    assert served["a"] == pytest.approx(served["c"], rel=0.05)
    assert served["b"] == pytest.approx(3 * served["c"], rel=0.05)


def test_a_tenant_that_returns_has_saved_up_no_credit():
    waiters = Waiters("vtc")
    waiters.end(waiters.start() if waiters.arrive("idle") else None)
    for _ in range(200):
        waiters.arrive("busy")
    for _ in range(100):
        waiters.end(waiters.start())
    for _ in range(100):
        waiters.arrive("idle")
    tenants = []
    for _ in range(20):
        sequence = waiters.start()
        tenants.append(sequence.tenant)
        waiters.end(sequence)
    assert tenants.count("idle") in (10, 11), "half each from now on, and nothing made up for"


def test_one_plan_does_not_give_everything_to_the_smallest_counter():
    waiters = Waiters("vtc")
    for tenant in ("a", "a", "a", "a", "b", "b", "b", "b"):
        waiters.arrive(tenant)
    waiters.begin()
    tenants = [s.tenant for s in waiters.queue.look_ahead()]
    assert tenants == ["a", "b"] * 4


def test_a_preempted_sequence_is_not_charged_again():
    waiters = Waiters("vtc")
    first = waiters.arrive("a", 100)
    for _ in range(3):
        waiters.arrive("b", 60)
    waiters.start()
    waiters.preempt(first)
    waiters.arrive("a", 100)
    assert [waiters.start().tenant for _ in range(5)] == ["b", "b", "a", "a", "b"]


def test_counters_of_tenants_that_left_are_forgotten():
    waiters = Waiters("vtc")
    for i in range(20_000):
        waiters.arrive(f"tenant-{i}")
        waiters.end(waiters.start())
    assert num_reachable(waiters.policy) < 20_000


# Clustering


def test_a_full_batch_prefers_its_own_adapters():
    waiters = Waiters("cluster", batch_adapters=2)
    for tenant in ("a", "b", "c", "b", "d", "base", "a"):
        waiters.arrive(tenant)
    running = [waiters.start(), waiters.start()]
    assert [s.tenant for s in running] == ["a", "b"]
    assert [waiters.start().tenant for _ in range(3)] == ["b", "base", "a"]
    assert [waiters.start().tenant for _ in range(2)] == ["c", "d"], "and then the first come"


def test_a_batch_with_few_adapters_takes_the_first_come():
    waiters = Waiters("cluster", batch_adapters=3)
    for tenant in ("a", "b", "a", "c", "a"):
        waiters.arrive(tenant)
    assert [waiters.start().tenant for _ in range(4)] == ["a", "b", "a", "c"]


# Early abort


def test_what_cannot_be_in_time_is_given_up_and_the_server_measures_how_long_a_prompt_takes():
    waiters = Waiters("abort", slo_ms=1000)
    for _ in range(20):
        sequence = waiters.arrive()
        waiters.start()
        waiters.now += 0.3
        waiters.compute(sequence)
        waiters.end(sequence)
    early = waiters.arrive()
    patient = waiters.arrive(slo_s=5.0)
    waiters.now += 0.65
    waiters.begin()
    assert waiters.late == []
    waiters.now += 0.1
    waiters.begin()
    assert waiters.late == [early], "0.75 s have passed, and it takes 0.3"
    assert waiters.start() is patient
    waiters.now += 10
    waiters.preempt(patient)
    assert waiters.start() is patient, "what has started is not given up"


def test_the_newest_goes_first_of_those_that_can_be_in_time():
    waiters = Waiters("abort", slo_ms=1000)
    old, new = waiters.arrive(), waiters.arrive()
    assert waiters.start() is new and waiters.start() is old


def test_one_slow_prompt_does_not_make_every_later_request_hopeless():
    """Nothing would be started any more, and so nothing measured."""
    waiters = Waiters("abort", slo_ms=1000)
    slow = waiters.arrive()
    waiters.start()
    waiters.now += 5
    waiters.compute(slow)
    fresh = waiters.arrive()
    waiters.now += 0.4
    waiters.begin()
    assert waiters.late == [] and waiters.start() is fresh


def test_a_sequence_parked_for_its_adapter_is_given_up_too():
    now = 0.0
    scheduler = Scheduler(SchedulerConfig(policy="abort", slo_ms=500), PageAllocator(50), lambda: now)
    adapter = Handle("slow")
    adapter.status = "loading"
    sequence = Sequence(0, [1] * 4, 4, 4, SamplingParams(), 0, adapter=adapter, arrival=now)
    scheduler.add(sequence)
    assert scheduler.plan().late == ()
    now = 0.6
    assert scheduler.plan().late == (sequence,)
    scheduler.finish(sequence)
    adapter.status = "ready"
    assert scheduler.plan().entries == () and scheduler.is_idle


# A long queue


class CountingHeapWork:
    """Counts the sequences that a policy looks at."""

    def __init__(self, monkeypatch):
        self.count = 0
        is_waiting = Sequence.is_waiting.fget

        def counted(sequence):
            self.count += 1
            return is_waiting(sequence)

        monkeypatch.setattr(Sequence, "is_waiting", property(counted))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_looks_at_as_many_of_50000_as_of_5000(policy, monkeypatch):
    looks = {}
    for num_waiting in (5000, 50_000):
        waiters = Waiters(policy, slo_ms=1e9)
        for i in range(num_waiting):
            waiters.arrive(f"tenant-{i % 250}", 20)
        waiters.start()
        work = CountingHeapWork(monkeypatch)
        for _ in range(20):
            waiters.begin()
            list(waiters.queue.look_ahead())
            for _ in range(10):
                waiters.compute(waiters.start(new_plan=False))
        looks[num_waiting] = work.count
        monkeypatch.undo()
    assert looks[50_000] < 1.2 * looks[5000], looks


def test_a_tenant_whose_overdue_request_is_passed_is_not_forgotten_under_vtc():
    now = [0.0]
    config = SchedulerConfig(policy="vtc", max_wait_s=1.0, prefix_cache=False, max_batch_tokens=512)
    loop = CheckedLoop(config, 21, lambda: now[0])

    def add(number, tenant, prompt, max_tokens, adapter=None):
        sequence = Sequence(
            number,
            [1] * prompt,
            prompt,
            max_tokens,
            SamplingParams(),
            0,
            adapter=adapter,
            tenant=tenant,
            arrival=now[0],
        )
        loop.core.add(sequence)
        return sequence

    slow = Handle(None)
    slow.status = "loading"
    add(0, "slow", 16, 4, slow)
    loop.step()
    add(1, "base", 16 * 14, 30)  # holds most of the pool
    loop.step()
    for number in range(2, 8):
        add(number, "base", 8, 1)
    for _ in range(3):
        loop.step()
    lacks_pages = add(20, "other", 16 * 10, 4)
    now[0] = 5.0
    for _ in range(2):
        loop.step()
    slow.status, slow.content_hash = "ready", "slow"
    for _ in range(60):
        loop.step()
    assert lacks_pages.state is State.FINISHED and loop.scheduler.is_idle


def test_what_is_given_up_does_not_start_in_the_same_plan():
    now = [0.0]
    scheduler = Scheduler(SchedulerConfig(policy="abort", slo_ms=120_000), PageAllocator(1000), lambda: now[0])

    def add(number):
        sequence = Sequence(number, [1] * 16, 16, 8, SamplingParams(), 0, adapter=None)
        scheduler.add(sequence)
        return sequence

    for number in range(7):
        add(number)
    scheduler.plan()
    # Its turn, as it is overdue, and too late.
    late = add(100)
    now[0] = 120.0
    plan = scheduler.plan()
    assert plan.late == (late,)
    assert late not in [entry.sequence for entry in plan.entries] and late.state is State.WAITING


def test_deadlines_of_requests_that_ended_are_forgotten():
    waiters = Waiters("abort", slo_ms=1000)
    for _ in range(5000):
        waiters.arrive(slo_s=86_400.0).state = State.FINISHED
    assert num_reachable(waiters.policy) < 30_000


def test_plans_that_start_nobody_leave_nothing_behind_under_vtc():
    waiters = Waiters("vtc")
    for i in range(300):
        waiters.arrive(f"tenant-{i % 100}")
    before = num_reachable(waiters.policy)
    for _ in range(200):
        waiters.begin()
        list(waiters.queue.look_ahead())
    assert num_reachable(waiters.policy) < before + 4000


def test_thousands_that_are_late_at_once_are_given_up_over_several_plans():
    waiters = Waiters("abort", slo_ms=1000)
    for _ in range(5000):
        waiters.arrive()
    waiters.now = 2.0
    start = time.perf_counter()
    assert waiters.start() is None
    assert time.perf_counter() - start < 0.1
    for _ in range(20):
        waiters.begin()
    assert len(waiters.late) == 5000
