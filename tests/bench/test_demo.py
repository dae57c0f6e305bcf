"""The embedded model beside transformers + PEFT, where there is a Python that has them."""

import json
import os

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]


def test_both_sides_are_timed(tmp_path):
    python = os.environ.get("SLORA_TORCH_PYTHON")
    if not python:
        pytest.skip("needs torch, transformers and peft: set SLORA_TORCH_PYTHON to a Python that has them")
    out = tmp_path / "demo.json"
    flags = ["--requests", "4", "--tokens", "4", "--repeats", "1", "--torch-python", python, "--out", str(out)]
    done = CliRunner().invoke(main, ["demo", *flags])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["peft"]["versions"].keys() == {"torch", "transformers", "peft"}
    assert result["speedup"] > 0
