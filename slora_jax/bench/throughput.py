"""The engine on the paper's synthetic workload: saturated, or with requests that arrive in time."""

import contextlib
import dataclasses
import datetime
import gc
import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import psutil

from slora_jax import Engine, Request, SamplingParams
from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.bench.service import Times
from slora_jax.bench.timing import KernelEvent, PartTimer, gpu_events, machine, profiled, read_profile, union_seconds
from slora_jax.bench.workload import WARM_UP_REQUESTS, Case, Lengths, OpenTrace, WorkItem, draw_workload
from slora_jax.config import EngineConfig, build_config
from slora_jax.engine.build import EngineParts, build_parts
from slora_jax.engine.engine import leave_alone_what_exists
from slora_jax.engine.generation import Generation
from slora_jax.memory.layout import PoolLayout

_PROFILED_STEPS = range(100, 110)
_IDLE_WAIT_SECONDS = 0.01


class Weights:
    """Made-up weights on the host, one buffer for all adapters that change the same modules at the same rank."""

    def __init__(self, layout: PoolLayout, dtype: np.dtype):
        self._layout = layout
        self._dtype = dtype
        self._made: dict[tuple[int, tuple[str, ...]], np.ndarray] = {}

    def of(self, rank: int, modules: tuple[str, ...]) -> np.ndarray:
        """Those of a rank and modules."""
        key = rank, modules
        if key not in self._made:
            self._made[key] = synthetic_weights(rank, modules, self._layout, self._dtype, seed=rank)
        return self._made[key]


def register_adapters(engine: Engine, cases: Sequence[Case], weights: Weights) -> None:
    """Registers the adapters of all cases, spare ones included."""
    for case in cases:
        for i in range(case.num_adapters + case.num_spare):
            rank = case.rank(i)
            packed = weights.of(rank, case.modules)
            engine.register_loaded_adapter(case.adapter_name(i), dict.fromkeys(case.modules, rank), packed)


@dataclass
class Recorder:
    """What a timed run of the loop saw.

    Attributes:
      step_seconds: of each call of ``Engine.step`` that did something.
      sequences: running ones at each step.
      peak_pages: most pages of the pool in use.
    """

    step_seconds: list[float] = dataclasses.field(default_factory=list)
    sequences: list[int] = dataclasses.field(default_factory=list)
    peak_pages: int = 0


def run_loop(engine: Engine, case: Case, workload: list[WorkItem], profile: Path | None = None):
    """Submits the workload and runs steps until everything is answered.

    Returns:
      Wall seconds, the ``Recorder``, and each request's ``Times``.
    """
    recorder = Recorder()
    start = time.monotonic()
    todo = sorted(enumerate(workload), key=lambda item: -item[1].arrival)
    generations: list[Generation | None] = [None] * len(workload)
    with contextlib.ExitStack() as tracing:
        while True:
            now = time.monotonic() - start
            while todo and todo[-1][1].arrival <= now:
                index, item = todo.pop()
                adapter = None if item.adapter is None else case.adapter_name(item.adapter)
                generations[index] = submit(engine, item, adapter)
            if profile and len(recorder.step_seconds) == _PROFILED_STEPS.start:
                tracing.enter_context(profiled(profile))
            before = time.monotonic()
            worked = engine.step()
            after = time.monotonic()
            if len(recorder.step_seconds) == _PROFILED_STEPS.stop:
                tracing.close()
            if worked:
                stats = engine.stats()
                recorder.step_seconds.append(after - before)
                recorder.sequences.append(stats["running"])
                recorder.peak_pages = max(recorder.peak_pages, stats["pages_used"])
            elif not todo and engine.is_idle:
                break
            else:
                next_arrival = todo[-1][1].arrival - (after - start) if todo else _IDLE_WAIT_SECONDS
                engine.wait_for_work(min(max(next_arrival, 0.0), _IDLE_WAIT_SECONDS))
    seconds = time.monotonic() - start
    return seconds, recorder, times_of(workload, generations, start)


def times_of(workload: Sequence[WorkItem], generations: Sequence[Generation], start: float) -> list[Times]:
    """When each request's tokens came, of requests that have ended.

    Args:
      start: of the run, on ``time.monotonic``.

    Raises:
      AssertionError: a request that was not given up has not all of its tokens.
    """
    times = []
    for item, generation in zip(workload, generations, strict=True):
        (completion,) = generation.result(timeout=1).completions
        timing = generation.timing
        first = None if timing.first is None else timing.first - start
        gave_up = completion.finish_reason == "late"
        times.append(Times(item.arrival, first, timing.last - start, gave_up))
        if gave_up:
            continue
        if completion.finish_reason != "length" or len(completion.token_ids) != item.num_output:
            raise AssertionError(
                f"a request got {len(completion.token_ids)} of {item.num_output} tokens: "
                f"{completion.finish_reason}, {completion.error}"
            )
    return times


def submit(engine: Engine, item: WorkItem, adapter: str | None) -> Generation:
    """Submits a request on the adapter of this name; the item's own is ignored."""
    sampling = SamplingParams(max_tokens=item.num_output, temperature=0.0, ignore_eos=True)
    return engine.submit(Request(item.prompt, adapter, sampling, priority=item.priority, slo_ms=item.slo_ms))


@contextlib.contextmanager
def compilations_counted() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many programs were compiled, or read from the cache, since."""
    count = 0

    def listen(event: str, duration: float, **_) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def random_config(
    model: str,
    requests: int,
    scheduler: dict[str, int | bool],
    pool: dict[str, int | float | None],
    tp: int,
    **more: Any,
) -> EngineConfig:
    """Of an engine with random weights, where so many requests may wait. ``more`` are other fields of it."""
    scheduler = {"max_waiting": max(1000, 2 * requests), **scheduler}
    fields = {"model": model, "scheduler": scheduler, "pool": pool, "mesh": {"tp": tp}}
    return build_config({**fields, "dummy": True, "checkpoint_cache": None, **more})


def run_throughput(
    *,
    model: str,
    cases: Sequence[Case],
    requests: int,
    seed: int,
    lengths: Lengths,
    scheduler: dict[str, int | bool],
    pool: dict[str, int | float],
    tp: int,
    trace: OpenTrace | None,
    profile: Path | None,
    command: str,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> Iterator[dict]:
    """Starts an engine with random weights, and for each case warms it up and times the workload."""
    kinds = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    config = random_config(model, requests, scheduler, pool, tp, **kinds)
    parts = build_parts(config, progress=False)
    try:
        yield from run_cases(parts, cases, requests, seed, lengths, trace, profile, command)
    finally:
        parts.close()


def run_cases(
    parts: EngineParts,
    cases: Sequence[Case],
    requests: int,
    seed: int,
    lengths: Lengths,
    trace: OpenTrace | None,
    profile: Path | None,
    command: str,
) -> Iterator[dict]:
    """For each case warms an engine up and times the workload. The parts stay as they are.

    Args:
      parts: of a model with random weights; with what is compiled of them.
      lengths: of prompts and outputs.
      trace: when requests come; None for all at once.
      profile: folder for what ``profile_of`` reads; None for no profile.
      command: to be noted with the result.
    """
    config = parts.config
    part_seconds: Counter[str] = Counter()
    engine = Engine(parts, observe=PartTimer(lambda part, seconds: part_seconds.update({part: seconds})))

    def run_one(case: Case, start: dict[str, float]) -> dict:
        vocab = engine.model_config.vocab_size
        warm_up = draw_workload(min(requests, WARM_UP_REQUESTS), case.num_spare, vocab, seed + 1000, lengths)
        if case.num_adapters:
            warm_up = [dataclasses.replace(item, adapter=item.adapter + case.num_adapters) for item in warm_up]
        run_loop(engine, case, warm_up)
        workload = draw_workload(requests, case.num_adapters, vocab, seed, lengths, trace)
        part_seconds.clear()
        return {
            **_run_case(engine, case, workload, part_seconds, profile and profile / str(case)),
            **start,
            "model": Path(config.model).stem,
            "quantization": config.quantization,
            "tp": config.mesh.tp,
            "kv_cache_dtype": config.kv_cache_dtype,
            "seed": seed,
            "modules": list(case.modules),
            "lengths": str(lengths),
            "scheduler": config.scheduler.model_dump(),
            "trace": trace and dataclasses.asdict(trace),
            "profiled": profile is not None,
            **machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
        }

    try:
        weights, start = Weights(engine.pool_layout, engine.dtype), {}
        # Steps of adapters that change more modules are other programs: these are made when it is their turn.
        for _, group in itertools.groupby(cases, key=attrgetter("modules")):
            alike = list(group)
            # Ahead of a later group the process has run cases: how long its start took is what the first one says.
            start = _made_ready(engine, alike, weights) | start
            for case in alike:
                yield run_one(case, start)
    finally:
        engine.close()
        gc.unfreeze()


def _made_ready(engine: Engine, cases: Sequence[Case], weights: Weights) -> dict[str, float]:
    """Registers cases' adapters and compiles what their steps run. Returns what of it a user would wait for."""
    making = time.perf_counter()
    register_adapters(engine, cases, weights)
    making = time.perf_counter() - making
    compiling = time.perf_counter()
    engine.warm_up()
    compiling = time.perf_counter() - compiling
    leave_alone_what_exists()
    # Of the process, but for making up adapters: what a server makes its user wait.
    seconds = time.time() - psutil.Process().create_time() - making
    click.echo(f"ready after {seconds:.1f} s, {compiling:.1f} of them compiling", err=True)
    return {"start_seconds": seconds, "start_compiling_seconds": compiling}


def _run_case(
    engine: Engine, case: Case, workload: list[WorkItem], part_seconds: Counter[str], profile: Path | None
) -> dict:
    before = engine.stats()
    with compilations_counted() as compilations:
        seconds, recorder, times = run_loop(engine, case, workload, profile)
        num_compilations = compilations()
    after = engine.stats()
    memory = jax.devices()[0].memory_stats() or {}
    counts = {name: after[name] - before[name] for name in after}
    steps = counts["steps"]
    step_milliseconds = np.array(recorder.step_seconds) * 1e3
    host_seconds = sum(recorder.step_seconds) - part_seconds["wait"]
    parts = {name: seconds / steps * 1e3 for name, seconds in sorted(part_seconds.items())}
    return {
        "setting": case.setting,
        "n": case.num_adapters,
        "requests": len(workload),
        "requests_per_second": len(workload) / seconds,
        "output_tokens_per_second": sum(item.num_output for item in workload) / seconds,
        "wall_seconds": seconds,
        "steps": steps,
        "tokens_per_step": (counts["prefill_tokens"] + counts["decode_tokens"]) / steps,
        "sequences_per_step": float(np.mean(recorder.sequences)),
        "adapter_loads": counts["adapter_loads"],
        "adapter_load_bytes": counts["adapter_load_bytes"],
        "preemptions": counts["preemptions"],
        "pages_total": after["pages_total"],
        "pages_peak": recorder.peak_pages,
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        "host_seconds": host_seconds,
        "host_milliseconds_per_step": host_seconds / steps * 1e3,
        "host_parts_milliseconds_per_step": parts,
        "step_milliseconds": _percentiles(step_milliseconds),
        "first_token_seconds": _percentiles([t.first - t.arrival for t in times]),
        "latency_seconds": _percentiles([t.last - t.arrival for t in times]),
        "compilations": num_compilations,
    }


def _percentiles(values) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (10, 50, 90, 99)} | {"mean": float(np.mean(values))}


# Where a step's time goes.

MESSAGES = "messages between devices"

_GROUPS = (
    (MESSAGES, r"all_?reduce|all_?gather|nccl"),
    ("LoRA", r"shrink|expand|lora"),
    ("attention", r"attention|attend|flash|mosaic|_decode_kernel|_combine_kernel|_tile_kernel"),
    ("rotary, KV write", r"_write_kernel|write_kv|rotary|rope"),
    ("copies", r"memcpy|memset|copy"),
    ("products", r"gemm|nvjet|cutlass|cublas|splitk|matmul|xmma|dot"),
)
_REST = "norms, other fusions"


def kernel_group(name: str) -> str:
    """Which of the groups a kernel belongs to, by its name."""
    for group, pattern in _GROUPS:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return _REST


def profile_table(events: list[KernelEvent], steps: int) -> str:
    """Microseconds a step by group and by kernel; "gaps" is the time in which nothing runs."""
    micros: dict[str, float] = defaultdict(float)
    counts = Counter(event.name for event in events)
    groups: dict[str, float] = defaultdict(float)
    for event in events:
        duration = (event.end - event.start) * 1e-3 / steps
        micros[event.name] += duration
        groups[kernel_group(event.name)] += duration
    span = (max(e.end for e in events) - min(e.start for e in events)) * 1e-3 / steps
    groups["gaps"] = span - union_seconds(events) * 1e6 / steps
    lines = [f"{'a step':24} {span:10.1f} µs"]
    lines += [f"{group:24} {t:10.1f} µs {t / span:6.1%}" for group, t in sorted(groups.items(), key=lambda x: -x[1])]
    lines += ["", f"{'µs a step':>10} {'count':>8}  kernel"]
    for name, duration in sorted(micros.items(), key=lambda item: -item[1]):
        lines.append(f"{duration:10.1f} {counts[name] / steps:8.1f}  {name[:90]} ({kernel_group(name)})")
    return "\n".join(lines)


def shares_of(folder: Path) -> dict[str, float]:
    """Of a step's time on the first GPU, the share of each group of kernels that ``run_loop`` recorded there."""
    events = gpu_events(read_profile(folder))
    span = (max(e.end for e in events) - min(e.start for e in events)) if events else 0.0
    groups: dict[str, float] = defaultdict(float)
    for event in events:
        groups[kernel_group(event.name)] += (event.end - event.start) / span
    return dict(groups)


def profile_of(folder: Path) -> str:
    """The table of what ``run_loop`` recorded there."""
    events = gpu_events(read_profile(folder))
    return profile_table(events, len(_PROFILED_STEPS)) if events else "the profile has no GPU kernels"
