"""The engine as a server of experiments: started once, then one workload after the other under new settings."""

import dataclasses
import datetime
import gc
from pathlib import Path

import jax
import jax.numpy as jnp

from slora_jax import Engine
from slora_jax.bench.baselines import padded_lora
from slora_jax.bench.merged import MergedWeights, run_merged
from slora_jax.bench.paper import Outcome, Point, Scale, System, pages_of, settings_of
from slora_jax.bench.throughput import ADAPTED, Weights, compilations_counted, register_adapters, run_loop
from slora_jax.bench.timing import machine
from slora_jax.bench.workload import SETTINGS, WARM_UP_REQUESTS, Case, draw_workload
from slora_jax.config import build_config, read_yaml
from slora_jax.engine.build import enable_compilation_cache
from slora_jax.engine.engine import leave_alone_what_exists
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import GATHERED
from slora_jax.model.weights import dummy_params


class EngineServer:
    """A ``Server`` by the wall clock, with random weights.

    One engine serves all systems but the padded products: these are other programs, so they have an engine of their
    own, which takes the place of the other.
    """

    systems: tuple[System, ...] = ("unified", "split", "padded", "merged")

    def __init__(self, model: str, scale: Scale, max_sequences: int, pool: dict[str, int | float | None]):
        """
        Args:
          model: YAML file of a shape.
          scale: of the experiments to come.
          max_sequences: of their largest step.
          pool: fields of ``PoolConfig``.

        Raises:
          InvalidRequest: no such file, or no model that can be served.
        """
        self._config = build_config(
            {
                "model": model,
                "dummy": True,
                "checkpoint_cache": None,
                "pool": pool,
                "scheduler": {
                    "max_sequences": max_sequences,
                    "max_batch_tokens": scale.max_batch_tokens,
                    "prefix_cache": False,
                },
            }
        )
        self._scale = scale
        self._model = ModelConfig.from_hf(read_yaml(Path(model)))
        self.settings = settings_of(self._model)
        enable_compilation_cache(self._config.compilation_cache)
        dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        self._params = dummy_params(self._model, dtype, self._config.seed)
        self._weights = Weights(PoolLayout.for_model(self._model), dtype)
        self._engine: Engine | None = None
        self._is_padded = False
        self._pool_pages = 0
        self._registered: set[Case] = set()
        self._merged: MergedWeights | None = None
        self._staged: dict[int, jax.Array] = {}

    def run(self, point: Point) -> Outcome:
        engine = self._engine_for(point)
        pages, create = pages_of(point, self._pool_pages)
        engine.reschedule(point.scheduler, pages, create)
        if point.system == "merged":
            return self._run_merged(engine, point, pages.num_pages)
        self._register(engine, point.case)
        before = engine.stats()
        with compilations_counted() as compilations:
            _, _, times = run_loop(engine, point.case, point.workload)
            compiled = compilations()
        after = engine.stats()
        loads, late = (after[name] - before[name] for name in ("adapter_loads", "adapter_prefetch_late"))
        return Outcome(times, pages.num_pages, loads, late, num_compilations=compiled)

    def describe(self) -> dict:
        return {
            "server": "engine",
            "model": dataclasses.asdict(self._model),
            **machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def close(self) -> None:
        """Stops the engine and gives its memory back."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._merged = None
        self._registered.clear()
        self._staged.clear()
        gc.unfreeze()
        gc.collect()

    def _engine_for(self, point: Point) -> Engine:
        is_padded = point.system == "padded"
        if self._engine is None or is_padded != self._is_padded:
            self.close()
            self._is_padded = is_padded
            self._engine = self._start(point)
        return self._engine

    def _start(self, point: Point) -> Engine:
        config, ops = self._config, GATHERED
        if self._is_padded:
            # Few and small steps, and a pool that leaves memory for the padded copies.
            config = config.model_copy(
                update={
                    "scheduler": point.scheduler,
                    "pool": config.pool.model_copy(update={"pages": point.pool_pages, "gigabytes": None}),
                }
            )
            ops = padded_lora(max(SETTINGS[point.case.setting]))
        engine = Engine(config, self._model, self._params, None, "base", lora_ops=ops)
        self._pool_pages = engine.stats()["pages_total"] + 1
        settings = [point.case.setting] if self._is_padded else self.settings
        warming = [Case(setting, len(SETTINGS[setting])) for setting in settings]
        for case in warming:
            self._register(engine, case)
        engine.warm_up()
        for case in warming:
            # Of every rank one adapter, and the first steps of a process are slower than those to come.
            count = min(WARM_UP_REQUESTS, self._scale.saturated_requests)
            workload = draw_workload(count, case.num_adapters, self._model.vocab_size, 0, self._scale.longest)
            run_loop(engine, case, workload)
        leave_alone_what_exists()
        return engine

    def _register(self, engine: Engine, case: Case) -> None:
        if case not in self._registered:
            register_adapters(engine, [case], self._weights)
            self._registered.add(case)

    def _run_merged(self, engine: Engine, point: Point, pool_pages: int) -> Outcome:
        if self._merged is None:
            self._merged = MergedWeights(self._params, engine.pool_layout)

        def merge(adapter: int) -> float:
            rank = point.case.rank(adapter)
            if rank not in self._staged:
                self._staged[rank] = self._merged.stage(self._weights[rank])
            return self._merged.merge(dict.fromkeys(ADAPTED, rank), self._staged[rank])

        for adapter in range(min(point.case.num_adapters, len(SETTINGS[point.case.setting]))):
            # Compiles what brings this rank into the weights.
            merge(adapter)
        try:
            with compilations_counted() as compilations:
                times, switches = run_merged(engine, merge, point.workload)
                compiled = compilations()
        finally:
            self._merged.restore()
        return Outcome(times, pool_pages, switch_seconds=switches, num_compilations=compiled)
