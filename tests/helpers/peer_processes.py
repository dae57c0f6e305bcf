"""Runs the collectives' Triton kernels in the interpreter, a process for each device, over memory that all share.

A mapping that is made before the processes are has one address in all of them, as GPUs' memory has. Run as a program:
``python -m tests.helpers.peer_processes N SEED`` makes a random sequence of calls with random delays, and exits with
code 1 where a result is not NumPy's.
"""

import mmap
import multiprocessing
import os
import random
import sys
import time

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

from pallas_kernels.collectives import triton_kernels
from tests.helpers.triton_on_cpu import tensor_of

PROGRAMS, HEAD, SLOT, BLOCK = 4, 4096, 4096, 64
KERNELS = ("all_reduce", "all_reduce_in_two", "all_gather", "all_reduce_norm", "all_reduce_norm_in_two")
CALLS, EPSILON = 24, 1e-3


def draw_calls(count: int, seed: int) -> list[tuple[str, int, int]]:
    """Name of a kernel, elements of a message, and columns of it (1 where it has none)."""
    rng = random.Random(seed)
    calls = []
    for _ in range(CALLS):
        name = rng.choice(
            ("all_reduce", "all_reduce_in_two", "all_gather", "all_reduce_norm", "all_reduce_norm_in_two")
        )
        columns = 1 if name.startswith("all_reduce") and "norm" not in name else rng.choice((1, 3, 20))
        unit = count * columns if name.endswith("in_two") else columns
        calls.append((name, unit * rng.randrange(1, SLOT // 4 // unit), columns))
    return calls


def messages(count: int, seed: int, call: int, size: int) -> np.ndarray:
    """Of all devices, ``[N, size]``: small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng((seed, call)).integers(-8, 9, (count, size)).astype(np.float32)


def expected(name: str, sent: np.ndarray, columns: int, x: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
    """What a kernel writes; x and scale are of those with a norm."""
    if name == "all_gather":
        return [np.stack([message.reshape(-1, columns) for message in sent], axis=1).ravel()]
    total = sent.sum(axis=0)
    if "norm" not in name:
        return [total]
    rows = (x + total).reshape(-1, columns).astype(np.float64)
    norms = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + EPSILON) * scale
    return [x + total, norms.ravel()]


def run_device(rank: int, count: int, seed: int, addresses: list[int]) -> None:
    """One device's part in all calls; raises where a result is wrong."""
    table = np.array([*addresses, rank], np.int64).view(np.int32)
    delays = random.Random(seed * 100 + rank)
    for call, (name, size, columns) in enumerate(draw_calls(count, seed)):
        sent = messages(count, seed, call, size)
        x, scale = messages(1, seed + 1, call, size)[0], messages(1, seed + 2, call, columns)[0]
        wanted = expected(name, sent, columns, x, scale)
        outs = [np.full(array.shape, np.nan, np.float32) for array in wanted]
        part = size // count if name.endswith("in_two") else size
        block, constants, arrays = BLOCK, {}, ()
        if "norm" in name:
            part //= columns
            block, arrays = triton.next_power_of_2(columns), (x.copy(), scale.copy())
            constants = {"COLUMNS": columns, "EPSILON": EPSILON}
            share = triton.cdiv(part, PROGRAMS)
        else:
            share = triton.cdiv(triton.cdiv(part, BLOCK), PROGRAMS) * BLOCK
        scalars = (columns,) if name == "all_gather" else ()
        time.sleep(delays.choice((0, 0, 0.02)))
        getattr(triton_kernels, f"_{name}_kernel")[(PROGRAMS,)](
            tensor_of(sent[rank].copy()),
            *map(tensor_of, arrays),
            tensor_of(table),
            part,
            share,
            *scalars,
            *map(tensor_of, outs),
            N=count,
            PROGRAMS=PROGRAMS,
            HEAD=HEAD,
            SLOT=SLOT,
            BLOCK=block,
            DTYPE=tl.float32,
            **constants,
        )
        for out, array in zip(outs, wanted, strict=True):
            # Sums are exact.
            rtol = 1e-5 if out is outs[-1] and "norm" in name else 0
            np.testing.assert_allclose(out, array, rtol=rtol, err_msg=f"call {call}: {name} of {size}")


def main(count: int, seed: int) -> int:
    nbytes = HEAD + 2 * count * SLOT
    memory = mmap.mmap(-1, count * nbytes)
    whole = np.frombuffer(memory, np.uint8)
    # Counts that pass the largest int32 on the way.
    heads = whole.reshape(count, nbytes)[:, :HEAD].view(np.int32)
    heads[:, : (count + 1) * PROGRAMS] = 2**31 - CALLS
    addresses = [whole.ctypes.data + i * nbytes for i in range(count)]
    context = multiprocessing.get_context("fork")
    devices = [context.Process(target=run_device, args=(i, count, seed, addresses)) for i in range(count)]
    for device in devices:
        device.start()
    for device in devices:
        device.join(120)
    codes = [device.exitcode for device in devices]
    for device in devices:
        device.kill()
    return 0 if codes == [0] * count else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
