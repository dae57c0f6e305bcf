"""The live comparison of configs: whatever config.json is taken here, transformers computes the same with it.

Runs where SLORA_TORCH_PYTHON names a Python that has torch and transformers.
"""

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import load_file, save_file

from slora_jax.errors import UnsupportedModel
from slora_jax.model.config import ModelConfig
from slora_jax.model.weights import untied_where_different
from tests.helpers import hostile
from tests.helpers.engine_cases import forced_logits, make_engine
from tests.helpers.model_folders import random_tensors
from tests.helpers.seeds import drawn_seed

SCRIPT = Path(__file__).parent.parent / "oracle" / "answer_folders.py"
PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 90, 40)]
MAX_PARAMS = 200_000

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
SCALINGS = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.5,
     "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0] * 4, "factor": 4.0},
)  # fmt: skip
DOCUMENTS = [
    *({"model_type": "llama"} | SHAPE | {"rope_parameters": scaling} for scaling in SCALINGS),
    *({"model_type": "mistral", "sliding_window": None} | SHAPE | {"rope_scaling": scaling} for scaling in SCALINGS),
    # Of both, rope_scaling.
    *(
        {"model_type": "llama"} | SHAPE | {"rope_parameters": one | {"rope_theta": 50.0}, "rope_scaling": other}
        for one, other in zip(SCALINGS, SCALINGS[1:] + SCALINGS[:1], strict=True)
    ),
    {"model_type": "llama"} | SHAPE | {"tie_word_embeddings": True},
    {"model_type": "mistral"} | SHAPE,
    {"model_type": "mistral"} | SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 8},
    {"model_type": "llama"} | SHAPE | {"hidden_act": "swish", "use_sliding_window": False, "sliding_window": 64},
    {"model_type": "llama"} | SHAPE | {"layer_types": ["full_attention"], "pretraining_tp": 2},
    {"model_type": "llama"} | SHAPE | {"quantization_config": None, "attention_dropout": 0.5, "rope_scaling": None},
]


@pytest.fixture(scope="module")
def torch_python() -> str:
    if python := os.environ.get("SLORA_TORCH_PYTHON"):
        return python
    pytest.skip("needs torch and transformers: set SLORA_TORCH_PYTHON to a Python that has them")


def write_folder(folder: Path, document: dict, weights: ModelConfig) -> None:
    """A folder whose weights depend on their shapes only."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    tensors = random_tensors(weights, np.float32)
    save_file({name: tensor * np.float32(0.3) for name, tensor in tensors.items()}, folder / "model.safetensors")


def accepted(document) -> ModelConfig | None:
    """What a document means here, if it is taken and small."""
    try:
        config = ModelConfig.from_hf(document if isinstance(document, dict) else {})
    except UnsupportedModel:
        return None
    small = config.num_params() < MAX_PARAMS and config.vocab_size > max(PROMPT)
    return config if small and config.max_position_embeddings >= len(PROMPT) else None


def drawn_documents(seed: int, count: int) -> list[dict]:
    """Mutations that are taken here."""
    found = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, derandomize=False, phases=[hypothesis.Phase.generate])
    @hypothesis.given(strategies.sampled_from(DOCUMENTS).flatmap(hostile.mutated))
    def collect(mutation):
        if mutation not in DOCUMENTS and accepted(mutation) is not None:
            found.append(mutation)

    collect()
    return found


def check(python: str, root: Path, documents: list[dict]) -> tuple[int, list[np.ndarray]]:
    """Compares every document; how many there was something to compare with, and our logits of each meaning."""
    (root / "prompt").write_text(json.dumps(PROMPT))
    models = root / "models"
    models.mkdir()
    configs = {}
    for i, document in enumerate(documents):
        config = accepted(document)
        assert config is not None, document
        name = f"{i:04}"
        # Where embeddings are tied the file has an lm_head in every other folder, and it is another.
        write_folder(models / name, document, replace(config, tie_word_embeddings=bool(i % 2)) if
                     config.tie_word_embeddings else config)  # fmt: skip
        configs[name] = untied_where_different(models / name, config)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, str(SCRIPT), str(models), str(root / "prompt")], check=True, env=environment)
    answers = json.loads((models / "answers.json").read_text())
    theirs = load_file(models / "answers.safetensors")
    ours: dict[ModelConfig, np.ndarray] = {}
    compared = 0
    for name, config in configs.items():
        document = documents[int(name)]
        if "refused" in answers[name]:
            # Nothing to be served otherwise than.
            print("transformers refuses", document, answers[name]["refused"])
            continue
        computed = replace(config, eos_token_ids=(), bos_token_id=None, dtype="float32")
        if computed not in ours:
            ours[computed] = forced_logits(make_engine(models / name, pages=40), PROMPT, None)
        difference = np.linalg.norm(ours[computed] - theirs[name])
        assert difference < 1e-4 * np.linalg.norm(theirs[name]), (document, difference)
        ends = {token for token in answers[name]["eos"] if 0 <= token < config.vocab_size}
        assert ends == set(config.eos_token_ids), document
        compared += 1
    return compared, list(ours.values())


def test_each_spelling(torch_python, tmp_path):
    compared, logits = check(torch_python, tmp_path, DOCUMENTS)
    assert compared == len(DOCUMENTS)
    for one, other in itertools.combinations(logits, 2):
        assert np.linalg.norm(one - other) > 1e-2 * np.linalg.norm(one), "the comparison would not see the difference"


def test_generated_documents(torch_python, tmp_path):
    seed = drawn_seed()
    documents = drawn_documents(seed, 600)
    compared, _ = check(torch_python, tmp_path, documents)
    assert compared > 0.5 * len(documents) > 20
