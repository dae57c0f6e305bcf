"""Several real GPUs, their kernels and what they send each other, answer like one."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import all_gather, all_reduce, all_reduce_norm, tuning
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import TABLE, TP, ModelMesh
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.engine_cases import greedy, make_dummy_engine, run
from tests.parallel.test_hosts import CASE, ended, post, two_hosts

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


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 64), (128, 5120), (512, 4096), (252, 1030)])
def test_a_sum_with_its_norm_is_what_both_are_one_after_the_other(shape, dtype, in_two):
    mesh = connected()
    terms = sent_by_all(mesh, shape, dtype, seed=shape[0])
    rng = np.random.default_rng(6)
    x, scale = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=shape[1]), dtype)

    def together(term, group):
        return jnp.stack(all_reduce_norm(term, x, scale, 1e-5, group))

    sizes = {"least_bytes": 0, "least_devices": 2} if in_two else {"least_devices": 100}
    with tuning.override("all_reduce", "two", sizes):
        got = np.asarray(on_each(mesh, together)(mesh.table, terms).astype(jnp.float32))
    total = np.asarray(terms.astype(jnp.float32)).sum(0, dtype=np.float64)
    added = np.asarray(x.astype(jnp.float32)) + total
    # Of what was rounded before.
    norm = got[0, 0] / np.sqrt(np.mean(got[0, 0].astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5)
    # Of two values, one after the other.
    rounding = {"bfloat16": 2**-7, "float32": 2e-6}[dtype]
    np.testing.assert_allclose(got[0, 0], added, rtol=rounding, atol=8 * rounding)
    np.testing.assert_allclose(got[0, 1], norm * np.asarray(scale.astype(jnp.float32)), rtol=rounding, atol=1e-5)
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


RANKS = (1, 3, 5, 8, 16, 33)
SHAPES = {
    "a KV head for each query head": "hidden_size: 512, num_attention_heads: 4, num_key_value_heads: 4",
    "two KV heads, fewer than four devices": "hidden_size: 1024, num_attention_heads: 8, num_key_value_heads: 2",
    "three KV heads, which no number of devices divides": (
        "hidden_size: 768, num_attention_heads: 6, num_key_value_heads: 3"
    ),
}


def shape_file(folder, name: str):
    path = folder / "shape.yaml"
    path.write_text(
        f"{{model_type: llama, vocab_size: 96, {SHAPES[name]}, head_dim: 128, intermediate_size: 1536, "
        "num_hidden_layers: 2, max_position_embeddings: 256}"
    )
    return path


def answers(engine, rounds: int = 1) -> list[list[int]]:
    """Of a mixed batch on every adapter and the base, with prompts longer than a step, again and again."""
    names = [None, *(f"r{rank}" for rank in RANKS)]
    requests = [greedy(np.arange(1, 20 + 9 * i) * (i + 1) % 96, name, 40) for i, name in enumerate(names)]
    return [
        list(result.completions[0].token_ids)
        for _ in range(rounds)
        for result in run(engine, *[engine.submit(request) for request in requests])
    ]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_several_gpus_give_the_tokens_of_one(tmp_path, name, tp):
    """All seven modules, uneven ranks, and a pool in which sequences are preempted and adapters evicted."""
    if jax.device_count() < tp:
        pytest.skip(f"needs {tp} GPUs")
    shape = shape_file(tmp_path, name)
    alone = make_dummy_engine(shape, 1, *RANKS)
    expected = answers(alone)
    assert len(set(map(tuple, expected))) == len(RANKS) + 1
    wide = make_dummy_engine(shape, tp, *RANKS)
    largest = max(info.num_pages for info in wide.adapters().values())
    engine = make_dummy_engine(shape, tp, *RANKS, pages=largest + 16)
    # What nobody has written is not a number.
    pool = engine.device.pool
    pool.array = jax.jit(lambda x: jnp.full_like(x, jnp.nan), out_shardings=pool.array.sharding)(pool.array)
    assert answers(engine, rounds=2) == 2 * expected
    stats = engine.stats()
    assert stats["preemptions"] > 0 and stats["evictions"] > 0 and stats["adapter_loads"] > len(RANKS)
    assert len(pool.array.addressable_shards) == tp


@pytest.mark.parametrize("tp", [2, 4])
def test_all_programs_of_a_server_start_and_run_on_several_gpus(tmp_path, tp):
    """A hundred programs with messages in each: XLA's own all-reduce takes memory for every one, and ran out of it."""
    if jax.device_count() < tp:
        pytest.skip(f"needs {tp} GPUs")
    shape = shape_file(tmp_path, "a KV head for each query head")
    limits = {"max_sequences": 256, "max_batch_tokens": 1024}
    engine = make_dummy_engine(shape, tp, *RANKS, few_shapes=False, pages=4000, scheduler=limits)
    engine.warm_up()
    assert len(engine.device.runner.programs) > 60
    alone = make_dummy_engine(shape, 1, *RANKS)
    compiled = engine.device.runner.programs.num_compiled
    assert answers(engine) == answers(alone)
    assert engine.device.runner.programs.num_compiled == compiled


def test_two_processes_with_a_gpu_each_serve_one_model_and_end_together():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    requests = json.loads((CASE / "expected.json").read_text())["requests"][:3]
    tokenizer = Tokenizer.from_folder(CASE / "model")
    # This process has most of the GPUs' memory.
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    gpus = tuple({"CUDA_VISIBLE_DEVICES": str(i), **share} for i in range(2))
    with two_hosts("--tp", "2", "--adapter-dir", str(CASE / "adapters"), environments=gpus) as (url, processes):
        for request in requests:
            body = {"model": request["adapter"] or "model", "prompt": request["prompt"], "max_tokens": 16}
            answer = post(f"{url}/v1/completions", body | {"temperature": 0, "ignore_eos": True})
            assert answer["choices"][0]["text"] == tokenizer.decode(request["tokens"][:16])
        before = time.monotonic()
        processes[1].kill()
        code, sentence = ended(processes[0])
        assert (code, sentence) == (70, "Error: host 1 was lost (its process ended); start all hosts again")
        assert time.monotonic() - before < 30
