"""How weights of 4 or 8 bits lie in memory: in words of 32 bits, in blocks of eight words for each output.

A block is 64 inputs of 4 bits, or 32 of 8. Weights of all outputs follow each other within a block, so that what a
kernel reads for some outputs is one range of addresses. Word i of the eight that an output has in a block holds, in the
bits from ``bits * j + 16 * h`` on, input ``16 * j + 2 * i + h`` of the block, for j below ``16 / bits`` and h in 0 and
1, more by half of its range, so that none is below 0. Shifted by ``bits * j`` and masked, a word is then two
neighbouring inputs in the lower bits of its two halves, as a matrix unit wants a pair of 16-bit numbers, and the words
of a block are 16 consecutive inputs.
"""

import jax
import jax.numpy as jnp

_WORDS = 8


def inputs_of_block(bits: int) -> int:
    """64 for 4 bits, 32 for 8."""
    return _WORDS * 32 // bits


def pack_integers(values: jax.Array, bits: int) -> jax.Array:
    """Signed integers of 4 or 8 bits, ``[in, out]`` of any integer dtype, as words ``[blocks, out, 8]`` int32.

    Raises:
      ValueError: the inputs are no whole number of blocks.
    """
    d_in, d_out = values.shape
    block = inputs_of_block(bits)
    if d_in % block:
        raise ValueError(f"values of {bits} bits must have a multiple of {block} inputs, got {values.shape}")
    planes = 16 // bits
    stored = (values.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint32).reshape(-1, planes, _WORDS, 2, d_out)
    words = jnp.zeros((d_in // block, _WORDS, d_out), jnp.uint32)
    for j in range(planes):
        for h in range(2):
            words |= stored[:, j, :, h] << (bits * j + 16 * h)
    return jax.lax.bitcast_convert_type(words.transpose(0, 2, 1), jnp.int32)


def unpack_integers(packed: jax.Array, bits: int) -> jax.Array:
    """The integers ``[in, out]`` int8 of words from ``pack_integers``."""
    blocks, d_out, _ = packed.shape
    words = jax.lax.bitcast_convert_type(packed, jnp.uint32).transpose(0, 2, 1)
    # [blocks, j, i, h, out]
    stored = jnp.stack(
        [jnp.stack([words >> (bits * j + 16 * h) for h in range(2)], axis=2) for j in range(16 // bits)], axis=1
    )
    values = (stored & (2**bits - 1)).astype(jnp.int32) - 2 ** (bits - 1)
    return values.astype(jnp.int8).reshape(blocks * inputs_of_block(bits), d_out)
