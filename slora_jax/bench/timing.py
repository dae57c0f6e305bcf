"""How long the device takes: by the host's clock over many queued executions, and by the profiler's kernel records."""

import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import jax
from jax.profiler import ProfileData

Run = Callable[[], object]
"""Starts one execution and returns its outputs without waiting."""

_TIMED_RUNS = 5
_PROFILED_EXECUTIONS = 3


class PartTimer:
    """An observer of the loop (see ``Core``): tells ``record`` of each part of a turn, and the seconds it took."""

    def __init__(self, record: Callable[[str, float], None]):
        self._record = record
        self._part, self._since = "rest", 0.0

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        if self._part != "rest":
            self._record(self._part, now - self._since)
        self._part, self._since = part, now


class KernelEvent(NamedTuple):
    """One kernel or copy on the device; times in nanoseconds."""

    name: str
    start: float
    end: float


def seconds_per_execution(run: Run, least_seconds: float = 0.05) -> float:
    """Wall time of an execution among many queued back to back, gaps between kernels included: median of 5 runs.

    Each run queues work for ``least_seconds`` and waits once, so that dispatch hides behind the device.
    """
    _queue(run, 2)
    count = max(3, round(least_seconds / _queue(run, 3)))
    return statistics.median(_queue(run, count) for _ in range(_TIMED_RUNS))


def _queue(run: Run, count: int) -> float:
    """Seconds of each of ``count`` executions."""
    start = time.perf_counter()
    out = None
    for _ in range(count):
        # Dropped first, so that each execution gets the same buffers: a captured graph is then launched as it is.
        out = None
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def busy_seconds_per_execution(run: Run) -> float | None:
    """Time of an execution in which any kernel runs, from the profiler; None where it records no kernels.

    The profiler turns graphs off: what is missing to the wall time are gaps that a graph has too, or does not have.
    """
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with profiled(Path(folder)):
            _queue(run, _PROFILED_EXECUTIONS)
        events = gpu_events(read_profile(Path(folder)))
    return union_seconds(events) / _PROFILED_EXECUTIONS if events else None


def profiled(folder: Path):
    """A context that records the device's work into ``folder``, and nothing of the host's."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    options.enable_hlo_proto = False
    return jax.profiler.trace(folder, profiler_options=options)


def read_profile(folder: Path) -> list[ProfileData]:
    """What ``profiled`` left there: one for each process."""
    return [ProfileData.from_file(str(path)) for path in sorted(folder.rglob("*.xplane.pb"))]


def gpu_events(profiles: list[ProfileData]) -> list[KernelEvent]:
    """Everything that ran on the first GPU's streams. Its other lines are derived from these."""
    return [
        KernelEvent(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for profile in profiles
        for plane in profile.planes
        if plane.name == "/device:GPU:0"
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def union_seconds(events: list[KernelEvent]) -> float:
    """Seconds covered by at least one event."""
    return sum(end - start for start, end in _merged(events)) * 1e-9


def _merged(events: list[KernelEvent]) -> Iterator[tuple[float, float]]:
    spans = sorted((event.start, event.end) for event in events)
    if not spans:
        return
    start, end = spans[0]
    for next_start, next_end in spans[1:]:
        if next_start > end:
            yield start, end
            start, end = next_start, next_end
        end = max(end, next_end)
    yield start, end


def machine() -> dict[str, object]:
    """What a result must say of where it was measured."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "driver": _driver(), "jax": jax.__version__}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def command_line(without: tuple[str, ...] = ("out",)) -> str:
    """The benchmark's command as typed, from click's context: only what was given, and nothing of ``without``."""
    context = click.get_current_context()
    words = ["python -m slora_jax.bench", context.info_name]
    for parameter in context.command.params:
        value = context.params[parameter.name]
        if parameter.name in without or context.get_parameter_source(parameter.name).name != "COMMANDLINE":
            continue
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Option):
                words.append(parameter.opts[0])
            words.append(shlex.quote(str(one)))
    return " ".join(words)
