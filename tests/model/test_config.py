"""Hugging Face config.json to ModelConfig: every field that is read, and every one that is refused."""

import json

import pytest

from slora_jax.errors import UnsupportedModel
from slora_jax.model.config import ModelConfig, RopeScaling

MINIMAL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)


def test_llama_1_has_defaults_for_what_it_predates():
    assert ModelConfig.from_hf(MINIMAL) == ModelConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("model_type", "mistral", "num_layers", 3),
        ("num_key_value_heads", 2, "num_kv_heads", 2),
        ("num_key_value_heads", None, "num_kv_heads", 4),
        ("head_dim", 32, "head_dim", 32),
        ("head_dim", None, "head_dim", 16),
        ("max_position_embeddings", 131072, "max_position_embeddings", 131072),
        ("rope_theta", 500000, "rope_theta", 500000.0),
        ("rope_scaling", None, "rope_scaling", None),
        ("rms_norm_eps", 1e-5, "rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True, "tie_word_embeddings", True),
        ("bos_token_id", 1, "bos_token_id", 1),
        ("eos_token_id", 2, "eos_token_ids", (2,)),
        ("eos_token_id", [5, 6, 5], "eos_token_ids", (5, 6)),
        ("torch_dtype", "float16", "dtype", "float16"),
        ("torch_dtype", "torch.float32", "dtype", "float32"),
        ("dtype", "float32", "dtype", "float32"),
        ("attention_bias", False, "num_layers", 3),
        ("mlp_bias", False, "num_layers", 3),
        ("hidden_act", "silu", "num_layers", 3),
        ("quantization_config", None, "num_layers", 3),
        ("sliding_window", None, "num_layers", 3),
        ("partial_rotary_factor", 1.0, "num_layers", 3),
        ("pretraining_tp", 1, "num_layers", 3),
    ],
)
def test_accepted_field(field, value, attribute, expected):
    assert getattr(ModelConfig.from_hf(MINIMAL | {field: value}), attribute) == expected


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}, 5e5, LLAMA3_SCALING),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, 5e5, LLAMA3_SCALING),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3_ROPE}, 5e5, LLAMA3_SCALING),
        ({"rope_scaling": {"type": "default"}}, 1e4, None),
        ({"rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}}, 1e4,
         LLAMA3_SCALING),
    ],
)  # fmt: skip
def test_rope_in_every_spelling(fields, theta, scaling):
    config = ModelConfig.from_hf(MINIMAL | fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported; supported are llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling.rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling.rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"rope_parameters.rope_type 'dynamic'"),
        ({"rope_scaling": LLAMA3_ROPE | {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": 64.5, "head_dim": 16}, "hidden_size must be a positive integer, got 64.5"),
        ({"intermediate_size": "96"}, "intermediate_size must be a positive integer, got '96'"),
        ({"num_hidden_layers": -1}, "num_layers must be a positive integer, got -1"),
        ({"num_attention_heads": 0, "head_dim": 16}, "num_heads must be a positive integer, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 15}, "head_dim must be even for rotary embedding, got 15"),
        *[
            (
                {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != name}},
                f"rope_scaling.{name} is missing for rope_type 'llama3'",
            )
            for name in LLAMA3_ROPE
            if name != "rope_type"
        ],
    ],
)
def test_refused_field_is_named(fields, message):
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_hf(MINIMAL | fields)


@pytest.mark.parametrize("name", [name for name in MINIMAL if name != "model_type"])
def test_missing_field_is_named(name):
    with pytest.raises(UnsupportedModel, match=f"field '{name}' is missing"):
        ModelConfig.from_hf({key: value for key, value in MINIMAL.items() if key != name})


def test_sizes():
    config = ModelConfig.from_hf(MINIMAL | {"num_key_value_heads": 2, "head_dim": 8})
    assert (config.q_size, config.kv_size) == (32, 16)
    layer = 64 * (32 + 16 + 16) + 32 * 64 + 3 * 64 * 96 + 2 * 64
    assert config.num_params() == 3 * layer + 2 * 100 * 64 + 64
    tied = ModelConfig.from_hf(MINIMAL | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True})
    assert tied.num_params() == config.num_params() - 100 * 64


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | {"eos_token_id": 2}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)


def test_folder_without_a_readable_config(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"config\.json not found"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
