"""Several hosts: the first one plans and answers, the others do on their devices what it does on its own.

All hosts run the same compiled programs in the same order, as JAX asks of processes that share a mesh. What to run the
others learn from the first, through the key-value store of JAX's coordination service: it is on the host's side, so a
message does not wait for the step that the devices are working on.
"""

import dataclasses
import itertools
import logging
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.experimental import multihost_utils

from slora_jax.adapters.peft import load_adapter, read_header
from slora_jax.config import MeshConfig
from slora_jax.engine.batch import BatchShape
from slora_jax.engine.runner import Runner
from slora_jax.engine.sampling import SamplerInputs, SamplerShape
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import StagedAdapter, UnifiedPool
from slora_jax.model.config import ModelConfig

logger = logging.getLogger(__name__)

_POLL_MILLISECONDS = 1_000
"""Python hears signals only between polls."""

_LOST_SECONDS = 30
"""A process that gave no sign for so long is lost: JAX then ends the others."""

_STOP = "slora_jax/stop"
"""Set by a host that is asked to stop."""


def join_hosts(config: MeshConfig) -> None:
    """Meets the other hosts' processes, and returns when all are there. Before anything else that JAX does."""
    if config.num_hosts > 1 and not jax.distributed.is_initialized():
        # It would keep SIGTERM from ending the process, in wait for a training loop that saves its state.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            config.coordinator,
            config.num_hosts,
            config.host_id,
            heartbeat_timeout_seconds=_LOST_SECONDS,
            shutdown_timeout_seconds=_LOST_SECONDS,
        )


def agreed_minimum(value: int) -> int:
    """The least of the hosts' values. Every host must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value)).min())


class Followers:
    """What the first host tells the others; nothing where there are none. For the engine loop's thread.

    Messages are dicts of what msgpack knows and numpy arrays. Each host has its own, numbered, and deletes what it has
    read.
    """

    def __init__(self):
        self._hosts: Sequence[int] = range(1, jax.process_count())
        self._numbers = itertools.count()
        self._watch: threading.Thread | None = None
        self._unwatched = threading.Event()

    def watch(self, on_stop: Callable[[], None]) -> None:
        """Calls ``on_stop`` once, in a thread of its own, if another host is asked to stop, until ``unwatch``.

        They go on until ``stop``, which waits for the thread: none may be inside of JAX at the end of a process.
        """

        def wait():
            while not self._unwatched.is_set():
                if _value(_STOP) is not None:
                    if not self._unwatched.is_set():
                        on_stop()
                    return

        if self._hosts and self._watch is None:
            self._watch = threading.Thread(target=wait, name="slora-hosts")
            self._watch.start()

    def unwatch(self) -> None:
        """What others are asked no longer matters: this host is stopping. Returns at once."""
        self._unwatched.set()

    def run(self, shape: BatchShape, packed: np.ndarray, sampler: SamplerShape, inputs: SamplerInputs) -> None:
        """They start a step, with the arguments of ``Runner.launch``."""
        if not self._hosts:
            return
        places = np.flatnonzero(packed).astype(np.int32)  # tables are mostly empty
        self._tell(
            "run",
            shape=dataclasses.asdict(shape) | {"active": [*shape.active]},
            places=places,
            values=packed[places],
            sampler=dataclasses.asdict(sampler),
            inputs={field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)},
        )

    def warm_up(self, active: Sequence[int], max_rank: int, pages: int) -> None:
        """They compile and run what ``Runner.all_shapes`` gives."""
        self._tell("warm_up", active=[*active], max_rank=max_rank, pages=pages)

    def start_copy(self, folder: Path, content_hash: str, pages: Sequence[int]) -> None:
        """They bring the adapter of that folder to their devices."""
        self._tell("start_copy", folder=str(folder), content_hash=content_hash, pages=[*pages])

    def finish_copy(self) -> None:
        """They write the adapter that was started first into its pages."""
        self._tell("finish_copy")

    def check_alone(self) -> None:
        """
        Raises:
          RuntimeError: there are other hosts, whose devices cannot be known to be in the state of this one's.
        """
        if self._hosts:
            raise RuntimeError("several hosts cannot start anew together; start them all again")

    def stop(self) -> None:
        """They end. Nothing can be told afterwards."""
        self._tell("stop")
        self._hosts = ()
        self.unwatch()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join()

    def _tell(self, what: str, **arguments: Any) -> None:
        if not self._hosts:
            return
        message = serialization.msgpack_serialize({"what": what, **arguments})
        number = next(self._numbers)
        for host in self._hosts:
            _store().key_value_set_bytes(_key(host, number), message)


class Follower:
    """Runs on the other hosts what ``Followers`` tells.

    Args:
      host_adapter_bytes: of host memory for adapters; those used last stay.
    """

    def __init__(
        self, model: ModelConfig, layout: PoolLayout, pool: UnifiedPool, runner: Runner, host_adapter_bytes: int
    ):
        self._model = model
        self._layout = layout
        self._pool = pool
        self._runner = runner
        self._host_adapter_bytes = host_adapter_bytes
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="slora-adapter")
        self._copies: deque[Future] = deque()
        self._staged: OrderedDict[str, StagedAdapter] = OrderedDict()

    def follow(self) -> None:
        """Does as told until told to stop. For the main thread: Ctrl-C and SIGTERM ask the first host to stop them all.

        Raises:
          BadAdapter: an adapter's folder does not hold here what it holds on the first host.
        """
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, _ask_to_stop) for number in signals]
        try:
            for number in itertools.count():
                message = _received(_key(jax.process_index(), number))
                what = message.pop("what")
                if what == "stop":
                    return
                getattr(self, f"_{what}")(**message)
        finally:
            self._loader.shutdown(cancel_futures=True)
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _run(self, shape: dict, places: np.ndarray, values: np.ndarray, sampler: dict, inputs: dict) -> None:
        batch_shape = BatchShape(**shape | {"active": tuple(shape["active"])})
        packed, _ = batch_shape.zeros()
        packed[places] = values
        self._runner.launch(batch_shape, packed, SamplerShape(**sampler), SamplerInputs(**inputs))

    def _warm_up(self, active: Sequence[int], max_rank: int, pages: int) -> None:
        self._runner.warm_up(self._runner.all_shapes(tuple(active), max_rank, pages))

    def _start_copy(self, folder: str, content_hash: str, pages: Sequence[int]) -> None:
        self._copies.append(self._loader.submit(self._copied, Path(folder), content_hash, tuple(pages)))

    def _finish_copy(self) -> None:
        self._pool.finish_copy(self._copies.popleft().result())

    def _copied(self, folder: Path, content_hash: str, pages: Sequence[int]):
        staged = self._staged.pop(content_hash, None)
        if staged is None:
            host = load_adapter(read_header(folder, self._model, self._layout), self._pool.array.dtype)
            if host.content_hash != content_hash:
                raise BadAdapter(f"adapter {folder} is another one here than on the first host; copy it again")
            staged = self._pool.stage(host.packed)
        self._staged[content_hash] = staged
        used = sum(self._pool.staged_bytes(s.num_pages) for s in self._staged.values())
        while used > self._host_adapter_bytes and len(self._staged) > 1:
            used -= self._pool.staged_bytes(self._staged.popitem(last=False)[1].num_pages)
        return self._pool.start_copy(staged, pages)


def _store():
    """JAX's key-value store, which has no public name: ``jax.distributed`` meets and parts, no more, and what
    ``multihost_utils`` sends goes through the devices. ``test_followers`` holds what is used of it.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _key(host: int, number: int) -> str:
    return f"slora_jax/{host}/{number}"


def _ask_to_stop(number: int, frame: object) -> None:
    _store().key_value_set_bytes(_STOP, b"1", allow_overwrite=True)


def _value(key: str) -> bytes | None:
    """What is or comes under the key, or None after a poll."""
    try:
        return _store().blocking_key_value_get_bytes(key, _POLL_MILLISECONDS)
    except jax.errors.JaxRuntimeError as e:
        if "DEADLINE_EXCEEDED" not in str(e):
            raise
        return None


def _received(key: str) -> dict[str, Any]:
    while (message := _value(key)) is None:
        pass
    _store().key_value_delete(key)
    return serialization.msgpack_restore(message)
