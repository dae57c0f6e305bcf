"""A server in simulated time: the real scheduler and page accounting over a model of how long steps take. No JAX."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from slora_jax.bench.service import Times
from slora_jax.bench.workload import Case, WorkItem
from slora_jax.config import SchedulerConfig
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterLoad, Sequence, State, StepPlan

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
    quick scale, answer 64.2 requests a second in simulated time, where the engine answered 49.5.

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
class _Copies:
    """Adapters on their way over one link, one after the other."""

    step_time: StepTime
    under_way: deque[tuple[float, AdapterLoad]] = field(default_factory=deque)

    def start(self, load: AdapterLoad, now: float) -> None:
        begin = max(now, self.under_way[-1][0]) if self.under_way else now
        self.under_way.append((begin + self.step_time.copy_seconds(len(load.pages)), load))

    def arrived(self, now: float) -> list[AdapterLoad]:
        loads = []
        while self.under_way and self.under_way[0][0] <= now:
            loads.append(self.under_way.popleft()[1])
        return loads


def simulate(
    case: Case,
    workload: Many[WorkItem],
    config: SchedulerConfig,
    pages: PageAllocator,
    step_time: StepTime,
    create: Callable[[SchedulerConfig, PageAllocator, Callable[[], float]], Scheduler] = Scheduler,
) -> Run:
    """Serves a workload to its end. Deterministic; a run takes about 1 ms of real time a step.

    A step's tokens are known when it ends: the real engine reads them one step later.

    Args:
      pages: of the pool, all free.
      create: makes the scheduler, as in ``Engine.reschedule``.
    """
    layout = PoolLayout.for_model(step_time.model)
    adapters = [ReadyAdapter(str(i), layout.adapter(dict.fromkeys("qkvo", case.rank(i))).num_pages)
                for i in range(case.num_adapters)]  # fmt: skip
    now = 0.0
    scheduler = create(config, pages, lambda: now)
    copies = _Copies(step_time)
    run = Run([Times(item.arrival) for item in workload])
    order = sorted(range(len(workload)), key=lambda i: workload[i].arrival)
    todo = deque((sequence_id, i) for sequence_id, i in enumerate(order))
    times_of: dict[int, Times] = {}
    while todo or not scheduler.is_idle or copies.under_way:
        while todo and workload[todo[0][1]].arrival <= now:
            sequence_id, i = todo.popleft()
            times_of[sequence_id] = run.times[i]
            sequence = _sequence(sequence_id, workload[i], adapters, case)
            refusal = scheduler.refusal(sequence.num_prompt + sequence.max_tokens, sequence.adapter)
            assert refusal is None, refusal
            scheduler.add(sequence)
        for load in copies.arrived(now):
            scheduler.adapter_arrived(load)
        plan = scheduler.plan()
        for load in plan.loads:
            copies.start(load, now)
        run.num_loads += len(plan.loads)
        run.num_preemptions += plan.num_preempted
        for sequence in plan.late:
            scheduler.finish(sequence)
            times_of[sequence.sequence_id].last = now
            times_of[sequence.sequence_id].gave_up = True
        if plan.entries:
            run.num_steps += 1
            now += step_time.seconds(plan.num_tokens, *_loads_of(plan))
            _finish_step(scheduler, plan, times_of, now)
        else:
            events = [workload[todo[0][1]].arrival] if todo else []
            events += [copies.under_way[0][0]] if copies.under_way else []
            assert events or plan.late or scheduler.is_idle, "sequences wait for nothing"
            now = max(now, min(events, default=now))
    run.seconds = max(t.last for t in run.times)
    run.num_prefetch_late = scheduler.num_prefetch_late
    return run


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


def _loads_of(plan: StepPlan) -> tuple[int, int]:
    """Tokens attended to, and pages of distinct adapters."""
    context, adapters = 0, {}
    for sequence, start, count, _, _ in plan.entries:
        context += start + count
        if sequence.adapter is not None:
            adapters[sequence.adapter] = sequence.adapter.num_pages
    return context, sum(adapters.values())


def _finish_step(scheduler: Scheduler, plan: StepPlan, times_of: dict[int, Times], now: float) -> None:
    ended = []
    for sequence, _, _, samples, _ in plan.entries:
        if samples:
            sequence.num_pending -= 1
            sequence.tokens.append(0)
            times = times_of[sequence.sequence_id]
            if times.first is None:
                times.first = now
            if sequence.num_output == sequence.max_tokens:
                times.last = now
                ended.append(sequence)
    scheduler.commit(plan)
    for sequence in ended:
        assert sequence.state is not State.FINISHED
        scheduler.finish(sequence)
