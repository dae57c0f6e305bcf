"""Device memory that XLA takes while it compiles a program for a GPU.

It tries each matrix product of the program on the device, one after the other, with every kernel that could do it. For
that it makes operands of its own, keeps the first kernel's result, and compares each other kernel's with that. A kernel
that finds no memory is left out, which no error tells, and the program may end up with a slower one.
"""

from slora_jax.model.config import ModelConfig

_LOGIT_BYTES = 4
_BESIDE = 128 * 2**20
"""Around a product's arrays: XLA's guards, 8 MiB before and behind each of them, and what cuBLAS works in."""


def layers_bytes(model: ModelConfig, rows: int, itemsize: int) -> int:
    """What the largest product of the layers takes.

    Args:
      model: the shape of what one device computes.
      rows: tokens of a step, with padding.
      itemsize: of an element of weights and states, in bytes.
    """
    hidden, ffn = model.hidden_size, model.intermediate_size
    products = ((hidden, model.q_size + 2 * model.kv_size), (model.q_size, hidden), (hidden, 2 * ffn), (ffn, hidden))
    return max(_product_bytes(rows, d_in, d_out, itemsize, itemsize) for d_in, d_out in products)


def head_bytes(model: ModelConfig, rows: int, itemsize: int) -> int:
    """What the output projection takes, whose results are float32; the arguments are those of ``layers_bytes``."""
    return _product_bytes(rows, model.hidden_size, model.vocab_size, itemsize, _LOGIT_BYTES)


def _product_bytes(rows: int, d_in: int, d_out: int, itemsize: int, result_itemsize: int) -> int:
    """Of ``[rows, d_in]`` times ``[d_in, d_out]``: both operands, and two results."""
    return itemsize * d_in * (rows + d_out) + 2 * result_itemsize * rows * d_out + _BESIDE
