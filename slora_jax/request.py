"""What goes into the engine and what comes out: values only, no behaviour of the engine.

A ``Request`` is tokens plus an adapter name plus ``SamplingParams``. The engine answers with a stream of
``Delta`` values, one per sequence and step, and at the end with a ``RequestOutput``.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from slora_jax.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most alternatives per token that ``SamplingParams.logprobs`` may ask for (OpenAI's limit)."""

MAX_N = 128
"""Most completions one request may ask for."""

FinishReason = Literal["stop", "length", "abort", "error", "late"]

MAX_PRIORITY = 1_000_000

MAX_SLO_MS = 86_400_000.0
"""A day."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose each next token.

    The distribution is made in this order: repetition, presence and frequency penalties on the logits;
    division by ``temperature``; ``top_k``; ``top_p``; ``min_p``. Log-probabilities are those of the model's
    logits before all of this.

    Attributes:
      max_tokens: most tokens to generate, >= 1.
      temperature: >= 0; 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
      min_p: drop tokens less likely than ``min_p`` times the most likely one, in [0, 1].
      repetition_penalty: > 0; logits of tokens in prompt or output are divided (if positive) or multiplied
        (if negative) by it (CTRL, arXiv 1909.05858).
      presence_penalty: in [-2, 2], subtracted once from logits of tokens already generated.
      frequency_penalty: in [-2, 2], subtracted once per occurrence among the tokens generated.
      seed: 64-bit; the same seed, prompt and adapter give the same tokens whatever else is in the batch.
        None draws one.
      logprobs: None for none; k returns the chosen token's log-probability and the k most likely.
      stop: texts that end the completion; the text returned ends before the match.
      stop_token_ids: token ids that end the completion; like EOS, they are not part of the text.
      ignore_eos: go on after the model's end-of-sequence token.
      n: completions for this prompt; completion i uses ``seed + i``.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self):
        for name, as_tuple in (("stop", self.stop), ("stop_token_ids", self.stop_token_ids)):
            if isinstance(as_tuple, str):
                object.__setattr__(self, name, (as_tuple,))
            elif not isinstance(as_tuple, tuple):
                object.__setattr__(self, name, tuple(as_tuple))
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequest(f"stop must be non-empty strings, got {self.stop!r}", "stop")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, None)
        _check_int("n", self.n, 1, MAX_N)

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def replace(self, **changes) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


def _check_int(name: str, value, low: int | None, high: int | None):
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {value!r}", name)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {bounds}, got {value}", name)


def _check_float(name: str, value, low: float, high: float, open_low: bool = False):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", name)
    if value > high or value < low or (open_low and value == low):
        raise InvalidRequest(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value:g}", name)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one adapter.

    Attributes:
      prompt: token ids, at least one.
      adapter: a registered adapter's name, or None for the base model.
      sampling: how to sample.
      request_id: the caller's own name for it; shown in logs and outputs.
      priority: under the policy ``priority``, higher goes first; within ±``MAX_PRIORITY``.
      slo_ms: under the policy ``abort``, milliseconds within which the first token is due; None for the server's.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    priority: int = 0
    slo_ms: float | None = None

    def __post_init__(self):
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.slo_ms is not None:
            _check_float("slo_ms", self.slo_ms, 0.0, MAX_SLO_MS, open_low=True)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one generated token, and of the most likely ones at that place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delta(NamedTuple):
    """What one engine step added to one sequence of a request.

    ``text`` may be empty while a multi-byte character or a possible stop string is incomplete, and may cover
    tokens of earlier deltas. ``token_ids`` are exact. ``finish_reason`` is set on the last delta only;
    ``error`` says why when it is "error", "abort" or "late" (given up before the first token, which could not have
    come within its objective).
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sequence of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All sequences of a request, in index order.

    ``cached_tokens`` counts the prompt tokens whose KV came from the prefix cache (first sequence).
    """

    request_id: str
    adapter: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    cached_tokens: int = 0
