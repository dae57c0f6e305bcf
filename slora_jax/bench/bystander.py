"""How long a small request takes beside each kind of hostile client.

Nothing that a client sends may keep the others waiting: beside each kind, the 99th percentile of a small completion
must stay below twice that of the same completion alone, and 50 ms.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from slora_jax.api.bounds import useful_body_bytes
from slora_jax.bench.demo import cpu
from slora_jax.bench.demo_server import TIMEOUT_SECONDS, connect
from slora_jax.bench.hostile import KINDS

EXTRA_SECONDS = 0.050
"""What a hostile client may add to twice the time alone."""

_WARM_UP_REQUESTS = 10


class Latencies(NamedTuple):
    """Seconds of requests sent one after the other; ``failed`` had another status than 200."""

    seconds: list[float]
    failed: int

    def summary(self) -> dict[str, float | int]:
        return {
            "requests": len(self.seconds),
            "failed": self.failed,
            "p50_ms": _milliseconds(statistics.median(self.seconds)),
            "p99_ms": _milliseconds(percentile(self.seconds, 99)),
            "most_ms": _milliseconds(max(self.seconds)),
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least so many percent are not above."""
    ranked = sorted(values)
    return ranked[-(-len(ranked) * percent // 100) - 1]


def run_bystander(url: str, seconds: float, kinds: Sequence[str], body_bytes: int | None) -> Iterator[dict]:
    """Yields a row for each kind: first ``alone``, then each hostile one, and ``alone`` again.

    Args:
      seconds: how long each is measured.
      kinds: names of ``hostile.KINDS``.
      body_bytes: the server's largest request body; what its context has use for if None.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=TIMEOUT_SECONDS) as response:
        card = json.load(response)["data"][0]
    body_bytes = body_bytes or useful_body_bytes(card["max_model_len"])
    probe = json.dumps({"model": card["id"], "prompt": "The moon is", "max_tokens": 4, "temperature": 0}).encode()
    for _ in range(_WARM_UP_REQUESTS):
        _ask(url, probe)
    alone = _measure(url, probe, seconds)
    yield {"kind": "alone", "what": "alone", **alone.summary()}
    bound = 2 * percentile(alone.seconds, 99) + EXTRA_SECONDS
    for name in kinds:
        with _hostile(name, url, card["id"], body_bytes) as answers:
            beside = _measure(url, probe, seconds)
            health = _health_seconds(url)
        row = {"kind": name, "what": KINDS[name].what, **beside.summary(), "health_ms": _milliseconds(health)}
        holds = not beside.failed and percentile(beside.seconds, 99) <= bound
        yield row | {"answers": answers, "bound_ms": _milliseconds(bound), "holds": holds}
    yield {"kind": "alone again", "what": "alone, at the end", **_measure(url, probe, seconds).summary()}


def bystander_report(rows: list[dict], command: str) -> dict:
    """All rows with where they were measured and whether every one holds."""
    return {
        "command": command,
        "machine": cpu(),
        "bound": "p99 beside <= 2 x p99 alone + 50 ms",
        "holds": all(row.get("holds", True) for row in rows),
        "rows": rows,
    }


def _measure(url: str, body: bytes, seconds: float) -> Latencies:
    """Small requests one after the other, each on a connection of its own."""
    latencies, failed = [], 0
    end = time.perf_counter() + seconds
    while not latencies or time.perf_counter() < end:
        start = time.perf_counter()
        failed += _ask(url, body) != 200
        latencies.append(time.perf_counter() - start)
    return Latencies(latencies, failed)


def _ask(url: str, body: bytes) -> int:
    with contextlib.closing(connect(url)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status


def _health_seconds(url: str) -> float:
    start = time.perf_counter()
    with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_SECONDS) as response:
        response.read()
    return time.perf_counter() - start


@contextlib.contextmanager
def _hostile(name: str, url: str, model: str, body_bytes: int) -> Iterator[dict[str, int]]:
    """Runs hostile clients of one kind; what they were answered is filled in at the end."""
    answers: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hostile.py"), name, url, model, str(body_bytes), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n", f"the hostile client {name!r} did not start"
        try:
            yield answers
        finally:
            out, _ = process.communicate("")
            answers.update(json.loads(out))


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 1)
