"""Named shapes of the kernels' arguments, shared by benchmark and tests, and random arguments of these shapes.

Pages lie scattered through the pool, as in service. Every argument that is read anew in each layer of a model exists
once a layer, so that a caller who goes through the layers does not find it in the GPU's cache.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import inputs_of_block
from pallas_kernels.lora import LoraSegments
from pallas_kernels.pool import PAGE_SIZE, rounded_for_rows, to_token_rows

MAX_RANK = 256
"""Width of the partial sums in every case, as in an engine that serves any rank."""


class AttentionInputs(NamedTuple):
    """Arguments of ``plan_attention`` and ``paged_attention``; ``qs`` holds one ``[T, H, D]`` a layer."""

    qs: tuple[jax.Array, ...]
    pool: jax.Array
    page_table: jax.Array
    query_start: jax.Array
    context_len: jax.Array


class LoraInputs(NamedTuple):
    """Arguments of ``plan_lora`` and ``lora_delta``; ``xs`` holds one ``[T, d_in]`` a layer."""

    xs: tuple[jax.Array, ...]
    pool: jax.Array
    segments: LoraSegments


class MatmulInputs(NamedTuple):
    """Arguments of ``grouped_matmul``, each once a layer; ``zeros`` holds None where groups have none."""

    xs: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    zeros: tuple[jax.Array | None, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """``sequences`` sequences, each of ``queries`` query tokens that end a context of ``context`` tokens.

    With ``shortest``, contexts are spread evenly from that many tokens to ``context``, in no order.
    """

    sequences: int
    queries: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 8
    dtype: str = "bfloat16"
    float8: bool = False
    shortest: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.queries

    @property
    def contexts(self) -> np.ndarray:
        """``[sequences]`` int32."""
        shortest = self.context if self.shortest is None else self.shortest
        return np.linspace(shortest, self.context, self.sequences).astype(np.int32)

    @property
    def tokens_per_row(self) -> int:
        """As ``plan_attention`` takes it: above 1 where K and V are float8 in a pool of ``dtype``."""
        return jnp.dtype(self.dtype).itemsize if self.float8 else 1

    @property
    def bytes(self) -> int:
        """What one layer must move: K and V of every context, the queries, the output."""
        kv = 2 * int(self.contexts.sum()) * self.kv_heads
        itemsize = jnp.dtype(self.dtype).itemsize
        return (kv // self.tokens_per_row + 2 * self.num_tokens * self.heads) * self.head_dim * itemsize

    @property
    def flops(self) -> int:
        """What one layer must compute: every causal pair of every head has its part in the matmuls with K and V."""
        pairs = self.queries * int(self.contexts.sum()) - self.sequences * self.queries * (self.queries - 1) // 2
        return 4 * pairs * self.heads * self.head_dim

    def scaled(self, divisor: int) -> "AttentionSpec":
        """The same in small: sequences, tokens, heads and layers divided; the heads' group is kept."""
        kv_heads = _divided(self.kv_heads, divisor)
        context = _divided(self.context, divisor, least=min(self.context, 24))
        return dataclasses.replace(
            self,
            sequences=_divided(self.sequences, divisor),
            queries=min(self.queries, context),
            context=context,
            shortest=None if self.shortest is None else min(self.shortest, context),
            heads=kv_heads * (self.heads // self.kv_heads),
            kv_heads=kv_heads,
            layers=_divided(self.layers, divisor, least=2),
        )

    def build(self, seed: int) -> AttentionInputs:
        """Draws arguments; the pool has just the pages needed and the trash page 0."""
        rng = np.random.default_rng(seed)
        page_tokens = PAGE_SIZE * self.tokens_per_row
        pages_each = -(-self.context // page_tokens)
        num_pages = 1 + self.sequences * pages_each
        table = rng.permutation(np.arange(1, num_pages, dtype=np.int32)).reshape(self.sequences, pages_each)
        key_q, key_pool = jax.random.split(jax.random.key(seed))
        shape = (2, num_pages * page_tokens, self.kv_heads * self.head_dim)
        pool = normal(key_pool, self.layers, shape, self.dtype)
        if self.float8:
            pool = _as_float8(pool, self.tokens_per_row)
        return AttentionInputs(
            tuple(normal(key_q, self.layers, (self.num_tokens, self.heads, self.head_dim), self.dtype)),
            pool,
            jnp.asarray(table),
            jnp.arange(self.sequences + 1, dtype=jnp.int32) * self.queries,
            jnp.asarray(rng.permutation(self.contexts)),
        )


@dataclass(frozen=True)
class LoraSpec:
    """A segment for each of ``ranks``; every module of an adapter has its rank.

    Attributes:
      tokens: of each segment.
      widths: ``(d_in, d_out)`` of the modules, which read one input.
      row_width: W of the pool.
      slots: segments with those that are empty, as many as sequences in service.
    """

    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    slots: int
    widths: tuple[tuple[int, int], ...] = ((4096, 4096),) * 3
    row_width: int = 4096
    layers: int = 8
    dtype: str = "bfloat16"

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def bytes(self) -> int:
        """What one layer must move: every adapter's A and B once, the input, the low-rank outputs."""
        weights = sum(self.ranks) * sum(d_in + d_out for d_in, d_out in self.widths)
        activations = self.num_tokens * (self.widths[0][0] + sum(d_out for _, d_out in self.widths))
        return (weights + activations) * jnp.dtype(self.dtype).itemsize

    def scaled(self, divisor: int) -> "LoraSpec":
        """The same in small: adapters, tokens, widths and layers divided; ranks are kept."""
        segments = _divided(len(self.ranks), divisor)
        return dataclasses.replace(
            self,
            ranks=self.ranks[:segments],
            tokens=tuple(_divided(tokens, divisor) for tokens in self.tokens[:segments]),
            slots=_divided(self.slots, divisor),
            widths=tuple((_divided(d_in, divisor), _divided(d_out, divisor)) for d_in, d_out in self.widths),
            row_width=_divided(self.row_width, divisor),
            layers=_divided(self.layers, divisor, least=2),
        )

    def build(self, seed: int) -> LoraInputs:
        """Draws arguments; the pool has just the pages needed and the trash page 0."""
        rng = np.random.default_rng(seed)
        modules = len(self.widths)
        ranks = np.zeros((self.slots, modules), np.int32)
        ranks[: len(self.ranks)] = np.array(self.ranks)[:, None]
        # The chunk list of an adapter: every module's A, then every module's B.
        chunks = np.array([[-(-d // self.row_width) for d in side] for side in zip(*self.widths, strict=True)])
        entries = ranks[:, None] * chunks
        starts = np.cumsum(entries.reshape(self.slots, -1), axis=1).reshape(entries.shape) - entries
        pages_each = -(-entries.sum(axis=(1, 2)) // (2 * PAGE_SIZE))
        num_pages = 1 + int(pages_each.sum())
        token_start = np.full(self.slots + 1, self.num_tokens)
        token_start[: len(self.ranks) + 1] = np.cumsum([0, *self.tokens])
        int32 = partial(jnp.asarray, dtype=jnp.int32)
        segments = LoraSegments(
            token_start=int32(token_start),
            page_start=int32(np.cumsum([0, *pages_each])),
            pages=int32(rng.permutation(np.arange(1, num_pages))),
            rank=int32(ranks),
            start_a=int32(starts[:, 0]),
            start_b=int32(starts[:, 1]),
            scale=jnp.asarray(rng.uniform(1e-3, 4e-3, ranks.shape), jnp.float32),
            active=tuple(range(len(self.widths))),
            max_rank=MAX_RANK,
            total_rank=sum(self.ranks),
        )
        key_x, key_pool = jax.random.split(jax.random.key(seed))
        shape = (2, num_pages * PAGE_SIZE, self.row_width)
        return LoraInputs(
            tuple(normal(key_x, self.layers, (self.num_tokens, self.widths[0][0]), self.dtype)),
            normal(key_pool, self.layers, shape, self.dtype),
            segments,
        )


@dataclass(frozen=True)
class MatmulSpec:
    """Packed weights ``[d_in, d_out]`` of ``bits`` in groups of ``group`` inputs, for ``rows`` tokens."""

    rows: int
    d_in: int
    d_out: int
    group: int = 128
    has_zeros: bool = False
    bits: int = 4
    layers: int = 32
    dtype: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """What one layer must move: weights with their scales and zeros once, the input, the output."""
        groups = self.d_in // self.group * self.d_out * (4 + self.has_zeros)
        activations = self.rows * (self.d_in + self.d_out) * jnp.dtype(self.dtype).itemsize
        return self.d_in * self.d_out * self.bits // 8 + groups + activations

    @property
    def flops(self) -> int:
        """What one layer must compute."""
        return 2 * self.rows * self.d_in * self.d_out

    def scaled(self, divisor: int) -> "MatmulSpec":
        """The same in small: rows, widths and layers divided; groups are kept."""
        return dataclasses.replace(
            self,
            rows=_divided(self.rows, divisor),
            d_in=self.group * _divided(self.d_in // self.group, divisor),
            d_out=_divided(self.d_out, divisor),
            layers=_divided(self.layers, divisor, least=2),
        )

    def build(self, seed: int) -> MatmulInputs:
        """Draws arguments, whose products are of the size of one."""
        keys = jax.random.split(jax.random.key(seed), 4)
        groups = (self.layers, self.d_in // self.group, self.d_out)
        words = (self.layers, self.d_in // inputs_of_block(self.bits), self.d_out, 8)
        scales = jax.random.uniform(keys[2], groups, jnp.float32, 0.5, 1.5) / (
            5 * 2 ** (self.bits - 4) * self.d_in**0.5
        )
        zeros = jax.random.randint(keys[3], groups, -8, 8, jnp.int8)
        return MatmulInputs(
            tuple(normal(keys[0], self.layers, (self.rows, self.d_in), self.dtype)),
            tuple(jax.lax.bitcast_convert_type(jax.random.bits(keys[1], words), jnp.int32)),
            tuple(scales),
            tuple(zeros) if self.has_zeros else (None,) * self.layers,
        )


def normal(key: jax.Array, layers: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Standard normal ``[layers, *shape]``, drawn layer by layer: the generator needs several times its output."""

    @jax.jit
    def draw(key):
        return jax.lax.map(partial(jax.random.normal, shape=shape, dtype=dtype), jax.random.split(key, layers))

    return draw(key)


@partial(jax.jit, static_argnums=1)
def _as_float8(values: jax.Array, tokens_per_row: int) -> jax.Array:
    """A pool ``[layers, 2, rows, W]`` whose token rows hold values ``[layers, 2, tokens, W]``."""
    layers, planes, tokens, width = values.shape
    rows = to_token_rows(rounded_for_rows(values, values.dtype, tokens_per_row), values.dtype, tokens_per_row)
    return rows.reshape(layers, planes, tokens // tokens_per_row, width)


def _divided(size: int, divisor: int, least: int = 1) -> int:
    return max(least, size // divisor)


ATTENTION = {
    "attention-decode-mha-128x512": AttentionSpec(128, 1, 512, heads=32, kv_heads=32),
    "attention-decode-gqa-128x2048": AttentionSpec(128, 1, 2048, heads=32, kv_heads=8),
    "attention-decode-gqa-4x32768": AttentionSpec(4, 1, 32768, heads=32, kv_heads=8),
    # As in service, where most contexts are short.
    "attention-decode-mha-320x700": AttentionSpec(320, 1, 700, heads=32, kv_heads=32, layers=2, shortest=20),
    "attention-decode-gqa-480x900": AttentionSpec(480, 1, 900, heads=32, kv_heads=8, layers=4, shortest=20),
    "attention-prefill-gqa-8192": AttentionSpec(1, 8192, 8192, heads=32, kv_heads=8),
    "attention-prefill-mha-8192": AttentionSpec(1, 8192, 8192, heads=32, kv_heads=32),
}
# With half of the bytes to read there are more layers, so that all of them never fit a cache.
ATTENTION |= {
    f"{name}-float8": dataclasses.replace(ATTENTION[name], float8=True, layers=2 * ATTENTION[name].layers)
    for name in (
        "attention-decode-mha-128x512",
        "attention-decode-gqa-128x2048",
        "attention-decode-gqa-4x32768",
        "attention-decode-mha-320x700",
        "attention-decode-gqa-480x900",
        "attention-prefill-gqa-8192",
    )
}

_TOKENS_IN_SERVICE = (3, 1, 4, 2, 2, 6, 3, 1, 2, 3, 5, 2, 4, 1) * 7

# 128 sequences of one token: 100 adapters drawn by a power law are 76 in a step.
_SHARED = (18, 9, 6, 5, 4, 4, 3, 3, *(2,) * 8, *(1,) * 60)
_SHARED_RANKS = (64, 32, 16, 8) * 19

# q, k and v of Llama-2-7B. With less to read there are more layers, so that all of them never fit a cache.
LORA = {
    "lora-decode-r64": LoraSpec((64,) * 128, (1,) * 128, 128),
    "lora-decode-mixed": LoraSpec((64, 32, 16, 8) * 32, (1,) * 128, 128, layers=16),
    "lora-decode-r16": LoraSpec((16,) * 128, (1,) * 128, 128, layers=32),
    "lora-decode-r8": LoraSpec((8,) * 128, (1,) * 128, 128, layers=32),
    "lora-decode-r64-one": LoraSpec((64,), (128,), 128, layers=32),
    "lora-decode-shared": LoraSpec(_SHARED_RANKS, _SHARED, 128, layers=16),
    # On one of two devices, which also shares out A by ranks.
    "lora-decode-shared-half": LoraSpec(
        tuple(rank // 2 for rank in _SHARED_RANKS), _SHARED, 128, ((4096, 2048),) * 3, 2048, layers=48
    ),
    "lora-decode-shared-half-o": LoraSpec(_SHARED_RANKS, _SHARED, 128, ((2048, 2048),), 2048, layers=96),
    # Llama-3.1-8B, all of its modules.
    "lora-decode-8b-qkv": LoraSpec((16,) * 76, _SHARED, 128, ((4096, 4096), *((4096, 1024),) * 2), 1024, layers=48),
    "lora-decode-8b-gate-up": LoraSpec((16,) * 76, _SHARED, 128, ((4096, 14336),) * 2, 1024, layers=32),
    "lora-decode-8b-down": LoraSpec((16,) * 76, _SHARED, 128, ((14336, 4096),), 1024, layers=48),
    "lora-prefill-r64": LoraSpec((64,) * 16, (512,) * 16, 16),
    "lora-prefill-r16": LoraSpec((16,) * 16, (512,) * 16, 16),
    # A step in service: 270 sequences that share 100 adapters, and two prompts.
    "lora-served-mixed": LoraSpec((64, 32, 16, 8) * 25, (141, 143, *_TOKENS_IN_SERVICE), 512, layers=16),
}

# The products of Llama-2-7B and Llama-3.1-8B.
_PRODUCTS = {
    "7b-qkv": (4096, 12288),
    "7b-o": (4096, 4096),
    "7b-gate-up": (4096, 22016),
    "7b-down": (11008, 4096),
    "8b-qkv": (4096, 6144),
    "8b-gate-up": (4096, 28672),
    "8b-down": (14336, 4096),
}
MATMUL = {
    f"matmul-{name}-{rows}": MatmulSpec(rows, *widths)
    for name, widths in _PRODUCTS.items()
    for rows in (1, 16, 32, 64, 128, 512)
}
# As AWQ and GPTQ store them, in the smallest usual groups, and in eight bits by channel.
MATMUL |= {
    "matmul-8b-down-zeros-1": MatmulSpec(1, 14336, 4096, has_zeros=True),
    "matmul-8b-down-zeros-128": MatmulSpec(128, 14336, 4096, has_zeros=True),
    "matmul-8b-down-groups-of-32-1": MatmulSpec(1, 14336, 4096, group=32),
    "matmul-8b-down-groups-of-32-128": MatmulSpec(128, 14336, 4096, group=32),
    "matmul-8b-down-int8-1": MatmulSpec(1, 14336, 4096, group=14336, bits=8),
    "matmul-8b-down-int8-128": MatmulSpec(128, 14336, 4096, group=14336, bits=8),
}
