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
from slora_jax.bench.paper import Outcome, Point, Scale, System, budget_of, settings_of
from slora_jax.bench.throughput import Weights, compilations_counted, register_adapters, run_loop
from slora_jax.bench.timing import machine
from slora_jax.bench.workload import ADAPTED, SETTINGS, WARM_UP_REQUESTS, Case, Lengths, draw_workload
from slora_jax.config import build_config, read_yaml
from slora_jax.engine.build import BaseModel, EngineParts, enable_compilation_cache, make_parts
from slora_jax.engine.engine import leave_alone_what_exists
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import GATHERED
from slora_jax.model.weights import dummy_params


class EngineServer:
    """A ``Server`` by the wall clock, with random weights.

    Each point has an engine of its own, with its own scheduler and budget of pages, over the same loaded model. Only
    the padded matmuls are other programs: they have parts of their own, which take the place of the others.
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
        self._parts: EngineParts | None = None
        self._is_padded = False
        self._registered: set[Case] = set()
        self._merged: MergedWeights | None = None
        self._staged: dict[int, jax.Array] = {}

    def run(self, point: Point) -> Outcome:
        parts = self._parts_for(point)
        num_pages, create_budget = budget_of(point, parts.device.pool.num_pages)
        engine = Engine(parts, point.scheduler, create_budget)
        if point.system == "merged":
            return self._run_merged(engine, point, num_pages)
        self._register(engine, point.case)
        with compilations_counted() as compilations:
            _, _, times = run_loop(engine, point.case, point.workload)
            compiled = compilations()
        stats = engine.stats()
        engine.close()
        loads, late = stats["adapter_loads"], stats["adapter_prefetch_late"]
        return Outcome(times, num_pages, loads, late, num_compilations=compiled)

    def describe(self) -> dict:
        return {
            "server": "engine",
            "model": dataclasses.asdict(self._model),
            **machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def close(self) -> None:
        """Gives the memory of the engines' parts back."""
        if self._parts is not None:
            self._parts.close()
        self._parts = self._merged = None
        self._registered.clear()
        self._staged.clear()
        gc.unfreeze()
        gc.collect()

    def _parts_for(self, point: Point) -> EngineParts:
        is_padded = point.system == "padded"
        if self._parts is None or is_padded != self._is_padded:
            self.close()
            self._is_padded = is_padded
            self._parts = self._build(point)
        return self._parts

    def _build(self, point: Point) -> EngineParts:
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
        parts = make_parts(config, BaseModel(self._model, self._params, None, "base", None), ops)
        engine = Engine(parts)
        settings = [point.case.setting] if self._is_padded else self.settings
        warming = [Case(setting, len(SETTINGS[setting])) for setting in settings]
        for case in warming:
            self._register(engine, case)
        engine.warm_up()
        for case in warming:
            # Of every rank one adapter, and the first steps of a process are slower than those to come.
            count = min(WARM_UP_REQUESTS, self._scale.saturated_requests)
            workload = draw_workload(
                count, case.num_adapters, self._model.vocab_size, 0, Lengths.below(self._scale.longest)
            )
            run_loop(engine, case, workload)
        engine.close()
        leave_alone_what_exists()
        return parts

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
                self._staged[rank] = self._merged.stage(self._weights.of(rank, ADAPTED))
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
            engine.close()
        return Outcome(times, pool_pages, switch_seconds=switches, num_compilations=compiled)
