"""An engine without a model, for tests of what stands in front of one.

Its answers are fixed: adapter ``a`` answers the tokens of ``a says `` and the prompt's own text, over and over;
the base model is named ``base``. One thread takes a step for every running request, as the real engine does.
"""

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slora_jax.engine.generation import Timing
from slora_jax.errors import AdapterExists, BadAdapter, EngineStopped, InvalidRequest, Overloaded, UnknownAdapter
from slora_jax.model.config import ModelConfig
from slora_jax.request import Completion, Delta, Request, RequestOutput, TokenLogprob
from slora_jax.scheduler.capacity import Capacity, capacity
from slora_jax.text.stop import StopMatcher
from slora_jax.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.helpers.small_tokenizers import byte_level_folder

WAITS = "W"
"""A prompt that begins with this produces nothing until ``FakeEngine.go`` is set."""

FAILS = "F"
"""A prompt that begins with this fails after two tokens."""

LATE = "L"
"""A prompt that begins with this is given up before its first token."""


@dataclass(frozen=True)
class AdapterInfo:
    name: str
    path: str = "somewhere"
    rank: int = 8
    content_hash: str = "0"
    created: float = 1_700_000_000.0
    pinned: bool = False


@dataclass
class _Sequence:
    tokens: list[int]
    decoder: IncrementalDecoder | None
    stops: StopMatcher
    done: int = 0
    finished: bool = False


class FakeGeneration:
    def __init__(self, request: Request, sequences: list[_Sequence], text: str):
        self.request = request
        self.prompt_token_ids = request.prompt
        self.cached_tokens = 3
        self.prompt_text = text
        self.sequences = sequences
        self.cancelled = False
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.deltas: list[Delta] = []
        self._ended = threading.Event()
        self.timing = Timing()
        self.submitted = self.started = time.monotonic()
        self._on_news = lambda: None

    def tell(self, on_news) -> None:
        self._on_news = on_news

    @property
    def finish_reasons(self) -> list[str]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def finished(self) -> bool:
        return self._ended.is_set() and self._deltas.empty()

    @property
    def num_generated(self) -> int:
        return sum(len(delta.token_ids) for delta in self.deltas)

    def next_delta(self, timeout: float | None = None) -> Delta | None:
        try:
            return self._deltas.get(timeout=timeout) if timeout != 0 else self._deltas.get_nowait()
        except queue.Empty:
            return None

    def take(self) -> list[Delta]:
        deltas = []
        while (delta := self.next_delta(0)) is not None:
            deltas.append(delta)
        return deltas

    def __iter__(self):
        while not self.finished:
            delta = self.next_delta(0.1)
            if delta is not None:
                yield delta

    def result(self, timeout: float | None = None) -> RequestOutput:
        if not self._ended.wait(timeout):
            raise TimeoutError
        completions = []
        for i in range(self.request.sampling.n):
            deltas = [d for d in self.deltas if d.index == i]
            logprobs = tuple(p for d in deltas for p in d.logprobs)
            completions.append(
                Completion(
                    index=i,
                    text="".join(d.text for d in deltas),
                    token_ids=tuple(t for d in deltas for t in d.token_ids),
                    finish_reason=deltas[-1].finish_reason,
                    logprobs=None if self.request.sampling.logprobs is None else logprobs,
                    error=deltas[-1].error,
                )
            )
        r = self.request
        return RequestOutput(
            r.request_id, r.adapter, r.prompt, tuple(completions), self.cached_tokens, self._prompt_logprobs()
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The i-th token, from 1, has rank i and log-probability -i / 2."""
        top = self.request.sampling.prompt_logprobs
        if top is None:
            return None
        likely = tuple((t, -1.0 - t) for t in range(top))
        ids = enumerate(self.request.prompt[1:], 1)
        return (None, *(TokenLogprob(token, -0.5 * i, likely, i) for i, token in ids))

    def cancel(self) -> None:
        self.cancelled = True

    def put(self, delta: Delta) -> None:
        self.timing.note(delta, time.monotonic())
        self.deltas.append(delta)
        self._deltas.put(delta)
        if delta.finish_reason is not None:
            self.sequences[delta.index].finished = True
            if all(s.finished for s in self.sequences):
                self._ended.set()
        self._on_news()


class FakeEngine:
    model_name = "base"
    max_model_len = 300
    gives_up_late = False
    orders_by_priority = False
    default_sampling: Mapping[str, Any] = MappingProxyType({})
    compiling: str | None = None

    def __init__(
        self,
        folder: Path,
        *,
        max_running: int = 100_000,
        with_tokenizer: bool = True,
        step_seconds=0.0005,
        logprob=-0.5,
    ):
        self._backend = Tokenizer.from_folder(byte_level_folder(folder))
        self.tokenizer = self._backend if with_tokenizer else None
        self.model_config = ModelConfig(self._backend.vocab_size, 8, 8, 1, 1, 1, 8)
        self.go = threading.Event()
        self.generations: list[FakeGeneration] = []
        self.running: list[FakeGeneration] = []
        self._adapters = {name: AdapterInfo(name) for name in ("pirate", "json", "org/haiku")}
        self._max_running = max_running
        self._step_seconds = step_seconds
        self._logprob = logprob
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def adapters(self):
        return dict(self._adapters)

    def adapter(self, name: str) -> AdapterInfo:
        if name not in self._adapters:
            raise UnknownAdapter(f"no adapter is named {name!r}")
        return self._adapters[name]

    def register_adapter(self, name: str, path: str, pinned: bool = False, replace: bool = True) -> AdapterInfo:
        if name in self._adapters and not replace:
            raise AdapterExists(f"adapter {name!r} is registered already")
        if not Path(path, "adapter_config.json").is_file():
            raise BadAdapter(f"{path} holds no adapter_config.json")
        if name == "too-large" and pinned:
            raise BadAdapter("it cannot be pinned")
        self._adapters[name] = AdapterInfo(name, path, pinned=pinned)
        return self._adapters[name]

    def pin_adapter(self, name: str) -> AdapterInfo:
        self._adapters[name] = replace(self.adapter(name), pinned=True)
        return self._adapters[name]

    def unpin_adapter(self, name: str) -> AdapterInfo:
        self._adapters[name] = replace(self.adapter(name), pinned=False)
        return self._adapters[name]

    def unregister_adapter(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            raise UnknownAdapter(f"no adapter is named {name!r}")

    def capacity(self, adapter: str | None, num_tokens: int) -> Capacity:
        if adapter is not None and adapter not in self._adapters:
            raise UnknownAdapter(f"no adapter is named {adapter!r}")
        return capacity(-(-num_tokens // 16), 0 if adapter is None else 3, pages_available=42, sequences_available=100)

    def answer(self, request: Request) -> list[int]:
        text = f"{request.adapter or self.model_name} says {self._backend.decode(request.prompt)}. "
        ids = self._backend.encode(text)
        return (ids * (request.sampling.max_tokens // len(ids) + 1))[: request.sampling.max_tokens]

    def submit(self, request: Request) -> FakeGeneration:
        if self._stop.is_set():
            raise EngineStopped("the engine was closed")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UnknownAdapter(f"no adapter is named {request.adapter!r}")
        if len(request.prompt) + request.sampling.max_tokens > self.max_model_len:
            raise InvalidRequest("prompt and max_tokens together do not fit", "max_tokens")
        tokens = self.answer(request)
        sequences = [
            _Sequence(
                tokens[i:],  # completion i leaves the first i tokens out
                IncrementalDecoder(self.tokenizer) if self.tokenizer else None,
                StopMatcher(request.sampling.stop),
            )
            for i in range(request.sampling.n)
        ]
        generation = FakeGeneration(request, sequences, self._backend.decode(request.prompt))
        with self._lock:
            if len(self.running) >= self._max_running:
                raise Overloaded("the waiting queue is full")
            self.running.append(generation)
            self.generations.append(generation)
        return generation

    def warm_up(self) -> None:
        pass

    def start(self, on_failure=lambda sentence: None) -> None:
        self.fail = on_failure
        self._thread.start()

    def tokenizer_of(self, adapter):
        return self.tokenizer

    def check_process(self) -> None:
        """Tests do not fork."""

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for generation in self.running:
            for i, sequence in enumerate(generation.sequences):
                if not sequence.finished:
                    generation.put(Delta(i, "", finish_reason="abort", error="the engine was closed"))
        self.running = []

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stats(self) -> dict[str, int | float]:
        return {"running": len(self.running)}

    def _loop(self) -> None:
        while not self._stop.wait(self._step_seconds):
            with self._lock:
                running = list(self.running)
            for generation in running:
                self._step(generation)
            with self._lock:
                self.running = [g for g in self.running if not all(s.finished for s in g.sequences)]

    def _step(self, generation: FakeGeneration) -> None:
        if generation.prompt_text.startswith(WAITS) and not self.go.is_set() and not generation.cancelled:
            return
        for i, sequence in enumerate(generation.sequences):
            if sequence.finished:
                continue
            if generation.cancelled:
                generation.put(Delta(i, "", finish_reason="abort", error="cancelled"))
            elif generation.prompt_text.startswith(FAILS) and sequence.done == 2:
                generation.put(Delta(i, "", finish_reason="error", error="the logits are not finite"))
            elif generation.prompt_text.startswith(LATE):
                generation.put(Delta(i, "", finish_reason="late", error="its objective of 5 ms"))
            elif not sequence.tokens:
                generation.put(Delta(i, "", finish_reason="length"))
            else:
                generation.put(self._next(i, sequence, generation.request))

    def _next(self, index: int, sequence: _Sequence, request: Request) -> Delta:
        token = sequence.tokens[sequence.done]
        sequence.done += 1
        text, stopped = "", False
        last = sequence.done == len(sequence.tokens)
        if sequence.decoder:
            text, stopped = sequence.stops.push(sequence.decoder.push(token))
            if last and not stopped:
                rest, stopped = sequence.stops.push(sequence.decoder.flush())
                text += rest + sequence.stops.flush()
        logprobs = ()
        if request.sampling.logprobs is not None:
            top = tuple((t, -1.0 - t) for t in range(request.sampling.logprobs))
            logprobs = (TokenLogprob(token, self._logprob if sequence.done > 1 else float("-inf"), top),)
        reason = "stop" if stopped else "length" if last else None
        return Delta(index, text, (token,), logprobs, reason)
