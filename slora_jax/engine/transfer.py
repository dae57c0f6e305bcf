"""How what the host makes for a step comes to the devices that run it, and how what it reads comes back.

On a GPU a program copies its vectors from page-locked host memory, and what the host reads to there, itself. Where JAX
copies them beside the program, buffers of the device are taken for every step and freed at no fixed time. The program's
scratch memory then lies elsewhere in every step, and nearly all that a CUDA graph launches must be updated: 5 ms a step
of 7B, instead of 0.8 (an H100).
"""

import ctypes
from collections import deque
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from slora_jax.model.mesh import ModelMesh

_PINNED = "pinned_host"


class Transfer:
    """Brings vectors of int32, of which every device needs a copy, into programs, and their results to the host."""

    def __init__(self, mesh: ModelMesh | None):
        """
        Args:
          mesh: the devices; None for the first one.
        """
        self._mesh = mesh
        self._put: list[jax.Array] = []
        self._in_use: deque[tuple[list[jax.Array], jax.Array]] = deque()

    @cached_property
    def _kind(self) -> str | None:
        return _PINNED if jax.default_backend() == "gpu" else None

    def struct(self, size: int) -> jax.ShapeDtypeStruct:
        """Of a vector of this size, as a program's argument."""
        sharding = self._sharding(self._kind) if self._kind or self._mesh else None
        return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)

    def put(self, vector: np.ndarray) -> jax.Array | np.ndarray:
        """The vector as a program's argument. Hosts are not asked whether all have the same."""
        if self._kind is None:
            return vector
        argument = self._copy(vector)
        self._put.append(argument)
        return argument

    def keep_until(self, result: jax.Array) -> None:
        """Keeps all that was put since the last call until this result of a program is there.

        JAX gives host memory to others as soon as a program that reads it is on the device's queue, as is right for
        memory of the device only. So this is to be called when the programs that take what was put are started.
        """
        while self._in_use and self._in_use[0][1].is_ready():  # type: ignore[attr-defined]  # which stubs leave out
            self._in_use.popleft()
        if self._put:
            self._in_use.append((self._put, result))
            self._put = []

    def take(self, argument: jax.Array) -> jax.Array:
        """Inside of the program: the vector in the devices' memory."""
        return argument if self._kind is None else jax.device_put(argument, self._sharding(None))

    def give(self, results):
        """Inside of the program: a tree of its results, the same on all devices, where the host will read them."""
        return results if self._kind is None else jax.device_put(results, self._sharding(self._kind))

    @staticmethod
    def read(result: jax.Array) -> np.ndarray:
        """The values of one of the results that ``give`` gave, when they are there.

        NumPy would get a view of the page-locked memory, and JAX counts who uses a buffer in that way. One run of many
        ended when a buffer was freed whose count was not 0 (jax 0.11.2, "Non-zero type 1 hold on destruction"); why is
        not known. So nothing is left that looks there: the few kilobytes are copied.
        """
        if result.sharding.memory_kind != _PINNED:
            return np.asarray(result)
        here = result.addressable_data(0).block_until_ready()
        memory = ctypes.string_at(here.unsafe_buffer_pointer(), here.nbytes)
        return np.frombuffer(memory, here.dtype).reshape(here.shape)

    def _copy(self, vector: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return jax.device_put(vector, self._sharding(self._kind))
        copies = [
            jax.device_put(vector, SingleDeviceSharding(device, memory_kind=self._kind))
            for device in self._mesh.mesh.devices.flat
            if device.process_index == jax.process_index()
        ]
        return jax.make_array_from_single_device_arrays(vector.shape, self._sharding(self._kind), copies)

    def _sharding(self, kind: str | None) -> Sharding:
        if self._mesh is None:
            return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
        return NamedSharding(self._mesh.mesh, PartitionSpec(), memory_kind=kind)
