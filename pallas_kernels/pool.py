"""What every kernel knows of the unified pool, and the argument checks they share."""

import jax
import jax.numpy as jnp

PAGE_SIZE = 16
"""Rows in a page."""


Layer = int | jax.Array
"""Which layer's planes of the pool: a Python int, or an int32 scalar, so that one traced function serves all layers."""


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
