"""A server in simulated time: the engine's own loop over a device that only knows how long things take. No JAX."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from slora_jax.bench.service import Times
from slora_jax.bench.workload import Case, WorkItem
from slora_jax.config import SchedulerConfig
from slora_jax.engine.core import Core, Outcome, StepResult
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterLoad, ScheduledSequence, Sequence

_BYTES = 2
"""Of a weight or a cached number: bfloat16."""


@dataclass(frozen=True)
class StepSpeeds:
    """What steps are made of, on one H200.

    Measured: ``kv_bandwidth`` and ``adapter_bandwidth`` are the kernels' own, of the cases attention-decode-mha-128x512
    and lora-decode-mixed of ``results/kernels_h200.json``; ``copy_bandwidth`` is that of copies beside running steps.
    Fitted: ``weight_bandwidth`` and ``products`` to the dense part of steps of 1 to 1,024 tokens, which they give
    within 10 %; ``step_seconds`` to the whole steps of that file, which all then give within 5 %.

    Not modelled: the host, and adapters in steps of many prompt tokens. Full batches of 64, S2 with 100 adapters at the
    quick scale, answer 64.0 requests a second in simulated time, where the engine answered 49.5.

    Attributes:
      weight_bandwidth: bytes a second at which a step of few tokens reads the weights.
      products: operations a second of a step of many tokens.
      kv_bandwidth, adapter_bandwidth: bytes a second of decode attention and of gathered LoRA.
      copy_bandwidth: bytes a second from page-locked host memory.
      step_seconds: of every step, whatever is in it.
    """

    weight_bandwidth: float = 3.7e12
    products: float = 6.2e14
    kv_bandwidth: float = 4.32e12
    adapter_bandwidth: float = 3.24e12
    copy_bandwidth: float = 5.3e10
    step_seconds: float = 0.2e-3

    def slower(self, factor: float) -> "StepSpeeds":
        return StepSpeeds(
            self.weight_bandwidth / factor, self.products / factor, self.kv_bandwidth / factor,
            self.adapter_bandwidth / factor, self.copy_bandwidth / factor, self.step_seconds * factor,
        )  # fmt: skip


H200 = StepSpeeds()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one model on one GPU."""

    speeds: StepSpeeds
    model: ModelConfig

    @property
    def page_bytes(self) -> int:
        return PoolLayout.for_model(self.model).page_bytes(_BYTES)

    def seconds(self, num_tokens: int, context_tokens: int, adapter_pages: int) -> float:
        """Of a step.

        Args:
          num_tokens: computed in it.
          context_tokens: cached tokens that its sequences attend to, added up.
          adapter_pages: of the distinct adapters in it.
        """
        speeds, num_params = self.speeds, self.model.num_step_params()
        reading = num_params * _BYTES / speeds.weight_bandwidth
        computing = 2 * num_params * num_tokens / speeds.products
        # The root of the squares follows what was measured at 64 to 512 tokens within 10 %; a sum or the larger do not.
        dense = (reading**2 + computing**2) ** 0.5
        token_bytes = self.page_bytes / 16
        attention = context_tokens * token_bytes / speeds.kv_bandwidth
        lora = adapter_pages * self.page_bytes / speeds.adapter_bandwidth
        return speeds.step_seconds + dense + attention + lora

    def copy_seconds(self, num_pages: int) -> float:
        return num_pages * self.page_bytes / self.speeds.copy_bandwidth


@dataclass(eq=False)
class ReadyAdapter:
    """An adapter in host memory, as far as the scheduler can see."""

    content_hash: str
    num_pages: int
    status: str = "ready"
    failure: str = ""

    def hold(self) -> None:
        pass

    def let_go(self) -> None:
        pass


@dataclass
class Run:
    """What a run left behind.

    Attributes:
      times: of each request, in the workload's order.
      seconds: simulated, until the last answer.
      num_steps, num_loads, num_preemptions: counts; loads are copies of adapters to the device.
      num_prefetch_late: requests that had to wait for such a copy.
    """

    times: list[Times]
    seconds: float = 0.0
    num_steps: int = 0
    num_loads: int = 0
    num_preemptions: int = 0
    num_prefetch_late: int = 0


@dataclass
class SimulatedDevice:
    """A ``Device`` in simulated time: one GPU that runs one step after the other, and one link for copies.

    Time goes on only where the host waits: for a step, for a copy, or, by ``simulate``, for a request.

    Attributes:
      step_time: of its steps and copies.
      now: seconds since the start, as the host knows it.
    """

    step_time: StepTime
    now: float = 0.0
    _busy_until: float = 0.0
    _copies: deque[tuple[float, AdapterLoad]] = field(default_factory=deque)

    def start_copy(self, load: AdapterLoad) -> None:
        begin = max(self.now, self._copies[-1][0]) if self._copies else self.now
        self._copies.append((begin + self.step_time.copy_seconds(len(load.pages)), load))

    def arrived(self) -> list[AdapterLoad]:
        loads = []
        while self._copies and self._copies[0][0] <= self.now:
            loads.append(self._copies.popleft()[1])
        return loads

    @property
    def is_copying(self) -> bool:
        return bool(self._copies)

    def wait_for_copy(self) -> None:
        self.now = max(self.now, self._copies[0][0])

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> tuple[ScheduledSequence, ...]:
        return entries

    def launch(self, batch: tuple[ScheduledSequence, ...]) -> "SimulatedStep":
        num_tokens = sum(entry.count for entry in batch)
        seconds = self.step_time.seconds(num_tokens, *_loads_of(batch))
        self._busy_until = max(self.now, self._busy_until) + seconds
        return SimulatedStep(self, self._busy_until, len(batch))

    def reset(self) -> None:
        raise AssertionError("nothing fails in simulated time")


@dataclass(frozen=True)
class SimulatedStep:
    """A step that is over at ``end``. All tokens are 0."""

    device: SimulatedDevice
    end: float
    num_entries: int

    def draw(self) -> None:
        """Its tokens are known from the start."""

    def read(self) -> StepResult:
        self.device.now = max(self.device.now, self.end)
        return StepResult([0] * self.num_entries, {}, {})


def simulate(
    case: Case,
    workload: Many[WorkItem],
    config: SchedulerConfig,
    create_budget: Callable[[], PageBudget],
    step_time: StepTime,
) -> Run:
    """Serves a workload to its end. Deterministic; a run takes about 1 ms of real time a step.

    Args:
      case: says which ranks the adapters have.
      workload: the requests.
      config: of the scheduler.
      create_budget: makes the budget of the pool's pages.
      step_time: how long steps and copies take.
    """
    layout = PoolLayout.for_model(step_time.model)
    adapters = [ReadyAdapter(str(i), layout.adapter(dict.fromkeys("qkvo", case.rank(i))).num_pages)
                for i in range(case.num_adapters)]  # fmt: skip
    device = SimulatedDevice(step_time)

    def create_scheduler() -> Scheduler:
        budget = create_budget()
        return Scheduler(config, budget.pages, lambda: device.now, budget=budget)

    core = Core(create_scheduler, device)
    run = Run([Times(item.arrival) for item in workload])
    order = sorted(range(len(workload)), key=lambda i: workload[i].arrival)
    todo = deque((sequence_id, i) for sequence_id, i in enumerate(order))
    times_of: dict[int, Times] = {}
    while todo or not core.is_idle:
        while todo and workload[todo[0][1]].arrival <= device.now:
            sequence_id, i = todo.popleft()
            times_of[sequence_id] = run.times[i]
            sequence = _sequence(sequence_id, workload[i], adapters, case)
            refusal = core.scheduler.refusal(sequence.num_prompt + sequence.max_tokens, sequence.adapter)
            assert refusal is None, refusal
            core.add(sequence)
        outcome = core.step()
        _note(outcome, times_of, device.now)
        if not outcome.worked:
            assert todo, "sequences wait for nothing"
            device.now = max(device.now, workload[todo[0][1]].arrival)
    run.seconds = max(t.last for t in run.times)
    run.num_steps = core.counts["steps"]
    run.num_loads = core.counts["adapter_loads"]
    run.num_preemptions = core.counts["preemptions"]
    run.num_prefetch_late = core.scheduler.counts()["adapter_prefetch_late"]
    return run


def _note(outcome: Outcome, times_of: dict[int, Times], now: float) -> None:
    """Notes first and last tokens, and requests that were given up."""
    for emitted in outcome.emitted:
        times = times_of[emitted.sequence.sequence_id]
        if times.first is None:
            times.first = now
        if emitted.reason is not None:
            times.last = now
    for ended in outcome.ended:
        assert ended.reason == "late", ended.error
        times = times_of[ended.sequence.sequence_id]
        times.last, times.gave_up = now, True


def _sequence(sequence_id: int, item: WorkItem, adapters: list[ReadyAdapter], case: Case) -> Sequence:
    sampling = SamplingParams(max_tokens=item.num_output, temperature=0.0, ignore_eos=True)
    adapter = None if item.adapter is None else adapters[item.adapter]
    return Sequence(
        sequence_id,
        list(item.prompt),
        len(item.prompt),
        item.num_output,
        sampling,
        seed=0,
        adapter=adapter,
        arrival=item.arrival,
        tenant="base" if item.adapter is None else case.adapter_name(item.adapter),
        priority=item.priority,
        slo_s=None if item.slo_ms is None else item.slo_ms / 1000,
    )


def _loads_of(entries: tuple[ScheduledSequence, ...]) -> tuple[int, int]:
    """Tokens attended to, and pages of distinct adapters."""
    context, adapters = 0, {}
    for sequence, start, count, _, _ in entries:
        context += start + count
        if sequence.adapter is not None:
            adapters[sequence.adapter] = sequence.adapter.num_pages
    return context, sum(adapters.values())
