"""S-LoRA in JAX: thousands of LoRA adapters of one Llama base model served from one page pool.

The names below are loaded on first use, so that the host-only parts (scheduler, page accounting) import without JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slora_jax.api.notebook import generate, shutdown
    from slora_jax.config import EngineConfig
    from slora_jax.engine.engine import Engine
    from slora_jax.request import Request, SamplingParams

    __version__: str

_HOMES = {
    "Engine": "slora_jax.engine.engine",
    "EngineConfig": "slora_jax.config",
    "Request": "slora_jax.request",
    "SamplingParams": "slora_jax.request",
    "generate": "slora_jax.api.notebook",
    "shutdown": "slora_jax.api.notebook",
}

__all__ = ["Engine", "EngineConfig", "Request", "SamplingParams", "__version__", "generate", "shutdown"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _version() -> str:
    """The installed package's version; "0+unknown" of a checkout that is not installed."""
    from importlib import metadata  # slow to import, and few ask

    try:
        return metadata.version("slora-jax")
    except metadata.PackageNotFoundError:
        return "0+unknown"
