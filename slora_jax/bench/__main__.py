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


@main.command()
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--model", default="configs/shapes/llama-7b.yaml", show_default=True, help="YAML file of a shape.")
@click.option("--requests", default=1000, show_default=True)
@click.option("--seed", default=42, show_default=True)
@click.option("--longest", default=512, show_default=True, help="Prompt and output lengths are in [8, this).")
@click.option("--max-sequences", default=512, show_default=True)
@click.option("--max-batch-tokens", default=1024, show_default=True)
@click.option("--prefix-cache/--no-prefix-cache", default=False, show_default=True)
@click.option("--pool-gigabytes", type=float, help="Size of the pool; without it the engine's own choice.")
@click.option("--trace", type=click.Choice(["saturated", "open"]), default="saturated", show_default=True)
@click.option("--rate", default=2.0, show_default=True, help="Open trace: requests a second.")
@click.option("--cv", default=1.0, show_default=True, help="Open trace: coefficient of variation of the intervals.")
@click.option("--alpha", default=1.0, show_default=True, help="Open trace: exponent of the adapters' power law.")
@click.option("--profile", type=click.Path(path_type=Path), help="Record ten steps there, and print where time goes.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the JSON line to this file.")
def throughput(cases, model, requests, seed, longest, max_sequences, max_batch_tokens, prefix_cache,
               pool_gigabytes, trace, rate, cv, alpha, profile, out):  # fmt: skip
    """The engine on the paper's synthetic workload, with random weights; one JSON line a CASE.

    A CASE is "base" or a setting of the paper and a number of adapters, such as S2:100. All run on one engine.
    """
    from slora_jax.bench.throughput import profile_of, run_throughput
    from slora_jax.bench.workload import Case, OpenTrace

    try:
        parsed = [Case.parse(case) for case in cases or ("base",)]
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    compiled = 0
    for case, result in zip(
        parsed,
        run_throughput(
            model=model,
            cases=parsed,
            requests=requests,
            seed=seed,
            longest=longest,
            scheduler={
                "max_sequences": max_sequences,
                "max_batch_tokens": max_batch_tokens,
                "prefix_cache": prefix_cache,
            },
            pool={"gigabytes": pool_gigabytes},
            trace=OpenTrace(rate, cv, alpha) if trace == "open" else None,
            profile=profile,
            command=command_line(),
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
@click.option("--steps", default=200, show_default=True, help="Timed steps of each case.")
def host(steps: int):
    """The host's work for each step, without a device: it must stay well below a step of the GPU."""
    from slora_jax.bench.host import run_host

    click.echo(json.dumps(run_host(steps), indent=2))


if __name__ == "__main__":
    main()
