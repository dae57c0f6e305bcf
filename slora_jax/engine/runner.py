"""Runs plans on the device: the one place that knows which functions are compiled and what stays on the device."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import choose_backend
from slora_jax.engine.batch import AdapterSlice, BatchShape, Buckets, build_batch
from slora_jax.engine.sampling import Sampled, SamplerInputs, SamplerShape, build_sampler_inputs, sample
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import Llama
from slora_jax.request import TokenLogprob
from slora_jax.scheduler.sequence import ScheduledSequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step the device is working on: its entries in row order, and its outputs when they are read."""

    entries: tuple[ScheduledSequence, ...]
    sampled: Sampled

    def read(self) -> tuple[np.ndarray, list[TokenLogprob | None]]:
        """Waits for the step.

        Returns:
          Sampled tokens ``[len(entries)]`` int32 (of no meaning where the entry does not sample), and for each entry
          its log-probabilities, or None where it asked for none.
        """
        tokens = np.asarray(self.sampled.tokens)[: len(self.entries)]
        logprobs: list[TokenLogprob | None] = [None] * len(self.entries)
        if self.sampled.logprob is not None:
            chosen, top_ids, top_values = (
                np.asarray(a) for a in (self.sampled.logprob, self.sampled.top_tokens, self.sampled.top_logprobs)
            )
            for row, entry in enumerate(self.entries):
                count = entry.sequence.sampling.logprobs
                if count is not None:
                    top = zip(top_ids[row, :count].tolist(), top_values[row, :count].tolist(), strict=True)
                    logprobs[row] = TokenLogprob(int(tokens[row]), float(chosen[row]), tuple(top))
        return tokens, logprobs


class Runner:
    """Runs batches of one model over one pool.

    The forward and the sampler are compiled apart: a new combination of sampling rules then compiles a sampler, not
    the layers again.

    Attributes:
      model, params: the base model.
    """

    def __init__(
        self, config: ModelConfig, params: dict, pool: UnifiedPool, buckets: Buckets, max_sequences: int, max_len: int
    ):
        dtype = pool.array.dtype
        self.model = Llama(config, dtype, choose_backend(jax.default_backend()))
        self.params = params
        self._pool = pool
        self._buckets = buckets
        self._vocab_size = config.vocab_size
        self._table_width = PoolLayout.token_pages(max_len)
        self._num_rows_out = buckets.size(max_sequences)
        self._tokens = jnp.zeros(self._num_rows_out, jnp.int32)
        self._rows: dict[int, int] = {}
        self._compiled: set[object] = set()

    def run(self, entries: tuple[ScheduledSequence, ...], adapters: Mapping[object, AdapterSlice]) -> StepInFlight:
        """Starts a step and returns at once.

        Args:
          entries: at least one; each of another sequence. Pending tokens are those of the previous ``run``.
          adapters: by ``sequence.adapter_key``: every adapter of the entries.
        """
        batch = build_batch(entries, dict(adapters), self._rows, self._buckets, self._table_width)
        last_tokens = np.cumsum([e.count for e in batch.entries]) - 1
        sampler_shape, sampler_inputs = build_sampler_inputs(
            batch.entries, last_tokens, self._rows, batch.shape.sequences, self._vocab_size
        )
        for shape in (batch.shape, sampler_shape):
            if shape not in self._compiled:
                self._compiled.add(shape)
                logger.debug("first step of shape %s: compiling or reading the compilation cache", shape)
        hidden, self._pool.array = _forward(
            self.params, batch.packed, self._tokens, self._pool.array, model=self.model, shape=batch.shape
        )
        sampled = _sample(
            self.params,
            hidden,
            sampler_inputs,
            self._tokens,
            model=self.model,
            shape=sampler_shape,
            num_tokens_out=self._num_rows_out,
        )
        self._tokens = sampled.tokens
        self._rows = {e.sequence.sequence_id: row for row, e in enumerate(batch.entries) if e.samples}
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return StepInFlight(batch.entries, sampled)


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames="pool")
def _forward(params, packed, previous_tokens, pool, *, model: Llama, shape: BatchShape):
    batch = shape.unpack(packed, previous_tokens)
    return model.apply({"params": params}, batch, pool)


@partial(jax.jit, static_argnames=("model", "shape", "num_tokens_out"))
def _sample(
    params, hidden, inputs: SamplerInputs, previous_tokens, *, model: Llama, shape: SamplerShape, num_tokens_out: int
) -> Sampled:
    logits = model.apply({"params": params}, hidden[inputs.last_token], method=Llama.logits)
    return sample(logits, inputs, previous_tokens, shape, num_tokens_out)
