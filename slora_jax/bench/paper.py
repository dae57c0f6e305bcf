"""The paper's experiments on policies, defined once: run in simulated time, or on the engine by the wall clock.

Rates are shares of what the server answers when all requests are there at the start ("saturated"), measured first, so
that an experiment means the same on any GPU. Arrivals are stretched to their expected length: with large cv a draw's
own rate may be half or twice what was meant.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slora_jax.bench.service import Service, Times
from slora_jax.bench.simulate import H200, Gpu, StepTime, simulate
from slora_jax.bench.workload import (
    CHAT_ADAPTERS,
    Case,
    OpenTrace,
    WorkItem,
    draw_chat_workload,
    draw_workload,
)
from slora_jax.config import SchedulerConfig, read_yaml
from slora_jax.model.config import ModelConfig

CVS = (1, 2, 4, 6, 8)
_OVERLOAD = 1.5
_VOCABULARY = 32000
_FOREVER = 1e9


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Attributes:
      seconds: for which requests arrive.
      longest: prompt and output lengths are in [8, this).
      slo_s: the objective, seconds to the first token.
      max_sequences, max_batch_tokens: of a step.
      saturated_requests: of the run that measures what the server can do.
      adapters: of setting S2, where an experiment does not say.
      few_pages: of the small pool of the clustering experiment.
    """

    seconds: float = 120.0
    longest: int = 512
    slo_s: float = 6.0
    max_sequences: int = 256
    max_batch_tokens: int = 1024
    saturated_requests: int = 500
    adapters: int = 100
    few_pages: int = 900
    seed: int = 42

    def scheduler(self, **changes) -> SchedulerConfig:
        """Without prefix cache, as in the paper, and with room for everybody to wait."""
        return SchedulerConfig(
            max_sequences=self.max_sequences,
            max_batch_tokens=self.max_batch_tokens,
            max_waiting=10**6,
            prefix_cache=False,
            slo_ms=self.slo_s * 1000,
            **changes,
        )


@dataclass(frozen=True)
class Outcome:
    """What a server did with a workload."""

    times: list[Times]
    seconds: float
    num_loads: int


class Server(Protocol):
    """Serves workloads: in simulated time, or for real."""

    def run(self, case: Case, workload: list[WorkItem], scheduler: SchedulerConfig, pool_pages: int | None) -> Outcome:
        """Serves a workload to its end.

        Args:
          pool_pages: size of the pool; None for the server's own.
        """
        ...

    def describe(self) -> dict:
        """For the record: which machine, how it was measured."""
        ...


@dataclass(frozen=True)
class SimulatedServer:
    """The real scheduler in simulated time; see ``simulate``."""

    model: ModelConfig
    gpu: Gpu = H200
    pool_pages: int = 13_000

    def run(self, case, workload, scheduler, pool_pages) -> Outcome:
        run = simulate(case, workload, scheduler, pool_pages or self.pool_pages, StepTime(self.gpu, self.model))
        return Outcome(run.times, run.seconds, run.num_loads)

    def describe(self) -> dict:
        return {
            "server": "simulated",
            "gpu": dataclasses.asdict(self.gpu),
            "model": dataclasses.asdict(self.model),
            "pool_pages": self.pool_pages,
        }


@dataclass(frozen=True)
class Point:
    """One run: of a series (a policy), at an x, with which requests counted under which name."""

    series: str
    x: float
    case: Case
    workload: list[WorkItem]
    scheduler: SchedulerConfig
    pool_pages: int | None = None
    counted: Callable[[WorkItem], bool] = lambda item: True


@dataclass(frozen=True)
class Experiment:
    """A comparison, drawn as one plot for each of ``metrics`` with a line for each series.

    Attributes:
      points: from the scale and the requests a second that the server answers saturated.
      metrics: fields of a result's row.
    """

    name: str
    title: str
    x_label: str
    metrics: tuple[str, ...]
    points: Callable[[Scale, float], Iterator[Point]]


def _abort_points(scale: Scale, saturated: float) -> Iterator[Point]:
    case = Case("S2", scale.adapters)
    for cv in CVS:
        workload = _open(scale, case.num_adapters, _OVERLOAD * saturated, cv)
        for series, policy in (("first come", "fcfs"), ("last come", "lcfs"), ("early abort", "abort")):
            # As in the paper, which has no bound on waiting: everybody is overdue when a queue has grown for minutes.
            yield Point(series, cv, case, workload, scale.scheduler(policy=policy, max_wait_s=_FOREVER))


def _cluster_points(scale: Scale, saturated: float) -> Iterator[Point]:
    case = Case("S2", 32)
    # A small pool answers less than the saturated run's, and is overloaded by less than its rate.
    workload = _open(scale, case.num_adapters, 0.5 * saturated, cv=1.0)
    for batch_adapters in (1, 2, 4, 8, 16, 32):
        scheduler = scale.scheduler(policy="cluster", batch_adapters=batch_adapters)
        yield Point("clustering", batch_adapters, case, workload, scheduler, scale.few_pages)
        yield Point("first come", batch_adapters, case, workload, scale.scheduler(), scale.few_pages)


def _fair_points(scale: Scale, saturated: float) -> Iterator[Point]:
    case = Case("S1", 2)
    for flood in (0.5, 1.0, 2.0, 4.0):
        light = _of_adapter(_open(scale, 1, 0.1 * saturated, 1.0), 0)
        flooding = _of_adapter(_open(dataclasses.replace(scale, seed=scale.seed + 1), 1, flood * saturated, 1.0), 1)
        both = sorted([*light, *flooding], key=lambda item: item.arrival)
        for series, workload, policy in (
            ("alone", light, "fcfs"),
            ("first come", both, "fcfs"),
            ("fair (VTC)", both, "vtc"),
        ):
            yield Point(series, flood, case, workload, scale.scheduler(policy=policy), counted=_is_light)


def _chat_points(scale: Scale, saturated: float) -> Iterator[Point]:
    case = Case("S2", CHAT_ADAPTERS)
    for load in (0.5, 1.0, 2.0, 4.0):
        count = max(2, round(load * saturated * scale.seconds))
        workload = _stretched(draw_chat_workload(count, _VOCABULARY, scale.seed, load * saturated), scale.seconds)
        for series, policy in (("first come", "fcfs"), ("early abort", "abort")):
            yield Point(series, load, case, workload, scale.scheduler(policy=policy, max_wait_s=_FOREVER))


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "abort",
            "Early abort against first come and last come, 1.5 times as many requests as can be answered",
            "coefficient of variation of the arrivals",
            ("attainment", "satisfaction", "mean_first_token", "throughput"),
            _abort_points,
        ),
        Experiment(
            "cluster",
            "Clustering in a small pool, 32 adapters",
            "adapters in a batch",
            ("throughput", "mean_latency", "loads"),
            _cluster_points,
        ),
        Experiment(
            "fair",
            "A light tenant beside a flooding one",
            "flood, as a share of what can be answered",
            ("mean_latency", "mean_first_token"),
            _fair_points,
        ),
        Experiment(
            "chat",
            "Requests like a chat service's, 26 adapters",
            "load, as a share of the synthetic requests that can be answered",
            ("throughput", "mean_first_token", "attainment"),
            _chat_points,
        ),
    )
}


def run_experiment(
    experiment: Experiment, server: Server, scale: Scale, saturated: float, note: Callable[[dict], None]
) -> list[dict]:
    """Runs every point and returns a row each: series, x, and the metrics of the requests that count.

    Args:
      note: is called with each row as it comes.
    """
    rows = []
    for point in experiment.points(scale, saturated):
        outcome = server.run(point.case, point.workload, point.scheduler, point.pool_pages)
        counted = [t for item, t in zip(point.workload, outcome.times, strict=True) if point.counted(item)]
        row = {"series": point.series, "x": point.x, "loads": outcome.num_loads}
        rows.append(row | dataclasses.asdict(Service.of(counted, scale.slo_s)))
        note(rows[-1])
    return rows


def saturated_rate(server: Server, scale: Scale) -> float:
    """Requests a second that the server answers when all of them are there at the start."""
    case = Case("S2", scale.adapters)
    workload = draw_workload(scale.saturated_requests, case.num_adapters, _VOCABULARY, scale.seed, scale.longest)
    return scale.saturated_requests / server.run(case, workload, scale.scheduler(), None).seconds


def run_paper(
    names: Sequence[str], server: Server, scale: Scale, folder: Path, command: str, note: Callable[[str], None]
) -> None:
    """Runs experiments and writes ``NAME.json`` and ``NAME.md`` of each into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    saturated = saturated_rate(server, scale)
    note(f"saturated: {saturated:.2f} requests a second")
    for name in names:
        experiment = EXPERIMENTS[name]
        rows = run_experiment(experiment, server, scale, saturated, lambda row: note(json.dumps(row)))
        result = {
            "experiment": name,
            "title": experiment.title,
            "x": experiment.x_label,
            "metrics": experiment.metrics,
            "command": command,
            "saturated_requests_per_second": saturated,
            "scale": dataclasses.asdict(scale),
            **server.describe(),
            "rows": rows,
        }
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"{name}.md").write_text(table(result))


def table(result: dict) -> str:
    """A result as a page of markdown: a table for each metric, a column for each series."""
    series = list(dict.fromkeys(row["series"] for row in result["rows"]))
    where = "in simulated time" if result["server"] == "simulated" else f"on {result['server']}"
    lines = [f"# {result['title']}", "", f"Run {where}; `{result['command']}`."]
    for metric in result["metrics"]:
        lines += ["", f"## {metric_label(metric)}", "", f"| {result['x']} | {' | '.join(series)} |"]
        lines.append("|---" * (len(series) + 1) + "|")
        for x in dict.fromkeys(row["x"] for row in result["rows"]):
            values = {row["series"]: row[metric] for row in result["rows"] if row["x"] == x}
            lines.append(f"| {x:g} | {' | '.join(_shown(values.get(s)) for s in series)} |")
    return "\n".join(lines) + "\n"


def metric_label(metric: str) -> str:
    return {
        "attainment": "share of first tokens in time",
        "satisfaction": "user satisfaction",
        "mean_first_token": "mean time to the first token, s",
        "mean_latency": "mean latency, s",
        "throughput": "requests answered a second",
        "loads": "adapters copied to the device",
    }[metric]


def read_shape(path: str) -> ModelConfig:
    """A model's shape from a file of ``configs/shapes``."""
    return ModelConfig.from_hf(read_yaml(Path(path)))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _open(scale: Scale, num_adapters: int, rate: float, cv: float) -> list[WorkItem]:
    count = max(2, round(rate * scale.seconds))
    trace = OpenTrace(rate, cv, alpha=0.0)
    workload = draw_workload(count, num_adapters, _VOCABULARY, scale.seed, scale.longest, trace)
    return _stretched(workload, scale.seconds)


def _stretched(workload: list[WorkItem], seconds: float) -> list[WorkItem]:
    factor = seconds / workload[-1].arrival
    return [dataclasses.replace(item, arrival=item.arrival * factor) for item in workload]


def _of_adapter(workload: list[WorkItem], adapter: int) -> list[WorkItem]:
    return [dataclasses.replace(item, adapter=adapter) for item in workload]


def _is_light(item: WorkItem) -> bool:
    return item.adapter == 0
