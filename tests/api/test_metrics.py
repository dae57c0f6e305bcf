"""/metrics of real engines: its sums hold while requests come and go, and a gateway finds what it looks for."""

import itertools
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.api.app import create_app
from slora_jax.api.metrics import FRESH_SECONDS
from slora_jax.api.traffic import MAX_NAMED, OTHERS, Traffic
from slora_jax.histogram import Histogram
from slora_jax.request import Request
from tests.helpers.engine_cases import FIXTURES, Case, running
from tests.helpers.fake_engine import FakeGeneration

CASE = Case(FIXTURES / "llama3_gqa")
ADAPTERS = sorted(path.name for path in CASE.adapters.iterdir())
GROWING = ("_total", "_bucket", "_count", "_sum")


@pytest.fixture
def engine():
    with running(CASE, pages=60) as engine:
        yield engine


@pytest.fixture
def app(engine):
    return create_app(engine)


class Scraped:
    """What one request for /metrics gave: values by sample, and text labels."""

    def __init__(self, app):
        response = app.test_client().get("/metrics")
        assert response.status_code == 200 and response.content_type.startswith("text/plain; version=")
        self.samples = [s for family in text_string_to_metric_families(response.text) for s in family.samples]
        keys = [(s.name, tuple(sorted(s.labels.items()))) for s in self.samples]
        assert len(keys) == len(set(keys)), "a sample is there twice"
        self.values = dict(zip(keys, (s.value for s in self.samples), strict=True))

    def all(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"there is no {name} {labels}"
        return sum(found)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [s.labels for s in self.samples if s.name == name]

    def names_in(self, name: str, label: str) -> set[str]:
        (labels,) = self.labels(name)
        return set(labels[label].split(",")) - {""}


def settled(app) -> Scraped:
    """What is to be seen when nothing goes on any more."""
    time.sleep(FRESH_SECONDS)
    return Scraped(app)


def ask(app, model: str, number: int, **fields) -> dict:
    prompt = [5 + number % 90, *range(3, 20)]
    body = {"model": model, "prompt": prompt, "max_tokens": 4 + number % 9, "ignore_eos": True} | fields
    response = app.test_client().post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.get_json()


def test_sums_hold_under_load(engine, app):
    stop = threading.Event()
    scrapes = []

    def scrape():
        while not stop.wait(0.05):
            scrapes.append(Scraped(app))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    models = [engine.model_name, *ADAPTERS]
    try:
        with ThreadPoolExecutor(8) as clients:
            asked = [models[i % len(models)] for i in range(40)]
            answers = list(clients.map(lambda i: ask(app, asked[i], i), range(40)))
    finally:
        stop.set()
        scraper.join()
    last = settled(app)
    scrapes.append(last)

    total = engine.stats()["pages_total"]
    for scraped in scrapes:
        assert scraped.all("slora:pages") == total
        assert scraped.all("slora:adapters") == len(ADAPTERS)
        assert 0 <= scraped.all("vllm:kv_cache_usage_perc") <= 1
        assert scraped.all("slora:inter_token_seconds_count") <= scraped.all("slora:generated_tokens_total")
    for before, after in itertools.pairwise(scrapes):
        shrunk = [k for k, v in before.values.items() if k[0].endswith(GROWING) and after.values.get(k, -1) < v]
        assert not shrunk
    assert max(scraped.all("vllm:num_requests_running") for scraped in scrapes) > 1
    assert max(scraped.all("slora:pages", owner="kv") for scraped in scrapes) > 1
    assert max(scraped.all("slora:pages", owner="adapters") for scraped in scrapes) > 1

    # At the end the counters are what the clients saw, each and in all.
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert last.all("slora:generated_tokens_total") == generated
    assert last.all("slora:prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert last.all("slora:finished_total", reason="length") == last.all("slora:finished_total") == 40
    for name in ("request", "first_token", "queue"):
        assert last.all(f"slora:{name}_seconds_count") == last.all(f"slora:{name}_seconds_bucket", le="+Inf") == 40
    assert last.all("slora:inter_token_seconds_count") == generated - 40
    assert 0 < last.all("slora:queue_seconds_sum") <= last.all("slora:first_token_seconds_sum")
    assert last.all("slora:first_token_seconds_sum") <= last.all("slora:request_seconds_sum")
    tokens = defaultdict(int)
    for model, answer in zip(asked, answers, strict=True):
        tokens[model] += answer["usage"]["completion_tokens"]
    for model in models:
        assert last.all("slora:adapter_requests_total", adapter=model) == asked.count(model)
        assert last.all("slora:adapter_generated_tokens_total", adapter=model) == tokens[model]
    for place in ("host", "pool"):
        loads = last.all("slora:adapter_loads_total", to=place)
        assert loads >= len(ADAPTERS) and last.all("slora:adapter_load_seconds_count", to=place) == loads
    assert last.all("vllm:num_requests_running") == last.all("vllm:num_requests_waiting") == 0
    assert last.all("slora:pages", owner="kv") == 0
    assert last.all("slora:compilations_total") > 0


def test_streams_and_clients_that_leave_are_counted(engine, app):
    client = app.test_client()
    body = {"model": ADAPTERS[0], "prompt": [5, 6, 7], "max_tokens": 5, "stream": True, "ignore_eos": True, "n": 2}
    with client.post("/v1/completions", json=body) as response:
        assert response.text.endswith("data: [DONE]\n\n")
    after = Scraped(app)
    assert after.all("slora:adapter_generated_tokens_total", adapter=ADAPTERS[0]) == 10
    assert after.all("slora:inter_token_seconds_count") == 8
    left = client.post("/v1/completions", json=body | {"max_tokens": 200}, buffered=False)
    next(iter(left.response))
    left.close()
    ended = {}
    for _ in range(200):
        ended = Scraped(app)
        if ended.all("slora:finished_total", reason="abort") == 2:
            break
        threading.Event().wait(0.05)
    assert ended.all("slora:finished_total", reason="abort") == 2
    assert ended.all("slora:adapter_requests_total", adapter=ADAPTERS[0]) == 2


def test_the_pool_is_as_the_engine_says(engine, app):
    ask(app, ADAPTERS[0], 0)
    scraped, stats = settled(app), engine.stats()
    assert scraped.all("slora:pages", owner="free") == stats["pages_free"]
    assert scraped.all("slora:pages", owner="adapters") == engine.adapter(ADAPTERS[0]).num_pages
    assert (
        scraped.all("slora:pages", owner="prefix") + scraped.all("slora:pages", owner="adapters")
        == (stats["pages_cached"])
    )
    (labels,) = scraped.labels("vllm:cache_config_info")
    assert labels == {"block_size": "16", "cache_dtype": "auto", "num_gpu_blocks": str(stats["pages_total"])}
    rank = str(engine.adapter(ADAPTERS[0]).rank)
    assert scraped.labels("vllm:lora_adapter_loaded") == [
        {"adapter_name": ADAPTERS[0], "level": "gpu", "pinned": "false", "rank": rank}
    ]
    for level, to in (("gpu", "pool"), ("cpu", "host")):
        for part in ("count", "sum"):
            taken = scraped.all(f"vllm:lora_adapter_load_seconds_{part}", level=level)
            assert taken == scraped.all(f"slora:adapter_load_seconds_{part}", to=to) > 0


def test_adapters_in_host_memory_are_on_the_cpu(engine, app):
    engine.parts.store.get(ADAPTERS[1]).wait(20)
    (labels,) = settled(app).labels("vllm:lora_adapter_loaded")
    assert (labels["adapter_name"], labels["level"]) == (ADAPTERS[1], "cpu")
    assert settled(app).names_in("vllm:lora_requests_info", "running_lora_adapters") == set()


def test_a_gateway_sends_requests_where_their_adapter_is(engine, app):
    """Two servers; the endpoint picker prefers the one whose newest ``lora_requests_info`` has the adapter."""
    with running(CASE, pages=60) as other:
        servers = {"one": app, "two": create_app(other)}
        ask(servers["one"], ADAPTERS[0], 1)
        ask(servers["two"], ADAPTERS[1], 1)

        def pick(adapter: str) -> str:
            seen = {name: settled(server) for name, server in servers.items()}
            has = [
                n for n, s in seen.items() if adapter in s.names_in("vllm:lora_requests_info", "running_lora_adapters")
            ]
            room = [
                n
                for n, s in seen.items()
                if len(s.names_in("vllm:lora_requests_info", "running_lora_adapters"))
                < int(s.labels("vllm:lora_requests_info")[0]["max_lora"])
            ]
            queue = {n: s.all("vllm:num_requests_waiting") + s.all("vllm:kv_cache_usage_perc") for n, s in seen.items()}
            return min(has or room, key=queue.__getitem__)

        assert pick(ADAPTERS[0]) == "one"
        assert pick(ADAPTERS[1]) == "two"
        where = pick(ADAPTERS[2])
        ask(servers[where], ADAPTERS[2], 2)
        assert pick(ADAPTERS[2]) == where


def test_many_adapters_have_few_labels(engine):
    traffic = Traffic("base")
    for i in range(MAX_NAMED + 30):
        generation = FakeGeneration(Request((1, 2, 3), f"adapter-{i}"), [], "")
        traffic.follow(generation, "id").end()
    served = traffic.by_adapter()
    assert len(served) == MAX_NAMED + 1 and served[OTHERS].requests == 30
    assert sum(one.prompt_tokens for one in served.values()) == 3 * (MAX_NAMED + 30)


def test_a_histogram_counts_every_value_once():
    values = np.random.default_rng(0).exponential(0.3, 5000).tolist()
    histogram = Histogram((0.1, 0.5, 2.0))
    for i in range(0, len(values), 7):
        histogram.add(values[i : i + 7])
    counted = histogram.read()
    assert counted.total == pytest.approx(sum(values))
    assert list(counted.buckets) == [(b, sum(v <= b for v in values)) for b in (0.1, 0.5, 2.0, float("inf"))]
