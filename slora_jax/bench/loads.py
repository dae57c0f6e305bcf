"""Whether loading adapters holds up who is being answered: gaps between the tokens of one running stream.

The stream is on the base model. Beside it adapters are registered over HTTP, brought to the pool, or used for the first
time, each as fast as the server takes them.
"""

import contextlib
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slora_jax.bench.bystander import percentile
from slora_jax.bench.demo import cpu
from slora_jax.bench.demo_server import ask, connect, demo_server, load_adapter, post, send, write_variant
from slora_jax.demo import demo_adapters

EXTRA_STEPS = 2
"""Steps that a load may add to the largest gap of the stream alone."""

_FLAGS = ("--max-model-len", "4096", "--host-adapter-memory", "2")
_PAGES_EACH = 16
_CLIENTS = 8
_MOST_ROUNDS = 4


def run_loads(adapters: int, tokens: int) -> dict:
    """Serves the embedded model and measures each case.

    Args:
      adapters: how many to load in each case.
      tokens: least gaps of the stream that are measured in each case.

    Returns:
      ``rows``, a dict for each case; ``holds``, whether none of those that load has a larger gap than ``bound_ms``.
    """
    # Pinned ones may take half of the pool.
    flags = (*_FLAGS, "--pool-pages", str(2 * _PAGES_EACH * adapters + 400))
    with tempfile.TemporaryDirectory() as temporary, demo_server(flags) as served:
        url, names = served.url, [f"adapter-{i}" for i in range(adapters)]
        shipped = itertools.cycle(demo_adapters().items())
        folders = {
            name: write_variant(source, Path(temporary) / name, 1 + 0.001 * i)
            for i, (name, (_, source)) in enumerate(zip(names, shipped, strict=False))
        }
        base = ask(url, "/v1/models")[1]["data"][0]["id"]

        def register(**more: bool) -> None:
            for name, folder in folders.items():
                load_adapter(url, name, folder, **more)

        def bring() -> None:
            register(pinned=True)
            while _num_in_pool(url) < adapters:
                time.sleep(0.02)

        def use() -> None:
            _each(names, lambda name: _one_token(url, name))

        def unload() -> None:
            for name in names:
                post(url, "/v1/unload_lora_adapter", lora_name=name)

        cases: list[tuple[str, str, Callable[[], None], Callable[[], None]]] = [
            ("alone", "the stream alone", lambda: None, lambda: None),
            ("register", f"{adapters} adapters registered", register, unload),
            ("bring", f"{adapters} registered, read and copied to the pool", bring, unload),
            ("first_use", f"{adapters} used for the first time, a token each", use, lambda: None),
            ("use", f"the same {adapters} used again, all in the pool", use, unload),
            ("alone_again", "the stream alone, at the end", lambda: None, lambda: None),
        ]

        def measured() -> list[dict]:
            rows = []
            for case, what, work, afterwards in cases:
                if case == "first_use":
                    register()
                start = time.perf_counter()
                seconds = []

                def timed(work=work, start=start, seconds=seconds) -> None:
                    work()
                    seconds.append(time.perf_counter() - start)

                before = _compilations(url)
                gaps = _gaps_beside(url, base, timed, tokens)
                compiled = _compilations(url) - before
                row = {"case": case, "what": what, "seconds": round(seconds[0], 2), "compiled": compiled}
                rows.append(row | _summary(gaps))
                afterwards()
            return rows

        # Who waits for a compiler waits longer. What the cases need is compiled in the first rounds.
        for _ in range(_MOST_ROUNDS):
            rows = measured()
            if not any(row["compiled"] for row in rows):
                break
    alone = [row for row in rows if row["case"].startswith("alone")]
    step = statistics.median(row["p50_ms"] for row in alone)
    bound = max(row["most_ms"] for row in alone) + EXTRA_STEPS * step
    used = next(row for row in rows if row["case"] == "use")
    bounds = {"register": bound, "bring": bound, "first_use": max(bound, used["most_ms"] + EXTRA_STEPS * step)}
    for row in rows:
        if row["case"] in bounds:
            row |= {"bound_ms": round(bounds[row["case"]], 1), "holds": row["most_ms"] <= bounds[row["case"]]}
    return {
        "machine": cpu(),
        "adapters": adapters,
        "bound": f"the largest gap <= the largest alone (of first uses: or when used again) + {EXTRA_STEPS} steps",
        "rows": rows,
        "holds": all(row.get("holds", True) for row in rows),
    }


def table(result: dict) -> str:
    """The rows for people; times in milliseconds."""
    lines = [f"{'gaps of the stream, ms':52} {'p50':>7} {'p99':>7} {'most':>7}"]
    for row in result["rows"]:
        verdict = {True: "holds", False: "FAILS", None: ""}[row.get("holds")]
        what = f"{row['what']} ({row['seconds']:.1f} s)" if row["seconds"] >= 0.05 else row["what"]
        lines.append(f"{what:52} {row['p50_ms']:7.1f} {row['p99_ms']:7.1f} {row['most_ms']:7.1f} {verdict}".rstrip())
    return "\n".join(lines)


def _gaps_beside(url: str, model: str, work: Callable[[], None], tokens: int) -> list[float]:
    """Seconds between the stream's events, from when ``work`` begins until it has ended and ``tokens`` came."""
    fields = {"model": model, "prompt": "Once upon a time", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
    with contextlib.closing(connect(url)) as connection:
        send(connection, "/v1/completions", fields | {"stream": True})
        events = _events(connection.getresponse())
        next(events)
        worker = threading.Thread(target=work)
        worker.start()
        last, gaps = time.perf_counter(), []
        for at in events:
            gaps.append(at - last)
            last = at
            if len(gaps) >= tokens and not worker.is_alive():
                break
        worker.join()
    return gaps


def _events(response: Any) -> Iterator[float]:
    """When each event came."""
    for line in response:
        if line.startswith(b"data: {"):
            yield time.perf_counter()


def _each(names: Sequence[str], use: Callable[[str], None]) -> None:
    """Uses all, by a few clients at a time."""
    shares = [names[i::_CLIENTS] for i in range(_CLIENTS)]
    clients = [threading.Thread(target=lambda share=share: [use(name) for name in share]) for share in shares]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def _one_token(url: str, name: str) -> None:
    post(url, "/v1/completions", model=name, prompt="The moon", max_tokens=1)


def _compilations(url: str) -> int:
    return ask(url, "/health")[1]["compilations"]


def _num_in_pool(url: str) -> int:
    return ask(url, "/v1/pool")[1]["tiers"]["pool"]


def _summary(gaps: Sequence[float]) -> dict[str, float]:
    in_ms = [gap * 1e3 for gap in gaps]
    figures = {"p50_ms": statistics.median(in_ms), "p99_ms": percentile(in_ms, 99), "most_ms": max(in_ms)}
    return {"gaps": len(gaps)} | {name: round(figure, 1) for name, figure in figures.items()}
