"""The loop when something fails: who ends, who goes on to the same tokens, and what becomes of the pages."""

import random

import pytest

from slora_jax.config import SchedulerConfig
from slora_jax.engine.core import MAX_FAILURES
from slora_jax.errors import EngineStopped
from slora_jax.request import SamplingParams
from slora_jax.scheduler.sequence import NOT_FINITE, Sequence, State
from tests.helpers.checking_device import CheckedLoop, CheckingDevice, NumberStep, RecordingScheduler, next_token

CONFIG = SchedulerConfig(max_batch_tokens=64, max_sequences=8)


class Adapter:
    """An adapter in host memory that counts who holds it."""

    status, failure = "ready", ""

    def __init__(self, name, num_pages=2):
        self.content_hash, self.num_pages, self.holds = name, num_pages, 0

    def hold(self):
        self.holds += 1

    def let_go(self):
        assert self.holds > 0
        self.holds -= 1


class Faults:
    """Raises at chosen calls of chosen stages: ``{"launch": {3}}`` fails the fourth launch."""

    def __init__(self, **calls):
        self.calls = {stage: set(numbers) for stage, numbers in calls.items()}
        self.counts = dict.fromkeys(calls, 0)

    def __call__(self, stage):
        if stage in self.counts:
            self.counts[stage] += 1
            if self.counts[stage] - 1 in self.calls[stage]:
                raise RuntimeError(f"injected in {stage}")


class FaultyStep(NumberStep):
    def __init__(self, entries, faults):
        super().__init__(entries)
        self.faults = faults

    def draw(self):
        self.faults("draw")
        super().draw()

    def read(self):
        self.faults("read")
        return super().read()


class FaultyDevice(CheckingDevice):
    def __init__(self, faults, poison=None):
        super().__init__()
        self.faults = faults
        self.poison = poison

    def start_copy(self, load):
        self.faults("copy")
        super().start_copy(load)

    def arrived(self):
        self.faults("arrive")
        return super().arrived()

    def lay_out(self, entries):
        if self.poison in [entry.sequence.sequence_id for entry in entries]:
            raise OverflowError("2147483648 is too large for int32")
        self.faults("lay_out")
        return super().lay_out(entries)

    def launch(self, batch):
        self.faults("launch")
        super().launch(batch)
        return FaultyStep(batch, self.faults)

    def reset(self):
        super().reset()
        self.faults("reset")


class FaultyScheduler(RecordingScheduler):
    faults = Faults()

    def plan(self):
        self.faults("plan")
        return super().plan()

    def commit(self, plan, tokens):
        self.faults("commit")
        return super().commit(plan, tokens)


def make_loop(poison=None, num_pages=100, config=CONFIG, **faults):
    injected = Faults(**faults)
    kind = type("Injected", (FaultyScheduler,), {"faults": injected})
    return CheckedLoop(config, num_pages, device=FaultyDevice(injected, poison), kind=kind)


def make_sequences(count, adapters=(None,), max_tokens=20):
    return [
        Sequence(
            i,
            [i] * 20,
            20,
            max_tokens,
            SamplingParams(max_tokens=max_tokens),
            i,
            adapter=adapters[i % len(adapters)],
        )
        for i in range(count)
    ]


def expected(sequence, count=20):
    tokens = [sequence.sequence_id] * 20
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[20:]


def drive(loop, limit=500):
    """Turns until idle; returns the tokens handed out and the reason of the end, both by sequence."""
    tokens, ends = {}, {}
    for _ in range(limit):
        outcome = loop.turn()
        for emitted in outcome.emitted:
            assert emitted.sequence not in ends
            tokens.setdefault(emitted.sequence, []).append(emitted.token)
            if emitted.reason:
                ends[emitted.sequence] = emitted.reason
        for ended in outcome.ended:
            assert ended.sequence not in ends
            ends[ended.sequence] = ended.error
        if loop.core.is_idle:
            return tokens, ends
    raise AssertionError("not idle")


def check(loop, sequences, adapters=()):
    """Everybody ended once; whoever was not concerned has all of its tokens; nothing is lost. Returns who failed."""
    tokens, ends = drive(loop)
    assert ends.keys() == set(sequences) and all(s.state is State.FINISHED for s in sequences)
    failed = [s.sequence_id for s in sequences if "injected" in ends[s] or "too large" in ends[s]]
    for sequence in sequences:
        if sequence.sequence_id not in failed:
            assert (tokens[sequence], ends[sequence]) == (expected(sequence), "length")
        else:
            given = tokens.get(sequence, [])
            assert given == expected(sequence)[: len(given)]
    assert loop.pages.num_used == 0
    for _ in range(40):
        loop.step()
    assert not any(adapter.holds for adapter in adapters)
    # And it goes on.
    later = Sequence(1000, [7] * 20, 20, 5, SamplingParams(), 0)
    loop.core.add(later)
    drive(loop)
    assert later.tokens[20:] == [next_token((later.tokens)[: 20 + i]) for i in range(5)]
    return failed


@pytest.mark.parametrize("call", [0, 1, 2, 7])
@pytest.mark.parametrize("stage", ["plan", "copy", "arrive"])
def test_a_plan_that_fails_once_ends_nobody(stage, call):
    adapters = [Adapter("a"), Adapter("b")]
    loop = make_loop(**{stage: {call}})
    sequences = make_sequences(12, (None, *adapters))
    loop.add(*sequences)
    assert check(loop, sequences, adapters) == []
    assert loop.device.num_resets == (0 if stage == "copy" and call > 1 else 1) == loop.core.counts["recoveries"]


@pytest.mark.parametrize("call", [0, 1, 5])
@pytest.mark.parametrize("stage", ["launch", "read", "commit"])
def test_a_step_that_fails_ends_its_own_sequences_only(stage, call):
    adapters = [Adapter("a"), Adapter("b")]
    loop = make_loop(**{stage: {call}})
    sequences = make_sequences(20, (None, *adapters))
    loop.add(*sequences)
    failed = check(loop, sequences, adapters)
    assert 0 < len(failed) <= CONFIG.max_sequences < len(sequences)
    assert loop.device.num_resets == 1


def test_what_cannot_be_laid_out_ends_alone():
    loop = make_loop(poison=3)
    sequences = make_sequences(12)
    loop.add(*sequences)
    assert check(loop, sequences) == [3]
    assert loop.device.num_resets == 0, "nothing that ran had to be made anew"


def test_a_batch_that_fails_only_as_a_whole_ends_its_sequences():
    loop = make_loop(lay_out={2})
    sequences = make_sequences(12)
    loop.add(*sequences)
    failed = check(loop, sequences)
    assert 0 < len(failed) <= 8 and loop.device.num_resets == 0


class BadAdapterError(Exception):
    pass


class Unplannable(Adapter):
    """An adapter that the scheduler cannot look at."""

    @property
    def content_hash(self):
        raise BadAdapterError("injected: no hash")

    @content_hash.setter
    def content_hash(self, value):
        pass


def test_who_cannot_be_planned_is_found_and_ends_alone():
    loop = make_loop()
    sequences = make_sequences(12)
    loop.add(*sequences[:6])
    for _ in range(4):
        loop.turn()
    sequences[9].adapter = Unplannable("x")
    loop.add(*sequences[6:])
    _, ends = drive(loop)
    assert "no hash" in ends.pop(sequences[9])
    assert set(ends.values()) == {"length"} and len(ends) == 11
    assert all(s.tokens[20:] == expected(s) for s in ends)
    assert loop.device.num_resets == 2


def test_a_loop_that_fails_again_and_again_gives_up():
    loop = make_loop(launch=set(range(100)))
    loop.add(*make_sequences(40))
    with pytest.raises(EngineStopped, match=f"{MAX_FAILURES} times in a row: RuntimeError: injected in launch"):
        drive(loop)


def test_a_device_that_cannot_be_made_anew_ends_the_loop():
    loop = make_loop(launch={1}, reset={0})
    loop.add(*make_sequences(2))
    with pytest.raises(EngineStopped, match=r"injected in launch\) and could not start anew .*injected in reset"):
        drive(loop)


def test_failures_that_are_far_apart_do_not_add_up():
    loop = make_loop(plan={5, 10, 15, 20, 25})
    sequences = make_sequences(12)
    loop.add(*sequences)
    assert check(loop, sequences) == [] and loop.core.counts["recoveries"] == 5


def test_leaders_and_their_followers_go_on_together():
    loop = make_loop(plan={3, 9})
    leader, *others = sequences = [Sequence(i, [1] * 40, 40, 12, SamplingParams(), i, leader=None) for i in range(4)]
    for other in others:
        other.leader = leader
    loop.add(*sequences)
    drive(loop)
    assert len({tuple(s.tokens) for s in sequences}) == 1 and len(leader.tokens) == 52
    assert loop.core.counts["recoveries"] == 2


def test_a_sequence_whose_logits_are_not_finite_ends_alone():
    loop = make_loop()

    class NotFiniteStep(NumberStep):
        def read(self):
            result = super().read()
            bad = [entry.sequence.sequence_id == 2 and entry.sequence.num_output > 4 for entry in self.entries]
            return result._replace(tokens=[NOT_FINITE if b else t for b, t in zip(bad, result.tokens, strict=True)])

    launch = loop.device.launch
    loop.device.launch = lambda batch: launch(batch) and NotFiniteStep(batch)
    sequences = make_sequences(6)
    loop.add(*sequences)
    tokens, ends = drive(loop)
    assert ends.pop(sequences[2]) == "error" and set(ends.values()) == {"length"}
    assert tokens[sequences[2]][-1] == NOT_FINITE and NOT_FINITE not in sequences[2].tokens
    assert all(s.tokens[20:] == expected(s) for s in ends)


@pytest.mark.parametrize("seed", range(8))
def test_random_faults_in_a_tiny_pool_lose_no_page_and_change_no_token(seed):
    rng = random.Random(seed)
    stages = ("plan", "copy", "arrive", "lay_out", "launch", "read", "commit")
    # Far enough apart for a step to work in between.
    faults = {stage: set(range(5 + i * 19, 4000, 130 + rng.randrange(40))) for i, stage in enumerate(stages)}
    adapters = [Adapter(str(i), rng.randrange(1, 4)) for i in range(5)]
    config = CONFIG.model_copy(update={"prefix_cache": bool(seed % 2), "max_sequences": 6})
    loop = make_loop(num_pages=22, config=config, **faults)
    loop.device.copy_turns = 1 + seed % 3
    sequences = make_sequences(60, (None, *adapters), max_tokens=25)
    todo = list(sequences)
    tokens, ends = {}, {}
    for _ in range(3000):
        while todo and rng.random() < 0.3:
            loop.core.add(todo.pop(0))
        if ends and rng.random() < 0.02:
            running = [s for s in sequences if s not in ends and s.state is State.RUNNING]
            for sequence in running[:1]:
                loop.core.finish(sequence)
                ends[sequence] = "cancelled"
        outcome = loop.turn()
        for emitted in outcome.emitted:
            tokens.setdefault(emitted.sequence, []).append(emitted.token)
            if emitted.reason:
                ends[emitted.sequence] = emitted.reason
        ends |= {ended.sequence: ended.error for ended in outcome.ended}
        if not todo and loop.core.is_idle:
            break
    assert ends.keys() == set(sequences)
    whole = [s for s in sequences if ends[s] == "length"]
    assert len(whole) > 10 and all(tokens[s] == expected(s, 25) for s in whole)
    assert loop.pages.num_used == 0


class Told:
    """A constraint that allows anything, and completes the answer after so many tokens."""

    def __init__(self, most):
        self.told, self.most = [], most

    def accept(self, token):
        self.told.append(token)
        return len(self.told) == self.most

    def allow(self, words):
        words[:] = -1


@pytest.mark.parametrize("faults", [{}, {"draw": {9}}, {"read": {7}}, {"commit": {11}}, {"launch": {5, 12}}])
def test_constrained_sequences_are_told_every_token_before_the_next_is_drawn(faults):
    """Beside others, through preemption, and when steps fail: the device asserts it at every draw."""
    loop = make_loop(num_pages=14, **faults)
    sequences = make_sequences(6)
    for sequence in sequences[::2]:
        sequence.constraint = Told(most=12)
    loop.add(*sequences)
    tokens, ends = drive(loop)
    lost = [sequence for sequence in sequences if "injected" in ends[sequence]]
    assert bool(lost) == bool(faults)
    for sequence in sequences:
        if sequence in lost:
            continue
        count = 12 if sequence.constraint else 20
        assert tokens[sequence] == expected(sequence, count)
        assert ends[sequence] == ("complete" if sequence.constraint else "length")
        if sequence.constraint:
            assert sequence.constraint.told == tokens[sequence]


def test_a_step_that_was_not_drawn_loses_nobody():
    """The step behind it fails to be taken in: its own sequences end, those of the one launched meanwhile go on."""
    loop = make_loop(commit={3})
    early, late = make_sequences(2)
    loop.add(early)
    for _ in range(4):
        loop.step()
    loop.add(late)
    tokens, ends = drive(loop)
    assert "injected in commit" in ends[early] and ends[late] == "length"
    assert tokens[late] == expected(late)
