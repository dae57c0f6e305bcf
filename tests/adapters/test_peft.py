"""PEFT folders: what is accepted computes exactly what PEFT's rules say, and everything else is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from slora_jax.adapters.lora_config import parse_lora_config
from slora_jax.adapters.peft import AdapterLimits, load_adapter, read_header, resolve_adapter_path
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES
from tests.helpers.peft_folders import (
    MODEL,
    POOL,
    WIDTHS,
    expected_delta,
    make_config,
    make_tensors,
    tensor_name,
    unpack_delta,
    write_adapter,
)

ORACLE = Path(__file__).parents[1] / "oracle" / "fixtures"


def load(folder, dtype=np.float32):
    return load_adapter(read_header(folder, MODEL, POOL), dtype)


def assert_deltas(host, tensors, alphas=lambda layer, module: 8, rslora=False):
    for layer in range(3):
        for module in MODULES:
            expected = expected_delta(tensors, layer, module, alphas(layer, module), rslora)
            np.testing.assert_allclose(
                unpack_delta(host, layer, module), expected, rtol=1e-5, atol=1e-6, err_msg=f"layer {layer} {module}"
            )


# Accepted


@pytest.mark.parametrize("rank", [1, 3, 4, 16, 33, 256])
def test_any_rank_on_all_modules(tmp_path, rank):
    tensors = make_tensors(MODULES, rank)
    host = load(write_adapter(tmp_path, tensors, r=rank))
    assert host.header.ranks == dict.fromkeys(MODULES, rank)
    assert host.header.max_rank == rank
    assert host.packed.shape == (3, 2, host.header.layout.num_rows, 8)
    assert host.header.num_pages * 16 == host.header.layout.num_rows
    assert_deltas(host, tensors)


@pytest.mark.parametrize("modules", [("q",), ("k", "o"), ("down",), ("q", "v", "gate"), ("q", "k", "v", "o")])
def test_any_subset_of_modules(tmp_path, modules):
    tensors = make_tensors(modules)
    header = read_header(write_adapter(tmp_path, tensors), MODEL, POOL)
    assert header.ranks == dict.fromkeys(modules, 4)
    assert header.scales == tuple(2.0 if m in modules else 0.0 for m in MODULES)
    assert_deltas(load_adapter(header, np.float32), tensors)


def test_rank_stabilized_scale(tmp_path):
    tensors = make_tensors(MODULES)
    host = load(write_adapter(tmp_path, tensors, use_rslora=True))
    assert host.header.scales == (4.0,) * 7
    assert_deltas(host, tensors, rslora=True)


@pytest.mark.parametrize("alpha", [16, 0.5, -3, 1e-3])
def test_alpha(tmp_path, alpha):
    tensors = make_tensors(MODULES)
    assert_deltas(load(write_adapter(tmp_path, tensors, lora_alpha=alpha)), tensors, lambda layer, module: alpha)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_match_as_in_peft_and_the_first_match_counts(tmp_path, rslora):
    rank_pattern = {
        "model.layers.0.self_attn": 99,
        r"layers\.1\..*_proj": 6,
        "model.layers.0.self_attn.q_proj": 7,
        "^model.layers.2.mlp.down_proj": 3,
        "(up|gate)_proj": 5,
        "proj": 99,
        "q_proj": 2,
        "attn.v_proj": 99,
    }
    alpha_pattern = {r"layers\.[01]\.self_attn\.k_proj": 3, "o_proj": 20, "model.layers.1.self_attn.o_proj": 1}
    ranks, alphas = {}, {}
    for layer in range(3):
        for module in MODULES:
            rank = {"q": 2, "up": 5, "gate": 5}.get(module, 4)
            if layer == 1:
                rank = 6
            if (layer, module) == (0, "q"):
                rank = 7
            if (layer, module) == (2, "down"):
                rank = 3
            ranks[layer, module] = rank
            alphas[layer, module] = 20 if module == "o" else 3 if module == "k" and layer < 2 else 8
    tensors = make_tensors(MODULES, ranks=ranks)
    host = load(
        write_adapter(tmp_path, tensors, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=rslora)
    )
    assert host.header.ranks == {"q": 7, "k": 6, "v": 6, "o": 6, "gate": 6, "up": 6, "down": 6}
    assert_deltas(host, tensors, lambda layer, module: alphas[layer, module], rslora)


def test_module_scale_is_the_first_layers_and_the_others_b_takes_the_ratio(tmp_path):
    tensors = make_tensors(("q",), ranks={(0, "q"): 2})
    host = load(write_adapter(tmp_path, tensors, rank_pattern={"layers.0.self_attn.q_proj": 2}))
    assert host.header.scales[0] == 4.0
    b = host.packed[1].reshape(-1, 8)[host.header.layout.start_b[0]]
    np.testing.assert_array_equal(b, tensors[tensor_name(1, "q", "B")][:8, 0] * 0.5)
    assert_deltas(host, tensors)


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1, 2)])
def test_a_scale_of_zero_in_some_layers(tmp_path, zeros):
    tensors = make_tensors(("q", "down"))
    pattern = {f"layers.{layer}.self_attn.q_proj": 0 for layer in zeros}
    host = load(write_adapter(tmp_path, tensors, alpha_pattern=pattern))
    assert_deltas(host, tensors, lambda layer, module: 0 if module == "q" and layer in zeros else 8)


@pytest.mark.parametrize("layers", [(0, 2), (1,)])
def test_some_layers_only(tmp_path, layers):
    tensors = make_tensors(layers=layers)
    config = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(layers)}
    assert_deltas(load(write_adapter(tmp_path, tensors, **config)), tensors)
    assert_deltas(load(write_adapter(tmp_path, tensors)), tensors)


def test_layers_to_transform_may_be_a_number(tmp_path):
    tensors = make_tensors(layers=(1,))
    config = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}
    assert_deltas(load(write_adapter(tmp_path, tensors, **config)), tensors)


# As a widely used library for training writes it.
LONG_EXPRESSION = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:v_proj|q_proj)))"
)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"^(?!.*vision).*\.[qv]_proj$"},
        {"target_modules": LONG_EXPRESSION},
        {"target_modules": ["self_attn.q_proj", "v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(mlp.*|[ko])_proj"},
        {"target_modules": "All-Linear", "exclude_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj", "audio_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": True},
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 1, 2, 77],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {".*.*.*.*.*.*.*.*.*x": 2, "(a+)+b": 3}},
    ],
)
def test_targets_in_every_form(tmp_path, fields):
    assert_deltas(load(write_adapter(tmp_path, **fields)), make_tensors())


@pytest.mark.parametrize(
    ("tensors", "fields", "reason"),
    [
        (
            make_tensors(layers=(1,)),
            {"target_modules": ["q_proj", "v_proj"]},
            "for 4 of the 6 .*model.layers.0.self_attn.q",
        ),
        (make_tensors(), {"target_modules": "all-linear"}, "for 15 of the 21 .*model.layers.0.self_attn.k_proj"),
        (
            make_tensors(("q",)),
            {"target_modules": None},
            "for 3 of the 6 .* the first of them model.layers.0",
        ),
        (make_tensors(), {"target_modules": r".*\.([qv]|up)_proj"}, "for 3 of the 9 .*model.layers.0.mlp.up_proj"),
        (make_tensors(), {"target_modules": ["q_proj", "v_proj", "lm_head"]}, "for 1 of the 7 .* lm_head"),
        (make_tensors(), {"target_modules": ".*[qvd]_(proj|tokens)"}, "for 1 of the 7 .* model.embed_tokens"),
        (
            make_tensors(layers=(0, 2)),
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2]},
            "for 2 of the 6 .*model.layers.1",
        ),
    ],
)
def test_tensors_missing_that_the_config_targets(tmp_path, tensors, fields, reason):
    with pytest.raises(BadAdapter, match=f"adapter_model.safetensors has no tensors {reason}"):
        read_header(write_adapter(tmp_path, tensors, **fields), MODEL, POOL)


def test_thousands_of_patterns_that_are_names_are_looked_up(tmp_path):
    names = [f"model.layers.{layer}.self_attn.{m}_proj" for layer in range(1000) for m in "qkvo"]
    pattern = dict.fromkeys(names, 3) | {"model.layers.1.self_attn.q_proj": 2, "q_proj": 99}
    tensors = make_tensors(rank=3, ranks={(1, "q"): 2})
    host = load(write_adapter(tmp_path, tensors, r=4, rank_pattern=pattern))
    assert_deltas(host, tensors)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("pool_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_element_types(tmp_path, dtype, pool_dtype):
    tensors = make_tensors(("q", "k"), dtype=dtype)
    host = load(write_adapter(tmp_path, tensors), pool_dtype)
    assert host.packed.dtype == pool_dtype
    assert not host.packed.flags.writeable
    rounded = {name: t.astype(np.float32).astype(pool_dtype).astype(np.float32) for name, t in tensors.items()}
    assert_deltas(host, rounded)


def test_ratio_is_applied_before_the_cast(tmp_path):
    tensors = make_tensors(("q",))
    folder = write_adapter(tmp_path, tensors, alpha_pattern={"layers.2.self_attn.q_proj": 3})
    host = load(folder, ml_dtypes.bfloat16)
    start = host.header.layout.start_b[0]
    expected = (tensors[tensor_name(2, "q", "B")][:8, 0] * np.float32(3 / 8)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(host.packed[2].reshape(-1, 8)[start], expected)


def test_adapter_name_inside_the_tensor_names(tmp_path):
    named = write_adapter(tmp_path / "named", make_tensors(infix="default."))
    plain = write_adapter(tmp_path / "plain", make_tensors())
    assert load(named).content_hash == load(plain).content_hash


@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": init} for init in (False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica")]
    + [
        {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "corda_config": {"x": 1}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "revision": "main", "lora_dropout": 0.5},
        {"modules_to_save": [], "trainable_token_indices": None, "target_parameters": [], "layer_replication": []},
        {"velora_config": None, "use_bdlora": None, "lora_bias": False, "alora_invocation_tokens": None},
        {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "task_type": None, "bias": None},
        {"a_field_of_the_future": None, "another": False, "third": []},
        {"enable_lora": None, "merge_weights": False, "ensure_weight_tying": True},
    ],
)
def test_fields_that_change_nothing(tmp_path, fields):
    usual = load(write_adapter(tmp_path / "usual"))
    assert load(write_adapter(tmp_path / "other", **fields)).content_hash == usual.content_hash


def test_a_config_of_peft_0_3(tmp_path):
    folder = write_adapter(tmp_path)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert_deltas(load(folder), make_tensors())


def test_header_reads_no_weights(tmp_path):
    # A file with a hole of 40 GiB for its weights: reading them would not go unnoticed.
    rows = 2**38 // 24
    big = ModelConfig(64, 24, rows, 1, 6, 2, 4)
    shapes = {tensor_name(0, "up", "A"): [1, 24], tensor_name(0, "up", "B"): [rows, 1]}
    table, end = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * 4
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(table).encode()
    folder = write_adapter(tmp_path, r=1, target_modules=["up_proj"])
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    header = read_header(folder, big, PoolLayout.for_model(big))
    assert header.file_bytes == 8 + len(raw) + end


@pytest.mark.parametrize(
    "folder", sorted(ORACLE.glob("*/adapters/*")), ids=lambda path: f"{path.parts[-3]}/{path.name}"
)
def test_adapters_written_by_peft(folder):
    model = ModelConfig.from_folder(folder.parents[1] / "model")
    host = load_adapter(read_header(folder, model, PoolLayout.for_model(model)), np.float32)
    tensors = load_file(folder / "adapter_model.safetensors")
    squares = sum(float(np.square(t.astype(np.float64)).sum()) for n, t in tensors.items() if "lora_A" in n)
    layout = host.header.layout
    a_rows = host.packed.reshape(model.num_layers, -1, model.kv_size)[:, : layout.start_b[0]]
    np.testing.assert_allclose(np.square(a_rows.astype(np.float64)).sum(), squares, rtol=1e-9)
    assert any(host.header.scales)


def test_there_are_adapters_written_by_peft():
    assert len(list(ORACLE.glob("*/adapters/*/adapter_config.json"))) >= 6


# Refused: the config


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "LOHA"}, 'peft_type="LOHA" is not supported: only'),
        ({"peft_type": None}, "peft_type=null"),
        ({"task_type": "SEQ_CLS"}, 'task_type="SEQ_CLS" is not supported: .* head'),
        ({"bias": "all"}, 'bias="all" is not supported: .*train with bias'),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"use_dora": True}, "use_dora=true is not supported: DoRA .*merge"),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] is not supported: it replaces whole'),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\].*embeddings"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.*number of layers"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters=.*use target_modules"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.*activated LoRA"),
        ({"use_qalora": True}, "use_qalora=true"),
        ({"monteclora_config": {}}, "monteclora_config=.*random"),
        ({"use_bdlora": {}}, "use_bdlora=.*block-diagonal"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config="),
        ({"kasa_config": {}}, "kasa_config=.*base weights"),
        ({"velora_config": {}}, "velora_config="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa".*path_initial_model_for_weight_conversion'),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "OLoRA"}, "changes the base weights"),
        ({"init_lora_weights": "corda"}, "changes the base weights"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
        ({"init_lora_weights": "lora_ga"}, "changes the base weights"),
        ({"init_lora_weights": "novel"}, 'init_lora_weights="novel" is not supported: known are'),
        ({"use_magic": 3}, "use_magic=3 is not supported: the field is unknown"),
        ({"r": 0}, "r=0 is not supported: a rank must be a positive integer"),
        ({"r": 4.0}, "r=4.0"),
        ({"r": True}, "r=true"),
        ({"r": "4"}, 'r="4"'),
        ({"r": 257}, "rank 257 of model.layers.0.self_attn.q_proj is too high: at most 256"),
        ({"lora_alpha": "8"}, "lora_alpha=.*finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=NaN"),
        ({"lora_alpha": 10**400}, "lora_alpha=.*finite number"),
        ({"lora_alpha": 1e300}, "overflows float32; lower lora_alpha"),
        ({"use_rslora": "yes"}, 'use_rslora="yes" is not supported: expected true or false'),
        ({"rank_pattern": {"q_proj": 0}}, r'rank_pattern\["q_proj"\]=0'),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=.*expected an object"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora_A.weight has shape \[4, 24\], expected \[2, 24\]"),
        ({"rank_pattern": {"q_proj(": 2}}, "rank_pattern=.*not a valid expression"),
        ({"rank_pattern": {"(?=q)(a+)+b": 2}}, "rank_pattern=.*could take for ever"),
        ({"rank_pattern": {"(?!q).*.*.*.*.*x": 2}}, "could take for ever"),
        ({"rank_pattern": {"x" * 1001: 2}}, "rank_pattern=.*it has 1001 characters, and at most 1000"),
        ({"rank_pattern": {f"{i}.*(.?){{100}}": 2 for i in range(99)}}, "rank_pattern=.*could take too long to match"),
        ({"alpha_pattern": {r"(q)\1": 2}}, "alpha_pattern=.*without back references"),
        ({"alpha_pattern": {"(?P<a>q)": 2}}, "alpha_pattern=.*named groups"),
        ({"alpha_pattern": {"q*+": 2}}, "alpha_pattern=.*not a valid expression"),
        ({"alpha_pattern": {"é": 2}}, "alpha_pattern=.*ASCII"),
        ({"target_modules": "("}, r'target_modules="\(" is not supported: not a valid expression'),
        ({"exclude_modules": "[z-a]"}, "exclude_modules=.*not a valid expression"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform=.*target_modules is an expression"),
        ({"target_modules": "all-linear", "layers_pattern": []}, "layers_pattern=.*target_modules is an expression"),
        ({"layers_pattern": "layers"}, "layers_pattern=.*needs layers_to_transform"),
        ({"layers_pattern": 3, "layers_to_transform": [1]}, "layers_pattern=3"),
        ({"layers_pattern": "(", "layers_to_transform": [1]}, "layers_pattern=.*not a valid expression"),
        (
            {"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(20)], "layers_to_transform": [1]},
            "target_modules=.*PEFT shortens",
        ),
        ({"r": 2**40}, "r=1099511627776"),
        ({"a\nb": 3}, r'"a\\nb"=3 is not supported: the field is unknown'),
        ({"alpha_pattern": {"q_proj": None}}, r'alpha_pattern\["q_proj"\]=null'),
        ({"target_modules": [1]}, r"target_modules=\[1\] is not supported: expected a list of module names"),
        (
            {"target_modules": ["q_proj"]},
            "v_proj.lora_A.weight is for a module that adapter_config.json does not target",
        ),
        ({"target_modules": ["proj"]}, "does not target"),
        ({"exclude_modules": ["v_proj"]}, "does not target"),
        (
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
            "layers.1.self_attn.q_proj.lora_A.weight is for a module that",
        ),
        ({"layers_to_transform": ["0"]}, "layers_to_transform=.*expected layer numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_config(tmp_path, fields, reason):
    folder = write_adapter(tmp_path / "pirate", **fields)
    with pytest.raises(BadAdapter, match=reason) as refused:
        read_header(folder, MODEL, POOL)
    assert str(folder) in str(refused.value), "the message names the adapter"


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_missing_rank_or_alpha_is_pefts_default(tmp_path, key):
    folder = write_adapter(tmp_path, make_tensors(rank=8), r=8)
    config = make_config(r=8, target_modules=["q_proj", "v_proj"])
    del config[key]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert read_header(folder, MODEL, POOL).scales[0] == 1.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "adapter_config.json is not valid JSON"),
        (b"\xff\xfe", "adapter_config.json is not valid JSON"),
        (b"[" * 100_000, "adapter_config.json is not valid JSON"),
        (b"[]", "adapter_config.json must hold a JSON object"),
        (b" " * (256 * 2**10 + 1), "more than the 262144 allowed"),
    ],
    ids=["cut", "binary", "deep", "list", "huge"],
)
def test_refused_config_file(tmp_path, content, reason):
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(BadAdapter, match=reason):
        read_header(folder, MODEL, POOL)


# Refused: the tensors


def changed(**changes):
    """The usual tensors with some replaced or, if None, removed; keys are full names."""
    tensors = make_tensors() | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "holds no tensors"),
        (changed(**{"base_model.model.lm_head.weight": np.ones(3)}), 'lm_head.weight" matches nothing here: only'),
        (changed(**{"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(3)}), "embed_tokens.*only self"),
        (changed(**{"base_model.model.model.norm.weight": np.ones(3)}), 'norm.weight" matches nothing'),
        (changed(**{tensor_name(0, "q", "B")[:-6] + "bias": np.ones(3)}), 'lora_B.bias" matches.*biases are not'),
        (
            changed(**{"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(3)}),
            'lora_magnitude_vector" matches nothing here: it belongs to DoRA',
        ),
        ({"base_model.model.model.layers.0.attention.wq.lora_A.weight": np.ones(3)}, "expected names like base_model"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones(3)}, "expected names like base_model"),
        ({"base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": np.ones(3)}, "another architecture"),
        ({"base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight": np.ones(3)}, "matches nothing"),
        (make_tensors(infix="a\n."), "matches nothing"),
        ({tensor_name(0, "q", "C"): np.ones(3)}, "matches nothing"),
        (make_tensors(layers=(0, 3)), "layers.3.self_attn.q_proj.lora_A.weight is for layer 3, but .* has 3 layers"),
        (changed(**{tensor_name(1, "v", "B"): None}), "layers.1.self_attn.v_proj.lora_A.weight has no lora_B beside"),
        (changed(**{tensor_name(1, "v", "A"): None}), "layers.1.self_attn.v_proj.lora_B.weight has no lora_A beside"),
        (changed(**{tensor_name(0, "q", "A"): np.ones((4, 25))}), r"has shape \[4, 25\], expected \[4, 24\]"),
        (changed(**{tensor_name(0, "v", "B"): np.ones((9, 4))}), r"has shape \[9, 4\], expected \[8, 4\]"),
        (changed(**{tensor_name(0, "q", "A"): np.ones((3, 24))}), r"has shape \[3, 24\], expected \[4, 24\]"),
        (changed(**{tensor_name(0, "q", "A"): np.ones(96)}), r"has shape \[96\], expected \[4, 24\]"),
        (changed(**{tensor_name(0, "q", "A"): np.ones((4, 24), np.int8)}), 'element type "I8"; supported are F64, F32'),
        (make_tensors() | make_tensors(infix="other."), "mixes tensors of several adapters"),
    ],
)  # fmt: skip
def test_refused_tensors(tmp_path, tensors, reason):
    with pytest.raises(BadAdapter, match=reason):
        read_header(write_adapter(tmp_path, tensors), MODEL, POOL)


def test_another_base_models_adapter(tmp_path):
    other = ModelConfig(64, 32, 40, 3, 4, 2, 8)
    with pytest.raises(BadAdapter, match=r"has shape \[4, 24\], expected \[4, 32\].*another base model"):
        read_header(write_adapter(tmp_path), other, PoolLayout.for_model(other))


# Refused: the files


def table_file(table, data=b"") -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + data


ONE = tensor_name(0, "q", "A")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has 0 bytes, too few"),
        (b"1234567", "too few"),
        ((2**40).to_bytes(8, "little") + b"{}", "truncated or not a safetensors file"),
        (b"PK\x03\x04 a pickle by another name", "truncated or not a safetensors file"),
        (table_file(b"{nope"), "not valid JSON"),
        (table_file(b"[" * 50_000), "not valid JSON"),
        (table_file([]), "not a JSON object"),
        (table_file("{}".encode("utf-16")), "not valid JSON"),
        (table_file(b'{"a": {}, "a": {}}'), 'names "a" twice'),
        (table_file(b'{"a": {"shape": [1], "shape": [2]}}'), 'names "shape" twice'),
        (table_file({ONE: {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}), r'malformed: dtype=\["F32"\]'),
        (table_file({ONE: {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}), r"malformed: dtype=\{\}"),
        (table_file({ONE: {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}), "malformed"),
        (table_file({ONE: {"dtype": "F32", "shape": [9**4000] * 9, "data_offsets": [0, 4]}}), "malformed"),
        (table_file({ONE: {"dtype": "F32", "shape": [2**62] * 8, "data_offsets": [0, 4]}}), "should take"),
        (table_file({ONE: {"dtype": "F32", "shape": [0, 24], "data_offsets": [0, 0]}}), "has no lora_B"),
        (table_file({"\ud800\n" * 999: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "matches no"),
        (table_file({ONE: 3}), 'entry of tensor .*q_proj.lora_A.weight" is malformed'),
        (table_file({ONE: {"dtype": "F32", "shape": [1, -1], "data_offsets": [0, 4]}}), "malformed"),
        (table_file({ONE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "malformed"),
        (table_file({ONE: {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}), "malformed"),
        (table_file({ONE: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"1234"), 'type "F8_E4M3"'),
        (table_file({ONE: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "should take 8 bytes"),
        (table_file({ONE: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "truncated: its tensors"),
        (table_file({ONE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "corrupt: its tensors"),
        (table_file({ONE: {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"1" * 8), "starts at byte"),
        (
            table_file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in (ONE, "b")}, b"1234"),
            "starts at byte",
        ),
    ],
)
def test_refused_weight_file(tmp_path, content, reason):
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(BadAdapter, match=reason) as refused:
        read_header(folder, MODEL, POOL)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 1000
    assert "adapter_model.safetensors: " in message or "tensor " in message


def test_huge_table_is_not_read(tmp_path):
    folder = write_adapter(tmp_path)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(BadAdapter, match="takes 1073741824 bytes, more than"):
        read_header(folder, MODEL, POOL)


def test_missing_files(tmp_path):
    with pytest.raises(BadAdapter, match="nowhere: no such folder"):
        read_header(tmp_path / "nowhere", MODEL, POOL)
    with pytest.raises(BadAdapter, match=r"adapter_config.json not found; save it with"):
        read_header(tmp_path, MODEL, POOL)
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BadAdapter, match=r"adapter_model.safetensors not found; save it with"):
        read_header(folder, MODEL, POOL)


def test_pickles_are_never_read(tmp_path):
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    read_header(folder, MODEL, POOL)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BadAdapter, match=r"adapter_model.bin is a pickle.*convert it .*safe_serialization=True"):
        read_header(folder, MODEL, POOL)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "is not a regular file"),
        (lambda path: os.symlink(path, path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: os.symlink("nowhere", path), "not found"),
        (lambda path: os.symlink("/proc/self/mem", path), "cannot be read: Input/output error"),
    ],
)
def test_what_is_no_file(tmp_path, name, replace, reason):
    folder = write_adapter(tmp_path)
    (folder / name).unlink()
    replace(folder / name)
    with pytest.raises(BadAdapter, match=rf"{name}\S* ({reason})"):
        read_header(folder, MODEL, POOL)


def test_a_sparse_file_of_100_gb_is_refused_by_its_table(tmp_path):
    folder = write_adapter(tmp_path)
    os.truncate(folder / "adapter_model.safetensors", 10**11)
    with pytest.raises(BadAdapter, match="corrupt: its tensors end at byte"):
        read_header(folder, MODEL, POOL)


# Refused: the weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("part", ["A", "B"])
def test_nan_and_infinity(tmp_path, value, dtype, part):
    tensors = make_tensors(dtype=dtype)
    name = tensor_name(2, "v", part)
    tensors[name][1, 3] = value
    header = read_header(write_adapter(tmp_path, tensors), MODEL, POOL)
    with pytest.raises(BadAdapter, match=rf"tensor {name} holds NaN or infinity \(1 of \d+ values\)"):
        load_adapter(header, np.float32)


@pytest.mark.parametrize(
    ("value", "dtype", "pool_dtype"),
    [
        (65520.0, np.float32, np.float16),
        (-1e30, np.float32, np.float16),
        (1e300, np.float64, np.float32),
        (-1e39, np.float64, ml_dtypes.bfloat16),
        (3.4e38, np.float32, ml_dtypes.bfloat16),
    ],
)
def test_overflow_of_the_pools_type(tmp_path, value, dtype, pool_dtype):
    tensors = make_tensors(dtype=dtype)
    tensors[tensor_name(0, "q", "A")][0, 0] = value
    header = read_header(write_adapter(tmp_path, tensors), MODEL, POOL)
    with pytest.raises(BadAdapter, match=rf"q_proj.lora_A.weight overflows {np.dtype(pool_dtype)}: it holds"):
        load_adapter(header, pool_dtype)


def test_largest_value_that_fits(tmp_path):
    tensors = make_tensors()
    tensors[tensor_name(0, "q", "A")][0, 0] = -65519.0
    assert load(write_adapter(tmp_path, tensors), np.float16).packed.min() == -65504.0


def test_overflow_by_the_ratio_of_scales(tmp_path):
    tensors = make_tensors()
    tensors[tensor_name(1, "q", "B")][0, 0] = 60000.0
    folder = write_adapter(tmp_path, tensors, alpha_pattern={"layers.1.self_attn.q_proj": 80})
    with pytest.raises(BadAdapter, match=r"layers.1.self_attn.q_proj.lora_B.weight overflows float16: it holds 600000"):
        load(folder, np.float16)


def test_changed_after_the_header_was_read(tmp_path):
    header = read_header(write_adapter(tmp_path), MODEL, POOL)
    write_adapter(tmp_path, make_tensors(rank=5), r=5)
    with pytest.raises(BadAdapter, match="changed since it was registered; register it again"):
        load_adapter(header, np.float32)
    write_adapter(tmp_path, lora_alpha=9)
    with pytest.raises(BadAdapter, match="changed since it was registered"):
        load_adapter(header, np.float32)
    write_adapter(tmp_path)
    with pytest.raises(BadAdapter, match="its files changed since it was registered"):
        load_adapter(header, np.float32)
    header = read_header(tmp_path, MODEL, POOL)
    os.truncate(tmp_path / "adapter_model.safetensors", header.file_bytes - 1)
    with pytest.raises(BadAdapter, match="changed since it was registered"):
        load_adapter(header, np.float32)
    shutil.rmtree(tmp_path)
    with pytest.raises(BadAdapter, match="no such folder"):
        load_adapter(header, np.float32)


def test_written_to_while_it_is_read(tmp_path, monkeypatch):
    header = read_header(write_adapter(tmp_path), MODEL, POOL)
    weights = tmp_path / "adapter_model.safetensors"

    def pack_while_written(layout, *args):
        os.utime(weights, ns=(0, 0))
        return original(layout, *args)

    original = type(header.layout).pack
    monkeypatch.setattr(type(header.layout), "pack", pack_while_written)
    with pytest.raises(BadAdapter, match="was written to while it was read"):
        load_adapter(header, np.float32)


def test_truncated_while_it_is_read(tmp_path, monkeypatch):
    header = read_header(write_adapter(tmp_path), MODEL, POOL)

    def pack_while_truncated(layout, *args):
        os.truncate(tmp_path / "adapter_model.safetensors", header.file_bytes - 9)
        return original(layout, *args)

    original = type(header.layout).pack
    monkeypatch.setattr(type(header.layout), "pack", pack_while_truncated)
    with pytest.raises(BadAdapter, match=r"truncated: tensor .* bytes|was written to"):
        load_adapter(header, np.float32)


# Identity


def test_hash_is_the_same_wherever_and_in_whatever_order(tmp_path):
    tensors = make_tensors(MODULES)
    original = load(write_adapter(tmp_path / "a", tensors))
    copy = load(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    reordered = write_adapter(tmp_path / "c", tensors)
    table, data = {}, b""
    for name in reversed(list(tensors)):
        raw = tensors[name].tobytes()
        table[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [len(data), len(data + raw)]}
        data += raw
    (reordered / "adapter_model.safetensors").write_bytes(table_file(table, data))
    assert original.content_hash == copy.content_hash == load(reordered).content_hash
    assert len(original.content_hash) == 64
    np.testing.assert_array_equal(original.packed, load(reordered).packed)


def test_hash_differs_with_anything_that_changes_the_function(tmp_path):
    tensors = make_tensors(("q", "k", "v"))
    one_bit = {name: t.copy() for name, t in tensors.items()}
    one_bit[tensor_name(1, "v", "B")].view(np.uint32)[5, 1] ^= 1
    swapped = dict(tensors)
    first, second = tensor_name(0, "k", "A"), tensor_name(0, "v", "A")
    swapped[first], swapped[second] = tensors[second], tensors[first]
    moved = {name.replace(".layers.2.", ".layers.X."): t for name, t in tensors.items()}
    moved = {n.replace(".layers.1.", ".layers.2.").replace(".layers.X.", ".layers.1."): t for n, t in moved.items()}
    single = make_tensors(("k",), layers=(0,))
    variants = [
        (tensors, {}),
        (tensors, {"lora_alpha": 9}),
        (tensors, {"use_rslora": True}),
        (tensors, {"alpha_pattern": {"layers.2.self_attn.k_proj": 3}}),
        (one_bit, {}),
        (swapped, {}),
        (moved, {}),
        ({n: t for n, t in tensors.items() if "layers.2" not in n}, {}),
        (single, {}),
        ({name.replace(".layers.0.", ".layers.1."): t for name, t in single.items()}, {}),
        ({name.replace("k_proj", "v_proj"): t for name, t in single.items()}, {}),
    ]
    hashes = [
        load(write_adapter(tmp_path / str(i), t, **fields)).content_hash for i, (t, fields) in enumerate(variants)
    ]
    assert len(set(hashes)) == len(variants)


def test_hash_does_not_depend_on_the_pools_type(tmp_path):
    folder = write_adapter(tmp_path)
    assert load(folder).content_hash == load(folder, ml_dtypes.bfloat16).content_hash


# Checks that were done before


def test_known_shapes_are_shared_only_by_adapters_trained_alike(tmp_path):
    known = {}
    alike = [
        read_header(write_adapter(tmp_path / str(seed), make_tensors(seed=seed)), MODEL, POOL, known)
        for seed in range(3)
    ]
    other = read_header(write_adapter(tmp_path / "other", make_tensors(), lora_alpha=9), MODEL, POOL, known)
    assert alike[0].shape is alike[1].shape is alike[2].shape
    assert other.shape is not alike[0].shape
    assert other.scales[0] == 2.25
    with pytest.raises(BadAdapter, match="holds no tensors"):
        read_header(write_adapter(tmp_path / "empty", {}), MODEL, POOL, known)
    assert len(known) == 2


def test_config_digests_differ_exactly_where_the_configs_ask_for_something_else():
    def digest(**fields):
        return parse_lora_config(json.dumps(make_config(**fields)).encode()).digest()

    plain = digest(target_modules=["q_proj", "v_proj"])
    assert plain == digest(target_modules=["v_proj", "q_proj"], base_model_name_or_path="other", lora_dropout=0.5)
    others = [
        {"r": 5}, {"lora_alpha": 5}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q": 2}},
        {"alpha_pattern": {"x" * 300 + "a": 2}}, {"alpha_pattern": {"x" * 300 + "b": 2}},
        {"target_modules": ["q_proj"]}, {"exclude_modules": ["k_proj"]}, {"layers_to_transform": [1]},
        {"target_modules": ["o_proj"]}, {"target_modules": "all-linear"}, {"target_modules": "q_proj"},
        {"exclude_modules": "k_proj"}, {"layers_to_transform": [1], "layers_pattern": "h"},
    ]  # fmt: skip
    digests = {digest(**{"target_modules": ["q_proj", "v_proj"]} | other) for other in others}
    assert len(digests | {plain}) == len(others) + 1
    assert plain == digest(target_modules=None), "which is q_proj and v_proj"


def test_header_digests_tell_files_apart_that_differ_outside_of_the_weights(tmp_path):
    folders = [
        write_adapter(tmp_path / "a", make_tensors(seed=0)),
        write_adapter(tmp_path / "b", make_tensors(seed=1)),
        write_adapter(tmp_path / "c", lora_alpha=9),
        write_adapter(tmp_path / "d", make_tensors(rank=5), r=5),
    ]
    a, b, c, d = (read_header(folder, MODEL, POOL).digest for folder in folders)
    assert a == b and len({a, c, d}) == 3 and all(len(digest) == 64 for digest in (a, c, d))


# Where adapters come from


def test_resolve_a_folder(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "owner" / "name")
    assert resolve_adapter_path(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter_path("owner/name").samefile(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_adapter_path("~/owner/name") == folder


@pytest.mark.parametrize(
    "spec",
    ["", "nothing", "/no/such/folder", "./a/b", "../b", "a/b/c", "a/", "é/b", "a/b\n", "~nobody-here", "x" * 10**5],
)
def test_resolve_neither_folder_nor_id(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadAdapter, match="neither an existing folder nor a Hugging Face id") as refused:
        resolve_adapter_path(spec)
    assert len(str(refused.value)) < 400


def test_resolve_downloads_two_files(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, files=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_adapter_path("some-owner/some.name_1") == tmp_path
    assert asked == {
        "repo_id": "some-owner/some.name_1",
        "files": ["adapter_config.json", "adapter_model.safetensors"],
    }


class Hub:
    """A hub with one adapter, as ``snapshot_download`` shows it."""

    def __init__(self, folder, sizes=(), is_there=True, is_cached=False):
        self.folder = folder
        self.sizes = {path.name: path.stat().st_size for path in folder.iterdir()} | dict(sizes)
        self.is_there, self.is_cached = is_there, is_cached
        self.downloaded: list[str] = []

    def snapshot_download(self, repo_id, *, allow_patterns, revision=None, dry_run=False):
        if dry_run and not self.is_there:
            raise errors.DryRunError("no connection")
        files = [name for name in self.sizes if name in allow_patterns]
        if dry_run:
            return [
                SimpleNamespace(
                    filename=name, file_size=self.sizes[name], commit_hash="c1", will_download=not self.is_cached
                )
                for name in files
            ]
        assert revision == ("c1" if self.is_there else None), "what was looked at"
        self.downloaded += files
        return str(self.folder)


@pytest.fixture
def hub_of(tmp_path, monkeypatch):
    def make(rank, **options):
        folder = write_adapter(tmp_path / "hub", make_tensors(rank=rank), r=rank, **options.pop("config", {}))
        hub = Hub(folder, **options)
        monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
        return hub

    return make


def test_what_exceeds_the_limits_is_not_downloaded(hub_of):
    limits = AdapterLimits.of_rank(4, POOL)
    assert limits.file_bytes - 2**19 == 4 * sum(map(sum, WIDTHS.values())) * 3 * 8
    hub = hub_of(4)
    assert resolve_adapter_path("org/name", limits) == hub.folder
    assert sorted(set(hub.downloaded)) == ["adapter_config.json", "adapter_model.safetensors"]
    hub = hub_of(5)
    with pytest.raises(BadAdapter, match="'org/name': its rank is 5, and this server takes at most 4 "):
        resolve_adapter_path("org/name", limits)
    assert hub.downloaded == ["adapter_config.json"]
    for name, most in (("adapter_model.safetensors", limits.file_bytes), ("adapter_config.json", 2**18)):
        hub = hub_of(4, sizes={name: most + 1})
        with pytest.raises(BadAdapter, match=f"{name} has {most + 1} bytes.* not downloaded"):
            resolve_adapter_path("org/name", limits)
        assert hub.downloaded == []
    # Patterns may name lower ranks for all that there is: the header tells, when it is there.
    hub = hub_of(5, config={"rank_pattern": {"q_proj": 4}})
    resolve_adapter_path("org/name", limits)
    # A hub that cannot be reached may have been reached before.
    hub = hub_of(5, is_there=False)
    resolve_adapter_path("org/name", limits)
    assert "adapter_model.safetensors" in hub.downloaded


def test_resolve_offline(tmp_path):
    """In a process of its own: whether it is offline is read when the library is imported."""
    script = (
        "from slora_jax.adapters.peft import resolve_adapter_path\n"
        "from slora_jax.errors import BadAdapter\n"
        "try: resolve_adapter_path('no-such-owner/no-such-adapter')\n"
        "except BadAdapter as e: print(e)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "Hugging Face cannot be reached; give the path of a downloaded folder" in result.stdout


def test_no_jax_and_no_torch_are_imported():
    script = "import sys, slora_jax.adapters.store; print([m for m in ('jax', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_weights_saved_with_other_metadata(tmp_path):
    folder = write_adapter(tmp_path)
    save_file(make_tensors(), folder / "adapter_model.safetensors", {"trained_by": "somebody", "steps": "10"})
    load(folder)
