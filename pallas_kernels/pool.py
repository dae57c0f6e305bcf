"""What every kernel knows of the unified pool, and the argument checks they share."""

import jax
import jax.numpy as jnp

PAGE_SIZE = 16
"""Rows in a page."""


def check_pool(pool: jax.Array, layer: int | jax.Array, width: int | None = None) -> None:
    """Raises ValueError unless ``pool`` is ``[layers, 2, pages * PAGE_SIZE, W]`` and has this layer.

    A layer that is an array, as when one traced function serves all layers, must be an int32 scalar; its value is the
    caller's to keep in range.
    """
    if pool.ndim != 4 or pool.shape[1] != 2 or pool.shape[2] % PAGE_SIZE or width not in (None, pool.shape[3]):
        raise ValueError(f"pool must be [layers, 2, pages * {PAGE_SIZE}, {width or 'W'}], got {pool.shape}")
    if isinstance(layer, jax.Array):
        expect_int32("layer", layer, ())
    elif not 0 <= layer < pool.shape[0]:
        raise ValueError(f"layer must be in [0, {pool.shape[0]}), got {layer}")


def layer_plane(layer: int | jax.Array) -> jax.Array:
    """``[1]`` int32, a kernel's argument: plane ``2 * layer`` of the pool seen as ``[2 * layers, rows, W]``."""
    return jnp.reshape(2 * jnp.asarray(layer, jnp.int32), 1)


def expect_rank(name: str, array: jax.Array, rank: int) -> tuple[int, ...]:
    """Returns the shape; raises ValueError unless it has ``rank`` axes."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")
    return array.shape


def expect_int32(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``array`` is int32 of this shape."""
    if array.shape != shape or array.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32 {shape}, got {array.dtype} {array.shape}")


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
