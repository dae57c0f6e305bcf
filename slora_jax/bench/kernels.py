"""The kernels against what the device can move and compute, measured in the same run.

A case is one jitted function that goes through the layers of one pool, so that nothing it reads is still in the cache,
and that XLA captures as one CUDA graph, as in the engine. Shares of the device's speed count the time in which kernels
run, from the profiler; the table shows the clock's beside it, of many queued executions, gaps included. Whole steps and
what LoRA adds to a product are by the clock.
"""

import dataclasses
import datetime
import fnmatch
import itertools
import json
import math
import os
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    PAGE_SIZE,
    AttentionPlan,
    Backend,
    LoraPlan,
    LoraSegments,
    choose_backend,
    grouped_matmul,
    lora_delta,
    paged_attention,
    plan_attention,
    plan_lora,
    tuning,
    unpack_integers,
)
from pallas_kernels.specs import (
    ATTENTION,
    LORA,
    MATMUL,
    AttentionInputs,
    AttentionSpec,
    LoraInputs,
    LoraSpec,
    MatmulInputs,
    MatmulSpec,
    normal,
)
from slora_jax.bench.timing import busy_seconds_per_execution, machine, seconds_per_execution
from slora_jax.config import read_yaml
from slora_jax.engine.batch import Buckets
from slora_jax.engine.runner import compiler_options
from slora_jax.memory.layout import AdapterLayout, PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import Llama, TokenBatch
from slora_jax.model.modules import MODULES
from slora_jax.model.quantization import ChannelFp8, GroupedWeights, WeightLayout, least_rows
from slora_jax.model.weights import dummy_params
from slora_jax.shapes import shape_file

_SEED = 7
_MAX_ERROR = 1e-2
"""Largest ``||out - ref|| / ||ref||``; a bfloat16 result, rounded once, has about 2e-3."""
_MAX_STEP_ERROR = 3e-2
"""The same after two whole layers that round in every operation."""
_MAX_FLOAT8_STEP_ERROR = 0.15
"""The same where activations are rounded to float8: a difference in the last bit of bfloat16 takes some of them over to
the next number, a sixteenth away. The reference itself then differs by 0.085 from itself in float32."""
_MIXED = (64, 32, 16, 8)
"""Ranks in turn of the paper's setting S2: of all that are measured here, those that take most pages."""
_LLAMA_7B = shape_file("llama-7b")


class Timing(NamedTuple):
    """One call or step: seconds by the clock, seconds in which a kernel runs (None: not known), relative error."""

    seconds: float
    busy: float | None
    error: float

    @property
    def device(self) -> float:
        """Seconds of the kernels alone where the profiler gave them: a short call's clock may show the dispatch."""
        return self.seconds if self.busy is None else self.busy


class Result(NamedTuple):
    """One row of the table.

    ``value`` is what ``target``, a comparison with a number, is about; None is a case without one.
    """

    timing: Timing
    quantity: str
    value: float | None
    target: str | None = None
    details: Mapping[str, object] = MappingProxyType({})

    @property
    def met(self) -> bool | None:
        if self.target is None or self.value is None:
            return None
        bound = float(self.target[2:])
        return self.value >= bound if self.target.startswith(">=") else self.value <= bound


def copy_speed(scale: int) -> dict:
    """The fastest of several ways to copy on the first device: bytes read and written a second, and which.

    Args:
      scale: divides the sizes; 1 is what counts.
    """
    ways = {
        "jnp.copy": jax.jit(jnp.copy),
        "device_put": lambda x: jax.device_put(x, jax.devices()[0], may_alias=False),
        "barrier": jax.jit(jax.lax.optimization_barrier),
        "multiply": jax.jit(lambda x: x * jnp.bfloat16(1.0078125)),
    }
    rates = {}
    for gib, (name, way) in itertools.product((2, 4), ways.items()):
        x = jnp.ones(max(1, gib * 2**29 // scale**2), jnp.bfloat16)
        # A way that hands out its argument moves nothing.
        if _address(way(x)) != _address(x):
            rates[f"{name}, {gib} GiB"] = 2 * x.nbytes / seconds_per_execution(partial(way, x))
    way = max(rates, key=rates.get)
    return {"bytes_per_second": rates[way], "way": way, "ways": rates}


class WrongResult(Exception):
    """A kernel's result is too far from the reference's, or not a number."""


class Call(NamedTuple):
    """What is timed: a jitted function of ``arguments`` that calls a kernel once a layer, and gives all results.

    ``reference`` is what the first is to be.
    """

    layers: jax.stages.Wrapped
    arguments: tuple
    count: int
    reference: jax.Array


class KernelBench:
    """Times specs, each once, however many cases ask.

    Attributes:
      scale: divides every size; 1 is what the targets are about.
      peers: whether to time other implementations too, where there are any.
      profiles: whether to ask the profiler too.
    """

    def __init__(self, scale: int, peers: bool, profiles: bool = True):
        self.scale = scale
        self.peers = peers and jax.default_backend() == "gpu"
        self.profiles = profiles
        # Every case has heads of 128 and bfloat16.
        self.backend = choose_backend(jax.devices()[0], 128, jnp.dtype(jnp.bfloat16))
        self._float8_backend: Backend = "reference" if self.backend == "reference" else "triton"
        self.time_attention = cache(self._time_attention)
        self.time_lora = cache(self._time_lora)
        self.time_qkv = cache(self._time_qkv)
        self.time_cudnn = cache(self._time_cudnn)
        self.time_matmul = cache(self._time_matmul)

    def timed(self, call: Call, compiled: Callable | None = None) -> Timing:
        """Checks one of an execution's results, then times all of them; ``compiled`` is the call's function, if it is.

        Raises:
          WrongResult: it is not right.
        """
        run = partial(compiled or call.layers, *call.arguments)
        error = checked_error(run()[0], call.reference)
        busy = busy_seconds_per_execution(run) if self.profiles else None
        return Timing(seconds_per_execution(run) / call.count, busy / call.count if busy else None, error)

    def backend_for(self, spec: AttentionSpec) -> Backend:
        """What the engine would run."""
        return self._float8_backend if spec.float8 else self.backend

    # The device.

    @cached_property
    def copy(self) -> dict:
        """See ``copy_speed``."""
        return copy_speed(self.scale)

    @cached_property
    def matmul_flops(self) -> float:
        """Operations a second of a bfloat16 product of 8192³."""
        size = 8192 // self.scale
        a, b = normal(jax.random.key(_SEED), 2, (size, size), "bfloat16")
        return 2 * size**3 / seconds_per_execution(partial(jax.jit(jnp.dot), a, b))

    # Attention.

    def _time_attention(self, spec: AttentionSpec, backend: Backend) -> Timing:
        return self.timed(self.attention_call(spec, backend))

    def attention_call(self, spec: AttentionSpec, backend: Backend) -> Call:
        """Of a spec as it is at scale 1."""
        spec = spec.scaled(self.scale)
        inputs, reference = _attention_problem(spec)
        attend = _attend(spec)

        @jax.jit
        def layers(qs, pool, plan):
            return [attend(q, pool, layer, plan) for layer, q in enumerate(qs)]

        plan = _attention_plan(spec, inputs, backend)
        return Call(layers, (inputs.qs, inputs.pool, plan), spec.layers, reference)

    def _time_cudnn(self, spec: AttentionSpec) -> Timing:
        """The same queries by cuDNN, over dense K and V."""
        spec = spec.scaled(self.scale)
        assert spec.sequences == 1 and spec.queries == spec.context
        inputs, reference = _attention_problem(spec)
        rows = (inputs.page_table[0][:, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)).reshape(-1)[: spec.context]
        dense = [
            (q[None], *plane[:, rows].reshape(2, 1, spec.context, spec.kv_heads, spec.head_dim))
            for q, plane in zip(inputs.qs, inputs.pool, strict=True)
        ]
        attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        layers = jax.jit(lambda dense: [attend(*qkv)[0] for qkv in dense])
        return self.timed(Call(layers, (dense,), spec.layers, reference))

    # Gathered LoRA.

    def _time_lora(self, spec: LoraSpec) -> Timing:
        return self.timed(self.lora_call(spec))

    def lora_call(self, spec: LoraSpec) -> Call:
        """Of a spec as it is at scale 1."""
        spec = spec.scaled(self.scale)
        inputs, reference = _lora_problem(spec)
        modules = tuple(range(len(spec.widths)))

        @jax.jit
        def layers(xs, pool, plan):
            return [lora_delta(x, pool, layer, plan, modules) for layer, x in enumerate(xs)]

        plan = _lora_plan(spec, inputs, self.backend)
        return Call(layers, (inputs.xs, inputs.pool, plan), spec.layers, reference)

    def _time_qkv(self, spec: LoraSpec, with_lora: bool) -> float:
        """Seconds of the base model's product for the spec's modules, with or without the low-rank update."""
        spec = spec.scaled(self.scale)
        inputs, _ = _lora_problem(spec)
        modules = tuple(range(len(spec.widths)))
        shape = (spec.widths[0][0], sum(d_out for _, d_out in spec.widths))
        kernels = tuple(normal(jax.random.key(_SEED), spec.layers, shape, spec.dtype))

        @partial(jax.jit, compiler_options=compiler_options(spec.num_tokens))
        def layers(xs, kernels, pool, plan):
            outs = []
            for layer, (x, kernel) in enumerate(zip(xs, kernels, strict=True)):
                y = jnp.dot(x, kernel)
                outs.append(y + lora_delta(x, pool, layer, plan, modules) if with_lora else y)
            return outs

        run = partial(layers, inputs.xs, kernels, inputs.pool, _lora_plan(spec, inputs, self.backend))
        return seconds_per_execution(run) / spec.layers

    # Products with packed weights.

    def _time_matmul(self, spec: MatmulSpec, is_plain: bool = False) -> Timing:
        return self.timed(self.matmul_call(spec, is_plain))

    def matmul_call(self, spec: MatmulSpec, is_plain: bool = False) -> Call:
        """Of a spec as it is at scale 1; ``is_plain``: with the same weights in its dtype, as XLA multiplies them."""
        spec = spec.scaled(self.scale)
        inputs, reference = _matmul_problem(spec)
        product = partial(grouped_matmul, dtype=jnp.dtype(spec.dtype), backend=self.backend)
        arguments: tuple = tuple(zip(*inputs, strict=True))
        if is_plain:
            product = jnp.dot
            arguments = tuple((x, _as_plain(spec, *rest)) for x, *rest in arguments)
        layers = jax.jit(
            lambda arguments: [product(*of_layer) for of_layer in arguments],
            compiler_options=compiler_options(spec.rows),
        )
        return Call(layers, (arguments,), spec.layers, reference)

    # The model.

    @cached_property
    def steps(self) -> "StepBench":
        # The model and its pool need the room.
        _attention_problem.cache_clear()
        _lora_problem.cache_clear()
        _matmul_problem.cache_clear()
        return StepBench(self.scale, self.backend, self.profiles)


# A kernel's arguments and the reference's result for layer 0, kept until another spec's are wanted.


@lru_cache(maxsize=1)
def _attention_problem(spec: AttentionSpec) -> tuple[AttentionInputs, jax.Array]:
    inputs = spec.build(_SEED)
    plan = _attention_plan(spec, inputs, "reference")
    reference = jax.jit(_attend(spec), static_argnums=2)(inputs.qs[0].astype(jnp.float32), inputs.pool[:1], 0, plan)
    return inputs, reference


def _attend(spec: AttentionSpec) -> Callable[..., jax.Array]:
    return partial(paged_attention, num_kv_heads=spec.kv_heads, scale=spec.head_dim**-0.5)


def _attention_plan(spec: AttentionSpec, inputs: AttentionInputs, backend: Backend) -> AttentionPlan:
    sizes = {
        "num_tokens": spec.num_tokens,
        "num_kv_heads": spec.kv_heads,
        "max_query_len": spec.queries,
        "tokens_per_row": spec.tokens_per_row,
    }
    return jax.jit(partial(plan_attention, backend=backend, **sizes))(
        inputs.page_table, inputs.query_start, inputs.context_len
    )


@lru_cache(maxsize=1)
def _lora_problem(spec: LoraSpec) -> tuple[LoraInputs, jax.Array]:
    inputs = spec.build(_SEED)
    x, pool = inputs.xs[0].astype(jnp.float32), inputs.pool[:1].astype(jnp.float32)
    plan = _lora_plan(spec, inputs, "reference")
    modules = tuple(range(len(spec.widths)))
    return inputs, jax.jit(lora_delta, static_argnums=(2, 4))(x, pool, 0, plan, modules)


def _lora_plan(spec: LoraSpec, inputs: LoraInputs, backend: Backend) -> LoraPlan:
    sizes = {"num_tokens": spec.num_tokens, "row_width": spec.row_width, "widths": spec.widths}
    return jax.jit(partial(plan_lora, backend=backend, **sizes))(inputs.segments)


@lru_cache(maxsize=1)
def _matmul_problem(spec: MatmulSpec) -> tuple[MatmulInputs, jax.Array]:
    inputs = spec.build(_SEED)
    x, *of_layer = (of_all[0] for of_all in inputs)
    product = partial(grouped_matmul, dtype=jnp.dtype(jnp.float32), backend="reference")
    return inputs, jax.jit(product)(x.astype(jnp.float32), *of_layer)


@partial(jax.jit, static_argnums=0)
def _as_plain(spec: MatmulSpec, weights, scale, zero) -> jax.Array:
    """Packed weights as ``[d_in, d_out]`` in the spec's dtype: what they make of ones."""
    values = unpack_integers(weights, spec.bits).astype(jnp.float32).reshape(scale.shape[0], -1, spec.d_out)
    values = values if zero is None else values - zero.astype(jnp.float32)[:, None]
    return (values * scale[:, None]).reshape(spec.d_in, spec.d_out).astype(spec.dtype)


class Step(NamedTuple):
    """A decode step: sequences, of which the i-th has an adapter of its own, of rank ``ranks[i mod len(ranks)]``.

    ``modules`` are what adapters change, ``layout`` how the base model's weights are quantised.
    """

    sequences: int
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = MODULES[:4]
    layout: WeightLayout | None = None

    def scaled(self, divisor: int) -> "Step":
        """The same with fewer sequences."""
        return self._replace(sequences=max(1, self.sequences // divisor))


_FULL, _ONE = Step(128), Step(1)


class StepBench:
    """Decode steps of a dummy Llama-2-7B: layers, logits, greedy choice."""

    def __init__(self, scale: int, backend: Backend, profiles: bool):
        self.scale = scale
        self.backend = backend
        self.profiles = profiles
        config = ModelConfig.from_hf(read_yaml(_LLAMA_7B))
        head_dim = config.head_dim
        heads = max(1, config.num_heads // scale)
        self.config = dataclasses.replace(
            config,
            vocab_size=config.vocab_size // scale,
            hidden_size=heads * head_dim,
            intermediate_size=config.intermediate_size // scale,
            num_layers=max(1, config.num_layers // scale),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
        )
        self.context = max(24, 512 // scale)
        self.dtype = jnp.dtype(jnp.bfloat16)
        self.pool_layout = PoolLayout.for_model(self.config)
        fullest = _FULL._replace(ranks=_MIXED).scaled(scale)
        adapter_pages = sum(layout.num_pages for layout in self._adapters(fullest))
        num_pages = 1 + fullest.sequences * self.pool_layout.token_pages(self.context) + adapter_pages
        self.pool = self._draw_pool(num_pages)
        self.time = cache(self._time)
        self._model = cache(self._make_model)

    def _make_model(self, num_layers: int, layout: WeightLayout | None) -> tuple[ModelConfig, dict]:
        config = dataclasses.replace(self.config, num_layers=num_layers, weight_layout=layout)
        return config, dummy_params(config, self.dtype, _SEED)

    def _adapters(self, step: Step) -> list[AdapterLayout]:
        """One for each sequence."""
        ranks = [step.ranks[i % len(step.ranks)] for i in range(step.sequences)]
        return [self.pool_layout.adapter(dict.fromkeys(step.modules, rank)) for rank in ranks]

    def _draw_pool(self, num_pages: int) -> jax.Array:
        layers, *shape = self.pool_layout.pool_shape(num_pages)
        return normal(jax.random.key(_SEED), layers, tuple(shape), str(self.dtype))

    @property
    def read_bytes(self) -> int:
        """Weights that a step reads: all but the embedding table."""
        return self.config.num_step_params() * self.dtype.itemsize

    def batch(self, step: Step, seed: int = _SEED) -> TokenBatch:
        """The step's tokens, in pages of the pool."""
        sequences = step.sequences
        rng = np.random.default_rng(seed)
        pages_each = self.pool_layout.token_pages(self.context)
        free = rng.permutation(np.arange(1, self.pool.shape[2] // PAGE_SIZE, dtype=np.int32))
        # Padded as the engine would.
        most_pages = self.pool_layout.token_pages(self.config.max_position_embeddings)
        shape = Buckets.fine(1024, 512, least_rows(step.layout)).shape(sequences, sequences, pages_each, most_pages)
        missing = shape.tokens - sequences
        table = np.zeros((sequences, shape.table_width), np.int32)
        table[:, :pages_each] = free[: sequences * pages_each].reshape(sequences, pages_each)
        last = self.context - 1
        rows = table[:, last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE

        def int32(values):
            return jnp.asarray(np.pad(values, [(0, missing)] + [(0, 0)] * (np.ndim(values) - 1)), jnp.int32)

        return TokenBatch(
            token_ids=int32(rng.integers(0, self.config.vocab_size, sequences)),
            positions=int32(np.full(sequences, last)),
            rows=int32(rows),
            page_table=int32(table),
            query_start=jnp.minimum(jnp.arange(sequences + missing + 1, dtype=jnp.int32), sequences),
            context_len=int32(np.full(sequences, self.context)),
            lora=self._segments(step, free[sequences * pages_each :]) if step.ranks else None,
            decode_only=True,
        )

    def _segments(self, step: Step, free: np.ndarray) -> LoraSegments:
        layouts = self._adapters(step)
        page_start = np.cumsum([0, *(layout.num_pages for layout in layouts)])
        assert page_start[-1] <= len(free), "the pool is too small for these ranks"
        rank = np.array([layout.ranks for layout in layouts])
        int32 = partial(jnp.asarray, dtype=jnp.int32)
        return LoraSegments(
            token_start=jnp.arange(step.sequences + 1, dtype=jnp.int32),
            page_start=int32(page_start),
            pages=int32(free[: page_start[-1]]),
            rank=int32(rank),
            start_a=int32([layout.start_a for layout in layouts]),
            start_b=int32([layout.start_b for layout in layouts]),
            # The pool is drawn with variance 1; this keeps the update as small as a trained one.
            scale=jnp.full(rank.shape, 1e-4, jnp.float32),
            active=tuple(np.flatnonzero(rank.any(axis=0)).tolist()),
            max_rank=256,
            total_rank=int(rank.sum(axis=0).max()),
        )

    def _time(self, step: Step) -> Timing:
        step = step.scaled(self.scale)
        batch = self.batch(step)
        error = self._error(batch, step.layout)
        config, params = self._model(self.config.num_layers, step.layout)
        forward = jax.jit(
            partial(_step, Llama(config, self.dtype, self.backend)),
            donate_argnums=2,
            compiler_options=compiler_options(step.sequences),
        )

        def run():
            tokens, self.pool = forward(params, batch, self.pool)
            return tokens

        busy = busy_seconds_per_execution(run) if self.profiles else None
        return Timing(seconds_per_execution(run, 0.2), busy, error)

    def _error(self, batch: TokenBatch, layout: WeightLayout | None) -> float:
        """Of the first two layers' hidden states, against the same layers on the reference kernels."""
        config, params = self._model(min(2, self.config.num_layers), layout)
        hidden = {}
        for backend in {self.backend, "reference"}:
            model = Llama(config, self.dtype, backend)
            hidden[backend], _ = jax.jit(model.apply)({"params": params}, batch, self.pool[: config.num_layers])
        largest = _MAX_FLOAT8_STEP_ERROR if isinstance(layout, ChannelFp8) else _MAX_STEP_ERROR
        return checked_error(hidden[self.backend], hidden["reference"], largest)


def _step(model: Llama, params, batch: TokenBatch, pool):
    hidden, pool = model.apply({"params": params}, batch, pool)
    logits = model.apply({"params": params}, hidden, method=Llama.logits)
    return jnp.argmax(logits, axis=-1), pool


def checked_error(out: jax.Array, reference: jax.Array, largest: float = _MAX_ERROR) -> float:
    """``||out - reference|| / ||reference||`` in float32.

    Raises:
      WrongResult: it is above ``largest`` or not a number, or the shapes differ.
    """
    if out.shape != reference.shape:
        raise WrongResult(f"the result is {out.shape}, the reference's {reference.shape}")
    out, reference = out.astype(jnp.float32), reference.astype(jnp.float32)
    error = float(jnp.linalg.norm((out - reference).ravel()) / jnp.linalg.norm(reference.ravel()))
    if not error <= largest:
        raise WrongResult(f"relative error {error:.3g} against the reference; at most {largest:g} is right")
    return error


def _address(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


# The cases: what is measured of the timings, and how much is wanted.


def _bandwidth(name: str, target: str | None, bench: KernelBench) -> Result:
    spec = ATTENTION.get(name) or LORA[name]
    timing = bench.time_attention(spec, bench.backend_for(spec)) if name in ATTENTION else bench.time_lora(spec)
    rate = spec.scaled(bench.scale).bytes / timing.device
    details = {"bytes": spec.scaled(bench.scale).bytes, "bytes_per_second": rate}
    return Result(timing, "of copy", rate / bench.copy["bytes_per_second"], target, details)


def _one_adapter(bench: KernelBench) -> Result:
    timing = bench.time_lora(LORA["lora-decode-r64-one"])
    distinct = bench.time_lora(LORA["lora-decode-r64"])
    return Result(timing, "of distinct", timing.device / distinct.device, "<= 0.125")


def _prefill_attention(name: str, target: str | None, bench: KernelBench) -> Result:
    spec = ATTENTION[name]
    timing = bench.time_attention(spec, bench.backend)
    rate = spec.scaled(bench.scale).flops / timing.device
    details = {"flops_per_second": rate, "of_matmul": rate / bench.matmul_flops}
    if not bench.peers:
        return Result(timing, "of cuDNN", None, target, details)
    peer = bench.time_cudnn(spec)
    details |= {"cudnn_seconds": peer.seconds, "cudnn_busy": peer.busy}
    if bench.backend != "triton":
        # What other GPUs run.
        triton = bench.time_attention(spec, "triton")
        details |= {"triton_seconds": triton.seconds, "triton_busy": triton.busy}
    return Result(timing, "of cuDNN", peer.device / timing.device, target, details)


def _prefill_float8(name: str, target: str | None, bench: KernelBench) -> Result:
    """Beside the same with K and V in the pool's dtype, on the kernel that this GPU runs for that."""
    spec = ATTENTION[name]
    timing = bench.time_attention(spec, bench.backend_for(spec))
    plain = bench.time_attention(dataclasses.replace(spec, float8=False), bench.backend)
    rate = spec.scaled(bench.scale).flops / timing.device
    details = {"flops_per_second": rate, "plain_seconds": plain.seconds, "plain_busy": plain.busy}
    return Result(timing, "x plain", timing.device / plain.device, target, details)


def _prefill_lora(name: str, target: str | None, bench: KernelBench) -> Result:
    spec = LORA[name]
    timing = bench.time_lora(spec)
    base, with_lora = bench.time_qkv(spec, False), bench.time_qkv(spec, True)
    details = {"base_seconds": base, "with_lora_seconds": with_lora, "alone_over_base": timing.device / base}
    return Result(timing, "over base", (with_lora - base) / base, target, details)


def _matmul(name: str, target: str | None, bench: KernelBench) -> Result:
    """Beside the same weights in bfloat16; of few rows the share of a copy's speed counts."""
    spec = MATMUL[name]
    timing, plain = bench.time_matmul(spec), bench.time_matmul(spec, True)
    scaled = spec.scaled(bench.scale)
    over_plain, rate = timing.device / plain.device, scaled.bytes / timing.device
    of_copy = rate / bench.copy["bytes_per_second"]
    details = {
        "bytes": scaled.bytes,
        "bytes_per_second": rate,
        "of_copy": of_copy,
        "flops_per_second": scaled.flops / timing.device,
        "plain_seconds": plain.seconds,
        "plain_busy": plain.busy,
        "over_plain": over_plain,
    }
    if target is None:
        return Result(timing, "x bf16", over_plain, None, details)
    return Result(timing, "of copy", of_copy, target, details)


def _step_over(other: Step, step: Step, target: str | None, bench: KernelBench) -> Result:
    """One step beside another."""
    base, timing = bench.steps.time(other), bench.steps.time(step)
    return Result(timing, "x base", timing.seconds / base.seconds, target, {"base_seconds": base.seconds})


def _step_base(bench: KernelBench) -> Result:
    return Result(bench.steps.time(_FULL), "", None)


def _one_user(bench: KernelBench) -> Result:
    timing = bench.steps.time(_ONE)
    # Reading alone: the copy's bytes are read and written.
    least = bench.steps.read_bytes / bench.copy["bytes_per_second"]
    return Result(timing, "x read", timing.seconds / least, "<= 1.15", {"read_bytes": bench.steps.read_bytes})


CASES: dict[str, Callable[[KernelBench], Result]] = {
    **{
        name: partial(_bandwidth, name, target)
        for name, target in {
            "attention-decode-mha-128x512": ">= 0.88",
            "attention-decode-gqa-128x2048": ">= 0.80",
            "attention-decode-gqa-4x32768": ">= 0.75",
            "attention-decode-mha-128x512-float8": ">= 0.90",
            "attention-decode-gqa-128x2048-float8": ">= 0.90",
            "attention-decode-gqa-4x32768-float8": ">= 0.75",
            "attention-decode-mha-320x700": ">= 0.80",
            "attention-decode-gqa-480x900": ">= 0.80",
            "attention-decode-mha-320x700-float8": ">= 0.80",
            "attention-decode-gqa-480x900-float8": ">= 0.80",
            "lora-decode-r64": ">= 0.80",
            "lora-decode-mixed": ">= 0.70",
            "lora-decode-r16": ">= 0.60",
            "lora-decode-r8": None,
            **dict.fromkeys(name for name in LORA if name.startswith(("lora-decode-shared", "lora-decode-8b"))),
            "lora-served-mixed": None,
        }.items()
    },
    "lora-decode-r64-one": _one_adapter,
    "attention-prefill-gqa-8192": partial(_prefill_attention, "attention-prefill-gqa-8192", ">= 0.80"),
    "attention-prefill-mha-8192": partial(_prefill_attention, "attention-prefill-mha-8192", None),
    "attention-prefill-gqa-8192-float8": partial(_prefill_float8, "attention-prefill-gqa-8192-float8", "<= 1.00"),
    "lora-prefill-r64": partial(_prefill_lora, "lora-prefill-r64", "<= 0.15"),
    "lora-prefill-r16": partial(_prefill_lora, "lora-prefill-r16", "<= 0.08"),
    **{name: partial(_matmul, name, ">= 0.80" if spec.rows <= 16 else None) for name, spec in MATMUL.items()},
    "step-128": _step_base,
    "step-128-r16": partial(_step_over, _FULL, _FULL._replace(ranks=(16,)), "<= 1.10"),
    "step-1": _one_user,
    "step-1-r16": partial(_step_over, _ONE, _ONE._replace(ranks=(16,)), "<= 1.04"),
    "step-1-r16-all": partial(_step_over, _ONE, _ONE._replace(ranks=(16,), modules=MODULES), "<= 1.07"),
    "step-1-fp8": partial(_step_over, _ONE, _ONE._replace(layout=ChannelFp8()), "<= 0.60"),
    "step-1-int4": partial(_step_over, _ONE, _ONE._replace(layout=GroupedWeights("int4", 128)), "<= 0.45"),
    "step-128-mixed": partial(_step_over, _FULL, _FULL._replace(ranks=_MIXED), None),
    "step-128-r8": partial(_step_over, _FULL, _FULL._replace(ranks=(8,)), None),
}


def run_kernels(only: str, scale: int, peers: bool, profiles: bool, command: str, out: Path | None) -> bool:
    """Measures the cases whose names match ``only``, printing each; returns whether every result was right.

    The JSON is written after each case, so that a run that is cut short leaves what it has.
    """
    bench = KernelBench(scale, peers, profiles)
    report = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
        "backend": bench.backend,
        "scale": scale,
        "copy": bench.copy,
        "matmul_flops_per_second": bench.matmul_flops,
        "cases": {},
    }
    click.echo(
        f"{report['device']}, jax {report['jax']}: copy {bench.copy['bytes_per_second'] / 1e12:.3f} TB/s "
        f"({bench.copy['way']}), matmul {bench.matmul_flops / 1e12:.0f} TFLOP/s"
    )
    click.echo(f"{'case':37} {'µs':>10} {'busy µs':>10} {'error':>8} {'value':>8} {'':12} {'target':8}")
    all_right = True
    for name in fnmatch.filter(CASES, only):
        try:
            result = CASES[name](bench)
        except Exception as e:
            all_right = False
            report["cases"][name] = {"failure": f"{type(e).__name__}: {e}"}
            if not isinstance(e, WrongResult):
                traceback.print_exc()
            click.echo(f"{name:37} FAILED: {type(e).__name__}: {str(e)[:300]}")
        else:
            report["cases"][name] = _as_json(result)
            click.echo(_as_row(name, result))
        if out:
            out.write_text(json.dumps(report, indent=2) + "\n")
    if not out:
        click.echo(json.dumps(report))
    return all_right


def _as_json(result: Result) -> dict:
    seconds, busy, error = result.timing
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "error": error,
        "quantity": result.quantity,
        "value": result.value,
        "target": result.target,
        "met": result.met,
        **result.details,
    }


def _as_row(name: str, result: Result) -> str:
    seconds, busy, error = result.timing
    busy = "" if busy is None else f"{busy * 1e6:.1f}"
    value = "" if result.value is None else f"{result.value:.3f}"
    verdict = {True: "met", False: "missed", None: ""}[result.met]
    return (
        f"{name:37} {seconds * 1e6:10.1f} {busy:>10} {error:8.1e} {value:>8} {result.quantity:12} "
        f"{result.target or '':8} {verdict}"
    )


def run_tuning(op: str, key: str, grid: dict[str, list[int]], only: str | None, scale: int) -> bool:
    """Times the cases of an op's kind for every combination of block sizes; returns whether any worked.

    ``key`` is as in the files of ``pallas_kernels/tuned``. Prints each combination, and all of them sorted at the end.
    """
    names = fnmatch.filter([*ATTENTION, *LORA, *MATMUL], only or _affected(op, key))
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    micros: list[dict[str, float]] = [{} for _ in combinations]
    bench = KernelBench(scale, peers=False, profiles=False)

    def call_of(name: str) -> Call:
        if name in LORA:
            return bench.lora_call(LORA[name])
        if name in MATMUL:
            return bench.matmul_call(MATMUL[name])
        # Kernels that this GPU would not choose can be tuned too.
        spec = ATTENTION[name]
        return bench.attention_call(spec, "triton" if op == "prefill_attention" else bench.backend_for(spec))

    def begin(name: str, sizes: dict[str, int]) -> tuple[Call, Future]:
        # Block sizes are read when a function is traced; XLA compiles several programs at a time.
        with tuning.override(op, key, sizes):
            call = call_of(name)
            return call, workers.submit(call.layers.lower(*call.arguments).compile)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        # Cases outside, so that each one's arguments are drawn once.
        for name in names:
            begun = [_attempted(partial(begin, name, sizes)) for sizes in combinations]
            for sizes, row, started in zip(combinations, micros, begun, strict=True):
                timed = (
                    started if isinstance(started, Exception) else _attempted(partial(_time_compiled, bench, *started))
                )
                if isinstance(timed, Exception):
                    row[name] = math.inf
                    click.echo(f"{'failed':>10} {name} {json.dumps(sizes)}: {type(timed).__name__}: {str(timed)[:200]}")
                else:
                    row[name] = timed.seconds * 1e6
                    click.echo(f"{row[name]:10.1f} {name} {json.dumps(sizes)}")
    rows = [(sum(row.values()), sizes, row) for sizes, row in zip(combinations, micros, strict=True)]
    click.echo(f"\n{op} {key} on {jax.devices()[0].device_kind}, µs: sum; {'; '.join(names)}")
    for row in sorted(rows, key=lambda row: row[0]):
        click.echo(_tuning_row(*row))
    return any(math.isfinite(total) for total, *_ in rows)


def _attempted[T](attempt: Callable[[], T]) -> T | Exception:
    """Sizes that do not fit the GPU, or make a kernel wrong, are a line of the result like any other."""
    try:
        return attempt()
    except Exception as e:
        return e


def _time_compiled(bench: KernelBench, call: Call, compiling: Future) -> Timing:
    return bench.timed(call, compiling.result())


def _tuning_row(total: float, sizes: dict[str, int], micros: dict[str, float]) -> str:
    return f"{total:10.1f} {' '.join(f'{value:9.1f}' for value in micros.values())}  {json.dumps(sizes)}"


def _affected(op: str, key: str) -> str:
    if op.startswith("grouped_matmul"):
        return f"matmul-*-{key}" if key.isdecimal() else "matmul-*-512"
    if op.startswith("lora"):
        return f"lora-{key}-*"
    # Cases with float8 end so; the others end in numbers of several digits.
    end = "-float8" if key.endswith("float8") else "[0-9][0-9]"
    if op in ("prefill_attention", "mosaic_attention"):
        return f"attention-prefill-*{end}"
    if op == "decode_attention" and key.startswith(("multi_head", "grouped")):
        return f"attention-decode-{'mha' if key.startswith('multi_head') else 'gqa'}-*{end}"
    return "attention-*"
