"""The projections that an adapter can change: their names, their widths, and how devices share them out. No JAX."""

import dataclasses
from dataclasses import dataclass

from slora_jax.model.config import ModelConfig
from slora_jax.model.shards import Shards

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections an adapter can change, in the order of every per-module array."""

ROW_PARALLEL = ("o", "down")
"""Those whose input the devices share out; of the others they share out the output."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Input and output width in elements of one projection."""

    d_in: int
    d_out: int


def module_shapes(model: ModelConfig) -> dict[str, ModuleShape]:
    """Width of every projection in ``MODULES``."""
    hidden, ffn = model.hidden_size, model.intermediate_size
    return {
        "q": ModuleShape(hidden, model.q_size),
        "k": ModuleShape(hidden, model.kv_size),
        "v": ModuleShape(hidden, model.kv_size),
        "o": ModuleShape(model.q_size, hidden),
        "gate": ModuleShape(hidden, ffn),
        "up": ModuleShape(hidden, ffn),
        "down": ModuleShape(ffn, hidden),
    }


def local_shapes(shards: Shards) -> dict[str, ModuleShape]:
    """Width of what one device multiplies with A's rows and B's columns, for every projection in ``MODULES``."""
    return {
        module: dataclasses.replace(shape, d_out=shards.hidden_slice) if module in ROW_PARALLEL else shape
        for module, shape in module_shapes(shards.local).items()
    }


def split_ranks(ranks, num_shards: int):
    """Rows of A that one device has, of column-parallel modules of these ranks; for ints and arrays alike."""
    return -(-ranks // num_shards)
