"""Which implementation of the kernels a platform runs: decided here and nowhere else."""

import logging
from typing import Literal

Backend = Literal["reference", "triton"]

_logger = logging.getLogger(__name__)


def choose_backend(platform: str) -> Backend:
    """The kernels for a JAX platform ("gpu", "cpu", ...), logged; call it once and pass the answer on.

    Triton on NVIDIA GPUs from Ampere on; plain JAX elsewhere. A shape that the Triton kernels cannot do raises
    NotImplementedError where it is used: there is no silent fallback.
    """
    backend: Backend = "triton" if platform in ("gpu", "cuda") else "reference"
    _logger.info("kernels on %s: %s", platform, backend)
    return backend
