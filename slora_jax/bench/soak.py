"""A server under load for minutes: hundreds of streams, clients that hang up or read slowly, adapters that come and go.

Afterwards nothing may be lost. Every greedy answer that was read to its end is what the same question got alone; all
pages of the pool are free or hold prompts for later; threads and descriptors are as many as before; memory is flat.
"""

import bisect
import collections
import contextlib
import http.client
import itertools
import json
import math
import random
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from slora_jax.bench.demo import cpu
from slora_jax.bench.demo_server import (
    Failed,
    Served,
    ask,
    connect,
    demo_server,
    load_adapter,
    post,
    send,
    write_variant,
)
from slora_jax.demo import demo_adapters

FLAGS = ("--max-model-len", "512", "--pool-pages", "700", "--host-adapter-memory", "0.03")
"""Of the server: a pool and a host memory too small for all that is asked for, so that both are fought over."""

MOST_GROWTH = 0.1
"""By what share of itself the server's memory at rest may grow after the warm-up."""

_CHAT = "/v1/chat/completions"
_SLOW_RECEIVE_BYTES = 4096
_SLOW_SECONDS_A_LINE = 0.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops the connection at once
_SECONDS_BETWEEN_CHANGES = (0.5, 4.0)
_SETTLE_SECONDS = 60
_WARM_UP_SHARE = 0.4
_TIMELINE_SECONDS = 10
_SHOWN = 5

_PROMPTS = (
    ("What is the capital of France?", 12),
    ("Why is the sky blue?", 16),
    ("How do I boil an egg?", 8),
    ("Name three animals that live in the sea.", 20),
    ("How many days are there in a week?", 5),
)
"""Each with the most tokens of its answers."""


class Answer(NamedTuple):
    """What was read of an answer to its end."""

    text: str
    finish_reason: str


class Reigns:
    """Which folder an adapter's name stood for, and when, as well as a client can know it. Thread-safe.

    A change happens at some moment between its call and the answer to it: meanwhile either version is right.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = [-math.inf]
        self._done = [-math.inf]
        self._folders: list[Path | None] = [None]

    @contextlib.contextmanager
    def change(self, folder: Path | None) -> Iterator[None]:
        """Surrounds the call that makes the name stand for ``folder``, or for nothing; undone if that raises."""
        with self._lock:
            self._begun.append(time.monotonic())
            self._done.append(math.inf)
            self._folders.append(folder)
        try:
            yield
        except BaseException:
            with self._lock:
                for column in (self._begun, self._done, self._folders):
                    column.pop()
            raise
        with self._lock:
            self._done[-1] = time.monotonic()

    def between(self, start: float, end: float) -> set[Path | None]:
        """What the name may have stood for from ``start`` to ``end``, by ``time.monotonic``."""
        with self._lock:
            first = max(0, bisect.bisect_left(self._done, start) - 1)
            return set(self._folders[first : bisect.bisect_right(self._begun, end)])


class _Clients:
    """All that ask the server at the same time, and what became of it."""

    def __init__(self, url: str, streams: int, solo: dict[tuple[Path | None, str], Answer], folders: Sequence[Path]):
        """
        Args:
          solo: by the folder (None for the base model) and the prompt, what is answered alone.
          folders: of adapters, two for each name that comes and goes.
        """
        self._url = url
        self._solo = solo
        self.base = ask(url, "/v1/models")[1]["data"][0]["id"]
        self._fixed: dict[str, Path | None] = {self.base: None, **demo_adapters()}
        self._changing = {f"changing-{i}": Reigns() for i in range(len(folders) // 2)}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.differing: list[dict[str, Any]] = []
        self.unexpected: list[str] = []
        changers = [(self._change, (name, *folders[2 * i : 2 * i + 2])) for i, name in enumerate(self._changing)]
        self._work = [*((self._stream, (i,)) for i in range(streams)), *changers]

    def run(self, seconds: float) -> None:
        """Has all of them ask for so long; returns when each has its last answer, and what they loaded is unloaded."""
        self._over.clear()
        threads = [threading.Thread(target=work, args=args, daemon=True) for work, args in self._work]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self._over.set()
        for thread in threads:
            thread.join()

    def _stream(self, number: int) -> None:
        """One request after the other; the first of three is hung up, whatever its kind."""
        draw = random.Random(number)
        for turn in itertools.count(number):
            if self._over.is_set():
                return
            name = draw.choice([*self._fixed, *self._changing])
            prompt, tokens = draw.choice(_PROMPTS)
            kind = draw.choice(["whole", "stream", "stream", "slow"])
            try:
                if turn % 3 == 0:
                    self._hang_up(question(name, prompt, tokens, kind), draw)
                    self._count("hung_up")
                else:
                    self._compare(name, prompt, kind, tokens)
            except Failed as failure:
                self._refused(name, failure)
            except (OSError, http.client.HTTPException) as failure:
                self._note_unexpected(f"{name}: {type(failure).__name__}: {failure}")

    def _compare(self, name: str, prompt: str, kind: str, tokens: int) -> None:
        start = time.monotonic()
        try:
            answer, begun = read(self._url, question(name, prompt, tokens, kind), kind)
        except Failed as failure:
            if failure.status != 404 or not self._may_be_gone(name, start):
                raise
            self._count("unloaded")
            return
        reigns = self._changing.get(name)
        folders = {self._fixed[name]} if reigns is None else reigns.between(start, begun)
        allowed = [self._solo[folder, prompt] for folder in folders if folder is not None or reigns is None]
        self._count("completed", "slow" if kind == "slow" else "", "changing" if reigns else "")
        if answer not in allowed:
            with self._lock:
                self.counts["differing"] += 1
                said = {"model": name, "prompt": prompt, "kind": kind, "got": answer, "alone": allowed}
                self.differing = [*self.differing, said][:_SHOWN]

    def _may_be_gone(self, name: str, since: float) -> bool:
        reigns = self._changing.get(name)
        return reigns is not None and None in reigns.between(since, time.monotonic())

    def _hang_up(self, fields: dict[str, Any], draw: random.Random) -> None:
        """Begins to read, and goes: before any answer, after its head, or after some of it; politely or not."""
        with contextlib.closing(connect(self._url)) as connection:
            send(connection, _CHAT, fields)
            sock = connection.sock
            if (lines := draw.randrange(-1, 12)) >= 0:
                response = connection.getresponse()
                if response.status != 200:
                    response.read()
                    return
                for _ in itertools.islice(response, lines):
                    pass
            if draw.random() < 0.5 and sock.fileno() >= 0:  # it is closed with an answer that ended the connection
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _change(self, name: str, first: Path, second: Path) -> None:
        """Loads the adapter, replaces it, replaces it again, unloads it, and so on."""
        draw = random.Random(name)
        steps = [("loads", first), ("replaced", second), ("replaced", first), ("unloads", None)]
        for done, folder in itertools.cycle(steps):
            if done == "loads" and self._over.is_set():
                return
            while True:
                self._over.wait(draw.uniform(*_SECONDS_BETWEEN_CHANGES))
                try:
                    with self._changing[name].change(folder):
                        if folder is None:
                            post(self._url, "/v1/unload_lora_adapter", lora_name=name)
                        else:
                            load_adapter(self._url, name, folder, load_inplace=done == "replaced")
                    self._count(done)
                    break
                except Failed as failure:
                    self._refused(name, failure)
                    if failure.status != 429:
                        return
                except (OSError, http.client.HTTPException) as failure:
                    self._note_unexpected(f"change of {name}: {type(failure).__name__}: {failure}")
                    return

    def _refused(self, name: str, failure: Failed) -> None:
        """429 is the server's right; a client then comes again later, as it is told to."""
        if failure.status == 429:
            self._count("refused")
            time.sleep(1.0)
        else:
            self._note_unexpected(f"{name}: {failure}")

    def _count(self, *names: str) -> None:
        with self._lock:
            self.counts.update(name for name in names if name)

    def _note_unexpected(self, what: str) -> None:
        with self._lock:
            self.counts["unexpected"] += 1
            self.unexpected = [*self.unexpected, what][:_SHOWN]


class _Watch:
    """Looks at the server once a second while the context lasts.

    Attributes:
      most: the largest of each figure that was seen.
      timeline: every ten seconds, the seconds since the start, MiB of memory, and compiled programs.
    """

    def __init__(self, served: Served):
        self._served = served
        self._process = psutil.Process(served.pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.most: collections.Counter[str] = collections.Counter()
        self.timeline: list[tuple[int, int, int]] = []

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        start = time.monotonic()
        while not self._ended.wait(1.0):
            stats = health(self._served.url)
            seen = held(self._process) | {name: stats[name] for name in ("running", "waiting")}
            at = time.monotonic() - start
            if at >= _TIMELINE_SECONDS * len(self.timeline):
                self.timeline.append((round(at), seen["mib"], stats["compilations"]))
            for name, count in seen.items():
                self.most[name] = max(self.most[name], count)


def run_soak(
    seconds: float, streams: int, tell: Callable[[str], None], changing: int = 6, flags: Sequence[str] = FLAGS
) -> dict:
    """Serves the embedded model, and loads it for so many seconds with so many streams at a time.

    Args:
      tell: is told what goes on, a line at a time.
      changing: adapters that are loaded, replaced and unloaded all the time.
      flags: of ``serve.py``.

    Returns:
      ``checks``, the issue's demands by name, each true or false; ``holds``, whether all are true; and the figures.
    """
    with tempfile.TemporaryDirectory() as temporary, demo_server(flags) as served:
        url = served.url
        folders = _variants(Path(temporary), 2 * changing)
        tell("asking every question alone")
        solo = _alone(url, folders)
        clients = _Clients(url, streams, solo, folders)
        tell(f"{len(solo)} answers made alone; {streams} streams for {seconds:.0f} s")
        with _Watch(served) as watch:
            clients.run(_WARM_UP_SHARE * seconds)
            before = _at_rest(served)
            tell(f"at rest after the warm-up: {before}")
            clients.run((1 - _WARM_UP_SHARE) * seconds)
        after = _at_rest(served, most=before)
        tell(f"at rest at the end: {after}")
        for name in demo_adapters():
            post(url, "/v1/unload_lora_adapter", lora_name=name)
        _settle(lambda: not ask(url, "/v1/pool")[1]["pages"]["adapters"])
        pages, stats = ask(url, "/v1/pool")[1]["pages"], health(url)
        counts, growth = clients.counts, round(after["mib"] / before["mib"] - 1, 4)
    checks = {
        "every completed answer is the one given alone": counts["completed"] > 0 and not counts["differing"],
        "nothing unexpected was answered": not counts["unexpected"] and not stats["recoveries"],
        "no request is left": not stats["running"] and not stats["waiting"],
        "all pages are free, or hold prompts for later": not pages["kv"] and not pages["adapters"],
        "unloaded adapters take no host memory": not stats["host_adapter_bytes"],
        "no thread is left": after["threads"] <= before["threads"],
        "no descriptor is left": after["descriptors"] <= before["descriptors"],
        f"memory grows by at most {MOST_GROWTH:.0%}": growth <= MOST_GROWTH,
    }
    names = ("completed", "differing", "slow", "changing", "hung_up", "refused", "unloaded", "unexpected")
    changes = ("loads", "replaced", "unloads")
    counters = ("prompt_tokens", "generated_tokens", "cached_tokens", "steps", "preemptions", "evictions",
                "adapter_loads", "host_adapter_loads", "compilations", "recoveries")  # fmt: skip
    return {
        "machine": cpu(),
        "server_flags": list(flags),
        "seconds": seconds,
        "streams": streams,
        "requests": {name: counts[name] for name in names},
        "adapters": {name: counts[name] for name in changes},
        "most": dict(watch.most),
        "at_rest": {"after_warm_up": before, "end": after, "memory_growth": growth},
        "timeline": watch.timeline,
        "pages": pages,
        "server": {name: stats[name] for name in counters},
        "shown": {"differing": clients.differing, "unexpected": clients.unexpected},
        "checks": checks,
        "holds": all(checks.values()),
    }


def table(result: dict) -> str:
    """The checks and figures of ``run_soak`` for people."""
    requests, changes, rest = (result[name] for name in ("requests", "adapters", "at_rest"))
    lines = [
        f"{result['streams']} streams for {result['seconds']:.0f} s",
        f"  requests    {requests['completed']} answered to the end ({requests['slow']} of them to slow readers, "
        f"{requests['changing']} on adapters that change), {requests['hung_up']} hung up, {requests['refused']} "
        f"times 429, {requests['unloaded']} times 404 on an unloaded adapter",
        f"  adapters    {changes['loads']} loads, {changes['replaced']} replaced, {changes['unloads']} unloads",
        *(
            f"  {name:11} {count} at rest after the warm-up, {rest['end'][name]} at the end"
            for name, count in rest["after_warm_up"].items()
        ),
    ]
    lines += [f"  {'holds' if holds else 'FAILS':11} {name}" for name, holds in result["checks"].items()]
    lines += [f"  {name:11} {one}" for name, several in result["shown"].items() for one in several]
    return "\n".join(lines)


def question(name: str, prompt: str, tokens: int, kind: str) -> dict[str, Any]:
    """The body of a greedy request; a slow reader asks for much to read."""
    fields = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    much = {"logprobs": True, "top_logprobs": 20} if kind == "slow" else {}
    return fields | much | {"stream": kind != "whole"}


def read(url: str, fields: dict[str, Any], kind: str) -> tuple[Answer, float]:
    """The whole answer, and the latest moment at which its adapter's version was chosen, by ``time.monotonic``.

    Raises:
      Failed: there is none.
    """
    slow = kind == "slow"
    with contextlib.closing(connect(url, _SLOW_RECEIVE_BYTES if slow else None)) as connection:
        send(connection, _CHAT, fields)
        response = connection.getresponse()
        begun = time.monotonic()
        if response.status != 200:
            raise Failed(response.status, response.read().decode(errors="replace")[:300])
        if kind == "whole":
            choice = json.loads(response.read())["choices"][0]
            return Answer(choice["message"]["content"], choice["finish_reason"]), begun
        text, reason = "", ""
        for line in response:
            time.sleep(_SLOW_SECONDS_A_LINE if slow else 0)
            if line == b"data: [DONE]\n":
                return Answer(text, reason), begun
            if line.startswith(b"data: "):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise Failed(0, chunk["error"]["message"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
        raise Failed(0, f"after {text!r}")


def health(url: str) -> dict[str, Any]:
    """The server's counters."""
    return ask(url, "/health")[1]


def held(process: psutil.Process) -> dict[str, int]:
    """What a process has: Python's threads, open files and sockets, and MiB of resident memory.

    Threads that XLA starts have names of their own; those that compile come with the first compilation, and stay.
    """
    tasks = Path("/proc", str(process.pid), "task")
    own = Path("/proc", str(process.pid), "comm").read_text()
    threads = 0
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # it ended just now
            threads += (task / "comm").read_text() == own
    memory = process.memory_info().rss
    return {"threads": threads, "descriptors": process.num_fds(), "mib": round(memory / 2**20)}


def _variants(place: Path, count: int) -> list[Path]:
    """Folders of adapters no two of which are alike, nor like the embedded model's own."""
    shipped = itertools.cycle(demo_adapters().items())
    return [
        write_variant(source, place / f"{name}-{i}", 1 - 0.05 * (i + 1))
        for i, (name, source) in enumerate(itertools.islice(shipped, count))
    ]


def _alone(url: str, folders: Sequence[Path]) -> dict[tuple[Path | None, str], Answer]:
    """Every question's answer while nothing else runs, by the adapter's folder and the prompt."""
    base = ask(url, "/v1/models")[1]["data"][0]["id"]
    named: dict[Path | None, str] = {None: base, **{folder: name for name, folder in demo_adapters().items()}}
    solo = {}
    for folder in [*named, *folders]:
        name = named.get(folder, "alone")
        if folder not in named:
            load_adapter(url, name, folder, load_inplace=True)
        for prompt, tokens in _PROMPTS:
            solo[folder, prompt], _ = read(url, question(name, prompt, tokens, "whole"), "whole")
    post(url, "/v1/unload_lora_adapter", lora_name="alone")
    return solo


def _at_rest(served: Served, most: dict[str, int] | None = None) -> dict[str, int]:
    """What the server's process has once no request is left and, if it ever is so, no more than ``most``."""
    process = psutil.Process(served.pid)

    def is_at_rest() -> bool:
        stats, has = health(served.url), held(process)
        given_back = most is None or all(has[name] <= most[name] for name in ("threads", "descriptors"))
        return given_back and not (stats["running"] or stats["waiting"])

    _settle(is_at_rest)
    return held(process)


def _settle(is_done: Callable[[], bool]) -> None:
    """Waits until something is as it must be, or for ``_SETTLE_SECONDS``."""
    end = time.monotonic() + _SETTLE_SECONDS
    while not is_done() and time.monotonic() < end:
        time.sleep(0.5)
