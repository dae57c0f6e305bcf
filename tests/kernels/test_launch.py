"""Triton kernels as parts of XLA's programs: what is handed to XLA, without a GPU."""

import re

import jax
import jax.numpy as jnp
import pytest
import triton
import triton.language as tl

from pallas_kernels import launch
from pallas_kernels.launch import triton_call
from tests.helpers.ttir import kernels_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@triton.jit
def _scale_some_rows(x, factors, count, changed, out, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    at = row * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x + at) * tl.load(factors + row)
    tl.store(out + at, values)
    if row < count:
        tl.store(changed + at, values)


def scaled(x, factors, changed, count: int):
    ref = jax.new_ref(changed)
    out = triton_call(
        x,
        factors,
        count,
        ref,
        kernel=_scale_some_rows,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0],),
        num_warps=2,
        num_stages=1,
        COLUMNS=x.shape[1],
    )
    return out, jax.freeze(ref)


def lowered(count: int, columns: int = 64) -> str:
    x, factors = jnp.ones((8, columns)), jnp.ones(8)
    traced = jax.jit(scaled, static_argnums=3, donate_argnums=2).trace(x, factors, x, count)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_is_a_call_that_xla_compiles_itself():
    text = lowered(count=5)
    assert "custom_call @__gpu$xla.gpu.triton(%arg0, %arg1, %arg2)" in text
    for attribute in ("grid_x = 8 : i32", "grid_y = 1 : i32", "num_warps = 2 : i32", 'name = "_scale_some_rows"'):
        assert attribute in text
    assert "triton_kernel_call" not in text


def test_what_a_kernel_changes_is_changed_in_place():
    # The third operand is the second result: nothing is copied where the caller donates it.
    (alias,) = re.findall(r"output_operand_alias<([^>]*)>", lowered(count=5))
    assert "output_tuple_indices = [1]" in alias and "operand_index = 2" in alias


def test_calls_that_differ_in_integers_share_what_triton_compiles(monkeypatch):
    made, source = [], launch.ASTSource
    monkeypatch.setattr(launch, "ASTSource", lambda *args: made.append(args) or source(*args))
    # No other test has as many columns: nothing is made yet.
    for count in (1, 2, 6):
        lowered(count, columns=32)
    assert len(made) == 1


def test_integers_are_compiled_in_and_only_pointers_are_parameters():
    for count in (1, 5):
        (code,) = kernels_in(lowered(count))
        (parameters,) = re.findall(r"tt\.func public @_scale_some_rows\((.*?)\) attributes", code)
        # Operands, outputs, and what is changed once more, as a result.
        assert parameters.count("!tt.ptr<f32>") == 5 and "i32," not in re.sub(r"\{[^}]*\}", "", parameters)
        assert f"arith.constant {count} : i32" in code
        assert "#loc" not in code
