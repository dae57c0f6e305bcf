"""Llama with LoRA in plain float64 NumPy: one token at a time, one head at a time, read from HF and PEFT folders.

Slow on purpose and independent of both the engine and PyTorch: it is checked against the torch fixtures, and the
engine may be checked against it for any request, not only those recorded. Needs numpy, safetensors and, for bfloat16
files, ml_dtypes.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray


@dataclass(frozen=True)
class Model:
    config: dict
    weights: dict[str, Array]  # by the names of the checkpoint, float64


@dataclass(frozen=True)
class Lora:
    """The change of one projection: y += scaling * B (A x)."""

    a: Array  # [r, in]
    b: Array  # [out, r]
    scaling: float


Adapter = dict[str, Lora]  # by module name, such as "model.layers.0.self_attn.q_proj"


def load_model(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    weights = {}
    for file in files:
        for name, weight in load_file(folder / file).items():
            weights[name] = weight.astype(np.float64)
    return Model(config, weights)


def load_adapter(folder: Path) -> Adapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    adapter = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a = tensors[name].astype(np.float64)
        b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        rank = a.shape[0]
        alpha = config["lora_alpha"]
        for pattern, value in config["alpha_pattern"].items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        adapter[module] = Lora(a, b, alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank)
    return adapter


def logits(
    model: Model,
    tokens: list[int],
    adapter: Adapter | None = None,
    kept: Callable[[Array], Array] = lambda values: values,
) -> Array:
    """Next-token logits after each of ``tokens``: [len(tokens), vocab]. ``kept`` is what a cache makes of K and V."""
    config, weights = model.config, model.weights
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    head_dim = config.get("head_dim", hidden_size // num_heads)
    eps = config["rms_norm_eps"]
    frequencies = rope_frequencies(config, head_dim)
    tied = config["tie_word_embeddings"]
    output = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def project(module: str, x: Array) -> Array:
        y = weights[f"{module}.weight"] @ x
        if adapter and module in adapter:
            lora = adapter[module]
            y = y + lora.scaling * (lora.b @ (lora.a @ x))
        return y

    past_keys = [[] for _ in range(config["num_hidden_layers"])]  # [layer][position] -> [kv heads, head_dim]
    past_values = [[] for _ in range(config["num_hidden_layers"])]
    rows = []
    for position, token in enumerate(tokens):
        x = weights["model.embed_tokens.weight"][token]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            h = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps)
            q = project(f"{prefix}.self_attn.q_proj", h).reshape(num_heads, head_dim)
            k = project(f"{prefix}.self_attn.k_proj", h).reshape(num_kv_heads, head_dim)
            v = project(f"{prefix}.self_attn.v_proj", h).reshape(num_kv_heads, head_dim)
            past_keys[layer].append(kept(np.stack([rotate(head, position * frequencies) for head in k])))
            past_values[layer].append(kept(v))
            keys, values = np.stack(past_keys[layer]), np.stack(past_values[layer])
            heads = []
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                query = rotate(q[head], position * frequencies)
                scores = keys[:, kv_head] @ query / math.sqrt(head_dim)
                probabilities = np.exp(scores - scores.max())
                probabilities /= probabilities.sum()
                heads.append(probabilities @ values[:, kv_head])
            x = x + project(f"{prefix}.self_attn.o_proj", np.concatenate(heads))

            h = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
            gate = project(f"{prefix}.mlp.gate_proj", h)
            up = project(f"{prefix}.mlp.up_proj", h)
            x = x + project(f"{prefix}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        rows.append(output @ rms_norm(x, weights["model.norm.weight"], eps))
    return np.stack(rows)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / math.sqrt(np.mean(x * x) + eps) * weight


def rotate(head: Array, angles: Array) -> Array:
    """Rotary embedding: element i of the first half and element i of the second half are one plane."""
    half = len(head) // 2
    first, second = head[:half], head[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def rope_frequencies(config: dict, head_dim: int) -> Array:
    """Radians a position turns each plane by, from any of the spellings of config.json: [head_dim / 2]."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.get("rope_type", "default") == "default":
        return np.array(frequencies)
    assert rope["rope_type"] == "llama3", rope
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    scaled = []
    for frequency in frequencies:
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
        if turns > high:
            scaled.append(frequency)
        elif turns < low:
            scaled.append(frequency / factor)
        else:
            share = (turns - low) / (high - low)
            scaled.append((1 - share) * frequency / factor + share * frequency)
    return np.array(scaled)
