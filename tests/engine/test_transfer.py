"""What the host makes for a step reaches the program that it was made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.engine.transfer import Transfer


@pytest.mark.parametrize("size", [7, 200_000])
@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_programs_that_wait_for_the_device_find_what_they_were_given(size, where):
    """The host is many programs ahead, and uses its memory again and again."""
    if jax.default_backend() != where:
        pytest.skip(f"JAX runs on {jax.default_backend()}")
    transfer = Transfer(None)

    def step(busy, vector):
        given = transfer.take(vector)
        for _ in range(20):
            busy = busy @ busy
        return busy, transfer.give(given + busy[0, 0].astype(jnp.int32))

    width = 4096 if where == "gpu" else 64
    busy = jnp.eye(width)
    program = jax.jit(step).lower(busy, transfer.struct(size)).compile()
    vectors = [np.full(size, i, np.int32) for i in range(30)]
    results = []
    for vector in vectors:
        argument = transfer.put(vector)
        busy, given = program(busy, argument)
        transfer.keep_until(given)
        results.append(given)
        del argument
    for i, given in enumerate(results):
        assert (transfer.read(given) == i + 1).all()
