"""Command line of the benchmarks."""

import json
from pathlib import Path

import click


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
@click.option("--steps", default=200, show_default=True, help="Timed steps of each case.")
def host(steps: int):
    """The host's work for each step, without a device: it must stay well below a step of the GPU."""
    from slora_jax.bench.host import run_host

    click.echo(json.dumps(run_host(steps), indent=2))


if __name__ == "__main__":
    main()
