"""The registration benchmark, with few adapters."""

import json

import numpy as np
from click.testing import CliRunner

from slora_jax.adapters.peft import load_adapter, read_header
from slora_jax.bench.__main__ import main
from slora_jax.bench.adapters import write_header_only
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig

MODEL = ModelConfig(64, 24, 40, 3, 6, 2, 4)


def test_registration_is_measured_and_takes_little_memory(tmp_path):
    out = tmp_path / "out.json"
    shape = tmp_path / "tiny.yaml"
    fields = {"model_type": "llama", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40,
              "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
    shape.write_text(json.dumps(fields))
    kinds = ["--kinds", "1", "--kinds", "300"]
    result = CliRunner().invoke(main, ["adapters", "--count", "300", *kinds, "--model", str(shape), "--out", str(out)])
    assert result.exit_code == 0, result.output
    cases = json.loads(out.read_text())["cases"]
    assert [(case["adapters"], case["kinds"]) for case in cases] == [(300, 1), (300, 300)]
    assert all(0 < case["python_bytes_each"] < 3_000 and case["registered_per_second"] > 0 for case in cases)


def test_what_is_registered_is_an_adapter(tmp_path):
    pool = PoolLayout.for_model(MODEL)
    write_header_only(tmp_path / "a", MODEL, pool, rank=4, alpha=8)
    header = read_header(tmp_path / "a", MODEL, pool)
    assert header.ranks == dict.fromkeys("qkvo", 4)
    assert not load_adapter(header, np.dtype(np.float32)).packed.any()
