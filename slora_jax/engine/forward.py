"""The model's forward as compiled programs, each known by a hashable key.

One program for all of a step is the slowest to compile: 3 to 8 s for 30 layers on a CPU, in which somebody may be
waiting for an answer. There a few layers are a program of their own, run once for each such group of layers with its
weights. A shape of step then compiles in 1 to 2 s on two cores, and starting ten programs in place of one costs 1 to 3
ms a step. A GPU keeps the one program: there a step takes no longer than that, and is compiled ahead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from slora_jax.engine.batch import BatchShape
from slora_jax.engine.transfer import Transfer
from slora_jax.model.llama import Llama, run_layers
from slora_jax.model.mesh import POOL, TABLE, ModelMesh

_WHOLE = PartitionSpec()
_MOST_LAYERS = 4
"""Of a program that is a part. Six run 2 % faster and take half as long again to compile."""


@dataclass(frozen=True, slots=True)
class Part:
    """Key of a part: what comes before the layers, a group of layers, or what comes behind them."""

    name: Literal["begin", "layers", "end"]
    shape: BatchShape


type ProgramKey = BatchShape | Part
"""Of a program of the forward: that of a whole one is its shape."""


class Forward(Protocol):
    """How a forward is cut into programs. They donate the pool, and what the hidden states are written to."""

    def keys(self, shape: BatchShape) -> tuple[ProgramKey, ...]:
        """Keys of the programs that a step of this shape runs."""
        ...

    def lower(
        self,
        key: ProgramKey,
        params: dict,
        tokens: jax.Array | jax.ShapeDtypeStruct,
        pool: jax.Array | jax.ShapeDtypeStruct,
        hidden: jax.Array | jax.ShapeDtypeStruct,
    ) -> jax.stages.Lowered:
        """Traces and lowers one of them. What JAX remembers of it goes with the result.

        Args:
          key: one of ``keys``.
          params: the model's.
          tokens: ``[N]`` int32 of the previous step.
          pool: ``[layers, 2, rows, N * W]``.
          hidden: ``[H, h]``, H at least the tokens of any step.
        """
        ...

    def start(
        self,
        program: Callable[[ProgramKey], jax.stages.Compiled],
        shape: BatchShape,
        params: dict,
        packed: np.ndarray,
        tokens: jax.Array,
        pool: jax.Array,
        hidden: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Starts a step and returns at once.

        Args:
          program: gives the compiled program of a key.
          shape: of the step.
          params, tokens, pool, hidden: as in ``lower``.
          packed: as of ``BatchShape.zeros``, filled.

        Returns:
          ``hidden``, of which the first T rows are now the tokens' states after the last layer's norm, and the pool.
        """
        ...


def choose_forward(model: Llama, mesh: ModelMesh | None, transfer: Transfer) -> Forward:
    """The one that suits the devices."""
    return ForwardInParts(model, mesh) if jax.default_backend() == "cpu" else WholeForward(model, mesh, transfer)


class WholeForward:
    """One program, whose key is the shape."""

    def __init__(self, model: Llama, mesh: ModelMesh | None, transfer: Transfer):
        self._model = model
        self._mesh = mesh
        self._transfer = transfer

    def keys(self, shape: BatchShape) -> tuple[ProgramKey, ...]:
        return (shape,)

    def lower(self, key: ProgramKey, params, tokens, pool, hidden) -> jax.stages.Lowered:
        assert isinstance(key, BatchShape), "not one of these keys"
        packed = self._transfer.struct(key.packed_size)
        return self.jitted(key).lower(table_of(self._mesh), params, packed, tokens, pool, hidden)

    def jitted(self, shape: BatchShape):
        """The function that is compiled, of ``(table, params, packed, tokens, pool, hidden)``."""

        def step(group, params, packed, tokens, pool, hidden):
            batch = shape.unpack(packed, tokens, self._model.tokens_per_row)
            states, pool = self._model.apply({"params": params}, batch, pool, group)
            return _written(hidden, states), pool

        def forward(table, params, packed, *arguments):
            arguments = (self._transfer.take(packed), *arguments)
            in_specs = (_WHOLE, _WHOLE, POOL, _WHOLE)
            return on_each_device(step, self._mesh, table, params, arguments, in_specs, (_WHOLE, POOL))

        return jax.jit(forward, donate_argnums=(4, 5))

    def start(self, program, shape, params, packed, tokens, pool, hidden):
        return program(shape)(table_of(self._mesh), params, self._transfer.put(packed), tokens, pool, hidden)


class ForwardInParts:
    """Three programs, of which the one with layers runs for one group of layers after the other.

    For CPU devices, which have XLA's collectives only.
    """

    def __init__(self, model: Llama, mesh: ModelMesh | None):
        self._model = model
        self._mesh = mesh
        count = model.config.num_layers
        self._group = max(n for n in range(1, _MOST_LAYERS + 1) if count % n == 0)

    def keys(self, shape: BatchShape) -> tuple[ProgramKey, ...]:
        return Part("begin", shape), Part("layers", shape), Part("end", shape)

    def lower(self, key: ProgramKey, params, tokens, pool, hidden) -> jax.stages.Lowered:
        assert isinstance(key, Part), "not one of these keys"
        begin = self._begin(key.shape, pool.shape[3] // (self._mesh.size if self._mesh else 1))
        packed = jax.ShapeDtypeStruct((key.shape.packed_size,), jnp.int32, sharding=_everywhere(self._mesh))
        of_begin = {"embed": params["embed"]}, packed, tokens
        if key.name == "begin":
            return jax.jit(begin).lower(*of_begin)
        handed_on = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_everywhere(self._mesh)),
            jax.eval_shape(begin, *of_begin),
        )
        x, step = handed_on
        if key.name == "layers":
            first = jax.ShapeDtypeStruct((), jnp.int32)
            return jax.jit(self._layers, donate_argnums=4).lower(self._weights(params, 0), first, x, step, pool)
        return jax.jit(self._end, donate_argnums=2).lower({"norm": params["norm"]}, x, hidden)

    def start(self, program, shape, params, packed, tokens, pool, hidden):
        begin, layers, end = (program(key) for key in self.keys(shape))
        x, step = begin({"embed": params["embed"]}, packed, tokens)
        for first in range(0, self._model.config.num_layers, self._group):
            x, pool = layers(self._weights(params, first), np.int32(first), x, step, pool)
        return end({"norm": params["norm"]}, x, hidden), pool

    def _weights(self, params, first: int) -> dict:
        """Of a group of layers, named alike for all groups: the first is number 0."""
        return {f"layers_{i}": params[f"layers_{first + i}"] for i in range(self._group)}

    def _begin(self, shape: BatchShape, row_width: int):
        def step(group, params, packed, tokens):
            batch = shape.unpack(packed, tokens, self._model.tokens_per_row)
            x, tables = self._model.apply({"params": params}, batch, row_width, group, method=Llama.begin)
            return x, tables

        def begin(params, *arguments):
            return on_each_device(step, self._mesh, None, params, arguments, (_WHOLE, _WHOLE), _WHOLE)

        return begin

    def _layers(self, params, *arguments):
        def step(group, params, first, x, tables, pool):
            layers = [params[f"layers_{i}"] for i in range(self._group)]
            return run_layers(self._model, layers, first, x, tables, pool)

        in_specs = (_WHOLE, _WHOLE, _WHOLE, POOL)
        return on_each_device(step, self._mesh, None, params, arguments, in_specs, (_WHOLE, POOL))

    def _end(self, params, *arguments):
        def step(group, params, x, hidden):
            states = self._model.apply({"params": params}, x, method=Llama.end)
            assert isinstance(states, jax.Array)  # and no changed variables beside it, of which there are none
            return _written(hidden, states)

        return on_each_device(step, self._mesh, None, params, arguments, (_WHOLE, _WHOLE), _WHOLE)


def on_each_device(
    step: Callable, mesh: ModelMesh | None, table: jax.Array | None, params, arguments: tuple, in_specs, out_specs
):
    """``step(group, params, *arguments)``, as every device of the mesh runs it on its slices.

    ``group`` is how a device sends to the others (``ModelMesh.collectives``), with its part of ``table``. Without a
    mesh it is None, and the one device runs ``step`` on all.
    """
    if mesh is None:
        return step(None, params, *arguments)

    def on_one(table, params, *arguments):
        return step(mesh.collectives(table), params, *arguments)

    return jax.shard_map(
        on_one,
        mesh=mesh.mesh,
        in_specs=(TABLE, mesh.param_specs(params), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )(table, params, *arguments)


def table_of(mesh: ModelMesh | None) -> jax.Array | None:
    """What programs of devices that send to each other by kernels are given; None elsewhere."""
    return mesh.table if mesh else None


def _everywhere(mesh: ModelMesh | None):
    return mesh.replicated if mesh else None


def _written(hidden: jax.Array, states: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(hidden, states, (0, 0))
