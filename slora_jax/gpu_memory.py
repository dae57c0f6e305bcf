"""How much of a GPU's memory JAX takes. May not import JAX before it is needed: this is asked ahead of its start.

JAX reserves a share of each GPU once, when its backend starts, and everything that it makes lives there: weights, the
pool, what a step makes. Outside stay CUDA's own context, CUDA graphs, and the buffers of collectives. The share is
JAX's 75 % unless an environment variable says otherwise, which would leave a fifth of an 80 GB GPU unused.
"""

import logging
import os
import sys

logger = logging.getLogger(__name__)

_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
_OLD_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_OTHERS = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
"""They decide how the share is taken, and so go together with it."""

_ONE_DEVICE = 0.92
_SEVERAL_DEVICES = 0.88


def default_share(num_devices: int) -> float:
    """The share of a GPU's memory that JAX takes where nobody says otherwise.

    Args:
      num_devices: that share the model. Where they are several, collectives keep buffers outside of JAX's memory.
    """
    return _ONE_DEVICE if num_devices == 1 else _SEVERAL_DEVICES


def set_share(share: float | None, num_devices: int = 1) -> None:
    """Has JAX take this share of each GPU's memory, by the environment of this process. Ahead of JAX's start.

    A variable that the environment already has wins. Where JAX has started, nothing can be changed any more: a warning
    says so if the GPU's share is another.

    Args:
      share: above 0, at most 1; None takes ``default_share``.
      num_devices: that share the model.
    """
    for name in (_VARIABLE, _OLD_VARIABLE, *_OTHERS):
        if os.environ.get(name) and not (name == _VARIABLE and os.environ[name] == str(share)):
            # Loud where a configuration asks for something else.
            level = logging.INFO if share is None or name in _OTHERS else logging.WARNING
            logger.log(level, "the environment has %s=%s, which decides", name, os.environ[name])
    if os.environ.get(_VARIABLE) or os.environ.get(_OLD_VARIABLE):
        return
    wanted = default_share(num_devices) if share is None else share
    if _started_on_a_gpu():
        logger.warning(
            "JAX was used before the engine was made, and keeps its own 75 %% of the GPU, not %g %%; make the engine "
            "first, or set %s=%g before Python starts",
            100 * wanted,
            _VARIABLE,
            wanted,
        )
        return
    os.environ[_VARIABLE] = str(wanted)


def is_reserved_at_once() -> bool:
    """Whether JAX takes all of its share when it starts, as it does unless the environment says otherwise."""
    preallocate, allocator = (os.environ.get(name, "").lower() for name in _OTHERS)
    return preallocate not in ("false", "0") and allocator in ("", "default", "bfc")


def _started_on_a_gpu() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax
    from jax._src import xla_bridge  # JAX has no public way to ask without starting

    return xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu"
