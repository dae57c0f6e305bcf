"""Collectives for NVIDIA GPUs of one process, in Triton: sizes and launches. See ``api`` for the contract.

A message is *pushed*: every device writes its own into the others' memory, over NVLink, and reads what came from its
own. One way over the link and one meeting is the least that a sum takes. An all-reduce of many bytes among more than
two devices is done in two exchanges, which send 2 / N of the bytes.

XLA's own collectives wait for all devices on the host, or keep memory for each one of each program, and are no part of
a CUDA graph; these are kernels like any other.
"""

import math

import jax
import triton
import triton.language as tl

from pallas_kernels import launch
from pallas_kernels.collectives import triton_kernels
from pallas_kernels.collectives.workspace import HEAD_BYTES, MAIL_HEAD_BYTES, MAX_PROGRAMS, mail_slot_bytes
from pallas_kernels.tuning import block_sizes, device_kind

_DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def all_reduce(x, group):
    """The sum of all devices' x; ``api.all_reduce`` has the arguments' meaning."""
    size = x.size
    least = block_sizes("all_reduce", device_kind(), "two")
    in_two = group.size >= least["least_devices"] and x.nbytes >= least["least_bytes"] and size % group.size == 0
    kernel = triton_kernels._all_reduce_in_two_kernel if in_two else triton_kernels._all_reduce_kernel
    return _launch(kernel, x, group, size // group.size if in_two else size, (), x.shape)


def all_gather(x, axis: int, group):
    """All devices' x along a new axis; ``api.all_gather`` has the arguments' meaning."""
    shape = (*x.shape[:axis], group.size, *x.shape[axis:])
    return _launch(triton_kernels._all_gather_kernel, x, group, x.size, (math.prod(x.shape[axis:]),), shape)


def mail_constants(channel: int, group) -> dict[str, int]:
    """Of a kernel that posts or awaits mail: what the functions of ``triton_kernels`` are told besides ``peers``."""
    programs = block_sizes("collective", device_kind(), "any")["programs"]
    return {"N": group.size, "CHANNEL": channel, "HEAD": HEAD_BYTES, "SLOT": group.slot_bytes, "CALLERS": programs}


def mail_capacity(group) -> int:
    """Bytes of the largest mail that a device can post."""
    return mail_slot_bytes(group.slot_bytes)


def _launch(kernel, x, group, size: int, scalars: tuple[int, ...], out_shape):
    """Runs a kernel whose programs share out ``size`` elements."""
    block = block_sizes("collective", device_kind(), "any")
    programs = block["programs"]
    flags = (group.size + 1) * programs * 4
    assert programs <= MAX_PROGRAMS and flags <= HEAD_BYTES - MAIL_HEAD_BYTES, "there are flags for all"
    elements = block["bytes"] // x.dtype.itemsize
    share = triton.cdiv(triton.cdiv(size, elements), programs) * elements
    return launch.triton_call(
        x,
        group.table.reshape(-1),
        size,
        share,
        *scalars,
        kernel=kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, x.dtype),
        grid=(programs,),
        num_warps=block["num_warps"],
        num_stages=1,
        N=group.size,
        PROGRAMS=programs,
        HEAD=HEAD_BYTES,
        SLOT=group.slot_bytes,
        BLOCK=elements,
        DTYPE=_DTYPES[x.dtype.name],
    )
