"""Two servers behind a gateway: the test plays the endpoint picker of the Gateway API's inference extension.

Its rules, as public texts have them. A picker scrapes each server's /metrics under vLLM's names. It scores a server by
the adapters that ``vllm:lora_requests_info`` lists: 1 if the request's is among those loaded, else 0.8 if there is room
for one more, else 0.6 if it is among those waited for, else 0. To that it adds how short the server's queue is beside
the others' (1 for the shortest, 0 for the longest), and the share of its KV cache that is free. Of several series the
one with the newest value counts. Servers whose readiness probe fails are left out.
"""

import contextlib
import json
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.api.app import create_app
from slora_jax.api.drain import Drain
from slora_jax.api.metrics import FRESH_SECONDS
from slora_jax.api.server import Server, listen
from slora_jax.bench.demo_server import ask, post, write_variant
from tests.helpers.engine_cases import FIXTURES, Case, running

CASE = Case(FIXTURES / "llama3_gqa")
COPIES = 4


class Picker:
    """Picks a server for each request, by what the servers said last."""

    def __init__(self, urls: list[str]):
        self._urls = urls
        self.scrape()

    def scrape(self) -> None:
        time.sleep(FRESH_SECONDS)
        self._seen = {url: Scraped(url) for url in self._urls if is_ready(url)}

    def pick(self, model: str) -> str:
        queues = {url: seen.value("vllm:num_requests_waiting") for url, seen in self._seen.items()}
        longest, shortest = max(queues.values()), min(queues.values())

        def score(url: str) -> float:
            seen = self._seen[url]
            queue = (longest - queues[url]) / (longest - shortest) if longest > shortest else 1.0
            return seen.affinity(model) + queue + 1 - seen.value("vllm:kv_cache_usage_perc")

        return max(self._seen, key=score)


class Scraped:
    """What one server said of itself."""

    def __init__(self, url: str):
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
            text = response.read().decode()
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str) -> float:
        (value,) = (sample.value for sample in self._samples if sample.name == name)
        return value

    def affinity(self, model: str) -> float:
        info = max((s for s in self._samples if s.name == "vllm:lora_requests_info"), key=lambda s: s.value).labels
        active = set(filter(None, info["running_lora_adapters"].split(",")))
        waiting = set(filter(None, info["waiting_lora_adapters"].split(",")))
        if model in active:
            return 1.0
        if len(active) + len(waiting) < int(info["max_lora"]):
            return 0.8
        return 0.6 if model in waiting else 0.0


def is_ready(url: str) -> bool:
    try:
        return ask(url, "/ready")[0] == 200
    except ConnectionRefusedError:
        return False


class Behind:
    """One server and its engine."""

    def __init__(self, engine):
        self._drain = Drain()
        self.server = Server(
            create_app(engine, drain=self._drain), listen("127.0.0.1", 0), on_stop=engine.close, drain=self._drain
        )
        self.engine = engine
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    @property
    def url(self) -> str:
        return self.server.url

    def close(self) -> None:
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def servers(tmp_path):
    """Two, each of which has registered the same 12 adapters and has room for some of them."""
    with contextlib.ExitStack() as stack:
        both = []
        for _ in range(2):
            engine = stack.enter_context(running(CASE, pages=60))
            both.append(stack.enter_context(contextlib.closing(Behind(engine))))
        for source in sorted(CASE.adapters.iterdir()):
            for copy in range(COPIES):
                name = f"{source.name}-{copy}"
                folder = write_variant(source, tmp_path / name, 1 + copy / 10)
                for behind in both:
                    behind.engine.register_adapter(name, str(folder))
        yield both


def send(url: str, model: str, max_tokens: int = 2) -> None:
    post(url, "/v1/completions", model=model, prompt=list(range(3, 12)), max_tokens=max_tokens, ignore_eos=True)


def test_requests_find_their_adapters_resident(servers):
    picker = Picker([behind.url for behind in servers])
    names = sorted(name for name in servers[0].engine.adapters() if name[-2] == "-")[:8]
    # Each adapter is brought to one server, in turn.
    home = {name: servers[i % 2].url for i, name in enumerate(names)}
    for name, url in home.items():
        send(url, name)
    picker.scrape()
    loads = [behind.engine.stats()["adapter_loads"] for behind in servers]
    for name in names * 3:
        assert picker.pick(name) == home[name]
        send(picker.pick(name), name)
    assert [behind.engine.stats()["adapter_loads"] for behind in servers] == loads, "an adapter was loaded twice"


def stream(url: str, model: str, *prompt: int):
    """An answer of 60 tokens that is not read yet."""
    fields = {"model": model, "prompt": prompt, "max_tokens": 60, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(fields).encode(), headers)
    return urllib.request.urlopen(request, timeout=20)


def test_a_draining_server_is_left_out_and_nothing_fails(servers):
    leaving, staying = servers
    picker = Picker([leaving.url, staying.url])
    send(leaving.url, "regex-r3-0")
    picker.scrape()
    assert picker.pick("regex-r3-0") == leaving.url
    with stream(leaving.url, "regex-r3-0", 5, 6) as running_on:
        leaving.server.drain(60)
        picker.scrape()
        assert picker.pick("regex-r3-0") == staying.url
        send(staying.url, "regex-r3-0")
        assert running_on.read().endswith(b"data: [DONE]\n\n"), "what ran when it began to drain runs to its end"
    leaving.thread.join(20)
    assert not leaving.thread.is_alive()
