"""How devices hold the linear maps of a quantised base model. No JAX.

Only the seven projections of each layer are quantised. Embedding, norms and output projection stay in the model's
dtype, and so do adapters, which are applied to activations that nothing has rounded.
"""

import math
from dataclasses import dataclass
from typing import Literal

_SCALE_BYTES = 4
_PACKED_INPUTS = {"int4": 64, "int8": 32}
_LEAST_PACKED_GROUP = 16
"""Of values in words, as ``pallas_kernels.grouped_matmul`` takes them."""


@dataclass(frozen=True, slots=True)
class ChannelFp8:
    """W8A8: weights in float8_e4m3fn with a scale for each output channel, times activations in float8_e4m3fn with a
    scale for each token, which is found anew in each step.

    Parameters of a map: ``weight`` ``[out, in]`` float8_e4m3fn and ``channel_scale`` ``[out]`` float32.
    """

    def num_bytes(self, d_in: int, d_out: int, unit: int = 0) -> int:
        """Bytes of one map; ``unit`` means nothing."""
        return d_in * d_out + _SCALE_BYTES * d_out


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    """Weights of few bits, which the product multiplies by their scales; activations stay as they are.

    Parameters of a map: ``kernel`` ``[in, out]`` of dtype ``values``, and, G groups of inputs, ``group_scale``
    ``[G, out]`` float32 and with ``has_zeros`` ``group_zero`` ``[G, out]`` int8. A weight is
    ``(kernel - group_zero) * group_scale``. Where all inputs share a scale and there are no zeros, ``channel_scale``
    ``[out]`` float32 takes the place of both. Where ``is_packed`` says so, ``packed`` ``[blocks, out, 8]`` int32 takes
    the place of ``kernel``: the same values as ``pallas_kernels.pack_integers`` puts them together.

    Attributes:
      values: dtype of the stored values.
      group_size: consecutive inputs that share a scale; None for all of them.
      has_zeros: a group has a zero point beside its scale.
    """

    values: Literal["int4", "int8", "float8_e4m3fn"]
    group_size: int | None = None
    has_zeros: bool = False

    @property
    def is_by_channel(self) -> bool:
        """Whether a scale for each output is all there is."""
        return self.group_size is None and not self.has_zeros

    @property
    def bits(self) -> int:
        """Of a stored value."""
        return 4 if self.values == "int4" else 8

    def device_group(self, *widths: int) -> int:
        """Inputs of a group as devices hold it: the largest part of a group that divides all ``widths``.

        So a group never lies on two devices. Its parts have the scale of the whole, which changes nothing.
        """
        return math.gcd(self.group_size or 0, *widths)

    def is_packed(self, *widths: int) -> bool:
        """Whether devices hold values in words, as the kernel for few bits reads them.

        So they are where integers fill whole blocks of words on every device, in groups that the kernel takes.
        ``widths`` are as in ``device_group``.
        """
        return (
            self.values in _PACKED_INPUTS
            and math.gcd(*widths) % _PACKED_INPUTS[self.values] == 0
            and self.device_group(*widths) % _LEAST_PACKED_GROUP == 0
        )

    def num_bytes(self, d_in: int, d_out: int, unit: int = 0) -> int:
        """Bytes of one map, whose groups divide ``unit`` inputs.

        On a CPU an int4 that is not packed takes a byte, and there are more.
        """
        values = d_in * d_out * self.bits // 8
        if self.is_by_channel:
            return values + _SCALE_BYTES * d_out
        num_groups = d_in // self.device_group(d_in, unit)
        return values + num_groups * d_out * (_SCALE_BYTES + self.has_zeros)


type WeightLayout = ChannelFp8 | GroupedWeights


def least_rows(layout: WeightLayout | None) -> int:
    """The fewest rows that a product with such weights is given on a GPU; None: weights that are not quantised.

    cuBLAS multiplies float8 by sixteen rows. Fewer XLA pads, and cuts what comes out, in kernels of their own: in a
    step of one sequence of Llama-2-7B some nine a layer, of 1.2 µs each (one H200).
    """
    return 16 if isinstance(layout, ChannelFp8) else 2
