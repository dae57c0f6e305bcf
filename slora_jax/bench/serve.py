"""Load on any OpenAI-compatible server: the engine's own workload, sent as streams over HTTP.

Requests are those of ``throughput`` (``draw_workload``), token for token: the same work can be timed with HTTP and
without. The clients run in processes of their own, and the report says how much of a core they took. A generator that
is busy all the time measures itself.
"""

import asyncio
import collections
import contextlib
import datetime
import itertools
import json
import multiprocessing
import platform
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import click
import numpy as np

from slora_jax.bench.demo import cpu
from slora_jax.bench.demo_server import Failed
from slora_jax.bench.sse import Ask, Heard, Run, run_clients
from slora_jax.bench.workload import WARM_UP_REQUESTS, Lengths, OpenTrace, WorkItem, draw_workload

type Route = Literal["completions", "chat"]
type Choice = Literal["uniform", "power", "turn"]

BUSY_SHARE = 0.8
"""Of a core, that a client process may take before it is said to be near its own limit."""

_START_SECONDS = 1.0
_CALIBRATION_TOKENS = 200
_PROBE_SECONDS = 120
_OPTIONAL = ("ignore_eos", "stream_options")
"""Fields that a server may refuse; then they are left out, the last ones too."""
_WORDS = ("sea", "moon", "river", "stone", "spring", "sky", "bread", "the", "a", "of", "in", "why", "is", "what", "who")


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
      requests: how many.
      clients: so many at a time, each sending its next request when it has its answer; None for ``rate``.
      rate: requests a second that come whatever runs, with Gamma intervals of coefficient of variation ``cv``.
      choice: of a model among several: "uniform" as the engine's saturated workload, "power" law with exponent
        ``alpha`` as its open one, or in "turn".
      lengths: of prompts and outputs.
      vocab_size: token ids of prompts are below; the model's own makes them the engine's workload.
      route: "completions" sends prompts as token ids; "chat" sends as many words.
      seed: of all draws.
    """

    requests: int
    clients: int | None
    rate: float
    cv: float
    choice: Choice
    alpha: float
    lengths: Lengths
    vocab_size: int
    route: Route
    seed: int


def draw(load: Load, num_models: int, requests: int, seed: int) -> list[WorkItem]:
    """The workload; each item's ``adapter`` is the number of its model, None if there is only one."""
    several = num_models if num_models > 1 else 0
    open_trace = OpenTrace(load.rate, load.cv, load.alpha)
    popular = load.choice == "power"
    is_open = load.clients is None
    items = draw_workload(
        requests, several, load.vocab_size, seed, load.lengths, open_trace if is_open or popular else None
    )
    if is_open and load.choice == "uniform":
        uniform = draw_workload(requests, several, load.vocab_size, seed, load.lengths)
        items = [replace(item, adapter=even.adapter) for item, even in zip(items, uniform, strict=True)]
    if several and load.choice == "turn":
        items = [replace(item, adapter=i % num_models) for i, item in enumerate(items)]
    return items


def body_of(item: WorkItem, load: Load, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON of one request; ``fields`` are those that not every server takes."""
    body = {"model": model, "max_tokens": item.num_output, "temperature": 0, "stream": True, **fields}
    if load.route == "completions":
        return {**body, "prompt": list(item.prompt)}
    words = " ".join(_WORDS[token % len(_WORDS)] for token in item.prompt)
    return {**body, "messages": [{"role": "user", "content": words}]}


def run_serve(
    url: str, load: Load, models: Sequence[str], prefix: str | None, processes: int, warm_up: int, calibrate: bool,
    api_key: str | None, command: str,
) -> dict[str, Any]:  # fmt: skip
    """Asks a server, and reports.

    Args:
      url: of the server, with or without ``/v1``.
      models: names to ask for; none for those of ``prefix``.
      prefix: of names in the server's list of models; None for the first one of the list.
      processes: that clients are shared among.
      warm_up: requests sent ahead, which are not counted.
      calibrate: measure first what the clients themselves can take.

    Raises:
      click.ClickException: the server does not answer, has no such model, or refuses a request like these.
    """
    url = url.rstrip("/").removesuffix("/v1")
    names = list(models) or _models(url, prefix, api_key)
    fields, refused = _fields(url, load, names[0], api_key)
    path = "/v1/chat/completions" if load.route == "chat" else "/v1/completions"

    def asks(items: Sequence[WorkItem], start: float) -> list[Ask]:
        at = (lambda item: start + item.arrival) if load.clients is None else (lambda item: None)
        bodies = (json.dumps(body_of(item, load, names[item.adapter or 0], fields)).encode() for item in items)
        return [Ask(path, body, at(item)) for item, body in zip(items, bodies, strict=True)]

    with _processes(processes) as pools:
        limits = _calibrated(pools, load.clients or WARM_UP_REQUESTS) if calibrate else None
        if warm_up:
            early = replace(load, clients=min(load.clients or warm_up, warm_up))
            _ask_all(pools, url, asks(draw(early, len(names), warm_up, load.seed + 1000), 0.0), early.clients, api_key)
        start = time.monotonic() + _START_SECONDS
        items = draw(load, len(names), load.requests, load.seed)
        runs = _ask_all(pools, url, asks(items, start), load.clients, api_key, start)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "url_host": urllib.parse.urlsplit(url).hostname,
        "models": len(names),
        "load": asdict(load),
        "left_out": refused,
        **summary([one for run in runs for one in run.heard], start, "ignore_eos" in fields, _asked(items, runs)),
        "generator": _generator(runs, start) | {"calibration": limits, **cpu(), "python": platform.python_version()},
    }


def summary(heard: Sequence[Heard], start: float, is_full: bool, asked: Sequence[int]) -> dict[str, Any]:
    """The figures of one run.

    Args:
      heard: of all requests.
      start: of the run.
      is_full: whether every answer must have as many tokens as were asked for.
      asked: how many that were, for each of ``heard``.
    """
    errors = collections.Counter(one.error for one in heard if one.error is not None)
    good = [one for one in heard if one.error is None]
    short = [one for one, tokens in zip(heard, asked, strict=True) if one.error is None and one.tokens != tokens]
    if is_full and short:
        errors["an answer has not as many tokens as were asked for"] = len(short)
    if not good:
        return {"answered": 0, "errors": dict(errors)}
    seconds = max(one.end for one in good) - start
    gaps = np.concatenate([np.diff(one.events) for one in good] or [np.zeros(0)]) * 1e3
    tokens = sum(one.tokens for one in good)
    told = [one.prompt_tokens for one in good if one.prompt_tokens is not None]
    spoken = [one for one in good if one.events]
    in_ms = _percentiles(gaps)
    return {
        "answered": len(good),
        "errors": dict(errors),
        "wall_seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": tokens / seconds,
        "output_tokens": tokens,
        "prompt_tokens": sum(told) if told else None,
        "tokens_counted_by": "the server" if all(one.is_counted for one in good) else "events",
        "events": sum(len(one.events) for one in good),
        "tokens_per_event": tokens / max(1, sum(len(one.events) for one in good)),
        "first_token_seconds": _percentiles([one.events[0] - one.due for one in spoken]),
        "gap_milliseconds": in_ms,
        "gap_p99_over_median": in_ms["p99"] / in_ms["p50"] if in_ms and in_ms["p50"] else None,
        "token_milliseconds": _percentiles(
            [1e3 * (one.events[-1] - one.events[0]) / (one.tokens - 1) for one in spoken if one.tokens > 1]
        ),
        "latency_seconds": _percentiles([one.end - one.due for one in good]),
    }


def table(result: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{result['answered']} answered; errors: {result['errors'] or 'none'}"]
    if result["answered"]:
        lines += [
            f"{result['requests_per_second']:10.2f} requests a second",
            f"{result['output_tokens_per_second']:10.0f} tokens a second, {result['tokens_per_event']:.2f} an event",
        ]
        for name, what in (
            ("first_token_seconds", "first token, s"),
            ("gap_milliseconds", "gaps between events, ms"),
            ("token_milliseconds", "a token's time, ms"),
            ("latency_seconds", "whole answer, s"),
        ):
            if figures := result[name]:
                lines.append(f"{what:24} " + "  ".join(f"{key} {figure:9.3f}" for key, figure in figures.items()))
    generator = result["generator"]
    busiest = generator["busiest_share_of_a_core"]
    lines.append(
        f"the generator took {generator['cpu_seconds']:.1f} s of CPU, its busiest process {busiest:.0%} of a core"
    )
    if busiest > BUSY_SHARE:
        lines.append("WARNING: that is near what it can take; measure again with more --processes")
    if limits := generator["calibration"]:
        lines.append(f"against a server that does nothing it took {limits['events_per_second']:.0f} events a second")
    return "\n".join(lines)


def _percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)} | {
        "mean": float(np.mean(values)), "most": float(np.max(values)),
    }  # fmt: skip


# Processes of clients.


@contextlib.contextmanager
def _processes(count: int) -> Iterator[list[ProcessPoolExecutor]]:
    """So many processes, each of which does one thing at a time."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]


def _ask_all(
    pools: Sequence[ProcessPoolExecutor],
    url: str,
    asks: Sequence[Ask],
    clients: int | None,
    api_key: str | None,
    start: float = 0.0,
) -> list[Run]:
    """Deals requests and clients out among the processes in turn."""
    count = len(pools)
    shares = [None if clients is None else len(range(i, clients, count)) for i in range(count)]
    # A process without clients would never send its share.
    used = [i for i in range(count) if shares[i] != 0]
    futures = [
        pools[i].submit(run_clients, url, asks[place :: len(used)], shares[i], start, api_key)
        for place, i in enumerate(used)
    ]
    return [future.result() for future in futures]


def _asked(items: Sequence[WorkItem], runs: Sequence[Run]) -> list[int]:
    """Tokens asked for, in the order in which the runs have heard of them."""
    return [item.num_output for place in range(len(runs)) for item in items[place :: len(runs)]]


def _generator(runs: Sequence[Run], start: float) -> dict[str, Any]:
    heard = [one for run in runs for one in run.heard]
    seconds = max(one.end for one in heard) - start
    return {
        "processes": len(runs),
        "cpu_seconds": sum(run.cpu_seconds for run in runs),
        "busiest_share_of_a_core": max(run.cpu_seconds for run in runs) / seconds,
        "cpu_microseconds_per_event": 1e6
        * sum(run.cpu_seconds for run in runs)
        / max(1, sum(len(one.events) for one in heard)),
        "sent_late_milliseconds": _percentiles([1e3 * (one.sent - one.due) for one in heard]),
    }


# What the server takes.


def _get(url: str, api_key: str | None, body: dict[str, Any] | None = None) -> bytes:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise Failed(error.code, error.read()[:300].decode("utf-8", "replace")) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{url} does not answer ({error}); start the server, or name another") from None


def _models(url: str, prefix: str | None, api_key: str | None) -> list[str]:
    try:
        names = [card["id"] for card in json.loads(_get(f"{url}/v1/models", api_key))["data"]]
    except (Failed, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{url}/v1/models lists no models ({error}); name one with --model") from None
    chosen = names[:1] if prefix is None else [name for name in names if name.startswith(prefix)]
    if not chosen:
        raise click.ClickException(f"no model of {url} begins with {prefix!r}; it has {', '.join(names[:5])} ...")
    return chosen


def _fields(url: str, load: Load, model: str, api_key: str | None) -> tuple[dict[str, Any], list[str]]:
    """Of the fields that servers may refuse those that this one takes, and the names of the others."""
    fields = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    item = WorkItem((1,) * 8, 2, None)
    path = "/v1/chat/completions" if load.route == "chat" else "/v1/completions"
    for left_out in itertools.accumulate(((), *((name,) for name in _OPTIONAL))):
        taken = {name: value for name, value in fields.items() if name not in left_out}
        try:
            _get(url + path, api_key, body_of(item, load, model, taken))
            return taken, list(left_out)
        except Failed as failure:
            refusal = f"HTTP {failure}"
            if failure.status not in (400, 422):
                break
    raise click.ClickException(f"{url}{path} refuses a small request: {refusal}")


# What the generator itself can take.


def _calibrated(pools: Sequence[ProcessPoolExecutor], clients: int) -> dict[str, float]:
    """Asks a server that does nothing but send events, as fast as they are read."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_nothing, args=(theirs, clients), daemon=True)
    process.start()
    try:
        asks = [Ask("/", b"{}")] * clients
        runs = _ask_all(pools, f"http://127.0.0.1:{ours.recv()}", asks, clients, None)
    finally:
        process.terminate()
        process.join()
    heard = [one for run in runs for one in run.heard]
    events = sum(len(one.events) for one in heard)
    first, last = min(one.events[0] for one in heard), max(one.end for one in heard)
    return {
        "streams": clients,
        "events": events,
        # A slow machine may read all of it at once, but not in less than it works.
        "events_per_second": events / max(last - first, max(run.cpu_seconds for run in runs)),
        "events_per_cpu_second": events / sum(run.cpu_seconds for run in runs),
    }


def _serve_nothing(port: Any, clients: int) -> None:
    """Waits for so many requests, and then sends each an event in turn."""
    event = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "created": 1_700_000_000,
        "model": "nothing",
        "object": "text_completion",
        "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
        "usage": None,
    }

    def chunk(data: bytes) -> bytes:
        return f"{len(data):x}\r\n".encode() + data + b"\r\n"

    async def serve() -> None:
        here = asyncio.Semaphore(0)
        writers: list[asyncio.StreamWriter] = []

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"POST" in head
            writers.append(writer)
            here.release()

        server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        for _ in range(clients):
            await here.acquire()
        one = chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
        for writer in writers:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(_CALIBRATION_TOKENS):
            for writer in writers:
                writer.write(one)
            await asyncio.sleep(0)
        for writer in writers:
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            writer.close()
        await asyncio.sleep(60)

    asyncio.run(serve())
