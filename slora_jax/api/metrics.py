"""``/metrics``: what the server counts, in Prometheus' text form.

Names that begin with ``vllm:`` are those that gateways for language models read by default, so that they need no
configuration; the others are this server's own. Everything is read at the time of the request from counters that exist
anyway, so a server that nobody scrapes does nothing for it.
"""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import flask
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from slora_jax.api.traffic import Traffic

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine
    from slora_jax.engine.observation import AdapterSeen, Observation
    from slora_jax.histogram import Counted

FRESH_SECONDS = 0.5
"""However many look on, the engine is looked at no more often."""

MAX_LISTED = 300
"""Adapters that are listed one by one: of those in the pool, pinned ones first, and then those in host memory."""

_LEVELS = {"pool": "gpu", "host": "cpu"}
"""Gateways' names for where an adapter is, or was brought to."""

_COUNTERS = {
    "steps": "Steps that the device was given.",
    "cached_tokens": "Tokens of prompts that were found in the prefix cache.",
    "prompt_tokens": "Tokens of prompts that got a first token, cached ones included.",
    "generated_tokens": "Tokens given to requests.",
    "evictions": "Adapters and pages of kept prompts that lost their pages.",
    "preemptions": "Sequences that lost their pages, and were computed again later.",
    "recoveries": "Times that the engine failed and started anew.",
    "compilations": "Programs compiled, rather than found on disk.",
}


class Onlooker:
    """Looks at an engine for all who want to see it: at most every ``FRESH_SECONDS``, one of them at a time."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._lock = threading.Lock()
        self._seen: Observation | None = None
        self._until = 0.0

    def look(self) -> "Observation":
        """What the engine looks like, or looked like just now."""
        with self._lock:
            if self._seen is None or time.monotonic() >= self._until:
                self._seen = self._engine.observe()
                self._until = time.monotonic() + FRESH_SECONDS
            return self._seen


class _EngineCollector(Collector):
    def __init__(self, engine: "Engine", traffic: Traffic, onlooker: Onlooker):
        self._engine = engine
        self._traffic = traffic
        self._onlooker = onlooker

    def describe(self) -> Iterable[Metric]:
        """None beforehand: the engine is not looked at for it."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats, seen = self._engine.stats(), self._onlooker.look()
        yield from self._for_gateways(stats, seen)
        yield from self._pool(stats, seen)
        yield from self._adapters(stats, seen)
        for name, help in _COUNTERS.items():
            yield _counter(f"slora:{name}", help, stats[name])
        finished = CounterMetricFamily(
            "slora:finished", "Completions that ended, by reason; a request has n for each prompt.", labels=["reason"]
        )
        for reason in ("stop", "length", "abort", "error", "late"):
            finished.add_metric([reason], self._engine.finished().get(reason, 0))
        yield finished
        traffic = self._traffic
        for name, help, histogram in (
            ("queue_seconds", "From a request's arrival until it started.", traffic.queue),
            ("first_token_seconds", "From a request's arrival until its first token.", traffic.first_token),
            ("inter_token_seconds", "From one token of a completion to the next.", traffic.between_tokens),
            ("request_seconds", "From a request's arrival until its answer was complete.", traffic.whole),
        ):
            family = HistogramMetricFamily(f"slora:{name}", help)
            _add(family, [], histogram.read())
            yield family

    def _for_gateways(self, stats, seen: "Observation") -> Iterator[Metric]:
        model = self._engine.model_name
        yield _gauge("vllm:num_requests_waiting", "Sequences that wait.", stats["waiting"], model_name=model)
        yield _gauge("vllm:num_requests_running", "Sequences that run.", stats["running"], model_name=model)
        yield _gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the pool's pages that are in use, by KV cache and adapters; 1 is all.",
            stats["pages_used"] / stats["pages_total"],
            model_name=model,
        )
        yield _gauge(
            "vllm:cache_config_info",
            "How the pool is divided: tokens in a page, what their KV is kept as, and pages.",
            1,
            block_size=str(self._engine.pool_layout.page_tokens),
            cache_dtype=self._engine.config.kv_cache_dtype,
            num_gpu_blocks=str(stats["pages_total"]),
        )
        counts = seen.pool.count()
        listed = _resident(seen)
        loaded = sum(adapter.tier == "pool" for adapter in seen.adapters)
        largest = max((adapter.info.num_pages for adapter in seen.adapters), default=1)
        max_lora = loaded + (counts["free"] + counts["prefix"]) // largest
        yield _gauge(
            "vllm:lora_requests_info",
            "Adapters in the pool, and those that waiting requests need; the value is the time.",
            time.time(),
            max_lora=str(max_lora),
            running_lora_adapters=",".join(adapter.info.name for adapter in listed),
            waiting_lora_adapters=",".join(seen.waiting[:MAX_LISTED]),
        )
        yield _gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters in the pool.", loaded)
        yield _gauge("vllm:max_gpu_lora_adapters", "Adapters that the pool could hold beside what runs.", max_lora)
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            f"1 for each adapter in the pool or in host memory; of more than {MAX_LISTED}, for so many.",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        in_host_memory = (adapter for adapter in seen.adapters if adapter.tier == "host")
        for adapter in itertools.islice(itertools.chain(listed, in_host_memory), MAX_LISTED):
            info, level = adapter.info, _LEVELS[adapter.tier]
            family.add_metric([info.name, level, str(info.pinned).lower(), str(info.rank)], 1)
        yield family
        took = HistogramMetricFamily(
            "vllm:lora_adapter_load_seconds", "How long adapters took to the pool and to host memory.", labels=["level"]
        )
        for tier, counted in self._engine.load_seconds().items():
            _add(took, [_LEVELS[tier]], counted)
        yield took

    def _pool(self, stats, seen: "Observation") -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "slora:pages",
            "Pages of the pool by what they hold: KV of running sequences, prompts kept, adapters, nothing.",
            labels=["owner"],
        )
        for kind, number in seen.pool.count().items():
            family.add_metric([kind], number)
        yield family
        yield _gauge("slora:host_adapter_bytes", "Host memory that adapters take.", stats["host_adapter_bytes"])

    def _adapters(self, stats, seen: "Observation") -> Iterator[Metric]:
        family = GaugeMetricFamily("slora:adapters", "Adapters by the fastest memory that holds them.", labels=["tier"])
        tiers = dict.fromkeys(("pool", "host", "disk"), 0)
        for adapter in seen.adapters:
            tiers[adapter.tier] += 1
        for tier, number in tiers.items():
            family.add_metric([tier], number)
        yield family
        loads = CounterMetricFamily("slora:adapter_loads", "Times an adapter was brought there.", labels=["to"])
        loads.add_metric(["host"], stats["host_adapter_loads"])
        loads.add_metric(["pool"], stats["adapter_loads"])
        yield loads
        took = HistogramMetricFamily("slora:adapter_load_seconds", "How long that took each time.", labels=["to"])
        for place, counted in self._engine.load_seconds().items():
            _add(took, [place], counted)
        yield took
        requests = CounterMetricFamily("slora:adapter_requests", "Requests that ended, by adapter.", labels=["adapter"])
        prompts = CounterMetricFamily("slora:adapter_prompt_tokens", "Prompts' tokens, by adapter.", labels=["adapter"])
        generated = CounterMetricFamily(
            "slora:adapter_generated_tokens", "Tokens given, by adapter.", labels=["adapter"]
        )
        for name, served in self._traffic.by_adapter().items():
            requests.add_metric([name], served.requests)
            prompts.add_metric([name], served.prompt_tokens)
            generated.add_metric([name], served.generated_tokens)
        yield from (requests, prompts, generated)


def add_metrics(app: flask.Flask, engine: "Engine", traffic: Traffic, onlooker: Onlooker) -> None:
    """Adds the route to an application; with a registry of its own, so that several may live in one process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(engine, traffic, onlooker))

    @app.get("/metrics")
    def metrics():
        return flask.Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _resident(seen: "Observation") -> "list[AdapterSeen]":
    resident = [adapter for adapter in seen.adapters if adapter.tier == "pool"]
    return sorted(resident, key=lambda adapter: not adapter.info.pinned)[:MAX_LISTED]


def _gauge(name: str, help: str, value: float, **labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[])
    family.add_metric([], value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], counted: "Counted") -> None:
    buckets = [("+Inf" if bound == float("inf") else repr(bound), number) for bound, number in counted.buckets]
    family.add_metric(labels, buckets, counted.total)
