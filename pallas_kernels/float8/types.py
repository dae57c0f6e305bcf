"""What functions of this package take and return."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Float8Rows(NamedTuple):
    """A matrix whose rows are rounded to float8 with a scale each: ``values * scale[:, None]``.

    Attributes:
      values: ``[T, n]`` float8_e4m3fn.
      scale: ``[T]`` float32.
    """

    values: jax.Array
    scale: jax.Array


class ScaledProduct(NamedTuple):
    """A matrix ``sums * row_scale[:, None] * column_scale + update``, whose scales nobody has applied yet.

    A product of two matrices in float8 comes so: the scales of its operands factor out of its sums. Whoever reads it
    next applies them in the same pass.

    Attributes:
      sums: ``[T, n]``, floating.
      row_scale: ``[T]`` float32.
      column_scale: ``[n]`` float32.
      update: ``[T, n]``, floating, such as what adapters add; None for zeros.
    """

    sums: jax.Array
    row_scale: jax.Array
    column_scale: jax.Array
    update: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(T, n)``."""
        return self.sums.shape

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError, which calls this ``name``, if it is not a matrix of this shape."""
        expected = {"sums": shape, "row_scale": shape[:1], "column_scale": shape[1:], "update": shape}
        for field, array in self._asdict().items():
            if array is not None and array.shape != expected[field]:
                raise ValueError(f"{name}.{field} must be {expected[field]}, got {array.shape}")

    def value(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix ``[T, n]`` in ``dtype``, computed in float32."""
        return self.in_float32().astype(dtype)

    def added_to(self, x: jax.Array) -> jax.Array:
        """``x`` ``[T, n]`` with the matrix, added in float32 and rounded once to x's dtype."""
        return (x.astype(jnp.float32) + self.in_float32()).astype(x.dtype)

    def in_float32(self) -> jax.Array:
        """The same in float32."""
        value = self.sums.astype(jnp.float32) * self.row_scale[:, None] * self.column_scale
        return value if self.update is None else value + self.update.astype(jnp.float32)


def operands_of(matrix: jax.Array | ScaledProduct | None) -> tuple[jax.Array | None, ...]:
    """A matrix as a Triton kernel's operands ``sums``, ``row_scale``, ``column_scale`` and ``update``."""
    return matrix if isinstance(matrix, ScaledProduct) else (matrix, None, None, None)
