"""Writes small PEFT folders, and reads packed weights back with plain loops."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from slora_jax.adapters.peft import HostAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES

MODEL = ModelConfig(64, 24, 40, 3, 6, 2, 4)
POOL = PoolLayout.for_model(MODEL)
WIDTHS = {
    "q": (24, 24),
    "k": (24, 8),
    "v": (24, 8),
    "o": (24, 24),
    "gate": (24, 40),
    "up": (24, 40),
    "down": (40, 24),
}
"""(in, out) of each projection, written down by hand."""


def tensor_name(layer: int, module: str, part: str, infix: str = "") -> str:
    block = "self_attn" if module in ("q", "k", "v", "o") else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{module}_proj.lora_{part}.{infix}weight"


def make_tensors(
    modules=("q", "v"), rank=4, layers=range(3), seed=0, dtype=np.float32, infix="", ranks=None
) -> dict[str, np.ndarray]:
    """Random A and B; ``ranks`` gives other ranks by (layer, module)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for module in modules:
            r = (ranks or {}).get((layer, module), rank)
            d_in, d_out = WIDTHS[module]
            tensors[tensor_name(layer, module, "A", infix)] = rng.standard_normal((r, d_in)).astype(dtype)
            tensors[tensor_name(layer, module, "B", infix)] = rng.standard_normal((d_out, r)).astype(dtype)
    return tensors


def make_config(**fields) -> dict:
    """A config as PEFT writes it, trimmed to what it always has."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "target_modules": [f"{m}_proj" for m in MODULES],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }


def write_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    """A folder whose config targets just what the tensors are for, unless ``config`` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors() if tensors is None else tensors
    config = {"target_modules": targets_of(tensors)} | config
    (folder / "adapter_config.json").write_text(json.dumps(make_config(**config)))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def targets_of(tensors: dict[str, np.ndarray]) -> list[str]:
    """Whole names of the projections that the tensors are for: ``model.layers.0.self_attn.q_proj``."""
    return sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})


def unpack_delta(host: HostAdapter, layer: int, module: str) -> np.ndarray:
    """scale * B @ A as the pool would have it, following the layout's docstring element by element."""
    layout, m = host.header.layout, MODULES.index(module)
    rank, rows, width = layout.ranks[m], layout.num_rows, 8
    d_in, d_out = WIDTHS[module]

    def vector(start: int, length: int, i: int) -> np.ndarray:
        elements = []
        for column in range(length):
            entry = start + (column // width) * rank + i
            elements.append(float(host.packed[layer, entry // rows, entry % rows, column % width]))
        return np.array(elements)

    delta = np.zeros((d_out, d_in))
    for i in range(rank):
        delta += np.outer(vector(layout.start_b[m], d_out, i), vector(layout.start_a[m], d_in, i))
    return host.header.scales[m] * delta


def expected_delta(tensors: dict[str, np.ndarray], layer: int, module: str, alpha: float, rslora=False) -> np.ndarray:
    d_in, d_out = WIDTHS[module]
    a = tensors.get(tensor_name(layer, module, "A"))
    if a is None:
        return np.zeros((d_out, d_in))
    b = tensors[tensor_name(layer, module, "B")]
    rank = a.shape[0]
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    return scale * (b.astype(np.float64) @ a.astype(np.float64))
