"""Command line of the benchmarks."""

import json
from pathlib import Path

import click

from slora_jax.bench.timing import command_line


@click.group(context_settings={"max_content_width": 100})
def main():
    """Measure slora-jax. Each command prints a table for people and writes JSON."""


@main.command()
@click.option("--requests", default=16, show_default=True, help="Requests, dealt to the demo adapters in turn.")
@click.option("--tokens", default=64, show_default=True, help="Tokens generated for each request.")
@click.option("--repeats", default=3, show_default=True, help="Timed runs of each side; the median counts.")
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
    text = json.dumps(result, indent=2)
    if out:
        out.write_text(text + "\n")
    else:
        click.echo(text)


@main.command()
@click.option("--only", default="*", show_default=True, metavar="GLOB", help="Cases to measure, by name.")
@click.option("--scale", default=1, show_default=True, help="Divide every size by this: to try the benchmark itself.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time cuDNN's attention too.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def kernels(only: str, scale: int, peers: bool, out: Path | None):
    """Attention, gathered LoRA and decode steps against copy bandwidth and cuDNN on this device."""
    from slora_jax.bench.kernels import run_kernels

    if not run_kernels(only, scale, peers, command_line(), out):
        raise click.ClickException("a case failed; see above")


@main.command()
@click.argument("op")
@click.argument("key")
@click.option("--grid", required=True, help='Values of each block size, as JSON: {"ranks": [1, 2], "num_warps": [4]}.')
@click.option("--only", metavar="GLOB", help="Kernel cases to time; without it those that the op serves.")
@click.option("--scale", default=1, show_default=True, help="As in `kernels`.")
def tune(op: str, key: str, grid: str, only: str | None, scale: int):
    """Times an op of pallas_kernels/tuned for every combination of block sizes, e.g. `tune lora_shrink decode`."""
    from slora_jax.bench.kernels import run_tuning

    if not run_tuning(op, key, json.loads(grid), only, scale):
        raise click.ClickException("no combination worked; see above")


if __name__ == "__main__":
    main()
