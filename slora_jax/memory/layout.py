"""How many bytes, rows and pages things cost in the unified pool, and which row holds what.

Only this module knows the arithmetic. No JAX: the scheduler prices requests with it.

The pool is one array ``[layers, 2, rows, W]`` with ``W = kv_heads * head_dim``, rows grouped in pages of
``PAGE_SIZE``. A token takes one row in both planes (plane 0: its K, plane 1: its V) of every layer. With K and V in
float8 it takes W bytes of one, so that a row holds 2 tokens in a pool of 16-bit elements and 4 in one of 32-bit
elements, one's bytes after the other's; adapters stay what they are.

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

With N devices (paper, section 6; see ``slora_jax.model.shards``) each has such a pool of its own KV heads, its rows W
wide, and all use the same page numbers and the same list, which holds one device's part of the adapter::

    module              rows of A in the list           columns of a row    rows of B in the list    length of each
    q, k, v, gate, up   ⌈rank / N⌉: i, i + N, i + 2N …   all of d_in         rank                     the device's d_out
    o, down             rank                            the device's d_in   rank                     d_out / N

on device i; with a rank that N does not divide, the last row is zeros on some devices. Stand ``rank_a`` for the number
of rows of A, the chunk of A has index ``start_a + c * rank_a + i``. The array over all devices is
``[layers, 2, rows, N * W]``: the devices' rows side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from slora_jax.config import PAGE_SIZE
from slora_jax.errors import InvalidRequest
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES, ROW_PARALLEL, ModuleShape, local_shapes, module_shapes, split_ranks
from slora_jax.model.shards import Run, Shards

NUM_PLANES = 2


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class PoolLayout:
    """Costs in the pool of one base model.

    Attributes:
      num_layers: of the model.
      row_width: W, of one device.
      shapes: width of every projection of the whole model.
      shards: how devices share the model.
      tokens_per_row: tokens whose K lie in one row: 1, or the bytes of the pool's elements where K and V are float8.
    """

    num_layers: int
    row_width: int
    shapes: Mapping[str, ModuleShape]
    shards: Shards
    tokens_per_row: int = 1

    @classmethod
    def for_model(cls, model: ModelConfig, num_shards: int = 1, tokens_per_row: int = 1) -> "PoolLayout":
        """
        Raises:
          InvalidRequest: so many devices cannot share the model, or so many tokens of it a row.
        """
        shards = Shards(model, num_shards)
        width = shards.local.kv_size
        if width % tokens_per_row:
            raise InvalidRequest(
                f"the K of a token has {width} elements on each device, which float8 cannot put into whole elements of "
                f"{tokens_per_row} bytes; leave kv_cache_dtype out"
            )
        return cls(model.num_layers, width, module_shapes(model), shards, tokens_per_row)

    @cached_property
    def local_shapes(self) -> Mapping[str, ModuleShape]:
        return local_shapes(self.shards)

    def page_bytes(self, itemsize: int) -> int:
        """Bytes of one page on one device, over all layers and both planes, at ``itemsize`` bytes an element."""
        return self.num_layers * NUM_PLANES * PAGE_SIZE * self.row_width * itemsize

    def pool_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """``[layers, 2, rows, N * W]``."""
        return (self.num_layers, NUM_PLANES, num_pages * PAGE_SIZE, self.shards.count * self.row_width)

    @property
    def page_tokens(self) -> int:
        """Tokens whose KV a page holds."""
        return PAGE_SIZE * self.tokens_per_row

    def token_pages(self, num_tokens: int) -> int:
        """Pages that hold the KV of ``num_tokens`` tokens of one sequence."""
        return cdiv(num_tokens, self.page_tokens)

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
    def _ranks_a(self) -> tuple[int, ...]:
        count = self.pool.shards.count
        return tuple(
            rank if module in ROW_PARALLEL else split_ranks(rank, count)
            for module, rank in zip(MODULES, self.ranks, strict=True)
        )

    @cached_property
    def _starts(self) -> np.ndarray:
        widths = np.array([[s.d_in, s.d_out] for s in (self.pool.local_shapes[m] for m in MODULES)])
        chunks = -(-widths // self.pool.row_width) * np.array([self._ranks_a, self.ranks]).T
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

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """``[layers, 2, R, N * W]``."""
        return self.pool.pool_shape(self.num_pages)

    def pack(self, weights: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> np.ndarray:
        """Lays the weights out as the pool keeps them.

        Args:
          weights: by (layer, module): A ``[r, d_in]`` and B ``[d_out, r]``, where r may be less than the
            module's rank here. A layer may lack a module: it is zero there.
          dtype: the pool's dtype.

        Returns:
          ``[layers, 2, R, N * W]``: row j goes to row j of the adapter's pages, in page order.
        """
        width, count = self.pool.row_width, self.pool.shards.count
        entries = np.zeros((self.pool.num_layers, NUM_PLANES * self.num_rows, count, width), dtype)
        for (layer, module), (a, b) in weights.items():
            m = MODULES.index(module)
            for shard in range(count):
                for start, rank, vectors in (
                    (self.start_a[m], self._ranks_a[m], self._part_of_a(module, a, shard)),
                    (self.start_b[m], self.ranks[m], _taken(b.T, self._output_runs(module, shard))),
                ):
                    found, length = vectors.shape
                    chunks = cdiv(length, width)
                    padded = np.zeros((found, chunks * width), dtype)
                    padded[:, :length] = vectors
                    target = entries[layer, start : start + chunks * rank, shard].reshape(chunks, rank, width)
                    target[:, :found] = padded.reshape(found, chunks, width).swapaxes(0, 1)
        return entries.reshape(self.packed_shape)

    def _part_of_a(self, module: str, a: np.ndarray, shard: int) -> np.ndarray:
        shards = self.pool.shards
        if module in ROW_PARALLEL:
            return _taken(a, shards.query(shard) if module == "o" else shards.ffn(shard))
        return a[shard :: shards.count]

    def _output_runs(self, module: str, shard: int) -> tuple[Run, ...]:
        shards = self.pool.shards
        if module in ROW_PARALLEL:
            return shards.hidden(shard)
        if module in ("k", "v"):
            return shards.key_value(shard)
        return shards.query(shard) if module == "q" else shards.ffn(shard)


def _taken(vectors: np.ndarray, runs: tuple[Run, ...]) -> np.ndarray:
    """Columns in the order of ``runs``."""
    parts = [
        np.zeros((len(vectors), count), vectors.dtype) if first is None else vectors[:, first : first + count]
        for first, count in runs
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
