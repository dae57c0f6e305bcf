"""Fleets in simulated time: nothing is lost, and the rules differ as they should."""

import json

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main
from slora_jax.bench.fleet import Asked, Hardware, draw_trace, simulate_fleet, summary
from slora_jax.bench.simulate import H200, StepTime
from slora_jax.config import SchedulerConfig
from slora_jax.fleet.routing import RULES, create_routing
from slora_jax.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
)  # fmt: skip
PAGES_OF = [4] * 60


def hardware(pool_pages=400, host_pages=60, disk_seconds=0.001) -> Hardware:
    settings = SchedulerConfig(max_batch_tokens=512, max_sequences=64)
    return Hardware(StepTime(H200, MODEL), pool_pages, host_pages, disk_seconds, settings)


def run(rule, trace, replicas=4, of=None):
    return simulate_fleet(trace, replicas, create_routing(rule, spill_at=4, seed=0), of or hardware(), PAGES_OF)


@pytest.fixture(scope="module")
def trace():
    return draw_trace(400, len(PAGES_OF), rate=40.0, alpha=1.0, longest=64, seed=0)


@pytest.fixture(scope="module")
def runs(trace):
    return {rule: run(rule, trace) for rule in RULES}


@pytest.mark.parametrize("rule", RULES)
def test_every_request_is_answered_once(runs, trace, rule):
    done = runs[rule]
    assert sum(done.replicas) == len(trace)
    assert all(t.arrival < t.first <= t.last for t in done.times)


def test_affinity_finds_more_adapters_resident_and_spill_keeps_most_of_it(runs):
    figures = {rule: summary(done) for rule, done in runs.items()}
    shares = {rule: one["resident_share"] for rule, one in figures.items()}
    assert shares["affinity"] > shares["random"] + 0.1
    assert shares["affinity_with_spill"] > shares["random"] + 0.1
    assert figures["affinity"]["replicas_of_an_adapter"] == 1
    assert figures["affinity_with_spill"]["busiest_over_mean"] < figures["affinity"]["busiest_over_mean"]
    assert figures["affinity_with_spill"]["host_loads"] < figures["random"]["host_loads"]


def test_the_same_trace_gives_the_same_run(runs, trace):
    assert summary(run("affinity_with_spill", trace)) == summary(runs["affinity_with_spill"])


def test_a_hot_adapter_is_answered_sooner_by_several_replicas():
    hot = [Asked(0.001 * i, 0, 32, 64) for i in range(120)]
    of = hardware(pool_pages=200)
    alone, spilt = (summary(run(rule, hot, of=of)) for rule in ("affinity", "affinity_with_spill"))
    assert alone["replicas_of_the_hottest"] == 1 and spilt["replicas_of_the_hottest"] == 4
    assert spilt["answer_s"]["p99"] < 0.7 * alone["answer_s"]["p99"]


def test_what_comes_from_disk_takes_its_time():
    one = [Asked(0.0, 0, 16, 8)]
    fast, slow = (run("affinity", one, of=hardware(disk_seconds=seconds)).times[0] for seconds in (0.0, 0.5))
    assert slow.first - fast.first == pytest.approx(0.5 * PAGES_OF[0], rel=0.05)


def test_host_memory_forgets_what_was_used_longest_ago():
    # Two adapters in turn, far apart in time; the pool has room for one of them, and host memory for one or both.
    turns = [Asked(10.0 * i, i % 2, 16, 8) for i in range(6)]
    loads = {}
    for host_pages in (4, 8):
        done = run("affinity", turns, replicas=1, of=hardware(pool_pages=9, host_pages=host_pages))
        loads[host_pages] = done.host_loads
        assert done.pool_loads > 2
    assert loads[8] == 2 and loads[4] > 2


def test_the_command_gives_a_row_for_each_rule():
    arguments = ["fleet", "--replicas", "2", "--adapters", "50", "--requests", "40", "--rate", "20"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["rules"]) == set(RULES)
    assert all(f"| {rule} |" in done.stderr for rule in RULES)
