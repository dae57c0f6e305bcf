"""The devices that share a model, and where each of its arrays lives on them.

One mesh axis, ``TP``. What a device holds of a parameter is one slice of the parameter's array, in the order that
``Shards`` gives; the pool is sliced by its rows' columns.
"""

from collections.abc import Sequence
from functools import cached_property

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import Collectives, PeerMemory, open_peer_memory
from slora_jax.errors import InvalidRequest
from slora_jax.model.config import ModelConfig
from slora_jax.model.shards import Shards

TP = "tp"

ParamPath = tuple[str, ...]
"""Keys from the root of the parameter tree to a leaf, such as ``("layers_0", "qkv", "kernel")``."""

POOL = PartitionSpec(None, None, None, TP)
TABLE = PartitionSpec(TP, None)
"""Of the argument that ``ModelMesh.collectives`` takes."""

PROJECTIONS = ("qkv", "o", "gate_up", "down")
"""The linear maps of a layer, as the parameter tree calls them: those that a quantised model quantises."""

_INPUT, _OUTPUT = PartitionSpec(TP, None), PartitionSpec(None, TP)
_PARAMS = {
    "embed": _INPUT,  # rows: vocabulary
    "lm_head": _OUTPUT,
    "qkv": _OUTPUT,
    "gate_up": _OUTPUT,
    "o": _INPUT,
    "down": _INPUT,
}


def param_spec(path: ParamPath) -> PartitionSpec:
    """Which axis of a parameter the devices share out; norms are whole on each.

    Of a quantised map, ``weight`` is ``[out, in]``, ``channel_scale`` is ``[out]``, and all else is ``[in, out]`` or
    begins so.
    """
    spec = _PARAMS.get(path[-2], PartitionSpec())
    match path[-1]:
        case "weight":
            return PartitionSpec(*reversed(spec))
        case "channel_scale":
            return PartitionSpec(*spec[1:])
    return spec


class ModelMesh:
    """A model on several devices.

    Attributes:
      shards: who holds what of the model.
      mesh: its devices, along the axis ``TP``.
      peers: memory that they write to each other; None until ``connect``, and where XLA's collectives do that.
    """

    peers: PeerMemory | None = None

    def __init__(self, model: ModelConfig, devices: Sequence[jax.Device]):
        """
        Raises:
          InvalidRequest: so many devices cannot share the model.
        """
        self.shards = Shards(model, len(devices))
        self.mesh = jax.make_mesh((len(devices),), (TP,), axis_types=(AxisType.Auto,), devices=devices)

    @classmethod
    def create(cls, model: ModelConfig, tp: int) -> "ModelMesh | None":
        """A mesh of the first ``tp`` devices, of all hosts; None for one.

        Raises:
          InvalidRequest: there are fewer, or so many cannot share the model.
        """
        devices = jax.devices()
        if tp > len(devices):
            raise InvalidRequest(
                f"tp={tp} needs as many devices, and JAX finds {len(devices)} ({devices[0].platform}); lower tp, or on "
                f"a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={tp}",
                param="tp",
            )
        if jax.process_count() > 1 and tp != len(devices):
            raise InvalidRequest(
                f"tp={tp}, but the {jax.process_count()} processes have {len(devices)} devices, and each must be used; "
                "set tp to their number, or hide devices from JAX",
                param="tp",
            )
        return cls(model, devices[:tp]) if tp > 1 else None

    @property
    def size(self) -> int:
        return self.shards.count

    def connect(self, message_bytes: int) -> None:
        """Takes the memory that the devices need to send to each other without XLA, if they can.

        Args:
          message_bytes: of the hidden states of a step's tokens, which are the usual message; larger ones are cut.
        """
        self.peers = open_peer_memory(self.mesh, -(-message_bytes // 128) * 128)

    @property
    def table(self) -> jax.Array | None:
        """What a program must be given to send by ``collectives``; of the spec ``TABLE``."""
        return None if self.peers is None else self.peers.table

    def collectives(self, table: jax.Array | None) -> Collectives:
        """How one device sends to the others, inside of ``jax.shard_map``.

        Args:
          table: its part of ``table``.
        """
        slot_bytes = 0 if self.peers is None else self.peers.slot_bytes
        return Collectives(table, TP, self.size, slot_bytes)

    def param(self, path: ParamPath) -> NamedSharding:
        return NamedSharding(self.mesh, param_spec(path))

    @cached_property
    def pool(self) -> NamedSharding:
        return NamedSharding(self.mesh, POOL)

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def param_specs(self, params):
        """``param_spec`` of each leaf of a tree of parameters, or of a part of one that begins at its root."""
        return jax.tree_util.tree_map_with_path(lambda keys, _: param_spec(tuple(k.key for k in keys)), params)
