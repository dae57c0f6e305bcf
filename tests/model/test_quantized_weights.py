"""Quantised at load: what lands where on one device and on several, in the cache of weights, and as random weights."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import abstract_params
from slora_jax.model.quantization import ChannelFp8, GroupedWeights
from slora_jax.model.weights import dummy_params, load_params
from tests.helpers.model_folders import random_tensors

PLAIN = ModelConfig(48, 40, 56, 1, 8, 4, 6)
FP8 = dataclasses.replace(PLAIN, weight_layout=ChannelFp8())
PROJECTIONS = ("qkv", "o", "gate_up", "down")


def write_model(folder: Path, config: ModelConfig = PLAIN, dtype: type = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    tensors = random_tensors(config, dtype)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def joined(tensors: dict[str, np.ndarray], layer: int, name: str) -> np.ndarray:
    parts = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }[name]
    return np.concatenate([tensors[f"model.layers.{layer}.{part}.weight"] for part in parts]).astype(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_projections_are_rounded_by_channel_and_nothing_else_is(tmp_path, dtype):
    tensors = write_model(tmp_path, dtype=dtype)
    params, plain = (load_params(tmp_path, config, jnp.bfloat16, progress=False) for config in (FP8, PLAIN))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(FP8, jnp.bfloat16)
    )
    for i in range(1):
        layer = params[f"layers_{i}"]
        for name in PROJECTIONS:
            # Of the file's own numbers, not of those rounded to the model's dtype.
            weight, scale = (np.asarray(layer[name][leaf], np.float32) for leaf in ("weight", "channel_scale"))
            expected = joined(tensors, i, name)
            np.testing.assert_allclose(scale, np.abs(expected).max(axis=1) / 448, rtol=1e-6)
            np.testing.assert_array_equal(np.abs(weight).max(axis=1), 448)
            error = np.abs(weight * scale[:, None] - expected)
            assert (error <= np.maximum(np.abs(expected) / 16, scale[:, None] * 2.0**-10) * 1.001).all()
            del layer[name], plain[f"layers_{i}"][name]
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_a_cache_of_weights_keeps_each_layout_apart(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    write_model(model)
    for expected in ("safetensors", "orbax"):
        for config in (PLAIN, FP8):
            params, provenance = load_or_restore(model, config, jnp.bfloat16, cache, progress=False)
            assert provenance.source == expected
            jax.tree.map(
                np.testing.assert_array_equal, params, load_params(model, config, jnp.bfloat16, progress=False)
            )


def test_random_weights_are_those_of_the_unquantised_model_rounded():
    plain = dummy_params(PLAIN, jnp.float32, seed=5)
    for layout in (ChannelFp8(), GroupedWeights("int8", 8)):
        config = dataclasses.replace(PLAIN, weight_layout=layout)
        params = dummy_params(config, jnp.float32, seed=5)
        assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config, jnp.float32))
        np.testing.assert_array_equal(params["embed"]["embedding"], plain["embed"]["embedding"])
        for name in PROJECTIONS:
            of = params["layers_0"][name]
            if layout == ChannelFp8():
                found = (np.asarray(of["weight"], np.float32) * np.asarray(of["channel_scale"])[:, None]).T
            else:
                groups = len(of["kernel"]) // len(of["group_scale"])
                found = np.asarray(of["kernel"], np.float32) * np.repeat(of["group_scale"], groups, axis=0)
            kernel = np.asarray(plain["layers_0"][name]["kernel"])
            assert 0 < np.abs(found - kernel).max() < np.abs(kernel).max() / 16


def test_bytes_are_counted_as_they_are_held():
    for layout in (None, ChannelFp8(), GroupedWeights("int8"), GroupedWeights("float8_e4m3fn", 8, has_zeros=True)):
        config = dataclasses.replace(PLAIN, weight_layout=layout)
        leaves = jax.tree.leaves(dummy_params(config, jnp.bfloat16, seed=0))
        held = sum(leaf.nbytes for leaf in leaves)
        assert held == config.weight_bytes(2), layout
    four = dataclasses.replace(PLAIN, weight_layout=GroupedWeights("int4", 8))
    eight = dataclasses.replace(PLAIN, weight_layout=GroupedWeights("int8", 8))
    values = PLAIN.num_layers * (40 * 96 + 48 * 40 + 40 * 112 + 56 * 40)
    assert eight.weight_bytes(2) - four.weight_bytes(2) == values // 2


ON_DEVICES = """
import dataclasses, json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.quantization import ChannelFp8, GroupedWeights
from slora_jax.model.weights import dummy_params, load_params

folder = Path(sys.argv[1])
plain = ModelConfig(48, 40, 56, 1, 8, 4, 6)
mesh = ModelMesh.create(plain, 4)

def map_on(of, shard):
    leaves = {name: np.asarray(leaf.addressable_shards[shard].data, np.float32) for name, leaf in of.items()}
    if "weight" in leaves:
        return (leaves["weight"] * leaves["channel_scale"][:, None]).T
    scale = leaves.get("group_scale", leaves.get("channel_scale"))
    scale = scale.reshape(-1, scale.shape[-1])
    return leaves["kernel"] * np.repeat(scale, len(leaves["kernel"]) // len(scale), axis=0)

def part(array, axis, shard):
    size = array.shape[axis] // 4
    return np.take(array, range(shard * size, shard * size + size), axis)

def check(params, whole):
    for i, shard in np.ndindex(1, 4):
        mine, all_ = params[f"layers_{i}"], {name: map_on(whole[f"layers_{i}"][name], 0) for name in maps}
        q, k, v = np.split(all_["qkv"], [48, 72], axis=1)
        gate, up = np.split(all_["gate_up"], 2, axis=1)
        expected = {
            "qkv": np.concatenate([part(piece, 1, shard) for piece in (q, k, v)], axis=1),
            "gate_up": np.concatenate([part(piece, 1, shard) for piece in (gate, up)], axis=1),
            "o": part(all_["o"], 0, shard),
            "down": part(all_["down"], 0, shard),
        }
        for name in maps:
            np.testing.assert_allclose(map_on(mine[name], shard), expected[name], rtol=1e-6, atol=0)

maps = ("qkv", "o", "gate_up", "down")
fp8 = dataclasses.replace(plain, weight_layout=ChannelFp8())
# A channel has one scale on all devices: the values are those of one.
check(*(load_params(folder, fp8, jnp.float32, place, progress=False) for place in (mesh, None)))
by_channel = dataclasses.replace(plain, weight_layout=GroupedWeights("int8"))
check(*(dummy_params(by_channel, jnp.float32, 5, place) for place in (mesh, None)))
# Eight values to a word: o and down are shared out by blocks of words.
wide = ModelConfig(48, 64, 256, 1, 4, 4, 64, weight_layout=GroupedWeights("int4", 32))
mine, whole = (
    dummy_params(wide, jnp.float32, 5, place)["layers_0"] for place in (ModelMesh.create(wide, 4), None)
)
for name, shape in (("qkv", (1, 192, 8)), ("o", (1, 64, 8)), ("gate_up", (1, 128, 8)), ("down", (1, 64, 8))):
    shards = [shard.data for shard in mine[name]["packed"].addressable_shards]
    assert {shard.shape for shard in shards} == {shape}, name
    if name in ("o", "down"):
        np.testing.assert_array_equal(np.concatenate(shards), whole[name]["packed"])
in_groups = dataclasses.replace(plain, weight_layout=GroupedWeights("int8", 14))
layer = dummy_params(in_groups, jnp.float32, 5, mesh)["layers_0"]
print(json.dumps({name: layer[name]["group_scale"].addressable_shards[0].data.shape for name in maps}))
"""


def test_devices_hold_their_part_of_the_same_values(tmp_path):
    write_model(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-W", "error", "-c", ON_DEVICES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Groups of 14 inputs: down's are whole, 14 of 56 on each device, and those of the others are in parts.
    assert json.loads(done.stdout) == {"qkv": [20, 24], "o": [6, 40], "gate_up": [20, 28], "down": [1, 40]}
