"""Several hosts: the first one plans and answers, the others do on their devices what it does on its own.

All hosts run the same compiled programs in the same order, as JAX asks of processes that share a mesh. What to run the
others learn from the first, over the connections of their ``Meeting``: on the hosts' side, so that a message does not
wait for the step that the devices are working on.

What devices wait for has deadlines (30 s on CPU devices, and a process that misses one is ended). So hosts meet before
the devices do: a program runs for the first time only when every host has compiled it, and an adapter is ready only
when every host has its weights, and the same ones, in memory.
"""

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax.adapters.peft import HostAdapter, load_adapter, read_header
from slora_jax.engine.batch import BatchShape
from slora_jax.engine.meeting import Meeting
from slora_jax.engine.runner import LaunchArguments, Runner, Started
from slora_jax.engine.sampling import SamplerInputs, SamplerShape
from slora_jax.engine.scoring import ScorerArguments, ScorerShape
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import AdapterCopy, StagedAdapter, UnifiedPool
from slora_jax.model.config import ModelConfig

_POLL_SECONDS = 1.0

_NOTICE_SECONDS = 5.0
"""How much later than the devices the connection may know that a host is gone."""

_COMPILED = "compiled"


class Followers:
    """What the first host tells the others; nothing where there are none.

    ``run``, ``warm_up``, ``start_copy``, ``finish_copy`` and ``stop`` are for the engine loop's thread; ``confirm`` for
    any other.
    """

    def __init__(self, meeting: Meeting | None, runner: Runner):
        """
        Args:
          meeting: host 0's; None where there are no others.
          runner: what compiles this host's programs.
        """
        self._meeting = meeting
        self._runner = runner
        self._places = itertools.count()
        self._checks = itertools.count()
        self._numbers: weakref.WeakKeyDictionary[StagedAdapter, int] = weakref.WeakKeyDictionary()
        # Of weights that left this host's memory: they may die anywhere, so it is only noted then.
        self._gone: deque[int] = deque()
        self._answers: dict[int, dict[int, str]] = {}
        self._answered = threading.Condition()
        self._stopped = False
        if meeting is not None:
            meeting.on_answer(self._take_answer)

    def run(self, arguments: LaunchArguments, draws: bool = True) -> None:
        """They start a step, with the arguments of ``Runner.launch``; without ``draws`` its layers, ahead of ``draw``.

        Returns at once, unless a program of it is not compiled: then when it is, on every host.
        """
        if self._meeting is None:
            return
        shape, packed, sampler, inputs, scorer = arguments
        place = None if self._runner.is_compiled(arguments) else f"step {next(self._places)}"
        places = np.flatnonzero(packed).astype(np.int32)  # tables are mostly empty
        self._tell(
            "run",
            shape=dataclasses.asdict(shape) | {"active": [*shape.active]},
            places=places,
            values=packed[places],
            sampler=dataclasses.asdict(sampler),
            inputs={field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)},
            scorer=None if scorer is None else scorer._asdict() | {"shape": dataclasses.asdict(scorer.shape)},
            meet=place,
            draws=draws,
        )
        if place is not None:
            self._runner.prepare(arguments)
            self._meeting.exchange(place, None)

    def draw(self, allowed: np.ndarray) -> None:
        """They draw the tokens of the step that ``run`` has started, with ``allowed`` among the sampler's inputs."""
        self._tell("draw", allowed=allowed)

    def warm_up(self, active: Sequence[int], max_rank: int, pages: int) -> None:
        """They compile what ``Runner.all_shapes`` gives; and run it when this host has come to ``compiled``."""
        self._tell("warm_up", active=[*active], max_rank=max_rank, pages=pages)

    def compiled(self) -> None:
        """Waits until all have compiled what ``warm_up`` told them to."""
        if self._meeting is not None:
            self._meeting.exchange(_COMPILED, None)

    def confirm(self, host: HostAdapter) -> None:
        """Has the others load an adapter, and waits until they have.

        Args:
          host: it, as staged by the pool. They keep theirs as long as this ``StagedAdapter`` lives.

        Raises:
          BadAdapter: one of them cannot, or its files hold something else; the message says which, and why.
        """
        meeting = self._meeting  # which another thread may stop
        if meeting is None:
            return
        number = next(self._checks)
        self._numbers[host.packed] = number
        weakref.finalize(host.packed, self._gone.append, number).atexit = False
        answers = self._answers[number] = {}
        self._tell("load", number=number, folder=str(host.header.path), content_hash=host.content_hash)
        others = meeting.others
        with self._answered:
            while not (self._stopped or len(answers) == len(others) or any(answers.values())):
                self._answered.wait(_POLL_SECONDS)
        del self._answers[number]
        for other, reason in answers.items():
            if reason:
                raise BadAdapter(f"host {other} has other files than host 0: {reason}")
        if len(answers) < len(others):
            raise BadAdapter(f"adapter {host.header.path}: the hosts are stopping")

    def start_copy(self, staged: StagedAdapter, pages: Sequence[int]) -> None:
        """They bring an adapter to their devices, which ``confirm`` has found on all of them."""
        if self._meeting is not None:
            self._tell("start_copy", number=self._numbers[staged], pages=[*pages])

    def finish_copy(self) -> None:
        """They write the adapter that was started first into its pages."""
        self._tell("finish_copy")

    def check_alone(self) -> None:
        """
        Raises:
          RuntimeError: there are other hosts, whose devices cannot be known to be in the state of this one's.
        """
        if self._meeting is not None:
            raise RuntimeError("several hosts cannot start anew together; start them all again")

    def stop(self) -> None:
        """They end. Nothing can be told afterwards. Idempotent."""
        with self._answered:
            self._stopped = True
            self._answered.notify_all()
        if self._meeting is not None:
            self._tell("stop")
            self._meeting = None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around what waits for the devices: if they fail because a host was lost, that is said first."""
        try:
            yield
        except Exception:
            if self._meeting is not None:
                self._meeting.wait_until_lost(_NOTICE_SECONDS)
            raise

    def _take_answer(self, host: int, answer: dict[str, Any]) -> None:
        with self._answered:
            answers = self._answers.get(answer["number"])
            if answers is not None:
                answers[host] = answer["reason"]
            self._answered.notify_all()

    def _tell(self, what: str, **arguments: Any) -> None:
        meeting = self._meeting
        if meeting is None:
            return
        with contextlib.suppress(IndexError):  # until it is empty, which another thread may make it meanwhile
            while True:
                meeting.send({"kind": "told", "what": "forget", "number": self._gone.popleft()})
        meeting.send({"kind": "told", "what": what, **arguments})


class Follower:
    """Runs on the other hosts what ``Followers`` tells."""

    def __init__(self, meeting: Meeting, model: ModelConfig, layout: PoolLayout, pool: UnifiedPool, runner: Runner):
        self._meeting = meeting
        self._model = model
        self._layout = layout
        self._pool = pool
        self._runner = runner
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="slora-adapter")
        self._copies: deque[AdapterCopy] = deque()
        self._loaded: dict[int, Future[StagedAdapter]] = {}
        # The step whose tokens are not drawn, while there is one.
        self._started: tuple[Started, LaunchArguments]

    def follow(self) -> None:
        """Does as told until told to stop."""
        try:
            for message in self._meeting.messages():
                what = message.pop("what")
                if what == "stop":
                    return
                getattr(self, f"_{what}")(**message)
        finally:
            self._loader.shutdown(cancel_futures=True)

    def _run(
        self,
        shape: dict,
        places: np.ndarray,
        values: np.ndarray,
        sampler: dict,
        inputs: dict,
        scorer: dict | None,
        meet: str | None,
        draws: bool,
    ) -> None:
        batch_shape = BatchShape(**shape | {"active": tuple(shape["active"])})
        packed, _ = batch_shape.zeros()
        packed[places] = values
        arguments = LaunchArguments(
            batch_shape,
            packed,
            SamplerShape(**sampler),
            SamplerInputs(**inputs),
            None if scorer is None else ScorerArguments(**scorer | {"shape": ScorerShape(**scorer["shape"])}),
        )
        if meet is not None:
            self._runner.prepare(arguments)
            self._meeting.exchange(meet, None)
        if draws:
            self._runner.launch(arguments)
        else:
            self._started = self._runner.launch_layers(arguments), arguments

    def _draw(self, allowed: np.ndarray) -> None:
        started, arguments = self._started
        self._runner.launch_sampler(
            started, arguments._replace(inputs=dataclasses.replace(arguments.inputs, allowed=allowed))
        )

    def _warm_up(self, active: Sequence[int], max_rank: int, pages: int) -> None:
        shapes = self._runner.all_shapes(tuple(active), max_rank, pages)
        self._runner.warm_up(shapes, lambda: self._meeting.exchange(_COMPILED, None))

    def _load(self, number: int, folder: str, content_hash: str) -> None:
        self._loaded[number] = loading = self._loader.submit(self._read, Path(folder), content_hash)
        loading.add_done_callback(lambda done: self._answer(number, done))

    def _answer(self, number: int, done: "Future[StagedAdapter]") -> None:
        if done.cancelled():
            return
        error = done.exception()
        reason = str(error) or type(error).__name__ if error else ""
        self._meeting.send({"kind": "answer", "number": number, "reason": reason})

    def _read(self, folder: Path, content_hash: str) -> StagedAdapter:
        host = load_adapter(read_header(folder, self._model, self._layout), self._pool.array.dtype)
        if host.content_hash != content_hash:
            raise BadAdapter(f"adapter {folder} has other weights or scales there; copy it again")
        return self._pool.stage(host.packed)

    def _forget(self, number: int) -> None:
        self._loaded.pop(number).cancel()

    def _start_copy(self, number: int, pages: Sequence[int]) -> None:
        self._copies.append(self._pool.start_copy(self._loaded[number].result(), pages))

    def _finish_copy(self) -> None:
        self._pool.finish_copy(self._copies.popleft())
