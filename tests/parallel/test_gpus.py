"""Several real GPUs, their kernels and what they send each other, answer like one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import all_gather, all_reduce, tuning
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import TABLE, TP, ModelMesh
from tests.helpers.engine_cases import greedy, make_dummy_engine, run

pytestmark = pytest.mark.gpu

_WHOLE = PartitionSpec()
_SIZES = ((1, 64), (3, 64), (128, 4096), (1000, 512), (777, 1031))


@functools.cache
def connected(message_bytes: int = 4 * 2**20) -> ModelMesh:
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    mesh = ModelMesh(ModelConfig(512, 512, 512, 1, 8, 8, 64), jax.devices())
    mesh.connect(message_bytes)
    assert mesh.peers is not None
    return mesh


def sent_by_all(mesh: ModelMesh, shape, dtype, seed: int) -> jax.Array:
    """``[N, *shape]``, a part on each device."""
    values = np.random.default_rng(seed).normal(size=(mesh.size, *shape))
    return jax.device_put(jnp.asarray(values, dtype), NamedSharding(mesh.mesh, PartitionSpec(TP)))


def on_each(mesh: ModelMesh, function):
    """``function(x, group)`` of each device's part of an array; results likewise, ``[N, ...]``."""
    spec = PartitionSpec(TP)
    return jax.jit(
        jax.shard_map(
            lambda table, x: function(x[0], mesh.collectives(table))[None],
            mesh=mesh.mesh,
            in_specs=(TABLE, spec),
            out_specs=spec,
            check_vma=False,
        )
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", _SIZES)
def test_a_sum_is_that_of_all_devices_and_the_same_bits_on_each(shape, dtype):
    mesh = connected()
    x = sent_by_all(mesh, shape, dtype, seed=shape[0])
    got = np.asarray(on_each(mesh, all_reduce)(mesh.table, x).astype(jnp.float32))
    parts = np.asarray(x.astype(jnp.float32))
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    np.testing.assert_array_equal(got[0], np.asarray(jnp.asarray(expected, dtype).astype(jnp.float32)))
    for other in got[1:]:
        np.testing.assert_array_equal(other, got[0])


@pytest.mark.parametrize("axis", [1, 2])
def test_a_gather_has_every_device_in_its_place(axis):
    mesh = connected()
    x = sent_by_all(mesh, (130, 48), "float32", seed=1)
    got = np.asarray(on_each(mesh, lambda part, group: all_gather(part, axis, group))(mesh.table, x))
    for device in got:
        np.testing.assert_array_equal(device, np.stack(list(np.asarray(x)), axis=axis))


def test_a_message_that_is_too_long_is_sent_in_pieces():
    mesh = connected(2**16)
    x = sent_by_all(mesh, (1000, 300), "float32", seed=2)
    got = np.asarray(on_each(mesh, all_reduce)(mesh.table, x))
    np.testing.assert_allclose(got[0], np.asarray(x).sum(0), rtol=1e-6, atol=1e-6)


def test_a_sum_in_two_exchanges_is_a_sum(monkeypatch):
    mesh = connected()
    # So that few devices do it too.
    with tuning.override("all_reduce", "two", {"least_bytes": 0, "least_devices": 2}):
        x = sent_by_all(mesh, (128, 1024), "bfloat16", seed=3)
        got = np.asarray(on_each(mesh, lambda part, group: all_reduce(part, group))(mesh.table, x).astype(jnp.float32))
    np.testing.assert_allclose(got[0], np.asarray(x.astype(jnp.float32)).sum(0), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(got[0], got[1])


def test_a_thousand_steps_of_devices_that_come_at_different_times():
    """Each device works for a while of its own ahead of each message; nobody takes a message for another."""
    mesh = connected()

    def step(x, group):
        rank = jax.lax.axis_index(TP)
        work = jnp.eye(512)
        for i in range(8):
            # Some devices multiply, the others wait for them, in turn.
            rounds = jnp.where((rank + i) % group.size == 0, 20, 0)
            work = jax.lax.fori_loop(0, rounds, lambda _, w: w @ w, work)
            x = all_reduce(x * work[0, 0], group) / group.size
            x = all_gather(x, 1, group)[:, (i + 1) % group.size]
        return x

    program = on_each(mesh, step)
    x = sent_by_all(mesh, (64, 256), "float32", seed=4)
    mean = np.asarray(x).mean(0)
    for _ in range(1000 // 8):
        x = program(mesh.table, x)
    np.testing.assert_allclose(np.asarray(x), np.broadcast_to(mean, x.shape), rtol=1e-4, atol=1e-5)


def test_two_gpus_give_the_tokens_of_one(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        "{model_type: llama, vocab_size: 97, hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
    )
    tokens = {}
    for tp in (1, 2):
        engine = make_dummy_engine(shape, tp, 5, 16)
        requests = [
            greedy(np.arange(1, 40) * (i + 1) % 97, adapter, 24) for i, adapter in enumerate((None, "r5", "r16"))
        ]
        results = run(engine, *[engine.submit(request) for request in requests])
        tokens[tp] = [list(result.completions[0].token_ids) for result in results]
        assert len(engine.device.pool.array.addressable_shards) == tp
    assert tokens[1] == tokens[2]
    assert len({tuple(answer) for answer in tokens[1]}) == 3
