"""The collectives of tensor parallelism, timed: a layer's projections on N devices, without and with adapters.

For o, whose input the devices share out, two schemes (down is like it):

- ``split``, the model's: A by input, an all-reduce of the ``[T, r]`` partial sums, B by output, the product added
  ahead of the base's own all-reduce.
- ``whole``: A by input, all of B on every device, each device's own partial sums times B added to its term of the
  base's all-reduce. No further collective; N times the bytes of B, in memory and read.

For q, k and v, the model's scheme: A by rank, an all-gather of ``[T, r]`` each, B by output.

LoRA is plain JAX over adapters that lie ready as arrays, the same products in both schemes; what is sent, and when, is
what ``slora_jax.model.llama`` sends. Each program has several layers, one needing the other's result as in a model.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import all_reduce
from pallas_kernels.lora.api import add_to_own_columns, gathered_ranks
from slora_jax.bench.timing import machine, seconds_per_execution
from slora_jax.engine.runner import compiler_options
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import TABLE, TP, ModelMesh

RANKS = (16, 64)
STEPS = ((1, 1), (16, 16), (128, 128), (512, 16))
"""Tokens of a step and distinct adapters among them, each with as many tokens as the others: decoding, but the last."""

_WHOLE, _INPUT, _OUTPUT = PartitionSpec(), PartitionSpec(TP, None), PartitionSpec(None, TP)
_LAST, _RANK = PartitionSpec(None, None, TP), PartitionSpec(None, TP, None)


class Scheme(NamedTuple):
    """How one projection and its adapters lie on the devices, and what a device does with them.

    Attributes:
      specs: of each array of a layer; see ``_shapes``.
      apply: from ``x``, the layer's arrays, the number of adapters and how devices send to the output ``[T, out]``.
    """

    specs: dict[str, PartitionSpec]
    apply: Callable


def _base_o(x, layer, adapters, group):
    return all_reduce(x @ layer["kernel"], group)


def _split_o(x, layer, adapters, group):
    partial_sums = all_reduce(_shrink(x, layer["a"], adapters), group)
    delta = _expand(partial_sums, layer["b"], adapters, x.dtype)
    return all_reduce(add_to_own_columns(x @ layer["kernel"], delta, group), group)


def _whole_o(x, layer, adapters, group):
    delta = _expand(_shrink(x, layer["a"], adapters), layer["b"], adapters, x.dtype)
    return all_reduce(x @ layer["kernel"] + delta, group)


def _base_qkv(x, layer, adapters, group):
    return x @ layer["kernel"]


def _split_qkv(x, layer, adapters, group):
    modules = ("q", "k", "v")
    shrunk = jnp.stack([_shrink(x, layer[f"a_{m}"], adapters) for m in modules], axis=1)
    partial_sums = gathered_ranks(shrunk, group)
    deltas = [_expand(partial_sums[:, i], layer[f"b_{m}"], adapters, x.dtype) for i, m in enumerate(modules)]
    return x @ layer["kernel"] + jnp.concatenate(deltas, axis=1)


_O, _QKV = {"kernel": _INPUT}, {"kernel": _OUTPUT}
SCHEMES = {
    "o": Scheme(_O, _base_o),
    "o split": Scheme(_O | {"a": _LAST, "b": _LAST}, _split_o),
    "o whole": Scheme(_O | {"a": _LAST, "b": _WHOLE}, _whole_o),
    "qkv": Scheme(_QKV, _base_qkv),
    "qkv split": Scheme(_QKV | {f"a_{m}": _RANK for m in "qkv"} | {f"b_{m}": _LAST for m in "qkv"}, _split_qkv),
}


def _shrink(x, a, adapters: int):
    """``[T, r]`` float32 of ``[T, in]`` and A ``[adapters, r, in]``."""
    grouped = x.reshape(adapters, -1, x.shape[1])
    sums = jnp.einsum("gti,gri->gtr", grouped, a, preferred_element_type=jnp.float32)
    return sums.reshape(x.shape[0], -1)


def _expand(partial_sums, b, adapters: int, dtype):
    """``[T, out]`` of ``[T, r]`` and B ``[adapters, r, out]``."""
    grouped = partial_sums.reshape(adapters, -1, partial_sums.shape[1]).astype(b.dtype)
    return jnp.einsum("gtr,gro->gto", grouped, b, preferred_element_type=dtype).reshape(partial_sums.shape[0], -1)


def _shapes(model: ModelConfig, mesh: ModelMesh, name: str, adapters: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Of one layer's arrays over all devices; B is kept ``[adapters, r, out]``, as the pool has it."""
    local, hidden = mesh.shards.local, model.hidden_size
    q, kv = mesh.size * local.q_size, mesh.size * local.kv_size
    if name.startswith("o"):
        shapes = {"kernel": (q, hidden), "a": (adapters, rank, q), "b": (adapters, rank, hidden)}
    else:
        shapes = {"kernel": (hidden, q + 2 * kv)} | {f"a_{m}": (adapters, rank, hidden) for m in "qkv"}
        shapes |= {f"b_{m}": (adapters, rank, width) for m, width in (("q", q), ("k", kv), ("v", kv))}
    return {array: shapes[array] for array in SCHEMES[name].specs}


def layers_drawn(
    model: ModelConfig, mesh: ModelMesh, name: str, adapters: int, rank: int, layers: int, dtype: jnp.dtype
) -> Callable[[], list[dict[str, jax.Array]]]:
    """A jitted function that makes up the arrays of ``layers`` layers: outputs are about as large as inputs."""
    shapes, specs = _shapes(model, mesh, name, adapters, rank), SCHEMES[name].specs

    def one(array: str, shape: tuple[int, ...], layer: int):
        # Cheap to compile, and no product cares how random its operands are.
        at = sum(jax.lax.broadcasted_iota(jnp.float32, shape, axis) * (axis + 1.7) for axis in range(len(shape)))
        width = shape[0] if array == "kernel" else math.sqrt(shape[1] * shape[2])
        return (jnp.sin(at + layer) * math.sqrt(2.0 / width)).astype(dtype)

    def draw():
        return [{array: one(array, shape, layer) for array, shape in shapes.items()} for layer in range(layers)]

    return jax.jit(draw, out_shardings=[{array: NamedSharding(mesh.mesh, specs[array]) for array in shapes}] * layers)


def layers_run(mesh: ModelMesh, name: str, adapters: int, layers: int) -> Callable:
    """A jitted function of ``mesh.table``, the layers' arrays and ``x`` ``[T, hidden]``, whole on each device.

    It returns the like of ``x``.
    """
    scheme = SCHEMES[name]

    def run(table, arrays, x):
        group = mesh.collectives(table)
        for layer in arrays:
            y = scheme.apply(x[:, : layer["kernel"].shape[0]], layer, adapters, group)
            # The next layer's input: some of the result, or all of it and again from its beginning; and normed.
            x = jnp.tile(y, (1, -(-x.shape[1] // y.shape[1])))[:, : x.shape[1]]
            x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + 1e-5)
        return x

    # The outputs for q, k and v differ from device to device: it does not matter whose is returned.
    return jax.jit(
        jax.shard_map(
            run, mesh=mesh.mesh, in_specs=(TABLE, [scheme.specs] * layers, _WHOLE), out_specs=_WHOLE, check_vma=False
        )
    )


def sent_bytes(name: str, tp: int, tokens: int, rank: int, hidden: int, itemsize: int) -> float:
    """What one device sends in a layer, as a ring does: sums between A and B are float32."""
    each = (tp - 1) / tp * tokens
    base = 2 * each * hidden * itemsize
    return {
        "o": base,
        "o split": base + 2 * each * rank * 4,
        "o whole": base,
        "qkv": 0.0,
        "qkv split": 3 * each * rank * 4,
    }[name]


def measure(models: dict[str, ModelConfig], tp: int, layers: int, command: str) -> Iterator[dict]:
    """Times every case, in bfloat16; one result for each model, step and rank.

    Raises:
      InvalidRequest: there are too few devices, or so many cannot share a model.
    """
    meshes = {name: ModelMesh.create(model, tp) for name, model in models.items()}
    for name, mesh in meshes.items():
        mesh.connect(max(tokens for tokens, _ in STEPS) * models[name].hidden_size * 2)
    cases = list(itertools.product(models, STEPS, RANKS))
    # All of it first: the search for the fastest products runs on the devices too.
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        compiling = {
            (case, scheme): _compiling(models[case[0]], meshes[case[0]], scheme, *case[1], case[2], layers, workers)
            for case in cases
            for scheme in SCHEMES
        }
    for case in cases:
        name, (tokens, adapters), rank = case
        model, mesh = models[name], meshes[name]
        x = jax.device_put(jnp.ones((tokens, model.hidden_size), jnp.bfloat16), mesh.replicated)
        yield {
            "model": name,
            "tp": tp,
            "tokens": tokens,
            "adapters": adapters,
            "rank": rank,
            "seconds_per_layer": {
                scheme: _seconds(*(program.result() for program in compiling.pop((case, scheme))), mesh, x) / layers
                for scheme in SCHEMES
            },
            "sent_bytes_per_layer": {
                scheme: sent_bytes(scheme, tp, tokens, rank, model.hidden_size, 2) for scheme in SCHEMES
            },
            "adapter_bytes_per_layer": {
                scheme: _adapter_bytes(model, mesh, scheme, adapters, rank) for scheme in SCHEMES
            },
            "layers": layers,
            "command": command,
            **machine(),
        }


def _compiling(model, mesh, scheme: str, tokens: int, adapters: int, rank: int, layers: int, workers) -> list[Future]:
    """The two programs of a case: what draws its arrays, and what is timed."""
    draw = layers_drawn(model, mesh, scheme, adapters, rank, layers, jnp.bfloat16).lower()
    x = jax.ShapeDtypeStruct((tokens, model.hidden_size), jnp.bfloat16, sharding=mesh.replicated)
    shardings = [{array: NamedSharding(mesh.mesh, spec) for array, spec in SCHEMES[scheme].specs.items()}] * layers
    arrays = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), draw.out_info, shardings)
    run = layers_run(mesh, scheme, adapters, layers).lower(mesh.table, arrays, x)
    return [workers.submit(draw.compile), workers.submit(run.compile, compiler_options(tokens))]


def _seconds(draw: Callable, run: Callable, mesh: ModelMesh, x: jax.Array) -> float:
    """Of one execution of ``run``."""
    arrays = jax.block_until_ready(draw())

    def next_execution():
        # Of the last one's result, so that GPUs keep step; CPU devices hang with many executions of several queued.
        nonlocal x
        x = run(mesh.table, arrays, x)
        return x.block_until_ready() if jax.default_backend() == "cpu" else x

    return seconds_per_execution(next_execution, least_seconds=0.02)


def _adapter_bytes(model: ModelConfig, mesh: ModelMesh, name: str, adapters: int, rank: int) -> int:
    """Of one device, in one layer."""
    shapes = _shapes(model, mesh, name, adapters, rank)
    return sum(
        2 * math.prod(NamedSharding(mesh.mesh, SCHEMES[name].specs[array]).shard_shape(shape))
        for array, shape in shapes.items()
        if array != "kernel"
    )


def table_row(result: dict) -> str:
    """One result for people: microseconds of a layer, and the kilobytes a device sends for the adapters."""
    seconds, sent = result["seconds_per_layer"], result["sent_bytes_per_layer"]

    def added(name: str) -> str:
        return f"{(seconds[name] - seconds[name.split()[0]]) * 1e6:+8.1f}"

    return (
        f"{result['model']:12} {result['tokens']:6} {result['adapters']:8} {result['rank']:5} "
        f"{seconds['o'] * 1e6:8.1f} {added('o split')} {added('o whole')} "
        f"{seconds['qkv'] * 1e6:8.1f} {added('qkv split')} "
        f"{sent['o'] / 1e3:9.1f} {(sent['o split'] - sent['o']) / 1e3:8.1f} {sent['qkv split'] / 1e3:8.1f}"
    )


TABLE_HEAD = (
    f"{'microseconds a layer':34}|------- o --------------|----- q, k, v ---| kilobytes sent\n"
    f"{'model':12} {'tokens':>6} {'adapters':>8} {'rank':>5} {'base':>8} {'split':>8} {'whole':>8} "
    f"{'base':>8} {'split':>8} {'base o':>9} {'split o':>8} {'split qkv':>8}"
)
