"""Logits to tokens, on the device, each sequence by its own rules; see ``SamplingParams`` for the distribution."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from slora_jax.request import MAX_LOGPROBS
from slora_jax.scheduler.sequence import NOT_FINITE, ScheduledSequence, State


@dataclass(frozen=True, slots=True)
class SamplerShape:
    """Which work a step's sampler does: the compiled sampler's key. What nobody in the batch asked for is left out.

    Attributes:
      sequences: padded S.
      random: some sequence has a temperature above 0.
      filtered: some sequence has top_k, top_p or min_p, which need the vocabulary sorted.
      history: padded tokens of history that penalties count, 0 without penalties.
      logprobs: some sequence wants log-probabilities.
      limited: some sequence may not have every token.
      biased: padded number of tokens of a sequence whose logits are changed, 0 where no sequence has any.
    """

    sequences: int
    random: bool
    filtered: bool
    history: int
    logprobs: bool
    limited: bool = False
    biased: int = 0

    def pack(self, inputs: "SamplerInputs", vocab_size: int) -> np.ndarray:
        """The inputs as one int32 vector, which is sent to devices at once."""
        return np.concatenate([np.ravel(getattr(inputs, name)).view(np.int32) for name in self._fields(vocab_size)])

    def unpack(self, packed: jax.Array, vocab_size: int) -> "SamplerInputs":
        """The inputs of such a vector, inside jit."""
        arrays, begin = {}, 0
        for name, (columns, dtype) in self._fields(vocab_size).items():
            size = self.sequences * math.prod(columns)
            piece = packed[begin : begin + size].reshape(self.sequences, *columns)
            arrays[name] = jax.lax.bitcast_convert_type(piece, dtype)
            begin += size
        return SamplerInputs(**arrays)

    def packed_size(self, vocab_size: int) -> int:
        """Elements of such a vector."""
        return self.sequences * sum(math.prod(columns) for columns, _ in self._fields(vocab_size).values())

    def _fields(self, vocab_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Columns and dtype of each of ``SamplerInputs``."""
        fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: ((), np.dtype(dtype)) for name, (dtype, _) in _PADDING.items()
        }
        fields["seed"] = ((2,), np.dtype(np.uint32))
        return fields | {name: ((width,), np.dtype(dtype)) for name, (width, dtype) in self.widths(vocab_size).items()}

    def widths(self, vocab_size: int) -> dict[str, tuple[int, type[np.generic]]]:
        """Columns and dtype of those of ``SamplerInputs`` whose columns depend on the shape."""
        return {
            "history": (self.history, np.int32),
            "allowed": (-(-vocab_size // 32) if self.limited else 0, np.int32),
            "bias_tokens": (self.biased, np.int32),
            "bias": (self.biased, np.float32),
        }


@struct.dataclass
class SamplerInputs:
    """Per-sequence rules, ``[S]`` each.

    Attributes:
      row: int32 place in the batch of each sequence's last token.
      position: int32 number of tokens before the one sampled; with ``seed`` it makes the random draw.
      seed: ``[S, 2]`` uint32, high and low half.
      temperature, top_p, min_p, repetition, presence, frequency: float32.
      top_k: int32, 0 for all.
      history: ``[S, H]`` int32 prompt and output tokens, negative ones as in ``BatchShape.unpack``, padded with the
        vocabulary size; ``[S, 0]`` without penalties.
      num_prompt: int32 prompt tokens at the front of ``history``.
      allowed: ``[S, ceil(V / 32)]`` int32: bit ``t % 32`` of word ``t // 32`` is set if token t may come; ``[S, 0]``
        where all may.
      bias_tokens, bias: ``[S, B]`` int32, padded with the vocabulary size, and float32.
    """

    row: jax.Array | np.ndarray
    position: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition: jax.Array | np.ndarray
    presence: jax.Array | np.ndarray
    frequency: jax.Array | np.ndarray
    history: jax.Array | np.ndarray
    num_prompt: jax.Array | np.ndarray
    allowed: jax.Array | np.ndarray
    bias_tokens: jax.Array | np.ndarray
    bias: jax.Array | np.ndarray


@struct.dataclass
class Sampled:
    """What one step sampled. ``top_*`` and ``logprob`` are None unless asked for.

    Attributes:
      tokens: ``[N]`` int32, N the most sequences any step has, so that the next step's shape does not depend on S;
        ``NOT_FINITE`` where the logits were not finite.
      logprob: ``[S]`` float32 of the sampled token, before penalties and temperature.
      top_tokens, top_logprobs: ``[S, MAX_LOGPROBS]``, most likely first.
    """

    tokens: jax.Array
    logprob: jax.Array | None
    top_tokens: jax.Array | None
    top_logprobs: jax.Array | None


def build_sampler_inputs(
    entries: Seq[ScheduledSequence],
    pending_rows: dict[int, int],
    num_sequences: int,
    vocab_size: int,
) -> tuple[SamplerShape, SamplerInputs]:
    """Gathers the rules of the entries that sample, in row order, padded to ``num_sequences`` with greedy rows.

    Args:
      entries: in the order in which their tokens lie in the batch.
      pending_rows: as in ``build_batch``.
    """
    random = filtered = logprobs = limited = False
    longest = biased = 0
    last = None
    for sequence, _, _, samples, _ in entries:
        rule = sequence.sampling
        if not samples or (rule is last and not longest):
            continue
        last = rule
        if rule.temperature > 0:
            random = True
            filtered = filtered or rule.top_k > 0 or rule.top_p < 1 or rule.min_p > 0
        logprobs = logprobs or rule.logprobs is not None
        limited = limited or rule.limits_tokens
        biased = max(biased, len(rule.logit_bias))
        if rule.uses_penalties:
            longest = max(longest, sequence.num_tokens)
    shape = SamplerShape(
        sequences=num_sequences,
        random=random,
        filtered=filtered,
        history=1 << (longest - 1).bit_length() if longest else 0,
        logprobs=logprobs,
        limited=limited,
        biased=1 << (biased - 1).bit_length() if biased else 0,
    )
    arrays = {name: np.full(num_sequences, default, dtype) for name, (dtype, default) in _PADDING.items()}
    arrays["row"][: len(entries)] = np.cumsum([entry.count for entry in entries], dtype=np.int32) - 1
    arrays["seed"] = np.zeros((num_sequences, 2), np.uint32)
    nothing = {"history": vocab_size, "allowed": -1, "bias_tokens": vocab_size, "bias": 0}
    for name, (width, dtype) in shape.widths(vocab_size).items():
        arrays[name] = np.full((num_sequences, width), nothing[name], dtype)
    if shape.random:
        _fill_random(arrays, entries)
    if shape.history:
        _fill_penalties(arrays, entries, pending_rows)
    if limited:
        _fill_allowed(arrays["allowed"], entries)
    if biased:
        _fill_bias(arrays, entries)
    return shape, SamplerInputs(**arrays)


def allow_by_constraints(inputs: SamplerInputs, entries: Seq[ScheduledSequence]) -> None:
    """Writes what the entries' constraints allow into ``inputs.allowed``, for all that are known to go on.

    Args:
      inputs: of the entries, from ``build_sampler_inputs``.
      entries: in row order. All tokens before those that they sample are known to their constraints.
    """
    for row, entry in enumerate(entries):
        constraint = entry.sequence.constraint
        if entry.samples and constraint is not None and entry.sequence.state is not State.FINISHED:
            allowed = inputs.allowed[row]
            words = np.empty(allowed.shape, np.int32)
            constraint.allow(words)
            # A minimum of tokens holds beside it, until there is nothing but the end that could come.
            both = allowed & words
            allowed[:] = both if both.any() else words


# Fields that are one number a sequence, and what they hold for a greedy one.
_PADDING = {
    "row": (np.int32, 0),
    "position": (np.int32, 0),
    "top_k": (np.int32, 0),
    "num_prompt": (np.int32, 0),
    "temperature": (np.float32, 0),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 0),
    "repetition": (np.float32, 1),
    "presence": (np.float32, 0),
    "frequency": (np.float32, 0),
}


def _fill_random(arrays: dict[str, np.ndarray], entries: Seq[ScheduledSequence]) -> None:
    rows = [row for row, e in enumerate(entries) if e.samples]
    sampling = [entries[row].sequence.sampling for row in rows]
    arrays["position"][rows] = [entries[row].start + entries[row].count for row in rows]
    for name in ("temperature", "top_k", "top_p", "min_p"):
        arrays[name][rows] = list(map(attrgetter(name), sampling))
    seeds = np.array([entries[row].sequence.seed % 2**64 for row in rows], np.uint64)
    arrays["seed"][rows, 0] = seeds >> np.uint64(32)
    arrays["seed"][rows, 1] = seeds & np.uint64(2**32 - 1)


def _fill_penalties(
    arrays: dict[str, np.ndarray], entries: Seq[ScheduledSequence], pending_rows: dict[int, int]
) -> None:
    for row, entry in enumerate(entries):
        sequence, rule = entry.sequence, entry.sequence.sampling
        if not (entry.samples and rule.uses_penalties):
            continue
        arrays["repetition"][row] = rule.repetition_penalty
        arrays["presence"][row] = rule.presence_penalty
        arrays["frequency"][row] = rule.frequency_penalty
        arrays["num_prompt"][row] = sequence.num_prompt
        position = entry.start + entry.count
        known = sequence.tokens[:position]
        arrays["history"][row, : len(known)] = known
        if len(known) < position:
            arrays["history"][row, len(known)] = -1 - pending_rows[sequence.sequence_id]


def _fill_allowed(allowed: np.ndarray, entries: Seq[ScheduledSequence]) -> None:
    """What is known of each sequence without its tokens: the list of allowed ones, and the minimum of tokens."""
    for row, entry in enumerate(entries):
        sequence, rule = entry.sequence, entry.sequence.sampling
        if not entry.samples:
            continue
        if rule.allowed_token_ids is not None:
            allowed[row] = 0
            _set_bits(allowed[row], rule.allowed_token_ids, True)
        if entry.start + entry.count - sequence.num_prompt < rule.min_tokens:
            _set_bits(allowed[row], sequence.end_token_ids, False)


def _set_bits(words: np.ndarray, tokens: Iterable[int], value: bool) -> None:
    ids = np.fromiter(tokens, np.int64)
    ids = ids[ids < 32 * words.size]
    bits = words.view(np.uint32)
    one = np.uint32(1) << (ids % 32).astype(np.uint32)
    if value:
        np.bitwise_or.at(bits, ids // 32, one)
    else:
        np.bitwise_and.at(bits, ids // 32, ~one)


def _fill_bias(arrays: dict[str, np.ndarray], entries: Seq[ScheduledSequence]) -> None:
    for row, entry in enumerate(entries):
        bias = entry.sequence.sampling.logit_bias
        if entry.samples and bias:
            tokens, values = zip(*bias, strict=True)
            arrays["bias_tokens"][row, : len(bias)] = tokens
            arrays["bias"][row, : len(bias)] = values


def sample(
    logits: jax.Array, inputs: SamplerInputs, previous_tokens: jax.Array, shape: SamplerShape, num_tokens_out: int
) -> Sampled:
    """Samples one token a row.

    Args:
      logits: ``[S, V]`` float32.
      previous_tokens: ``[N]`` int32 of the previous step.
      num_tokens_out: N of ``Sampled.tokens``.
    """
    num_sequences, _ = logits.shape
    scores = logits
    if shape.history:
        scores = _penalize(scores, inputs, previous_tokens)
    if shape.biased:
        row = jnp.arange(num_sequences)[:, None]
        scores = scores.at[row, inputs.bias_tokens].add(inputs.bias, mode="drop")
    if shape.limited:
        bits = (inputs.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
        scores = jnp.where(bits.reshape(num_sequences, -1)[:, : scores.shape[1]] == 1, scores, -jnp.inf)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # NaN counts as the largest number there is, so the largest score tells of all.
    is_finite = jnp.isfinite(jnp.take_along_axis(scores, tokens[:, None], axis=1)[:, 0])
    if shape.random:
        drawn = _draw(scores, inputs, shape.filtered)
        tokens = jnp.where(inputs.temperature > 0, drawn, tokens)
    logprob = top_tokens = top_logprobs = None
    if shape.logprobs:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        logprob = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
        top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    tokens = jnp.where(is_finite, tokens, NOT_FINITE)
    return Sampled(jnp.pad(tokens, (0, num_tokens_out - num_sequences)), logprob, top_tokens, top_logprobs)


def _penalize(logits, inputs, previous_tokens):
    num_sequences = logits.shape[0]
    history = jnp.where(inputs.history < 0, previous_tokens[jnp.maximum(-1 - inputs.history, 0)], inputs.history)
    in_output = jnp.arange(history.shape[1]) >= inputs.num_prompt[:, None]
    row = jnp.arange(num_sequences)[:, None]
    none = jnp.zeros(logits.shape, jnp.float32)
    seen = none.at[row, history].add(1.0, mode="drop") > 0
    count = none.at[row, history].add(in_output.astype(jnp.float32), mode="drop")
    repeated = jnp.where(logits > 0, logits / inputs.repetition[:, None], logits * inputs.repetition[:, None])
    logits = jnp.where(seen, repeated, logits)
    return logits - inputs.presence[:, None] * (count > 0) - inputs.frequency[:, None] * count


def _draw(logits, inputs, filtered):
    """Gumbel-max draw. The noise depends on seed, position and token only: filters and batch do not shift it."""
    logits = logits / jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]

    def noise(seed, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (logits.shape[1],))

    gumbel = jax.vmap(noise)(inputs.seed, inputs.position)
    if not filtered:
        return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=1)
    place = jnp.arange(logits.shape[1])
    top_k = jnp.where(inputs.top_k > 0, inputs.top_k, logits.shape[1])[:, None]
    ranked = jnp.where(place < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = (before < inputs.top_p[:, None]) & (probability >= inputs.min_p[:, None] * probability[:, :1])
    # The most likely token always stays, whatever rounding says.
    ranked = jnp.where(keep | (place == 0), ranked, -jnp.inf)
    choice = jnp.argmax(ranked + jnp.take_along_axis(gumbel, order, axis=1), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=1)[:, 0].astype(jnp.int32)
