"""Products with weights of few bits, whose scales belong to groups of inputs."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.packing import inputs_of_block, pack_integers, unpack_integers

__all__ = ["grouped_matmul", "inputs_of_block", "pack_integers", "unpack_integers"]
