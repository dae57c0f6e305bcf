"""What the first host tells arrives on the others as it was, in order, and is then gone from the store."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slora_jax.engine import hosts
from slora_jax.engine.batch import BatchShape
from slora_jax.engine.hosts import Follower, Followers
from slora_jax.engine.sampling import SamplerShape, build_sampler_inputs
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence

ADAPTERS = Path(__file__).parent.parent / "oracle" / "fixtures" / "smollm_gqa3" / "adapters"
MODEL = ModelConfig.from_folder(ADAPTERS.parent / "model")


class Store(dict):
    """As much of JAX's key-value store as is used."""

    def key_value_set_bytes(self, key, value):
        assert key not in self
        self[key] = bytes(value)

    def blocking_key_value_get_bytes(self, key, timeout):
        return self[key]

    def key_value_delete(self, key):
        del self[key]


class RunnerStub:
    def __init__(self):
        self.calls = []

    def launch(self, *arguments):
        self.calls.append(arguments)

    def all_shapes(self, active, max_rank, pages):
        return [(active, max_rank, pages)]

    def warm_up(self, shapes):
        self.calls.append(shapes)


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 1)
    return store


def make_follower() -> tuple[Follower, RunnerStub, UnifiedPool]:
    layout = PoolLayout.for_model(MODEL)
    pool, runner = UnifiedPool(layout, 12, np.dtype(np.float32)), RunnerStub()
    return Follower(MODEL, layout, pool, runner, host_adapter_bytes=1), runner, pool


def test_steps_arrive_as_they_were(store):
    shape = BatchShape(8, 4, 3, 64, 64, (0, 3), False, 16)
    packed, fields = shape.zeros()
    fields["token_ids"][:3] = (5, -1, 7)
    fields["scale"][0, :2] = (0.5, -2.0)
    sequence = Sequence(0, [5, 6], 2, 8, SamplingParams(temperature=0.7, repetition_penalty=1.5), seed=2**63 + 1)
    sampler, inputs = build_sampler_inputs([ScheduledSequence(sequence, 0, 2, True, 0)], {}, 4, 97)
    followers = Followers()
    followers.warm_up([3, 0], 33, 5)
    followers.run(shape, packed, sampler, inputs)
    followers.stop()
    followers.warm_up([1], 1, 1)  # nobody is told any more
    follower, runner, _ = make_follower()
    follower.follow()
    assert not store
    (shapes, (got_shape, got_packed, got_sampler, got_inputs)) = runner.calls
    assert shapes == [((3, 0), 33, 5)]
    assert (got_shape, got_sampler) == (shape, sampler)
    assert isinstance(got_sampler, SamplerShape)
    np.testing.assert_array_equal(got_packed, packed)
    for name, array in vars(inputs).items():
        got = getattr(got_inputs, name)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_adapters_are_read_from_their_folders_and_written_in_order(store):
    layout = PoolLayout.for_model(MODEL)
    followers, expected = Followers(), {}
    first = 1
    for name in ("qv-r8", "mlp-r3"):
        host = hosts.load_adapter(hosts.read_header(ADAPTERS / name, MODEL, layout), np.float32)
        pages = list(range(first, first + host.header.num_pages))
        first += len(pages)
        expected[name] = (pages, host.packed)
        followers.start_copy(ADAPTERS / name, host.content_hash, pages)
    followers.finish_copy()
    followers.finish_copy()
    followers.stop()
    follower, _, pool = make_follower()
    follower.follow()
    array = np.asarray(pool.array)
    for pages, packed in expected.values():
        np.testing.assert_array_equal(array[:, :, pages[0] * 16 : (pages[-1] + 1) * 16], packed)


def test_another_adapter_under_the_same_path_is_refused(store):
    followers = Followers()
    followers.start_copy(ADAPTERS / "qv-r8", "something else", [1])
    followers.finish_copy()
    follower, _, _ = make_follower()
    with pytest.raises(BadAdapter, match=r"qv-r8 is another one here than on the first host"):
        follower.follow()


def test_jaxs_key_value_store_is_still_what_is_used():
    # A process of its own: JAX meets other hosts once, and before anything else.
    program = """
import sys, threading
from slora_jax.engine import hosts
hosts.jax.distributed.initialize(sys.argv[1], 1, 0)
store = hosts._store()
hosts._POLL_MILLISECONDS = 50
assert hosts._value("slora_jax/0/0") is None
store.key_value_set_bytes("slora_jax/0/0", hosts.serialization.msgpack_serialize({"what": "stop"}))
assert hosts._received("slora_jax/0/0") == {"what": "stop"}
assert hosts._value("slora_jax/0/0") is None
followers, heard = hosts.Followers(), threading.Event()
followers._hosts = (1,)
followers.watch(heard.set)
hosts._ask_to_stop(2, None)
hosts._ask_to_stop(2, None)
assert heard.wait(10)
followers.stop()
"""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, address], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
