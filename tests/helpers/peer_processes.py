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
CALLS = 24


def draw_calls(count: int, seed: int) -> list[tuple[str, int, int]]:
    """Name of a kernel, elements of a message, and columns of it (1 where it has none)."""
    rng = random.Random(seed)
    calls = []
    for _ in range(CALLS):
        name = rng.choice(("all_reduce", "all_reduce_in_two", "all_gather"))
        columns = rng.choice((1, 3, 20)) if name == "all_gather" else 1
        unit = count if name == "all_reduce_in_two" else columns
        calls.append((name, unit * rng.randrange(1, SLOT // 4 // unit), columns))
    return calls


def messages(count: int, seed: int, call: int, size: int) -> np.ndarray:
    """Of all devices, ``[N, size]``: small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng((seed, call)).integers(-8, 9, (count, size)).astype(np.float32)


def expected(name: str, sent: np.ndarray, columns: int) -> np.ndarray:
    if name == "all_gather":
        return np.stack([message.reshape(-1, columns) for message in sent], axis=1).ravel()
    return sent.sum(axis=0)


def run_device(rank: int, count: int, seed: int, addresses: list[int]) -> None:
    """One device's part in all calls; raises where a result is wrong."""
    table = np.array([*addresses, rank], np.int64).view(np.int32)
    delays = random.Random(seed * 100 + rank)
    for call, (name, size, columns) in enumerate(draw_calls(count, seed)):
        sent = messages(count, seed, call, size)
        out = np.full(expected(name, sent, columns).shape, np.nan, np.float32)
        part = size // count if name == "all_reduce_in_two" else size
        share = triton.cdiv(triton.cdiv(part, BLOCK), PROGRAMS) * BLOCK
        scalars = (columns,) if name == "all_gather" else ()
        time.sleep(delays.choice((0, 0, 0.02)))
        getattr(triton_kernels, f"_{name}_kernel")[(PROGRAMS,)](
            tensor_of(sent[rank].copy()),
            tensor_of(table),
            part,
            share,
            *scalars,
            tensor_of(out),
            N=count,
            PROGRAMS=PROGRAMS,
            HEAD=HEAD,
            SLOT=SLOT,
            BLOCK=BLOCK,
            DTYPE=tl.float32,
        )
        np.testing.assert_array_equal(out, expected(name, sent, columns), err_msg=f"call {call}: {name} of {size}")


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
