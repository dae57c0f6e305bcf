"""What goes into the engine and what comes out: values only, no behaviour of the engine.

A ``Request`` is tokens plus an adapter name plus ``SamplingParams``. The engine answers with a stream of
``Delta`` values, one per sequence and step, and at the end with a ``RequestOutput``.
"""

import dataclasses
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from slora_jax.errors import InvalidRequest, shown

MAX_LOGPROBS = 20
"""Most alternatives per token that ``SamplingParams.logprobs`` may ask for (OpenAI's limit)."""

MAX_N = 128
"""Most completions one request may ask for."""

MAX_STOPS = 128
"""Most stop strings, and most stop token ids, of one request."""

MAX_STOP_LENGTH = 256
"""Most characters of one stop string. So many as there may be of this length are compiled in 40 ms."""

MIN_TEMPERATURE = 1e-4
"""Sampling at a lower temperature is greedy. A gap of 0.01 between two logits is then worth a factor of e^100."""

FinishReason = Literal["stop", "length", "abort", "error", "late"]

MAX_GRAMMAR_BYTES = 64 * 2**10
"""Most bytes of a grammar as UTF-8. Schemas of this size compile in a tenth of a second."""

MAX_BAD_WORDS = 100
"""Most words that one request may forbid."""

MAX_BIASED_TOKENS = 300
"""Most tokens whose logits one request may change (OpenAI's limit)."""

GrammarKind = Literal["json_schema", "regex", "lark", "choice"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, from its first character to its last.

    Attributes:
      kind: of ``text``: a JSON schema (``{"type": "object"}`` for any object), a regular expression, a context-free
        grammar in Lark's notation, or a JSON list of the texts that may be answered.
      text: at most ``MAX_GRAMMAR_BYTES`` as UTF-8. Whether it is valid is known when it is compiled.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self):
        if self.kind not in get_args(GrammarKind):
            raise InvalidRequest(f"a grammar is one of {', '.join(get_args(GrammarKind))}, got {shown(self.kind)}")
        if not isinstance(self.text, str) or has_lone_surrogate(self.text):
            raise InvalidRequest(f"a grammar must be text in valid Unicode, got {shown(self.text)}")
        if (size := len(self.text.encode())) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"a grammar may have {MAX_GRAMMAR_BYTES} bytes, got {size}; send a smaller one")


MAX_PRIORITY = 1_000_000

MAX_SLO_MS = 86_400_000.0
"""A day."""

_INT32_MAX = 2**31 - 1


class Bounds(NamedTuple):
    """What a number may be that a client or a caller sends.

    Attributes:
      kind: ``int``, or ``float`` for any finite number.
      least, most: inclusive.
      why: where the number goes, and so why no others are allowed.
      above_least: ``least`` itself is not allowed.
    """

    kind: type[int] | type[float]
    least: float
    most: float
    why: str
    above_least: bool = False

    def __str__(self) -> str:
        what = "an integer" if self.kind is int else "a number"
        if self.above_least:
            return f"{what} above {self.least} and at most {self.most}"
        return f"{what} from {self.least} to {self.most}"

    def allow(self, value: Any) -> bool:
        """Whether ``value`` is of the kind (booleans are no numbers) and within the bounds (NaN never is)."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        return self.least <= value <= self.most and not (self.above_least and value == self.least)


BOUNDS = {
    "max_tokens": Bounds(int, 0, _INT32_MAX, "positions are int32"),
    "temperature": Bounds(float, 0.0, 100.0, "float32; logits are divided by it, if it is at least MIN_TEMPERATURE"),
    "top_k": Bounds(int, 0, _INT32_MAX, "int32; more than the vocabulary has means all of it"),
    "top_p": Bounds(float, 0.0, 1.0, "float32 probability", above_least=True),
    "min_p": Bounds(float, 0.0, 1.0, "float32 probability"),
    "repetition_penalty": Bounds(
        float, 0.01, 100.0, "float32; logits are divided or multiplied by it, and stay finite"
    ),
    "presence_penalty": Bounds(float, -2.0, 2.0, "float32, OpenAI's range"),
    "frequency_penalty": Bounds(float, -2.0, 2.0, "float32, OpenAI's range; counted for each of the tokens"),
    "seed": Bounds(int, -(2**63), 2**64 - 1, "two uint32 of a key: any integer of 64 bits, signed or not"),
    "logprobs": Bounds(int, 0, MAX_LOGPROBS, "so many are computed in every step that asks for any"),
    "prompt_logprobs": Bounds(int, 0, MAX_LOGPROBS, "as for logprobs"),
    "stop_token_ids": Bounds(int, 0, _INT32_MAX, "token ids are int32"),
    "n": Bounds(int, 1, MAX_N, "each is a sequence of its own"),
    "min_tokens": Bounds(int, 0, _INT32_MAX, "positions are int32"),
    "allowed_token_ids": Bounds(int, 0, _INT32_MAX, "token ids are int32"),
    "logit_bias": Bounds(float, -100.0, 100.0, "float32, OpenAI's range; added to logits"),
    "prompt": Bounds(int, -(2**31), _INT32_MAX, "token ids are int32; the engine knows its vocabulary"),
    "priority": Bounds(int, -MAX_PRIORITY, MAX_PRIORITY, "an order, so there is no use for more"),
    "slo_ms": Bounds(float, 0.0, MAX_SLO_MS, "a time to wait", above_least=True),
}
"""Every number of ``SamplingParams`` and ``Request``: the one place that says what may go into the engine's arrays."""

ANSWER_TOKENS = BOUNDS["max_tokens"]._replace(least=1)
"""Of ``max_tokens`` where there must be an answer: in a chat, and as what a model's own configuration says."""


def check_number(name: str, value: Any, bounds: Bounds | None = None) -> None:
    """Checks a number by ``BOUNDS[name]``, or by the ``bounds`` given for it.

    Raises:
      InvalidRequest: it is of another kind or out of bounds; ``param`` is ``name``.
    """
    bounds = bounds or BOUNDS[name]
    if not bounds.allow(value):
        raise InvalidRequest(f"{name} must be {bounds}, got {shown(value)}", name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose each next token.

    The distribution is made in this order: repetition, presence and frequency penalties on the logits;
    division by ``temperature``; ``top_k``; ``top_p``; ``min_p``. Log-probabilities are those of the model's
    logits before all of this. ``BOUNDS`` says which numbers are allowed; others raise ``InvalidRequest``.

    Attributes:
      max_tokens: most tokens to generate; fewer where the context ends before. 0 only reads the prompt, for
        ``prompt_logprobs``, and the prompt may then fill the context.
      temperature: in [0, 100]; 0 is greedy, and so is, and becomes 0, what is below ``MIN_TEMPERATURE``.
      top_k: keep the k most likely tokens; 0, and any number above the vocabulary's, keeps all.
      top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
      min_p: drop tokens less likely than ``min_p`` times the most likely one, in [0, 1].
      repetition_penalty: in [0.01, 100]; logits of tokens in prompt or output are divided (if positive) or
        multiplied (if negative) by it (CTRL, arXiv 1909.05858).
      presence_penalty: in [-2, 2], subtracted once from logits of tokens already generated.
      frequency_penalty: in [-2, 2], subtracted once per occurrence among the tokens generated.
      seed: any integer of 64 bits, signed or not (-1 and 2**64 - 1 are one seed); the same seed, prompt and adapter
        give the same tokens whatever else is in the batch. None draws one.
      logprobs: None for none; k returns the chosen token's log-probability and the k most likely.
      prompt_logprobs: the same for every token of the prompt but the first; see ``RequestOutput.prompt_logprobs``.
      stop: at most ``MAX_STOPS`` texts that end the completion; the text returned ends before the match.
      stop_token_ids: at most ``MAX_STOPS`` token ids that end the completion; like EOS, they are not part of the text.
      ignore_eos: go on after the model's end-of-sequence token.
      n: completions for this prompt; completion i uses ``seed + i``.
      min_tokens: tokens that end the completion cannot come before so many others, unless a grammar has nothing else;
        at most ``max_tokens``.
      logit_bias: pairs of a token id and what is added to its logit, after the penalties; at most
        ``MAX_BIASED_TOKENS``.
      allowed_token_ids: only these can come; None for all.
      bad_words: at most ``MAX_BAD_WORDS`` texts that must not come, spelt as the tokenizer spells them, at the answer's
        beginning or after a space.
      grammar: what the text must look like. The completion ends where it is complete and nothing can follow.
      skip_special_tokens: leave the tokens out of the text that mark structure (roles of a chat, say).
      include_stop_str_in_output: the text ends with the stop string that was found, not ahead of it.
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
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "bad_words", _as_tuple("bad_words", self.bad_words, MAX_BAD_WORDS))
        object.__setattr__(self, "logit_bias", _as_pairs(self.logit_bias))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids, None))
        for name in _SAMPLING_NUMBERS:
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs", "prompt_logprobs"):
                check_number(name, value)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        for text in self.stop:
            _check_text("stop", text)
        for text in self.bad_words:
            _check_text("bad_words", text)
        for token in self.stop_token_ids:
            check_number("stop_token_ids", token)
        self._check_choice_of_tokens()
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} must be true or false, got {shown(getattr(self, name))}", name)

    def _check_choice_of_tokens(self) -> None:
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) must be at most max_tokens ({self.max_tokens})"
            raise InvalidRequest(message, "min_tokens")
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            message = f"logit_bias may name {MAX_BIASED_TOKENS} tokens, got {len(self.logit_bias)}; name fewer"
            raise InvalidRequest(message, "logit_bias")
        for token, bias in self.logit_bias:
            check_number("logit_bias", token, BOUNDS["stop_token_ids"])
            check_number("logit_bias", bias)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must name at least one token, got none", "allowed_token_ids")
            for token in self.allowed_token_ids:
                check_number("allowed_token_ids", token)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequest(f"grammar must be a Grammar or None, got {shown(self.grammar)}", "grammar")
        if self.grammar is not None and self.allowed_token_ids is not None:
            message = "allowed_token_ids and a grammar can leave no token that may come; send one of them"
            raise InvalidRequest(message, "allowed_token_ids")
        if self.bad_words and (self.grammar is not None or self.allowed_token_ids is not None):
            other = "a grammar" if self.grammar is not None else "allowed_token_ids"
            message = f"bad_words and {other} can leave no token that may come; send one of them"
            raise InvalidRequest(message, "bad_words")

    @property
    def limits_tokens(self) -> bool:
        """Whether some tokens cannot come, at least at first."""
        is_limited = self.grammar is not None or self.allowed_token_ids is not None
        return is_limited or bool(self.bad_words) or self.min_tokens > 0

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def replace(self, **changes) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


_OF_EACH = ("stop_token_ids", "allowed_token_ids", "logit_bias")
_SAMPLING_NUMBERS = tuple(name for name in SamplingParams.__slots__ if name in BOUNDS and name not in _OF_EACH)


def _as_pairs(bias: Any) -> tuple[tuple[Any, Any], ...]:
    """``logit_bias`` as pairs, from them or from a mapping."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        return tuple((token, value) for token, value in pairs)
    except (TypeError, ValueError):
        message = f"logit_bias must hold pairs of a token id and a number, got {shown(bias)}"
        raise InvalidRequest(message, "logit_bias") from None


def _as_tuple(name: str, value: Any, most: int | None = MAX_STOPS) -> tuple:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequest(f"{name} must be a list, got {shown(value)}", name)
    values = tuple(value)
    if most is not None and len(values) > most:
        raise InvalidRequest(f"{name} may have at most {most} entries, got {len(values)}", name)
    return values


def _check_text(name: str, text: Any) -> None:
    """Raises InvalidRequest unless it can be a part of an answer."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
        raise InvalidRequest(f"{name} must be texts of 1 to {MAX_STOP_LENGTH} characters, got {shown(text)}", name)
    if has_lone_surrogate(text):
        raise InvalidRequest(f"{name}: {shown(text)} is not valid Unicode, so no answer can contain it", name)


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds half of a character, which no tokenizer takes and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


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
        _check_prompt(self.prompt)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InvalidRequest(f"adapter must be a name or None, got {shown(self.adapter)}", "adapter")
        check_number("priority", self.priority)
        if self.slo_ms is not None:
            check_number("slo_ms", self.slo_ms)


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, (str, bytes, bytearray)):
        raise InvalidRequest(f"prompt must be token ids, got text: {shown(prompt)}; encode it first", "prompt")
    try:
        array("i", prompt)
    except (TypeError, OverflowError):
        message = f"prompt must be token ids, each {BOUNDS['prompt']}, got {shown(prompt)}"
        raise InvalidRequest(message, "prompt") from None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one token, and of the most likely ones at that place, as pairs with their ids.

    ``rank`` is 1 for the most likely token of the vocabulary; known of prompts' tokens only.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class Delta(NamedTuple):
    """What one engine step added to one sequence of a request.

    ``text`` may be empty while a multi-byte character or a possible stop string is incomplete, and may cover
    tokens of earlier deltas. ``token_ids`` are exact. ``finish_reason`` is set on the last delta only;
    ``error`` says why when it is "error", "abort" or "late" (given up before the first token, which could not have
    come within its objective).
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a delta for
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
    ``prompt_logprobs`` has an entry for every token of the prompt, None for the first, which nothing comes before. It
    is None as a whole unless it was asked for, or if the request ended before its prompt was read.
    """

    request_id: str
    adapter: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
