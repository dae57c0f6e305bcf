"""Mosaic kernels that are lowered once for programs of all sizes: what is handed to XLA, without a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import mosaic_launch
from pallas_kernels.mosaic_launch import mosaic_call
from tests.helpers.mosaic import kernels_in, text_of

COUNT = jax.ShapeDtypeStruct((1,), jnp.int32)


class Traced(list):
    """The shapes that a kernel is traced for; static arguments are hashable, so each of these is a kernel's own."""

    __hash__ = object.__hash__


def launch(x, count, *, traced=None, factor=2.0):
    """Multiplies the first ``count`` rows of ``x``."""

    def multiply(x, count, out):
        if traced is not None:
            traced.append(x.shape)

        def row(i, _):
            out[i] = x[i] * factor

        lax.fori_loop(0, count[0], row, None)

    return plgpu.kernel(multiply, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, count)


def call(x, count, launch=launch, **static):
    return mosaic_call(launch, x, count, any_length=(0,), length=x.shape[0], **static)


def lowered(function, rows, columns=128):
    x = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return jax.jit(function).trace(x, COUNT).lower(lowering_platforms=("cuda",))


def test_programs_of_all_sizes_share_one_kernel():
    traced = Traced()
    lengths = 1, 128, 1000, 1 << 16
    kernels = [kernels_in(lowered(partial(call, traced=traced), rows)) for rows in lengths]
    assert traced == [(1 << 16, 128)], "it is lowered once"
    assert len({kernel.code for (kernel,) in kernels}) == 1
    for rows, (kernel,) in zip(lengths, kernels, strict=True):
        assert f"(tensor<{rows}x128xf32>, tensor<1xi32>) -> tensor<{rows}x128xf32>" in kernel.call


def test_longer_arrays_have_kernels_of_their_own():
    traced = Traced()
    for rows in (2, (1 << 16) + 1, (1 << 17) - 1, 1 << 17):
        lowered(partial(call, traced=traced), rows)
    assert traced == [(1 << 16, 128), (1 << 17, 128)]


def test_what_else_a_kernel_is_lowered_for():
    traced = Traced()
    for columns, factor in ((128, 2.0), (256, 2.0), (128, 3.0), (128, 2.0)):
        lowered(partial(call, traced=traced, factor=factor), 5, columns)
    assert traced == [(1 << 16, 128), (1 << 16, 256), (1 << 16, 128)]


def test_it_is_the_call_that_jax_makes():
    (ours,), (theirs,) = (kernels_in(lowered(function, 1 << 16)) for function in (call, launch))
    assert ours.call == theirs.call
    assert text_of(ours) == text_of(theirs)


@pytest.mark.parametrize("check_vma", [False, True])
def test_devices_of_a_mesh_run_it_on_what_they_have(check_vma):
    traced = Traced()
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    of_rows, of_all = PartitionSpec("tp"), PartitionSpec()
    call_of_one = jax.jit(partial(call, traced=traced))
    on_all = jax.shard_map(call_of_one, mesh=mesh, in_specs=(of_rows, of_all), out_specs=of_rows, check_vma=check_vma)
    (sharded,), (alone,) = (kernels_in(lowered(function, 64)) for function in (on_all, call_of_one))
    assert sharded == alone
    assert len(traced) == 1


def launch_of_more(x, count):
    return launch(x + 1, count)


def launch_and_more(x, count):
    return launch(x, count) + 1


def launch_in_another_order(count, x):
    return launch(x, count)


def launch_of_some(x, count, unused):
    return launch(x, count)


def launch_nothing(x, count):
    return x


@pytest.mark.parametrize(
    ("launch", "operands"),
    [
        (launch_of_more, "xn"),
        (launch_and_more, "xn"),
        (launch_in_another_order, "nx"),
        (launch_of_some, "xnn"),
        (launch_nothing, "xn"),
    ],
)
def test_it_launches_one_kernel_and_does_nothing_else(launch, operands):
    def run(x, count):
        arrays = [{"x": x, "n": count}[name] for name in operands]
        return mosaic_call(launch, *arrays, any_length=(), length=x.shape[0])

    with pytest.raises(RuntimeError, match=rf"{launch.__name__} must lower to a custom call .*; got \["):
        lowered(run, 64)


def test_attributes_that_it_does_not_know():
    with mosaic_launch.mlir.make_ir_context(), pytest.raises(RuntimeError, match="byte strings and booleans, got 3"):
        mosaic_launch._value(mosaic_launch.mlir.ir_attribute(np.int32(3)))
