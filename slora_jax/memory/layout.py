"""How many bytes, rows and pages things cost in the unified pool, and which row holds what.

Only this module knows the arithmetic. No JAX: the scheduler prices requests with it.

The pool is one array ``[layers, 2, rows, W]`` with ``W = kv_heads * head_dim``, rows grouped in pages of
``PAGE_SIZE``. A token takes one row in both planes (plane 0: its K, plane 1: its V) of every layer.

An adapter takes the same rows in every layer too. Each of its vectors (a row of A, a column of B) is cut into
*chunks* of W elements, the last one zero-padded. In one layer the chunks form one list::

    for each of A, B:  for each module present, in MODULES order:  for each chunk c:  for each rank index i

so the chunk of ``A[module][i, c*W:(c+1)*W]`` has index ``start_a[module] + c * rank[module] + i`` in the list, and
``B[module][c*W:(c+1)*W, i]`` has ``start_b[module] + c * rank[module] + i``. The list fills plane 0 of the adapter's
pages first and then plane 1: entry e is row ``e mod R`` of plane ``e div R``, where ``R = PAGE_SIZE * pages``, and
row j is row ``j mod PAGE_SIZE`` of the adapter's page ``j div PAGE_SIZE``. For multi-head models with q,k,v,o this is
the paper's layout (section 4.2): 4r rows, A among the keys and B among the values. For the others the two planes
are filled evenly, so an adapter costs its own bytes rounded up to a page, whatever its modules and rank.

A page spans all layers, so a module whose rank differs between layers (PEFT's ``rank_pattern``) takes its largest
rank everywhere, zero-filled where it is smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from slora_jax.config import PAGE_SIZE
from slora_jax.model.config import ModelConfig

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections an adapter can change, in the order of every per-module array."""

NUM_PLANES = 2


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Input and output width in elements of one projection."""

    d_in: int
    d_out: int


def module_shapes(model: ModelConfig) -> dict[str, ModuleShape]:
    """Width of every projection in ``MODULES``."""
    hidden, ffn = model.hidden_size, model.intermediate_size
    return {
        "q": ModuleShape(hidden, model.q_size),
        "k": ModuleShape(hidden, model.kv_size),
        "v": ModuleShape(hidden, model.kv_size),
        "o": ModuleShape(model.q_size, hidden),
        "gate": ModuleShape(hidden, ffn),
        "up": ModuleShape(hidden, ffn),
        "down": ModuleShape(ffn, hidden),
    }


@dataclass(frozen=True)
class PoolLayout:
    """Costs in the pool of one base model."""

    num_layers: int
    row_width: int
    shapes: Mapping[str, ModuleShape]

    @classmethod
    def for_model(cls, model: ModelConfig) -> "PoolLayout":
        return cls(model.num_layers, model.kv_size, module_shapes(model))

    def page_bytes(self, itemsize: int) -> int:
        """Bytes of one page over all layers and both planes, at ``itemsize`` bytes an element."""
        return self.num_layers * NUM_PLANES * PAGE_SIZE * self.row_width * itemsize

    def pool_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """``[layers, 2, rows, W]``."""
        return (self.num_layers, NUM_PLANES, num_pages * PAGE_SIZE, self.row_width)

    @staticmethod
    def token_pages(num_tokens: int) -> int:
        """Pages that hold the KV of ``num_tokens`` tokens of one sequence."""
        return cdiv(num_tokens, PAGE_SIZE)

    def adapter(self, ranks: Mapping[str, int]) -> "AdapterLayout":
        """Where an adapter with these module ranks (missing: 0) keeps its chunks."""
        return AdapterLayout(self, tuple(int(ranks.get(m, 0)) for m in MODULES))


@dataclass(frozen=True)
class AdapterLayout:
    """Rows of one adapter; see the module's docstring.

    Attributes:
      pool: the pool's costs.
      ranks: rank by module in ``MODULES`` order, 0 where the adapter has none.
    """

    pool: PoolLayout
    ranks: tuple[int, ...]

    @cached_property
    def _starts(self) -> np.ndarray:
        widths = np.array([[s.d_in, s.d_out] for s in (self.pool.shapes[m] for m in MODULES)])
        chunks = -(-widths // self.pool.row_width) * np.array(self.ranks)[:, None]
        ends = np.cumsum(chunks.T.reshape(-1))
        return np.concatenate([[0], ends])

    @cached_property
    def start_a(self) -> tuple[int, ...]:
        """First list entry of each module's A (also where rank is 0, then of no meaning)."""
        return tuple(int(s) for s in self._starts[: len(MODULES)])

    @cached_property
    def start_b(self) -> tuple[int, ...]:
        return tuple(int(s) for s in self._starts[len(MODULES) : -1])

    @property
    def num_entries(self) -> int:
        """Chunks in one layer."""
        return int(self._starts[-1])

    @property
    def num_pages(self) -> int:
        return cdiv(self.num_entries, NUM_PLANES * PAGE_SIZE)

    @property
    def num_rows(self) -> int:
        """R of the module's docstring: rows in each plane."""
        return self.num_pages * PAGE_SIZE

    def pack(self, weights: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> np.ndarray:
        """Lays the weights out as the pool keeps them.

        Args:
          weights: by (layer, module): A ``[r, d_in]`` and B ``[d_out, r]``, where r may be less than the
            module's rank here. A layer may lack a module: it is zero there.
          dtype: the pool's dtype.

        Returns:
          ``[layers, 2, R, W]``: row j goes to row j of the adapter's pages, in page order.
        """
        width = self.pool.row_width
        entries = np.zeros((self.pool.num_layers, NUM_PLANES * self.num_rows, width), dtype)
        for (layer, module), (a, b) in weights.items():
            m = MODULES.index(module)
            for start, vectors in ((self.start_a[m], a), (self.start_b[m], b.T)):
                rank, length = vectors.shape
                chunks = cdiv(length, width)
                padded = np.zeros((rank, chunks * width), dtype)
                padded[:, :length] = vectors
                target = entries[layer, start : start + chunks * self.ranks[m]]
                target.reshape(chunks, self.ranks[m], width)[:, :rank] = padded.reshape(rank, chunks, width).swapaxes(
                    0, 1
                )
        return entries.reshape(self.pool.num_layers, NUM_PLANES, self.num_rows, width)
