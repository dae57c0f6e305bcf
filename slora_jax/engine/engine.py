"""The engine: requests in, tokens out. Owns the scheduler, the adapter store, the pool and the runner."""

import gc
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from slora_jax.adapters.peft import resolve_adapter_path
from slora_jax.adapters.store import AdapterInfo, AdapterStore, AdapterVersion
from slora_jax.adapters.synthetic import loaded_adapter
from slora_jax.config import EngineConfig, SchedulerConfig
from slora_jax.engine.batch import AdapterSlice
from slora_jax.engine.build import (
    host_adapter_bytes,
    load_base,
    make_buckets,
    make_pool,
    pool_layout_of,
    program_folder,
)
from slora_jax.engine.generation import Generation, OutputText
from slora_jax.engine.hosts import Followers
from slora_jax.engine.runner import Runner, StepInFlight
from slora_jax.errors import BadAdapter, EngineStopped, InvalidRequest, Overloaded
from slora_jax.memory.costs import PageCosts
from slora_jax.memory.layout import MODULES
from slora_jax.memory.pages import PageAllocator
from slora_jax.memory.pool import AdapterCopy
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import GATHERED, LoraOps
from slora_jax.model.mesh import ModelMesh
from slora_jax.process import OwnProcess
from slora_jax.request import Request
from slora_jax.scheduler.capacity import Capacity
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterLoad, Sequence, StepPlan
from slora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_IDLE_WAIT_SECONDS = 1.0


@dataclass(slots=True)
class _Answer:
    """Where a sequence's tokens go."""

    generation: Generation
    output: OutputText


class Engine:
    """Serves requests for one base model and any number of its adapters. Thread-safe.

    Either call ``start`` and let a background thread run steps, or call ``step`` yourself until it returns False.

    Attributes:
      model_name: the base model's served name.
      model_config: its shape.
      max_model_len: longest sequence, prompt and output, in tokens.
      tokenizer: None for dummy models.
      pool_layout, dtype: of the pool, and so of packed adapters.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        params: dict,
        tokenizer: Tokenizer | None,
        model_name: str,
        mesh: ModelMesh | None = None,
        lora_ops: LoraOps = GATHERED,
    ):
        dtype = jax.tree.leaves(params)[0].dtype
        self._process = OwnProcess()
        self.config = config
        self._built_for = config.scheduler
        self.model_name = model_name
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.pool_layout = layout = pool_layout_of(model_config, mesh)
        self._pool, self.max_model_len = make_pool(config, model_config, layout, dtype, mesh)
        if layout.shards.num_idle:
            logger.warning(
                "%d of %d devices have no attention heads, only their share of the MLP: the model has %d KV heads",
                layout.shards.num_idle,
                layout.shards.count,
                model_config.num_kv_heads,
            )
        self._max_rank = lora_ops.max_rank
        self._pages = PageAllocator(self._pool.num_pages)
        self._wake_event = threading.Event()
        self._store = AdapterStore(
            model_config,
            layout,
            dtype,
            on_change=self._wake,
            stage=self._pool.stage,
            capacity=host_adapter_bytes(config),
            host_bytes=self._pool.staged_bytes,
            max_pinned_pages=self._pages.total // 2,
        )
        self._pinned: tuple[AdapterVersion, ...] = ()
        self._copies: deque[tuple[AdapterLoad, AdapterCopy]] = deque()
        self._slices: dict[Hashable, AdapterSlice] = {}
        page_bytes = layout.page_bytes(dtype.itemsize)
        on_gpu = jax.default_backend() != "cpu"
        self._costs = PageCosts.estimate(model_config, page_bytes, layout.shards.count, on_gpu)
        self._scheduler = Scheduler(config.scheduler, self._pages, time.monotonic, costs=self._costs)
        self._runner = Runner(
            model_config,
            params,
            self._pool,
            make_buckets(config),
            self.max_model_len,
            mesh,
            program_folder(config),
            lora_ops,
        )
        self._followers = Followers()
        self._in_flight: tuple[StepPlan, StepInFlight] | None = None
        self._answers: dict[int, _Answer] = {}
        self._sequence_ids = itertools.count()
        self._seeds = np.random.default_rng(config.seed)
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._submitted: deque[list[tuple[Sequence, _Answer]]] = deque()
        self._cancelled: deque[Generation] = deque()
        self._num_unadmitted = 0
        self._thread: threading.Thread | None = None
        self._closed: str | None = None
        self._on_failure: Callable[[str], None] = lambda reason: None
        self._counts_before: Counter[str] = Counter()
        self._counts = dict.fromkeys(
            (
                "steps", "prefill_tokens", "decode_tokens", "adapter_loads", "adapter_load_bytes", "preemptions",
                "cached_tokens", "late",
            ),
            0,
        )  # fmt: skip

    @classmethod
    def create(cls, config: EngineConfig, progress: bool = True) -> "Engine":
        """Loads the base model and registers the configured adapters.

        Raises:
          UnsupportedModel, BadAdapter, UnknownAdapter, InvalidRequest: what cannot be loaded or pinned, and why.
        """
        base = load_base(config, progress)
        engine = cls(config, base.model_config, base.params, base.tokenizer, base.name, base.mesh)
        try:
            for adapter, path in config.adapters.items():
                engine.register_adapter(adapter, path)
            for directory in config.adapter_dirs:
                engine.register_adapter_dir(directory)
            for name in config.pinned:
                engine._store.pin(name)
        except BaseException:
            engine.close()
            raise
        return engine

    # Adapters

    def adapters(self) -> Mapping[str, AdapterInfo]:
        """A snapshot of the registered adapters by name."""
        return self._store.infos()

    def adapter(self, name: str) -> AdapterInfo:
        """One of them.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        return self._store.get(name).info

    def register_adapter(self, name: str, path: str, pinned: bool = False) -> AdapterInfo:
        """Makes an adapter available under a name; its weights are loaded when first asked for.

        Args:
          path: a PEFT folder or a Hugging Face id.
          pinned: bring it to the pool now, and keep it there. An adapter that is registered again without is unpinned.

        Raises:
          BadAdapter: it cannot be served exactly as trained, the name is the base model's, or pinned adapters would
            take more than half of the pool; nothing changes.
        """
        self._check_adapter_name(name)
        info = self._store.register(name, resolve_adapter_path(path), pinned)
        self._wake()
        return info

    def register_loaded_adapter(
        self, name: str, ranks: Mapping[str, int], packed: np.ndarray, scale: float = 1.0
    ) -> AdapterInfo:
        """Makes an adapter available whose weights are in memory; see ``loaded_adapter`` and ``synthetic_weights``.

        Ready at once. Adapters that share ``packed`` share its host memory, but each has pages of its own in the pool.

        Raises:
          BadAdapter: a bad name, ranks or shape, or there are several hosts; nothing changes.
          ValueError: ``packed`` has not the pool's ``dtype``.
        """
        if self.config.mesh.num_hosts > 1:
            raise BadAdapter(f"adapter {name}: several hosts read adapters from folders; save it as one")
        self._check_adapter_name(name)
        return self._store.register_loaded(name, loaded_adapter(name, ranks, packed, self.pool_layout, scale))

    def _check_adapter_name(self, name: str) -> None:
        if name == self.model_name:
            raise BadAdapter(f"adapter name {name!r} is the base model's; choose another")

    def register_adapter_dir(self, directory: str) -> None:
        """Registers every subfolder that is an adapter; one that is refused is logged and leaves the others alone."""
        infos, refused = self._store.register_dir(Path(directory))
        if self.model_name in infos:
            self._store.unregister(self.model_name)
            del infos[self.model_name]
            refused[self.model_name] = "the name is the base model's"
        logger.info("registered %d adapters of %s", len(infos), directory)
        for name, reason in refused.items():
            logger.warning("adapter %s refused: %s", name, reason)

    def unregister_adapter(self, name: str) -> None:
        """Forgets an adapter's name; requests already submitted are still answered.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        self._store.unregister(name)
        self._wake()

    # Requests

    def submit(self, request: Request) -> Generation:
        """Queues a request and returns at once.

        Raises:
          InvalidRequest: the prompt is empty, has an unknown token, or cannot fit the context or the pool; or a field
            is for another scheduling policy than this engine's.
          UnknownAdapter: ``request.adapter`` is not registered.
          Overloaded: too many requests are waiting.
          EngineStopped: the engine is closed, or another process's.
        """
        self.check_process()
        adapter = self._store.get(request.adapter) if request.adapter is not None else None
        self._check_policy_fields(request)
        max_tokens = self._check_prompt(request, adapter)
        generation = Generation(request, self._cancel)
        sampling = request.sampling
        with self._lock:
            if self._closed:
                raise EngineStopped(self._closed)
            waiting = self._scheduler.num_waiting + self._num_unadmitted
            if waiting + sampling.n > self.config.scheduler.max_waiting:
                raise Overloaded(
                    f"{waiting} sequences are waiting, and at most {self.config.scheduler.max_waiting} may; "
                    "try again later"
                )
            seed = sampling.seed if sampling.seed is not None else int(self._seeds.integers(2**63))
            leader = None
            group = []
            # Under the lock, so that it increases with the sequences' ids.
            arrival = time.monotonic()
            for index in range(sampling.n):
                sequence = Sequence(
                    sequence_id=next(self._sequence_ids),
                    tokens=list(request.prompt),
                    num_prompt=len(request.prompt),
                    max_tokens=max_tokens,
                    sampling=sampling,
                    seed=seed + index,
                    adapter=adapter,
                    leader=leader,
                    arrival=arrival,
                    tenant=request.adapter or self.model_name,
                    priority=request.priority,
                    slo_s=None if request.slo_ms is None else request.slo_ms / 1000,
                )
                leader = leader or sequence
                eos = self.model_config.eos_token_ids
                output = OutputText(request, index, max_tokens, eos, self.tokenizer)
                generation.sequences.append(sequence)
                group.append((sequence, _Answer(generation, output)))
            self._submitted.append(group)
            self._num_unadmitted += len(group)
        self._wake()
        return generation

    @property
    def gives_up_late(self) -> bool:
        """Whether requests that would miss their first-token objective end with "late" instead."""
        return self.config.scheduler.policy == "abort"

    def _check_policy_fields(self, request: Request) -> None:
        policy = self.config.scheduler.policy
        for field, given, needed in (
            ("priority", request.priority != 0, "priority"),
            ("slo_ms", request.slo_ms is not None, "abort"),
        ):
            if given and policy != needed:
                raise InvalidRequest(
                    f"{field} means something under the policy {needed!r} only, and this engine runs {policy!r}; "
                    f"leave it out or start with scheduler.policy={needed}",
                    field,
                )

    def _check_prompt(self, request: Request, adapter) -> int:
        """Returns how many tokens may be generated."""
        length, vocab = len(request.prompt), self.model_config.vocab_size
        if length == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        if length >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {length} tokens, but the context holds {self.max_model_len} including the output; "
                "shorten the prompt",
                "prompt",
            )
        if not (min(request.prompt) >= 0 and max(request.prompt) < vocab):
            raise InvalidRequest(f"prompt token ids must be in [0, {vocab})", "prompt")
        if request.sampling.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none; use stop_token_ids", "stop")
        max_tokens = min(request.sampling.max_tokens, self.max_model_len - length)
        refusal = self._scheduler.refusal(length + max_tokens, adapter)
        if refusal is not None:
            raise InvalidRequest(refusal, "max_tokens")
        return max_tokens

    def _cancel(self, generation: Generation) -> None:
        self._cancelled.append(generation)
        self._wake()

    # The loop

    def step(self) -> bool:
        """Plans and starts one step while the previous one runs, then takes the previous one's tokens.

        Not thread-safe: for whoever runs the loop.

        Returns:
          Whether anything was done; False means that nothing can go on until a request or an adapter arrives.
        """
        self._take_submitted()
        self._take_cancelled()
        self._take_arrived()
        if self._store.pinned is not self._pinned:
            self._pinned = self._store.pinned
            self._scheduler.pin(self._pinned)
        plan = self._scheduler.plan()
        for sequence, reason in plan.failed:
            self._end(sequence, "error", reason)
        for sequence in plan.late:
            self._give_up(sequence)
        previous, self._in_flight = self._in_flight, self._launch(plan)
        if previous is not None:
            self._commit(*previous)
        elif self._in_flight is None and self._copies:
            # Nothing runs until an adapter is there.
            self._copies[0][1].wait()
            return True
        return previous is not None or self._in_flight is not None or bool(plan.failed or plan.late) or plan.is_cut

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, StepInFlight] | None:
        for load in plan.loads:
            host = load.adapter.host()
            staged = host.packed
            self._followers.start_copy(host.header.path, host.content_hash, load.pages)
            self._copies.append((load, self._pool.start_copy(staged, load.pages)))
            self._counts["adapter_loads"] += 1
            self._counts["adapter_load_bytes"] += staged.nbytes
        self._counts["preemptions"] += plan.num_preempted
        if not plan.entries:
            return None
        self._counts["steps"] += 1
        prefill = 0
        for sequence, start, count, _, _ in plan.entries:
            if start < sequence.num_prompt:
                prefill += min(count, sequence.num_prompt - start)
        self._counts["prefill_tokens"] += prefill
        self._counts["decode_tokens"] += plan.num_tokens - prefill
        return plan, self._runner.run(plan.entries, self._adapter_slices(plan), self._followers.run)

    def _adapter_slices(self, plan: StepPlan) -> dict[Hashable, AdapterSlice]:
        keys = dict.fromkeys(entry.sequence.adapter_key for entry in plan.entries)
        keys.pop(None, None)
        return {key: self._slices[key] for key in keys}

    def _take_arrived(self) -> None:
        """Has arrived adapters written to the pool, in the order in which their copies were started."""
        while self._copies and self._copies[0][1].is_ready:
            load, copy = self._copies.popleft()
            self._followers.finish_copy()
            self._pool.finish_copy(copy)
            self._scheduler.adapter_arrived(load)
            header = load.adapter.header
            if self._max_rank is not None and max(header.layout.ranks) > self._max_rank:
                raise ValueError(
                    f"an adapter has rank {max(header.layout.ranks)}, but this engine was made with lora_ops for at "
                    f"most {self._max_rank}; make them for the largest rank"
                )
            self._slices[load.key] = AdapterSlice(
                pages=load.pages,
                ranks=header.layout.ranks,
                start_a=header.layout.start_a,
                start_b=header.layout.start_b,
                scales=header.scales,
            )
        if len(self._slices) > 2 * self._pages.total:
            # There cannot be as many adapters as pages; these are of evicted ones.
            self._slices = {key: s for key, s in self._slices.items() if self._pages.lookup(key) is not None}

    def _commit(self, plan: StepPlan, step: StepInFlight) -> None:
        tokens, logprobs = step.read()
        ended = []
        for (sequence, _, _, samples, _), token, logprob in zip(step.entries, tokens.tolist(), logprobs, strict=True):
            if not samples:
                continue
            sequence.num_pending -= 1
            answer = self._answers.get(sequence.sequence_id)
            if answer is None:
                # It ended while this step was running.
                continue
            sequence.tokens.append(token)
            if sequence.leader is None and len(sequence.tokens) == sequence.num_prompt + 1:
                answer.generation.cached_tokens = sequence.cached_tokens
                self._counts["cached_tokens"] += sequence.cached_tokens
            delta = answer.output.push(token, logprob)
            answer.generation.put(delta)
            if delta.finish_reason is not None:
                ended.append(sequence)
        self._scheduler.commit(plan)
        for sequence in ended:
            self._forget(sequence)

    def _end(self, sequence: Sequence, reason, error: str | None = None) -> None:
        answer = self._answers.get(sequence.sequence_id)
        if answer is not None:
            answer.generation.put(answer.output.end(reason, error))
        self._forget(sequence)

    def _give_up(self, leader: Sequence) -> None:
        """Ends all of a request whose first token could not come in time."""
        answer = self._answers.get(leader.sequence_id)
        if answer is None:
            return
        self._counts["late"] += 1
        slo = self.config.scheduler.slo_ms if leader.slo_s is None else leader.slo_s * 1000
        waited = (time.monotonic() - leader.arrival) * 1000
        for sequence in answer.generation.sequences:
            self._end(
                sequence,
                "late",
                f"given up after {waited:.0f} ms of waiting: its first token could not come within its objective of "
                f"{slo:.0f} ms; try again later, or with a larger slo_ms",
            )

    def _take_submitted(self) -> None:
        while self._submitted:
            group = self._submitted.popleft()
            for sequence, answer in group:
                self._answers[sequence.sequence_id] = answer
                self._scheduler.add(sequence)
            with self._lock:
                self._num_unadmitted -= len(group)

    def _take_cancelled(self) -> None:
        while self._cancelled:
            generation = self._cancelled.popleft()
            for sequence in generation.sequences:
                if sequence.sequence_id in self._answers:
                    self._end(sequence, "abort", "cancelled by the caller")

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._answers.pop(sequence.sequence_id, None)

    def warm_up(self) -> None:
        """Compiles the steps' shapes and runs each once, so that no request waits for it, if the configuration says so.

        Call it before the first step. Shapes with adapters are those for the
        modules, ranks and pages of the adapters registered so far.
        """
        on_gpu = jax.default_backend() != "cpu"
        if not (on_gpu if self.config.warm_up is None else self.config.warm_up):
            return
        start = time.perf_counter()
        adapters = self.adapters().values()
        changed = {module for info in adapters for module in info.ranks}
        active = [MODULES.index(module) for module in changed]
        max_rank = max((info.rank for info in adapters), default=1)
        pages = max((info.num_pages for info in adapters), default=1)
        self._followers.warm_up(active, max_rank, pages)
        shapes = self._runner.all_shapes(active, max_rank, pages)
        self._runner.warm_up(shapes)
        logger.info("warmed up %d shapes of steps in %.1f s", len(shapes), time.perf_counter() - start)

    def reschedule(
        self,
        config: SchedulerConfig,
        pages: PageAllocator | None = None,
        create: Callable[..., Scheduler] = Scheduler,
    ) -> None:
        """Goes on under other scheduler settings, with an empty pool; compiled steps and adapters in host memory stay.

        Counters of ``stats`` go on too. If it raises, nothing changes.

        For whoever runs the loop by calling ``step``, while nothing is under way.

        Args:
          config: steps no larger than those that the engine was made for.
          pages: the pages to hand out, at most the pool's; None for all of them.
          create: makes the scheduler, of the arguments of ``Scheduler``.

        Raises:
          ValueError: larger steps, more pages than the pool has, or so few that pinned adapters take more than half.
          RuntimeError: something is under way.
        """
        built = self._built_for
        if config.max_batch_tokens > built.max_batch_tokens or config.max_sequences > built.max_sequences:
            raise ValueError(
                f"steps of {config.max_batch_tokens} tokens and {config.max_sequences} sequences are larger than the "
                f"{built.max_batch_tokens} and {built.max_sequences} this engine was made for; make another"
            )
        pages = pages or PageAllocator(self._pool.num_pages)
        if pages.num_pages > self._pool.num_pages:
            raise ValueError(f"{pages.num_pages} pages are more than the pool's {self._pool.num_pages}")
        with self._lock:
            if self._submitted or self._answers or self._in_flight or self._copies or not self._scheduler.is_idle:
                raise RuntimeError("the engine is not idle; call step until it returns False")
            scheduler = create(config, pages, time.monotonic, costs=self._costs)
            self._store.limit_pins(pages.total // 2)
            self._counts_before.update(self._replaced_counts())
            self._scheduler.close()
            self.config = self.config.model_copy(update={"scheduler": config})
            self._pages, self._scheduler = pages, scheduler
            self._pinned = self._store.pinned
            self._scheduler.pin(self._pinned)
            self._slices.clear()

    def _replaced_counts(self) -> dict[str, int]:
        """Of the scheduler and the pages, which ``reschedule`` replaces."""
        return {
            "adapter_prefetch_hits": self._scheduler.num_prefetch_hits,
            "adapter_prefetch_late": self._scheduler.num_prefetch_late,
            "adapter_prefetch_wasted": self._scheduler.num_prefetch_wasted,
            "evictions": self._pages.num_evictions,
        }

    def start(self) -> None:
        """Runs steps in a background thread until ``close``."""
        if self._thread is not None:
            raise EngineStopped("the engine was already started")
        self._thread = threading.Thread(target=self._loop, name="slora-engine", daemon=True)
        self._thread.start()

    def check_process(self) -> None:
        """Does nothing in the process that made the engine.

        Raises:
          EngineStopped: this is a forked child of it, in which the engine cannot be used.
        """
        self._process.check()

    def watch_hosts(self, on_stop: Callable[[], None]) -> None:
        """Calls ``on_stop`` once, in a thread of its own, if another host's process is asked to stop."""
        self._followers.watch(on_stop)

    def close(self) -> None:
        """Stops the loop and ends all requests with "abort"; a second call waits for the first. Idempotent.

        Does nothing in a forked child, whose parent goes on with the engine.
        """
        if not self._process.is_here:
            return
        with self._lock:
            self._closed = self._closed or "the engine was closed"
        self._followers.unwatch()
        self._wake()
        # Two threads may close: whoever returns may end the process, under which the other must not be inside of JAX.
        with self._closing:
            if self._thread is not None:
                self._thread.join()
            try:
                self._end_all("abort", self._closed)
                self._followers.stop()
            finally:
                self._store.close()

    def _loop(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    # The timeout is a safety net only: submit, cancel, close and adapters that get ready all wake.
                    self.wait_for_work(_IDLE_WAIT_SECONDS)
        except Exception as e:
            logger.exception("the engine loop failed")
            with self._lock:
                self._closed = f"the engine failed: {type(e).__name__}: {e}"
            self._end_all("error", self._closed)
            self._on_failure(self._closed)

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Has ``callback`` told why, from the loop's thread, if the loop ends because it cannot go on."""
        self._on_failure = callback

    def _end_all(self, reason, error: str) -> None:
        self._take_submitted()
        for answer in list(self._answers.values()):
            answer.generation.put(answer.output.end(reason, error))
        self._answers.clear()

    def _wake(self) -> None:
        self._wake_event.set()

    def wait_for_work(self, timeout: float) -> None:
        """Waits until a request or an adapter may have arrived; for whoever runs the loop."""
        self._wake_event.wait(timeout)
        self._wake_event.clear()

    # Observation

    @property
    def is_running(self) -> bool:
        """Whether the background loop is alive and answers requests."""
        return self._closed is None and self._thread is not None and self._thread.is_alive()

    def stats(self) -> dict[str, int | float]:
        """Counters since the start, and the current load."""
        return {
            **self._counts,
            **{name: count + self._counts_before[name] for name, count in self._replaced_counts().items()},
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting + self._num_unadmitted,
            "pages_total": self._pages.total,
            "pages_used": self._pages.num_used,
            "pages_cached": self._pages.num_cached,
            "pages_free": self._pages.num_free,
            "host_adapter_bytes": self._store.host_bytes_used,
            "host_adapter_loads": self._store.num_loads,
        }

    def capacity(self, adapter: str | None, num_tokens: int) -> Capacity:
        """How many more requests of this length on this adapter could start now, beside those that run.

        Args:
          adapter: its name; None for the base model.
          num_tokens: of a request's prompt and output together.

        Raises:
          UnknownAdapter: no adapter of that name.
          InvalidRequest: no request may be that long, or ``num_tokens`` is below 2.
        """
        version = self._store.get(adapter) if adapter is not None else None
        if not 2 <= num_tokens <= self.max_model_len:
            raise InvalidRequest(
                f"prompt and output together must have 2 to {self.max_model_len} tokens, got {num_tokens}"
            )
        return self._scheduler.capacity(num_tokens, version)

    def check_integrity(self) -> None:
        """Asserts that every page of the pool is owned exactly once."""
        self._pages.check_integrity()


def leave_alone_what_exists() -> None:
    """Tells Python's collector that whatever exists now stays: for a process that keeps its engine to its end.

    A full collection otherwise looks at all objects of JAX and the engine, a quarter of a million for the smallest
    model, and stops every request for 0.2 s and more.
    """
    gc.collect()
    gc.freeze()
