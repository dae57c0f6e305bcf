"""The experiments as pictures, from their results alone."""

import importlib.util
from pathlib import Path

import click

from slora_jax.bench.paper import metric_label, title

_MARKERS = "osD^v<>P"


def require_matplotlib() -> None:
    """
    Raises:
      click.UsageError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("plots need matplotlib: install slora-jax[plots], or give --no-plots")


def draw(result: dict, path: Path) -> None:
    """Draws one result as a PNG: a panel for each metric, a line (or bars) for each series."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = result["metrics"]
    # Without pyplot: no state of the process is touched.
    figure = Figure(figsize=(max(7.0, 4.2 * len(metrics)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        (_bars if result["bars"] else _lines)(axis, result["rows"], metric)
        axis.set_xlabel(result["x"])
        axis.set_ylabel(metric_label(metric))
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    where = "simulated" if result["server"] == "simulated" else result["device"]
    figure.suptitle(f"{title(result)} ({where})", fontsize="medium")
    figure.savefig(path, dpi=110)


def _series(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in rows))


def _lines(axis, rows: list[dict], metric: str) -> None:
    for series, marker in zip(_series(rows), _MARKERS, strict=False):
        points = sorted((row["x"], row[metric]) for row in rows if row["series"] == series and row[metric] is not None)
        axis.plot(*zip(*points, strict=True), marker=marker, label=series)


def _bars(axis, rows: list[dict], metric: str) -> None:
    """Those of one x side by side, without room for series that have none there."""
    xs = sorted({row["x"] for row in rows})
    names = _series(rows)
    width = 0.8 / max(sum(row["x"] == x for row in rows) for x in xs)
    for place, x in enumerate(xs):
        here = [row for row in rows if row["x"] == x]
        for i, row in enumerate(here):
            color = f"C{names.index(row['series'])}"
            axis.bar(place + (i - (len(here) - 1) / 2) * width, row[metric], width, color=color)
    for i, name in enumerate(names):
        axis.bar(0, 0, color=f"C{i}", label=name)
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
