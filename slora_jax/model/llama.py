"""Llama (1, 2, 3.x and what shares its architecture) over a ragged batch and the unified pool.

Axis letters of shape comments: T tokens of the step, S sequences, h hidden_size, K KV heads, G query heads a KV head,
D head_dim, f intermediate_size, V vocabulary.

``Llama(config, dtype).apply({"params": params}, batch, pool)`` is a pure function. Layers are unrolled in Python: a
scan over stacked layers copies every layer's weights each step.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from pallas_kernels import (
    AttentionPlan,
    Backend,
    LoraPlan,
    LoraSegments,
    lora_update,
    paged_attention,
    plan_attention,
    plan_lora,
    write_kv,
)
from slora_jax.memory.layout import MODULES, module_shapes
from slora_jax.model.config import ModelConfig, RopeScaling

Q, K, V, O, GATE, UP, DOWN = range(len(MODULES))  # noqa: E741


@partial(struct.dataclass, frozen=True)
class TokenBatch:
    """One step's tokens, flat over its sequences; see ``pallas_kernels.paged_attention`` for padding.

    Attributes:
      token_ids: ``[T]`` int32.
      positions: ``[T]`` int32, position of each token in its sequence.
      rows: ``[T]`` int32, pool row that takes each token's K and V.
      page_table: ``[S, P]`` int32.
      query_start: ``[S + 1]`` int32.
      context_len: ``[S]`` int32.
      lora: the adapters' segments, or None when no token has an adapter.
      decode_only: static; no sequence has more than one token.
    """

    token_ids: jax.Array
    positions: jax.Array
    rows: jax.Array
    page_table: jax.Array
    query_start: jax.Array
    context_len: jax.Array
    lora: LoraSegments | None
    decode_only: bool = struct.field(pytree_node=False)


class StepTables(NamedTuple):
    """What all layers share in one step: KV rows ``[T]``, rotary angles, and the kernels' plans."""

    rows: jax.Array
    rope: tuple[jax.Array, jax.Array]
    attention: AttentionPlan
    lora: LoraPlan | None


class Llama(nn.Module):
    """The decoder. Parameters are in ``dtype``; norms, rope and softmax compute in float32.

    ``backend`` says which kernels it calls.
    """

    config: ModelConfig
    dtype: jnp.dtype
    backend: Backend = "reference"

    def setup(self):
        config = self.config
        self.embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
        )
        self.layers = [Block(config, self.dtype, i, self.backend) for i in range(config.num_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Projection((config.vocab_size,), self.dtype)

    def __call__(self, batch: TokenBatch, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs the layers.

        Args:
          batch: the step's tokens.
          pool: ``[layers, 2, rows, W]``; donate it to have K and V written in place.

        Returns:
          Hidden states ``[T, h]`` after the final norm, and the pool with the tokens' K and V.
        """
        x = self.embed(batch.token_ids)
        step = self._plan(batch, pool.shape[3])
        for layer in self.layers:
            x, pool = layer(x, step, pool)
        return self.norm(x), pool

    def _plan(self, batch: TokenBatch, row_width: int) -> "StepTables":
        num_tokens = batch.token_ids.shape[0]
        lora = None
        if batch.lora is not None:
            widths = [(s.d_in, s.d_out) for s in module_shapes(self.config).values()]
            lora = plan_lora(
                batch.lora, num_tokens=num_tokens, row_width=row_width, widths=widths, backend=self.backend
            )
        attention = plan_attention(
            batch.page_table,
            batch.query_start,
            batch.context_len,
            num_tokens=num_tokens,
            backend=self.backend,
            max_query_len=1 if batch.decode_only else None,
        )
        return StepTables(batch.rows, rotary_angles(batch.positions, self.config), attention, lora)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits ``[..., V]`` of final hidden states ``[..., h]``."""
        if self.config.tie_word_embeddings:
            return _dot(hidden, self.embed.embedding, (((hidden.ndim - 1,), (1,)), ((), ())))
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def init_all(self, batch: TokenBatch, pool: jax.Array) -> jax.Array:
        """Touches every parameter; for ``init`` and ``eval_shape`` only."""
        hidden, _ = self(batch, pool)
        return self.logits(hidden)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each with its low-rank updates."""

    config: ModelConfig
    dtype: jnp.dtype
    layer: int
    backend: Backend

    def setup(self):
        config = self.config
        group = config.num_heads // config.num_kv_heads
        self.attention_norm = RMSNorm(config.rms_norm_eps, self.dtype)
        # One product for q, k and v; by KV head, so that sharding that axis keeps each head's q, k and v together.
        self.qkv = Projection((config.num_kv_heads, group + 2, config.head_dim), self.dtype)
        self.o = Projection((config.hidden_size,), self.dtype)
        self.mlp_norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.gate_up = Projection((2, config.intermediate_size), self.dtype)
        self.down = Projection((config.hidden_size,), self.dtype)

    def __call__(self, x: jax.Array, step: StepTables, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended, pool = self._attention(self.attention_norm(x), step, pool)
        x = x + attended
        return x + self._mlp(self.mlp_norm(x), step, pool), pool

    def _attention(self, x, step: StepTables, pool):
        config = self.config
        tokens = x.shape[0]
        qkv = self.qkv(x)  # [T, K, G + 2, D]
        q = qkv[:, :, :-2].reshape(tokens, config.q_size)
        k = qkv[:, :, -2].reshape(tokens, config.kv_size)
        v = qkv[:, :, -1].reshape(tokens, config.kv_size)
        q, k, v = self._add_lora(x, (q, k, v), step, pool, (Q, K, V))
        # The write below needs k and v only. Without this XLA may not order it behind the reads of q's adapter rows,
        # and copies the whole pool to keep them valid.
        q, k, v, pool = jax.lax.optimization_barrier((q, k, v, pool))
        q = apply_rotary(q.reshape(tokens, config.num_heads, config.head_dim), step.rope)
        k = apply_rotary(k.reshape(tokens, config.num_kv_heads, config.head_dim), step.rope)
        pool = write_kv(pool, self.layer, step.rows, k.reshape(tokens, config.kv_size), v, backend=self.backend)
        scale = 1.0 / math.sqrt(config.head_dim)
        attended = paged_attention(
            q, pool, self.layer, step.attention, num_kv_heads=config.num_kv_heads, scale=scale
        ).reshape(tokens, config.q_size)
        (out,) = self._add_lora(attended, (self.o(attended),), step, pool, (O,))
        return out, pool

    def _mlp(self, x, step: StepTables, pool):
        gate_up = self.gate_up(x)  # [T, 2, f]
        gate, up = self._add_lora(x, (gate_up[:, 0], gate_up[:, 1]), step, pool, (GATE, UP))
        activated = nn.silu(gate) * up
        (out,) = self._add_lora(activated, (self.down(activated),), step, pool, (DOWN,))
        return out

    def _add_lora(self, x, ys, step: StepTables, pool, modules):
        if step.lora is None:
            return ys
        return lora_update(x, ys, pool, self.layer, step.lora, modules)


class Projection(nn.Module):
    """A linear map without bias; ``kernel`` is ``[in, *features]``."""

    features: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, out_dtype=None):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], *self.features), self.dtype)
        # A plain matrix product: XLA's CPU and GPU libraries see [T, in] x [in, out] whatever the features' shape.
        flat = kernel.reshape(x.shape[-1], -1)
        y = _dot(x, flat, (((x.ndim - 1,), (0,)), ((), ())), out_dtype or self.dtype)
        return y.reshape(*x.shape[:-1], *self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


def _dot(x, kernel, dimension_numbers, out_dtype=jnp.float32):
    # Float32 means float32: without this a GPU would round the operands to tf32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, preferred_element_type=out_dtype)


def rotary_angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine ``[T, 1, D / 2]`` float32 of each position's rotary angles (arXiv 2104.09864)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is not None:
        frequency = _llama3_scaled(frequency, config.rope_scaling)
    angle = positions.astype(jnp.float32)[:, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _llama3_scaled(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1's scaling: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    wavelength = 2.0 * math.pi / frequency
    ratio = scaling.original_max_position_embeddings / wavelength
    blend = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1.0 - blend) * frequency / scaling.factor + blend * frequency


def apply_rotary(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates ``[T, heads, D]``; the two halves of D are the pair's parts, as in Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> dict:
    """The parameter tree's shapes and dtypes, without allocating any."""
    model = Llama(config, dtype)
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = TokenBatch(
        int32((1,)), int32((1,)), int32((1,)), int32((1, 1)), int32((2,)), int32((1,)), None, decode_only=True
    )
    pool = jax.ShapeDtypeStruct((config.num_layers, 2, 16, config.kv_size), dtype)
    init = partial(model.init, method=Llama.init_all)
    return jax.eval_shape(init, jax.random.key(0), batch, pool)["params"]
