"""What several devices' programs hold and send, read from the arrays and from the compiled code."""

import contextlib
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import PartitionSpec

from pallas_kernels.lora import triton as lora_kernels
from pallas_kernels.paged_attention import rotary_triton
from pallas_kernels.paged_attention import triton as attention
from slora_jax.bench import collectives as bench
from slora_jax.bench.__main__ import main
from slora_jax.bench.plan import message_bytes
from slora_jax.engine.batch import BatchShape, padded_rank
from slora_jax.engine.forward import WholeForward
from slora_jax.engine.sampling import SamplerShape
from slora_jax.engine.transfer import Transfer
from slora_jax.errors import InvalidRequest
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import Llama
from slora_jax.model.mesh import TP, ModelMesh
from slora_jax.model.modules import MODULES
from slora_jax.model.weights import sharded_abstract_params
from tests.helpers.engine_cases import FIXTURES, make_engine
from tests.helpers.triton_on_cpu import compiled

_COLLECTIVE = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\(")


def collectives(program: jax.stages.Compiled) -> list[tuple[str, str, tuple[int, ...]]]:
    """Kind, element type and result's shape of every collective of a program; sorted."""
    text = program.as_text()
    found = [
        (kind, dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims, kind in _COLLECTIVE.findall(text)
    ]
    assert len(found) == len(re.findall(r" (?:all|reduce-scatter|collective)[\w-]*\(", text)), "a form not known here"
    return sorted(found)


def sent_elements(kind: str, shape: tuple[int, ...], size: int) -> int:
    """What each device sends: a ring, as in the paper; N devices."""
    rounds = {"all-reduce": 2, "all-gather": 1}[kind] * (size - 1)
    assert np.prod(shape) * rounds % size == 0
    return int(np.prod(shape)) * rounds // size


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "shape.yaml"
    file.write_text(
        "{model_type: llama, vocab_size: 97, hidden_size: 48, intermediate_size: 80, num_hidden_layers: 1, "
        "num_attention_heads: 8, num_key_value_heads: 4, max_position_embeddings: 256}"
    )
    return file


def compiled_step(engine, modules: str, rank: int) -> jax.stages.Compiled:
    active = tuple(i for i, module in enumerate(MODULES) if module in modules.split())
    shape = BatchShape(24, 8, 4, 64 if active else 0, 32 if active else 0, active, False, rank if active else 0)
    return lowered_step(engine, shape).compile({"xla_backend_optimization_level": 0})


def lowered_step(engine, shape: BatchShape) -> jax.stages.Lowered:
    """All of a step as one program, as a GPU runs it."""
    runner = engine.device.runner
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    mesh = ModelMesh.create(engine.model_config, engine.config.mesh.tp)
    hidden = jax.ShapeDtypeStruct((shape.tokens, engine.model_config.hidden_size), runner.model.dtype)
    whole = WholeForward(runner.model, mesh, Transfer(mesh))
    return whole.lower(shape, runner.params, tokens, engine.device.pool.array, hidden)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_low_rank_sums_are_on_their_way_before_the_bases_product(shape_file, quantization):
    engine = make_engine(shape_file, dummy=True, mesh={"tp": 4}, pages=4000, quantization=quantization)
    shape = BatchShape(24, 8, 4, 64, 32, tuple(range(len(MODULES))), False, 16)
    lines = lowered_step(engine, shape).as_text().splitlines()
    # One device's weights of [q | k | v], o, [gate | up] and down, by which they are found among the products.
    weights = "48x24", "12x48", "48x40", "20x48"
    if quantization:
        weights = tuple("x".join(reversed(weight.split("x"))) + "xf8E4M3FN" for weight in weights)
    products = [
        next(i for i, line in enumerate(lines) if "stablehlo.dot_general" in line and f"tensor<{weight}" in line)
        for weight in weights
    ]
    kinds = "all_gather", "all_reduce", "all_gather", "all_reduce"
    for before, kind, product in zip((0, *products), kinds, products, strict=False):
        assert any(f"stablehlo.{kind}" in line for line in lines[before:product]), (kind, product)


@pytest.mark.parametrize("tp", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_steps_collectives_are_the_papers(shape_file, tp):
    engine = make_engine(shape_file, dummy=True, mesh={"tp": tp}, pages=4000)
    tokens, hidden, layers, rank = 24, 48, 1, 16
    base = collectives(compiled_step(engine, "", 0))
    # After o, after down, and once for the embedding.
    assert base == [("all-reduce", "f32", (tokens, hidden))] * (2 * layers + 1)
    assert sent_elements(*base[0][::2], tp) == 2 * (tp - 1) * tokens * hidden // tp

    def of_lora(program):
        rest = collectives(program)
        for collective in base:
            rest.remove(collective)
        return rest

    attention = of_lora(compiled_step(engine, "q k v o", rank))
    assert sorted({kind for kind, _, _ in attention}) == ["all-gather", "all-reduce"]
    assert len(attention) == 2 * layers
    sent = sum(sent_elements(kind, shape, tp) for kind, _, shape in attention)
    assert sent == layers * 5 * (tp - 1) * tokens * rank // tp
    program = compiled_step(engine, " ".join(MODULES), rank)
    sent = sum(sent_elements(kind, shape, tp) for kind, _, shape in of_lora(program))
    assert sent == layers * (5 + 4) * (tp - 1) * tokens * rank // tp
    planned = message_bytes(engine.model_config, tp, tokens, 0, dict.fromkeys(MODULES, rank), itemsize=4)
    assert planned["lora"] == sent * 4
    assert planned["base"] == len(base) * sent_elements(*base[0][::2], tp) * 4
    # And no device copies its part of the pool, nor what hidden states are written to.
    memory, pool = program.memory_analysis(), engine.device.pool.array.addressable_shards[0].data
    assert memory.alias_size_in_bytes == pool.nbytes + tokens * engine.model_config.hidden_size * 4
    assert memory.temp_size_in_bytes < pool.nbytes / 4


def test_ranks_that_the_devices_do_not_divide_are_sent_rounded_up(shape_file):
    engine = make_engine(shape_file, dummy=True, mesh={"tp": 4})
    widths = {shape[1:] for _, _, shape in collectives(compiled_step(engine, "q v down", 13)) if len(shape) > 2}
    assert {int(np.prod(width)) for width in widths} == {2 * 16, 16}
    assert [padded_rank(rank) for rank in (1, 8, 9, 33, 256)] == [8, 8, 16, 64, 256]


def test_sampling_sends_the_logits_once(shape_file):
    engine = make_engine(shape_file, dummy=True, mesh={"tp": 4})
    sampler = SamplerShape(16, random=True, filtered=False, history=0, logprobs=False)
    program = engine.device.runner.programs.get(sampler)
    assert collectives(program) == [("all-gather", "f32", (16, 4, 25))], "97 tokens, in four equal parts"


def test_one_device_sends_nothing_and_runs_no_shard_map(shape_file):
    engine = make_engine(shape_file, dummy=True)
    text = lowered_step(engine, BatchShape(24, 8, 4, 64, 32, (0, 3), False, 16)).as_text()
    assert "manual_computation" not in text and "all_reduce" not in text and "all_gather" not in text


@pytest.mark.parametrize("scheme", ["o split", "o whole", "qkv split"])
def test_the_benchmarks_schemes_give_one_devices_numbers_and_send_what_it_says(scheme):
    model, (tokens, adapters, rank) = ModelConfig(97, 48, 80, 1, 8, 4, 8), (6, 3, 8)
    mesh = ModelMesh.create(model, 4)
    (layer,) = bench.layers_drawn(model, mesh, scheme, adapters, rank, 1, jnp.float32)()
    x = np.random.default_rng(0).normal(size=(tokens, 64 if "o" in scheme else 48)).astype(np.float32)
    specs = bench.SCHEMES[scheme].specs
    x_spec, y_spec = (PartitionSpec(None, TP), PartitionSpec()) if "o" in scheme else (PartitionSpec(), specs["kernel"])
    program = jax.jit(
        jax.shard_map(
            lambda x, layer: bench.SCHEMES[scheme].apply(x, layer, adapters, mesh.collectives(None)),
            mesh=mesh.mesh,
            in_specs=(x_spec, specs),
            out_specs=y_spec,
            check_vma=False,
        )
    )
    whole = {name: np.asarray(array) for name, array in layer.items()}
    of_token = np.repeat(np.arange(adapters), tokens // adapters)

    def update(a, b):
        return np.einsum("ti,tri,tro->to", x, a[of_token], b[of_token])

    if "o" in scheme:
        expected = x @ whole["kernel"] + update(whole["a"], whole["b"])
    else:
        # Device i has the ranks i, i + N, ... of A, and its columns of q, k and v side by side.
        order = np.arange(rank).reshape(4, -1).T.reshape(-1)
        parts = [np.split(update(whole[f"a_{m}"][:, order], whole[f"b_{m}"]), 4, axis=1) for m in "qkv"]
        expected = x @ whole["kernel"] + np.concatenate(
            [part for parts in zip(*parts, strict=True) for part in parts], axis=1
        )
    np.testing.assert_allclose(program(x, layer), expected, rtol=1e-4, atol=1e-4)
    sent = sum(sent_elements(kind, shape, 4) for kind, _, shape in collectives(program.lower(x, layer).compile()))
    assert sent * 4 == bench.sent_bytes(scheme, 4, tokens, rank, 48, 4)


def test_the_benchmark_of_collectives_runs(shape_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", ((4, 2),))
    monkeypatch.setattr(bench, "RANKS", (8,))
    out = tmp_path / "out.json"
    flags = ["--tp", "2", "--model", str(shape_file), "--layers", "2", "--out", str(out)]
    done = CliRunner().invoke(main, ["collectives", *flags])
    assert done.exit_code == 0, done.output
    (result,) = json.loads(out.read_text())
    assert result["seconds_per_layer"].keys() == bench.SCHEMES.keys() and min(result["seconds_per_layer"].values()) > 0
    # A and B of two adapters in bfloat16, 48 wide: half of each, or all of B.
    assert result["adapter_bytes_per_layer"]["o split"] == 2 * 2 * 8 * (48 + 48) // 2
    assert result["adapter_bytes_per_layer"]["o whole"] == 2 * 2 * 8 * (48 // 2 + 48)
    assert "give --tp 2 or more" in CliRunner().invoke(main, ["collectives", "--tp", "1"]).output


@pytest.mark.parametrize("tp", [2, 4])
def test_each_device_has_its_part_of_pool_and_weights(shape_file, tp):
    one, several = (make_engine(shape_file, dummy=True, mesh={"tp": n}) for n in (1, tp))
    shards = several.device.pool.array.addressable_shards
    assert len(shards) == tp
    assert {shard.data.nbytes * tp for shard in shards} == {one.device.pool.array.nbytes}
    assert several.pool_layout.page_bytes(4) * tp == one.pool_layout.page_bytes(4)
    for ranks in ({"q": 8, "k": 8, "v": 8, "o": 8}, dict.fromkeys(MODULES, 64)):
        sizes = [
            engine.pool_layout.adapter(ranks).num_entries * engine.pool_layout.row_width for engine in (one, several)
        ]
        assert sizes[1] * tp <= sizes[0] * 1.1
    weights = several.device.runner.params
    norms = {"attention_norm", "mlp_norm", "norm"}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(weights):
        whole = any(key.key in norms for key in keys)
        assert leaf.addressable_shards[1].data.nbytes * (1 if whole else tp) == leaf.nbytes, keys


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("decode_only", [True, False])
def test_the_kernels_take_one_devices_part_of_a_70b_model(decode_only):
    model = ModelConfig(32000, 8192, 28672, 1, 64, 8, 128)
    mesh = ModelMesh.create(model, 8)
    whole = partial(jax.ShapeDtypeStruct, sharding=mesh.replicated)
    shape = BatchShape(32 if decode_only else 512, 32, 256, 256 * 32, 512, tuple(range(7)), decode_only, 64)
    pool = PoolLayout.for_model(model, 8).pool_shape(10)
    with contextlib.ExitStack() as stack:
        kernels = [stack.enter_context(compiled(module, 90)) for module in (lora_kernels, attention, rotary_triton)]
        model_of_one = Llama(model, jnp.dtype(jnp.bfloat16), "triton", 8)
        WholeForward(model_of_one, mesh, Transfer(mesh)).jitted(shape).trace(
            None,
            sharded_abstract_params(model, jnp.bfloat16, mesh),
            whole((shape.packed_size,), jnp.int32),
            whole((32,), jnp.int32),
            jax.ShapeDtypeStruct(pool, jnp.bfloat16, sharding=mesh.pool),
            whole((shape.tokens, model.hidden_size), jnp.bfloat16),
        ).lower(lowering_platforms=("cuda",))
    # Shrink and expand for each of qkv, o, gate and up, down; attention; the KV write.
    assert [len(names) for names in kernels] == [8, 2 if decode_only else 3, 1]


def test_a_bad_number_of_devices_gets_a_sentence(shape_file):
    for tp, message in (
        (
            5,
            r"cannot be shared by 5 devices: .*hidden_size \(48\) .*intermediate_size \(80\).* tp from 1, 2, 4, 8",
        ),
        (16, r"tp=16 needs as many devices, and JAX finds 8 \(cpu\); lower tp"),
        (0, "mesh.tp: .*greater than or equal to 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            make_engine(shape_file, dummy=True, mesh={"tp": tp})
    with pytest.raises(InvalidRequest, match="query head of the 4 for each; choose tp from 1, 2, 4"):
        make_engine(FIXTURES / "llama1_mha" / "model", mesh={"tp": 8})
