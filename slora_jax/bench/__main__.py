"""Command line of the benchmarks."""

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click

from slora_jax.adapters.peft import MAX_RANK
from slora_jax.bench.timing import command_line
from slora_jax.bench.workload import Lengths
from slora_jax.config import read_yaml
from slora_jax.errors import SLoRAError
from slora_jax.gpu_memory import set_share
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES
from slora_jax.shapes import shape_file

_COUNT = click.IntRange(1)
_RANK = click.IntRange(1, MAX_RANK)
_SEED = click.IntRange(0)
_ABOVE_0 = click.FloatRange(0, min_open=True)
_KV_CACHE_DTYPE = click.option(
    "--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True, help="As the engine's."
)


class _Shape(NamedTuple):
    """A base model's shape, and the file that it is in."""

    file: Path
    config: ModelConfig


def _shape(model: str) -> _Shape:
    """Reads a shape of configs/shapes by its name, or any YAML file.

    Raises:
      click.ClickException: there is none, or no model that can be served.
    """
    try:
        file = Path(model) if Path(model).suffix in (".yaml", ".yml") else shape_file(model)
    except SLoRAError as e:
        raise click.ClickException(str(e)) from None
    try:
        return _Shape(file, ModelConfig.from_hf(read_yaml(file)))
    except SLoRAError as e:
        raise click.ClickException(f"{file} is no shape of a model: {e}") from None


def _model_option(default: str | tuple[str, ...], *names: str, **more):
    help_text = "A shape of configs/shapes, or a YAML file" + ("; may be repeated." if more else ".")
    return click.option("--model", *names, default=default, show_default=True, help=help_text, **more)


def _grid(context, parameter, text: str) -> dict[str, list[int]]:
    try:
        grid = json.loads(text)
    except json.JSONDecodeError as e:
        raise click.BadParameter(f"not JSON: {e}") from None
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise click.BadParameter(f'not lists of values by name, such as {{"num_warps": [2, 4]}}: {text}')
    return grid


def _modules(context, parameter, text: str) -> tuple[str, ...]:
    from slora_jax.bench.workload import parsed_modules

    try:
        return parsed_modules(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


def _exact_lengths(context, parameter, text: str | None) -> Lengths | None:
    try:
        return None if text is None else Lengths.parse(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


_LONGEST = click.option(
    "--longest",
    type=click.IntRange(9),
    default=512,
    show_default=True,
    help="Prompt and output lengths are in [8, this).",
)
_LENGTHS = click.option(
    "--lengths",
    callback=_exact_lengths,
    metavar="PROMPT:OUTPUT",
    help="Tokens of every prompt and every output, such as 1600:600, in place of --longest.",
)


def _print_or_write(result: object, out: Path | None) -> None:
    text = json.dumps(result, indent=2)
    if out:
        out.write_text(text + "\n")
    else:
        click.echo(text)


def _end_with(result: dict, out: Path | None, failure: str) -> None:
    """Hands a result out, and ends with an error if what it checks does not hold."""
    _print_or_write(result, out)
    if not result["holds"]:
        raise click.ClickException(f"{failure}; see above")


@click.group(context_settings={"max_content_width": 100})
def main():
    """Measure slora-jax. Each command prints a table for people and writes JSON."""


@main.command()
@click.option(
    "--requests", type=_COUNT, default=16, show_default=True, help="Requests, dealt to the demo adapters in turn."
)
@click.option("--tokens", type=_COUNT, default=64, show_default=True, help="Tokens generated for each request.")
@click.option(
    "--repeats", type=_COUNT, default=3, show_default=True, help="Timed runs of each side; the median counts."
)
@click.option(
    "--torch-python",
    type=click.Path(exists=True, dir_okay=False),
    help="A Python with torch, transformers and peft; without it only this engine is timed.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def demo(requests: int, tokens: int, repeats: int, torch_python: str | None, out: Path | None):
    """The embedded model with its adapters in one batch, against transformers + PEFT one adapter at a time."""
    from slora_jax.bench.demo import run_demo

    result = run_demo(requests, tokens, repeats, torch_python)
    for side in ("slora_jax", "peft"):
        if side in result:
            rates = result[side]["tokens_per_second"]
            click.echo(f"{side:10} {rates['median']:8.1f} tokens/s   (runs: {rates['runs']})")
    if "speedup" in result:
        click.echo(f"speedup    {result['speedup']:8.2f} x")
    _print_or_write(result, out)


@main.command()
@click.option("--only", default="*", show_default=True, metavar="GLOB", help="Cases to measure, by name.")
@click.option(
    "--scale", type=_COUNT, default=1, show_default=True, help="Divide every size by this: to try the benchmark itself."
)
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time cuDNN's attention too.")
@click.option(
    "--profiles/--no-profiles",
    default=True,
    show_default=True,
    help="Ask the profiler for the time in which kernels run, which takes ten seconds a case; else the clock counts.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def kernels(only: str, scale: int, peers: bool, profiles: bool, out: Path | None):
    """Attention, gathered LoRA, int4 products and decode steps against copy bandwidth and cuDNN on this device."""
    from slora_jax.bench.kernels import run_kernels

    set_share(None)
    if not run_kernels(only, scale, peers, profiles, command_line(), out):
        raise click.ClickException("a case failed; see above")


@main.command()
@click.argument("op")
@click.argument("key")
@click.option(
    "--grid",
    required=True,
    callback=_grid,
    help='Values of each block size, as JSON: {"ranks": [1, 2], "num_warps": [4]}.',
)
@click.option("--only", metavar="GLOB", help="Kernel cases to time; without it those that the op serves.")
@click.option("--scale", type=_COUNT, default=1, show_default=True, help="As in `kernels`.")
def tune(op: str, key: str, grid: dict[str, list[int]], only: str | None, scale: int):
    """Times an op of pallas_kernels/tuned for every combination of block sizes, e.g. `tune lora_shrink decode`."""
    from slora_jax.bench.kernels import run_tuning

    set_share(None)
    if not run_tuning(op, key, grid, only, scale):
        raise click.ClickException("no combination worked; see above")


@main.command()
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@_model_option("llama-7b")
@click.option("--requests", type=_COUNT, default=1000, show_default=True)
@click.option("--seed", type=_SEED, default=42, show_default=True)
@_LONGEST
@_LENGTHS
@click.option(
    "--modules",
    default="q,k,v,o",
    show_default=True,
    callback=_modules,
    metavar="NAME,...",
    help=f"What the adapters change, of {','.join(MODULES)}.",
)
@click.option("--max-sequences", type=_COUNT, default=512, show_default=True)
@click.option("--max-batch-tokens", type=_COUNT, default=1024, show_default=True)
@click.option("--prefix-cache/--no-prefix-cache", default=False, show_default=True)
@click.option("--pool-gigabytes", type=_ABOVE_0, help="Size of the pool; without it the engine's own choice.")
@click.option("--tp", type=_COUNT, default=1, show_default=True, help="Devices that share the model.")
@click.option("--quantization", type=click.Choice(["fp8"]), help="Of the base model; without it, none.")
@_KV_CACHE_DTYPE
@click.option("--trace", type=click.Choice(["saturated", "open"]), default="saturated", show_default=True)
@click.option("--rate", type=_ABOVE_0, default=2.0, show_default=True, help="Open trace: requests a second.")
@click.option(
    "--cv", type=_ABOVE_0, default=1.0, show_default=True, help="Open trace: coefficient of variation of the intervals."
)
@click.option(
    "--alpha",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Open trace: exponent of the adapters' power law.",
)
@click.option("--profile", type=click.Path(path_type=Path), help="Record ten steps there, and print where time goes.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the JSON line to this file.")
def throughput(cases, model, requests, seed, longest, lengths, modules, max_sequences, max_batch_tokens, prefix_cache,
               pool_gigabytes, tp, quantization, kv_cache_dtype, trace, rate, cv, alpha, profile, out):  # fmt: skip
    """The engine on the paper's synthetic workload, with random weights; one JSON line a CASE.

    A CASE is "base", or a setting of the paper or a rank and a number of adapters, such as S2:100 or rank16:100. What
    they change can be said behind it: rank16:100@gate,up,down. All run on one engine.
    """
    from slora_jax.bench.throughput import profile_of, run_throughput
    from slora_jax.bench.workload import Case, OpenTrace

    try:
        parsed = [Case.parse(case, modules) for case in cases or ("base",)]
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    shape = _shape(model)
    compiled = 0
    for case, result in zip(
        parsed,
        run_throughput(
            model=str(shape.file),
            cases=parsed,
            requests=requests,
            seed=seed,
            lengths=lengths or Lengths.below(longest),
            scheduler={
                "max_sequences": max_sequences,
                "max_batch_tokens": max_batch_tokens,
                "prefix_cache": prefix_cache,
            },
            pool={"gigabytes": pool_gigabytes},
            tp=tp,
            kv_cache_dtype=kv_cache_dtype,
            trace=OpenTrace(rate, cv, alpha) if trace == "open" else None,
            profile=profile,
            command=command_line(),
            quantization=quantization,
        ),
        strict=True,
    ):
        line = json.dumps(result)
        click.echo(line)
        if out:
            with out.open("a") as file:
                file.write(line + "\n")
        if profile:
            click.echo(profile_of(profile / str(case)))
        compiled += result["compilations"]
    if compiled:
        raise click.ClickException(f"{compiled} programs were compiled inside the timed part")


@main.command()
@_model_option("llama-70b")
@click.option("--tp", type=_COUNT, default=1, show_default=True, help="Devices that share it.")
@click.option("--gpu", default="h100-80g", show_default=True, help="a10g, a100-40g, a100-80g, h100-80g or h200.")
@click.option("--sequences", type=_COUNT, default=128, show_default=True, help="Sequences of a step, a token each.")
@click.option("--context", type=_COUNT, default=512, show_default=True, help="Tokens in the pool of each.")
@click.option("--adapters", type=click.IntRange(0), default=0, show_default=True, help="Distinct adapters of the step.")
@click.option("--rank", type=_RANK, default=16, show_default=True, help="Their rank.")
@click.option("--modules", default="q,k,v,o", show_default=True, help="What they change.")
@click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="As the engine's.",
)
@_KV_CACHE_DTYPE
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(model, tp, gpu, sequences, context, adapters, rank, modules, memory_fraction, kv_cache_dtype, as_json):
    """What fits on GPUs of a kind, and the least time of a step; no GPU is needed."""
    from slora_jax.bench.plan import GPUS, Load, plan, table
    from slora_jax.model.modules import MODULES

    if gpu not in GPUS:
        raise click.UsageError(f"no such GPU: {gpu}; known are {', '.join(GPUS)}")
    names = modules.split(",")
    if unknown := [name for name in names if name not in MODULES]:
        raise click.UsageError(f"no such module: {unknown[0]}; known are {', '.join(MODULES)}")
    load = Load(sequences, context, adapters, dict.fromkeys(names, rank))
    shape = _shape(model).config
    try:
        result = plan(shape, tp, GPUS[gpu], load, memory_fraction, float8_kv=kv_cache_dtype == "fp8")
    except SLoRAError as e:
        raise click.ClickException(str(e)) from None
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


@main.command()
@click.option("--tp", type=_COUNT, default=2, show_default=True, help="Devices to use, at least 2.")
@_model_option(("llama-7b", "llama-70b"), "models", multiple=True)
@click.option("--layers", type=_COUNT, default=8, show_default=True, help="Layers of each program that is timed.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def collectives(tp: int, models: tuple[str, ...], layers: int, out: Path | None):
    """The projections o and q, k, v on several devices: two ways to share adapters out, and what each sends."""
    from slora_jax.bench.collectives import TABLE_HEAD, measure, table_row

    if tp < 2:
        raise click.UsageError("one device sends nothing; give --tp 2 or more")
    set_share(None, tp)
    shapes = {name: _shape(name).config for name in models}
    results = []
    try:
        click.echo(TABLE_HEAD)
        for result in measure(shapes, tp, layers, command_line()):
            click.echo(table_row(result))
            results.append(result)
    except SLoRAError as e:
        raise click.ClickException(str(e)) from None
    _print_or_write(results, out)


@main.command("tensor-parallel")
@click.argument("points", nargs=-1, metavar="[MODEL:N]...")
@click.option("--adapters", type=_COUNT, default=(10, 100), show_default=True, multiple=True, help="Numbers of them.")
@click.option("--requests", type=_COUNT, default=400, show_default=True)
@_LONGEST
@_LENGTHS
@click.option("--max-sequences", type=_COUNT, default=256, show_default=True)
@click.option("--max-batch-tokens", type=_COUNT, default=1024, show_default=True)
@click.option("--pool-gigabytes", type=_ABOVE_0, help="Size of the pool; without it the engine's own choice.")
@click.option("--seed", type=_SEED, default=42, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="build/tensor_parallel", show_default=True,
              help="Folder for a JSON file of each point, and figure8.png.")  # fmt: skip
@click.option("--plot-only", is_flag=True, help="Run nothing: draw that folder's results and print their table.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw; needs slora-jax[plots].")
def tensor_parallel(points, adapters, requests, longest, lengths, max_sequences, max_batch_tokens, pool_gigabytes,
                    seed, out, plot_only, plots):  # fmt: skip
    """A model on N devices, with adapters and without, against the paper's figure 8.

    Each MODEL:N, such as llama-13b:2, runs in a process of its own. Without any, all those that the devices here
    suffice for.
    """
    from slora_jax.bench.plots import require_matplotlib
    from slora_jax.bench.tensor_parallel import POINTS, Load, Point, device_count, draw, measure, table

    if plots:
        require_matplotlib()
    try:
        parsed = [Point.parse(point) for point in points or POINTS]
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    files = {point: _shape(point.model).file for point in parsed}
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    if len(points) == 1 and not plot_only:
        (point,) = parsed
        load = Load(
            requests, lengths or Lengths.below(longest), adapters, max_sequences, max_batch_tokens, pool_gigabytes, seed
        )
        try:
            for result in measure(point, files[point], load, command_line()):
                (out / point.file_name).write_text(json.dumps(result, indent=2) + "\n")
                click.echo(table([result]).splitlines()[-1], err=True)
        except SLoRAError as e:
            raise click.ClickException(str(e)) from None
    elif not plot_only:
        count = device_count()
        for point in parsed:
            if point.tp > count:
                click.echo(f"{point} is left out: there are {count} devices", err=True)
            elif subprocess.run([sys.executable, *_alone(str(point.model), point.tp)]).returncode:
                failed.append(str(point))
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*_tp*.json"))]
    click.echo(table(results))
    if plots and any(result["tp"] > 1 for result in results):
        draw(results, out / "figure8.png")
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; see above")


def _alone(model: str, tp: int) -> list[str]:
    """Arguments of Python for the command that runs, with one point in place of its points, and without plots."""
    words = shlex.split(command_line(without=("points", "plots")).removeprefix("python "))
    return [*words, f"{model}:{tp}", "--no-plots"]


@main.command()
@click.argument("experiments", nargs=-1, metavar="[EXPERIMENT]...")
@click.option("--simulate", "simulated", is_flag=True, help="In simulated time, without a GPU; what that cannot show "
              "(padded products, merged weights) is left out.")  # fmt: skip
@_model_option("llama-7b")
@click.option("--scale", type=click.Choice(["quick", "full", "toy"]), default="quick", show_default=True,
              help="quick: minutes on an H200; full: the paper's lengths; toy: to try it.")  # fmt: skip
@click.option("--seed", type=_SEED, default=42, show_default=True)
@click.option("--pool-gigabytes", type=_ABOVE_0, help="Size of the pool; without it the engine's own choice.")
@click.option("--out", type=click.Path(path_type=Path), default="build/paper", show_default=True,
              help="Folder for NAME.json and NAME.png, of one server, scale and model.")  # fmt: skip
@click.option("--plot-only", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Run nothing: draw "
              "this folder's results and print their tables.")  # fmt: skip
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw; needs slora-jax[plots].")
def paper(experiments, simulated, model, scale, seed, pool_gigabytes, out, plot_only, plots):
    """The paper's experiments: table3 rates abort fairness trace cluster merged ablation; all, or those named.

    One engine serves them all. Each experiment's JSON is written anew with every point, so that a run that is cut off
    leaves what it has.
    """
    from slora_jax.bench.paper import EXPERIMENTS, read_results, table
    from slora_jax.bench.plots import draw, require_matplotlib

    if unknown := [name for name in experiments if name not in EXPERIMENTS]:
        raise click.UsageError(f"no such experiment: {unknown[0]}; known are {', '.join(EXPERIMENTS)}")
    if simulated and pool_gigabytes is not None:
        raise click.UsageError("--pool-gigabytes is the engine's; simulated, the pool is what one H200 has room for")
    if plots:
        require_matplotlib()
    compiled = 0
    if not plot_only:
        names = [name for name in EXPERIMENTS if name in experiments or not experiments]
        compiled = _run_paper(names, simulated, model, scale, seed, pool_gigabytes, out)
    for result in read_results(plot_only or out):
        click.echo(f"\n{table(result)}")
        if plots:
            draw(result, (plot_only or out) / f"{result['experiment']}.png")
    if compiled:
        raise click.ClickException(f"{compiled} programs were compiled inside the timed parts")


def _run_paper(names, simulated, model, scale, seed, pool_gigabytes, out) -> int:
    from slora_jax.bench.paper import SimulatedServer, check_folder, most_sequences, run_paper, scale_of

    chosen = scale_of(scale, seed, simulated)
    shape = _shape(model)
    try:
        check_folder(out, "simulated" if simulated else "engine", chosen, shape.config)
    except ValueError as e:
        raise click.ClickException(str(e)) from None
    try:
        with contextlib.ExitStack() as stack:
            if simulated:
                server = SimulatedServer.on_h200(shape.config)
            else:
                from slora_jax.bench.served import EngineServer

                set_share(None)
                most = most_sequences(names, chosen)
                server = EngineServer(str(shape.file), chosen, most, {"gigabytes": pool_gigabytes})
                stack.enter_context(contextlib.closing(server))
            return run_paper(
                names, server, chosen, out, command_line(without=()), lambda line: click.echo(line, err=True)
            )
    except SLoRAError as e:
        raise click.ClickException(str(e)) from None


@main.command()
@click.option("--requests", type=_COUNT, default=128, show_default=True)
@click.option("--adapters", type=_COUNT, default=5, show_default=True)
@click.option(
    "--batch", type=_COUNT, default=64, show_default=True, help="Most requests of a batch, all of one adapter."
)
@click.option("--seed", type=_SEED, default=42, show_default=True)
@_model_option("llama-7b")
def peft(requests, adapters, batch, seed, model):
    """transformers + PEFT on table 3's requests (S2), one adapter a batch; needs torch, transformers and peft."""
    from slora_jax.bench.peft_table import run_peft

    click.echo(json.dumps(run_peft(str(_shape(model).file), requests, adapters, batch, seed)))


@main.command()
@click.option("--steps", type=_COUNT, default=200, show_default=True, help="Timed steps of each case.")
def host(steps: int):
    """The host's work for each step, without a device: it must stay well below a step of the GPU.

    Prints a JSON line a case, as they come.
    """
    from slora_jax.bench.host import run_host

    for name, milliseconds in run_host(steps):
        click.echo(json.dumps({"case": name, "steps": steps, **milliseconds}))


@main.command()
@click.option("--count", type=_COUNT, default=10_000, show_default=True, help="Adapters to register.")
@click.option(
    "--kinds",
    type=_COUNT,
    default=(1, 100, 1000),
    show_default=True,
    multiple=True,
    help="Different scales among them.",
)
@_model_option("llama-7b")
@click.option("--rank", type=_RANK, default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def adapters(count: int, kinds: tuple[int, ...], model: str, rank: int, out: Path | None):
    """Registration: adapters a second, and Python memory of each. Their weights are never read."""
    from slora_jax.bench.adapters import run_adapters
    from slora_jax.bench.demo import cpu

    shape = _shape(model)
    result = {
        "command": command_line(),
        "machine": cpu(),
        "model": shape.file.stem,
        "rank": rank,
        "cases": [run_adapters(count, kind, shape.config, rank) for kind in kinds],
    }
    text = json.dumps(result, indent=2)
    click.echo(text)
    if out:
        out.write_text(text + "\n")


@main.command()
@click.option("--url", help="A server that is already running; without it the embedded model is served meanwhile.")
@click.option("--seconds", type=_ABOVE_0, default=20.0, show_default=True, help="How long to measure beside each kind.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="NAME",
    help="Hostile clients of this kind; may be repeated [default: all].",
)
@click.option("--body-bytes", type=_COUNT, help="The server's --max-body-bytes, if it was started with one.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def bystander(url: str | None, seconds: float, kinds: tuple[str, ...], body_bytes: int | None, out: Path | None):
    """A small request's latency, alone and beside each kind of hostile client. It needs an otherwise quiet machine."""
    from slora_jax.bench.bystander import bystander_report, run_bystander
    from slora_jax.bench.demo_server import Served, demo_server
    from slora_jax.bench.hostile import KINDS

    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(KINDS)}", param_hint="--kind")
    rows = []
    with demo_server() if url is None else contextlib.nullcontext(Served(url, 0)) as served:
        for row in run_bystander(served.url, seconds, kinds or tuple(KINDS), body_bytes):
            rows.append(row)
            verdict = {True: "holds", False: "FAILS", None: ""}[row.get("holds")]
            text = f"{row['what']:42} p50 {row['p50_ms']:8.1f} ms  p99 {row['p99_ms']:8.1f} ms  {verdict:6}"
            click.echo(f"{text} {row.get('answers', '')}".rstrip(), err=True)
    result = bystander_report(rows, command_line())
    _end_with(result, out, "a small request waits for others")


@main.command()
@click.option(
    "--minutes", type=_ABOVE_0, default=5.0, show_default=True, help="How long; two fifths of it are a warm-up."
)
@click.option("--streams", type=_COUNT, default=512, show_default=True, help="Clients that ask at the same time.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def soak(minutes: float, streams: int, out: Path | None):
    """The embedded model under load: clients that hang up or read slowly, adapters that come and go.

    Nothing may be lost: no answer differs from the one given alone, no page, thread or descriptor is left, and memory
    is flat.
    """
    from slora_jax.bench.soak import run_soak, table

    result = {"command": command_line()} | run_soak(60 * minutes, streams, lambda line: click.echo(line, err=True))
    click.echo(table(result), err=True)
    _end_with(result, out, "something was lost under load")


@main.command()
@_model_option("llama-7b")
@click.option("--replicas", type=_COUNT, default=8, show_default=True, help="Simulated ones, an H200 each.")
@click.option("--adapters", type=_COUNT, default=4000, show_default=True, help="Of ranks 64, 32, 16 and 8 in turn.")
@click.option("--requests", type=_COUNT, default=8000, show_default=True)
@click.option("--rate", type=_ABOVE_0, default=200.0, show_default=True, help="Requests a second.")
@click.option("--alpha", type=click.FloatRange(0), default=1.0, show_default=True, help="Of the power law.")
@click.option("--host-gigabytes", type=_ABOVE_0, default=64.0, show_default=True, help="For adapters, a replica.")
@click.option("--disk-gigabytes", type=_ABOVE_0, default=2.0, show_default=True, help="A second, a replica.")
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option("--real", type=_COUNT, help="Also ask so many replicas of the embedded model here, under Ray, and "
              "compare; needs the extra ray.")  # fmt: skip
@click.option("--real-requests", type=_COUNT, default=360, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result there.")
def fleet(model, replicas, adapters, requests, rate, alpha, host_gigabytes, disk_gigabytes, seed, real, real_requests,
          out):  # fmt: skip
    """Rules by which requests are shared among replicas, in simulated time.

    With --real, a fleet on this machine must have the simulated share of requests that find their adapter in the pool.
    """
    from slora_jax.bench.fleet import Scenario, check_real, table

    scenario = Scenario(replicas, adapters, requests, rate, alpha, host_gigabytes, disk_gigabytes, seed)
    result = {"command": command_line()} | scenario.run(_shape(model).config)
    click.echo(table(result["rules"]), err=True)
    if real is None:
        _print_or_write(result, out)
        return
    checked = check_real(real, real_requests, seed, lambda line: click.echo(line, err=True))
    _end_with(result | checked, out, "the real fleet does not do what the simulated one does")


@main.command()
@click.option("--adapters", type=_COUNT, default=100, show_default=True, help="Adapters to load.")
@click.option("--tokens", type=_COUNT, default=200, show_default=True, help="Least tokens of the stream in each case.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def loads(adapters: int, tokens: int, out: Path | None):
    """Gaps between the tokens of a running stream while adapters load, against the same stream alone."""
    from slora_jax.bench.loads import run_loads, table

    result = {"command": command_line()} | run_loads(adapters, tokens)
    click.echo(table(result), err=True)
    _end_with(result, out, "loads hold a running stream up")


@main.command()
@click.option("--requests", type=_COUNT, default=16, show_default=True, help="Of a batch; half of them constrained.")
@click.option("--tokens", type=_COUNT, default=64, show_default=True, help="Of each answer.")
@click.option("--repeats", type=_COUNT, default=3, show_default=True, help="Runs of each batch; the median counts.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def structured(requests: int, tokens: int, repeats: int, out: Path | None):
    """What grammars cost: the embedded model, half of a batch constrained by a schema, and none."""
    from slora_jax.bench.structured import run_structured

    _print_or_write(run_structured(requests, tokens, repeats, command_line()), out)


@main.command()
@click.argument("url")
@click.option("--requests", type=_COUNT, default=1000, show_default=True)
@click.option("--clients", type=_COUNT, default=512, show_default=True, help="Saturated: so many requests at a time.")
@click.option("--trace", type=click.Choice(["saturated", "open"]), default="saturated", show_default=True)
@click.option("--rate", type=_ABOVE_0, default=2.0, show_default=True, help="Open: requests a second.")
@click.option(
    "--cv", type=_ABOVE_0, default=1.0, show_default=True, help="Open: coefficient of variation of intervals."
)
@click.option("--model", "models", multiple=True, help="Of the server, by name; may be repeated [default: its first].")
@click.option("--model-prefix", help="All of the server's models whose names begin so, such as its adapters.")
@click.option(
    "--choice",
    type=click.Choice(["uniform", "power", "turn"]),
    help="Of a model among several [default: as the engine's workload, uniform when saturated and else by power law].",
)
@click.option("--alpha", type=click.FloatRange(0), default=1.0, show_default=True, help="Exponent of the power law.")
@_LONGEST
@_LENGTHS
@click.option("--vocab-size", type=click.IntRange(2), default=32000, show_default=True,
              help="Of the model: token ids of prompts are below.")  # fmt: skip
@click.option("--route", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--seed", type=_SEED, default=42, show_default=True)
@click.option("--processes", type=_COUNT, default=4, show_default=True, help="That the clients are shared among.")
@click.option("--warm-up", type=click.IntRange(0), default=64, show_default=True, help="Requests ahead, not counted.")
@click.option("--calibrate/--no-calibrate", default=True, show_default=True,
              help="Measure first what the clients themselves can take.")  # fmt: skip
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Better by the environment [OPENAI_API_KEY].")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def serve(url, requests, clients, trace, rate, cv, models, model_prefix, choice, alpha, longest, lengths, vocab_size,
          route, seed, processes, warm_up, calibrate, api_key, out):  # fmt: skip
    """Load on the OpenAI-compatible server at URL: the workload of `throughput`, as streams over HTTP.

    Tokens are those that the server counts. Gaps are between the events of a stream that bring text, however many
    tokens each brings.
    """
    from slora_jax.bench.serve import Load, run_serve, table

    is_open = trace == "open"
    load = Load(
        requests=requests,
        clients=None if is_open else clients,
        rate=rate,
        cv=cv,
        choice=choice or ("power" if is_open else "uniform"),
        alpha=alpha,
        lengths=lengths or Lengths.below(longest),
        vocab_size=vocab_size,
        route=route,
        seed=seed,
    )
    command = command_line(without=("out", "api_key"))
    result = run_serve(url, load, models, model_prefix, processes, warm_up, calibrate, api_key, command)
    click.echo(table(result), err=True)
    _print_or_write(result, out)
    if result["errors"]:
        raise click.ClickException("not every request was answered; see above")


@main.command()
@click.option("--step-ms", type=_ABOVE_0, default=20.0, show_default=True, help="Of the device that only sleeps.")
@click.option(
    "--launch-ms",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="For which the host is busy launching a step; 5 is what Llama-3.1-8B takes on an H200.",
)
@click.option("--requests", type=_COUNT, default=1000, show_default=True)
@click.option("--clients", type=_COUNT, default=512, show_default=True, help="At a time; the device has room for all.")
@_LONGEST
@_LENGTHS
@click.option("--max-batch-tokens", type=_COUNT, default=1024, show_default=True)
@click.option("--processes", type=_COUNT, default=1, show_default=True, help="That the clients are shared among.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def standin(step_ms, launch_ms, requests, clients, longest, lengths, max_batch_tokens, processes, out):
    """What streaming over HTTP costs the engine's loop, without a GPU: over a device that only sleeps."""
    from slora_jax.bench.serve import Load
    from slora_jax.bench.standin import Pace, run_standin, table

    load = Load(requests, clients, 1.0, 1.0, "uniform", 1.0, lengths or Lengths.below(longest), 2, "completions", 42)
    result = run_standin(Pace(step_ms / 1e3, launch_ms / 1e3), load, max_batch_tokens, processes, command_line())
    click.echo(table(result), err=True)
    _print_or_write(result, out)


def _setting(text: str) -> dict[str, str]:
    """Fields of the configuration from ``field=value,field=value``."""
    fields = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise click.BadParameter(f"{part} is not FIELD=VALUE, such as kv_cache_dtype=fp8")
        fields[name] = value
    return fields


@main.command()
@click.argument("settings", nargs=-1, required=True, metavar="FIELD=VALUE[,FIELD=VALUE...] ...")
@click.option("--baseline", default="", metavar="FIELD=VALUE,...", help="Settings that the others are compared with.")
@click.option("--texts", type=_COUNT, default=8, show_default=True, help="For the base model and for each adapter.")
@click.option("--turns", type=_COUNT, default=4, show_default=True, help="Questions with their answers in a text.")
@click.option("--tokens", type=_COUNT, default=32, show_default=True, help="Of each greedy answer, at most.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def accuracy(settings: tuple[str, ...], baseline: str, texts: int, turns: int, tokens: int, out: Path | None):
    """What settings do to the embedded model's answers and its adapters': perplexity, agreement.

    For example: accuracy dtype=bfloat16 kv_cache_dtype=fp8 quantization=fp8. As a setting, model=FOLDER is another
    checkpoint of the same model, such as a quantised one; the embedded adapters go with it.
    """
    from slora_jax.bench.accuracy import run_accuracy, table

    try:
        parsed = [_setting(setting) for setting in settings]
        result = run_accuracy(parsed, _setting(baseline), texts, turns, tokens, command_line())
    except SLoRAError as e:
        raise click.ClickException(str(e)) from None
    click.echo(table(result), err=True)
    _print_or_write(result, out)


if __name__ == "__main__":
    main()
