"""The command of the paper's experiments, and what it compares the engine with."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from pallas_kernels import LoraSegments
from slora_jax import Engine
from slora_jax.adapters.peft import load_adapter
from slora_jax.bench.__main__ import main
from slora_jax.bench.baselines import padded_lora
from slora_jax.bench.merged import MergedWeights
from slora_jax.bench.paper import (
    EXPERIMENTS,
    SCALES,
    Point,
    SimulatedServer,
    read_results,
    run_paper,
    table,
)
from slora_jax.bench.plan import GPUS, Load, plan
from slora_jax.bench.served import EngineServer
from slora_jax.bench.workload import Case, Lengths, draw_workload
from slora_jax.config import build_config, read_yaml
from slora_jax.engine.build import BaseModel, make_parts
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES
from slora_jax.model.weights import dummy_params
from tests.helpers.engine_cases import FIXTURES, compiled_fast, greedy, run
from tests.helpers.engine_cases import Case as OracleCase

TOY = """
model_type: llama
vocab_size: 32000
hidden_size: 32
intermediate_size: 64
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 4
max_position_embeddings: 64
"""
LLAMA_7B = ModelConfig.from_hf(read_yaml(Path(__file__).parents[2] / "configs" / "shapes" / "llama-7b.yaml"))
GROUPED = ModelConfig(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


def invoke(*arguments):
    done = CliRunner().invoke(main, ["paper", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def check_results(folder, names, systems):
    for name in names:
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["experiment"] == name and "--scale toy" in result["command"]
        assert all(row["throughput"] > 0 and row["num_requests"] > 0 for row in result["rows"])
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    ablation = json.loads((folder / "ablation.json").read_text())
    assert [row["series"] for row in ablation["rows"]] == systems


def test_every_experiment_runs_in_simulated_time(tmp_path):
    pytest.importorskip("matplotlib")
    out = invoke("--simulate", "--scale", "toy", "--out", tmp_path)
    check_results(tmp_path, EXPERIMENTS.keys() - {"merged"}, ["slora-jax", "fixed share"])
    assert "merged: left out" in out and "vLLM" not in out, "the peers did other work"
    (tmp_path / "abort.png").unlink()
    invoke("--plot-only", tmp_path)
    assert (tmp_path / "abort.png").is_file()
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["complete"] and f"--out {tmp_path}" in result["command"]
    planned = plan(LLAMA_7B, 1, GPUS["h200"], Load(1, 1))["pages"]["total"]
    assert {row["pool_pages"] for row in result["rows"]} == {100}
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert {row["pool_pages"] for row in rates["rows"]} == {planned + 1}
    assert {row["requests"] for row in rates["rows"]} == {row["num_requests"] for row in rates["rows"]}
    fairness = json.loads((tmp_path / "fairness.json").read_text())["rows"]
    assert fairness[1]["requests"] > fairness[1]["num_requests"] == fairness[0]["requests"]


def test_a_run_that_is_cut_off_is_shown_as_incomplete(tmp_path):
    class Broken(SimulatedServer):
        def run(self, point):
            if point.system == "split":
                raise RuntimeError("cut off")
            return super().run(point)

    model = LLAMA_7B
    with pytest.raises(RuntimeError, match="cut off"):
        run_paper(["ablation"], Broken(model, 1000), SCALES["toy"], tmp_path, "", lambda line: None)
    (result,) = read_results(tmp_path)
    assert not result["complete"] and len(result["rows"]) == 1
    assert "in a small pool (incomplete)" in table(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--simulate", "--seed", "7"], "another scale (seed 42 there, 7 here)"),
        ([], "another server (simulated there, engine here)"),
        (["--simulate", "--model", "llama-13b"], "another model"),
    ],
)
def test_results_of_another_run_are_not_joined(tmp_path, change, message):
    invoke("rates", "--simulate", "--scale", "toy", "--no-plots", "--out", tmp_path)
    before = (tmp_path / "rates.json").read_text()
    arguments = ["paper", "rates", "--scale", "toy", "--no-plots", "--out", str(tmp_path), *change]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and message in done.output and "give another --out" in done.output
    assert (tmp_path / "rates.json").read_text() == before


def test_the_peers_are_shown_beside_the_same_work_only(tmp_path):
    model = dataclasses.asdict(LLAMA_7B)
    row = {"series": "slora-jax, base", "x": 0, "throughput": 30.0}
    same = {"server": "engine", "device": "NVIDIA H200", "model": model, "rows": [row],
            "scale": {"table_requests": 1000, "table_longest": 512}}  # fmt: skip
    others = (
        {"server": "simulated"},
        {"device": "NVIDIA H100 80GB HBM3"},
        {"scale": same["scale"] | {"table_requests": 200}},
        {"scale": same["scale"] | {"table_longest": 256}},
        {"model": model | {"num_layers": 40}},
    )
    for change in ({}, *others):
        (tmp_path / "table3.json").write_text(json.dumps(same | change))
        (result,) = read_results(tmp_path)
        assert (len(result["rows"]) > 1) == (not change), change


def test_the_simulation_has_no_pool_to_choose(tmp_path):
    done = CliRunner().invoke(main, ["paper", "--simulate", "--pool-gigabytes", "3", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "--pool-gigabytes is the engine's" in done.output


@pytest.mark.slow
def test_one_engine_serves_many_experiments(toy, tmp_path):
    pytest.importorskip("matplotlib")
    names = ("table3", "abort", "merged", "ablation")
    arguments = ["paper", *names, "--scale", "toy", "--model", str(toy), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    # What the timed parts need was compiled ahead of them.
    assert done.exit_code == 0, done.output
    check_results(tmp_path / "out", names, ["slora-jax", "fixed share", "padded products"])
    merged = json.loads((tmp_path / "out/merged.json").read_text())["rows"][1]
    assert merged["series"] == "merged" and merged["switches"] >= 2 and merged["switch_milliseconds"] > 0


@pytest.mark.slow
def test_a_small_pool_of_one_run_does_not_shrink_the_next(toy):
    scale = SCALES["toy"]
    workload = draw_workload(2, 2, 32000, seed=1, lengths=Lengths.below(12))
    point = Point("few", 0, Case("S1", 2), workload, scale.scheduler(), pool_pages=50)
    with contextlib.closing(EngineServer(str(toy), scale, scale.max_sequences, {"pages": 300})) as server:
        totals = []
        for run in (point, dataclasses.replace(point, pool_pages=None)):
            outcome = server.run(run)
            totals.append(outcome.pool_pages)
            assert outcome.num_loads == len({item.adapter for item in workload}), "each run begins with an empty pool"
    assert totals == [50, 300]


def test_without_torch_the_comparison_with_peft_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    done = CliRunner().invoke(main, ["peft"])
    assert done.exit_code == 1 and "install torch, transformers and peft" in done.output


def test_an_unknown_experiment_is_refused():
    done = CliRunner().invoke(main, ["paper", "table9"])
    assert done.exit_code == 2 and "known are table3" in done.output


def adapter(rng, layout, ranks):
    """An adapter's weights by (layer, module), and packed."""
    weights = {
        (layer, module): (
            rng.standard_normal((rank, layout.shapes[module].d_in), np.float32),
            rng.standard_normal((layout.shapes[module].d_out, rank), np.float32),
        )
        for layer in range(layout.num_layers)
        for module, rank in ranks.items()
    }
    return weights, layout.adapter(ranks).pack(weights, np.dtype(np.float32))


def test_padded_products_are_gathered_lora():
    rng = np.random.default_rng(1)
    layout = PoolLayout.for_model(GROUPED)
    all_ranks = [{"q": 4, "v": 2, "o": 3}, {"q": 7, "k": 8}]
    scales, counts, scale = [0.5, 2.0], [3, 1], np.zeros((3, len(MODULES)), np.float32)
    pool = np.full(layout.pool_shape(40), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, 40)))
    rank, start_a, start_b = (np.zeros((3, len(MODULES)), np.int32) for _ in range(3))
    pages, adapters, page_start = [], [], [0]
    for i, ranks in enumerate(all_ranks):
        weights, packed = adapter(rng, layout, ranks)
        adapters.append(weights)
        of = layout.adapter(ranks)
        own = [free.pop() for _ in range(of.num_pages)]
        for j, page in enumerate(own):
            pool[:, :, page * 16 : page * 16 + 16] = packed[:, :, j * 16 : j * 16 + 16]
        pages += own
        page_start.append(len(pages))
        rank[i], start_a[i], start_b[i], scale[i] = of.ranks, of.start_a, of.start_b, scales[i]
    segments = LoraSegments(
        token_start=jnp.array([0, 3, 4, 4], jnp.int32), page_start=jnp.array([*page_start, page_start[-1]], jnp.int32),
        pages=jnp.array([*pages, 0, 0], jnp.int32), rank=jnp.array(rank), start_a=jnp.array(start_a),
        start_b=jnp.array(start_b), scale=jnp.array(scale), active=(0, 1, 2, 3), max_rank=256, total_rank=256,
    )  # fmt: skip
    ops = padded_lora(8)
    widths = [(s.d_in, s.d_out) for s in layout.shapes.values()]
    x = rng.standard_normal((6, GROUPED.hidden_size), np.float32)
    plan = ops.plan(segments, num_tokens=6, row_width=layout.row_width, widths=widths, backend="reference")
    for modules in ((0, 1, 2), (3,)):
        got = ops.delta(jnp.array(x), jnp.array(pool), 1, plan, modules)
        expected = [np.zeros((6, widths[m][1])) for m in modules]
        for (weights, factor, first), count in zip(zip(adapters, scales, (0, 3), strict=True), counts, strict=True):
            for out, m in zip(expected, modules, strict=True):
                if (1, MODULES[m]) in weights:
                    a, b = weights[1, MODULES[m]]
                    out[first : first + count] = factor * x[first : first + count] @ a.T @ b.T
        np.testing.assert_allclose(got, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-3)


@pytest.fixture
def small_case():
    with compiled_fast():
        yield OracleCase(FIXTURES / "smollm_gqa3")


def test_an_engine_refuses_an_adapter_of_a_higher_rank_than_its_padded_products():
    config = build_config({"model": "grouped", "dummy": True, "compilation_cache": None, "pool": {"pages": 60}})
    params = dummy_params(GROUPED, jnp.dtype(jnp.float32), 0)
    base = BaseModel(GROUPED, params, None, "base", None)
    engine = Engine.owning(make_parts(config, base, padded_lora(4)))
    ranks = {"q": 4, "v": 8}
    packed = adapter(np.random.default_rng(4), engine.pool_layout, ranks)[1]
    with pytest.raises(BadAdapter, match="rank 8, but these lora_ops take at most 4"):
        engine.register_loaded_adapter("r8", ranks, packed)
    engine.close()


def test_merged_weights_answer_as_the_adapter_on_the_fly(small_case):
    engine = small_case.engine(scheduler={"prefix_cache": False})
    (asked,) = [r for r in small_case.requests if r["adapter"] == "qv-r8"][:1]
    base, on_the_fly = (
        run(engine, engine.submit(greedy(asked["prompt"], adapter, 16)))[0].completions[0].token_ids
        for adapter in (None, "qv-r8")
    )
    header = engine.parts.store.get("qv-r8").header
    packed = load_adapter(header, engine.dtype).packed
    (scale,) = set(header.scales) - {0.0}
    merged = MergedWeights(engine.device.runner.params, engine.pool_layout)
    merged.merge(header.ranks, merged.stage(packed), scale)
    (result,) = run(engine, engine.submit(greedy(asked["prompt"], None, 16)))
    assert result.completions[0].token_ids == on_the_fly != base
    merged.restore()
    (result,) = run(engine, engine.submit(greedy(asked["prompt"], None, 16)))
    assert result.completions[0].token_ids == base


def test_merged_weights_are_the_base_plus_the_adapters_product():
    layout = PoolLayout.for_model(GROUPED)
    params = dummy_params(GROUPED, jnp.dtype(jnp.float32), 0)
    before = {name: np.array(params["layers_1"][name]["kernel"]) for name in ("qkv", "o")}
    ranks = {"q": 4, "k": 3, "v": 2, "o": 5}
    weights, packed = adapter(np.random.default_rng(2), layout, ranks)
    merged = MergedWeights(params, layout)
    assert merged.merge(ranks, merged.stage(packed), scale=0.5) > 0
    deltas = {m: 0.5 * (b @ a).T for (layer, m), (a, b) in weights.items() if layer == 1}
    expected = {"qkv": np.concatenate([deltas[m] for m in "qkv"], axis=1), "o": deltas["o"]}
    for name, delta in expected.items():
        np.testing.assert_allclose(params["layers_1"][name]["kernel"], before[name] + delta, rtol=1e-4, atol=1e-4)
    other = {"v": 2}
    merged.merge(other, merged.stage(adapter(np.random.default_rng(3), layout, other)[1]))
    np.testing.assert_array_equal(params["layers_1"]["o"]["kernel"], before["o"])
    merged.restore()
    np.testing.assert_array_equal(params["layers_1"]["qkv"]["kernel"], before["qkv"])
