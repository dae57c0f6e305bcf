"""Engines whose base model is quantised, with adapters that are not, against float64 NumPy."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.model.modules import MODULES
from tests.helpers.engine_cases import CASES, FIXTURES, Case, forced_logits, make_engine
from tests.helpers.quantized_folders import CONFIG, read_tensors, write
from tests.oracle import reference_numpy

LARGEST = 448
JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class RoundedMap:
    """A linear map W8A8: its weights as they were rounded, and what it is applied to as one token."""

    def __init__(self, weight: np.ndarray):
        self.weight = weight

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        return self.weight @ rounded(x[None])[0]


def rounded_maps(params: dict) -> dict[str, RoundedMap]:
    """The maps that an engine holds, by the names of files; that they are the nearest is tested in tests/model."""
    maps = {}
    for layer, modules in params.items():
        if not layer.startswith("layers_"):
            continue
        for module, names in JOINED.items():
            weight, scale = (np.asarray(modules[module][name], np.float64) for name in ("weight", "channel_scale"))
            whole, prefix = weight * scale[:, None], f"model.layers.{layer.removeprefix('layers_')}"
            if module == "qkv":
                # A query's width is that of what o takes in.
                width = modules["o"]["weight"].shape[1]
                parts = np.split(whole, [width, (width + len(whole)) // 2])
            else:
                parts = np.split(whole, len(names))
            maps |= {f"{prefix}.{name}.weight": RoundedMap(part) for name, part in zip(names, parts, strict=True)}
    return maps


def rounded(rows: np.ndarray) -> np.ndarray:
    """Each row to float8_e4m3fn, by a scale of its own, and back."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / LARGEST
    return (rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", CASES)
def test_fp8_is_the_base_rounded_and_adapters_as_they_are(name):
    case = Case(FIXTURES / name)
    engine, exact_engine = case.engine(quantization="fp8"), case.engine()
    model = reference_numpy.load_model(case.model)
    weights = model.weights | rounded_maps(engine.device.runner.params)
    rounded_model = reference_numpy.Model(model.config, weights)
    prompts = [request["prompt"][i : i + 3] for request in case.requests[:2] for i in (0, 3)]
    for adapter in (None, *engine.adapters()):
        lora = None if adapter is None else reference_numpy.load_adapter(case.adapters / adapter)
        errors, effects = [], []
        for tokens in prompts:
            ours = forced_logits(engine, tokens, adapter)
            exact = reference_numpy.logits(model, tokens, lora)
            errors.extend(map(relative, ours, reference_numpy.logits(rounded_model, tokens, lora)))
            effects.append(relative(ours, exact))
        # Now and then the last bit of a float32 decides between two neighbours in fp8, and all that comes after it is
        # as far away as rounding takes it. Had an adapter seen rounded activations, no row would agree.
        assert np.mean(np.array(errors) < 1e-5) > 0.6, (adapter, errors)
        assert 0.01 < np.mean(effects) < 0.25, (adapter, effects)
    assert relative(forced_logits(exact_engine, prompts[0], None), reference_numpy.logits(model, prompts[0])) < 1e-4


@pytest.mark.parametrize("name", ["awq", "gptq", "block fp8", "packed with zeros", "int8 by channel"])
def test_grouped_weights_answer_as_the_weights_that_they_mean(tmp_path, name):
    meant = write(tmp_path / name, name)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(CONFIG))
    tensors = {tensor: array for tensor, array in read_tensors(tmp_path / name).items() if "_proj." not in tensor}
    save_file({key: array.astype(np.float32) for key, array in (tensors | meant).items()}, plain / "model.safetensors")
    answers = []
    for folder in (tmp_path / name, plain):
        engine = make_engine(folder, pages=100)
        weights = synthetic_weights(8, MODULES, engine.pool_layout, engine.dtype, seed=1)
        engine.register_loaded_adapter("r8", dict.fromkeys(MODULES, 8), weights, scale=4.0)
        answers.append([forced_logits(engine, list(range(1, 20)), adapter) for adapter in (None, "r8")])
    for ours, theirs in zip(*answers, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(answers[0][0], answers[0][1]) > 0.01, "the adapter changes nothing"
