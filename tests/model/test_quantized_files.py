"""Checkpoints that are quantised already: what their maps mean on the device, and what is refused by file and field."""

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from slora_jax.errors import UnsupportedModel
from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.config import ModelConfig
from slora_jax.model.quantization import ChannelFp8, GroupedWeights
from slora_jax.model.quantized_files import Unreadable
from slora_jax.model.weights import load_params
from tests.helpers.oracles import stored_integers
from tests.helpers.quantized_folders import CONFIG, FORMATS, compressed, read_tensors, write

LAYOUTS = {
    "fp8 by channel": ChannelFp8(),
    "fp8 by tensor": ChannelFp8(),
    "fp8 by block": GroupedWeights("float8_e4m3fn", 48),
    "fp8 weights only": GroupedWeights("float8_e4m3fn"),
    "int8 by channel": GroupedWeights("int8"),
    "packed in groups": GroupedWeights("int4", 32),
    "packed by channel": GroupedWeights("int4"),
    "packed with zeros": GroupedWeights("int4", 16, has_zeros=True),
    "packed in eight bits": GroupedWeights("int8", 32, has_zeros=True),
    "block fp8": GroupedWeights("float8_e4m3fn", 32),
    "gptq": GroupedWeights("int4", 32, has_zeros=True),
    "gptq v2, one group": GroupedWeights("int4", None, has_zeros=True),
    "gptq in eight bits": GroupedWeights("int8", 16, has_zeros=True),
    "awq": GroupedWeights("int4", 32, has_zeros=True),
}


def held(params: dict, layout) -> np.ndarray:
    """The weights ``[out, in]`` float64 that a map's parameters mean."""
    leaves = {
        name: stored_integers(np.asarray(leaf), layout.bits)
        if name == "packed"
        else np.asarray(leaf).astype(np.float64)
        for name, leaf in params.items()
    }
    if "weight" in leaves:
        return leaves["weight"] * leaves["channel_scale"][:, None]
    values = leaves["packed" if "packed" in leaves else "kernel"]
    scale = leaves["group_scale"] if "group_scale" in leaves else leaves["channel_scale"][None]
    size = len(values) // len(scale)
    if "group_zero" in leaves:
        values = values - leaves["group_zero"].repeat(size, axis=0)
    return (values * scale.repeat(size, axis=0)).T


def joined(meant: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    return {
        "qkv": np.concatenate([meant[f"{attention}.{name}_proj.weight"] for name in "qkv"]),
        "o": meant[f"{attention}.o_proj.weight"],
        "gate_up": np.concatenate([meant[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]),
        "down": meant[f"{mlp}.down_proj.weight"],
    }


def load(folder: Path, **changes) -> tuple[ModelConfig, dict]:
    config = dataclasses.replace(ModelConfig.from_folder(folder), **changes)
    return config, load_params(folder, config, jnp.bfloat16, progress=False)


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_what_the_files_mean(tmp_path, name):
    meant = write(tmp_path, name)
    config, params = load(tmp_path)
    assert config.weight_layout == LAYOUTS[name]
    for module, expected in joined(meant).items():
        np.testing.assert_allclose(
            held(params["layers_0"][module], config.weight_layout), expected, rtol=1e-6, err_msg=module
        )
    tensors = read_tensors(tmp_path)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("name", ["block fp8", "awq", "fp8 by tensor"])
def test_any_of_them_is_held_in_fp8_where_that_is_asked_for(tmp_path, name):
    meant = write(tmp_path, name)
    config, params = load(tmp_path, weight_layout=ChannelFp8())
    for module, expected in joined(meant).items():
        found = held(params["layers_0"][module], config.weight_layout)
        assert set(params["layers_0"][module]) == {"weight", "channel_scale"}
        largest = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(found - expected) <= np.maximum(np.abs(expected) / 16, largest * 2.0**-17)).all()
        if name == "fp8 by tensor":
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["awq", "block fp8"])
def test_a_cache_of_weights_gives_them_back(tmp_path, name):
    write(tmp_path / "model", name)
    config, expected = load(tmp_path / "model")
    for source in ("safetensors", "orbax"):
        params, provenance = load_or_restore(
            tmp_path / "model", config, jnp.bfloat16, tmp_path / "cache", progress=False
        )
        assert provenance.source == source
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert jax.tree.map(lambda leaf: leaf.dtype, params) == jax.tree.map(lambda leaf: leaf.dtype, expected)


def test_scales_of_a_cache_in_fp8_are_not_needed(tmp_path):
    meant = write(tmp_path, "fp8 by channel")
    tensors = read_tensors(tmp_path)
    for name in ("k_scale", "v_scale", "k_proj.output_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = np.ones(1, ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    config, params = load(tmp_path)
    np.testing.assert_allclose(held(params["layers_0"]["o"], config.weight_layout), joined(meant)["o"], rtol=1e-6)


ON_DEVICES = """
import sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import load_params
from tests.model.test_quantized_files import held

def part(array, axis, shard, count):
    size = array.shape[axis] // count
    return np.take(array, range(shard * size, shard * size + size), axis)

def piece(of, shard):
    return held({name: leaf.addressable_shards[shard].data for name, leaf in of.items()}, config.weight_layout)

for folder in map(Path, sys.argv[1:]):
    config = ModelConfig.from_folder(folder)
    whole = load_params(folder, config, jnp.float32, progress=False)["layers_0"]
    whole = {name: held(whole[name], config.weight_layout) for name in ("qkv", "o", "gate_up", "down")}
    q, k, v = np.split(whole["qkv"], [64, 96])
    # On four devices two keep the same KV head.
    for count in (2, 4):
        layer = load_params(folder, config, jnp.float32, ModelMesh.create(config, count), progress=False)["layers_0"]
        for shard in range(count):
            kv = [part(each, 0, shard * 2 // count, 2) for each in (k, v)]
            gate, up = (part(each, 0, shard, count) for each in np.split(whole["gate_up"], 2))
            np.testing.assert_array_equal(piece(layer["qkv"], shard), np.concatenate([part(q, 0, shard, count), *kv]))
            np.testing.assert_array_equal(piece(layer["gate_up"], shard), np.concatenate([gate, up]))
            for name in ("o", "down"):
                np.testing.assert_array_equal(piece(layer[name], shard), part(whole[name], 1, shard, count))
"""


def test_devices_hold_their_parts_and_groups_lie_on_one_each(tmp_path):
    # A device of four has 24 inputs of down: groups of 32 become such of 8.
    names = ["fp8 by channel", "fp8 by block", "int8 by channel", "packed in groups", "gptq v2, one group", "awq"]
    for name in names:
        write(tmp_path / name, name)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-W", "error", "-c", ON_DEVICES, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# What is refused.


def changed(name: str, path: str, value) -> dict:
    """A format's ``quantization_config`` with another value at a path of fields."""
    quantization = copy.deepcopy(FORMATS[name])
    *parents, field = path.split("/")
    place = quantization
    for parent in parents:
        place = place[parent]
    place[field] = value
    return quantization


_WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes"}, 'quantization_config.quant_method "bitsandbytes" is not supported'),
        (changed("gptq", "bits", 3), "quantization_config.bits=3 is not supported"),
        (changed("gptq", "lm_head", True), "quantization_config.lm_head=true is not supported"),
        (changed("gptq", "dynamic", {"-:.*": {}}), "quantization_config.dynamic is not supported"),
        (changed("gptq", "checkpoint_format", "marlin"), 'quantization_config.checkpoint_format "marlin" is not'),
        (changed("gptq", "group_size", 0), "quantization_config.group_size must be above 0"),
        (changed("awq", "version", "gemv"), 'quantization_config.version "gemv" is not supported'),
        (changed("awq", "zero_point", False), "quantization_config.zero_point=false is not supported"),
        (
            changed("awq", "modules_to_not_convert", ["o_proj"]),
            'quantization_config.modules_to_not_convert has "o_proj", which leaves model.layers.0.self_attn.o_proj as',
        ),
        (changed("block fp8", "weight_block_size", None), "weight_block_size must be two integers above 0"),
        (changed("block fp8", "activation_scheme", "static"), 'activation_scheme "static" is not supported'),
        (changed("packed in groups", "format", "marlin-24"), 'quantization_config.format "marlin-24" is not supported'),
        (
            changed("packed in groups", "sparsity_config", {"format": "sparse-24-bitmask"}),
            "quantization_config.sparsity_config=",
        ),
        (changed("packed in groups", "ignore", []), "quantization_config.ignore must have 'lm_head'"),
        (changed("packed in groups", "ignore", ["lm_head", "re:.*down_proj"]), 'ignore has "re:.*down_proj", which'),
        (changed("packed in groups", "ignore", ["re:("]), '"re:(" is not a regular expression'),
        (changed("packed in groups", f"{_WEIGHTS}/actorder", "group"), f'{_WEIGHTS}/actorder "group" is not supported'),
        (changed("packed in groups", f"{_WEIGHTS}/num_bits", 2), f"{_WEIGHTS}/num_bits 2 of type 'int' is not"),
        (changed("int8 by channel", f"{_WEIGHTS}/symmetric", False), f"{_WEIGHTS}/symmetric=false is not supported"),
        (changed("fp8 by channel", "config_groups/group_0/targets", ["re:.*o_proj"]), "targets must be ['Linear']"),
        (changed("fp8 by channel", "config_groups/group_1", {}), "config_groups must be one group"),
        (compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), 'format "nvfp4-pack-quantized" is not'),
        (changed("fp8 by channel", "quantization_status", "frozen"), "quantization_status must be 'compressed'"),
        ([1], "quantization_config must be an object"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(tmp_path, quantization, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    with pytest.raises(UnsupportedModel) as refused:
        ModelConfig.from_folder(tmp_path)
    assert message.replace("/", ".") in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "config.json")) or "regular expression" in message


def rewrite(folder: Path, name: str, change) -> None:
    tensors = read_tensors(folder)
    tensor = f"model.layers.0.{name}"
    value = change(tensors.pop(tensor).copy())
    if value is not None:
        tensors[tensor] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        (
            "gptq",
            "mlp.down_proj.g_idx",
            lambda a: a[::-1].copy(),
            "model.layers.0.mlp.down_proj: tensor g_idx puts inputs",
        ),
        ("gptq in eight bits", "mlp.up_proj.bias", lambda a: a + 1, "model.layers.0.mlp.up_proj: bias is not zero"),
        ("awq", "mlp.up_proj.qzeros", lambda a: None, 'tensor "model.layers.0.mlp.up_proj.qzeros" is missing, which'),
        ("awq", "mlp.up_proj.scales", lambda a: a[:1], 'mlp.up_proj.scales" has dtype "F16" and shape (1, 96)'),
        ("fp8 by channel", "mlp.up_proj.weight", lambda a: a.astype(np.float32), 'has dtype "F32" and shape (96, 64)'),
        ("block fp8", "mlp.up_proj.weight", lambda a: a.view(np.int8), 'has dtype "I8" and shape (96, 64)'),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_file_and_name(tmp_path, name, tensor, change, message):
    write(tmp_path, name)
    rewrite(tmp_path, tensor, change)
    with pytest.raises(UnsupportedModel) as refused:
        load(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_quantised_tensors_without_a_quantization_config_are_refused(tmp_path):
    write(tmp_path, "fp8 by channel", quantization_config=None)
    with pytest.raises(UnsupportedModel, match=r"F8_E4M3.*quantized weights need a quantization_config"):
        load(tmp_path)


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path):
    write(tmp_path, "awq", quantization_config=FORMATS["awq"] | {"group_size": 48})
    with pytest.raises(UnsupportedModel, match=r"self_attn\.q_proj: 64 inputs are not a multiple of group_size 48"):
        load(tmp_path)


def places(value, before: tuple = ()) -> list[tuple]:
    found = [before] if before else []
    for name, inner in value.items() if isinstance(value, dict) else ():
        found += places(inner, (*before, name))
    return found


_odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})
_odd |= st.lists(st.text(max_size=3), max_size=2) | st.sampled_from([[1, 2], [[]], {"a": {}}, 10**400, -1, 0, "re:.*"])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=300, deadline=None, database=None)
def test_whatever_stands_there_is_read_or_refused(data):
    quantization = copy.deepcopy(FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))])
    *parents, field = data.draw(st.sampled_from(places(quantization)))
    place = quantization
    for parent in parents:
        place = place[parent]
    place[field] = data.draw(_odd)
    try:
        config = ModelConfig.from_hf(CONFIG | {"quantization_config": quantization})
    except UnsupportedModel:
        return
    # What is read says which tensors it needs, or why there can be none.
    if config.weight_files is not None:
        with contextlib.suppress(Unreadable):
            assert config.weight_files.parts(96, 64)
        assert config.weight_bytes(2) > 0
