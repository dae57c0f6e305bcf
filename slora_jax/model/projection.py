"""Linear maps as the model applies them: in its own dtype, or quantised in one of the layouts of ``quantization``."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Backend, dot, grouped_matmul, inputs_of_block, pack_integers
from slora_jax.model.config import ModelConfig
from slora_jax.model.quantization import ChannelFp8, GroupedWeights, WeightLayout

_FP8 = jnp.float8_e4m3fn
_LARGEST_FP8 = float(jnp.finfo(_FP8).max)
_LEAST_AMPLITUDE = 1e-30
"""Far below any activation or weight, and far above where 1 / 448 of it would be flushed to zero."""


def group_unit(projection: str, local: ModelConfig) -> int:
    """``Projection.unit`` of one of ``mesh.PROJECTIONS``; ``local`` is what one device computes.

    Devices share out the inputs of o by heads, those of down evenly, and those of the others not at all.
    """
    return {"o": local.head_dim, "down": local.intermediate_size}.get(projection, 0)


class Projection(nn.Module):
    """A linear map without bias from ``[T, in]`` to ``[T, features]``.

    Attributes:
      features: width of the output.
      dtype: of the output and, without a layout, of the one parameter, ``kernel`` ``[in, features]``.
      layout: how the weights are quantised, and what the parameters then are.
      unit: a number of inputs that groups must divide, so that devices can share out multiples of it.
      backend: which kernel multiplies by values that are packed.
    """

    features: int
    dtype: jnp.dtype
    layout: WeightLayout | None = None
    unit: int = 0
    backend: Backend = "reference"

    @nn.compact
    def __call__(self, x, out_dtype=None):
        d_in, ones, zeros = x.shape[-1], nn.initializers.ones, nn.initializers.zeros
        match self.layout:
            case None:
                kernel = self.param("kernel", nn.initializers.lecun_normal(), (d_in, self.features), self.dtype)
                return dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), out_dtype or self.dtype)
            case ChannelFp8():
                weight = self.param("weight", zeros, (self.features, d_in), _FP8)
                scale = self.param("channel_scale", ones, (self.features,), jnp.float32)
                return fp8_product(x, weight, scale, self.dtype)
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


def fp8_product(x: jax.Array, weight: jax.Array, channel_scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x`` ``[T, in]`` times an fp8 weight ``[out, in]``, in ``dtype``; the values of each token are rounded to fp8.

    Both operands have the summed axis last, as Hopper's fp8 instructions want them: any other order would cost a
    transposed copy of the weights in each step. The scales factor out of the sum, and are applied behind it.
    """
    values, token_scale = quantize_rows(x)
    y = jax.lax.dot_general(values, weight, (((1,), (1,)), ((), ())), preferred_element_type=_summed_as(dtype))
    return (y.astype(jnp.float32) * token_scale[:, None] * channel_scale).astype(dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[n, m]`` as float8_e4m3fn ``[n, m]`` and the scale of each row ``[n]`` float32, by which to multiply."""
    x = x.astype(jnp.float32)
    amplitude = jnp.max(jnp.abs(x), axis=1)
    scale = jnp.maximum(amplitude, _LEAST_AMPLITUDE) / _LARGEST_FP8
    # No clipping: a quotient that rounding has put above 448 is rounded back to it.
    return (x / scale[:, None]).astype(_FP8), scale


def quantize_map(kernel: jax.Array, layout: WeightLayout, unit: int = 0) -> dict[str, jax.Array]:
    """The parameters of a map ``[in, out]`` in a layout, each weight rounded to the nearest; ``unit``: see
    ``Projection``."""
    if isinstance(layout, ChannelFp8):
        weight, scale = quantize_rows(kernel.T)
        return {"weight": weight, "channel_scale": scale}
    dtype = jnp.dtype(layout.values)
    largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    d_in, d_out = kernel.shape
    group = d_in if layout.is_by_channel else layout.device_group(d_in, unit)
    groups = kernel.astype(jnp.float32).reshape(-1, group, d_out)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=1), _LEAST_AMPLITUDE) / largest
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
