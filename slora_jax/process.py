"""Which process an object belongs to."""

import os

from slora_jax.errors import EngineStopped


class OwnProcess:
    """The process that made this object. A child made by fork has a copy of it, but none of its threads or devices.

    JAX and its libraries abort or hang there without a word, so ``check`` comes before anything that would reach them.
    """

    def __init__(self):
        self._id = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is still that process."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Does nothing in the process that made this.

        Raises:
          EngineStopped: this is a forked child of it.
        """
        if not self.is_here:
            raise EngineStopped(
                "this engine was made by the parent of this process, and a fork has neither its threads nor its "
                "devices; start processes with multiprocessing.get_context('spawn') and make the engine in the child, "
                "or answer all requests in the parent"
            )
