"""The live comparison: transformers + PEFT answer now, on fresh random models and on the embedded one.

Runs where SLORA_TORCH_PYTHON names a Python that has torch, transformers and peft, or where this one has them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.engine_cases import CASES, Case, forced_logits, greedy, make_engine, run
from tests.helpers.seeds import drawn_seed

ORACLE = Path(__file__).parent.parent / "oracle" / "make_oracle.py"

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]

# Far below any gap between two tokens' logits that float32 arithmetic could close, far above its noise.
CLEAR_GAP = 2e-3


@pytest.fixture(scope="module")
def torch_python() -> str:
    if python := os.environ.get("SLORA_TORCH_PYTHON"):
        return python
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        return sys.executable
    pytest.skip("needs torch, transformers and peft: set SLORA_TORCH_PYTHON to a Python that has them")


def make_oracle(python: str, *arguments) -> None:
    # The oracle must not see this interpreter's packages.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, str(ORACLE), *map(str, arguments)], check=True, env=environment)


@pytest.mark.parametrize("name", CASES)
def test_fresh_random_models(torch_python, tmp_path, name):
    seed = drawn_seed()
    print(f"oracle seed {seed}")
    make_oracle(torch_python, "--out", tmp_path, "--seed", seed, "--case", name)
    case = Case(tmp_path / name)
    expected = load_file(case.folder / "expected.safetensors")
    engine = case.engine()
    generations = [engine.submit(greedy(r["prompt"], r["adapter"])) for r in case.requests]
    for request, result in zip(case.requests, run(engine, *generations), strict=True):
        assert list(result.completions[0].token_ids) == request["tokens"], (seed, request["id"])
        tokens = request["prompt"] + request["tokens"]
        ours = forced_logits(engine, tokens, request["adapter"])[request["logit_positions"]]
        theirs = expected[f"{request['id']}.logits"]
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs), (seed, request["id"])


def test_the_embedded_model_and_its_adapters(torch_python, tmp_path):
    from slora_jax.demo import demo_adapters, demo_model_path

    model, adapters = demo_model_path(), demo_adapters()
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["What is the capital of France?", "Why is the sky blue?"]))
    folder = next(iter(adapters.values())).parent
    make_oracle(torch_python, "--real", model, "--adapters", folder, "--prompts", prompts, "--out", tmp_path / "real")
    requests = json.loads((tmp_path / "real" / "expected.json").read_text())["requests"]
    expected = load_file(tmp_path / "real" / "expected.safetensors")
    assert {r["adapter"] for r in requests} == {None, *adapters}
    engine = make_engine(model, folder, scheduler={"max_batch_tokens": 64})
    generations = [engine.submit(greedy(r["prompt"], r["adapter"])) for r in requests]
    compared = 0
    for request, result in zip(requests, run(engine, *generations), strict=True):
        ours = forced_logits(engine, request["prompt"], request["adapter"])[-1:]
        theirs = expected[f"{request['id']}.logits"]
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
        # Where two tokens are equally likely either may come, and all after it differs.
        clear = next((i for i, gap in enumerate(request["gaps"]) if gap < CLEAR_GAP), len(request["gaps"]))
        assert list(result.completions[0].token_ids[:clear]) == request["tokens"][:clear], request["adapter"]
        compared += clear
    assert compared >= 0.8 * 64 * len(requests), "too few tokens were clear enough to compare"
