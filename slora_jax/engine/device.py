"""The real ``Device`` of the loop: compiled steps over the pool, copies of adapters, and what other hosts are told."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from slora_jax.adapters.store import AdapterVersion
from slora_jax.engine.batch import AdapterSlice
from slora_jax.engine.core import Step, StepResult
from slora_jax.engine.hosts import Followers
from slora_jax.engine.runner import LaidOut, Runner, StepInFlight
from slora_jax.engine.sampling import allow_by_constraints
from slora_jax.histogram import Histogram
from slora_jax.memory.pool import AdapterCopy, UnifiedPool
from slora_jax.scheduler.sequence import AdapterLoad, ScheduledSequence


@dataclass(frozen=True, slots=True)
class _ExplainedStep:
    """A step in flight on all hosts, its tokens drawn or not yet."""

    step: StepInFlight
    followers: Followers
    finish: Callable[[], None] | None

    def draw(self) -> None:
        if self.finish is not None:
            self.finish()

    def read(self) -> StepResult:
        with self.followers.explained():
            return self.step.read()


class ModelDevice:
    """The devices that share a model and its pool, with the pages that adapters have there.

    Attributes:
      runner: the compiled steps.
      pool: the unified pool, on the same devices.
      followers: the other hosts, which do what this one does.
      copied_bytes: of adapters, copied from host memory so far.
      copy_seconds: how long the copies took, from their start until steps may read them.
    """

    def __init__(self, runner: Runner, pool: UnifiedPool, followers: Followers):
        self.runner = runner
        self.pool = pool
        self.followers = followers
        self.copied_bytes = 0
        self.copy_seconds = Histogram()
        # In the order in which they were started.
        self._copies: deque[tuple[AdapterLoad, AdapterCopy, float]] = deque()
        self._slices: dict[Hashable, AdapterSlice] = {}
        self._key_of_page: dict[int, Hashable] = {}

    def start_copy(self, load: AdapterLoad) -> None:
        host = _version(load).host()
        assert host is not None, "an adapter left host memory while it was held"
        self.followers.start_copy(host.packed, load.pages)
        self._copies.append((load, self.pool.start_copy(host.packed, load.pages), time.monotonic()))
        self.copied_bytes += host.packed.nbytes

    def arrived(self) -> Iterator[AdapterLoad]:
        while self._copies and self._copies[0][1].is_ready:
            load, copy, start = self._copies.popleft()
            self.followers.finish_copy()
            self.pool.finish_copy(copy)
            self._note_slice(load)
            self.copy_seconds.add([time.monotonic() - start])
            yield load

    @property
    def is_copying(self) -> bool:
        return bool(self._copies)

    def wait_for_copy(self) -> None:
        self._copies[0][1].wait()

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> LaidOut:
        keys = dict.fromkeys(entry.sequence.adapter_key for entry in entries)
        keys.pop(None, None)
        return self.runner.lay_out(entries, {key: self._slices[key] for key in keys})

    def launch(self, batch: LaidOut) -> Step:
        waits = any(entry.sequence.constraint is not None for entry in batch.entries if entry.samples)
        with self.followers.explained():
            self.followers.run(batch.arguments, draws=not waits)
            step = self.runner.start(batch)

            def finish() -> None:
                if waits:
                    allow_by_constraints(batch.arguments.inputs, batch.batch.entries)
                    self.followers.draw(np.asarray(batch.arguments.inputs.allowed))
                self.runner.draw(step)

            if not waits:
                finish()
            return _ExplainedStep(step, self.followers, finish if waits else None)

    def reset(self) -> None:
        """Makes the pool and what steps hand each other anew; compiled programs stay.

        Raises:
          RuntimeError: there are several hosts, whose devices cannot be known to be in one state.
        """
        self.followers.check_alone()
        self.forget()
        self.pool.reset()
        self.runner.reset()

    def forget(self) -> None:
        """Forgets the copies under way and what lies in the pool, which is then for another scheduler to fill."""
        self._copies.clear()
        self._slices.clear()
        self._key_of_page.clear()

    def warm_up(self, active: list[int], max_rank: int, pages: int) -> int:
        """Compiles shapes of steps ahead, see ``Runner.warm_up``.

        Args:
          active, max_rank, pages: as for ``Runner.all_shapes``.

        Returns:
          How many.
        """
        self.followers.warm_up(active, max_rank, pages)
        shapes = self.runner.all_shapes(active, max_rank, pages)
        self.runner.warm_up(shapes, self.followers.compiled)
        return len(shapes)

    def _note_slice(self, load: AdapterLoad) -> None:
        """Notes where an adapter lies, and forgets the adapters that lay on its pages before."""
        self._forget(load.key)
        for page in load.pages:
            self._forget(self._key_of_page.get(page))
            self._key_of_page[page] = load.key
        header = _version(load).header
        self._slices[load.key] = AdapterSlice(
            pages=load.pages,
            ranks=header.layout.ranks,
            start_a=header.layout.start_a,
            start_b=header.layout.start_b,
            scales=header.scales,
        )

    def _forget(self, key: Hashable) -> None:
        gone = self._slices.pop(key, None)
        if gone is not None:
            for page in gone.pages:
                del self._key_of_page[page]


def _version(load: AdapterLoad) -> AdapterVersion:
    """The adapter with its weights, of which the scheduler knows no more than a price and a status."""
    version = load.adapter
    assert isinstance(version, AdapterVersion), "what an engine gives its scheduler are its store's versions"
    return version
