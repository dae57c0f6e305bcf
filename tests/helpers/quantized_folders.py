"""Small models in the formats of quantised checkpoints, written value by value as the formats are published.

Shares no code with what reads them. ``FORMATS`` has what ``write`` takes.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from slora_jax.model.config import ModelConfig
from tests.helpers.model_folders import random_tensors

SHAPE = ModelConfig(48, 64, 96, 1, 4, 2, 16)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "bfloat16",
}
_FP8 = ml_dtypes.float8_e4m3fn
_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(form: str, weights: dict, activations: dict | None = None, **fields) -> dict:
    """A ``quantization_config`` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    } | fields


def _eight(kind: str, strategy: str, **fields) -> dict:
    return {"num_bits": 8, "type": kind, "strategy": strategy, **fields}


def _four(strategy: str, **fields) -> dict:
    return {"num_bits": 4, "type": "int", "strategy": strategy, **fields}


FORMATS = {
    "fp8 by channel": compressed("float-quantized", _eight("float", "channel"), _TOKENS),
    "fp8 by tensor": compressed("float-quantized", _eight("float", "tensor"), _TOKENS | {"dynamic": False}),
    "fp8 by block": compressed("float-quantized", _eight("float", "block", block_structure=[32, 48]), _TOKENS),
    "fp8 weights only": compressed("naive-quantized", _eight("float", "channel")),
    "int8 by channel": compressed("int-quantized", _eight("int", "channel"), _TOKENS | {"type": "int"}),
    "packed in groups": compressed("pack-quantized", _four("group", group_size=32)),
    "packed by channel": compressed("pack-quantized", _four("channel", actorder="weight")),
    "packed with zeros": compressed("pack-quantized", _four("group", group_size=16, symmetric=False)),
    "packed in eight bits": compressed("pack-quantized", _eight("int", "group", group_size=32, symmetric=False)),
    "block fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [48, 32],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False},
    "gptq v2, one group": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "desc_act": True,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    },
    "gptq in eight bits": {"quant_method": "gptq", "bits": 8, "group_size": 16, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}


def write(folder: Path, name: str, seed: int = 0, shape: ModelConfig = SHAPE, **fields) -> dict[str, np.ndarray]:
    """Writes a folder in a format of ``FORMATS``, and returns the weights ``[out, in]`` float64 that it means.

    Args:
      shape: of the model; ``fields`` are of ``config.json`` and lie over those of ``CONFIG``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantization = FORMATS[name]
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization} | fields))
    rng = np.random.default_rng(seed)
    tensors, meant = {}, {}
    for tensor, value in random_tensors(shape, seed=seed).items():
        if not tensor.endswith("_proj.weight"):
            tensors[tensor] = value
            continue
        parts, meant[tensor] = _quantized(value.astype(np.float64) / 20, quantization, rng)
        tensors |= {f"{tensor.removesuffix('weight')}{part}": array for part, array in parts.items()}
    save_file({tensor: np.ascontiguousarray(array) for tensor, array in tensors.items()}, folder / "model.safetensors")
    return meant


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors; safetensors gives NumPy none in fp8."""
    dtypes = {"F8_E4M3": _FP8, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    dtypes |= {"I8": np.int8, "I32": np.int32, "I64": np.int64}
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize((folder / "model.safetensors").read_bytes())
    }


def _quantized(weight: np.ndarray, quantization: dict, rng) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A map's tensors, by what follows its name, and the weights that they mean."""
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        (group,) = quantization["config_groups"].values()
        weights = group["weights"]
        if quantization["format"] == "pack-quantized":
            return _packed(weight, weights, rng)
        block = {"channel": [1, 0], "tensor": [0, 0]}.get(weights["strategy"]) or weights["block_structure"]
        values, scales, meant = _in_blocks(weight, block, _FP8 if weights["type"] == "float" else np.int8)
        if weights["strategy"] == "tensor":
            scales = scales.reshape(1)
        parts = {"weight": values, "weight_scale": scales}
        if weights["strategy"] == "tensor":
            parts["input_scale"] = np.float32([0.01])
        return parts, meant
    if method == "fp8":
        values, scales, meant = _in_blocks(weight, quantization["weight_block_size"], _FP8, np.float32)
        return {"weight": values, "weight_scale_inv": scales}, meant
    bits, d_in = quantization["bits"], weight.shape[1]
    size = d_in if quantization["group_size"] == -1 else quantization["group_size"]
    values, scales, zeros, meant = _unsigned(weight, size, bits, rng, np.float16)
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {
            "qweight": _words(values.T, 4, order),
            "qzeros": _words(zeros.T, 4, order),
            "scales": scales.T,
        }
        return parts, meant
    less = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    parts = {
        "qweight": _words(values, bits, range(32 // bits)).T,
        "qzeros": _words((zeros.T - less) % 2**bits, bits, range(32 // bits)),
        "scales": scales.T,
        "g_idx": np.int32([i // size for i in range(d_in)]),
    }
    if bits == 8:
        parts["bias"] = np.zeros(len(weight), np.float16)
    return parts, meant


def _packed(weight: np.ndarray, weights: dict, rng) -> tuple[dict[str, np.ndarray], np.ndarray]:
    bits, size = weights["num_bits"], weights.get("group_size") or weight.shape[1]
    values, scales, zeros, meant = _unsigned(weight, size, bits, rng, ml_dtypes.bfloat16)
    if weights["symmetric"]:
        meant += (zeros.repeat(size, axis=1) - 2.0 ** (bits - 1)) * scales.astype(np.float64).repeat(size, axis=1)
    parts = {
        "weight_packed": _words(values, bits, range(32 // bits)),
        "weight_scale": scales,
        "weight_shape": np.int64(weight.shape),
    }
    if not weights["symmetric"]:
        parts["weight_zero_point"] = _words(zeros.T, bits, range(32 // bits)).T
    return parts, meant


def _in_blocks(weight: np.ndarray, block, dtype, scale_dtype=ml_dtypes.bfloat16):
    rows, columns = (size or whole for size, whole in zip(block, weight.shape, strict=True))
    values, meant = np.empty(weight.shape, dtype), np.empty(weight.shape)
    scales = np.empty(
        [-(-whole // size) for whole, size in zip(weight.shape, (rows, columns), strict=True)], scale_dtype
    )
    for i, j in np.ndindex(scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        largest = 127 if dtype is np.int8 else 440
        scales[i, j] = np.abs(weight[part]).max() / largest * 1.01
        scaled = weight[part] / float(scales[i, j])
        values[part] = np.round(scaled) if dtype is np.int8 else scaled
        meant[part] = values[part].astype(np.float64) * float(scales[i, j])
    return values, scales, meant


def _unsigned(weight: np.ndarray, size: int, bits: int, rng, dtype):
    """Integers from 0 with a zero point for each group ``[out, in / size]``."""
    groups = weight.reshape(len(weight), -1, size)
    zeros = rng.integers(1, 2**bits, groups.shape[:2])
    scales = (np.abs(groups).max(axis=2) / 2 ** (bits - 1)).astype(dtype)
    values = np.round(groups / scales.astype(np.float64)[..., None]) + zeros[..., None]
    values = np.clip(values, 0, 2**bits - 1).astype(np.int64)
    meant = (values - zeros[..., None]) * scales.astype(np.float64)[..., None]
    return values.reshape(weight.shape), scales, zeros, meant.reshape(weight.shape)


def _words(values: np.ndarray, bits: int, order) -> np.ndarray:
    """Integers ``[n, m]`` as 32-bit words: the lowest bits of one hold the integer that ``order`` names first."""
    in_word = 32 // bits
    padded = np.zeros((len(values), -(-values.shape[1] // in_word) * in_word), np.int64)
    padded[:, : values.shape[1]] = values
    words = np.zeros((len(values), padded.shape[1] // in_word), np.int64)
    for place, integer in enumerate(order):
        words |= padded[:, integer::in_word] << (bits * place)
    return words.astype(np.uint32).view(np.int32)
