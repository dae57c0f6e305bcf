"""What became of requests, as seen by those who wait for their answers: how long it took, for which adapter.

Whoever waits for a generation tells of it, in the thread that waits; the engine's loop has no part in it.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from slora_jax.histogram import Histogram

if TYPE_CHECKING:
    from slora_jax.engine.generation import Generation

requests_log = logging.getLogger("slora_jax.requests")

MAX_NAMED = 50
"""Adapters that have numbers of their own: those first asked for. All others are one, ``OTHERS``."""

OTHERS = "other"

_SECONDS_BETWEEN_NOTES = 1.0
_RECENT = 4096
_RECENT_SECONDS = 10.0


class Served(NamedTuple):
    """What one adapter, or the base model, has served.

    Attributes:
      requests: that ended, however they did.
      prompt_tokens, generated_tokens: of its requests, those under way included.
    """

    requests: int
    prompt_tokens: int
    generated_tokens: int


class Traffic:
    """Counts what requests did. Thread-safe.

    Args:
      base: the base model's name, under which its own requests are counted.

    Attributes:
      queue, first_token, between_tokens, whole: seconds until a request started, until its first token, from one token
        of a sequence to the next, and until its end.
    """

    def __init__(self, base: str):
        self._base = base
        self.queue, self.first_token = Histogram(), Histogram()
        self.between_tokens, self.whole = Histogram(), Histogram()
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._generated_tokens: Counter[str] = Counter()
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def follow(self, generation: "Generation", request_id: str) -> "Followed":
        """Begins to follow a generation of a request; ``note`` its progress and its ``end``."""
        return Followed(self, generation, request_id, generation.request.adapter or self._base)

    def by_adapter(self) -> dict[str, Served]:
        """What each has served; at most ``MAX_NAMED`` by their names, and ``OTHERS``."""
        with self._lock:
            return {
                name: Served(self._requests[name], self._prompt_tokens[name], self._generated_tokens[name])
                for name in self._prompt_tokens
            }

    def recent_first_tokens(self) -> list[float]:
        """Seconds until the first token, increasing, of the requests of the last ten seconds."""
        since = time.monotonic() - _RECENT_SECONDS
        with self._lock:
            return sorted(seconds for at, seconds in self._recent if at >= since)

    def _begun(self, name: str, prompt_tokens: int) -> str:
        with self._lock:
            if name not in self._prompt_tokens and len(self._prompt_tokens.keys() - {OTHERS}) >= MAX_NAMED:
                name = OTHERS
            self._prompt_tokens[name] += prompt_tokens
        return name

    def _add(self, name: str, tokens: int, first_token: float | None, has_ended: bool) -> None:
        with self._lock:
            self._generated_tokens[name] += tokens
            self._requests[name] += has_ended
            if first_token is not None:
                self._recent.append((time.monotonic(), first_token))


class Followed:
    """One generation that is followed. For the thread that takes its deltas."""

    __slots__ = (
        "_counted",
        "_gaps",
        "_generation",
        "_has_begun",
        "_model",
        "_name",
        "_next_note",
        "_request_id",
        "_traffic",
    )

    def __init__(self, traffic: Traffic, generation: "Generation", request_id: str, model: str):
        self._traffic = traffic
        self._generation = generation
        self._request_id = request_id
        self._model = model
        self._name = traffic._begun(model, len(generation.prompt_token_ids))
        self._next_note = 0.0
        self._has_begun = False
        self._counted = self._gaps = 0

    def note(self) -> None:
        """Takes in what came meanwhile: the first token at once, later ones once a second."""
        now = time.monotonic()
        if now >= self._next_note or (not self._has_begun and self._generation.timing.first is not None):
            self._next_note = now + _SECONDS_BETWEEN_NOTES
            self._take_in(has_ended=False)

    def end(self) -> None:
        """Takes in the rest, and says in one line of the log what became of the request. Once."""
        self._take_in(has_ended=True)
        generation, timing = self._generation, self._generation.timing
        now = time.monotonic()
        self._traffic.whole.add([now - generation.submitted])
        if not requests_log.isEnabledFor(logging.INFO):
            return
        first = None if timing.first is None else timing.first - generation.submitted
        reasons = generation.finish_reasons
        if len(reasons) < generation.request.sampling.n:
            reasons.append("abort")
        said = {
            "request": self._request_id,
            "model": self._model,
            "prompt_tokens": len(generation.prompt_token_ids),
            "output_tokens": timing.tokens,
            "first_token_s": None if first is None else round(first, 3),
            "total_s": round(now - generation.submitted, 3),
            "reason": ",".join(sorted(set(reasons))),
        }
        requests_log.info(
            "request %s",
            " ".join(f"{key}={'-' if value in (None, '') else value}" for key, value in said.items()),
            extra={"fields": said},
        )

    def _take_in(self, has_ended: bool) -> None:
        generation, timing, traffic = self._generation, self._generation.timing, self._traffic
        first = None
        if not self._has_begun and timing.first is not None:
            self._has_begun = True
            first = timing.first - generation.submitted
            traffic.first_token.add([first])
            if generation.started is not None:
                traffic.queue.add([generation.started - generation.submitted])
        if gaps := timing.gaps[self._gaps :]:
            traffic.between_tokens.add(gaps)
            self._gaps += len(gaps)
        traffic._add(self._name, timing.tokens - self._counted, first, has_ended)
        self._counted = timing.tokens


def noting(followed: Sequence[Followed], pause: Callable[[], float]) -> Callable[[], float]:
    """The same pause of somebody who waits for whole answers, with a note of all that are followed once a second."""
    next_note = 0.0

    def noting_pause() -> float:
        nonlocal next_note
        now = time.monotonic()
        if now >= next_note:
            next_note = now + _SECONDS_BETWEEN_NOTES
            for one in followed:
                one.note()
        return pause()

    return noting_pause


def quantile(ordered: list[float], share: float) -> float | None:
    """The value below which this share of the increasing values lies; None of none."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
