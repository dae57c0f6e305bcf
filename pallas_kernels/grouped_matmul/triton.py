"""Products with packed weights for NVIDIA GPUs, from Ampere on, in Triton: launches. ``api`` has the contract.

The kernel computes the product transposed, so that a weight is in registers from the moment that it is unpacked until
the matrix unit takes it, and outputs fill the side of that unit that is 64 wide however few the rows. Where outputs
and rows alone do not fill the GPU, programs share out the inputs too, and XLA adds their sums up, in order, as it does
whatever follows.
"""

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import launch
from pallas_kernels.grouped_matmul.packing import inputs_of_block
from pallas_kernels.grouped_matmul.triton_kernels import _grouped_matmul_kernel
from pallas_kernels.tuning import block_sizes, device_kind

LEAST_GROUP = 16
"""Inputs that the matrix unit takes at a time: a group's number is a multiple of it."""
_KEYS = ((16, "16"), (32, "32"), (64, "64"), (128, "128"))
"""Most rows, and the block sizes for up to so many."""


def most_rows() -> int:
    """Rows up to which the kernel is to be used on this GPU."""
    return block_sizes("grouped_matmul_rows", device_kind(), "any")["most_rows"]


def key_of(num_rows: int, dtype: jnp.dtype) -> str:
    """Of the block sizes for a product."""
    if dtype == jnp.float32:
        return "float32"
    return next((key for most, key in _KEYS if num_rows <= most), "more")


def grouped_matmul(x, packed, scale, zero, dtype, bits: int):
    (num_rows, d_in), (num_groups, d_out) = x.shape, scale.shape
    sizes = block_sizes("grouped_matmul", device_kind(), key_of(num_rows, x.dtype))
    group = d_in // num_groups
    inputs = inputs_of_block(bits)
    blocks = sizes["blocks"] if num_groups == 1 or group % (sizes["blocks"] * inputs) == 0 else 1
    tiles = triton.cdiv(d_in, blocks * inputs)
    grid = triton.cdiv(num_rows, sizes["tokens"]), triton.cdiv(d_out, sizes["outputs"])
    splits = _splits(num_rows, d_out, blocks, tiles, grid[0] * grid[1], sizes)
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    sums = launch.triton_call(
        *(x, packed, scale, zero),
        num_rows,
        kernel=_grouped_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((splits, num_rows, d_out), dtype if splits == 1 else jnp.float32),
        grid=(*grid, splits),
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        D_IN=d_in,
        D_OUT=d_out,
        GROUP=group,
        TOKENS=sizes["tokens"],
        OUTPUTS=sizes["outputs"],
        BITS=bits,
        BLOCKS=blocks,
        TILES=tiles,
        EACH=each,
    )
    # Sums of slices, not a reduction: whatever follows then has room for them in its own kernel.
    total = sums[0]
    for split in range(1, splits):
        total = total + sums[split]
    return total.astype(dtype)


_READING_ROWS = 48
"""So many rows multiply by a weight in the time that a Hopper GPU takes to read it."""


def _splits(num_rows: int, d_out: int, blocks: int, tiles: int, programs: int, sizes: dict[str, int]) -> int:
    """Among how many programs the inputs are best shared out, where ``programs`` share out rows and outputs.

    Counts bytes, or what could be read in the time of a product: those of all programs that run at once, of which the
    last of them may leave some idle, and those of the sums that are written and read once more.
    """
    tile = sizes["programs"] * sizes["outputs"] * blocks * 32 * max(1.0, sizes["tokens"] / _READING_ROWS)

    def cost(splits: int) -> float:
        waves = triton.cdiv(programs * splits, sizes["programs"])
        return waves * triton.cdiv(tiles, splits) * tile + (8 * splits * num_rows * d_out if splits > 1 else 0)

    return min(range(1, min(sizes["max_splits"], tiles) + 1), key=cost)
