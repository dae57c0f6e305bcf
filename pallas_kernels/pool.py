"""What every kernel knows of the unified pool, and the argument checks they share.

K and V of tokens lie in the pool in its own dtype, one token a row, or in float8_e4m3fn, as many tokens a row as the
pool's elements have bytes. Then a row of a plane holds one token's bytes after the other's::

    bytes of row r     [0, W)              [W, 2 W)                 ...
    hold token row     tokens_per_row * r  tokens_per_row * r + 1   ...

So the same memory is an array of *token rows* of W bytes, a page has ``PAGE_SIZE * tokens_per_row`` of them in order,
no two tokens share a byte, and a KV head of 128 elements is one line of 128 bytes.
"""

import jax
import jax.numpy as jnp

PAGE_SIZE = 16
"""Rows in a page."""


Layer = int | jax.Array
"""Which layer's planes of the pool: a Python int, or an int32 scalar, so that one traced function serves all layers."""

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
"""What K and V are rounded to where several tokens share a row: 4 bits of exponent, 3 of mantissa, no infinities."""
FLOAT8_MAX = 448.0
"""Largest number of ``FLOAT8``; what is larger in magnitude is stored as that."""


def check_tokens_per_row(pool: jax.Array, tokens_per_row: int) -> None:
    """Raises ValueError unless rows of this pool can hold so many tokens, a whole number of elements each."""
    size = pool.dtype.itemsize
    if tokens_per_row not in (1, size) or pool.shape[3] % tokens_per_row:
        raise ValueError(
            f"tokens_per_row must be 1, for K and V in the pool's dtype, or the {size} bytes of an element of "
            f"{pool.dtype}, for float8_e4m3fn, and divide W; got {tokens_per_row} and W {pool.shape[3]}"
        )


def token_rows(pool: jax.Array, tokens_per_row: int) -> jax.Array:
    """The pool as ``[layers, 2, token rows, W / tokens_per_row]``, each row the bytes of one token's K or V."""
    layers, planes, rows, width = pool.shape
    return pool.reshape(layers, planes, rows * tokens_per_row, width // tokens_per_row)


def rounded_for_rows(values: jax.Array, dtype: jnp.dtype, tokens_per_row: int) -> jax.Array:
    """Values in the dtype that token rows of a pool of ``dtype`` hold."""
    if tokens_per_row == 1:
        return values.astype(dtype)
    # A cast alone makes NaN of what is too large.
    return jnp.clip(values, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8)


def to_token_rows(values: jax.Array, dtype: jnp.dtype, tokens_per_row: int) -> jax.Array:
    """Rounded values ``[..., W]`` as elements of a pool of ``dtype``: ``[..., W / tokens_per_row]``."""
    if tokens_per_row == 1:
        return values
    return jax.lax.bitcast_convert_type(values.reshape(*values.shape[:-1], -1, tokens_per_row), dtype)


def from_token_rows(rows: jax.Array, tokens_per_row: int) -> jax.Array:
    """The rounded values ``[..., W]`` that ``to_token_rows`` made rows of."""
    if tokens_per_row == 1:
        return rows
    return jax.lax.bitcast_convert_type(rows, FLOAT8).reshape(*rows.shape[:-1], -1)


def check_pool(pool: jax.Array, layer: Layer, width: int | None = None) -> None:
    """Raises ValueError unless ``pool`` is ``[layers, 2, pages * PAGE_SIZE, W]`` and ``layer`` fits it.

    Of an array only shape and dtype are checked; its value must be in range.
    """
    if pool.ndim != 4 or pool.shape[1] != 2 or pool.shape[2] % PAGE_SIZE or width not in (None, pool.shape[3]):
        raise ValueError(f"pool must be [layers, 2, pages * {PAGE_SIZE}, {width or 'W'}], got {pool.shape}")
    if not isinstance(layer, int):
        expect_int32("layer", layer, ())
    elif not 0 <= layer < pool.shape[0]:
        raise ValueError(f"layer must be in [0, {pool.shape[0]}), got {layer}")


def expect_rank(name: str, array: jax.Array, rank: int) -> tuple[int, ...]:
    """Returns the shape; raises ValueError unless it has ``rank`` axes."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")
    return array.shape


def expect_int32(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``array`` is int32 of this shape."""
    if array.shape != shape or array.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32 {shape}, got {array.dtype} {array.shape}")


def layer_array(layer: Layer) -> jax.Array:
    """``[1]`` int32, as kernels take the layer: from memory, so that one compiled kernel serves all layers."""
    return jnp.asarray(layer, jnp.int32).reshape(1)


def owner(starts: jax.Array, index: jax.Array) -> jax.Array:
    """For each index, the last i with ``starts[i] <= index``, -1 before the first: the interval it falls into.

    Compares with every start: a few vector operations, where a binary search would be a loop.
    """
    return jnp.searchsorted(starts, index, side="right", method="compare_all").astype(jnp.int32) - 1


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """``array[index]`` along the first axis, for indices known to be in bounds and not negative.

    Plain indexing would compile a check and a correction of every index, in every layer.
    """
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
