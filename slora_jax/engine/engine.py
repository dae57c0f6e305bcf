"""The engine as its callers see it: requests in, streams of text out, in any thread. The loop itself is ``core``."""

import atexit
import contextlib
import gc
import itertools
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slora_jax.adapters.peft import printable, resolve_adapter_path
from slora_jax.adapters.store import AdapterInfo, AdapterVersion
from slora_jax.adapters.synthetic import loaded_adapter
from slora_jax.config import EngineConfig, SchedulerConfig
from slora_jax.engine.build import EngineParts, build_parts
from slora_jax.engine.core import Core, Ended, Outcome, in_words
from slora_jax.engine.generation import Generation, OutputText
from slora_jax.engine.meeting import Meeting
from slora_jax.engine.observation import AdapterSeen, Observation, Tier
from slora_jax.errors import BadAdapter, EngineStopped, InvalidRequest, Overloaded
from slora_jax.histogram import Counted
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.modules import MODULES
from slora_jax.process import OwnProcess
from slora_jax.request import Delta, FinishReason, Request, TokenLogprob
from slora_jax.scheduler.capacity import Capacity
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import Constraint, Emitted, Sequence
from slora_jax.scheduler.traffic import Whereabouts
from slora_jax.text.adapters import AdapterTokenizers
from slora_jax.text.bad_words import NoBadWords, spellings
from slora_jax.text.grammar import Grammars
from slora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
events = logging.getLogger("slora_jax.events")
"""What changes what a running engine serves."""

_IDLE_WAIT_SECONDS = 1.0
_ADAPTERS_BETWEEN_RESTS = 500
_MOST_WAITING_SEEN = 4096


@dataclass(slots=True)
class _Answer:
    """Where a sequence's tokens go."""

    sequence: Sequence
    generation: Generation
    output: OutputText
    index: int

    def end(self, reason: FinishReason, error: str) -> None:
        try:
            delta = self.output.end(reason, error)
        except Exception:
            # The text that was withheld is lost; that the request ended must not be.
            logger.exception("the end of an answer could not be turned into text")
            delta = Delta(self.index, "", finish_reason=reason, error=error)
        self.generation.put(delta, time.monotonic())


class Engine:
    """Serves requests for one base model and any number of its adapters. Thread-safe.

    Either call ``start`` and let a background thread run steps, or call ``step`` yourself until it returns False.

    Attributes:
      config: with the scheduler's settings that are in use.
      parts: what it is made of: device, adapter store, tokenizer. Engines may follow each other over the same parts.
      model_name: the base model's served name.
      model_config: its shape.
      max_model_len: longest sequence, prompt and output, in tokens.
      tokenizer: None for dummy models.
      default_sampling: fields of ``SamplingParams`` for requests that do not give them; ``submit`` itself adds none.
      pool_layout, dtype: of the pool, and so of packed adapters.
      device: runs the steps.
    """

    def __init__(
        self,
        parts: EngineParts,
        scheduler: SchedulerConfig | None = None,
        create_budget: Callable[[], PageBudget] | None = None,
        observe: Callable[[str], None] = lambda part: None,
    ):
        """
        Args:
          parts: see ``build_parts``. No other engine may be using them.
          scheduler: settings in place of the configuration's, with steps no larger than those.
          create_budget: makes the budget of the pool's pages, or of fewer pages than the pool has; None for the unified
            pool, whole.
          observe: see ``Core``.

        Raises:
          ValueError: larger steps, or more pages, than the parts are made for; or pinned adapters take too many.
        """
        built = parts.config.scheduler
        settings = scheduler or built
        if settings.max_batch_tokens > built.max_batch_tokens or settings.max_sequences > built.max_sequences:
            raise ValueError(
                f"steps of {settings.max_batch_tokens} tokens and {settings.max_sequences} sequences are larger than "
                f"the {built.max_batch_tokens} and {built.max_sequences} these parts were made for; make others"
            )
        self.config = parts.config.model_copy(update={"scheduler": settings})
        self.parts = parts
        self._process = OwnProcess()
        self.model_name = parts.model_name
        self.model_config = parts.model_config
        self.max_model_len = parts.max_model_len
        self.tokenizer = parts.tokenizer
        self.default_sampling = parts.default_sampling
        self.pool_layout = parts.pool_layout
        self.dtype = parts.dtype
        self.device = parts.device
        self._store = parts.store
        self._wake_event = parts.wake_event

        def unified() -> PageBudget:
            return PageBudget(PageAllocator(parts.device.pool.num_pages))

        def create_scheduler() -> Scheduler:
            budget = self._budget = (create_budget or unified)()
            if budget.pages.num_pages > parts.device.pool.num_pages:
                raise ValueError(
                    f"{budget.pages.num_pages} pages are more than the pool's {parts.device.pool.num_pages}"
                )
            return Scheduler(
                settings,
                budget.pages,
                time.monotonic,
                costs=parts.costs,
                budget=budget,
                page_tokens=parts.pool_layout.page_tokens,
            )

        self.device.forget()
        self._core = Core(create_scheduler, self.device, observe)
        self._store.limit_pins(self._budget.max_pinned_pages)
        self._adapter_tokenizers = AdapterTokenizers(self.tokenizer) if self.tokenizer else None
        self._grammars = (
            Grammars(self.tokenizer, self.model_config.vocab_size, self.model_config.eos_token_ids)
            if self.tokenizer
            else None
        )
        # Only of those whose folder has a chat template of its own. A version takes its entry with it.
        self._tokenizers: weakref.WeakKeyDictionary[AdapterVersion, Tokenizer] = weakref.WeakKeyDictionary()
        self._answers: dict[int, _Answer] = {}
        self._sequence_ids = itertools.count()
        self._seeds = np.random.default_rng(self.config.seed)
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._submitted: deque[list[_Answer]] = deque()
        self._cancelled: deque[Generation] = deque()
        self._num_unadmitted = 0
        self._thread: threading.Thread | None = None
        self._on_failure: Callable[[str], None] = lambda sentence: None
        self._closed: str | None = None
        self._on_close = contextlib.ExitStack()
        self._counts = Counter(cached_tokens=0, late=0, prompt_tokens=0, generated_tokens=0)
        self._finished: Counter[FinishReason] = Counter()

    @classmethod
    def create(cls, config: EngineConfig, progress: bool = True, meeting: Meeting | None = None) -> "Engine":
        """Loads the base model and registers the configured adapters. ``close`` gives everything back.

        Args:
          config: of the engine.
          progress: show bars.
          meeting: where the hosts of ``config.mesh`` meet, if there are several; see ``together``.

        Raises:
          UnsupportedModel, BadAdapter, UnknownAdapter, InvalidRequest: what cannot be loaded or pinned, and why.
        """
        return cls.owning(build_parts(config, progress, meeting))

    @classmethod
    def owning(cls, parts: EngineParts) -> "Engine":
        """An engine over parts that ``close`` closes with it, with the configured adapters registered.

        Raises:
          BadAdapter, UnknownAdapter: what cannot be registered or pinned, and why; the parts are closed then.
        """
        engine = cls(parts)
        engine._on_close.callback(parts.close)
        config = parts.config
        try:
            for adapter, path in config.adapters.items():
                engine.register_adapter(adapter, path)
            for directory in config.adapter_dirs:
                engine.register_adapter_dir(directory)
            for name in config.pinned:
                parts.store.pin(name)
            parts.device.runner.expect(*engine._adapter_needs())
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

    def whereabouts(self, name: str) -> Whereabouts:
        """Where an adapter is, between its folder and the pool.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        return self._core.scheduler.whereabouts(self._store.get(name))

    def register_adapter(self, name: str, path: str, pinned: bool = False, replace: bool = True) -> AdapterInfo:
        """Makes an adapter available under a name; its weights are loaded when first asked for.

        Args:
          path: a PEFT folder or a Hugging Face id.
          pinned: bring it to the pool now, and keep it there. An adapter that is registered again without is unpinned.
          replace: let it take the place of an adapter of this name; requests that run on that one end on its weights.

        Raises:
          AdapterExists: there is an adapter of this name, and it may not be replaced; nothing changes.
          BadAdapter: it cannot be served exactly as trained, the name is the base model's or begins with it and a
            colon, or pinned adapters would take more than half of the pool; nothing changes.
        """
        self.check_process()
        is_replaced = name in self._store
        try:
            folder = resolve_adapter_path(path, self._store.limits)
            own = self._own_tokenizer(folder)
            info = self._store.register(name, folder, pinned, replace)
        except BadAdapter as refusal:
            if self.is_running:
                events.warning("adapter refused: %s", printable(str(refusal)))
            raise
        self._keep_tokenizer(name, own)
        self._wake()
        if self.is_running:
            said = "replaced" if is_replaced else "loaded"
            events.info("adapter %s %s: rank %d, %d pages, of %s", name, said, info.rank, info.num_pages, folder)
        return info

    def pin_adapter(self, name: str) -> AdapterInfo:
        """Brings a registered adapter to the pool, and keeps it there.

        Raises:
          UnknownAdapter: no adapter of that name.
          BadAdapter: pinned adapters would take more than half of the pool; nothing changes.
        """
        self.check_process()
        self._store.pin(name)
        self._wake()
        return self.adapter(name)

    def unpin_adapter(self, name: str) -> AdapterInfo:
        """Lets an adapter leave the pool again when others need its pages.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        self.check_process()
        self._store.unpin(name)
        self._wake()
        return self.adapter(name)

    def tokenizer_of(self, adapter: str | None) -> Tokenizer | None:
        """The tokenizer with the chat template that goes with an adapter: its folder's own, else the base model's.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        own = None if adapter is None else self._tokenizers.get(self._store.get(adapter))
        return own or self.tokenizer

    def _keep_tokenizer(self, name: str, own: Tokenizer | None) -> None:
        if own is not None:
            self._tokenizers[self._store.get(name)] = own

    def _own_tokenizer(self, folder: Path) -> Tokenizer | None:
        return None if self._adapter_tokenizers is None else self._adapter_tokenizers.tokenizer_of(folder)

    def register_loaded_adapter(
        self, name: str, ranks: Mapping[str, int], packed: np.ndarray, scale: float = 1.0
    ) -> AdapterInfo:
        """Makes an adapter available whose weights are in memory; see ``loaded_adapter`` and ``synthetic_weights``.

        Ready at once. Adapters that share ``packed`` share its host memory, but each has pages of its own in the pool.

        Raises:
          BadAdapter: a bad name, ranks or shape, or there are several hosts; nothing changes.
          ValueError: ``packed`` has not the pool's ``dtype``.
        """
        self.check_process()
        if self.config.mesh.num_hosts > 1:
            raise BadAdapter(f"adapter {name}: several hosts read adapters from folders; save it as one")
        most = self.parts.max_rank
        if most is not None and max(ranks.values()) > most:
            raise BadAdapter(f"adapter {name} has rank {max(ranks.values())}, but these lora_ops take at most {most}")
        return self._store.register_loaded(name, loaded_adapter(name, ranks, packed, self.pool_layout, scale))

    def register_adapter_dir(self, directory: str) -> None:
        """Registers every subfolder that is an adapter; one that is refused is logged and leaves the others alone."""
        self.check_process()
        infos, refused = self._store.register_dir(Path(directory))
        for name in list(infos):
            try:
                self._keep_tokenizer(name, self._own_tokenizer(infos[name].path))
            except BadAdapter as e:
                self._store.unregister(name)
                del infos[name]
                refused[name] = str(e)
        logger.info("registered %d adapters of %s", len(infos), directory)
        for name, reason in refused.items():
            logger.warning("adapter %s refused: %s", name, reason)

    def unregister_adapter(self, name: str) -> None:
        """Forgets an adapter's name; requests already submitted are still answered.

        Raises:
          UnknownAdapter: no adapter of that name.
        """
        self.check_process()
        self._store.unregister(name)
        self._wake()
        if self.is_running:
            events.info("adapter %s unloaded", name)

    # Requests

    def submit(self, request: Request) -> Generation:
        """Queues a request and returns at once.

        Raises:
          InvalidRequest: the prompt is empty, has an unknown token, or cannot fit the context or the pool; a field is
            for another scheduling policy than this engine's; or the grammar is not valid.
          UnknownAdapter: ``request.adapter`` is not registered.
          Overloaded: too many requests are waiting.
          EngineStopped: the engine is closed, or another process's.
        """
        self.check_process()
        adapter = self._store.get(request.adapter) if request.adapter is not None else None
        self._check_policy_fields(request)
        max_tokens = self._check_prompt(request, adapter)
        constraints = self._constraints_of(request)
        generation = Generation(request, self._cancel)
        sampling = request.sampling
        with self._lock:
            if self._closed:
                raise EngineStopped(self._closed)
            waiting = self._core.scheduler.num_waiting + self._num_unadmitted
            if waiting + sampling.n > self.config.scheduler.max_waiting:
                raise Overloaded(
                    f"{waiting} sequences are waiting, and at most {self.config.scheduler.max_waiting} may; "
                    "try again later"
                )
            group = self._sequences_of(request, generation, adapter, max_tokens, constraints)
            generation.sequences.extend(answer.sequence for answer in group)
            self._submitted.append(group)
            self._num_unadmitted += len(group)
        self._wake()
        return generation

    def _sequences_of(
        self,
        request: Request,
        generation: Generation,
        adapter: AdapterVersion | None,
        max_tokens: int,
        constraints: list[Constraint | None],
    ) -> list[_Answer]:
        """Makes the request's n sequences. Needs the lock, so that ``arrival`` increases with the sequences' ids."""
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else int(self._seeds.integers(2**63))
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends.update(self.model_config.eos_token_ids)
        if self.tokenizer is not None:
            ends.update(self.tokenizer.stop_token_ids(sampling.stop))
        arrival = time.monotonic()
        group: list[_Answer] = []
        for index in range(sampling.n):
            sequence = Sequence(
                sequence_id=next(self._sequence_ids),
                tokens=list(request.prompt),
                num_prompt=len(request.prompt),
                max_tokens=max_tokens,
                sampling=sampling,
                seed=seed + index,
                end_token_ids=frozenset(ends),
                adapter=adapter,
                constraint=constraints[index],
                leader=group[0].sequence if group else None,
                arrival=arrival,
                tenant=request.adapter or self.model_name,
                priority=request.priority,
                slo_s=None if request.slo_ms is None else request.slo_ms / 1000,
            )
            group.append(_Answer(sequence, generation, OutputText(request, index, self.tokenizer), index))
        return group

    def _constraints_of(self, request: Request) -> list[Constraint | None]:
        """What the tokens of each of the n answers may be. Compiles the grammar, in the caller's thread."""
        sampling = request.sampling
        vocabulary = self.model_config.vocab_size
        for name, ids in (("logit_bias", dict(sampling.logit_bias)), ("allowed_token_ids", sampling.allowed_token_ids)):
            if ids and (bad := next((token for token in ids if token >= vocabulary), None)) is not None:
                raise InvalidRequest(f"{name}: token id {bad} is outside the vocabulary [0, {vocabulary})", name)
        grammar = sampling.grammar
        if grammar is None and not sampling.bad_words:
            return [None] * sampling.n
        name, what = ("bad_words", "bad_words are") if grammar is None else ("grammar", "a grammar is")
        if self._grammars is None or self.tokenizer is None:
            raise InvalidRequest(f"{what} about text, and this model has no tokenizer", name)
        if grammar is None:
            forbidden = spellings(sampling.bad_words, self.tokenizer)
            return [NoBadWords(forbidden) for _ in range(sampling.n)]
        first = self._grammars.constraint(grammar)
        return [first, *(first.copy() for _ in range(sampling.n - 1))]

    @property
    def gives_up_late(self) -> bool:
        """Whether requests that would miss their first-token objective end with "late" instead."""
        return self.config.scheduler.policy == "abort"

    @property
    def orders_by_priority(self) -> bool:
        """Whether requests may have a priority."""
        return self.config.scheduler.policy == "priority"

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
        """Returns how many tokens may be generated: at least one, as every step that ends a prompt samples one."""
        length, vocab = len(request.prompt), self.model_config.vocab_size
        if length == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        # One who only reads needs no room for an answer.
        max_tokens = request.sampling.max_tokens
        if length > self.max_model_len - min(max_tokens, 1):
            raise InvalidRequest(
                f"the prompt has {length} tokens, but the context holds {self.max_model_len} including the output; "
                "shorten the prompt",
                "prompt",
            )
        if not (min(request.prompt) >= 0 and max(request.prompt) < vocab):
            raise InvalidRequest(f"prompt token ids must be in [0, {vocab})", "prompt")
        if request.sampling.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none; use stop_token_ids", "stop")
        max_tokens = max(1, min(max_tokens, self.max_model_len - length))
        refusal = self._core.scheduler.refusal(length + max_tokens, adapter)
        if refusal is not None:
            raise InvalidRequest(refusal, "max_tokens")
        return max_tokens

    def _cancel(self, generation: Generation) -> None:
        self._cancelled.append(generation)
        self._wake()

    # The loop

    def step(self) -> bool:
        """Takes in what callers want, runs one turn of the loop, and hands out what it brought about.

        Not thread-safe: for whoever runs the loop.

        Returns:
          Whether anything was done; False means that nothing can go on until a request or an adapter arrives.

        Raises:
          EngineStopped: the engine failed and cannot go on, or is another process's.
        """
        self.check_process()
        self._take_submitted()
        self._take_cancelled()
        for retired in self._store.take_retired():
            self._core.scheduler.retire(retired.version(), retired.content_hash)
        self._core.pin(self._store.pinned)
        compiled = self.device.runner.programs.num_compiled
        begun = time.monotonic()
        outcome = self._core.step()
        now = time.monotonic()
        if now - begun > self.config.slow_step_s and compiled == self.device.runner.programs.num_compiled:
            self._tell_slow(now - begun, outcome)
        self._hand_out(outcome, now)
        return outcome.worked

    def _tell_slow(self, seconds: float, outcome: Outcome) -> None:
        stats = self.stats()
        events.warning(
            "a step took %.1f s: it gave %d tokens, %d sequences run, %d wait, %d recoveries so far",
            seconds,
            len(outcome.emitted),
            stats["running"],
            stats["waiting"],
            stats["recoveries"],
        )

    def _take_submitted(self) -> None:
        while self._submitted:
            group = self._submitted.popleft()
            for answer in group:
                self._answers[answer.sequence.sequence_id] = answer
                try:
                    self._core.add(answer.sequence)
                except Exception as failure:
                    logger.exception("a request could not be queued")
                    self._end(answer.sequence, "error", f"it could not be queued: {in_words(failure)}")
            with self._lock:
                self._num_unadmitted -= len(group)

    def _take_cancelled(self) -> None:
        while self._cancelled:
            for sequence in self._cancelled.popleft().sequences:
                self._end(sequence, "abort", "cancelled by the caller")

    def _hand_out(self, outcome: Outcome, now: float) -> None:
        given = 0
        for sequence, scores in outcome.scores:
            if (scored := self._answers.get(sequence.sequence_id)) is not None:
                scored.generation.put_scores(*scores)
        for emitted in outcome.emitted:
            answer = self._answers.get(emitted.sequence.sequence_id)
            if answer is None:
                continue  # a sequence of the same request failed just now
            try:
                given += self._hand_out_token(answer, emitted, outcome.logprobs.get(emitted.place), now)
            except Exception as failure:
                logger.exception("a token could not be turned into text")
                self._end(emitted.sequence, "error", f"its text could not be made: {in_words(failure)}")
        self._counts["generated_tokens"] += given
        for ended in outcome.ended:
            if ended.reason == "late":
                self._give_up(ended)
            else:
                self._end(*ended)

    def _hand_out_token(self, answer: _Answer, emitted: Emitted, logprob: TokenLogprob | None, now: float) -> int:
        """Returns how many tokens the caller got: none if they are not wanted, or are none."""
        sequence = emitted.sequence
        if emitted.reason == "error":
            who = f"adapter {sequence.tenant!r}" if answer.generation.request.adapter else "the model"
            self._end(
                sequence,
                "error",
                f"{who} gave numbers that are not finite, from which no token can be chosen; its weights do not suit "
                f"the base model in {self.dtype}",
            )
            return 0
        if sequence.leader is None and len(sequence.tokens) == sequence.num_prompt + 1:
            answer.generation.cached_tokens = sequence.cached_tokens
            self._counts["cached_tokens"] += sequence.cached_tokens
            self._counts["prompt_tokens"] += sequence.num_prompt
        delta = answer.output.push(emitted.token, emitted.reason, logprob)
        answer.generation.put(delta, now)
        if delta.finish_reason is not None:
            self._finished[delta.finish_reason] += 1
            del self._answers[sequence.sequence_id]
            self._core.finish(sequence)
        return len(delta.token_ids)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str) -> None:
        answer = self._answers.pop(sequence.sequence_id, None)
        if answer is not None:
            self._finished[reason] += 1
            answer.end(reason, error)
            self._core.finish(sequence)

    def _give_up(self, ended: Ended) -> None:
        """Ends all of a request whose first token could not come in time."""
        leader = ended.sequence
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

    def warm_up(self) -> None:
        """Compiles the steps' shapes ahead, as the configuration says, so that no request waits for it.

        Call it before the first step. Shapes with adapters are those for the modules, ranks and pages of the adapters
        registered so far.
        """
        self.check_process()
        if self.config.warm_up is False:
            return
        start = time.perf_counter()
        num_shapes = self.device.warm_up(*self._adapter_needs())
        logger.info("warmed up %d shapes of steps in %.1f s", num_shapes, time.perf_counter() - start)

    def _adapter_needs(self) -> tuple[list[int], int, int]:
        """Modules that the registered adapters change, their largest rank, and the most pages that one takes."""
        adapters = self.adapters().values()
        changed = {module for info in adapters for module in info.ranks}
        max_rank = max((info.rank for info in adapters), default=1)
        pages = max((info.num_pages for info in adapters), default=1)
        return [MODULES.index(module) for module in changed], max_rank, pages

    def start(self, on_failure: Callable[[str], None] = lambda sentence: None) -> None:
        """Runs steps in a background thread until ``close``.

        Args:
          on_failure: called once, by that thread, with the reason in a sentence, if the engine cannot go on; all
            requests have ended by then, and it answers none any more.
        """
        self.check_process()
        if self._thread is not None:
            raise EngineStopped("the engine was already started")
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._loop, name="slora-engine", daemon=True)
        self._thread.start()
        _close_at_exit(self)

    def check_process(self) -> None:
        """Does nothing in the process that made the engine.

        Raises:
          EngineStopped: this is a forked child of it, in which the engine cannot be used.
        """
        self._process.check()

    def abandon(self, reason: str) -> None:
        """Ends all requests with an error, and takes no more, without waiting for the loop. Thread-safe.

        For a process that is about to end because its devices will not come back.
        """
        with self._lock:
            self._closed = self._closed or reason
        # Copied at once, as the loop may be taking from them.
        waiting = itertools.chain.from_iterable(self._submitted.copy())
        for answer in (*waiting, *self._answers.copy().values()):
            answer.end("error", reason)

    def close(self) -> None:
        """Stops the loop and ends all requests with "abort"; a second call waits for the first. Idempotent.

        It waits for the step in flight: at the end of a process no thread may be inside of JAX. It does nothing in a
        forked child, whose parent goes on with the engine.
        """
        if not self._process.is_here:
            return
        with self._lock:
            self._closed = self._closed or "the engine was closed"
        self._wake()
        # Two threads may close: whoever returns may end the process, under which the other must not be inside of JAX.
        with self._closing:
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()
            try:
                self._core.drain()
                self._end_all("abort", self._closed)
            finally:
                self._on_close.close()

    def _loop(self) -> None:
        try:
            while not self._closed:
                if not self.step():
                    # The timeout is a safety net only: submit, cancel, close and adapters that get ready all wake.
                    self.wait_for_work(_IDLE_WAIT_SECONDS)
        except Exception as failure:
            sentence = str(failure) if isinstance(failure, EngineStopped) else f"the engine failed: {in_words(failure)}"
            logger.error("%s", sentence, exc_info=failure)
            with self._lock:
                self._closed = sentence
            self._end_all("error", sentence)
            self._on_failure(sentence)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        self._take_submitted()
        for answer in list(self._answers.values()):
            self._finished[reason] += 1
            answer.end(reason, error)
        self._answers.clear()
        self._core.scheduler.abandon()

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

    @property
    def is_idle(self) -> bool:
        """Whether there is no request, no step in flight and no adapter on its way to the pool."""
        return not (self._submitted or self._answers) and self._core.is_idle

    @property
    def compiling(self) -> str | None:
        """Words for what the loop waits for a compiler to finish; None while it does not."""
        return self.device.runner.programs.compiling

    def stats(self) -> dict[str, int | float]:
        """Counters since the start, and the current load."""
        scheduler, pages = self._core.scheduler, self._budget.pages
        counts = Counter(self._counts)
        counts.update(self._core.counts)
        counts.update(scheduler.counts())
        return {
            **counts,
            "adapter_load_bytes": self.device.copied_bytes,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting + self._num_unadmitted,
            "pages_total": pages.total,
            "pages_used": pages.num_used,
            "pages_cached": pages.num_cached,
            "pages_free": pages.num_free,
            "host_adapter_bytes": self._store.host_bytes_used,
            "host_adapter_loads": self._store.num_loads,
            "compilations": self.device.runner.programs.num_compiled,
        }

    def finished(self) -> Mapping[FinishReason, int]:
        """How many sequences ended since the start, by reason. From any thread."""
        return self._finished.copy()

    def load_seconds(self) -> Mapping[str, Counted]:
        """How long adapters took from disk to host memory ("host"), and from there to the pool ("pool")."""
        return {"host": self._store.load_seconds.read(), "pool": self.device.copy_seconds.read()}

    def observe(self) -> Observation:
        """What the pool and the adapters look like now. From any thread; the loop goes on meanwhile.

        It costs some milliseconds for ten thousand adapters or a hundred thousand pages: ask once a second, not more.
        """
        scheduler = self._core.scheduler
        versions = self._store.versions()
        view = scheduler.view((name, version) for name, version in versions.items() if version.content_hash)
        adapters = []
        for number, version in enumerate(versions.values()):
            if number % _ADAPTERS_BETWEEN_RESTS == 0:
                time.sleep(0)
            resident = scheduler.is_resident(version)
            tier: Tier = "pool" if resident else "host" if version.status == "ready" else "disk"
            adapters.append(AdapterSeen(version.info, tier))
        first = itertools.islice(self._answers.copy().values(), _MOST_WAITING_SEEN)
        waiting = dict.fromkeys(
            answer.sequence.tenant for answer in first if answer.sequence.adapter and answer.sequence.is_waiting
        )
        return Observation(view, tuple(adapters), tuple(waiting))

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
        return self._core.scheduler.capacity(num_tokens, version)

    def check_integrity(self) -> None:
        """Asserts that every page of the pool is owned exactly once."""
        self._budget.pages.check_integrity()


def _close_at_exit(engine: Engine) -> None:
    """Has the engine closed before the interpreter goes, if it is still there: the loop's thread is a daemon."""
    reference = weakref.ref(engine)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close()

    atexit.register(close)


def leave_alone_what_exists() -> None:
    """Tells Python's collector that whatever exists now stays: for a process that keeps its engine to its end.

    A full collection otherwise looks at all objects of JAX and the engine, a quarter of a million for the smallest
    model, and stops every request for 0.2 s and more.
    """
    gc.collect()
    gc.freeze()
