"""Log-probabilities of the tokens of prompts, which a step computes beside its own tokens where somebody wants them.

A step has hidden states of all its tokens, and needs logits of each sequence's last one alone. Logits of all of them,
in float32, would take gigabytes: 2 GB for 4,096 tokens and a vocabulary of 128,000. So a program of its own makes them
for ``MAX_ROWS`` tokens at a time, and keeps of each row the few numbers that are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from slora_jax.engine.core import PromptScores
from slora_jax.request import MAX_LOGPROBS, TokenLogprob
from slora_jax.scheduler.sequence import ScheduledSequence

MAX_ROWS = 128
"""Tokens whose logits exist at a time: enough for reading the head's weights not to be most of the time."""


@dataclass(frozen=True, slots=True)
class ScorerShape:
    """The compiled scorer's key.

    Attributes:
      rows: R, the tokens that one run of the program scores.
      top: how many of the most likely tokens are computed: 0, 1 or ``MAX_LOGPROBS``.
    """

    rows: int
    top: int


class ScorerArguments(NamedTuple):
    """Which of a step's tokens are scored, on every host alike.

    Attributes:
      shape: of the program.
      rows: ``[runs, R]`` int32: places in the batch. What stands there is what comes before the token that is scored.
      targets: ``[runs, R]`` int32: the tokens that are scored. Padding: 0 in both.
    """

    shape: ScorerShape
    rows: np.ndarray
    targets: np.ndarray


class Piece(NamedTuple):
    """A piece of one prompt: the tokens from position ``first`` on are scored, ``count`` of them.

    ``place`` is the sequence's in the plan's entries, and ``top`` how many of the most likely tokens it wants of each.
    """

    place: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a piece for
    top: int


@struct.dataclass
class Scores:
    """What one run of a scorer gives.

    Attributes:
      logprob: ``[R]`` float32 of the tokens.
      rank: ``[R]`` int32: 1 for the most likely token.
      top_tokens, top_logprobs: ``[R, top]``, most likely first.
    """

    logprob: jax.Array
    rank: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def plan_scores(
    entries: Sequence[ScheduledSequence], entry_of_row: np.ndarray, num_tokens: int
) -> tuple[ScorerArguments | None, tuple[Piece, ...]]:
    """Finds the prompt tokens that a step can score: those behind a token that the step computes.

    Args:
      entries: in the order in which their tokens lie in the batch.
      entry_of_row: ``[len(entries)]``, the place of each in the plan.
      num_tokens: padded T.

    Returns:
      What the programs take, None if nothing is scored; and whose tokens they are, in the same order.
    """
    # Of nearly all steps that is all there is to do.
    if all(entry.sequence.sampling.prompt_logprobs is None for entry in entries):
        return None, ()
    pieces: list[Piece] = []
    rows: list[np.ndarray] = []
    targets: list[int] = []
    begin = 0
    for (sequence, start, count, _, _), place in zip(entries, entry_of_row, strict=True):
        end = min(start + count, sequence.num_prompt - 1)
        top = sequence.sampling.prompt_logprobs
        if sequence.scores_prompt and top is not None and end > start:
            pieces.append(Piece(int(place), start + 1, end - start, top))
            rows.append(np.arange(begin, begin + end - start, dtype=np.int32))
            targets += sequence.tokens[start + 1 : end + 1]
        begin += count
    if not pieces:
        return None, ()
    most = max(piece.top for piece in pieces)
    shape = ScorerShape(min(num_tokens, MAX_ROWS), most if most <= 1 else MAX_LOGPROBS)

    def in_runs(values) -> np.ndarray:
        flat = np.asarray(values, np.int32)
        return np.pad(flat, (0, -len(flat) % shape.rows)).reshape(-1, shape.rows)

    return ScorerArguments(shape, in_runs(np.concatenate(rows)), in_runs(targets)), tuple(pieces)


def score(logits: jax.Array, targets: jax.Array, top: int) -> Scores:
    """Log-probabilities of tokens by the model's logits, before anything that a request asks of its own tokens.

    Args:
      logits: ``[R, V]`` float32.
      targets: ``[R]`` int32.
      top: as in ``ScorerShape``.
    """
    total = jax.nn.logsumexp(logits, axis=1)
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)
    rank = 1 + jnp.sum(logits > own, axis=1, dtype=jnp.int32)
    values, tokens = jax.lax.top_k(logits, min(top, logits.shape[1]))
    return Scores(own[:, 0] - total, rank, tokens, values - total[:, None])


def read_scores(arguments: ScorerArguments, pieces: Sequence[Piece], runs: Sequence[Scores]) -> dict[int, PromptScores]:
    """Waits for the runs of a scorer. Returns what they give each sequence, by its place in the plan's entries."""

    def joined(name: str) -> list:
        return np.concatenate([np.asarray(getattr(run, name)) for run in runs]).tolist()

    tokens = arguments.targets.reshape(-1).tolist()
    logprobs, ranks, tops, top_logprobs = map(joined, ("logprob", "rank", "top_tokens", "top_logprobs"))
    found, begin = {}, 0
    for place, first, count, top in pieces:
        scored = tuple(
            TokenLogprob(
                tokens[i], logprobs[i], tuple(zip(tops[i][:top], top_logprobs[i][:top], strict=True)), ranks[i]
            )
            for i in range(begin, begin + count)
        )
        found[place] = PromptScores(first, scored)
        begin += count
    return found
