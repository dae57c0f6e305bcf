"""Which implementation of attention and LoRA a device runs: decided here and nowhere else.

Whether several devices send to each other by kernels is decided where their memory is opened for that, in
``collectives.open_peer_memory``.
"""

import logging
from typing import Literal

import jax
import jax.numpy as jnp

Backend = Literal["reference", "triton", "hopper"]
"""Plain JAX; Triton, on NVIDIA GPUs from Ampere on; Triton with the attention of prompts in Mosaic, on Hopper GPUs."""

MOSAIC_HEAD_DIMS = (64, 128)
MOSAIC_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))

_logger = logging.getLogger(__name__)


def choose_backend(device: jax.Device, head_dim: int, dtype: jnp.dtype) -> Backend:
    """The kernels for a model on a device, logged; call it once and pass the answer on.

    A shape that the chosen kernels cannot do raises NotImplementedError where it is used: there is no silent fallback.
    """
    if device.platform not in ("gpu", "cuda"):
        backend: Backend = "reference"
    # Others lack the instructions of the Mosaic kernel, later ones too.
    elif device.compute_capability == "9.0" and head_dim in MOSAIC_HEAD_DIMS and dtype in MOSAIC_DTYPES:
        backend = "hopper"
    else:
        backend = "triton"
    _logger.info("kernels on %s for heads of %d, %s: %s", device.device_kind, head_dim, jnp.dtype(dtype), backend)
    return backend
