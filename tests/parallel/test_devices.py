"""Tensor parallelism on eight CPU devices: JAX fixes their number at its start, so in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICES = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def run_cases(file: str, marks: str) -> None:
    """Runs a file of tests with eight devices."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-m", marks, f"tests/parallel/{file}.py"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": DEVICES},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "file", ["cases_tokens", "cases_programs", pytest.param("cases_bench", marks=pytest.mark.slow)]
)
def test_on_eight_devices(file):
    run_cases(file, "not slow")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["cases_tokens", "cases_programs"])
def test_on_more_sizes_of_mesh(file):
    run_cases(file, "slow")
