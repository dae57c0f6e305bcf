"""Which implementation of its kernels a device runs: decided here and nowhere else.

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
FLOAT8_CAPABILITY = (8, 9)
"""The compute capability from which on GPUs convert float8."""

_logger = logging.getLogger(__name__)


def converts_float8() -> bool:
    """Whether this process's GPU has instructions for float8; True where there is none, as when lowering on a CPU."""
    device = jax.devices()[0]
    return device.platform != "gpu" or _capability(device) >= FLOAT8_CAPABILITY


def _capability(device: jax.Device) -> tuple[int, ...]:
    return tuple(map(int, device.compute_capability.split(".")))


def choose_backend(device: jax.Device, head_dim: int, dtype: jnp.dtype, tokens_per_row: int = 1) -> Backend:
    """The kernels for a model on a device, logged; call it once and pass the answer on.

    A shape that the chosen kernels cannot do raises NotImplementedError where it is used: there is no silent fallback.

    Args:
      device: one of those that run them, all of a kind.
      head_dim, dtype: of the model.
      tokens_per_row: above 1 where K and V are float8 (see ``pallas_kernels.pool``).

    Raises:
      NotImplementedError: float8 on a GPU that has no instructions for it.
    """
    if device.platform not in ("gpu", "cuda"):
        backend: Backend = "reference"
    elif tokens_per_row > 1:
        if _capability(device) < FLOAT8_CAPABILITY:
            raise NotImplementedError(
                f"{device.device_kind} has compute capability {device.compute_capability}, and instructions for float8 "
                "came with 8.9: keep the KV cache in the model's dtype"
            )
        # The Mosaic kernel multiplies K and V as they arrive in shared memory: it would need a pass over them there.
        backend = "triton"
    # Others lack the instructions of the Mosaic kernel, later ones too.
    elif device.compute_capability == "9.0" and head_dim in MOSAIC_HEAD_DIMS and dtype in MOSAIC_DTYPES:
        backend = "hopper"
    else:
        backend = "triton"
    kind = f"{jnp.dtype(dtype)}{', float8 K and V' if tokens_per_row > 1 else ''}"
    _logger.info("kernels on %s for heads of %d, %s: %s", device.device_kind, head_dim, kind, backend)
    return backend
