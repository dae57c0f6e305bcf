"""Programs are compiled once, ahead or when first asked for."""

import jax
import jax.numpy as jnp
from engine_cases import FAST_TO_COMPILE

from slora_jax.engine.programs import Programs


def test_programs_are_compiled_once():
    lowered = []

    def lower(shape):
        lowered.append(shape)
        return jax.jit(lambda x: x + shape).lower(jax.ShapeDtypeStruct((3,), jnp.float32))

    programs = Programs(lower, lambda shape: FAST_TO_COMPILE)
    programs.prepare([1, 2, 2])
    assert set(programs) == {1, 2} and len(programs) == 2
    assert [programs.get(shape)(jnp.zeros(3)).tolist() for shape in (1, 2, 3, 3)] == [[s] * 3 for s in (1, 2, 3, 3)]
    assert lowered == [1, 2, 3]
