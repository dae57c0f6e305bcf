"""Rows rounded to float8, fused with what makes them. See ``api`` for the contracts."""

from pallas_kernels.float8.api import Float8Rows, ScaledProduct, add_norm_round, round_rows, silu_round

__all__ = ["Float8Rows", "ScaledProduct", "add_norm_round", "round_rows", "silu_round"]
