"""Embedded demo: SmolLM2-135M-Instruct and LoRA adapters whose answers differ at a glance.

    demo_model_path()   Hugging Face folder of the base model, converted once into the cache
    demo_adapters()     name -> PEFT folder, shipped in this package
    with_demo(config)   the same config, where it says "demo" with both of these

`data` and `train` rebuild the adapters (`python -m slora_jax.demo.train --help`); `train` alone
needs torch, transformers and peft. Importing this package imports none of them, nor jax.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from slora_jax.demo.model import MODEL_ID, MODEL_NAME, demo_model_path

if TYPE_CHECKING:
    from slora_jax.config import EngineConfig

__all__ = ["MODEL_ID", "MODEL_NAME", "demo_adapters", "demo_model_path", "with_demo"]


def demo_adapters() -> dict[str, Path]:
    """Return the demo adapters' folders by name, in alphabetical order.

    Each folder holds adapter_config.json and adapter_model.safetensors (bf16) as PEFT writes
    them, for the base model `MODEL_ID`.
    """
    root = Path(__file__).parent / "adapters"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/adapter_config.json"))}


def with_demo(config: "EngineConfig") -> "EngineConfig":
    """Return the config with what the model name "demo" stands for; any other config as it is.

    For whoever takes configs from people: the engine knows folders and Hugging Face ids only. The model's folder takes
    the name's place, and the demo adapters come along, beside the config's own and behind those of their names.

    Raises:
        ModuleNotFoundError, UnsupportedModel, OSError: see `demo_model_path`.
    """
    if config.model != "demo" or config.dummy:
        return config
    shipped = {name: str(path) for name, path in demo_adapters().items()}
    return config.model_copy(update={"model": str(demo_model_path()), "adapters": shipped | config.adapters})
