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

from pallas_kernels import launch
from pallas_kernels.collectives import triton_kernels
from pallas_kernels.collectives.workspace import HEAD_BYTES, MAIL_HEAD_BYTES, MAX_PROGRAMS, mail_slot_bytes
from pallas_kernels.launch import TRITON_TYPES
from pallas_kernels.tuning import block_sizes, device_kind


def all_reduce(x, group):
    """The sum of all devices' x; ``api.all_reduce`` has the arguments' meaning."""
    size = x.size
    in_two = _goes_in_two(x, size, group)
    kernel = triton_kernels._all_reduce_in_two_kernel if in_two else triton_kernels._all_reduce_kernel
    return _launch(kernel, x, group, size // group.size if in_two else size, (), x.shape)


def all_reduce_norm(term, x, scale, epsilon: float, group):
    """x with all devices' term added, and its norm; ``api.all_reduce_norm`` has the arguments' meaning."""
    rows, columns = term.shape
    in_two = _goes_in_two(term, rows, group)
    kernel = triton_kernels._all_reduce_norm_in_two_kernel if in_two else triton_kernels._all_reduce_norm_kernel
    part = rows // group.size if in_two else rows
    constants = _constants(term, group)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch.triton_call(
        term,
        x,
        scale,
        group.table.reshape(-1),
        part,
        triton.cdiv(part, constants["PROGRAMS"]),
        kernel=kernel,
        out_type=(out, out),
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        EPSILON=epsilon,
        **constants,
    )


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


def _goes_in_two(x, size: int, group) -> bool:
    """Whether to sum x in two exchanges, in the first of which the devices share out ``size`` things evenly."""
    least = block_sizes("all_reduce", device_kind(), "two")
    return group.size >= least["least_devices"] and x.nbytes >= least["least_bytes"] and size % group.size == 0


def _constants(x, group) -> dict:
    """What all kernels are launched with that send x."""
    block = block_sizes("collective", device_kind(), "any")
    programs = block["programs"]
    flags = (group.size + 1) * programs * 4
    assert programs <= MAX_PROGRAMS and flags <= HEAD_BYTES - MAIL_HEAD_BYTES, "there are flags for all"
    return {
        "grid": (programs,),
        "num_warps": block["num_warps"],
        "num_stages": 1,
        "N": group.size,
        "PROGRAMS": programs,
        "HEAD": HEAD_BYTES,
        "SLOT": group.slot_bytes,
        "DTYPE": TRITON_TYPES[x.dtype.name],
    }


def _launch(kernel, x, group, size: int, scalars: tuple[int, ...], out_shape):
    """Runs a kernel whose programs share out ``size`` elements."""
    constants = _constants(x, group)
    elements = block_sizes("collective", device_kind(), "any")["bytes"] // x.dtype.itemsize
    share = triton.cdiv(triton.cdiv(size, elements), constants["PROGRAMS"]) * elements
    return launch.triton_call(
        x,
        group.table.reshape(-1),
        size,
        share,
        *scalars,
        kernel=kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, x.dtype),
        BLOCK=elements,
        **constants,
    )
