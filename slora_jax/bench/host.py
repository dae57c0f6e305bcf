"""What the host does for each step, without a device: planning, committing, laying batches out."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slora_jax.adapters.synthetic import loaded_adapter
from slora_jax.bench.simulate import ReadyAdapter
from slora_jax.bench.timing import PartTimer
from slora_jax.config import PAGE_SIZE, POLICIES, SchedulerConfig
from slora_jax.engine.batch import AdapterSlice, Buckets, HostBatch, build_batch
from slora_jax.engine.core import Core, StepResult
from slora_jax.engine.sampling import build_sampler_inputs
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pages import PageAllocator
from slora_jax.model.config import ModelConfig
from slora_jax.request import SamplingParams
from slora_jax.scheduler.scheduler import Scheduler
from slora_jax.scheduler.sequence import AdapterLoad, ScheduledSequence, Sequence

_NUM_SEQUENCES = 512
_RANK = 8
_LLAMA_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
)  # fmt: skip


class StubDevice:
    """A ``Device`` whose host side is the real one: batches are laid out, and nothing runs.

    Every token sampled is 7, and every copy arrives at once.

    Args:
      table_width: pages that a sequence can have.
    """

    def __init__(self, table_width: int):
        layout = PoolLayout.for_model(_LLAMA_7B)
        ranks = dict.fromkeys("qkvo", _RANK)
        self.adapter_layout = layout.adapter(ranks)
        # Memory of one element, looked at as large: nobody reads the weights here.
        weights = np.broadcast_to(np.float16(0), self.adapter_layout.packed_shape)
        self._scales = loaded_adapter("stub", ranks, weights, layout).header.scales
        self._buckets = Buckets.fine(8192, _NUM_SEQUENCES)
        self._table_width = table_width
        self._loads: list[AdapterLoad] = []
        self._slices: dict[object, AdapterSlice] = {}
        self._rows: dict[int, int] = {}

    def start_copy(self, load: AdapterLoad) -> None:
        self._loads.append(load)

    def arrived(self) -> list[AdapterLoad]:
        loads, self._loads = self._loads, []
        for load in loads:
            layout = self.adapter_layout
            self._slices[load.key] = AdapterSlice(
                load.pages, layout.ranks, layout.start_a, layout.start_b, self._scales
            )
        return loads

    @property
    def is_copying(self) -> bool:
        return bool(self._loads)

    def wait_for_copy(self) -> None:
        pass

    def lay_out(self, entries: tuple[ScheduledSequence, ...]) -> HostBatch:
        keys = dict.fromkeys(e.sequence.adapter_key for e in entries)
        adapters = {key: self._slices[key] for key in keys}
        batch = build_batch(entries, adapters, self._rows, self._buckets, self._table_width, PAGE_SIZE)
        build_sampler_inputs(batch.entries, self._rows, batch.shape.sequences, _LLAMA_7B.vocab_size)
        return batch

    def launch(self, batch: HostBatch) -> "StubStep":
        self._rows = {e.sequence.sequence_id: row for row, e in enumerate(batch.entries) if e.samples}
        return StubStep(len(batch.entries))

    def reset(self) -> None:
        raise AssertionError("nothing runs that could fail")


@dataclass(frozen=True)
class StubStep:
    """A step that is over as soon as it began."""

    num_entries: int

    def draw(self) -> None:
        """Its tokens are known from the start."""

    def read(self) -> StepResult:
        return StepResult([7] * self.num_entries, {}, {})


class HostLoop:
    """The engine's loop over a ``StubDevice``, with its time taken part by part.

    Attributes:
      milliseconds: by part of the loop, its time in each turn of ``run``.
    """

    def __init__(self, num_waiting: int, num_adapters: int, table_width: int, max_tokens: int, random: bool = False,
                 policy: str = "fcfs"):  # fmt: skip
        device = StubDevice(table_width)
        adapters = [ReadyAdapter(str(i), device.adapter_layout.num_pages) for i in range(num_adapters)]
        config = SchedulerConfig(max_batch_tokens=8192, max_sequences=_NUM_SEQUENCES, max_waiting=10**6, policy=policy)
        self.milliseconds: dict[str, list[float]] = {}
        self._core = Core(
            lambda: Scheduler(config, PageAllocator(2**17), time.monotonic), device, PartTimer(self._note)
        )
        sampling = SamplingParams(max_tokens=max_tokens, temperature=float(random), ignore_eos=True)
        now = time.monotonic()
        for i in range(num_waiting):
            adapter = adapters[i % num_adapters]
            # Prompts of their own: nothing of them is in the prefix cache.
            sequence = Sequence(i, [i % 30000] * 64, 64, max_tokens, sampling, seed=i, adapter=adapter, arrival=now)
            sequence.tenant = adapter.content_hash
            self._core.add(sequence)

    @property
    def num_running(self) -> int:
        return self._core.scheduler.num_running

    def run(self, num_steps: int) -> None:
        self.milliseconds = {}
        for _ in range(num_steps):
            self._core.step()

    def _note(self, part: str, seconds: float) -> None:
        if part != "wait":  # there is nothing to wait for
            self.milliseconds.setdefault(part, []).append(seconds * 1000)


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
