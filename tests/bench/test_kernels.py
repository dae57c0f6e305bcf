"""The kernel benchmark on a CPU, in small: what it reports, and that a wrong result does not pass."""

import json

import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from jax.profiler import ProfileData

from pallas_kernels.specs import ATTENTION, MATMUL
from slora_jax.bench import kernels
from slora_jax.bench.__main__ import main
from slora_jax.bench.timing import KernelEvent, gpu_events, union_seconds

SMALL = "attention-decode-gqa-4x32768"
FLOAT8 = "attention-prefill-gqa-8192-float8"


def test_kernels_report(tmp_path):
    out = tmp_path / "kernels.json"
    done = CliRunner().invoke(main, ["kernels", "--only", SMALL, "--scale", "128", "--no-peers", "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["command"] == f"python -m slora_jax.bench kernels --only {SMALL} --scale 128 --no-peers"
    assert report["copy"]["bytes_per_second"] == max(report["copy"]["ways"].values()) > 0
    assert report["matmul_flops_per_second"] > 0
    assert {"date", "device", "driver", "jax", "backend", "scale"} <= report.keys()
    (case,) = report["cases"].values()
    assert case["seconds"] > 0 and case["busy_seconds"] is None and 0 < case["error"] < 1e-2
    assert case["target"] == ">= 0.75" and case["met"] == (case["value"] >= 0.75)
    assert case["value"] == pytest.approx(case["bytes_per_second"] / report["copy"]["bytes_per_second"])


def test_a_prompt_with_float8_is_compared_with_one_without(tmp_path):
    out = tmp_path / "kernels.json"
    arguments = ["kernels", "--only", FLOAT8, "--scale", "128", "--no-peers", "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    (case,) = json.loads(out.read_text())["cases"].values()
    assert 0 < case["error"] < 1e-2
    assert case["value"] == pytest.approx(case["seconds"] / case["plain_seconds"])


def test_sizes_are_tuned_on_the_cases_that_take_them():
    from fnmatch import filter

    for op, key, names in (
        ("decode_attention", "multi_head", ["attention-decode-mha-128x512", "attention-decode-mha-320x700"]),
        ("decode_attention", "multi_head_float8", [f"attention-decode-mha-{n}-float8" for n in ("128x512", "320x700")]),
        (
            "decode_attention",
            "grouped",
            [f"attention-decode-gqa-{n}" for n in ("128x2048", "4x32768", "480x900")],
        ),
        ("prefill_attention", "float8", [FLOAT8]),
        ("mosaic_attention", "half", ["attention-prefill-gqa-8192", "attention-prefill-mha-8192"]),
    ):
        assert filter(ATTENTION, kernels._affected(op, key)) == names
    assert "matmul-8b-qkv-64" in filter(MATMUL, kernels._affected("grouped_matmul", "64"))
    for key in ("more", "float32"):
        assert "matmul-8b-qkv-512" in filter(MATMUL, kernels._affected("grouped_matmul", key))


def test_a_product_is_compared_with_the_same_in_bfloat16(tmp_path):
    out = tmp_path / "kernels.json"
    arguments = ["kernels", "--only", "matmul-8b-down-zeros-*", "--scale", "64", "--no-peers", "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    one, many = json.loads(out.read_text())["cases"].values()
    assert one["quantity"] == "of copy" and one["value"] == pytest.approx(one["of_copy"]) and one["target"] == ">= 0.80"
    assert many["value"] == pytest.approx(many["seconds"] / many["plain_seconds"]) and many["target"] is None
    assert 0 < one["error"] < 1e-2 and 0 < many["error"] < 1e-2


def test_a_result_that_differs_fails_the_command(monkeypatch, tmp_path):
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(kernels.KernelBench, "copy", {"bytes_per_second": 1e9, "way": "none"})
    monkeypatch.setattr(kernels.KernelBench, "matmul_flops", 1e9)
    attend, dtype = kernels.paged_attention, ATTENTION[SMALL].dtype
    assert dtype != jnp.float32, "or the reference would be as wrong"
    monkeypatch.setattr(
        kernels,
        "paged_attention",
        lambda q, *rest, **options: attend(q, *rest, **options) * (jnp.nan if q.dtype == dtype else 1),
    )
    arguments = ["kernels", "--only", SMALL, "--scale", "128", "--no-peers", "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "FAILED" in done.output
    assert "relative error nan" in json.loads(out.read_text())["cases"][SMALL]["failure"]


@pytest.mark.parametrize("out", [[1.0, 1.02], [1.0, float("nan")], [float("inf"), 1.0], [1.0]])
def test_checked_error_refuses(out):
    with pytest.raises(kernels.WrongResult):
        kernels.checked_error(jnp.array(out), jnp.ones(2))


def test_checked_error():
    assert kernels.checked_error(jnp.array([3.0, 4.02]), jnp.array([3.0, 4.0])) == pytest.approx(4e-3, rel=1e-3)


def test_tune_sorts_the_combinations():
    arguments = ["tune", "decode_attention", "grouped", "--grid", '{"num_warps": [2, 4]}']
    done = CliRunner().invoke(main, [*arguments, "--only", SMALL, "--scale", "128"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()[-2:]]
    assert sorted(row[-1] for row in rows) == ["2}", "4}"]
    assert float(rows[0][0]) <= float(rows[1][0])


@pytest.mark.slow
def test_steps_of_a_toy_model(monkeypatch):
    monkeypatch.setattr(kernels, "compiler_options", lambda _: {"xla_backend_optimization_level": 0})
    bench = kernels.KernelBench(scale=64, peers=False)
    for name in ("step-128-mixed", "step-1-r16-all", "step-1-fp8", "step-1-int4"):
        result = kernels.CASES[name](bench)
        assert result.value > 0 and result.timing.error == 0.0 and result.details["base_seconds"] > 0


def test_gpu_events_are_those_of_the_streams():
    event = "events { metadata_id: 1 offset_ps: %d000 duration_ps: %d000 }"
    text = (
        'planes { name: "/device:GPU:0" event_metadata { key: 1 value { id: 1 name: "k" } }'
        f' lines {{ name: "Stream #14(Compute)" timestamp_ns: 100 {event % (0, 10)} {event % (20, 5)} }}'
        f' lines {{ name: "XLA Ops" timestamp_ns: 100 {event % (0, 99)} }} }}'
        f' planes {{ name: "/host:CPU" lines {{ name: "Stream #1" {event % (0, 99)} }} }}'
    )
    events = gpu_events([ProfileData.from_text_proto(text)])
    assert events == [KernelEvent("k", 100.0, 110.0), KernelEvent("k", 120.0, 125.0)]
    assert union_seconds([*events, KernelEvent("on another stream", 105.0, 121.0)]) == pytest.approx(25e-9)
