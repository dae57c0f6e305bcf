"""One sequence of tokens on its way through the engine, and what a step computes of it."""

import hashlib
from array import array
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, NamedTuple, Protocol

import numpy as np

from slora_jax.request import SamplingParams

NOT_FINITE = -1
"""What a step gives in place of a token where the model's logits were not finite numbers."""


class AdapterHandle(Protocol):
    """What the scheduler may know of an adapter: its price, and whether it can be copied to the pool now."""

    def __hash__(self) -> int:
        """Handles are keys of dicts."""
        ...

    @property
    def num_pages(self) -> int: ...

    @property
    def status(self) -> str:
        """ "registered", "loading", "ready" or "failed"; a held one never goes back from "ready"."""
        ...

    @property
    def content_hash(self) -> str | None:
        """Known once it was ready, and None before; equal only for equal weights and scales."""
        ...

    @property
    def failure(self) -> str:
        """Why it failed, for status "failed"."""
        ...

    def hold(self) -> None:
        """Wants it in host memory, loading it if need be, until ``let_go``."""
        ...

    def let_go(self) -> None:
        """Ends one ``hold``: it may leave host memory when nobody holds it."""
        ...


class Constraint(Protocol):
    """What the next token of one sequence may be. It is told every token, in order, and knows no other."""

    def accept(self, token: int) -> bool:
        """Takes the next token. Returns whether the answer is complete with it, so that none can follow."""
        ...

    def allow(self, words: np.ndarray) -> None:
        """Writes which tokens may come next: bit ``t % 32`` of int32 word ``t // 32`` is set for token t."""
        ...


type EndReason = Literal["stop", "length", "error", "complete"]
"""Why a sequence ends with a token: it is one that ends, the last that is allowed, ``NOT_FINITE``, or the one that
makes what was asked for complete, and so a part of the text."""


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and its growing output.

    The host runs one step behind the device: a token sampled by a step in flight is *pending*, its value unknown
    here, but it is already counted and can be scheduled.

    Only ``slora_jax.scheduler`` changes a sequence once it was given to ``Scheduler.add``.

    Attributes:
      sequence_id: unique and increasing: the order of arrival.
      tokens: prompt and output tokens whose values are known.
      num_prompt: prompt tokens among them.
      max_tokens: most output tokens, already cut to what ``max_model_len`` leaves.
      end_token_ids: token ids any of which ends the sequence: EOS, unless it is ignored, and the request's own.
      num_scheduled: leading tokens whose KV is in the pool or being computed by a step in flight.
      num_done: leading tokens whose KV is in the pool for certain; full pages of them may be published.
      num_pending: sampled tokens not yet read back (0 or 1 when a step is planned).
      pages: the pool pages of its KV, in order, as C ints that batches copy as they lie; ``page_keys[i]`` is the block
        key page i is owned through, or None where it is owned privately.
      epoch: counts preemptions; results of steps planned in an earlier epoch no longer describe ``pages``.
      arrival: when it came, in seconds by the scheduler's clock; increasing with ``sequence_id``.
      tenant: whom a fair policy counts it for: the adapter's or the base model's name, never what a client claims.
      priority: higher goes first, under a policy that looks at it.
      slo_s: seconds from arrival within which its first token is wanted; None for the policy's own.
      is_overdue: it was started because it had waited for too long, and is preempted last.
      adapter: whose weights it runs with; None for the base model's alone, and of a finished sequence.
      constraint: what its tokens may be; None for anything. The sampler of a step waits for what it says of the token
        before.
      leader: another sequence with the same prompt and adapter that computes it first (``n > 1``).
      cached_tokens: prompt tokens found in the prefix cache at first admission.
      started: when it was first admitted, by the clock of ``arrival``; None while it was not.
    """

    sequence_id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    sampling: SamplingParams
    seed: int
    end_token_ids: frozenset[int] = frozenset()
    adapter: AdapterHandle | None = None
    constraint: Constraint | None = None
    leader: "Sequence | None" = None
    arrival: float = 0.0
    tenant: str = ""
    priority: int = 0
    slo_s: float | None = None
    is_overdue: bool = False
    state: State = State.WAITING
    num_scheduled: int = 0
    num_done: int = 0
    num_pending: int = 0
    pages: array = field(default_factory=lambda: array("i"))
    page_keys: list[Hashable] = field(default_factory=list)
    epoch: int = 0
    adapter_key: Hashable = None
    cached_tokens: int = 0
    was_admitted: bool = False
    started: float | None = None
    followers: list["Sequence"] = field(default_factory=list)
    _digests: list[bytes] = field(default_factory=list)

    @property
    def is_waiting(self) -> bool:
        return self.state is State.WAITING

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt's tokens are to be scored, so that all are computed, whatever the prefix cache has.

        Of several sequences with one prompt the first one does that.
        """
        return self.sampling.prompt_logprobs is not None and self.leader is None

    @property
    def num_tokens(self) -> int:
        """Tokens known or pending."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    def prefix_key(self, page: int, page_tokens: int) -> Hashable:
        """Key of a page full of known tokens: a hash chained over the adapter's content and all tokens up to its end.

        ``page_tokens``, of every page, must be the same in every call. The hash is 128-bit BLAKE2b, so that no tenant
        can find another's pages by a collision.
        """
        while len(self._digests) <= page:
            i = len(self._digests)
            previous = self._digests[-1] if i else self._adapter_salt()
            content = array("q", self.tokens[i * page_tokens : (i + 1) * page_tokens])
            assert len(content) == page_tokens, "only full pages of known tokens have a key"
            self._digests.append(hashlib.blake2b(content.tobytes(), key=previous, digest_size=16).digest())
        return self._digests[page]

    def _adapter_salt(self) -> bytes:
        name = self.adapter.content_hash if self.adapter else "base"
        assert name is not None, "an adapter that was never ready has no prefixes"
        return hashlib.blake2b(name.encode(), digest_size=16).digest()


class Emitted(NamedTuple):
    """A token that a step gave a sequence.

    Attributes:
      sequence: it; ``tokens`` ends with the token, unless that is ``NOT_FINITE``.
      token: the token's id.
      place: the sequence's place in the plan's entries.
      reason: why the sequence ended with this token; None if it goes on. "error" stands for ``NOT_FINITE``.
    """

    sequence: Sequence
    token: int
    place: int
    reason: EndReason | None


class ScheduledSequence(NamedTuple):
    """Part of a step: the KV of ``count`` tokens from position ``start``; then a new token if ``samples``."""

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a part of a step for
    samples: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Start copying this adapter's weights into these pages; nobody reads them until ``Scheduler.adapter_arrived``.

    ``key`` is the pages' block in the page allocator.
    """

    adapter: AdapterHandle
    pages: tuple[int, ...]
    key: Hashable


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does.

    ``failed`` lists sequences that can never run, with the reason; ``late`` those that the policy gives up because
    they could not meet their first-token objective. ``is_cut`` says that more could have been decided: the next plan
    goes on even if nothing happens in between.
    """

    entries: tuple[ScheduledSequence, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    failed: tuple[tuple[Sequence, str], ...] = ()
    num_preempted: int = 0
    late: tuple[Sequence, ...] = ()
    is_cut: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)

    def without(self, sequences: Collection[int]) -> "StepPlan":
        """The same plan without the entries of these sequences, named by their ids."""
        return replace(self, entries=tuple(e for e in self.entries if e.sequence.sequence_id not in sequences))
