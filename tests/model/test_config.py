"""Hugging Face config.json to ModelConfig: every field that is read, and every one that is refused."""

import contextlib
import datetime
import json
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import yaml

from slora_jax.errors import UnsupportedModel
from slora_jax.model.config import ModelConfig, default_sampling, ending_tokens
from slora_jax.model.rope import LinearRope, Llama3Rope, ProportionalRope, plain_turns
from tests.helpers import hostile

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
LLAMA3_SCALING = Llama3Rope(8.0, 1.0, 4.0, 8192)


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
        bos_token_id=1,
        eos_token_ids=(),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("num_key_value_heads", 2, "num_kv_heads", 2),
        ("num_key_value_heads", None, "num_kv_heads", 4),
        ("head_dim", 32, "head_dim", 32),
        ("head_dim", None, "head_dim", 16),
        ("max_position_embeddings", 131072, "max_position_embeddings", 131072),
        ("rope_theta", 500000, "rope_theta", 500000.0),
        ("rope_scaling", None, "rope_scaling", None),
        ("rms_norm_eps", 1e-5, "rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True, "tie_word_embeddings", True),
        ("bos_token_id", 3, "bos_token_id", 3),
        ("bos_token_id", None, "bos_token_id", None),
        ("bos_token_id", -1, "bos_token_id", None),
        ("eos_token_id", None, "eos_token_ids", ()),
        ("eos_token_id", [7, -1, 100], "eos_token_ids", (7,)),
        ("eos_token_id", 2, "eos_token_ids", (2,)),
        ("eos_token_id", [5, 6, 5], "eos_token_ids", (5, 6)),
        ("torch_dtype", "float16", "dtype", "float16"),
        ("torch_dtype", "torch.float32", "dtype", "float32"),
        ("dtype", "float32", "dtype", "float32"),
        ("attention_bias", False, "num_layers", 3),
        ("mlp_bias", False, "num_layers", 3),
        ("mlp_bias", None, "num_layers", 3),
        ("hidden_act", "silu", "num_layers", 3),
        ("hidden_act", "swish", "num_layers", 3),
        ("logit_scale", 1.0, "num_layers", 3),
        ("sliding_window", 2048, "num_layers", 3),
        ("use_sliding_window", False, "num_layers", 3),
        ("layer_types", ["full_attention"] * 3, "num_layers", 3),
        ("rope_parameters", None, "rope_scaling", None),
        ("rope_parameters", {}, "rope_scaling", None),
        ("of_nobody", {"a": 1}, "num_layers", 3),
        ("quantization_config", None, "num_layers", 3),
        ("sliding_window", None, "num_layers", 3),
        ("partial_rotary_factor", 1.0, "num_layers", 3),
        ("pretraining_tp", 2, "num_layers", 3),
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
        # Of both, rope_scaling; what it does not say is beside it, and not in the other.
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_scaling": LLAMA3_ROPE}, 1e4,
         LLAMA3_SCALING),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e5}, "rope_scaling": {"rope_type": "default"},
          "rope_theta": 7e4}, 7e4, None),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": {}}, 1e4, LLAMA3_SCALING),
        # The original context beside wins over the one within; without either it is the whole.
        ({"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 64}, 1e4, Llama3Rope(8.0, 1.0, 4.0, 64)),
        ({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}}, 1e4,
         Llama3Rope(8.0, 1.0, 4.0, 2048)),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, 1e4, LinearRope(2.0)),
        # Beyond max_position_embeddings it would be another one; such contexts are not served.
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 1e4, None),
        ({"rope_parameters": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5}, 1e4,
         ProportionalRope(0.5, 1.0)),
    ],
)  # fmt: skip
def test_rope_in_every_spelling(fields, theta, scaling):
    config = ModelConfig.from_hf(MINIMAL | fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, 'model_type "qwen2" is not supported; supported are llama, mistral'),
        ({"model_type": None}, "model_type null is not supported"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits=None is not"),
        ({"sliding_window": 2047}, "sliding_window=2047 is not supported for contexts of 2048 tokens"),
        ({"sliding_window": 0}, "sliding_window must be an integer from 1"),
        ({"model_type": "mistral", "num_key_value_heads": 2}, "sliding_window=4096, which is what it means"),
        ({"model_type": "mistral", "sliding_window": None}, r"num_attention_heads \(4\) must be a multiple .* \(8\)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r'layer_types=\["full_attention", "sliding_atten'),
        ({"is_causal": False}, "is_causal=false is not supported"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not supported"),
        ({"transformers_weights": "x.safetensors"}, 'transformers_weights="x.safetensors" is not supported'),
        ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ({"eos_token_id": "2"}, 'eos_token_id must be a token id or a list of them, got "2"'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings must be true or false, got "false"'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, got NaN"),
        ({"torch_dtype": "int8"}, 'torch_dtype "int8" is not supported'),
        ({"hidden_size": 63}, r"hidden_size \(63\) must be a multiple of num_attention_heads \(4\)"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers must be .* from 1 to 4096, got .an integer of 1329 bits"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "axial"}}, r'rope_scaling.rope_type "axial" is not supported; supp'),
        ({"rope_parameters": {"rope_type": None}}, r"rope_parameters.rope_type null is not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "parameters.full_attention is not supported",
        ),
        ({"rope_scaling": "linear"}, 'rope_scaling must be an object, got "linear"'),
        ({"rope_theta": None}, "rope_theta must be a number from 1 to"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing for rope_type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be a number from"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, r"high_freq_factor \(1.0\) must be above low"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 7}}, "long_factor is missing for rope_type"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 7, "long_factor": [1] * 8}},
            "rope_scaling.short_factor must be 8 numbers",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1] * 8,
                    "long_factor": [1] * 8,
                    "original_max_position_embeddings": 1024,
                }
            },
            "within the original context of 1024 tokens",
        ),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1 to [0-9]*, got 0"),
        ({"hidden_size": 64.5, "head_dim": 16}, "hidden_size must be an integer from 1 to [0-9]*, got 64.5"),
        ({"intermediate_size": "96"}, 'intermediate_size must be an integer from 1 to [0-9]*, got "96"'),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer from 1 to [0-9]*, got -1"),
        ({"num_attention_heads": 0, "head_dim": 16}, "num_attention_heads must be an integer from 1 to [0-9]*, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 15}, "head_dim must be even for rotary embedding, got 15"),
        *[
            (
                {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != name}},
                f"rope_scaling.{name} is missing for rope_type 'llama3'",
            )
            for name in LLAMA3_ROPE
            if name in ("factor", "low_freq_factor", "high_freq_factor")
        ],
    ],
)
def test_refused_field_is_named(fields, message):
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_hf(MINIMAL | fields)


@pytest.mark.parametrize("name", [name for name in MINIMAL if name != "model_type"])
def test_missing_field_has_the_default_of_its_class(name):
    config = {"num_key_value_heads": 1} | {key: value for key, value in MINIMAL.items() if key != name}
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes["intermediate_size"] = 11008
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(config | {name: sizes[name]})
    sizes["intermediate_size"] = 14336
    config |= {"model_type": "mistral", "sliding_window": None}
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(config | {name: sizes[name]})


def test_mistral_has_other_defaults():
    eight = MINIMAL | {"model_type": "mistral", "num_attention_heads": 16}
    config = ModelConfig.from_hf(eight, max_model_len=4096)
    assert (config.num_kv_heads, config.max_position_embeddings) == (8, 131072)
    assert ModelConfig.from_hf(eight | {"sliding_window": None}) == config
    assert ModelConfig.from_hf(eight | {"max_position_embeddings": 4096}).max_position_embeddings == 4096


def test_what_only_longer_contexts_do_depends_on_the_context():
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = MINIMAL | {"rope_scaling": longrope, "original_max_position_embeddings": 1024}
    assert ModelConfig.from_hf(config, max_model_len=1024).rope_scaling.factors == (1.0,) * 8
    with pytest.raises(UnsupportedModel, match="set max_model_len to 1024 or less"):
        ModelConfig.from_hf(config, max_model_len=1025)
    window = MINIMAL | {"sliding_window": 100}
    ModelConfig.from_hf(window, max_model_len=100)
    with pytest.raises(UnsupportedModel, match="set max_model_len to 100 or less"):
        ModelConfig.from_hf(window, max_model_len=101)


def test_sizes():
    config = ModelConfig.from_hf(MINIMAL | {"num_key_value_heads": 2, "head_dim": 8})
    assert (config.q_size, config.kv_size) == (32, 16)
    layer = 64 * (32 + 16 + 16) + 32 * 64 + 3 * 64 * 96 + 2 * 64
    assert config.num_params() == 3 * layer + 2 * 100 * 64 + 64
    tied = ModelConfig.from_hf(MINIMAL | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True})
    assert tied.num_params() == config.num_params() - 100 * 64


def write(folder, **files) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_tokens_that_end_an_answer(tmp_path):
    model = ModelConfig.from_folder(write(tmp_path, config=MINIMAL | {"eos_token_id": 3}))
    assert ending_tokens(model, ()) == (3,)
    assert ending_tokens(model, (5, 3)) == (3, 5)
    for eos, expected in (([7, 2, 7], (7, 2)), (4, (4,)), ([], ()), (None, (3,))):
        write(tmp_path, generation_config={"eos_token_id": eos})
        assert ModelConfig.from_folder(tmp_path).eos_token_ids == expected
    write(tmp_path, generation_config={}, config=MINIMAL)
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == ()


def test_sampling_of_the_generation_config(tmp_path):
    assert default_sampling(tmp_path) == {}
    given = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    write(tmp_path, generation_config=given | {"max_new_tokens": 7, "do_sample": False, "max_length": 5})
    assert default_sampling(tmp_path) == given | {"max_tokens": 7}
    write(tmp_path, generation_config={"top_k": -1, "top_p": None})
    assert default_sampling(tmp_path) == {"top_k": 0}
    for name, value in {"temperature": -1, "top_k": 0.5, "top_p": "0.9", "max_new_tokens": 0, "min_p": [0]}.items():
        write(tmp_path, generation_config={name: value})
        with pytest.raises(UnsupportedModel, match=rf"generation_config\.json: {name} is .*--no-generation-config"):
            default_sampling(tmp_path)


def test_folder_without_a_readable_config(tmp_path):
    def refused(message: str):
        with pytest.raises(UnsupportedModel, match=message):
            ModelConfig.from_folder(tmp_path)

    refused(r"config\.json not found")
    file = tmp_path / "config.json"
    for raw, message in (
        (b"{", "is not valid JSON"),
        (b"[1]", r"must hold a JSON object, got \[1\]"),
        (b"\xef\xbb\xbf{}", "is not valid JSON: Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "is not valid JSON: not UTF-8 at byte 7"),
        (b'{"a": 1, "a": 2}', 'it has the field "a" twice'),
        (b'{"a": ' + b"[" * 10**5, "nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    ):
        file.write_bytes(raw)
        refused(message)
    file.unlink()
    file.mkdir()
    refused(r"config\.json is no file")


# Whatever stands in the files.

ROPE_TYPES = [
    LLAMA3_ROPE,
    {"type": "yarn", "factor": 2.0, "beta_fast": 32, "mscale": 1.0, "truncate": True, "attention_factor": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
]
FULL = MINIMAL | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 3,
    "attention_bias": False,
}
GENERATION = {"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 50, "top_p": 0.9, "max_new_tokens": 64}


@pytest.mark.parametrize("rope", ROPE_TYPES, ids=["llama3", "yarn", "longrope"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_any_value_in_any_place_is_taken_or_refused_by_name(rope, model_type):
    @hypothesis.settings(max_examples=500)
    @hypothesis.given(hostile.mutated(FULL | {"model_type": model_type, "rope_scaling": rope}))
    def check(document):
        try:
            config = ModelConfig.from_hf(document if isinstance(document, dict) else {"model_type": document})
        except UnsupportedModel as e:
            told = str(e)
            assert told.startswith("config.json: ") and len(told) < 500
        else:
            assert np.isfinite(rotary_turns(config)).all()
            hash(config)

    check()


def rotary_turns(config: ModelConfig) -> np.ndarray:
    scaling = config.rope_scaling
    assert scaling is None or np.isfinite(scaling.gain)
    return (plain_turns if scaling is None else scaling.turns)(config.rope_theta, config.head_dim)


@hypothesis.settings(max_examples=500)
@hypothesis.given(hostile.mutated({"config": FULL, "generation_config": GENERATION}))
def test_any_files_are_taken_or_refused_by_name(tmp_path, files):
    if not isinstance(files, dict) or files.keys() != {"config", "generation_config"}:
        return
    write(tmp_path, **{name: json.dumps(content) for name, content in files.items()})
    for read in (ModelConfig.from_folder, default_sampling):
        try:
            read(tmp_path)
        except UnsupportedModel as e:
            told = str(e)
            assert re.search(r"(^|/)(generation_)?config\.json", told)


@hypothesis.settings(max_examples=500)
@hypothesis.given(hostile.hostile_bytes(json.dumps(FULL).encode()))
def test_any_bytes_are_taken_or_refused_by_name(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    try:
        ModelConfig.from_folder(tmp_path)
    except UnsupportedModel as e:
        told = str(e)
        assert f"{tmp_path}/config.json" in told


@pytest.mark.parametrize("shape", sorted((Path(__file__).parents[2] / "configs" / "shapes").glob("*.yaml")))
def test_any_value_of_yaml_in_any_place_is_taken_or_refused_by_name(shape):
    own: list = []
    own.append(own)
    strange = [datetime.date(2026, 1, 2), b"\xff", {1, 2}, own, 16**9000, {None: 1, (1, 2): 3}]
    fields = yaml.safe_load(shape.read_text())
    for name in (*fields, "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config"):
        for value in strange:
            for document in (fields | {name: value}, fields | {"rope_scaling": {name: value}}):
                with contextlib.suppress(UnsupportedModel):
                    ModelConfig.from_hf(document, source=shape.name)
    with pytest.raises(
        UnsupportedModel, match=f"^{shape.name}: hidden_size must be an integer .* got .an integer of 36001 bits"
    ):
        ModelConfig.from_hf(fields | {"hidden_size": 16**9000}, source=shape.name)
