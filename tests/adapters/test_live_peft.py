"""The live comparison: folders that PEFT saves now, edited or not, mean here what PEFT makes of them, or are refused.

Runs where SLORA_TORCH_PYTHON names a Python that has torch and peft.
"""

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters.peft import WEIGHTS_FILE, load_adapter, read_header
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import MODULES
from tests.helpers.peft_folders import MODEL, POOL, WIDTHS, unpack_delta
from tests.helpers.seeds import drawn_seed

SCRIPT = Path(__file__).parents[1] / "oracle" / "peft_deltas.py"
NUM_CASES = 200

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PROJECTIONS = {
    (layer, module): f"model.layers.{layer}.{'self_attn' if module in 'qkvo' else 'mlp'}.{module}_proj"
    for layer in range(3)
    for module in MODULES
}
NAMES = sorted(PROJECTIONS.values())
LISTED = [
    *(f"{module}_proj" for module in MODULES),
    "self_attn.q_proj",
    "mlp.up_proj",
    "1.mlp.down_proj",
    "proj",
    *NAMES,
]
EXPRESSIONS = [
    r".*\.[qv]_proj", r".*(self_attn|mlp)\..*(q|k|up)_proj$", r"model\.layers\.[02]\..*_proj", r".*layers.1.*proj",
    r"^(?!.*mlp).*_proj$", r".*\.\d\.self_attn\.\w+", r"(.*?\.){3,4}[a-z]+_attn\.o_proj", r".*(?<!down)_proj", "q_proj",
    r".*layers\.(0|1)\.mlp\.(gate|up)_proj", r"[^0]*\d.*[^n]_proj", ".*.*.*.*.*.*_proj",
]  # fmt: skip
PATTERNS = [
    "q_proj", "proj", "self_attn.q_proj", "self.attn.q.proj", "mlp", r".*_proj", r"layers\.1\..*", "^q_proj",
    "layers.1.mlp.up_proj", "^model.layers.0.self_attn.q_proj", "^layers.0.self_attn.q_proj",
    r"model\.layers\.2\.self_attn\.v_proj$",
    "(q|k)_proj", r"[qv]_proj", r"\d.self_attn.*", "up_proj|down_proj", ".*.*.*.*o_proj", r"(?!q).*_proj", "x" * 200,
    "model.layers.1.mlp.down_proj", "0.mlp.gate_proj", "_proj", "", ".", r"layers.[0-1].*?v_proj", r"\.q_proj", *NAMES,
]  # fmt: skip


def some(rng: random.Random, options: list, most: int) -> list:
    return rng.sample(options, rng.randint(1, most))


def targets(rng: random.Random):
    return rng.choice(
        [None, "all-linear", "ALL-LINEAR", rng.choice(EXPRESSIONS), some(rng, LISTED, 6), some(rng, LISTED, 20)]
    )


def some_fields(rng: random.Random) -> dict:
    """Fields of a LoraConfig that bear on what it computes, and some that do not."""
    options = {
        "r": lambda: rng.randint(1, 9),
        "lora_alpha": lambda: rng.choice([1, 7, 16, 0.5, 0, -3, 2.5e-3]),
        "use_rslora": lambda: rng.random() < 0.5,
        "target_modules": lambda: targets(rng),
        "exclude_modules": lambda: rng.choice([rng.choice(EXPRESSIONS), some(rng, LISTED, 3), [], None]),
        "layers_to_transform": lambda: rng.choice([rng.randint(0, 2), some(rng, [0, 1, 2, 5], 3), [], None]),
        "layers_pattern": lambda: rng.choice(["layers", ["h", "layers"], "model.layers", "h|layers", r"\w+", "", []]),
        "rank_pattern": lambda: {key: rng.randint(1, 9) for key in some(rng, PATTERNS, 4)},
        "alpha_pattern": lambda: {key: rng.choice([1, 3, 24, 0.1]) for key in some(rng, PATTERNS, 4)},
        "fan_in_fan_out": lambda: rng.random() < 0.5,
        "lora_dropout": lambda: 0.3,
        "init_lora_weights": lambda: rng.choice([True, False, "gaussian", "orthogonal", "eva"]),
        "bias": lambda: rng.choice(["none", "none", "lora_only"]),
        "use_dora": lambda: rng.random() < 0.3,
        "lora_bias": lambda: rng.random() < 0.3,
    }
    chosen = {"target_modules", *rng.sample(sorted(options), rng.randint(0, 5))}
    return {field: options[field]() for field in sorted(chosen)}


def is_plain(config: dict) -> bool:
    """Whether PEFT's own folder must be served."""
    if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none":
        return False
    # A long list of whole names is another one to PEFT when layers are named too: refused, as the order may matter.
    targets = config["target_modules"]
    return not (isinstance(targets, list) and len(targets) >= 20 and config.get("layers_to_transform") is not None)


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """Cases, what PEFT said of each, what it adds to the weights, and the folders."""
    python = os.environ.get("SLORA_TORCH_PYTHON")
    if not python:
        pytest.skip("needs torch, transformers and peft: set SLORA_TORCH_PYTHON to a Python that has them")
    out = tmp_path_factory.mktemp("peft")
    seed = drawn_seed()
    rng = random.Random(seed)
    cases = []
    for _ in range(NUM_CASES):
        edit = some_fields(rng) if rng.random() < 0.4 else {}
        if edit and rng.random() < 0.7:
            del edit["target_modules"]
        cases.append({"config": some_fields(rng) | {"task_type": "CAUSAL_LM"}, "edit": edit})
    (out / "job.json").write_text(json.dumps(cases))
    # It must not see this interpreter's packages.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, "-W", "ignore", str(SCRIPT), str(out / "job.json"), str(out)], check=True, env=environment)
    with np.load(out / "deltas.npz") as deltas:
        return cases, json.loads((out / "cases.json").read_text()), dict(deltas), out


def test_what_peft_saves_means_what_peft_makes_of_it_or_is_refused(peft):
    cases, states, deltas, out = peft
    served = complete = 0
    for number, (case, state) in enumerate(zip(cases, states, strict=True)):
        if state.startswith("not made"):
            continue
        complete += state == "complete"
        try:
            host, refusal = load_adapter(read_header(out / str(number), MODEL, POOL), np.float32), ""
        except BadAdapter as e:
            host, refusal = None, str(e)
        if host is None:
            # PEFT saves patterns sorted, and may then find another first match, and shapes that do not fit.
            assert case["edit"] or not is_plain(case["config"]) or state != "complete", (number, case, state, refusal)
            continue
        assert state == "complete", (number, case, state)
        served += 1
        for (layer, module), name in PROJECTIONS.items():
            d_in, d_out = WIDTHS[module]
            key = f"{number}/{name}"
            theirs = deltas[key] if key in deltas else np.zeros((d_out, d_in))
            ours = unpack_delta(host, layer, module)
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), (number, case, name)
    assert served >= NUM_CASES / 4 and complete >= served


def test_a_tensor_less_is_refused(peft, tmp_path):
    cases, states, _, out = peft
    whole = [number for number, (case, state) in enumerate(zip(cases, states, strict=True)) if state == "complete"]
    refused = 0
    for number in whole[:100]:
        folder = out / str(number)
        try:
            read_header(folder, MODEL, POOL)
        except BadAdapter:
            continue
        tensors = load_file(folder / WEIGHTS_FILE)
        module = sorted(tensors)[number % len(tensors)].rpartition(".lora_")[0]
        save_file({name: t for name, t in tensors.items() if not name.startswith(module)}, folder / WEIGHTS_FILE)
        with pytest.raises(BadAdapter, match=r"has no tensors for 1 of|holds no tensors"):
            read_header(folder, MODEL, POOL)
        refused += 1
    assert refused >= 10
