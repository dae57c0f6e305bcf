"""Adapters that come from memory instead of a PEFT folder: computed in a notebook, or made up for a benchmark."""

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from slora_jax.adapters.peft import MAX_RANK, AdapterHeader, AdapterShape, HostAdapter
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.modules import MODULES


def loaded_adapter(
    name: str, ranks: Mapping[str, int], packed: np.ndarray, pool_layout: PoolLayout, scale: float = 1.0
) -> HostAdapter:
    """An adapter with these weights. Many may share one ``packed``: each counts as another adapter.

    Args:
      name: shown as its path.
      ranks: rank of each module it changes.
      packed: ``[layers, 2, R, N * W]`` in the pool's dtype, as from ``pool_layout.adapter(ranks).pack``; not to be
        written to afterwards.
      pool_layout: the base model's.
      scale: what B A x is multiplied with.

    Raises:
      BadAdapter: an unknown module, a rank out of range, or weights of another shape.
    """
    unknown = set(ranks) - set(MODULES)
    if unknown or not ranks or not all(0 < rank <= MAX_RANK for rank in ranks.values()):
        raise BadAdapter(f"adapter {name}: ranks must be 1 to {MAX_RANK} of {', '.join(MODULES)}; got {dict(ranks)}")
    layout = pool_layout.adapter(ranks)
    shape = AdapterShape(
        ranks=dict(ranks),
        scales=tuple(float(np.float32(scale)) if module in ranks else 0.0 for module in MODULES),
        layout=layout,
        num_pages=layout.num_pages,
    )
    if packed.shape != layout.packed_shape:
        raise BadAdapter(
            f"adapter {name}: packed weights of these ranks have shape {layout.packed_shape}, not {packed.shape}"
        )
    # Drawn instead of computed: hashing the weights takes long, and an equal hash would only save pages.
    content = uuid.uuid4().hex
    header = AdapterHeader(Path(name), shape, packed.nbytes, content.encode(), (0, 0))
    return HostAdapter(header, packed, f"loaded-{content}")


def synthetic_weights(
    rank: int, modules: Iterable[str], pool_layout: PoolLayout, dtype: np.dtype, seed: int = 0
) -> np.ndarray:
    """Random weights of one rank in all layers, small enough to leave a model's activations finite.

    Returns:
      ``[layers, 2, R, N * W]`` in ``dtype``, read-only, for ``loaded_adapter``.
    """
    rng = np.random.default_rng(seed)
    weights: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
    for module in modules:
        shape = pool_layout.shapes[module]
        a = rng.standard_normal((rank, shape.d_in), np.float32) / np.float32(np.sqrt(shape.d_in))
        b = rng.standard_normal((shape.d_out, rank), np.float32) * np.float32(0.01)
        weights |= {(layer, module): (a, b) for layer in range(pool_layout.num_layers)}
    packed = pool_layout.adapter(dict.fromkeys(modules, rank)).pack(weights, np.dtype(dtype))
    packed.flags.writeable = False
    return packed
