"""Answers that must have a given form: grammars over text, as rules for the next token.

By `llguidance <https://github.com/guidance-ai/llguidance>`_, which walks through a grammar and the vocabulary at once
and says in some 50 µs which tokens may come next.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from typing import cast

import llguidance
import llguidance.numpy
import numpy as np

from slora_jax.errors import InvalidRequest, UnsupportedModel, shown
from slora_jax.request import Grammar
from slora_jax.text.tokenizer import Tokenizer

_MAX_CHOICES = 1000
_JSON_SPACE = r"\n? {0,16}"
"""Between the parts of JSON: an indented line, and no more, or some models write nothing else for ever."""


class Grammars:
    """Makes constraints of grammars for one tokenizer; safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Iterable[int]):
        """
        Args:
          tokenizer: whose tokens the answers are made of.
          vocab_size: tokens of the model, which may have more than the tokenizer; those never come.
          end_token_ids: the tokens any of which may end an answer that is complete.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(end_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None

    def constraint(self, grammar: Grammar) -> "GrammarConstraint":
        """Compiles a grammar, for one answer.

        Raises:
          InvalidRequest: it is not valid, or asks for what cannot be done; the message says where.
        """
        matcher = llguidance.LLMatcher(self._words(), _compiled(grammar), log_level=0)
        if error := matcher.get_error():
            raise _invalid(grammar, error)
        return GrammarConstraint(matcher)

    def _words(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance has it: a second of work for 100,000 tokens, so done when first needed."""
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = llguidance.LLTokenizer(
                        self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._ends or None
                    )
                except Exception as e:
                    raise UnsupportedModel(f"this tokenizer cannot be constrained by a grammar: {e}") from None
            return self._vocabulary


class GrammarConstraint:
    """What one answer may go on with. For one thread at a time."""

    def __init__(self, matcher: "llguidance.LLMatcher"):
        self._matcher = matcher

    def copy(self) -> "GrammarConstraint":
        """One in the same state, for another answer."""
        return GrammarConstraint(self._matcher.deep_copy())

    def accept(self, token: int) -> bool:
        """Takes the next token of the answer; returns whether none can follow.

        Raises:
          RuntimeError: the grammar does not allow the token, or cannot go on from it.
        """
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} does not fit the grammar: {self._matcher.get_error()}")
        return self._matcher.is_stopped()

    def allow(self, words: np.ndarray) -> None:
        """Writes which tokens may come next: bit ``t % 32`` of int32 word ``t // 32`` is set for token t."""
        mask = words.reshape(1, -1)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask, 0)
        if error := self._matcher.get_error():
            raise RuntimeError(f"the grammar cannot go on: {error}")


def _compiled(grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    try:
        match grammar.kind:
            case "json_schema":
                return llguidance.LLMatcher.grammar_from_json_schema(
                    _schema(grammar), defaults={"whitespace_pattern": _JSON_SPACE}
                )
            case "regex":
                return llguidance.LLMatcher.grammar_from_regex(grammar.text)
            case "lark":
                return llguidance.LLMatcher.grammar_from_lark(grammar.text)
            case "choice":
                texts = " | ".join(json.dumps(text) for text in _choices(grammar))
                return llguidance.LLMatcher.grammar_from_lark(f"start: {texts}")
    except ValueError as e:
        raise _invalid(grammar, str(e)) from None


def _schema(grammar: Grammar) -> dict:
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):
        raise _invalid(grammar, "it is not valid JSON") from None
    if not isinstance(schema, dict):
        raise _invalid(grammar, f"it must be a JSON object, got {shown(schema)}")
    return schema


def _choices(grammar: Grammar) -> Sequence[str]:
    try:
        choices = json.loads(grammar.text)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise _invalid(grammar, "it must be a JSON list of texts that are not empty")
    if len(choices) > _MAX_CHOICES:
        raise _invalid(grammar, f"it may have {_MAX_CHOICES} texts, got {len(choices)}")
    return cast(Sequence[str], choices)


def _invalid(grammar: Grammar, reason: str) -> InvalidRequest:
    said = " ".join(reason.split())[:300]
    return InvalidRequest(f"the {grammar.kind.replace('_', ' ')} cannot be used: {said}", "grammar")
