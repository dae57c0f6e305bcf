"""What HTTP costs the engine, without a GPU: the real loop, tokenizer and server over a device that only sleeps.

A step of the device takes a given time and gives random tokens. Batches are laid out as for a GPU, launching a step
keeps Python's interpreter lock for a given time, and waiting for the device lets other threads run, as it does there.
So it shows what streaming takes from the engine's loop, and nothing of what a GPU does.
"""

import contextlib
import dataclasses
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import psutil

from slora_jax.adapters.store import AdapterStore
from slora_jax.api.app import create_app
from slora_jax.api.server import Server, listen
from slora_jax.bench.serve import Load, draw, run_serve
from slora_jax.config import PAGE_SIZE, EngineConfig, build_config, read_yaml
from slora_jax.demo import demo_model_path
from slora_jax.engine.batch import Buckets, HostBatch, build_batch
from slora_jax.engine.build import EngineParts
from slora_jax.engine.core import StepResult
from slora_jax.engine.engine import Engine, leave_alone_what_exists
from slora_jax.engine.sampling import build_sampler_inputs
from slora_jax.histogram import Histogram
from slora_jax.memory.costs import PageCosts
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.request import Request, SamplingParams
from slora_jax.scheduler.sequence import AdapterLoad, ScheduledSequence
from slora_jax.shapes import shape_file
from slora_jax.text.tokenizer import Tokenizer

_MAX_LEN = 2048
_PAGES = 2**16
_START_SECONDS = 300


class Pace(NamedTuple):
    """How long a step takes, in seconds.

    Attributes:
      step: of the device.
      launch: of the host, which starts it.
    """

    step: float
    launch: float


class SleepingDevice:
    """A ``Device`` that runs one step after the other, each for so many seconds, and samples tokens at random.

    Attributes:
      ends: when each step was read, on ``time.monotonic``.
      runner, pool, copied_bytes, copy_seconds: what an engine looks at of a real device.
    """

    def __init__(
        self,
        pace: Pace,
        sequences: int,
        batch_tokens: int,
        vocab_size: int,
        table_width: int,
        sampled: Sequence[int],
    ):
        self._sampled = np.array(sampled)
        self._pace = pace
        self._buckets = Buckets.fine(batch_tokens, sequences)
        self._vocab_size = vocab_size
        self._table_width = table_width
        self._rows: dict[int, int] = {}
        self._free_at = 0.0
        self._rng = np.random.default_rng(0)
        self.ends: list[float] = []
        self.runner = SimpleNamespace(programs=SimpleNamespace(num_compiled=0, compiling=None))
        self.pool = SimpleNamespace(num_pages=_PAGES)
        self.followers = SimpleNamespace(stop=lambda: None)
        self.copied_bytes = 0
        self.copy_seconds = Histogram()
        self.is_copying = False

    def start_copy(self, load: AdapterLoad) -> None:
        raise AssertionError("there are no adapters")

    def arrived(self) -> tuple[AdapterLoad, ...]:
        return ()

    def wait_for_copy(self) -> None:
        raise AssertionError("there are no adapters")

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> HostBatch:
        batch = build_batch(entries, {}, self._rows, self._buckets, self._table_width, PAGE_SIZE)
        build_sampler_inputs(batch.entries, self._rows, batch.shape.sequences, self._vocab_size)
        return batch

    def launch(self, batch: HostBatch) -> "_Sleep":
        self._rows = {e.sequence.sequence_id: row for row, e in enumerate(batch.entries) if e.samples}
        end = time.perf_counter() + self._pace.launch
        while time.perf_counter() < end:
            """Other threads get the lock only when they have waited for it long enough."""
        self._free_at = max(self._free_at, time.monotonic()) + self._pace.step
        return _Sleep(self, self._free_at, self._rng.choice(self._sampled, len(batch.entries)).tolist())

    def reset(self) -> None:
        raise AssertionError("nothing runs that could fail")

    def forget(self) -> None:
        self._rows = {}


@dataclass(frozen=True)
class _Sleep:
    """A step that is over at a certain time."""

    device: SleepingDevice
    until: float
    tokens: list[int]

    def draw(self) -> None:
        """Its tokens are known from the start."""

    def read(self) -> StepResult:
        time.sleep(max(0.0, self.until - time.monotonic()))
        self.device.ends.append(time.monotonic())
        return StepResult(self.tokens, {}, {})


def make_engine(pace: Pace, sequences: int, batch_tokens: int) -> Engine:
    """An engine of the Llama-3.1-8B shape over a ``SleepingDevice``, with the embedded model's tokenizer."""
    tokenizer = Tokenizer.from_folder(demo_model_path())
    shape = ModelConfig.from_hf(read_yaml(shape_file("llama-3.1-8b")), _MAX_LEN)
    model = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    layout = PoolLayout.for_model(model)
    dtype = jnp.dtype(jnp.float32)
    config: EngineConfig = build_config(
        {
            "model": str(shape_file("llama-3.1-8b")),
            "dummy": True,
            "warm_up": False,
            "scheduler": {
                "max_sequences": sequences,
                "max_batch_tokens": batch_tokens,
                "max_waiting": 100_000,
                "prefix_cache": False,
            },
        }
    )
    wake = threading.Event()
    width = layout.token_pages(_MAX_LEN)
    device: Any = SleepingDevice(pace, sequences, batch_tokens, model.vocab_size, width, _whole_texts(tokenizer))
    return Engine(
        EngineParts(
            config=config,
            model_name="sleeping",
            model_config=model,
            tokenizer=tokenizer,
            default_sampling=MappingProxyType({}),
            pool_layout=layout,
            dtype=dtype,
            max_model_len=_MAX_LEN,
            device=device,
            store=AdapterStore(model, layout, dtype, on_change=wake.set, base_name="sleeping"),
            costs=PageCosts.estimate(model, layout.page_bytes(2), 1, True, layout.page_tokens),
            max_rank=None,
            wake_event=wake,
        )
    )


def _whole_texts(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are text by themselves: a part of a character alone is no event, and would look like a gap."""
    shown = {token: tokenizer.token_text(token) for token in range(tokenizer.vocab_size)}
    return [token for token, text in shown.items() if text and "\ufffd" not in text and not tokenizer.is_special(token)]


class StandIn:
    """The engine behind the server, in a process of its own.

    Attributes:
      url: of the server.
      vocab_size: of the model.
      pid: of the process.
    """

    def __init__(self, pipe: Any, pid: int):
        self._pipe = pipe
        self.pid = pid
        self.url, self.vocab_size = self._next()

    def alone(self, load: Load) -> dict[str, Any]:
        """Has the engine answer the load without HTTP, all of its requests submitted at once; see ``measured``."""
        self._pipe.send(load)
        return self._next()

    @contextlib.contextmanager
    def measured(self) -> Iterator[dict[str, Any]]:
        """Yields a dict that has, after the context, the steps' intervals in milliseconds and the CPU seconds."""
        self._pipe.send("begin")
        self._next()
        result: dict[str, Any] = {}
        yield result
        self._pipe.send("end")
        result |= self._next()

    def _next(self) -> Any:
        if not self._pipe.poll(_START_SECONDS):
            raise RuntimeError(f"the server did not answer within {_START_SECONDS} s; see what it said")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the server's process ended; see what it said") from None


@contextlib.contextmanager
def stand_in(pace: Pace, sequences: int, batch_tokens: int) -> Iterator[StandIn]:
    """A server until the context ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, pace, sequences, batch_tokens), daemon=True)
    process.start()
    theirs.close()  # or the end of that process would not be the end of the pipe
    assert process.pid is not None
    try:
        yield StandIn(ours, process.pid)
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Any, pace: Pace, sequences: int, batch_tokens: int) -> None:
    engine = make_engine(pace, sequences, batch_tokens)
    device: Any = engine.device
    app = create_app(engine, max_streams=sequences)
    server = Server(app, listen("127.0.0.1", 0, sequences), max_streams=sequences)
    engine.start()
    leave_alone_what_exists()
    threading.Thread(target=server.run, name="server", daemon=True).start()
    pipe.send((server.url, engine.model_config.vocab_size))
    before = _thread_seconds()
    while True:
        said = pipe.recv()
        if said == "end":
            pipe.send(_figures(device.ends, before))
            continue
        device.ends.clear()
        before = _thread_seconds()
        if said == "begin":
            pipe.send(None)
            continue
        start = time.monotonic()
        items = draw(said, 1, said.requests, said.seed)
        generations = [
            engine.submit(
                Request(item.prompt, None, SamplingParams(max_tokens=item.num_output, temperature=0.0, ignore_eos=True))
            )
            for item in items
        ]
        while not engine.is_idle:
            time.sleep(0.05)
        seconds = max(device.ends) - start
        tokens = sum(len(delta.token_ids) for one in generations for delta in one)
        told = {"output_tokens": tokens, "output_tokens_per_second": tokens / seconds}
        pipe.send(_figures(device.ends, before) | told)


def _thread_seconds() -> Counter[str]:
    """CPU seconds of this process's threads that run, by their names less numbers; all of the process as "process"."""
    names = {thread.native_id: thread.name.rstrip("0123456789-") for thread in threading.enumerate()}
    seconds = Counter(process=time.process_time())
    for thread in psutil.Process().threads():
        seconds[names.get(thread.id, "others")] += thread.user_time + thread.system_time
    return seconds


def _figures(ends: list[float], before: Counter[str]) -> dict[str, Any]:
    intervals = np.diff(ends) * 1e3
    figures = {f"p{p}": float(np.percentile(intervals, p)) for p in (50, 90, 99)} if len(intervals) else {}
    spent = _thread_seconds() - before
    return {
        "cpu_seconds": spent.pop("process"),
        "cpu_seconds_by_thread": {name: round(seconds, 2) for name, seconds in spent.most_common()},
        "steps": len(ends),
        "step_milliseconds": figures,
    }


def run_standin(pace: Pace, load: Load, batch_tokens: int, processes: int, command: str) -> dict[str, Any]:
    """Has the engine answer a load alone, and then through HTTP, and compares.

    Returns:
      ``alone`` and ``http``, and ``ratio``: tokens a second of the one over those of the other.
    """
    assert load.clients is not None, "the engine alone is saturated"
    with stand_in(pace, load.clients, batch_tokens) as server:
        load = dataclasses.replace(load, vocab_size=server.vocab_size)
        alone = server.alone(load)
        with server.measured() as steps:
            http = run_serve(server.url, load, (), None, processes, 0, False, None, command)
        http["server"] = steps
        process = psutil.Process(server.pid)
        http["server"]["rss_bytes"] = process.memory_info().rss
        # Of the process that writes to clients, which the first stream started.
        writers = [child.cpu_times() for child in process.children()]
        http["server"]["writer_cpu_seconds"] = sum(times.user + times.system for times in writers)
    for figures, side in ((alone, alone), (steps, http)):
        figures["cpu_seconds_per_1000_tokens"] = 1000 * figures["cpu_seconds"] / side["output_tokens"]
    ratio = http["output_tokens_per_second"] / alone["output_tokens_per_second"]
    return {"step_seconds": pace.step, "launch_seconds": pace.launch, "alone": alone, "http": http, "ratio": ratio}


def table(result: dict[str, Any]) -> str:
    """The comparison for people."""
    alone, http = result["alone"], result["http"]
    gaps = http["gap_milliseconds"]
    lines = [f"{'':10} {'tokens/s':>9} {'step p50':>9} {'p99, ms':>9} {'CPU s/1000':>11}"]
    for name, rate, figures in (
        ("alone", alone["output_tokens_per_second"], alone),
        ("HTTP", http["output_tokens_per_second"], http["server"]),
    ):
        steps = figures["step_milliseconds"]
        lines.append(
            f"{name:10} {rate:9.0f} {steps['p50']:9.1f} {steps['p99']:9.1f} "
            f"{figures['cpu_seconds_per_1000_tokens']:11.3f}"
        )
    lines += [
        f"HTTP over the engine alone: {result['ratio']:.3f}; {http['tokens_per_event']:.2f} tokens an event",
        f"gaps: median {gaps['p50']:.1f} ms, p99 {gaps['p99']:.1f} ms, {http['gap_p99_over_median']:.2f} times that; "
        f"first token p50 {http['first_token_seconds']['p50']:.2f} s",
        f"writing to clients: {http['server']['writer_cpu_seconds']:.1f} s of CPU in a process of its own; "
        f"clients: {http['generator']['cpu_seconds']:.1f} s; errors {http['errors'] or 'none'}",
    ]
    return "\n".join(lines)
