"""The engine and the server over a device that only sleeps: every answer comes, and the report says what it took."""

import pytest

from slora_jax.bench.serve import Load
from slora_jax.bench.standin import Pace, run_standin, table
from slora_jax.bench.workload import Lengths


def test_alone_and_through_http_the_same_tokens_come():
    load = Load(24, 6, 1.0, 1.0, "uniform", 1.0, Lengths.below(20), 2, "completions", 1)
    result = run_standin(Pace(0.01, 0.001), load, 64, 1, "the command")
    alone, http = result["alone"], result["http"]
    assert http["errors"] == {} and http["answered"] == 24
    assert alone["output_tokens"] == http["output_tokens"]
    for figures in (alone, http["server"]):
        # No step is shorter than the device's.
        assert figures["steps"] >= max(8, http["output_tokens"] / 6) and figures["step_milliseconds"]["p50"] > 9
        assert figures["cpu_seconds"] > 0 and figures["cpu_seconds_per_1000_tokens"] > 0
        assert figures["cpu_seconds_by_thread"]["slora-engine"] > 0
    assert result["ratio"] == pytest.approx(http["output_tokens_per_second"] / alone["output_tokens_per_second"])
    assert http["gap_milliseconds"]["p50"] > 9  # one event a step, of tokens that are text by themselves
    assert "HTTP over the engine alone" in table(result)
