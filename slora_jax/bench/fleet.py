"""Rules of routing in a fleet of replicas: thousands of adapters in simulated time, and a few by the wall clock.

Each simulated replica is the real scheduler over a simulated H200, with a host memory that holds part of the adapters
and a disk behind it. What the simulation says of a rule can be checked against a real fleet on a CPU, by what does not
depend on the speed of either: the share of requests that find their adapter in the pool.
"""

import dataclasses
import datetime
import random
import tempfile
import time
import urllib.request
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.adapters.peft import read_header
from slora_jax.bench.demo import cpu
from slora_jax.bench.demo_server import post, write_variant
from slora_jax.bench.paper import SimulatedServer
from slora_jax.bench.service import Times
from slora_jax.bench.simulate import H200, SimulatedDevice, StepTime
from slora_jax.bench.workload import SETTINGS
from slora_jax.config import SchedulerConfig
from slora_jax.demo import demo_adapters, demo_model_path
from slora_jax.engine.core import Core, Outcome
from slora_jax.fleet.routing import RULES, Routing, Rule, create_routing
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import Sequence

SPILL_AT = 16
"""Requests that a replica answers before it counts as busy, as is the default of a fleet."""

MOST_DIFFERENCE = 0.05
"""By how much the simulated and the real share of resident adapters may differ."""


@dataclass(frozen=True)
class Asked:
    """One request of a trace: seconds from its start, an adapter's number, and lengths in tokens."""

    arrival: float
    adapter: int
    num_prompt: int
    num_output: int


@dataclass(frozen=True)
class Hardware:
    """What a replica has.

    Attributes:
      step_time: of its GPU.
      pool_pages: of its pool.
      host_pages: of adapters that its host memory holds.
      disk_seconds: to bring a page of an adapter from disk to host memory; one adapter after the other.
      scheduler: its settings.
    """

    step_time: StepTime
    pool_pages: int
    host_pages: int
    disk_seconds: float
    scheduler: SchedulerConfig

    def described(self) -> dict[str, Any]:
        """For the record."""
        return {
            "speeds": dataclasses.asdict(self.step_time.speeds),
            "pool_pages": self.pool_pages,
            "host_pages": self.host_pages,
            "disk_seconds_a_page": self.disk_seconds,
        }


def draw_trace(count: int, num_adapters: int, rate: float, alpha: float, longest: int, seed: int) -> list[Asked]:
    """Poisson arrivals at ``rate`` a second; adapter i in proportion to ``(i + 1) ** -alpha``; lengths uniform in
    [8, ``longest``)."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    weights = np.arange(1.0, num_adapters + 1) ** -alpha
    adapters = rng.choice(num_adapters, count, p=weights / weights.sum())
    prompts, outputs = rng.integers(8, longest, (2, count))
    columns = (column.tolist() for column in (arrivals, adapters, prompts, outputs))
    return [Asked(*row) for row in zip(*columns, strict=True)]


class _Host:
    """Host memory in simulated time, which forgets the adapters used longest ago that nobody wants."""

    def __init__(self, pages: int, disk_seconds: float):
        self.pages = pages
        self.disk_seconds = disk_seconds
        self.now = 0.0
        self.num_loads = 0
        self._disk_until = 0.0
        self._in_memory: OrderedDict[_Adapter, None] = OrderedDict()
        self._loading: deque[tuple[float, _Adapter]] = deque()

    def want(self, adapter: "_Adapter") -> None:
        if adapter.status == "ready":
            self._in_memory.move_to_end(adapter)
        elif adapter.status == "registered":
            adapter.status = "loading"
            self.num_loads += 1
            self._disk_until = max(self.now, self._disk_until) + adapter.num_pages * self.disk_seconds
            self._loading.append((self._disk_until, adapter))

    def advance(self, now: float) -> None:
        """Takes in what came from disk until then."""
        self.now = max(self.now, now)
        while self._loading and self._loading[0][0] <= self.now:
            adapter = self._loading.popleft()[1]
            adapter.status = "ready"
            self._in_memory[adapter] = None
        used = sum(adapter.num_pages for adapter in self._in_memory)
        for adapter in list(self._in_memory):
            if used <= self.pages:
                break
            if not adapter.held:
                used -= adapter.num_pages
                adapter.status = "registered"
                del self._in_memory[adapter]

    @property
    def next_arrival(self) -> float | None:
        return self._loading[0][0] if self._loading else None


@dataclass(eq=False)
class _Adapter:
    """An adapter on one replica, as far as its scheduler can see."""

    content_hash: str
    num_pages: int
    host: _Host
    status: str = "registered"
    failure: str = ""
    held: int = 0

    def hold(self) -> None:
        self.held += 1
        self.host.want(self)

    def let_go(self) -> None:
        self.held -= 1


class _Replica:
    """One replica in simulated time."""

    def __init__(self, name: str, hardware: Hardware, pages_of: Many[int]):
        self.name = name
        self.waiting = 0
        self.served = 0
        self._pages_of = pages_of
        self._device = SimulatedDevice(hardware.step_time)
        self._host = _Host(hardware.host_pages, hardware.disk_seconds)
        self._adapters: dict[int, _Adapter] = {}
        self._times: dict[int, Times] = {}

        def create_scheduler() -> Scheduler:
            pages = PageAllocator(hardware.pool_pages)
            return Scheduler(hardware.scheduler, pages, lambda: self._device.now, budget=PageBudget(pages))

        self._core = Core(create_scheduler, self._device)

    @property
    def num_host_loads(self) -> int:
        return self._host.num_loads

    @property
    def num_pool_loads(self) -> int:
        return self._core.counts["adapter_loads"]

    def adapter(self, number: int) -> _Adapter:
        if number not in self._adapters:
            self._adapters[number] = _Adapter(str(number), self._pages_of[number], self._host)
        return self._adapters[number]

    def has_resident(self, number: int) -> bool:
        return number in self._adapters and self._core.scheduler.is_resident(self._adapters[number])

    def take(self, number: int, asked: Asked, times: Times) -> None:
        sampling = SamplingParams(max_tokens=asked.num_output, temperature=0.0, ignore_eos=True)
        adapter = self.adapter(asked.adapter)
        # Prompts of different requests have no token in common that a prefix cache could find.
        prompt = [number % 30_000, *range(1, asked.num_prompt)]
        sequence = Sequence(
            number, prompt, len(prompt), asked.num_output, sampling, seed=0, adapter=adapter, arrival=asked.arrival,
            tenant=str(asked.adapter),
        )  # fmt: skip
        refusal = self._core.scheduler.refusal(sequence.num_prompt + sequence.max_tokens, adapter)
        assert refusal is None, refusal
        self._core.add(sequence)
        self._times[number] = times
        self.waiting += 1
        self.served += 1

    def run_until(self, now: float) -> None:
        """Steps until that time, as long as there is anything to do."""
        while self._device.now < now:
            self._host.advance(self._device.now)
            outcome = self._core.step()
            self._note(outcome)
            if not outcome.worked:
                waits_for = self._host.next_arrival
                self._device.now = now if waits_for is None else min(now, max(waits_for, self._device.now))
        self._host.advance(self._device.now)

    @property
    def is_done(self) -> bool:
        return self.waiting == 0

    def _note(self, outcome: Outcome) -> None:
        for emitted in outcome.emitted:
            number = emitted.sequence.sequence_id
            if number not in self._times:
                continue
            times = self._times[number]
            if times.first is None:
                times.first = self._device.now
            if emitted.reason is not None:
                times.last = self._device.now
                del self._times[number]
                self.waiting -= 1


@dataclass
class FleetRun:
    """What a simulated run left behind.

    Attributes:
      times: of each request.
      resident: whether the replica that got it had its adapter in the pool as it came.
      replicas: how many requests each got.
      homes: the replicas that each adapter was asked of.
      pool_loads, host_loads: adapters that were copied to pools, and read from disks.
    """

    times: list[Times]
    resident: list[bool]
    replicas: list[int]
    homes: dict[int, set[str]] = field(default_factory=dict)
    pool_loads: int = 0
    host_loads: int = 0


def simulate_fleet(
    trace: Many[Asked], num_replicas: int, routing: Routing, hardware: Hardware, pages_of: Many[int]
) -> FleetRun:
    """Serves a trace to its end, by a router that knows how many requests each replica has. Deterministic.

    Args:
      pages_of: of each adapter.
    """
    replicas = {f"replica-{i}": _Replica(f"replica-{i}", hardware, pages_of) for i in range(num_replicas)}
    run = FleetRun([Times(asked.arrival) for asked in trace], [], [])
    for number, asked in enumerate(trace):
        for replica in replicas.values():
            replica.run_until(asked.arrival)
        load = {name: replica.waiting for name, replica in replicas.items()}
        name = routing.order(str(asked.adapter), load)[0]
        run.resident.append(replicas[name].has_resident(asked.adapter))
        run.homes.setdefault(asked.adapter, set()).add(name)
        replicas[name].take(number, asked, run.times[number])
    now = trace[-1].arrival
    while not all(replica.is_done for replica in replicas.values()):
        now += 1.0
        for replica in replicas.values():
            replica.run_until(now)
    run.replicas = [replica.served for replica in replicas.values()]
    run.pool_loads = sum(replica.num_pool_loads for replica in replicas.values())
    run.host_loads = sum(replica.num_host_loads for replica in replicas.values())
    return run


def summary(run: FleetRun, hot: int = 0) -> dict[str, Any]:
    """The figures of a run: seconds rounded to milliseconds, shares to thousandths. ``hot`` is the hottest adapter."""
    first = [t.first - t.arrival for t in run.times]
    whole = [t.last - t.arrival for t in run.times]
    # The first third fills the caches.
    settled = run.resident[len(run.resident) // 3 :]
    return {
        "resident_share": round(sum(settled) / len(settled), 3),
        "first_token_s": _quantiles(first),
        "answer_s": _quantiles(whole),
        "busiest_over_mean": round(max(run.replicas) * len(run.replicas) / sum(run.replicas), 3),
        "replicas_of_the_hottest": len(run.homes.get(hot, ())),
        "replicas_of_an_adapter": round(sum(map(len, run.homes.values())) / len(run.homes), 3),
        "pool_loads": run.pool_loads,
        "host_loads": run.host_loads,
        "requests_a_second": round(len(run.times) / max(t.last for t in run.times), 2),
    }


def _quantiles(values: Many[float]) -> dict[str, float]:
    return {name: round(float(np.quantile(values, share)), 3) for name, share in (("p50", 0.5), ("p99", 0.99))}


@dataclass(frozen=True)
class Scenario:
    """A simulated fleet, and what it is asked; see ``python -m slora_jax.bench fleet --help``."""

    replicas: int
    adapters: int
    requests: int
    rate: float
    alpha: float
    host_gigabytes: float
    disk_gigabytes: float
    seed: int

    def run(self, model: ModelConfig) -> dict[str, Any]:
        """Of each rule on the same trace."""
        step_time, layout = StepTime(H200, model), PoolLayout.for_model(model)
        ranks = SETTINGS["S2"]
        by_rank = {rank: layout.adapter(dict.fromkeys("qkvo", rank)).num_pages for rank in ranks}
        pages_of = [by_rank[ranks[i % len(ranks)]] for i in range(self.adapters)]
        hardware = Hardware(
            step_time,
            SimulatedServer.on_h200(model).pool_pages,
            int(self.host_gigabytes * 2**30 / step_time.page_bytes),
            step_time.page_bytes / (self.disk_gigabytes * 2**30),
            SchedulerConfig(max_batch_tokens=512, max_sequences=256),
        )
        trace = draw_trace(self.requests, self.adapters, self.rate, self.alpha, 512, self.seed)
        rules = {
            rule: summary(
                simulate_fleet(trace, self.replicas, create_routing(rule, SPILL_AT, seed=0), hardware, pages_of)
            )
            for rule in RULES
        }
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "scenario": dataclasses.asdict(self),
            "hardware": hardware.described(),
            "rules": rules,
        }


# By the wall clock

REAL_SPILL_AT = 4
REAL_ADAPTERS = 24
REAL_POOL_PAGES = 120
"""Room for some of the adapters, so that replicas do not have all of them after a while."""

_REAL_LENGTHS = (4, 2)
_REAL_SLOWER = 100
"""How much longer a step takes on two cores than on an H200; the shares that are compared depend little on it."""

_REAL_RATE = 12.0


@dataclass(frozen=True)
class RealLoad:
    """What a real fleet of the embedded model is asked: two clients a replica, one request after the other."""

    requests: int
    replicas: int
    adapters: Mapping[str, str]
    seed: int = 0

    def drawn(self) -> list[int]:
        """Numbers of adapters, by a power law."""
        weights = [(i + 1) ** -1.0 for i in range(len(self.adapters))]
        return random.Random(self.seed).choices(range(len(weights)), weights, k=self.requests)

    def fields(self, rule: Rule) -> dict[str, Any]:
        """Of the fleet."""
        return {
            "model": "demo",
            "max_model_len": 512,
            "pool": {"pages": REAL_POOL_PAGES},
            "adapters": dict(self.adapters),
            "server": {"adapter_roots": ["/"], "grace_s": 60},
            "fleet": {"replicas": self.replicas, "routing": rule, "spill_at": REAL_SPILL_AT},
        }


def write_adapters(folder: Path) -> dict[str, str]:
    """24 adapters by name, and the folders they are written to: six of each of the embedded model's four.

    Each is a little stronger than the one before, for of equal adapters a pool holds one.
    """
    shipped = demo_adapters()
    return {
        f"{name}-{i}": str(write_variant(path, folder / f"{name}-{i}", 1 + i / 100))
        for i in range(REAL_ADAPTERS // len(shipped))
        for name, path in shipped.items()
    }


def run_real(fleet: Any, load: RealLoad) -> dict[str, Any]:
    """Asks a fleet (``ray_fleet``) that serves the load's fields; the figures of the last two thirds."""
    names, drawn = list(load.adapters), load.drawn()
    first = len(drawn) // 3

    def complete(number: int) -> float:
        began = time.perf_counter()
        post(fleet.url, "/v1/completions", model=names[number], prompt="Once upon a time", max_tokens=_REAL_LENGTHS[1],
             temperature=0, ignore_eos=True)  # fmt: skip
        return time.perf_counter() - began

    with ThreadPoolExecutor(2 * load.replicas) as clients:
        list(clients.map(complete, drawn[:first]))
        before = pool_loads(fleet)
        seconds = list(clients.map(complete, drawn[first:]))
        after = pool_loads(fleet)
    loads = sum((after - before).values())
    return {
        "resident_share": round(1 - loads / len(seconds), 3),
        "answer_s": _quantiles(seconds),
        "pool_loads": int(loads),
    }


def hot_latency(fleet: Any, load: RealLoad, clients: int = 12, requests: int = 96) -> dict[str, Any]:
    """Seconds until the answers of one adapter that ``clients`` ask for at a time, and how many replicas gave them."""
    name = next(iter(load.adapters))
    served = requests_of(fleet, name)

    def complete(_: int) -> float:
        began = time.perf_counter()
        post(fleet.url, "/v1/completions", model=name, prompt="Once upon a time", max_tokens=24, temperature=0,
             ignore_eos=True)  # fmt: skip
        return time.perf_counter() - began

    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(complete, range(requests)))
    gave = requests_of(fleet, name) - served
    return {"answer_s": _quantiles(seconds), "replicas": sum(count > 0 for count in gave.values())}


def simulate_real(load: RealLoad, rule: Rule, adapters: Mapping[str, str]) -> dict[str, Any]:
    """The same as ``run_real`` in simulated time, at a rate that keeps about as many requests under way."""
    model = ModelConfig.from_folder(demo_model_path())
    layout = PoolLayout.for_model(model)
    pages_of = [read_header(Path(folder), model, layout).num_pages for folder in adapters.values()]
    hardware = Hardware(
        StepTime(H200.slower(_REAL_SLOWER), model), REAL_POOL_PAGES, 10**6, 0.0,
        SchedulerConfig(max_batch_tokens=512, max_sequences=256),
    )  # fmt: skip
    draws, arrival, trace = random.Random(load.seed), 0.0, []
    for number in load.drawn():
        arrival += draws.expovariate(_REAL_RATE)
        trace.append(Asked(arrival, number, *_REAL_LENGTHS))
    routing = create_routing(rule, REAL_SPILL_AT, seed=0)
    return summary(simulate_fleet(trace, load.replicas, routing, hardware, pages_of))


def check_real(replicas: int, requests: int, seed: int, said: Callable[[str], None]) -> dict[str, Any]:
    """Asks a fleet of the embedded model on this machine, and simulates the same.

    Args:
      said: is told how far it is.

    Returns:
      ``real``: figures by rule; ``hot``: those of one adapter that many ask for; ``holds``: whether the shares of
      resident adapters are those that were simulated, within ``MOST_DIFFERENCE``, and affinity's is the larger.
    """
    from slora_jax.bench.ray_fleet import ray_fleet

    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder))
        load = RealLoad(requests, replicas, adapters, seed)
        real: dict[Rule, dict[str, Any]] = {}
        hot: dict[Rule, dict[str, Any]] = {}
        order: tuple[Rule, ...] = ("affinity_with_spill", "affinity", "random")
        said(f"starting {replicas} replicas ...")
        with ray_fleet(**load.fields(order[0])) as fleet:
            for rule in order:
                fleet.serve(**load.fields(rule))
                if rule != "affinity":
                    real[rule] = run_real(fleet, load) | {"simulated": simulate_real(load, rule, adapters)}
                    said(f"{rule}: {real[rule]}")
                if rule != "random":
                    hot[rule] = hot_latency(fleet, load)
                    said(f"one adapter that many ask for, {rule}: {hot[rule]}")
    differences = [abs(one["resident_share"] - one["simulated"]["resident_share"]) for one in real.values()]
    better = real["affinity_with_spill"]["resident_share"] > real["random"]["resident_share"]
    return {
        "real": {
            "replicas": replicas,
            "adapters": len(adapters),
            "pool_pages": REAL_POOL_PAGES,
            **cpu(),
            "rules": real,
        },
        "hot": hot,
        "holds": better and max(differences) <= MOST_DIFFERENCE,
    }


def pool_loads(fleet: Any) -> Counter[str]:
    """Adapters that each replica copied to its pool since its start."""
    return _counted(fleet, "slora:adapter_loads_total", to="pool")


def requests_of(fleet: Any, adapter: str) -> Counter[str]:
    """Requests of an adapter that each replica has answered."""
    return _counted(fleet, "slora:adapter_requests_total", adapter=adapter)


def _counted(fleet: Any, name: str, **labels: str) -> Counter[str]:
    request = urllib.request.Request(f"{fleet.url}/metrics", headers={"Authorization": f"Bearer {fleet.admin_key}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                counts[sample.labels["replica"]] += sample.value
    return counts


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of ``compare_rules`` as Markdown."""
    lines = [
        "| rule | adapter in the pool | first token p50, p99, s | answer p50, p99, s | busiest ÷ mean | from disk |",
        "|---|---|---|---|---|---|",
    ]
    for rule, figures in results.items():
        first, whole = figures["first_token_s"], figures["answer_s"]
        lines.append(
            f"| {rule} | {100 * figures['resident_share']:.1f} % | {first['p50']:.2f}, {first['p99']:.2f} | "
            f"{whole['p50']:.2f}, {whole['p99']:.2f} | {figures['busiest_over_mean']:.2f} | {figures['host_loads']:,} |"
        )
    return "\n".join(lines)
