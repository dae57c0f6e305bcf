"""What the host does for each step, without a device: planning, committing, laying batches out."""

import itertools
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from slora_jax.adapters.synthetic import loaded_adapter
from slora_jax.bench.simulate import ReadyAdapter
from slora_jax.config import POLICIES, SchedulerConfig
from slora_jax.engine.batch import AdapterSlice, Buckets, build_batch
from slora_jax.engine.sampling import build_sampler_inputs
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import Sequence

_NUM_SEQUENCES = 512
_RANK = 8
_LLAMA_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
)  # fmt: skip


class HostLoop:
    """The engine's loop over a stub of the device: every token sampled is 7, every copy arrives at once.

    Attributes:
      milliseconds: by part of the loop, its time in each step of ``run``.
    """

    def __init__(self, num_waiting: int, num_adapters: int, table_width: int, max_tokens: int, random: bool = False,
                 policy: str = "fcfs"):  # fmt: skip
        layout = PoolLayout.for_model(_LLAMA_7B)
        ranks = dict.fromkeys("qkvo", _RANK)
        shape = layout.adapter(ranks)
        # Memory of one element, looked at as large: nobody reads the weights here.
        weights = np.broadcast_to(np.float16(0), shape.packed_shape)
        self._scales = loaded_adapter("stub", ranks, weights, layout).header.scales
        self._layout = shape
        self._adapters = [ReadyAdapter(str(i), shape.num_pages) for i in range(num_adapters)]
        pages = PageAllocator(2**17)
        config = SchedulerConfig(max_batch_tokens=8192, max_sequences=_NUM_SEQUENCES, max_waiting=10**6, policy=policy)
        self._scheduler = Scheduler(config, pages, time.monotonic)
        self._buckets = Buckets.geometric(8192, _NUM_SEQUENCES, ratio=2)
        self._table_width = table_width
        self._slices: dict[object, AdapterSlice] = {}
        self._rows: dict[int, int] = {}
        self._previous = SimpleNamespace(entries=())
        self.milliseconds: dict[str, list[float]] = {}
        sampling = SamplingParams(max_tokens=max_tokens, temperature=float(random), ignore_eos=True)
        now = time.monotonic()
        for i in range(num_waiting):
            adapter = self._adapters[i % num_adapters]
            # Prompts of their own: nothing of them is in the prefix cache.
            sequence = Sequence(i, [i % 30000] * 64, 64, max_tokens, sampling, seed=i, adapter=adapter, arrival=now)
            sequence.tenant = adapter.content_hash
            self._scheduler.add(sequence)

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    def run(self, num_steps: int) -> None:
        self.milliseconds = {}
        for _ in range(num_steps):
            self._step()

    def _step(self) -> None:
        marks = [("", time.perf_counter())]
        plan = self._scheduler.plan()
        marks.append(("plan", time.perf_counter()))
        for load in plan.loads:
            layout = self._layout
            self._slices[load.key] = AdapterSlice(
                load.pages, layout.ranks, layout.start_a, layout.start_b, self._scales
            )
            self._scheduler.adapter_arrived(load)
        if plan.entries:
            keys = dict.fromkeys(e.sequence.adapter_key for e in plan.entries)
            adapters = {key: self._slices[key] for key in keys}
            marks.append(("", time.perf_counter()))
            batch = build_batch(plan.entries, adapters, self._rows, self._buckets, self._table_width)
            marks.append(("build_batch", time.perf_counter()))
            build_sampler_inputs(batch.entries, self._rows, batch.shape.sequences, _LLAMA_7B.vocab_size)
            marks.append(("build_sampler_inputs", time.perf_counter()))
            self._rows = {e.sequence.sequence_id: row for row, e in enumerate(batch.entries) if e.samples}
        ended = []
        for entry in self._previous.entries:
            if entry.samples:
                sequence = entry.sequence
                sequence.num_pending -= 1
                sequence.tokens.append(7)
                if len(sequence.tokens) - sequence.num_prompt == sequence.max_tokens:
                    ended.append(sequence)
        marks.append(("", time.perf_counter()))
        self._scheduler.commit(self._previous)
        marks.append(("commit", time.perf_counter()))
        for sequence in ended:
            self._scheduler.finish(sequence)
        marks.append(("finish", time.perf_counter()))
        self._previous = plan
        for (_, start), (part, end) in itertools.pairwise(marks):
            if part:
                self.milliseconds.setdefault(part, []).append((end - start) * 1000)


def run_host(num_steps: int) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Least, median and largest milliseconds of each part of a step: in full decode, and with a long queue.

    Yields:
      A case's name and its numbers, once it is measured.
    """
    for name, table_width, random in (
        ("decode_512", 256, False),
        ("decode_512_sampled", 256, True),
        ("decode_512_131072_tokens", 8192, False),
    ):
        loop = HostLoop(_NUM_SEQUENCES, _NUM_SEQUENCES, table_width, max_tokens=10**6, random=random)
        loop.run(100)
        assert loop.num_running == _NUM_SEQUENCES
        loop.run(num_steps)
        yield name, _summary(loop)
    for policy in POLICIES:
        loop = HostLoop(100_000, 10_000, 256, max_tokens=100, policy=policy)
        loop.run(2 * num_steps)
        yield f"waiting_100000_adapters_10000_{policy}", _summary(loop)


def _summary(loop: HostLoop) -> dict[str, dict[str, float]]:
    return {
        part: {f"{how.__name__}_ms": round(how(times), 3) for how in (min, statistics.median, max)}
        for part, times in loop.milliseconds.items()
    }
