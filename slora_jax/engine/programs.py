"""Compiled programs, by shape.

They are not kept on disk here, though JAX's compilation cache still needs each one traced and lowered, half a second of
one thread: a program that this cache has loaded cannot be serialized again on a CPU (it then lacks functions when run).
"""

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

logger = logging.getLogger(__name__)


class Programs:
    """Programs by *shape*, any hashable value; compiled when first asked for."""

    def __init__(
        self,
        lower: Callable[[Hashable], jax.stages.Lowered],
        options: Callable[[Hashable], dict[str, str | bool]],
    ):
        """
        Args:
          lower: traces and lowers a shape's program; called by one thread at a time.
          options: a shape's compiler options.
        """
        self._lower = lower
        self._options = options
        self._programs: dict[Hashable, jax.stages.Compiled] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._programs)

    def get(self, shape: Hashable) -> jax.stages.Compiled:
        """The shape's program."""
        if shape not in self._programs:
            logger.debug("first step of shape %s: compiling its program", shape)
            self.prepare([shape])
        return self._programs[shape]

    def prepare(self, shapes: Iterable[Hashable]) -> None:
        """Compiles these shapes' programs, using all cores."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self._programs]
        # XLA compiles outside of Python's lock, so while it does, this thread traces the next shape.
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            compiling = [(shape, workers.submit(self._lower(shape).compile, self._options(shape))) for shape in missing]
            for shape, future in compiling:
                self._programs[shape] = future.result()
