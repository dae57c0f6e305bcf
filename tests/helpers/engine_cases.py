"""Engines over the oracle's small models, and a way to run requests through them step by step."""

import contextlib
import json
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from slora_jax import Engine, Request, SamplingParams
from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.config import build_config
from slora_jax.engine import runner
from slora_jax.engine.batch import AdapterRoom, AdapterSlice, Buckets, build_batch
from slora_jax.engine.build import load_base, make_parts
from slora_jax.model.llama import Llama
from slora_jax.model.modules import MODULES
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@contextlib.contextmanager
def compiled_fast():
    """Inside, runners compile their steps fast rather than to fast code."""
    options = runner.compiler_options
    with mock.patch.object(runner, "compiler_options", lambda num_rows: options(num_rows) | FAST_TO_COMPILE):
        yield


def make_engine(
    folder: Path,
    adapters: Path | None = None,
    pages: int = 400,
    few_shapes: bool = True,
    narrow_width: int | None = None,
    **options,
) -> Engine:
    """An engine without a background thread: ``run`` steps it, checking the pool after every step.

    Args:
      few_shapes: pad all steps alike, as compiling takes most of a test's time.
      narrow_width: as of ``Buckets``, for few shapes.
    """
    scheduler = {"max_batch_tokens": 32, "max_sequences": 16} | options.pop("scheduler", {})
    fields = {
        "model": str(folder),
        "adapter_dirs": [str(adapters)] if adapters else [],
        "checkpoint_cache": None,
        "dtype": "float32",
        "compilation_cache": None,
        "pool": {"pages": pages},
        "scheduler": scheduler,
    }
    config = build_config(fields | options)
    if not few_shapes:
        return Engine.create(config, progress=False)
    parts = make_parts(config, load_base(config, progress=False), buckets=_few_buckets(config, narrow_width))
    parts.device.runner.all_shapes(range(len(MODULES)), max_rank=64)
    engine = Engine.owning(parts)
    return engine


@contextlib.contextmanager
def running(case: "Case", **options):
    """An engine of a case that answers in a thread of its own; ``options`` as for ``Case.engine``."""
    with compiled_fast():
        engine = case.engine(**options)
        engine.start()
        try:
            yield engine
        finally:
            engine.close()


def make_dummy_engine(shape: Path, tp: int, *ranks: int, **options) -> Engine:
    """An engine with random weights on ``tp`` devices; for each rank ``r`` an adapter "r<rank>" of all modules.

    Args:
      options: as for ``make_engine``.
    """
    engine = make_engine(shape, dummy=True, mesh={"tp": tp}, seed=3, **options)
    for rank in ranks:
        packed = synthetic_weights(rank, MODULES, engine.pool_layout, engine.dtype, seed=rank)
        engine.register_loaded_adapter(f"r{rank}", dict.fromkeys(MODULES, rank), packed, scale=4.0)
    return engine


def _few_buckets(config, narrow_width: int | None) -> Buckets:
    sequences = (config.scheduler.max_sequences,)
    buckets = Buckets(sequences, (config.scheduler.max_batch_tokens,), sequences, (64, 1024))
    return buckets if narrow_width is None else replace(buckets, narrow_width=narrow_width, wide=buckets)


def run(engine: Engine, *generations, max_steps: int = 5000):
    """Steps until the engine is idle, checking every page's ownership each time; returns the results."""
    for _ in range(max_steps):
        worked = engine.step()
        engine.check_integrity()
        stats = engine.stats()
        assert stats["pages_free"] + stats["pages_cached"] + stats["pages_used"] == stats["pages_total"]
        if not worked:
            if stats["waiting"] == stats["running"] == 0:
                break
            engine.wait_for_work(timeout=10)
    else:
        raise AssertionError("the engine did not become idle")
    return [generation.result(timeout=0) for generation in generations]


def greedy(prompt, adapter=None, max_tokens=64, **changes) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True).replace(**changes)
    return Request(tuple(prompt), adapter, sampling)


class Case:
    """One oracle case: a model, its adapters, and what PyTorch and PEFT answer."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = self.folder / "model"
        self.adapters = self.folder / "adapters"
        self.requests = json.loads((self.folder / "expected.json").read_text())["requests"]

    def engine(self, **options) -> Engine:
        return make_engine(self.model, self.adapters, **options)


CASES = ("llama1_mha", "llama3_gqa", "smollm_gqa3")


def forced_logits(engine: Engine, tokens: list[int], adapter: str | None) -> np.ndarray:
    """The model's logits ``[len(tokens), V]`` with the given tokens as one prompt, past the scheduler and sampler."""
    pages = list(range(1, 1 + engine.pool_layout.token_pages(len(tokens))))
    sequence = Sequence(0, list(tokens), len(tokens), 1, SamplingParams(), 0, pages=array("i", pages))
    slices = {}
    if adapter is not None:
        version = engine.parts.store.get(adapter)
        host = version.wait()
        adapter_pages = tuple(range(pages[-1] + 1, pages[-1] + 1 + version.num_pages))
        engine.device.pool.finish_copy(engine.device.pool.start_copy(host.packed, adapter_pages))
        layout = host.header.layout
        slices["key"] = AdapterSlice(adapter_pages, layout.ranks, layout.start_a, layout.start_b, host.header.scales)
        sequence.adapter_key = "key"
    entry = ScheduledSequence(sequence, 0, len(tokens), True, 0)
    batch = build_batch(
        [entry],
        slices,
        {},
        Buckets((1,), (64, 320), (1,), (64,)),
        64,
        engine.pool_layout.page_tokens,
        AdapterRoom(tuple(range(len(MODULES)))),
    )
    model = engine.device.runner.model
    hidden, engine.device.pool.array = _forced_hidden(
        engine.device.runner.params, batch.packed, engine.device.pool.array, model=model, shape=batch.shape
    )
    logits = model.apply({"params": engine.device.runner.params}, hidden, method=Llama.logits)
    return np.asarray(logits)[: len(tokens)]


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames="pool", compiler_options=FAST_TO_COMPILE)
def _forced_hidden(params, packed, pool, *, model, shape):
    batch = shape.unpack(packed, jax.numpy.zeros(1, "int32"), model.tokens_per_row)
    return model.apply({"params": params}, batch, pool)
