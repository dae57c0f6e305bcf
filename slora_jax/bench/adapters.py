"""How fast adapters are registered, and what Python memory each takes."""

import gc
import json
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from slora_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from slora_jax.adapters.store import AdapterStore
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig

_MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}


def write_header_only(folder: Path, model: ModelConfig, pool: PoolLayout, rank: int, alpha: int) -> None:
    """Writes a PEFT folder for q, k, v and o whose weights are a hole in the file: all zero, on no disk."""
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": folder.name, "bias": "none",
        "r": rank, "lora_alpha": alpha, "target_modules": [path.split(".")[1] for path in _MODULES.values()],
        "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    table, end = {}, 0
    for layer in range(model.num_layers):
        for module, path in _MODULES.items():
            shape = pool.shapes[module]
            for part, dims in (("A", (rank, shape.d_in)), ("B", (shape.d_out, rank))):
                name = f"base_model.model.model.layers.{layer}.{path}.lora_{part}.weight"
                start, end = end, end + 2 * dims[0] * dims[1]
                table[name] = {"dtype": "F16", "shape": dims, "data_offsets": (start, end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def run_adapters(count: int, kinds: int, model: ModelConfig, rank: int) -> dict:
    """Registers adapters, once against the clock, once counting memory.

    Args:
      count: adapters; no two have equal files.
      kinds: different scales among them: each has to be checked by itself.
    """
    pool = PoolLayout.for_model(model)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"adapter-{i}" for i in range(count)]
        for i, folder in enumerate(folders):
            write_header_only(folder, model, pool, rank, alpha=1 + i % kinds)
        start, start_cpu = time.perf_counter(), time.process_time()
        _registered(folders, model, pool)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        gc.collect()
        tracemalloc.start()
        store = _registered(folders, model, pool)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(store.infos()) == count
    return {
        "adapters": count,
        "kinds": kinds,
        "registered_per_second": round(count / seconds),
        "cpu_microseconds_each": round(cpu_seconds / count * 1e6),
        "python_bytes_each": round(used / count),
    }


def _registered(folders: list[Path], model: ModelConfig, pool: PoolLayout) -> AdapterStore:
    store = AdapterStore(model, pool, np.dtype(np.float16))
    for folder in folders:
        store.register(folder.name, folder)
    return store
