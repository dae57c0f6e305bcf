"""Llama (1, 2, 3.x and what shares its architecture) over a ragged batch and the unified pool.

Axis letters of shape comments: T tokens of the step, S sequences, h hidden_size, D head_dim, V vocabulary.

``Llama(config, dtype).apply({"params": params}, batch, pool)`` is a pure function. Layers are unrolled: a scan over
stacked layers copies every layer's weights each step. They are calls of one jitted function, so that all are traced
and lowered once; XLA inlines the calls. The same in three pieces, to be compiled apart: ``Llama.begin``,
``run_layers`` for some layers at a time, ``Llama.end``.

With ``num_shards`` N, ``apply`` is what one of N devices runs, inside ``jax.shard_map`` over the axis ``mesh.TP``, on
its slices of parameters and pool (``mesh.param_spec``). Collectives of a layer, T tokens, ranks padded to R: one
all-reduce ``[T, h]`` each after o and down, together with the norm behind it; for LoRA (S-LoRA, section 6) an
all-gather ``[T, R]`` for each of q, k, v, gate, up and an all-reduce ``[T, R]`` for each of o, down, which go on while
the base model's product is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from pallas_kernels import (
    AttentionPlan,
    Backend,
    Collectives,
    LoraPlan,
    LoraSegments,
    ScaledProduct,
    add_norm_round,
    all_gather,
    all_reduce,
    all_reduce_norm,
    dot,
    lora_delta,
    lora_receive,
    lora_send,
    paged_attention,
    plan_attention,
    plan_lora,
    rms_norm,
    rotary_write_kv,
    silu_round,
)
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import TP, param_spec
from slora_jax.model.modules import MODULES, ROW_PARALLEL, local_shapes, split_ranks
from slora_jax.model.projection import Inputs, Projection, group_unit
from slora_jax.model.quantization import ChannelFp8
from slora_jax.model.rope import plain_turns
from slora_jax.model.shards import Shards

Q, K, V, O, GATE, UP, DOWN = range(len(MODULES))  # noqa: E741


@struct.dataclass
class TokenBatch:
    """One step's tokens, flat over its sequences; see ``pallas_kernels.paged_attention`` for padding.

    Attributes:
      token_ids: ``[T]`` int32.
      positions: ``[T]`` int32, position of each token in its sequence.
      rows: ``[T]`` int32, token row of the pool that takes each token's K and V.
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
    """What all layers share in one step: KV rows ``[T]``, rotary angles, and the kernels' plans.

    ``lora_split`` and ``group`` are None on one device. On several ``lora_split`` shrinks for the column-parallel
    modules, whose A is split by rank, ``lora`` does the rest, and ``group`` says how they send to each other.
    """

    rows: jax.Array
    rope: tuple[jax.Array, jax.Array]
    attention: AttentionPlan
    lora: LoraPlan | None
    lora_split: LoraPlan | None
    group: Collectives | None


type Term = jax.Array | ScaledProduct | None
"""What is still to be added to hidden states ``[T, h]``.

An array is one device's part of the term, which is the sum over all devices. One device has a product of float8
operands, or None, for nothing.
"""


class LoraOps(NamedTuple):
    """What computes low-rank updates: functions in place of the model's own, for comparisons.

    On one device those with the contracts of ``plan_lora`` and ``lora_delta``. What ``plan`` returns is a pytree with a
    static ``active``, as that of its segments. ``max_rank`` is the largest that it computes, None any.

    On several devices ``send`` and ``receive`` are used, with the contracts of ``lora_send`` and ``lora_receive``.
    """

    plan: Callable
    delta: Callable
    max_rank: int | None = None
    send: Callable = lora_send
    receive: Callable = lora_receive


GATHERED = LoraOps(plan_lora, lora_delta)
"""Adapters read from the pool where they lie, each at its own rank."""


class Llama(nn.Module):
    """The decoder. Parameters are in ``dtype``; norms, rope and softmax compute in float32.

    ``config`` is the whole model's; ``backend`` says which kernels it calls, ``lora_ops`` what computes low-rank
    updates. ``tokens_per_row`` is the pool's: above 1, K and V are in float8 (see ``pallas_kernels.pool``).
    """

    config: ModelConfig
    dtype: jnp.dtype
    backend: Backend = "reference"
    num_shards: int = 1
    lora_ops: LoraOps = GATHERED
    tokens_per_row: int = 1

    def setup(self):
        config = Shards(self.config, self.num_shards).local
        self.embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
        )
        self.layers = [
            Block(self.config, self.dtype, self.backend, self.num_shards, self.lora_ops)
            for _ in range(config.num_layers)
        ]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.vocab_size, self.dtype)

    def __call__(
        self, batch: TokenBatch, pool: jax.Array, group: Collectives | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the layers.

        Args:
          batch: the step's tokens.
          pool: ``[layers, 2, rows, W]``; donate it to have K and V written in place.
          group: how several devices send to each other.

        Returns:
          Hidden states ``[T, h]`` after the final norm, and the pool with the tokens' K and V.
        """
        x, step = self.begin(batch, pool.shape[3], group)
        if self.is_initializing():
            for i, block in enumerate(self.layers):
                x, _, pool = block(x, None, step, pool, jnp.int32(i))
        else:
            x, pool = run_layers(self, [block.variables["params"] for block in self.layers], 0, x, step, pool)
        return self.end(x), pool

    def begin(
        self, batch: TokenBatch, row_width: int, group: Collectives | None = None
    ) -> tuple[jax.Array, StepTables]:
        """What comes before the layers: hidden states ``[T, h]``, and what all layers share; ``row_width`` is W."""
        return self._embed(batch.token_ids, group), self._plan(batch, row_width, group)

    def end(self, x: jax.Array) -> jax.Array:
        """What comes behind the layers: the final norm of hidden states ``[T, h]``."""
        _, normed = self.norm(x)
        assert normed.plain is not None, "no map in float8 reads it"
        return normed.plain

    def _embed(self, token_ids: jax.Array, group: Collectives | None) -> jax.Array:
        if group is None:
            return self.embed(token_ids)
        size = self.embed.num_embeddings
        here = token_ids - jax.lax.axis_index(TP) * size
        found = (here >= 0) & (here < size)
        # Zeros from all devices but one: exact in any dtype.
        return all_reduce(jnp.where(found[:, None], self.embed(jnp.clip(here, 0, size - 1)), 0), group)

    def _plan(self, batch: TokenBatch, row_width: int, group: Collectives | None) -> StepTables:
        num_tokens = batch.token_ids.shape[0]
        lora = lora_split = None
        if batch.lora is not None:
            shapes = local_shapes(Shards(self.config, self.num_shards))
            plan = partial(
                self.lora_ops.plan if self.num_shards == 1 else plan_lora,
                num_tokens=num_tokens,
                row_width=row_width,
                widths=[(s.d_in, s.d_out) for s in shapes.values()],
                backend=self.backend,
            )
            if self.num_shards == 1:
                lora = plan(batch.lora)
            else:
                split, whole = _split_segments(batch.lora, self.num_shards)
                lora_split, lora = plan(split), plan(whole)
        attention = plan_attention(
            batch.page_table,
            batch.query_start,
            batch.context_len,
            num_tokens=num_tokens,
            num_kv_heads=Shards(self.config, self.num_shards).local.num_kv_heads,
            backend=self.backend,
            max_query_len=1 if batch.decode_only else None,
            tokens_per_row=self.tokens_per_row,
        )
        angles = rotary_angles(batch.positions, self.config)
        return StepTables(batch.rows, angles, attention, lora, lora_split, group)

    def logits(self, hidden: jax.Array, group: Collectives | None = None) -> jax.Array:
        """Float32 logits ``[..., V]`` of final hidden states ``[..., h]``; on several devices of ``[S, h]``."""
        if self.config.tie_word_embeddings:
            logits = dot(hidden, self.embed.embedding, (((hidden.ndim - 1,), (1,)), ((), ())))
        else:
            logits = self.lm_head(hidden, out_dtype=jnp.float32)
        if group is None:
            return logits
        logits = all_gather(logits, 1, group).reshape(logits.shape[0], -1)
        return logits[:, : self.config.vocab_size]

    def init_all(self, batch: TokenBatch, pool: jax.Array) -> jax.Array:
        """Touches every parameter; for ``init`` and ``eval_shape`` only."""
        hidden, _ = self(batch, pool)
        return self.logits(hidden)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each with its low-rank updates."""

    config: ModelConfig
    dtype: jnp.dtype
    backend: Backend
    num_shards: int
    lora_ops: LoraOps

    @property
    def local(self) -> ModelConfig:
        return Shards(self.config, self.num_shards).local

    def setup(self):
        config = self.local
        layout, units = config.weight_layout, {name: group_unit(name, config) for name in ("o", "down")}
        self.rounds = isinstance(layout, ChannelFp8)
        norm = partial(RMSNorm, config.rms_norm_eps, self.dtype, rounds=self.rounds, backend=self.backend)
        self.attention_norm = norm()
        # Columns [q | k | v], heads in order, and [gate | up].
        project = partial(Projection, dtype=self.dtype, layout=layout, backend=self.backend)
        self.qkv = project(config.q_size + 2 * config.kv_size)
        self.o = project(config.hidden_size, unit=units["o"])
        self.mlp_norm = norm()
        self.gate_up = project(2 * config.intermediate_size)
        self.down = project(config.hidden_size, unit=units["down"])

    def __call__(
        self, x: jax.Array, term: Term, step: StepTables, pool: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, Term, jax.Array]:
        """One layer, of hidden states that need not be complete: their last term is added by the next norm.

        Args:
          x: ``[T, h]``.
          term: what is missing in x.
          step, pool: as in ``run_layers``.
          layer: its number, an int32 scalar.

        Returns:
          x, the term and the pool after this layer.
        """

        def plan_for(modules) -> LoraPlan | None:
            """The adapters' plan; None where they change none of these modules."""
            changes = step.lora is not None and set(modules) & set(step.lora.active)
            return step.lora if changes else None

        group = step.group

        def project(projection, inputs: Inputs, *modules):
            lora = plan_for(modules)
            if lora is not None and group is not None:
                return project_among(projection, inputs, modules, step.lora_split, lora, by_rank=True)
            product = base(projection, inputs)
            if lora is None:
                return product
            update = self.lora_ops.delta(inputs.plain, pool, layer, lora, modules)
            # Nothing between the product and the sum: cuBLAS then does both in one kernel.
            return product._replace(update=update) if isinstance(product, ScaledProduct) else product + update

        def base(projection, inputs: Inputs):
            return projection(inputs.plain if inputs.rounded is None else inputs.rounded)

        def project_among(projection, inputs: Inputs, modules, share: LoraPlan | None, lora: LoraPlan, by_rank: bool):
            """On several devices, of which each has its ``share`` of A."""
            sent = self.lora_ops.send(inputs.plain, pool, layer, share, modules, group, by_rank=by_rank)
            # What is sent travels while the base's product is computed.
            product = applied(base(projection, inputs))
            return self.lora_ops.receive(product, sent, pool, layer, lora, modules, group)

        def applied(product) -> jax.Array:
            return product.value(self.dtype) if isinstance(product, ScaledProduct) else product

        def add(x, projection, inputs: Inputs, module) -> tuple[jax.Array, Term]:
            """x with what a row-parallel module adds to it, or x and that as its term."""
            if group is None:
                product = project(projection, inputs, module)
                return (x, product) if isinstance(product, ScaledProduct) else (x + product, None)
            lora = plan_for((module,))
            if lora is None:
                return x, applied(base(projection, inputs))
            return x, project_among(projection, inputs, (module,), lora, lora, by_rank=False)

        def gated(product, *readers) -> Inputs:
            """What a product ``[gate | up]`` gives the modules that read it."""
            if isinstance(product, ScaledProduct):
                keeps = plan_for(readers) is not None
                return Inputs(*silu_round(product, dtype=self.dtype, keeps_activations=keeps, backend=self.backend))
            gate, up = jnp.split(product, 2, axis=1)
            return Inputs.of(nn.silu(gate) * up, self.rounds, self.backend)

        config = self.local
        # Every read of the adapters' rows comes before the write, which needs all of qkv: XLA copies no pool to keep
        # them valid.
        x, normed = self.attention_norm(x, term, group, keeps_plain=plan_for((Q, K, V)) is not None)
        qkv = project(self.qkv, normed, Q, K, V)
        q, pool = rotary_write_kv(
            qkv,
            step.rope,
            pool,
            layer,
            step.rows,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            backend=self.backend,
            tokens_per_row=step.attention.tokens_per_row,
        )
        scale = 1.0 / math.sqrt(config.head_dim)
        attended = paged_attention(q, pool, layer, step.attention, num_kv_heads=config.num_kv_heads, scale=scale)
        inputs = Inputs.of(attended.reshape(-1, config.q_size), self.rounds, self.backend)
        x, term = add(x, self.o, inputs, O)
        x, normed = self.mlp_norm(x, term, group, keeps_plain=plan_for((GATE, UP)) is not None)
        x, term = add(x, self.down, gated(project(self.gate_up, normed, GATE, UP), DOWN), DOWN)
        return x, term, pool


def run_layers(
    model: Llama,
    layers: Sequence[Mapping[str, Any]],
    first: int | jax.Array,
    x: jax.Array,
    step: StepTables,
    pool: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states ``[T, h]`` and the pool after some consecutive layers.

    Args:
      model: whose layers they are.
      layers: the parameters of each.
      first: the number of the first of them; an array, int32, where one program is to serve any of them.
      x, step: as from ``Llama.begin``.
      pool: ``[layers, 2, rows, W]``.
    """
    term = None
    of_model = model.config, model.dtype, model.backend, model.num_shards, model.lora_ops
    for i, params in enumerate(layers):
        layer = np.int32(first + i) if isinstance(first, int) else first + i
        x, term, pool = _apply_block(params, x, term, step, pool, layer, *of_model)
    if isinstance(term, ScaledProduct):
        x = term.added_to(x)
    elif term is not None:
        assert step.group is not None, "terms of one device are products"
        x = x + all_reduce(term, step.group)
    return x, pool


@partial(jax.jit, static_argnames=("config", "dtype", "backend", "num_shards", "lora_ops"))
def _apply_block(
    params,
    x,
    term,
    step: StepTables,
    pool,
    layer,
    config: ModelConfig,
    dtype: jnp.dtype,
    backend: Backend,
    num_shards: int,
    lora_ops: LoraOps,
):
    """``Block`` as a function that knows neither its layer nor its parameters: the same for all layers."""
    block = Block(config, dtype, backend, num_shards, lora_ops, parent=None)
    return block.apply({"params": params}, x, term, step, pool, layer)


def _split_segments(segments: LoraSegments, num_shards: int) -> tuple[LoraSegments, LoraSegments]:
    """The same segments as one device shrinks them for column-parallel modules, and as it does everything else."""
    is_split = np.array([module not in ROW_PARALLEL for module in MODULES])
    max_rank = split_ranks(segments.max_rank, num_shards)
    split = dataclasses.replace(
        segments,
        rank=jnp.where(is_split, split_ranks(segments.rank, num_shards), 0),
        max_rank=max_rank,
        total_rank=min(segments.total_rank, segments.total_rank // num_shards + segments.rank.shape[0]),
    )
    return split, dataclasses.replace(segments, max_rank=num_shards * max_rank)


class RMSNorm(nn.Module):
    """Root-mean-square norm of hidden states, behind the sum that completes them.

    Attributes:
      rounds: whether maps in float8 read it.
      backend: which kernel rounds.
    """

    epsilon: float
    dtype: jnp.dtype
    rounds: bool = False
    backend: Backend = "reference"

    @nn.compact
    def __call__(
        self, x: jax.Array, term: Term = None, group: Collectives | None = None, keeps_plain: bool = True
    ) -> tuple[jax.Array, Inputs]:
        """x with its term ``[T, h]``, and the norm of that.

        Where maps in float8 read the norm it is rounded, and ``plain`` may be None unless ``keeps_plain``.
        """
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        if isinstance(term, jax.Array):
            assert group is not None, "terms of one device are products"
            x, normed = all_reduce_norm(term, x, scale, self.epsilon, group)
            return x, Inputs.of(normed, self.rounds, self.backend)
        if self.rounds:
            x, plain, rounded = add_norm_round(
                x, term, scale, self.epsilon, keeps_normed=keeps_plain, backend=self.backend
            )
            return x, Inputs(plain, rounded)
        assert term is None, "products whose scales are still to be applied come from maps in float8"
        return x, Inputs(rms_norm(x, scale, self.epsilon))


def rotary_angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine ``[T, D / 2]`` float32 of each position's rotary angles; see ``model.rope``."""
    scaling = config.rope_scaling
    turns = (plain_turns if scaling is None else scaling.turns)(config.rope_theta, config.head_dim)
    angle = positions.astype(jnp.float32)[:, None] * turns
    if scaling is None or scaling.gain == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * scaling.gain, jnp.sin(angle) * scaling.gain


def abstract_params(config: ModelConfig, dtype: jnp.dtype, num_shards: int = 1) -> dict:
    """The parameter tree's shapes and dtypes over all devices, without allocating any."""
    local = Shards(config, num_shards).local
    model = Llama(local, dtype)
    # Any: shapes in the places of arrays, as JAX takes them wherever it only traces.
    int32: Callable[..., Any] = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = TokenBatch(
        int32((1,)), int32((1,)), int32((1,)), int32((1, 1)), int32((2,)), int32((1,)), None, decode_only=True
    )
    pool = jax.ShapeDtypeStruct((local.num_layers, 2, 16, local.kv_size), dtype)
    init = partial(model.init, method=Llama.init_all)
    one = jax.eval_shape(init, jax.random.key(0), batch, pool)["params"]

    def over_all(keys, leaf):
        spec = param_spec(tuple(key.key for key in keys))
        shape = [size * (num_shards if axis == TP else 1) for size, axis in zip_longest(leaf.shape, spec)]
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(over_all, one)
