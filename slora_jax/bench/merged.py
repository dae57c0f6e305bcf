"""The paper's other way to serve adapters: one at a time merged into the weights, W + scale * B A, and switched."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax import Engine
from slora_jax.bench.service import Times
from slora_jax.bench.throughput import submit, times_of
from slora_jax.bench.workload import WorkItem
from slora_jax.engine.generation import Generation
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.modules import MODULES

MAX_OTHERS_WAITING = 30
"""So many requests of other adapters make the server switch, as in the paper's baseline."""

_IDLE_WAIT_SECONDS = 0.01


class MergedWeights:
    """Base weights into which one adapter (of q, k, v, o) is merged at a time.

    Each merge starts from the base's own weights, of which a copy stays on the device: adding and subtracting, as the
    paper does, would round a little more away each time.

    Args:
      params: the base model's, as the engine was given them: changed in place, and the engine's next step reads them.
    """

    def __init__(self, params: dict, layout: PoolLayout):
        self._params = params
        self._layout = layout
        self._base = {
            (layer, name): params[layer][name]["kernel"]
            for layer in params
            if layer.startswith("layers_")
            for name in ("qkv", "o")
        }

    def stage(self, packed: np.ndarray) -> jax.Array:
        """An adapter packed by ``AdapterLayout.pack``, in host memory that the device copies from by itself."""
        kernel = next(iter(self._base.values()))
        return jax.device_put(packed, kernel.sharding.with_memory_kind("pinned_host"))

    def merge(self, ranks: Mapping[str, int], staged: jax.Array, scale: float = 1.0) -> float:
        """Replaces what is merged by this adapter.

        Args:
          ranks: rank by module, as it was packed with.
          staged: from ``stage``.

        Returns:
          Seconds that it took, until the device was done.
        """
        start = time.monotonic()
        adapter = self._layout.adapter(ranks)
        entries = jax.device_put(staged, staged.sharding.with_memory_kind("device"))
        for (layer, name), kernel in self._base.items():
            places = tuple(
                _Place(adapter.start_a[i], adapter.start_b[i], adapter.ranks[i], *self._columns(m))
                for i, m in enumerate(MODULES)
                if adapter.ranks[i] and (m == "o") == (name == "o")
            )
            number = np.int32(layer.removeprefix("layers_"))
            self._params[layer][name]["kernel"] = _merged(kernel, entries, number, scale, places)
        jax.block_until_ready(self._params)
        return time.monotonic() - start

    def restore(self) -> None:
        """Gives the base its own weights back."""
        for (layer, name), kernel in self._base.items():
            self._params[layer][name]["kernel"] = kernel

    def _columns(self, module: str) -> tuple[int, int]:
        """The first column that a module has in its product's kernel, and how many."""
        before = {"q": (), "k": ("q",), "v": ("q", "k"), "o": ()}[module]
        shapes = self._layout.shapes
        return sum(shapes[m].d_out for m in before), shapes[module].d_out


class _Place(NamedTuple):
    """Of one module: its entries in the packed list, and its columns in the kernel."""

    start_a: int
    start_b: int
    rank: int
    first_column: int
    num_columns: int


@partial(jax.jit, static_argnames="places")
def _merged(kernel, entries, layer, scale, places: tuple[_Place, ...]):
    """``kernel [in, out] + scale * (B A)^T`` of the modules in ``places``; the kernel itself is kept."""
    chunks = entries[layer].reshape(-1, entries.shape[3])

    def matrix(start, rank, width):
        count = -(-width // chunks.shape[1])
        rows = chunks[start : start + count * rank].reshape(count, rank, -1).swapaxes(0, 1)
        return rows.reshape(rank, -1)[:, :width]

    for p in places:
        a, b = matrix(p.start_a, p.rank, kernel.shape[0]), matrix(p.start_b, p.rank, p.num_columns)
        product = jnp.einsum("ri,ro->io", a, b, precision="highest", preferred_element_type=jnp.float32)
        columns = slice(p.first_column, p.first_column + p.num_columns)
        kernel = kernel.at[:, columns].set((kernel[:, columns] + scale * product).astype(kernel.dtype))
    return kernel


def run_merged(
    engine: Engine, merge: Callable[[int], float], workload: Sequence[WorkItem]
) -> tuple[list[Times], list[float]]:
    """Serves a workload to its end, the requests of one adapter at a time.

    It switches once nothing of the merged adapter is left, or too many others wait; then to the one that has waited
    for longest.

    Args:
      engine: idle; gets requests of its base model only.
      merge: brings an adapter into its weights, and returns the seconds of that.

    Returns:
      The times of each request, and the seconds of each switch.
    """
    todo = deque(sorted(range(len(workload)), key=lambda i: workload[i].arrival))
    waiting: deque[int] = deque()
    switches: list[float] = []
    merged: int | None = None
    generations: list[Generation | None] = [None] * len(workload)
    start = time.monotonic()

    def submit_merged() -> None:
        for i in [i for i in waiting if workload[i].adapter == merged]:
            generations[i] = submit(engine, workload[i], None)
            waiting.remove(i)

    while todo or waiting or not engine.is_idle:
        while todo and workload[todo[0]].arrival <= time.monotonic() - start:
            waiting.append(todo.popleft())
        others = [i for i in waiting if workload[i].adapter != merged]
        if len(others) <= MAX_OTHERS_WAITING:
            submit_merged()
        if engine.step():
            continue
        # Nothing runs: all that was submitted is answered.
        if others:
            merged = workload[others[0]].adapter
            switches.append(merge(merged))
            # Its requests that wait now are served, however many others wait.
            submit_merged()
        elif todo:
            pause = workload[todo[0]].arrival - (time.monotonic() - start)
            engine.wait_for_work(min(max(pause, 0.0), _IDLE_WAIT_SECONDS))
    return times_of(workload, generations, start), switches
