"""What the first host tells arrives on the others as it was, in order; and none runs what another is not ready for."""

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slora_jax.adapters.peft import load_adapter, read_header
from slora_jax.adapters.store import AdapterStore
from slora_jax.engine.batch import BatchShape
from slora_jax.engine.hosts import Follower, Followers
from slora_jax.engine.runner import LaunchArguments
from slora_jax.engine.sampling import SamplerShape, build_sampler_inputs
from slora_jax.engine.scoring import ScorerArguments, ScorerShape
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence
from tests.helpers.meetings import hosts_that_met

ADAPTERS = Path(__file__).parent.parent / "oracle" / "fixtures" / "smollm_gqa3" / "adapters"
MODEL = ModelConfig.from_folder(ADAPTERS.parent / "model")
LAYOUT = PoolLayout.for_model(MODEL)


class RunnerStub:
    def __init__(self):
        self.calls = []
        self.programs = set()
        self.compiling = threading.Event()
        self.compiling.set()

    def is_compiled(self, arguments):
        return (arguments.shape, arguments.sampler) in self.programs

    def prepare(self, arguments):
        assert self.compiling.wait(10)
        self.programs.add((arguments.shape, arguments.sampler))

    def launch(self, arguments):
        assert self.is_compiled(arguments)
        self.calls.append(arguments)

    def launch_layers(self, arguments):
        assert self.is_compiled(arguments)
        self.calls.append("layers")
        return arguments

    def launch_sampler(self, started, arguments):
        assert started.shape == arguments.shape
        self.calls.append(arguments)

    def all_shapes(self, active, max_rank, pages):
        return [(active, max_rank, pages)]

    def warm_up(self, shapes, when_compiled):
        assert self.compiling.wait(10)
        when_compiled()
        self.calls.append(shapes)


class Pair:
    """Host 0's followers, and the one that follows, in a thread."""

    def __init__(self, hosts):
        self.here, self.there = RunnerStub(), RunnerStub()
        self.followers = Followers(hosts[0], self.here)
        self.pools = [UnifiedPool(LAYOUT, 12, np.dtype(np.float32)) for _ in hosts]
        self.follower = Follower(hosts[1], MODEL, LAYOUT, self.pools[1], self.there)

    def load(self, folder):
        """As host 0's store does."""
        host = load_adapter(read_header(folder, MODEL, LAYOUT), np.float32)
        host = replace(host, packed=self.pools[0].stage(host.packed))
        self.followers.confirm(host)
        return host


@pytest.fixture
def pair():
    with hosts_that_met(2) as hosts:
        pair = Pair(hosts)
        with ThreadPoolExecutor(1) as threads:
            following = threads.submit(pair.follower.follow)
            yield pair
            pair.there.compiling.set()
            pair.followers.stop()
            following.result(10)


@contextlib.contextmanager
def soon():
    with ThreadPoolExecutor(1) as threads:
        yield threads


def a_step():
    shape = BatchShape(8, 4, 3, 64, 64, (0, 3), False, 16)
    packed, fields = shape.zeros()
    fields["token_ids"][:3] = (5, -1, 7)
    fields["scale"][0, :2] = (0.5, -2.0)
    sequence = Sequence(0, [5, 6], 2, 8, SamplingParams(temperature=0.7, repetition_penalty=1.5), seed=2**63 + 1)
    sampler, inputs = build_sampler_inputs([ScheduledSequence(sequence, 0, 2, True, 0)], {}, 4, 97)
    scorer = ScorerArguments(ScorerShape(8, 1), np.array([[0, 1]], np.int32), np.array([[6, 0]], np.int32))
    return LaunchArguments(shape, packed, sampler, inputs, scorer)


def test_steps_arrive_as_they_were(pair):
    step = a_step()
    with soon() as threads:
        warm = threads.submit(pair.followers.compiled)
        pair.followers.warm_up([3, 0], 33, 5)
        warm.result(10)
    pair.followers.run(step)
    pair.followers.stop()
    pair.followers.warm_up([1], 1, 1)  # nobody is told any more
    wait_for(lambda: len(pair.there.calls) == 2)
    (shapes, got) = pair.there.calls
    assert shapes == [((3, 0), 33, 5)]
    assert (got.shape, got.sampler, got.scorer.shape) == (step.shape, step.sampler, step.scorer.shape)
    assert isinstance(got.sampler, SamplerShape) and isinstance(got.scorer.shape, ScorerShape)
    arrays = [(got.packed, step.packed), (got.scorer.rows, step.scorer.rows), (got.scorer.targets, step.scorer.targets)]
    arrays += [(getattr(got.inputs, name), array) for name, array in vars(step.inputs).items()]
    for array, sent in arrays:
        assert array.dtype == sent.dtype
        np.testing.assert_array_equal(array, sent)


def test_tokens_are_drawn_when_it_is_known_which_may_come(pair):
    step = a_step()
    pair.followers.run(step, draws=False)
    wait_for(lambda: pair.there.calls)
    assert pair.there.calls == ["layers"]
    allowed = np.arange(16, dtype=np.int32).reshape(4, 4)
    pair.followers.draw(allowed)
    wait_for(lambda: len(pair.there.calls) == 2)
    np.testing.assert_array_equal(pair.there.calls[1].inputs.allowed, allowed)
    np.testing.assert_array_equal(pair.there.calls[1].inputs.temperature, step.inputs.temperature)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_host_runs_a_program_before_all_have_compiled_it_and_known_ones_wait_for_nobody(pair):
    step = a_step()
    pair.there.compiling.clear()
    with soon() as threads:
        running = threads.submit(pair.followers.run, step)
        time.sleep(0.3)
        assert not running.done()
        pair.there.compiling.set()
        running.result(10)
    wait_for(lambda: len(pair.there.calls) == 1)
    pair.there.compiling.clear()
    pair.followers.run(step)
    wait_for(lambda: len(pair.there.calls) == 2)


def test_warming_up_runs_nothing_before_all_have_compiled(pair):
    pair.there.compiling.clear()
    pair.followers.warm_up([0], 8, 1)
    with soon() as threads:
        compiled = threads.submit(pair.followers.compiled)
        time.sleep(0.3)
        assert not compiled.done()
        pair.there.compiling.set()
        compiled.result(10)


def test_adapters_are_read_from_their_folders_and_written_in_order(pair):
    expected = {}
    first = 1
    for name in ("qv-r8", "mlp-r3"):
        host = pair.load(ADAPTERS / name)
        pages = list(range(first, first + host.header.num_pages))
        first += len(pages)
        expected[name] = (pages, load_adapter(host.header, np.float32).packed)
        pair.followers.start_copy(host.packed, pages)
    pair.followers.finish_copy()
    pair.followers.finish_copy()
    del host  # what is no longer in host 0's memory leaves the others' behind the copies that were started
    for _ in range(2):
        pair.followers.run(a_step())
    wait_for(lambda: len(pair.there.calls) == 2)
    array = np.asarray(pair.pools[1].array)
    for pages, packed in expected.values():
        np.testing.assert_array_equal(array[:, :, pages[0] * 16 : (pages[-1] + 1) * 16], packed)


def test_another_adapter_under_the_same_path_is_refused_and_the_next_is_not(pair, tmp_path):
    shutil.copytree(ADAPTERS / "qv-r8", tmp_path / "qv")
    host = load_adapter(read_header(tmp_path / "qv", MODEL, LAYOUT), np.float32)
    host = replace(host, packed=pair.pools[0].stage(host.packed))
    with pytest.raises(BadAdapter, match=r"host 1 has other files than host 0: adapter .*qv has other weights"):
        pair.followers.confirm(replace(host, content_hash="something else"))
    shutil.rmtree(tmp_path / "qv")
    with pytest.raises(BadAdapter, match=r"host 1 has other files than host 0: .*qv"):
        pair.followers.confirm(host)
    pair.load(ADAPTERS / "qv-r8")


def test_requests_of_an_adapter_that_another_host_lacks_fail_with_its_name_and_those_of_others_do_not(pair, tmp_path):
    shutil.copytree(ADAPTERS / "qv-r8", tmp_path / "qv")
    seen = []

    def confirm(host):
        if host.header.path.name == "qv":
            shutil.rmtree(tmp_path / "qv", ignore_errors=True)  # as if the other host had another disk
        seen.append(host.header.path.name)
        pair.followers.confirm(host)

    store = AdapterStore(MODEL, LAYOUT, np.float32, stage=pair.pools[0].stage, confirm=confirm)
    store.register("lost", tmp_path / "qv")
    store.register("kept", ADAPTERS / "mlp-r3")
    with pytest.raises(BadAdapter, match=r"host 1 has other files than host 0: .*qv"):
        store.get("lost").wait(10)
    assert store.get("kept").wait(10).packed.num_pages == store.get("kept").num_pages
    assert sorted(seen) == ["mlp-r3", "qv"]
    store.close()


def test_stopping_waits_for_no_answer():
    with hosts_that_met(2) as hosts:
        pair = Pair(hosts)  # nobody follows
        with soon() as threads:
            loading = threads.submit(pair.load, ADAPTERS / "qv-r8")
            time.sleep(0.3)
            pair.followers.stop()
            with pytest.raises(BadAdapter, match="the hosts are stopping"):
                loading.result(10)
