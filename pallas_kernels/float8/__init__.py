"""Rows rounded to float8, fused with what makes them. See ``api`` for the contracts."""

from pallas_kernels.float8.api import Float8Rows, ScaledProduct, add_norm_round, round_rows, silu_round
from pallas_kernels.float8.reference import LEAST_AMPLITUDE

__all__ = ["LEAST_AMPLITUDE", "Float8Rows", "ScaledProduct", "add_norm_round", "round_rows", "silu_round"]
