"""Embedded demo: SmolLM2-135M-Instruct and LoRA adapters whose answers differ at a glance.

    demo_model_path()   Hugging Face folder of the base model, converted once into the cache
    demo_adapters()     name -> PEFT folder, shipped in this package

`data` and `train` rebuild the adapters (`python -m slora_jax.demo.train --help`); `train` alone
needs torch, transformers and peft. Importing this package imports none of them, nor jax.
"""

from pathlib import Path

from slora_jax.demo.model import MODEL_ID, MODEL_NAME, demo_model_path

__all__ = ["MODEL_ID", "MODEL_NAME", "demo_adapters", "demo_model_path"]


def demo_adapters() -> dict[str, Path]:
    """Return the demo adapters' folders by name, in alphabetical order.

    Each folder holds adapter_config.json and adapter_model.safetensors (bf16) as PEFT writes
    them, for the base model `MODEL_ID`.
    """
    root = Path(__file__).parent / "adapters"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/adapter_config.json"))}
