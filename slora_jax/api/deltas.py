"""Reading what running generations produce, without losing sight of who waits for it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from slora_jax.errors import EngineStopped, ObjectiveMissed, SLoRAError
from slora_jax.request import Completion, Delta, Request, RequestOutput

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine, Generation

POLL_SECONDS = 0.5
"""How long a client that went away may go unnoticed while its request produces nothing."""

_SHORTEST_WAIT_SECONDS = 0.002


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class GenerationFailed(SLoRAError):
    """The engine gave a sequence up; the message says why."""


def submit_all(engine: "Engine", requests: Sequence[Request]) -> list["Generation"]:
    """Submits every request or, when one is refused, none."""
    with contextlib.ExitStack() as cancel_on_error:
        generations = []
        for request in requests:
            generation = engine.submit(request)
            cancel_on_error.callback(generation.cancel)
            generations.append(generation)
        cancel_on_error.pop_all()
    return generations


type Piece = tuple[int, list[Delta]]
"""A generation's index, and its new deltas, one per sequence."""


def look(generations: Sequence["Generation"], gone: Callable[[], bool]) -> Iterator[list[Piece]]:
    """Yields what has come meanwhile, whenever it is asked, until all have ended. It never waits: nothing is [].

    Deltas that piled up while the reader was busy are merged, so a slow reader falls behind in time but not
    in work.

    Raises:
      ClientGone: there is nothing, and ``gone()`` is true.
    """
    open_sequences = {i: generation.request.sampling.n for i, generation in enumerate(generations)}
    while open_sequences:
        pieces = []
        for i in list(open_sequences):
            generation = generations[i]
            ended = generation.finished  # read first: what was produced before it turned true is then in the queue
            deltas = _take(generation)
            if deltas:
                open_sequences[i] -= sum([delta.finish_reason is not None for delta in deltas])
                pieces.append((i, deltas))
            if open_sequences[i] <= 0 or (ended and not deltas):
                del open_sequences[i]
        if not pieces and open_sequences and gone():
            raise ClientGone
        yield pieces


class News:
    """Says when to look at generations again. For one thread that waits."""

    def __init__(self, generations: Sequence["Generation"]):
        self._event = threading.Event()
        for generation in generations:
            generation.tell(self._event.set)

    def wait(self) -> None:
        """Returns once something came since the last call, or the client may have gone."""
        self._event.wait(POLL_SECONDS)
        self._event.clear()


def watch(generations: Sequence["Generation"], gone: Callable[[], bool]) -> Iterator[Piece]:
    """As ``look``, and waits while there is nothing."""
    news = News(generations)
    for pieces in look(generations, gone):
        if not pieces:
            news.wait()
        yield from pieces


def wait_all(
    generations: Sequence["Generation"], gone: Callable[[], bool], pause: Callable[[], float]
) -> list[RequestOutput]:
    """Waits for all to end, looking again after ``pause()`` seconds: waking for each token would cost more.

    Raises:
      ClientGone: ``gone()`` turned true.
      GenerationFailed, EngineStopped, ObjectiveMissed: a sequence ended with an error.
    """
    outputs = []
    for generation in generations:
        while True:
            with contextlib.suppress(TimeoutError):
                outputs.append(generation.result(timeout=0))
                break
            if gone():
                raise ClientGone
            time.sleep(max(pause(), _SHORTEST_WAIT_SECONDS))
    for output in outputs:
        for completion in output.completions:
            raise_failure(completion)
    return outputs


def raise_failure(ended: Delta | Completion) -> None:
    """Raises if this sequence ended otherwise than by its own sampling parameters."""
    if ended.finish_reason == "error":
        raise GenerationFailed(ended.error or "generation failed")
    if ended.finish_reason == "late":
        raise ObjectiveMissed(ended.error or "the request could not meet its objective")
    if ended.finish_reason == "abort":
        raise EngineStopped(ended.error or "the request was aborted")


def without_failure(delta: Delta) -> Delta:
    """What the delta brought, less the news that its sequence failed; see ``raise_failure``."""
    failed = delta.finish_reason in ("error", "abort", "late")
    return delta._replace(finish_reason=None) if failed else delta


def _take(generation: "Generation") -> list[Delta]:
    """All deltas that wait, merged by sequence."""
    deltas = generation.take()
    if len(deltas) < 2:
        return deltas
    merged: dict[int, Delta] = {}
    for delta in deltas:
        earlier = merged.get(delta.index)
        merged[delta.index] = delta if earlier is None else _joined(earlier, delta)
    return list(merged.values())


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        index=first.index,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        finish_reason=second.finish_reason,
        error=second.error,
    )
