"""Which part of a model each of N devices holds: tensor parallelism as in Megatron-LM (arXiv 1909.08053).

The devices share out attention heads, the MLP's inner dimension and the vocabulary; hidden states are whole everywhere.
Heads go by KV head, with the query heads that read it. Where there are more devices than KV heads, several devices
keep the same KV head and share out its query heads. Where the numbers do not divide, the last places are empty: their
weights are zeros, so every device runs the same program.

No JAX: the pool's layout asks here too.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from slora_jax.errors import InvalidRequest
from slora_jax.model.config import ModelConfig

Run = tuple[int | None, int]
"""Consecutive elements of a whole dimension, first and how many; or, with None, so many zeros."""


@dataclass(frozen=True)
class Shards:
    """One model on ``count`` devices.

    Raises:
      InvalidRequest: it cannot be shared out so; the message says what can.
    """

    model: ModelConfig
    count: int = 1

    def __post_init__(self):
        if not self._divides(self.count):
            model = self.model
            allowed = [str(n) for n in range(1, model.num_heads + 1) if self._divides(n)]
            raise InvalidRequest(
                f"this model cannot be shared by {self.count} devices: their number must divide hidden_size "
                f"({model.hidden_size}) and intermediate_size ({model.intermediate_size}), with a query head of the "
                f"{model.num_heads} for each; choose tp from {', '.join(allowed)}",
                param="tp",
            )

    def _divides(self, count: int) -> bool:
        model = self.model
        return 1 <= count <= model.num_heads and not (model.hidden_size % count or model.intermediate_size % count)

    @property
    def _replicas(self) -> int:
        """Devices that keep the same KV head."""
        return max(1, self.count // self.model.num_kv_heads)

    @cached_property
    def local(self) -> ModelConfig:
        """What one device computes, as a model's shape; hidden states keep their width."""
        model = self.model
        kv_heads = -(-model.num_kv_heads // self.count)
        queries = -(-model.num_heads // model.num_kv_heads // self._replicas)
        return dataclasses.replace(
            model,
            vocab_size=-(-model.vocab_size // self.count),
            intermediate_size=model.intermediate_size // self.count,
            num_heads=kv_heads * queries,
            num_kv_heads=kv_heads,
        )

    @property
    def hidden_slice(self) -> int:
        """Columns of the hidden states for which one device multiplies low-rank updates."""
        return self.model.hidden_size // self.count

    @property
    def num_idle(self) -> int:
        """Devices without a query head."""
        return sum(all(first is None for first, _ in self.query(i)) for i in range(self.count))

    def query(self, shard: int) -> tuple[Run, ...]:
        """The columns of q, or rows of o, of one device."""
        model, local = self.model, self.local
        group, group_here = model.num_heads // model.num_kv_heads, local.num_heads // local.num_kv_heads
        part = shard % self._replicas * group_here
        count = max(0, min(group_here, group - part))
        runs = []
        for head in self._kv_heads(shard):
            found = 0 if head is None else count
            first = None if head is None or not found else head * group + part
            runs += [_heads(first, found, model.head_dim), _heads(None, group_here - found, model.head_dim)]
        return joined_runs(runs)

    def key_value(self, shard: int) -> tuple[Run, ...]:
        """The columns of k, or of v, of one device."""
        return joined_runs([_heads(head, 1, self.model.head_dim) for head in self._kv_heads(shard)])

    def ffn(self, shard: int) -> tuple[Run, ...]:
        """The columns of gate, or of up, or rows of down, of one device."""
        size = self.local.intermediate_size
        return ((shard * size, size),)

    def hidden(self, shard: int) -> tuple[Run, ...]:
        """Columns of the hidden states; see ``hidden_slice``."""
        return ((shard * self.hidden_slice, self.hidden_slice),)

    def vocabulary(self, shard: int) -> tuple[Run, ...]:
        """Rows of the embedding, or columns of the output projection, of one device."""
        size = self.local.vocab_size
        first = shard * size
        found = max(0, min(size, self.model.vocab_size - first))
        return joined_runs([(first, found), (None, size - found)])

    def _kv_heads(self, shard: int) -> list[int | None]:
        each = self.local.num_kv_heads
        first = shard // self._replicas * each
        return [head if head < self.model.num_kv_heads else None for head in range(first, first + each)]


def _heads(first: int | None, count: int, head_dim: int) -> Run:
    return (None if first is None else first * head_dim, count * head_dim)


def joined_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same elements in as few runs as possible."""
    joined: list[Run] = []
    for first, count in runs:
        if not count:
            continue
        if joined:
            last, length = joined[-1]
            if (last is None and first is None) or (last is not None and first == last + length):
                joined[-1] = (last, length + count)
                continue
        joined.append((first, count))
    return tuple(joined)
