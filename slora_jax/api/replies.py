"""Answers in the shapes of OpenAI's JSON, whole or as the chunks of a stream."""

import dataclasses
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from slora_jax.api.deltas import GenerationFailed
from slora_jax.api.openai import Call
from slora_jax.api.tools import CallReader, ToolCall
from slora_jax.request import Completion, Delta, RequestOutput, TokenLogprob
from slora_jax.text.tokenizer import IncrementalDecoder, Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class Reply:
    """Writes one answer in OpenAI's shape: ``whole``, or the events of a stream in the order ``opening``,
    ``events`` for each delta, ``closing``; or ``failure``, where it ends too early.

    Attributes:
      id: of the answer.
      last_words: what a stream ends with, behind its events.
      depth: of its longest lists: how many lists and objects are around them.

    Choices are numbered over prompts, then completions: ``prompt_index * n + completion_index``.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    last_words: ClassVar[bytes] = b"data: [DONE]\n\n"
    depth: ClassVar[int] = 4  # choices, choice, logprobs, tokens

    def __init__(self, call: Call, tokenizer: Tokenizer | None):
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._call = call
        self._tokenizer = tokenizer
        self._head = {"id": self.id, "created": int(time.time()), "model": call.model}
        self._stream_usage = {"usage": None} if call.include_usage else {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        n = self._call.n
        choices = [
            self._whole_choice(i * n + completion.index, i, completion, output)
            for i, output in enumerate(outputs)
            for completion in self._sent_back(output)
        ]
        usage = _usage(
            sum(len(o.prompt_token_ids) for o in outputs),
            sum(len(c.token_ids) for o in outputs for c in o.completions),
            sum(o.cached_tokens for o in outputs),
        )
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def _sent_back(self, output: RequestOutput) -> Sequence[Completion]:
        if (best := self._call.best) is None:
            return output.completions
        likeliest = sorted(output.completions, key=_mean_logprob, reverse=True)[: best.n]
        shows = best.logprobs is not None
        return [
            dataclasses.replace(completion, index=place, logprobs=completion.logprobs if shows else None)
            for place, completion in enumerate(likeliest)
        ]

    def opening(self) -> list[dict[str, Any]]:
        """What every choice begins with, before its first token."""
        return []

    def events(self, prompt_index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta of one choice adds; nothing if there is nothing to say yet."""
        chunk = self.chunk(prompt_index, delta)
        return [] if chunk is None else [chunk]

    @property
    def is_stateless(self) -> bool:
        """Whether two deltas of a choice that bring nothing but text make events that differ in that text alone."""
        return not self._call.return_token_ids

    def closing(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> list[dict[str, Any]]:
        """What comes behind every choice's last piece."""
        if not self._call.include_usage:
            return []
        return [self._chunk([]) | self.usage(prompt_tokens, completion_tokens, cached_tokens)]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream that fails; ``error`` is the body that a request without a stream would get."""
        return error

    def chunk(self, prompt_index: int, delta: Delta) -> dict[str, Any] | None:
        """One piece of one choice; None if there is nothing to say yet."""
        silent = not delta.text and not delta.logprobs and delta.finish_reason is None
        if silent and self._tokenizer is not None and not self._call.return_token_ids:
            return None
        choice = self._chunk_choice(prompt_index * self._call.n + delta.index, delta)
        if self._call.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return self._chunk([choice])

    def usage(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
        """The field that tells of tokens used."""
        return {"usage": _usage(prompt_tokens, completion_tokens, cached_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices, **self._stream_usage}

    def _whole_choice(
        self, index: int, prompt_index: int, completion: Completion, output: RequestOutput
    ) -> dict[str, Any]:
        choice = self._answer(index, prompt_index, completion, output)
        if self._call.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
            choice["prompt_token_ids"] = list(output.prompt_token_ids)
        return choice

    def _answer(self, index: int, prompt_index: int, completion: Completion, output: RequestOutput) -> dict[str, Any]:
        raise NotImplementedError

    def _prompt_logprobs(self, output: RequestOutput) -> dict[str, Any]:
        """The field in which vLLM has the log-probabilities of a prompt's tokens, if it was asked for.

        By token id, of the prompt's token and of the most likely ones; null for the first token.
        """
        if self._call.prompt_logprobs is None:
            return {}
        assert output.prompt_logprobs is not None, "an answer that did not fail has what was asked for"
        return {"prompt_logprobs": [None if token is None else self._ranked(token) for token in output.prompt_logprobs]}

    def _ranked(self, token: TokenLogprob) -> dict[str, Any]:
        ranked = [(i, p, rank) for rank, (i, p) in enumerate(token.top[: self._call.prompt_logprobs], 1)]
        return {
            str(i): {"logprob": self._finite(p), "rank": rank, "decoded_token": self._text(i)}
            for i, p, rank in (*ranked, (token.token_id, token.logprob, token.rank))
        }

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _finite(self, logprob: float) -> float:
        """The log-probability as JSON can hold it.

        Raises:
          GenerationFailed: it is no number, as the model's output was not.
        """
        if not logprob < math.inf:
            raise GenerationFailed(f"the answer of {self._call.model!r} is not finite: it overflows on this prompt")
        return max(logprob, LOWEST_LOGPROB)

    def _text(self, token_id: int) -> str:
        """A token as text; one that is only a part of a character is written by its bytes, to stay distinct."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


class CompletionReply(Reply):
    """``/v1/completions``."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, call: Call, tokenizer: Tokenizer | None):
        super().__init__(call, tokenizer)
        self._offsets: dict[int, int] = {}  # characters of each choice's text ahead of its next token
        self._decoders: dict[int, IncrementalDecoder] = {}

    def opening(self) -> list[dict[str, Any]]:
        n = self._call.n
        return [
            self._chunk([{"index": i * n + k, "text": text, "logprobs": None, "finish_reason": None}])
            for i, text in enumerate(self._call.echo)
            for k in range(n)
        ]

    def _answer(self, index: int, prompt_index: int, completion: Completion, output: RequestOutput) -> dict[str, Any]:
        before = self._call.echo[prompt_index] if self._call.echo else ""
        logprobs = None
        if completion.logprobs is not None:
            tokens: list[tuple[int, TokenLogprob | None]] = [(t.token_id, t) for t in completion.logprobs]
            if self._call.echo:
                assert output.prompt_logprobs is not None, "echo with logprobs asks for the prompt's"
                self._begin_with(index, before, output.prompt_token_ids)
                tokens[:0] = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            logprobs = self._logprobs(index, tokens)
        return {
            "index": index,
            "text": before + completion.text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            **self._prompt_logprobs(output),
        }

    def _begin_with(self, index: int, text: str, prompt: Sequence[int]) -> None:
        """Says where a choice's first token lies: ahead of its text as far as the text lacks tokens of the prompt.

        A tokenizer may put tokens ahead of a text that was sent, and a prompt may have been cut at its front.
        """
        ahead = CompletionReply(self._call, self._tokenizer)
        length = sum(ahead._length(index, token, self._text(token)) for token in prompt)
        self._offsets[index] = len(text) - length

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, [(t.token_id, t) for t in delta.logprobs]) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, index: int, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list]:
        """Of token ids, each with what is known of it: nothing of a prompt's first one."""
        shape: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, token in tokens:
            text = self._text(token_id)
            logprob = top = None
            if token is not None:
                logprob = self._finite(token.logprob)
                top = {self._text(i): self._finite(p) for i, p in token.top[: self._call.logprobs]} | {text: logprob}
            offset = self._offsets.get(index, 0)
            shape["tokens"].append(text)
            shape["token_logprobs"].append(logprob)
            shape["top_logprobs"].append(top)
            shape["text_offset"].append(max(0, offset))
            self._offsets[index] = offset + self._length(index, token_id, text)
        return shape

    def _length(self, index: int, token_id: int, shown_as: str) -> int:
        """Characters that a choice's text gets with a token: none with one that only begins a character."""
        if self._tokenizer is None:
            return len(shown_as)
        if index not in self._decoders:
            self._decoders[index] = IncrementalDecoder(self._tokenizer, skip_special_tokens=False)
        return len(self._decoders[index].push(token_id))


class ChatReply(Reply):
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, tokenizer: Tokenizer | None):
        super().__init__(call, tokenizer)
        self._readers: dict[int, CallReader] = {}  # of choices whose calls are told as they come

    def opening(self) -> list[dict[str, Any]]:
        start = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": start, "logprobs": None, "finish_reason": None}])
            for i in range(self._call.n)
        ]

    @property
    def is_stateless(self) -> bool:
        return super().is_stateless and self._call.tools is None

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return super().whole(outputs) | self._prompt_logprobs(outputs[0])

    def _answer(self, index: int, prompt_index: int, completion: Completion, output: RequestOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason: str = completion.finish_reason
        if self._call.tools is not None:
            content, calls = self._read(index, completion.text, is_last=True)
            if calls:
                message |= {"content": content or None, "tool_calls": [call.as_json() for call in calls]}
                reason = self._reason(reason)
        return {
            "index": index,
            "message": message,
            "logprobs": None if completion.logprobs is None else self._logprobs(completion.logprobs),
            "finish_reason": reason,
        }

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        text, told = delta.text, {}
        reason: str | None = delta.finish_reason
        if self._call.tools is not None:
            before = self._readers[index].num_calls if index in self._readers else 0
            text, calls = self._read(index, text, reason is not None)
            if calls:
                told = {"tool_calls": [{"index": before + i, **call.as_json()} for i, call in enumerate(calls)]}
            if reason is not None and self._readers[index].num_calls:
                reason = self._reason(reason)
        return {
            "index": index,
            "delta": ({"content": text} if text or (delta.finish_reason is None and not told) else {}) | told,
            "logprobs": self._logprobs(delta.logprobs) if delta.logprobs else None,
            "finish_reason": reason,
        }

    def chunk(self, prompt_index: int, delta: Delta) -> dict[str, Any] | None:
        said = super().chunk(prompt_index, delta)
        if said is None or self._call.tools is None or self._call.return_token_ids:
            return said
        (choice,) = said["choices"]
        # Text that may yet become a call.
        nothing = choice["delta"] == {"content": ""} and choice["finish_reason"] is None and not choice["logprobs"]
        return None if nothing else said

    def _read(self, index: int, text: str, is_last: bool) -> tuple[str, list[ToolCall]]:
        """More of a choice, as content and calls."""
        assert self._call.tools is not None, "only answers to chats with tools are read for calls"
        reader = self._readers.setdefault(index, CallReader(self._call.tools, self._call.call_format))
        content, calls = reader.push(text)
        if is_last:
            rest, more = reader.finish()
            content, calls = content + rest, calls + more
        return content, calls

    def _reason(self, reason: str) -> str:
        """Why an answer with calls ended, as OpenAI says it: one that had to be a certain call just stopped."""
        assert self._call.tools is not None, "answers with calls are of chats with tools"
        return "tool_calls" if reason == "stop" and not self._call.tools.is_named else reason

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._token(t.token_id, t.logprob) | {"top_logprobs": [self._token(i, p) for i, p in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))
        return {"token": self._text(token_id), "logprob": self._finite(logprob), "bytes": data}


def _mean_logprob(completion: Completion) -> float:
    """Log-probability per token; 0 of none."""
    assert completion.logprobs is not None, "completions that are ranked have log-probabilities"
    return sum(token.logprob for token in completion.logprobs) / max(1, len(completion.logprobs))


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
