"""Collectives over peers' memory, without GPUs: compiled for them, and run by a process for each device."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import Collectives, all_gather, all_reduce, all_reduce_norm
from pallas_kernels.collectives import triton
from tests.helpers.triton_on_cpu import compiled

ROOT = Path(__file__).parents[2]


def group_of(size: int, slot_bytes: int = 2**22) -> Collectives:
    return Collectives(jnp.zeros((1, 2 * (size + 1)), jnp.int32), "tp", size, slot_bytes)


@pytest.mark.parametrize(
    ("size", "seed"),
    # Half a minute each.
    [(3, 0), *(pytest.param(n, seed, marks=pytest.mark.slow) for n, seed in ((2, 0), (2, 1), (4, 0), (4, 1)))],
)
def test_devices_that_come_at_any_time_agree_with_numpy(size, seed):
    """Two dozen calls of all kinds and sizes one after the other, each device late now and then."""
    command = [sys.executable, "-m", "tests.helpers.peer_processes", str(size), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_compile_for_a_gpu(capability, dtype):
    with compiled(triton, capability) as kernels:
        for size in (2, 4):
            all_reduce(jnp.zeros((128, 4096), dtype), group_of(size))
            all_gather(jnp.zeros((128, 4, 16), dtype), 3, group_of(size))
            all_reduce_norm(*jnp.zeros((2, 128, 5120), dtype), jnp.zeros(5120, dtype), 1e-5, group_of(size))
    one, gather, two = "_all_reduce{}_kernel", "_all_gather_kernel", "_all_reduce{}_in_two_kernel"
    assert [name for name, _ in kernels] == [
        name for each in (one, two) for name in (each.format(""), gather, each.format("_norm"))
    ]


def test_a_long_message_goes_in_pieces_that_fit(monkeypatch):
    sent = []
    monkeypatch.setattr(triton, "all_reduce", lambda piece, group: sent.append(piece.shape) or piece)
    x = jnp.arange(100.0 * 8).reshape(100, 8)
    assert (all_reduce(x, group_of(2, 40 * 8 * 4)) == x).all()
    assert sent == [(40, 8), (40, 8), (20, 8)]
    sent.clear()
    monkeypatch.setattr(triton, "all_reduce_norm", lambda *piece: sent.append(piece[0].shape) or (piece[0], piece[1]))
    term, x = all_reduce_norm(x, x + 1, jnp.ones(8), 1e-5, group_of(2, 40 * 8 * 4))
    assert sent == [(40, 8), (40, 8), (20, 8)] and (x - term == 1).all() and x.shape == (100, 8)
    with pytest.raises(ValueError, match="a row of 32 bytes cannot be sent: a message holds 16"):
        all_reduce(x, group_of(2, 16))
