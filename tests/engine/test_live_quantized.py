"""Quantised checkpoints that compressed-tensors made, against what transformers answers for the same folders.

Runs where SLORA_TORCH_PYTHON names a Python that has torch, transformers and compressed-tensors.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.engine_cases import forced_logits, make_engine

ORACLE = Path(__file__).parent.parent / "oracle" / "make_quantized.py"

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDED = ("fp8-channel", "fp8-tensor")
"""Formats whose activations are rounded here as transformers rounds them."""

FORMATS = (*ROUNDED, "int8-channel", "packed-group", "packed-channel", "packed-zeros", "packed-eight", "block-fp8")
BOUND = 1e-5
"""How far logits may be from PyTorch's, as a share of their norm; it is 2e-6."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    python = os.environ.get("SLORA_TORCH_PYTHON")
    if python is None:
        pytest.skip("needs torch, transformers and compressed-tensors: set SLORA_TORCH_PYTHON to a Python with them")
    if subprocess.run([python, "-c", "import compressed_tensors"], capture_output=True).returncode:
        pytest.skip("needs compressed-tensors in SLORA_TORCH_PYTHON")
    out = tmp_path_factory.mktemp("quantized")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, str(ORACLE), "--out", str(out)], check=True, env=environment)
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_pytorch(folders, name):
    folder = folders / name
    expected = load_file(folder / "expected.safetensors")
    engine = make_engine(folder)
    ours = np.stack([forced_logits(engine, tokens.tolist(), None) for tokens in expected["tokens"]])

    def errors(of: str) -> np.ndarray:
        return np.linalg.norm(ours - expected[of], axis=-1) / np.linalg.norm(expected[of], axis=-1)

    effect = np.median(errors("unquantized"))
    assert effect > 0.01
    if name not in ROUNDED:
        assert errors("dequantized").max() < BOUND
        # With int8 transformers rounds activations too, which costs as much as rounding the weights did.
        bound = 2 * effect if name == "int8-channel" else BOUND
        assert "loaded" not in expected or errors("loaded").max() < bound
        return
    found = errors("loaded")
    # Now and then the last bit of a float32 decides between two neighbours in fp8, and what comes after it differs.
    assert np.mean(found < BOUND) > 0.6
    assert found.max() < effect
