"""One model on N devices, with adapters and without: the paper's figure 8, and what bounds a step.

Every point runs in a process of its own, so that each has all of the memory. It loads the base model once and serves
the paper's saturated workload on it: the base alone, S-LoRA, and S-LoRA without what it adds to the messages. Then one
user alone decodes, for whom a step takes as long as the weights take to be read.
"""

import datetime
import gc
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from slora_jax import Engine
from slora_jax.bench.workload import Case, Lengths, WorkItem, draw_workload
from slora_jax.config import EngineConfig

POINTS = ("llama-7b:1", "llama-7b:2", "llama-13b:1", "llama-13b:2", "llama-30b:2", "llama-30b:4", "llama-70b:4")
"""Models and devices that are measured unless others are named. Each fits on so many H100s in bfloat16."""

_SETTING_OF = {"llama-13b": "S4", "llama-30b": "S5", "llama-70b": "S6", "llama-3.3-70b": "S6"}

PAPER = {
    "30B, 2 GPUs": {
        "S-LoRA:10": 0.50,
        "S-LoRA:100": 0.46,
        "without its messages:10": 0.71,
        "without its messages:100": 0.56,
    },
    "30B, 4 GPUs": {
        "S-LoRA:10": 0.65,
        "S-LoRA:100": 0.53,
        "without its messages:10": 0.80,
        "without its messages:100": 0.67,
    },
    "70B, 2 GPUs": {"S-LoRA:10": 0.37, "without its messages:10": 0.48},
    "70B, 4 GPUs": {"S-LoRA:10": 0.52, "without its messages:10": 0.70},
}
"""Figure 8 of the paper as shares of the base alone, of the numbers that its authors published; on A100s."""

_ONE_USER = WorkItem(prompt=(1,) * 64, num_output=192, adapter=None)


@dataclass(frozen=True)
class Point:
    """A shape of ``configs/shapes``, or a YAML file, on so many devices."""

    model: str
    tp: int

    @classmethod
    def parse(cls, text: str) -> "Point":
        """``MODEL:N``, such as ``llama-13b:2``.

        Raises:
          ValueError: it is not; the message says what is.
        """
        model, _, number = text.rpartition(":")
        if not model or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"a point is a model and on how many devices it runs, such as llama-13b:2; got {text!r}")
        return cls(model, int(number))

    def __str__(self):
        return f"{Path(self.model).stem}:{self.tp}"

    @property
    def file_name(self) -> str:
        return f"{Path(self.model).stem}_tp{self.tp}.json"

    @property
    def setting(self) -> str:
        """The paper's for a model of this name."""
        return _SETTING_OF.get(Path(self.model).stem, "S2")


@dataclass(frozen=True)
class Load:
    """What is asked of every point.

    Attributes:
      requests: of each case.
      lengths: of prompts and outputs.
      adapters: numbers of adapters, each a case.
      max_sequences, max_batch_tokens: of the scheduler.
      pool_gigabytes: of the pool; None for what is left.
      seed: of weights and workload.
    """

    requests: int
    lengths: Lengths
    adapters: tuple[int, ...]
    max_sequences: int
    max_batch_tokens: int
    pool_gigabytes: float | None
    seed: int

    def config(self, point: Point, file: Path) -> EngineConfig:
        """Of an engine for a point, whose shape is in ``file``."""
        from slora_jax.bench.throughput import random_config

        limits = {"max_sequences": self.max_sequences, "max_batch_tokens": self.max_batch_tokens}
        pool = {"gigabytes": self.pool_gigabytes}
        scheduler = limits | {"prefix_cache": False}
        return random_config(str(file), self.requests, scheduler, pool, point.tp, seed=self.seed)


def measure(point: Point, file: Path, load: Load, command: str) -> Iterator[dict]:
    """Measures a point in this process, which has not used JAX before. Yields the result, with more rows each time.

    Args:
      point: the model and its devices.
      file: with the model's shape.
      load: what is asked.
      command: to be noted.
    """
    from slora_jax.bench.baselines import SILENT
    from slora_jax.bench.kernels import copy_speed
    from slora_jax.bench.timing import machine
    from slora_jax.engine.build import load_base, make_parts
    from slora_jax.gpu_memory import set_share
    from slora_jax.model.llama import GATHERED

    config = load.config(point, file)
    set_share(config.gpu_memory_fraction, point.tp)
    # Ahead of the model, which leaves no room for what is copied.
    speed = copy_speed(1 if is_gpu() else 64)["bytes_per_second"]
    base = load_base(config, progress=False)
    result = {
        "model": file.stem,
        "tp": point.tp,
        "setting": point.setting,
        "ranks": Case(point.setting, 1).ranks,
        "copy_bytes_per_second": speed,
        "weight_bytes_per_device": _bytes_of_one_device(base.params),
        "requests": load.requests,
        "lengths": str(load.lengths),
        **machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "rows": [],
    }
    most = max(load.adapters)
    gathered = [Case("base", 0), *(Case(point.setting, n) for n in load.adapters)]
    kinds = [("S-LoRA", GATHERED, gathered)]
    if point.tp > 1:
        kinds.append(("without its messages", SILENT, [Case(point.setting, most)]))
    for series, ops, cases in kinds:
        parts = make_parts(config, base, ops)
        try:
            for row in _rows(parts, series, cases, load, command):
                result["rows"].append(row)
                yield result
            if is_gpu():
                row |= _device_shares(parts, cases[-1], load)
                yield result
            if ops is GATHERED:
                result["one_user"] = _one_user(parts, result)
                yield result
        finally:
            parts.close()
            del parts
            gc.collect()


def is_gpu() -> bool:
    """Whether JAX runs on GPUs here."""
    import jax

    return jax.default_backend() == "gpu"


def _rows(parts, series: str, cases: Sequence[Case], load: Load, command: str) -> Iterator[dict]:
    from slora_jax.bench.throughput import run_cases

    for case, timed in zip(
        cases, run_cases(parts, cases, load.requests, load.seed, load.lengths, None, None, command), strict=True
    ):
        parts_of_step = timed["host_parts_milliseconds_per_step"]
        step = timed["step_milliseconds"]["mean"]
        row = {
            "series": series if case.num_adapters else "base",
            "n": case.num_adapters,
            "requests_per_second": timed["requests_per_second"],
            "output_tokens_per_second": timed["output_tokens_per_second"],
            "step_milliseconds": timed["step_milliseconds"],
            "sequences_per_step": timed["sequences_per_step"],
            "launch_milliseconds": parts_of_step.get("launch", 0.0),
            "launch_share": parts_of_step.get("launch", 0.0) / step,
            "wait_milliseconds": parts_of_step.get("wait", 0.0),
            "pages_total": timed["pages_total"],
            "preemptions": timed["preemptions"],
            "compilations": timed["compilations"],
            "start_seconds": timed["start_seconds"],
        }
        yield row


def _device_shares(parts, case: Case, load: Load) -> dict:
    """What a step's time on a GPU goes into. Timed apart, as the profiler slows launching."""
    from slora_jax.bench.throughput import MESSAGES, run_loop, shares_of

    count = min(load.requests, load.max_sequences)
    workload = draw_workload(count, case.num_adapters, parts.model_config.vocab_size, load.seed, load.lengths)
    engine = Engine(parts)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_loop(engine, case, workload, Path(folder))
            shares = shares_of(Path(folder))
    finally:
        engine.close()
    return {"device_shares": shares, "message_share": shares.get(MESSAGES, 0.0)}


def _one_user(parts, result: dict) -> dict:
    """A decode step of one sequence, and how long reading a device's weights takes at the speed of a copy."""
    import numpy as np

    from slora_jax.bench.throughput import run_loop

    engine = Engine(parts)
    try:
        for _ in range(2):  # the first time is for warming up
            _, recorder, _ = run_loop(engine, Case("base", 0), [_ONE_USER])
    finally:
        engine.close()
    step = float(np.median(recorder.step_seconds)) * 1e3
    floor = result["weight_bytes_per_device"] / result["copy_bytes_per_second"] * 1e3
    return {"step_milliseconds": step, "floor_milliseconds": floor, "over_floor": step / floor}


def _bytes_of_one_device(params) -> int:
    import jax

    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


def table(results: Sequence[dict]) -> str:
    """Results as markdown: a line for each case of each point."""
    names = ("model, GPUs", "case", "requests/s", "tokens/s", "of base", "step, ms (p50)", "launching, ms")
    names = (*names, "of the GPU's time sending")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for result in results:
        for row in result["rows"]:
            cells = (
                f"{result['model']}, {result['tp']}",
                _label(row),
                f"{row['requests_per_second']:.1f}",
                f"{row['output_tokens_per_second']:,.0f}",
                f"{share_of_base(result, row):.2f}",
                f"{row['step_milliseconds']['p50']:.2f}",
                f"{row['launch_milliseconds']:.2f}",
                f"{row['message_share']:.1%}" if "message_share" in row else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
        if "one_user" in result:
            user = result["one_user"]
            lines.append(
                f"| {result['model']}, {result['tp']} | one user | | | | {user['step_milliseconds']:.2f} "
                f"({user['over_floor']:.2f} x reading the weights) | | |"
            )
    return "\n".join(lines)


def share_of_base(result: dict, row: dict) -> float:
    """A row's throughput over that of the same engine's base."""
    base = next(other for other in result["rows"] if other["series"] == "base")
    return row["requests_per_second"] / base["requests_per_second"]


def _label(row: dict) -> str:
    return row["series"] if row["series"] == "base" else f"{row['series']}, n = {row['n']}"


def draw(results: Sequence[dict], path: Path) -> None:
    """A PNG: the share of the base's throughput that is left with adapters, here and in the paper's figure 8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    here = {
        f"{result['model'].removeprefix('llama-').upper()}, {result['tp']} GPUs": {
            f"{row['series']}:{row['n']}": share_of_base(result, row) for row in result["rows"] if row["n"]
        }
        for result in results
        if result["tp"] > 1
    }
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for shares in (*here.values(), *PAPER.values()) for name in shares))
    for axis, title, points in zip(axes, ("slora-jax", "the paper's figure 8, on A100s"), (here, PAPER), strict=True):
        width = 0.8 / len(names)
        for place, shares in enumerate(points.values()):
            for i, name in enumerate(name for name in names if name in shares):
                axis.bar(place + i * width, shares[name], width, color=f"C{names.index(name)}")
        axis.set_xticks([place + 0.3 for place in range(len(points))], list(points))
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("throughput over the base's")
    handles = [axes[0].bar(0, 0, color=f"C{i}") for i in range(len(names))]
    labels = [name.replace(":", ", n = ") for name in names]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)


def device_count() -> int:
    """How many devices JAX finds, asked in a process of its own: it would take the memory of those that it looks at.

    Raises:
      click.ClickException: JAX does not start there.
    """
    asked = subprocess.run([sys.executable, "-c", "import jax; print(jax.device_count())"], capture_output=True)
    if asked.returncode:
        raise click.ClickException(f"JAX does not start: {asked.stderr.decode().strip().splitlines()[-1]}")
    return int(asked.stdout)
