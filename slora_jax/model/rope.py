"""Rotary embedding (arXiv 2104.09864): how fast each pair of a head's elements turns, in every variant served here.

Each variant is a frozen value with ``turns``, which takes the base ``theta`` and the head's width D and gives
``[D / 2]`` float32 radians a position, and with ``gain``, by which cosine and sine are multiplied. They are those of
transformers' ``rope_type`` of the same name, for contexts within the model's ``max_position_embeddings``.

No JAX here: a model's configuration holds these.
"""

import math
from dataclasses import dataclass

import numpy as np


def plain_turns(theta: float, head_dim: int) -> np.ndarray:
    """``theta ** (-2 i / D)`` of each pair i; ``[D / 2]`` float32."""
    return np.float32(1.0) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


@dataclass(frozen=True, slots=True)
class LinearRope:
    """All turn slower by ``factor`` (``linear``)."""

    factor: float

    @property
    def gain(self) -> float:
        return 1.0

    def turns(self, theta: float, head_dim: int) -> np.ndarray:
        return plain_turns(theta, head_dim) / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class ProportionalRope:
    """Only the first ``share`` of the pairs turn, slower by ``factor``; the others keep still (``proportional``)."""

    share: float
    factor: float

    @property
    def gain(self) -> float:
        return 1.0

    def turns(self, theta: float, head_dim: int) -> np.ndarray:
        turns = plain_turns(theta, head_dim)
        turns[int(self.share * head_dim // 2) :] = 0.0
        return turns / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1's: long waves are stretched by ``factor``, short ones kept, those between blended (``llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @property
    def gain(self) -> float:
        return 1.0

    def turns(self, theta: float, head_dim: int) -> np.ndarray:
        turns = plain_turns(theta, head_dim)
        wavelengths = np.float32(2.0 * math.pi) / turns
        ratio = np.float32(self.original_max_position_embeddings) / wavelengths
        blend = (ratio - np.float32(self.low_freq_factor)) / np.float32(self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, np.float32(0.0), np.float32(1.0))
        return (np.float32(1.0) - blend) * turns / np.float32(self.factor) + blend * turns


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): pairs that turn often in the original context are kept, those that turn less than once
    are stretched by ``factor``, and those between blended, which ``first`` and ``last`` bound (``yarn``).

    ``first`` and ``last`` are where the blending begins and ends, in pairs; they need not be whole.
    """

    factor: float
    first: float
    last: float
    gain: float

    @classmethod
    def of(
        cls,
        theta: float,
        head_dim: int,
        *,
        factor: float,
        original_max_position_embeddings: int,
        beta_fast: float,
        beta_slow: float,
        truncate: bool,
        gain: float,
    ) -> "YarnRope":
        """The variant whose blending goes from ``beta_fast`` turns in the original context to ``beta_slow``."""

        def pair_with(num_turns: float) -> float:
            length = original_max_position_embeddings / (num_turns * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(theta))

        first, last = pair_with(beta_fast), pair_with(beta_slow)
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        return cls(factor, max(first, 0), min(last, head_dim - 1), gain)

    def turns(self, theta: float, head_dim: int) -> np.ndarray:
        turns = plain_turns(theta, head_dim)
        # transformers keeps the ramp from having no width in the same way.
        width = self.last - self.first if self.last != self.first else 0.001
        pairs = np.arange(head_dim // 2, dtype=np.float32)
        blend = np.clip((pairs - np.float32(self.first)) / np.float32(width), np.float32(0.0), np.float32(1.0))
        return turns / np.float32(self.factor) * blend + turns * (np.float32(1.0) - blend)


@dataclass(frozen=True, slots=True)
class ShortRope:
    """LongRoPE (arXiv 2402.13753) within the original context: each pair is slower by a factor of its own.

    Beyond the original context transformers takes other factors for all positions, those already cached with the first
    ones among them; that is not served.
    """

    factors: tuple[float, ...]
    gain: float

    def turns(self, theta: float, head_dim: int) -> np.ndarray:
        return plain_turns(theta, head_dim) / np.asarray(self.factors, np.float32)


type RopeScaling = LinearRope | ProportionalRope | Llama3Rope | YarnRope | ShortRope
