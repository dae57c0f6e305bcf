"""A submitted request, as its caller sees it, and the turning of tokens into text."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence

from slora_jax.request import Completion, Delta, FinishReason, Request, RequestOutput, TokenLogprob
from slora_jax.scheduler.sequence import EndReason
from slora_jax.scheduler.sequence import Sequence as TokenSequence
from slora_jax.text.stop import StopMatcher
from slora_jax.text.tokenizer import IncrementalDecoder, Tokenizer


class Timing:
    """When a request's tokens came, as far as its deltas were taken. Seconds, by the clock of the engine's steps.

    Attributes:
      first: when the first token came; None while none did.
      last: when the last delta came, with a token or without; None while none did.
      tokens: how many came.
      gaps: between one token of a sequence and the next.
    """

    __slots__ = ("_last", "first", "gaps", "last", "tokens")

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.tokens = 0
        self.gaps: list[float] = []
        self._last: dict[int, float] = {}

    def note(self, delta: Delta, at: float) -> None:
        """Takes in the next delta, which came at this time."""
        self.last = at
        if not delta.token_ids:
            return
        self.tokens += len(delta.token_ids)
        last = self._last.get(delta.index)
        if last is not None:
            self.gaps.append(at - last)
        elif self.first is None:
            self.first = at
        self._last[delta.index] = at


class Generation:
    """One submitted request. Iterate over it for deltas as they come, or ask for the ``result``; not both at once.

    Attributes:
      request: as submitted.
      prompt_token_ids: the prompt.
      cached_tokens: prompt tokens found in the prefix cache; known with the first delta.
      timing: when its tokens came.
      sequences: for the engine.
    """

    def __init__(self, request: Request, on_cancel: Callable[["Generation"], None]):
        self.request = request
        self.prompt_token_ids = request.prompt
        self.cached_tokens = 0
        self.timing = Timing()
        self.sequences: list[TokenSequence] = []
        self._on_cancel = on_cancel
        self._scores: list[TokenLogprob | None] = [None]  # of the prompt's tokens, as far as they are known
        self._deltas: queue.SimpleQueue[tuple[float, Delta]] = queue.SimpleQueue()
        self._unfinished = request.sampling.n
        self._seen: list[Delta] = []
        self._on_news: Callable[[], None] | None = None

    def tell(self, on_news: Callable[[], None]) -> None:
        """Has ``on_news`` called for each delta that comes from now on, by the engine's loop: it must return at once.

        What came before is to be taken first, or nobody tells of it.
        """
        self._on_news = on_news

    @property
    def finished(self) -> bool:
        """Whether the last delta of every sequence has been taken."""
        return self._unfinished == 0

    @property
    def num_generated(self) -> int:
        """Tokens of all of its sequences that were read so far."""
        return sum(len(delta.token_ids) for delta in self._seen)

    def next_delta(self, timeout: float | None = None) -> Delta | None:
        """Waits for the next delta of any of the n sequences; None after ``timeout`` seconds, or once finished."""
        if self.finished:
            return None
        try:
            at, delta = self._deltas.get(timeout=timeout)
        except queue.Empty:
            return None
        self._unfinished -= delta.finish_reason is not None
        self._seen.append(delta)
        self.timing.note(delta, at)
        return delta

    def take(self) -> list[Delta]:
        """The deltas of its sequences that wait to be taken, in their order, without waiting for more."""
        deltas: list[Delta] = []
        waiting = self._deltas
        while not waiting.empty():
            at, delta = waiting.get_nowait()
            self._unfinished -= delta.finish_reason is not None
            self.timing.note(delta, at)
            deltas.append(delta)
        self._seen += deltas
        return deltas

    def __iter__(self) -> Iterator[Delta]:
        while (delta := self.next_delta()) is not None:
            yield delta

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for all sequences, whichever deltas were taken before.

        Raises:
          TimeoutError: not finished after ``timeout`` seconds; the request goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self.next_delta(left) is None:
                raise TimeoutError(f"request {self.request.request_id!r} is not finished after {timeout} s")
        return RequestOutput(
            request_id=self.request.request_id,
            adapter=self.request.adapter,
            prompt_token_ids=self.prompt_token_ids,
            completions=self._completions(),
            cached_tokens=self.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """As in ``RequestOutput``; known when the first sequence's first delta is."""
        is_known = self.request.sampling.prompt_logprobs is not None and len(self._scores) == len(self.request.prompt)
        return tuple(self._scores) if is_known else None

    def cancel(self) -> None:
        """Asks the engine to stop and free the request's pages soon. Its sequences end with "abort". Idempotent."""
        if not self.finished:
            self._on_cancel(self)

    def put(self, delta: Delta, at: float) -> None:
        """For the engine: hands a delta to the caller, with the time by ``time.monotonic`` at which its step ended."""
        self._deltas.put((at, delta))
        if self._on_news is not None:
            self._on_news()

    def put_scores(self, first: int, logprobs: Sequence[TokenLogprob]) -> None:
        """For the engine: log-probabilities of the prompt's tokens from position ``first`` on.

        What is known already is left as it is: a sequence that was preempted is computed again, in other pieces.
        """
        assert first <= len(self._scores), "a prompt's tokens are computed in their order"
        self._scores += logprobs[len(self._scores) - first :]

    @property
    def submitted(self) -> float:
        """When it was submitted, by the same clock."""
        return self.sequences[0].arrival

    @property
    def started(self) -> float | None:
        """When its first sequence left the queue; None while it waits."""
        return self.sequences[0].started

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Of the sequences whose last delta was taken, in the order in which they ended."""
        return [delta.finish_reason for delta in self._seen if delta.finish_reason is not None]

    def _completions(self) -> tuple[Completion, ...]:
        by_index: list[list[Delta]] = [[] for _ in range(self.request.sampling.n)]
        for delta in self._seen:
            by_index[delta.index].append(delta)
        return tuple(self._completion(i, deltas) for i, deltas in enumerate(by_index))

    def _completion(self, index: int, deltas: list[Delta]) -> Completion:
        wants_logprobs = self.request.sampling.logprobs is not None
        finish_reason = deltas[-1].finish_reason
        assert finish_reason is not None, "a completion is made of all of an answer's deltas"
        return Completion(
            index=index,
            text="".join(d.text for d in deltas),
            token_ids=tuple(t for d in deltas for t in d.token_ids),
            finish_reason=finish_reason,
            logprobs=tuple(p for d in deltas for p in d.logprobs) if wants_logprobs else None,
            error=deltas[-1].error,
        )


class OutputText:
    """Turns one sequence's tokens into deltas of text, up to the first stop string.

    Args:
      request: of the sequence.
      index: of the sequence in its request.
      tokenizer: None gives deltas without text.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None):
        self._index = index
        sampling = request.sampling
        self._decoder = IncrementalDecoder(tokenizer, sampling.skip_special_tokens) if tokenizer else None
        self._matcher = StopMatcher(sampling.stop, sampling.include_stop_str_in_output)
        self._only_reads = sampling.max_tokens == 0

    def push(self, token: int, reason: EndReason | None, logprob: TokenLogprob | None) -> Delta:
        """Takes the next token.

        Args:
          token: its id.
          reason: why the sequence ends with it, as far as its tokens say: "stop" for a token that ends it, which is no
            part of the text; "complete" for the last of what was asked for, which is; None if it goes on.
          logprob: of the token.

        Returns:
          A delta whose ``finish_reason`` is set if the sequence ends here: for ``reason``, or for a stop string. A
          request without tokens of its own ends with the first one, which every step that ends a prompt samples.
        """
        if self._only_reads:
            return self.end("length")
        text = ""
        if reason == "stop":
            text = self._flush()[0]
        elif self._decoder is not None:
            text, stopped = self._matcher.push(self._decoder.push(token))
            reason = "stop" if stopped else reason
        if reason in ("length", "complete"):
            tail, stopped = self._flush()
            text, reason = text + tail, "stop" if stopped or reason == "complete" else reason
        assert reason != "complete", "callers know it as an answer that stops"
        return Delta(self._index, text, (token,), (logprob,) if logprob else (), reason)

    def end(self, reason: FinishReason, error: str | None = None) -> Delta:
        """A last delta without a token."""
        return Delta(self._index, self._flush()[0], finish_reason=reason, error=error)

    def _flush(self) -> tuple[str, bool]:
        """What was withheld, and whether it holds a stop string."""
        text, stopped = self._matcher.push(self._decoder.flush()) if self._decoder else ("", False)
        return text + ("" if stopped else self._matcher.flush()), stopped
