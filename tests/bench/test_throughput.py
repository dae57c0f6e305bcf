"""The throughput benchmark on a toy model: the workload it draws, and what it reports."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from slora_jax.bench.__main__ import main
from slora_jax.bench.throughput import kernel_group, profile_table, run_throughput
from slora_jax.bench.timing import KernelEvent
from slora_jax.bench.workload import Case, Lengths, OpenTrace, draw_workload
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from tests.helpers.engine_cases import compiled_fast

SHAPE = """
model_type: llama
vocab_size: 64
hidden_size: 32
intermediate_size: 64
num_hidden_layers: 1
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 64
tie_word_embeddings: true
"""


def test_the_workload_is_drawn_in_the_order_of_its_definition():
    workload = draw_workload(20, 100, 32000, seed=42)
    rng = np.random.default_rng(42)
    prompts, outputs, adapters = rng.integers(8, 512, 20), rng.integers(8, 512, 20), rng.integers(0, 100, 20)
    assert [len(item.prompt) for item in workload] == list(prompts)
    assert [item.num_output for item in workload] == list(outputs)
    assert [item.adapter for item in workload] == list(adapters)
    assert workload[0].prompt == tuple(rng.integers(0, 32000, prompts[0]))
    assert {item.arrival for item in workload} == {0.0}


def test_the_base_workload_has_the_same_lengths_and_no_adapters():
    base, lora = draw_workload(20, 0, 64, seed=42), draw_workload(20, 5, 64, seed=42)
    assert [(len(i.prompt), i.num_output) for i in base] == [(len(i.prompt), i.num_output) for i in lora]
    assert {item.adapter for item in base} == {None}


def test_an_open_trace_has_its_rate_and_its_popular_adapters():
    workload = draw_workload(
        4000, 50, 8, seed=1, lengths=Lengths.below(9), trace=OpenTrace(rate=5.0, cv=2.0, alpha=1.0)
    )
    intervals = np.diff([0.0, *(item.arrival for item in workload)])
    assert (intervals >= 0).all()
    assert np.mean(intervals) == pytest.approx(1 / 5, rel=0.15)
    assert np.std(intervals) / np.mean(intervals) == pytest.approx(2.0, rel=0.15)
    asked = np.bincount([item.adapter for item in workload], minlength=50)
    assert asked[0] / asked[1] == pytest.approx(2.0, rel=0.25)


@pytest.fixture
def shape(tmp_path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(SHAPE)
    return path


def _throughput_of(shape: Path) -> list[dict]:
    return list(
        run_throughput(
            model=str(shape),
            cases=[Case("base", 0), Case("S1", 2)],
            requests=6,
            seed=42,
            lengths=Lengths.below(12),
            scheduler={"max_sequences": 4, "max_batch_tokens": 16, "prefix_cache": False},
            pool={"pages": 64},
            tp=1,
            trace=None,
            profile=None,
            command="",
        )
    )


def test_throughput_of_a_toy(shape):
    with compiled_fast():
        base, result = _throughput_of(shape)
    json.dumps(result)
    assert base["n"] == base["adapter_loads"] == 0
    tokens = sum(item.num_output for item in draw_workload(6, 2, 64, seed=42, lengths=Lengths.below(12)))
    assert result["requests"] == 6 and result["n"] == 2
    assert result["output_tokens_per_second"] * result["wall_seconds"] == pytest.approx(tokens)
    assert result["requests_per_second"] * result["wall_seconds"] == pytest.approx(6)
    assert result["adapter_loads"] == 2, "both come to the device in the timed part"
    assert result["adapter_load_bytes"] > 0
    assert 0 < result["sequences_per_step"] <= 4 and 0 < result["tokens_per_step"] <= 16
    assert 0 < result["pages_peak"] <= result["pages_total"] == 63
    assert 0 < result["host_seconds"] < result["wall_seconds"]
    parts = result["host_parts_milliseconds_per_step"]
    assert set(parts) == {"plan", "copy", "build", "launch", "wait", "commit"} and min(parts.values()) > 0
    assert sum(parts.values()) - parts["wait"] < result["host_milliseconds_per_step"]
    assert result["step_milliseconds"]["p50"] <= result["step_milliseconds"]["p99"]


def test_adapters_of_one_rank_on_other_modules_and_exact_lengths(shape, tmp_path):
    out = tmp_path / "lines.json"
    arguments = ["throughput", "rank3:2", "S1:1@q,o", "--model", str(shape), "--requests", "4", "--lengths", "5:3"]
    arguments += ["--pool-gigabytes", "0.001", "--max-sequences", "4", "--max-batch-tokens", "16"]
    with compiled_fast():
        done = CliRunner().invoke(main, [*arguments, "--modules", "q,gate,down", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result, other = map(json.loads, out.read_text().splitlines())
    assert (other["setting"], other["n"], other["modules"]) == ("S1", 1, ["q", "o"]) and other["adapter_loads"] == 1
    assert (result["setting"], result["n"], result["modules"]) == ("rank3", 2, ["q", "gate", "down"])
    assert result["lengths"] == "5:3" and result["adapter_loads"] == 2
    assert result["output_tokens_per_second"] * result["wall_seconds"] == pytest.approx(4 * 3)
    layout = PoolLayout.for_model(ModelConfig.from_hf(yaml.safe_load(SHAPE)))
    pages = layout.adapter(dict.fromkeys(("q", "gate", "down"), 3)).num_pages
    assert result["adapter_load_bytes"] == 2 * pages * layout.page_bytes(itemsize=4)


@pytest.mark.parametrize(
    "case", ["S1", "S1:0", "base:3", "S9:1", "S1:x", "rank:3", "rank0:3", "rank16", "S1:2@q,x", "S1:2@", "base:3@q"]
)
def test_what_is_no_case_is_refused(shape, case):
    done = CliRunner().invoke(main, ["throughput", case, "--model", str(shape)])
    messages = "such as S2:100", "no such modules: x", "no such modules: ;"
    assert done.exit_code == 2 and any(message in done.output for message in messages)
    if "such as S2:100" in done.output:
        assert f"'{case}'" in done.output, "what was given is named whole"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_expand_kernel", "LoRA"),
        ("_decode_kernel", "attention"),
        ("_write_kernel", "rotary, KV write"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_NNT", "products"),
        ("MemcpyD2D", "copies"),
        ("loop_multiply_fusion_3", "norms, other fusions"),
    ],
)
def test_kernel_groups(name, group):
    assert kernel_group(name) == group


def test_profile_table():
    events = [
        KernelEvent("nvjet_a", 0.0, 4000.0),
        KernelEvent("_shrink_kernel", 5000.0, 7000.0),
        KernelEvent("nvjet_a", 8000.0, 12000.0),
    ]
    lines = profile_table(events, steps=2).splitlines()
    assert lines[0].split() == ["a", "step", "6.0", "µs"]
    assert {line.split()[0]: line.split()[1] for line in lines[1:4]} == {
        "products": "4.0",
        "LoRA": "1.0",
        "gaps": "1.0",
    }
    assert lines[-2].split() == ["4.0", "1.0", "nvjet_a", "(products)"]
