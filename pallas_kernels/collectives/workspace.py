"""Memory of each GPU that the others write into, for the kernels of ``triton_kernels``.

The GPUs of one process see each other's memory under the same addresses: JAX allows it when it starts. So a table of
addresses is all that a kernel needs to reach a peer over NVLink, and nothing but ordinary kernels has to be launched.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HEAD_BYTES = 64 * 2**10
"""Of flags and counters, ahead of the slots."""

MAIL_HEAD_BYTES = 512
"""The end of the head: flags and counters of mail, with up to 63 devices."""

MAIL_CHANNELS = 2

MAX_PROGRAMS = 256
"""Programs of a kernel for which there are flags, with up to 63 devices."""


def mail_slot_bytes(slot_bytes: int) -> int:
    """Of one device's mail in one channel, where so large is the largest message."""
    return slot_bytes // 256 * 128


class PeerMemory:
    """One workspace on each device of a mesh, and the table of where they are.

    It is written by kernels that JAX does not see writing, so it must outlive every program that was given the table.

    Attributes:
      table: ``[N, 2 * (N + 1)]`` int32, a row on each device: the addresses of all workspaces as pairs of 32 bits, then
        the device's own place.
      slot_bytes: largest message, in bytes.
      nbytes: of a workspace.
    """

    def __init__(self, mesh: Mesh, slot_bytes: int):
        """
        Args:
          mesh: of one axis; all of its devices are GPUs of this process.
          slot_bytes: the largest message; a multiple of 128.
        """
        assert slot_bytes % 128 == 0, "a slot begins where blocks of bytes do"
        (axis,) = mesh.axis_names
        count = mesh.devices.size
        self.slot_bytes = slot_bytes
        self.nbytes = HEAD_BYTES + 2 * count * slot_bytes + MAIL_CHANNELS * count * mail_slot_bytes(slot_bytes)
        sharding = NamedSharding(mesh, PartitionSpec(axis, None))
        self._workspace = jnp.zeros((count, self.nbytes // 4), jnp.int32, device=sharding)
        self._workspace.block_until_ready()
        shards = sorted(self._workspace.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        assert len(shards) == count, "each device of the mesh is this process's"
        addresses = [shard.data.unsafe_buffer_pointer() for shard in shards]
        rows = np.array([[*addresses, place] for place in range(count)], np.int64)
        self.table = jax.device_put(rows.view(np.int32), sharding)


def peers_reach_each_other(mesh: Mesh) -> bool:
    """Whether the devices of a mesh can write into each other's memory: GPUs of this process."""
    devices = list(mesh.devices.flat)
    return all(d.platform == "gpu" and d.process_index == jax.process_index() for d in devices)
