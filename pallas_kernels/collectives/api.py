"""Collectives among the devices that run one program, inside of ``jax.shard_map``: contracts and choice of back end.

On GPUs of one process they are kernels that write into each other's memory; elsewhere XLA's. Every call of a program
must need the result of the call before, as the messages of a model's layers do: the kernels take turns with one
workspace, and all devices must come to the calls in one order.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from pallas_kernels.collectives import triton
from pallas_kernels.collectives.workspace import PeerMemory, peers_reach_each_other
from pallas_kernels.norm import rms_norm


@struct.dataclass
class Collectives:
    """How the devices along a mesh axis send to each other, as one of them sees it.

    Attributes:
      table: this device's row of ``PeerMemory.table``, int32; None where XLA's collectives are to be used.
      axis_name: of the mesh, static.
      size: N, the number of devices; static.
      slot_bytes: the largest message of a kernel, in bytes; static.
    """

    table: jax.Array | None
    axis_name: str = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    slot_bytes: int = struct.field(pytree_node=False)


def open_peer_memory(mesh: Mesh, slot_bytes: int) -> PeerMemory | None:
    """The memory that kernels need, of a mesh with one axis; None where XLA's collectives are to be used."""
    return PeerMemory(mesh, slot_bytes) if peers_reach_each_other(mesh) else None


def all_reduce(x: jax.Array, group: Collectives) -> jax.Array:
    """The sum of all devices' x; with kernels the same bits on each, added in float32 in the order of devices.

    Args:
      x: ``[T, ...]``, floating; of one shape on all devices.
      group: the devices.

    Returns:
      As x.

    Raises:
      ValueError: ``x[0]`` is larger than a message of the group can be.
    """
    if group.table is None:
        return jax.lax.psum(x, group.axis_name)
    return _by_pieces(lambda piece: triton.all_reduce(piece, group), group, x)


def all_reduce_norm(
    term: jax.Array, x: jax.Array, scale: jax.Array, epsilon: float, group: Collectives
) -> tuple[jax.Array, jax.Array]:
    """``x + all_reduce(term)``, and ``rms_norm`` of that: what comes behind a product of which each device has a term.

    With kernels one does it all, so that what has come from the others is not written to memory before it is added.

    Args:
      term: ``[T, h]``, floating; of one shape on all devices.
      x: as term, and the same on all devices.
      scale: ``[h]``, of the norm.
      epsilon: of the norm; static.
      group: the devices.

    Returns:
      The sum and its norm, both as x.

    Raises:
      ValueError: a row is larger than a message of the group can be.
    """
    if group.table is None:
        x = x + jax.lax.psum(term, group.axis_name)
        return x, rms_norm(x, scale, epsilon)

    def send(term, x):
        return triton.all_reduce_norm(term, x, scale, epsilon, group)

    return _by_pieces(send, group, term, x)


def all_gather(x: jax.Array, axis: int, group: Collectives) -> jax.Array:
    """All devices' x, stacked in the order of devices.

    Args:
      x: ``[T, ...]``, floating; of one shape on all devices.
      axis: where the new axis of N goes; at least 1. Static.
      group: the devices.

    Returns:
      ``[*x.shape[:axis], N, *x.shape[axis:]]``.

    Raises:
      ValueError: ``x[0]`` is larger than a message of the group can be.
    """
    assert axis >= 1, "a message that is too long is cut along the first axis"
    if group.table is None:
        return jax.lax.all_gather(x, group.axis_name, axis=axis)
    return _by_pieces(lambda piece: triton.all_gather(piece, axis, group), group, x)


def _by_pieces(send, group: Collectives, *arrays: jax.Array):
    """``send`` of as many consecutive rows of all arrays at a time as fit in a message; the first array is sent."""
    count, row_bytes = arrays[0].shape[0], arrays[0].nbytes // arrays[0].shape[0]
    rows = group.slot_bytes // row_bytes
    if not rows:
        raise ValueError(f"a row of {row_bytes} bytes cannot be sent: a message holds {group.slot_bytes}")
    pieces = [send(*(array[first : first + rows] for array in arrays)) for first in range(0, count, rows)]
    return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
