"""Linear maps as the model applies them: in its own dtype, or quantised in one of the layouts of ``quantization``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import (
    Backend,
    Float8Rows,
    ScaledProduct,
    dot,
    grouped_matmul,
    inputs_of_block,
    pack_integers,
    round_rows,
)
from pallas_kernels.float8 import LEAST_AMPLITUDE
from slora_jax.model.config import ModelConfig
from slora_jax.model.quantization import ChannelFp8, GroupedWeights, WeightLayout


class Inputs(NamedTuple):
    """A matrix as linear maps and their adapters read it.

    Attributes:
      plain: ``[T, n]`` in the model's dtype, for adapters and for maps that take it so; None where nobody reads it.
      rounded: the same in float8, for maps in float8; None where there are none.
    """

    plain: jax.Array | None
    rounded: Float8Rows | None = None

    @classmethod
    def of(cls, x: jax.Array, rounds: bool, backend: Backend) -> "Inputs":
        """Of ``[T, n]``, which is rounded by the back end's kernel if maps in float8 read it."""
        return cls(x, round_rows(x, backend=backend) if rounds else None)


def group_unit(projection: str, local: ModelConfig) -> int:
    """``Projection.unit`` of one of ``mesh.PROJECTIONS``; ``local`` is what one device computes.

    Devices share out the inputs of o by heads, those of down evenly, and those of the others not at all.
    """
    return {"o": local.head_dim, "down": local.intermediate_size}.get(projection, 0)


class Projection(nn.Module):
    """A linear map without bias from ``[T, in]`` to ``[T, features]``.

    It takes an array, or with the layout ``ChannelFp8`` rows in float8, too. With that layout it returns a
    ``ScaledProduct``, and else an array.

    Attributes:
      features: width of the output.
      dtype: of an array it returns and, without a layout, of the one parameter, ``kernel`` ``[in, features]``.
      layout: how the weights are quantised, and what the parameters then are.
      unit: a number of inputs that groups must divide, so that devices can share out multiples of it.
      backend: which kernels multiply by values that are packed, and round to float8.
    """

    features: int
    dtype: jnp.dtype
    layout: WeightLayout | None = None
    unit: int = 0
    backend: Backend = "reference"

    @nn.compact
    def __call__(self, x, out_dtype=None):
        d_in = (x.values if isinstance(x, Float8Rows) else x).shape[-1]
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        match self.layout:
            case None:
                kernel = self.param("kernel", nn.initializers.lecun_normal(), (d_in, self.features), self.dtype)
                return dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), out_dtype or self.dtype)
            case ChannelFp8():
                weight = self.param("weight", zeros, (self.features, d_in), jnp.float8_e4m3fn)
                scale = self.param("channel_scale", ones, (self.features,), jnp.float32)
                rows = x if isinstance(x, Float8Rows) else round_rows(x, backend=self.backend)
                return fp8_product(rows, weight, scale, self.dtype)
            case GroupedWeights() as layout:
                if layout.is_packed(d_in, self.unit):
                    shape: tuple[int, ...] = (d_in // inputs_of_block(layout.bits), self.features, 8)
                    weights = self.param("packed", zeros, shape, jnp.int32)
                else:
                    weights = self.param("kernel", zeros, (d_in, self.features), jnp.dtype(layout.values))
                zero = None
                if layout.is_by_channel:
                    scale = self.param("channel_scale", ones, (self.features,), jnp.float32)[None]
                else:
                    shape = d_in // layout.device_group(d_in, self.unit), self.features
                    scale = self.param("group_scale", ones, shape, jnp.float32)
                    if layout.has_zeros:
                        zero = self.param("group_zero", zeros, shape, jnp.int8)
                return grouped_matmul(x, weights, scale, zero, dtype=self.dtype, backend=self.backend)


def fp8_product(x: Float8Rows, weight: jax.Array, channel_scale: jax.Array, dtype: jnp.dtype) -> ScaledProduct:
    """Rows ``[T, in]`` times a float8 weight ``[out, in]``, for a model of this dtype.

    Both operands have the summed axis last, as Hopper's fp8 instructions want them: any other order would cost a
    transposed copy of the weights in each step.
    """
    sums = jax.lax.dot_general(x.values, weight, (((1,), (1,)), ((), ())), preferred_element_type=_summed_as(dtype))
    return ScaledProduct(sums, x.scale, channel_scale)


def quantize_map(kernel: jax.Array, layout: WeightLayout, unit: int = 0) -> dict[str, jax.Array]:
    """The parameters of a map ``[in, out]`` in a layout, each weight rounded to the nearest; ``unit``: see
    ``Projection``."""
    if isinstance(layout, ChannelFp8):
        weight, scale = round_rows(kernel.T, backend="reference")
        return {"weight": weight, "channel_scale": scale}
    dtype = jnp.dtype(layout.values)
    largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    d_in, d_out = kernel.shape
    group = d_in if layout.is_by_channel else layout.device_group(d_in, unit)
    groups = kernel.astype(jnp.float32).reshape(-1, group, d_out)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=1), LEAST_AMPLITUDE) / largest
    values = groups / scale[:, None]
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    values = values.reshape(d_in, d_out)
    params = (
        {"packed": pack_integers(values.astype(jnp.int32), layout.bits)}
        if layout.is_packed(d_in, unit)
        else {"kernel": values.astype(dtype)}
    )
    if layout.is_by_channel:
        return params | {"channel_scale": scale[0]}
    zeros = {"group_zero": jnp.zeros_like(scale, jnp.int8)} if layout.has_zeros else {}
    return params | {"group_scale": scale} | zeros


def _summed_as(dtype):
    """What a product whose scales are still to come is handed on as; it is summed in float32 in any case.

    Half the bytes of float32 in a pass over the output that the unquantised product does not need. Not float16, which
    ends at 65,504.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
