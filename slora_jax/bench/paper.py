"""The paper's experiments, defined once: run in simulated time, or on the engine by the wall clock.

Rates are shares of what the server answers of an experiment's own case when all requests are there at the start
("saturated"), measured first, so that an experiment means the same on any GPU. Arrivals are stretched to their expected
length: with large cv a draw's own rate may be half or twice what was meant.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from slora_jax.bench.plan import GPUS, Load, plan
from slora_jax.bench.service import Service, Times
from slora_jax.bench.shares import FixedShares
from slora_jax.bench.simulate import H200, StepSpeeds, StepTime, simulate
from slora_jax.bench.workload import (
    CHAT_ADAPTERS,
    Case,
    Lengths,
    OpenTrace,
    WorkItem,
    draw_chat_workload,
    draw_workload,
)
from slora_jax.config import SchedulerConfig
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.config import ModelConfig


class Saturated(Protocol):
    """Requests a second that the server answers of a case in batches of so many sequences; None: the scale's."""

    def __call__(self, case: Case, max_sequences: int | None = None) -> float: ...


type System = Literal["unified", "split", "padded", "merged"]
"""This engine; adapters in a fixed share of its pool; with padded products; with one adapter merged at a time."""

PAPER_CASE = Case("S2", 100)
PAPER_LONGEST = 512
PAPER_SATURATED = 7.29
"""Requests a second of S-LoRA in this case, of such lengths, on one A100-80 (the paper's table 3)."""

_OVERLOAD = 1.5
_FLOOD = 2.0
_VOCABULARY = 32000
"""Of the paper's models; prompts are drawn from it."""
_FOREVER = 1e9
_PEERS = Path(__file__).with_name("peers.json")


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Attributes:
      seconds: for which requests arrive.
      longest: prompt and output lengths are in [8, this).
      slo_s: the objective, seconds to the first token.
      max_sequences, max_batch_tokens: of a step.
      saturated_batches: requests of the run that measures what the server can do, in batches: its ends, in which
        batches fill and drain, do not count. Simulated, 4 batches and 20 differ by 1 %.
      saturated_requests: of the ablation, whose requests are all there at the start.
      adapters: of setting S2, where an experiment does not say.
      few_pages: of the small pool of the clustering experiment and the ablation: the paper's A10G held 14,500 tokens.
      table_requests, table_longest, table_sequences: of table 3, in place of the above.
      The others are the values of each experiment's axis.
    """

    seconds: float = 120.0
    longest: int = 512
    slo_s: float = 6.0
    max_sequences: int = 256
    max_batch_tokens: int = 1024
    saturated_batches: int = 10
    saturated_requests: int = 500
    adapters: int = 100
    few_pages: int = 900
    table_requests: int = 1000
    table_longest: int = 512
    table_sequences: int = 512
    table_adapters: tuple[int, ...] = (5, 100, 1000, 2000)
    rate_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    ablation_adapters: tuple[int, ...] = (1, 5, 20, 50, 100, 200)
    ablation_sequences: int = 64
    merged_adapters: tuple[int, ...] = (1, 2, 3, 4, 5)
    cvs: tuple[float, ...] = (1, 2, 4, 6, 8)
    clusters: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    fair_sequences: tuple[int, ...] = (16, 32, 64, 128)
    loads: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    seed: int = 42

    def scheduler(self, **changes) -> SchedulerConfig:
        """Without prefix cache, as in the paper, and with room for everybody to wait."""
        fields = {
            "max_sequences": self.max_sequences,
            "max_batch_tokens": self.max_batch_tokens,
            "max_waiting": 10**6,
            "prefix_cache": False,
            "slo_ms": self.slo_s * 1000,
        }
        return SchedulerConfig(**fields | changes)


SCALES = {
    "full": Scale(),
    # All of it on one H200 in minutes: shorter requests in smaller batches, so that seconds show what minutes do.
    "quick": Scale(
        seconds=5, longest=256, slo_s=0.3, max_sequences=64, saturated_batches=4, saturated_requests=150, few_pages=450,
        table_requests=200, rate_shares=(0.7, 1.5), ablation_adapters=(5, 200), merged_adapters=(1, 2, 5),
        cvs=(1, 4, 8), clusters=(4, 32), fair_sequences=(32, 64), loads=(1.0, 2.0),
    ),
    # A toy on a CPU, to try the command itself.
    "toy": Scale(
        seconds=0.5, longest=12, slo_s=1.0, max_sequences=4, max_batch_tokens=16, saturated_batches=4,
        saturated_requests=8, adapters=4, few_pages=100, table_requests=8, table_longest=12, table_sequences=4,
        table_adapters=(2,), rate_shares=(0.5,), ablation_adapters=(2,), ablation_sequences=4, merged_adapters=(2,),
        cvs=(1,), clusters=(2,), fair_sequences=(4,), loads=(1.0,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a server did with a workload.

    Attributes:
      times: of each request, in the workload's order.
      pool_pages: of the pool of this run, the trash page included.
      num_loads: copies of adapters to the device.
      num_prefetch_late: requests that had to wait for their adapter's copy.
      switch_seconds: of bringing another adapter into the weights, of a merging server.
      num_compilations: programs compiled meanwhile; there should be none.
    """

    times: list[Times]
    pool_pages: int
    num_loads: int = 0
    num_prefetch_late: int = 0
    switch_seconds: list[float] = dataclasses.field(default_factory=list)
    num_compilations: int = 0


@dataclass(frozen=True)
class Point:
    """One run: of a series (a policy), at an x, on a system, with the requests that are counted.

    ``pool_pages`` is the size of the pool; None for the server's own.
    """

    series: str
    x: float
    case: Case
    workload: list[WorkItem]
    scheduler: SchedulerConfig
    pool_pages: int | None = None
    system: System = "unified"
    counted: Callable[[WorkItem], bool] = lambda item: True


class Server(Protocol):
    """Serves workloads, in simulated time or for real; many, one after the other.

    Attributes:
      systems: those it can be.
      settings: those of the paper that are for its model.
    """

    systems: tuple[System, ...]
    settings: tuple[str, ...]

    def run(self, point: Point) -> Outcome:
        """Serves the point's workload to its end."""
        ...

    def describe(self) -> dict:
        """For the record: which machine, how it was measured."""
        ...


@dataclass(frozen=True)
class SimulatedServer:
    """The real scheduler in simulated time (see ``simulate``), over ``pool_pages`` unless a point says less."""

    model: ModelConfig
    pool_pages: int
    speeds: StepSpeeds = H200
    systems = ("unified", "split")

    @classmethod
    def on_h200(cls, model: ModelConfig) -> "SimulatedServer":
        """With the pages that an engine has for this model on one H200.

        Raises:
          InvalidRequest: the weights do not fit.
        """
        planned = plan(model, 1, GPUS["h200"], Load(1, 1))
        return cls(model, planned["pages"]["total"] + 1)

    @property
    def settings(self) -> tuple[str, ...]:
        return settings_of(self.model)

    def run(self, point: Point) -> Outcome:
        num_pages, create_budget = budget_of(point, self.pool_pages)
        step_time = StepTime(self.speeds, self.model)
        run = simulate(point.case, point.workload, point.scheduler, create_budget, step_time)
        return Outcome(run.times, num_pages, run.num_loads, run.num_prefetch_late)

    def describe(self) -> dict:
        return {
            "server": "simulated",
            "speeds": dataclasses.asdict(self.speeds),
            "model": dataclasses.asdict(self.model),
        }


def budget_of(point: Point, pool_pages: int) -> tuple[int, Callable[[], PageBudget]]:
    """How many pages a point has, the trash page included, and what makes its budget of them."""
    num_pages = min(point.pool_pages or pool_pages, pool_pages)
    kind = FixedShares if point.system == "split" else PageBudget
    return num_pages, lambda: kind(PageAllocator(num_pages))


def settings_of(model: ModelConfig) -> tuple[str, ...]:
    """The paper's settings for a model of this size: S4 is for 13B."""
    return ("S4",) if model.num_layers == 40 else ("S1", "S2")


@dataclass(frozen=True)
class Experiment:
    """A comparison, drawn as one plot for each of ``metrics`` with a line for each series.

    Attributes:
      points: from the scale, the server's settings, and a function that gives the requests a second that the server
        answers saturated, in batches of so many sequences (the scale's without an argument).
      metrics: fields of a result's row.
      bars: whether its x are categories.
      needs: a system without which it says nothing.
    """

    name: str
    title: str
    x_label: str
    metrics: tuple[str, ...]
    points: Callable[[Scale, Sequence[str], Saturated], Iterator[Point]]
    bars: bool = False
    needs: System = "unified"


def _table_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    scheduler = scale.scheduler(max_sequences=scale.table_sequences)
    cases = [Case("base", 0)] + [Case(s, n) for s in settings for n in scale.table_adapters]
    for case in cases:
        workload = draw_workload(
            scale.table_requests, case.num_adapters, _VOCABULARY, scale.seed, Lengths.below(scale.table_longest)
        )
        yield Point(f"slora-jax, {case.setting}", case.num_adapters, case, workload, scheduler)


def _rate_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    for setting in settings:
        case = Case(setting, scale.adapters)
        for share in scale.rate_shares:
            rate = share * saturated(case)
            workload = _open(scale, case.num_adapters, rate, cv=1.0)
            yield Point(setting, round(rate, 3), case, workload, scale.scheduler(max_wait_s=_FOREVER))


def _ablation_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    tokens = min(scale.max_batch_tokens, 4 * scale.ablation_sequences)
    scheduler = scale.scheduler(max_sequences=scale.ablation_sequences, max_batch_tokens=tokens)
    # By system, for each may need its own start; the padded one last.
    for series, system in (("slora-jax", "unified"), ("fixed share", "split"), ("padded products", "padded")):
        for n in scale.ablation_adapters:
            case = Case(settings[-1], n)
            workload = draw_workload(scale.saturated_requests, n, _VOCABULARY, scale.seed, Lengths.below(scale.longest))
            yield Point(series, n, case, workload, scheduler, scale.few_pages, system)


def _merged_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    for n in scale.merged_adapters:
        case = Case(settings[-1], n)
        workload = _open(scale, n, saturated(case), cv=1.0)
        for series, system in (("on the fly", "unified"), ("merged", "merged")):
            yield Point(series, n, case, workload, scale.scheduler(max_wait_s=_FOREVER), system=system)


def _abort_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    case = Case(settings[-1], scale.adapters)
    for cv in scale.cvs:
        workload = _open(scale, case.num_adapters, _OVERLOAD * saturated(case), cv)
        for series, policy in (("first come", "fcfs"), ("last come", "lcfs"), ("early abort", "abort")):
            # As in the paper, which has no bound on waiting: everybody is overdue when a queue has grown for minutes.
            yield Point(series, cv, case, workload, scale.scheduler(policy=policy, max_wait_s=_FOREVER))


def _cluster_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    case = Case(settings[-1], 32)
    # The small pool answers less than that: requests wait, and there is something to choose from.
    workload = _open(scale, case.num_adapters, saturated(case), cv=1.0)
    # With all 32 in a batch the order is first come.
    for batch_adapters in scale.clusters:
        scheduler = scale.scheduler(policy="cluster", batch_adapters=batch_adapters)
        yield Point("clustering", batch_adapters, case, workload, scheduler, scale.few_pages)


def _fair_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    case = Case(settings[0], 2)
    for batch in scale.fair_sequences:
        rate = saturated(case, batch)
        light = _of_adapter(_open(scale, 1, 0.1 * rate, 1.0), 0)
        flooding = _of_adapter(_open(dataclasses.replace(scale, seed=scale.seed + 1), 1, _FLOOD * rate, 1.0), 1)
        both = sorted([*light, *flooding], key=lambda item: item.arrival)
        for series, workload, policy in (
            ("alone", light, "fcfs"),
            ("first come", both, "fcfs"),
            ("fair (VTC)", both, "vtc"),
        ):
            scheduler = scale.scheduler(policy=policy, max_sequences=batch)
            yield Point(series, batch, case, workload, scheduler, counted=_is_light)


def _trace_points(scale: Scale, settings, saturated) -> Iterator[Point]:
    case = Case(settings[-1], CHAT_ADAPTERS)
    for load in scale.loads:
        rate = load * saturated(case)
        count = max(2, round(rate * scale.seconds))
        chat = draw_chat_workload(count, _VOCABULARY, scale.seed, rate, longest=2 * scale.longest)
        workload = _stretched(chat, scale.seconds)
        for series, policy in (("first come", "fcfs"), ("early abort", "abort")):
            yield Point(series, load, case, workload, scale.scheduler(policy=policy, max_wait_s=_FOREVER))


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "table3",
            "Table 3: throughput, all requests there at the start",
            "adapters",
            ("throughput",),
            _table_points,
            bars=True,
        ),
        Experiment(
            "rates",
            "Service at rising request rates",
            "requests a second",
            ("throughput", "mean_latency", "mean_first_token", "attainment", "satisfaction"),
            _rate_points,
        ),
        Experiment(
            "abort",
            "Early abort against first come and last come, 1.5 times as many requests as can be answered",
            "coefficient of variation of the arrivals",
            ("attainment", "satisfaction", "mean_first_token", "throughput"),
            _abort_points,
        ),
        Experiment(
            "fairness",
            "A light tenant beside one that asks for twice what can be answered",
            "sequences of a batch",
            ("mean_latency", "mean_first_token"),
            _fair_points,
        ),
        Experiment(
            "trace",
            "Requests like a chat service's, 26 adapters",
            "load, as a share of the synthetic requests that can be answered",
            ("throughput", "mean_first_token", "attainment"),
            _trace_points,
        ),
        Experiment(
            "cluster",
            "Clustering in a small pool, 32 adapters",
            "adapters in a batch",
            ("throughput", "mean_latency", "loads"),
            _cluster_points,
        ),
        Experiment(
            "merged",
            "One adapter merged into the weights against on the fly",
            "adapters",
            ("throughput", "mean_latency"),
            _merged_points,
            needs="merged",
        ),
        Experiment(
            "ablation",
            "Ablation, in a small pool",
            "adapters",
            ("throughput", "mean_latency"),
            _ablation_points,
        ),
    )
}
"""In the order in which they run: what needs another start of the engine comes last."""


def run_experiment(
    experiment: Experiment,
    server: Server,
    scale: Scale,
    saturated: Saturated,
    note: Callable[[list[dict]], None],
) -> list[dict]:
    """Runs every point that the server can and returns a row each: series, x, and the metrics of who counts.

    Of a row ``requests`` are all that were served, ``num_requests`` those that count; the pool's numbers are of all.

    Args:
      note: is called with the rows so far after each point.
    """
    rows: list[dict] = []
    for point in experiment.points(scale, server.settings, saturated):
        if point.system not in server.systems:
            continue
        outcome = server.run(point)
        counted = [t for item, t in zip(point.workload, outcome.times, strict=True) if point.counted(item)]
        row = {
            "series": point.series,
            "x": point.x,
            "requests": len(point.workload),
            "pool_pages": outcome.pool_pages,
            "loads": outcome.num_loads,
            "prefetch_late": outcome.num_prefetch_late,
            "compilations": outcome.num_compilations,
        }
        if outcome.switch_seconds:
            row |= {
                "switches": len(outcome.switch_seconds),
                "switch_milliseconds": statistics.median(outcome.switch_seconds) * 1000,
            }
        rows.append(row | dataclasses.asdict(Service.of(counted, point.scheduler.slo_ms / 1000)))
        note(rows)
    return rows


def saturated_rate(server: Server, scale: Scale, case: Case, max_sequences: int) -> tuple[float, int]:
    """Requests a second that the server answers of a case, in batches of so many, when all are there at the start.

    Taken between a fifth and four fifths of the answers: the first batch fills and the last ones drain.

    Returns:
      The rate, and how many programs were compiled meanwhile.
    """
    count = scale.saturated_batches * max_sequences
    workload = draw_workload(count, case.num_adapters, _VOCABULARY, scale.seed, Lengths.below(scale.longest))
    outcome = server.run(Point("saturated", 0, case, workload, scale.scheduler(max_sequences=max_sequences)))
    answered = sorted(t.last for t in outcome.times)
    first, last = count // 5, 4 * count // 5
    return (last - first) / (answered[last] - answered[first]), outcome.num_compilations


def run_paper(
    names: Sequence[str], server: Server, scale: Scale, folder: Path, command: str, note: Callable[[str], None]
) -> int:
    """Runs experiments and writes ``NAME.json`` of each into ``folder``, anew with every point: a run may be cut off.

    Returns:
      Programs that were compiled in what was timed: its times are of no use if there were any.

    Raises:
      KeyError: there is no such experiment.
    """
    folder.mkdir(parents=True, exist_ok=True)

    rates: dict[tuple[Case, int], float] = {}
    num_compilations = 0

    for experiment in [EXPERIMENTS[name] for name in names]:
        if experiment.needs not in server.systems:
            note(f"{experiment.name}: left out, for this server has no {experiment.needs!r}")
            continue
        own_rates: dict[tuple[Case, int], float] = {}

        def saturated(case: Case, max_sequences: int | None = None, own_rates=own_rates) -> float:
            key = case, max_sequences or scale.max_sequences
            if key not in rates:
                rates[key], compiled = saturated_rate(server, scale, *key)
                nonlocal num_compilations
                num_compilations += compiled
                note(f"saturated, {case}, {key[1]} sequences: {rates[key]:.2f} requests a second")
            own_rates[key] = rates[key]
            return rates[key]

        def write(rows: list[dict], complete: bool = False, experiment=experiment, own_rates=own_rates) -> None:
            papers = own_rates.get((PAPER_CASE, scale.max_sequences)) if scale.longest == PAPER_LONGEST else None
            result = {
                "experiment": experiment.name,
                "title": experiment.title,
                "x": experiment.x_label,
                "metrics": experiment.metrics,
                "bars": experiment.bars,
                "command": command,
                "complete": complete,
                "saturated_requests_per_second": {
                    f"{case}, {sequences} sequences": rate for (case, sequences), rate in own_rates.items()
                },
                **({"rate_over_the_papers": papers / PAPER_SATURATED} if papers else {}),
                "scale": dataclasses.asdict(scale),
                **server.describe(),
                "rows": rows,
            }
            (folder / f"{experiment.name}.json").write_text(json.dumps(result, indent=1) + "\n")

        def note_row(rows: list[dict], experiment=experiment, write=write) -> None:
            write(rows)
            note(f"{experiment.name}: {json.dumps(rows[-1])}")

        rows = run_experiment(experiment, server, scale, saturated, note_row)
        write(rows, complete=True)
        num_compilations += sum(row["compilations"] for row in rows)
    return num_compilations


def scale_of(name: str, seed: int, simulated: bool) -> Scale:
    """A scale of ``SCALES`` under a seed. In simulated time larger batches cost no GPU's minutes."""
    scale = dataclasses.replace(SCALES[name], seed=seed)
    return dataclasses.replace(scale, fair_sequences=(32, 64, 128)) if simulated and name == "quick" else scale


def most_sequences(names: Sequence[str], scale: Scale) -> int:
    """Of the largest step of these experiments."""
    sequences = [scale.max_sequences]
    if "table3" in names:
        sequences.append(scale.table_sequences)
    if "fairness" in names:
        sequences.extend(scale.fair_sequences)
    if "ablation" in names:
        sequences.append(scale.ablation_sequences)
    return max(sequences)


def check_folder(folder: Path, server: str, scale: Scale, model: ModelConfig) -> None:
    """
    Raises:
      ValueError: the folder holds results of another server, scale or model, beside which new ones would be misread.
    """
    own = {"server": server, "scale": dataclasses.asdict(scale), "model": dataclasses.asdict(model)}
    own = json.loads(json.dumps(own))
    for name in EXPERIMENTS:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        there = json.loads(path.read_text())
        for field, value in own.items():
            if there.get(field) != value:
                difference = _difference(there.get(field, {}), value)
                raise ValueError(
                    f"{path} was made with another {field} ({difference}): these results and those would be taken for "
                    "one run's; give another --out, or remove the folder"
                )


def _difference(there: dict | str, here: dict | str) -> str:
    if isinstance(there, str) or isinstance(here, str):
        return f"{there} there, {here} here"
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def read_results(folder: Path) -> list[dict]:
    """The results in a folder, in the order of ``EXPERIMENTS``; table 3's with the rows of other systems, if those did
    the same work on the same GPU.
    """
    results = []
    for name in EXPERIMENTS:
        path = folder / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            if name == "table3" and _is_as_the_peers(result):
                result["rows"] += json.loads(_PEERS.read_text())["rows"]
            results.append(result)
    return results


def _is_as_the_peers(result: dict) -> bool:
    scale, model = result["scale"], result["model"]
    return (
        result["server"] == "engine"
        and "H200" in result["device"]
        and (scale["table_requests"], scale["table_longest"]) == (1000, 512)
        and (model["num_layers"], model["hidden_size"], model["num_kv_heads"]) == (32, 4096, 32)  # Llama-2-7B
    )


def title(result: dict) -> str:
    """Of a plot or a table; says so where the run was cut off."""
    return result["title"] + ("" if result.get("complete", True) else " (incomplete)")


def table(result: dict) -> str:
    """A result as markdown under its title: a table for each metric, a column for each series."""
    series = list(dict.fromkeys(row["series"] for row in result["rows"]))
    lines = [title(result)]
    for metric in result["metrics"]:
        lines += ["", f"| {result['x']}: {metric_label(metric)} | {' | '.join(series)} |"]
        lines.append("|---" * (len(series) + 1) + "|")
        for x in sorted({row["x"] for row in result["rows"]}):
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


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _open(scale: Scale, num_adapters: int, rate: float, cv: float) -> list[WorkItem]:
    count = max(2, round(rate * scale.seconds))
    trace = OpenTrace(rate, cv, alpha=0.0)
    workload = draw_workload(count, num_adapters, _VOCABULARY, scale.seed, Lengths.below(scale.longest), trace)
    return _stretched(workload, scale.seconds)


def _stretched(workload: list[WorkItem], seconds: float) -> list[WorkItem]:
    factor = seconds / workload[-1].arrival
    return [dataclasses.replace(item, arrival=item.arrival * factor) for item in workload]


def _of_adapter(workload: list[WorkItem], adapter: int) -> list[WorkItem]:
    return [dataclasses.replace(item, adapter=adapter) for item in workload]


def _is_light(item: WorkItem) -> bool:
    return item.adapter == 0
