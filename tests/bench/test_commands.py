"""What the benchmarks' commands say to odd input, before anything starts."""

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main

GRID = ["tune", "decode_attention", "grouped", "--grid"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--requests", "0"], "--requests"),
        (["throughput", "--longest", "8"], "--longest"),
        (["throughput", "--seed", "-1"], "--seed"),
        (["throughput", "--lengths", "5"], "such as 1600:600; got '5'"),
        (["tensor-parallel", "--lengths", "0:4"], "such as 1600:600; got '0:4'"),
        (["throughput", "--modules", "q,w"], "no such modules: w; there are q, k, v, o, gate, up, down"),
        (["throughput", "--pool-gigabytes", "0"], "--pool-gigabytes"),
        (["plan", "--sequences", "0"], "--sequences"),
        (["plan", "--rank", "257"], "--rank"),
        (["plan", "--adapters", "-1"], "--adapters"),
        (["plan", "--memory-fraction", "1.5"], "--memory-fraction"),
        (["adapters", "--rank", "0"], "--rank"),
        (["adapters", "--kinds", "0"], "--kinds"),
        (["paper", "--seed", "-1"], "--seed"),
        (["host", "--steps", "0"], "--steps"),
        (["kernels", "--scale", "0"], "--scale"),
        ([*GRID, "{"], "not JSON"),
        ([*GRID, "[1]"], "not lists of values"),
        ([*GRID, '{"num_warps": 2}'], "not lists of values"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and message in done.output, done.output


@pytest.mark.parametrize("command", ["throughput", "plan", "collectives", "paper", "peft", "adapters"])
def test_every_command_takes_shapes_by_name_and_says_which_there_are(command, tmp_path):
    missing, bad = tmp_path / "missing.yaml", tmp_path / "bad.yaml"
    bad.write_text("model_type: gpt2")
    for model, message in (
        ("llama-9", "no such shape: llama-9; known are llama-13b"),
        (missing, "cannot read config"),
        (bad, 'model_type "gpt2" is not supported'),
    ):
        done = CliRunner().invoke(main, [command, "--model", str(model)])
        assert done.exit_code == 1 and message in done.output, done.output
