"""Collectives of devices that share a model: sums and gathers of the messages of a step."""

from pallas_kernels.collectives.api import Collectives, all_gather, all_reduce, all_reduce_norm, open_peer_memory
from pallas_kernels.collectives.workspace import PeerMemory

__all__ = ["Collectives", "PeerMemory", "all_gather", "all_reduce", "all_reduce_norm", "open_peer_memory"]
