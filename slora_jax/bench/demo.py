"""The embedded model and its adapters on a CPU: this engine against transformers + PEFT on the same cores."""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from slora_jax import Engine, Request, SamplingParams
from slora_jax.config import EngineConfig, build_config
from slora_jax.demo import with_demo

_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What does a baker do all day?",
    "Name three animals that live in the sea.",
    "How many days are there in a week?",
    "What is the largest planet?",
    "Tell me something about the moon.",
)


def run_demo(num_requests: int, num_tokens: int, repeats: int, torch_python: str | None) -> dict:
    """Times both sides on the same prompts; each generates ``num_tokens`` greedy tokens a request.

    PEFT serves one adapter at a time, all of that adapter's requests in one padded batch.
    """
    config = with_demo(build_config({"model": "demo"}))
    engine = Engine.create(config, progress=False)
    names = sorted(config.adapters)[:4]
    workload = []
    for i in range(num_requests):
        messages = [{"role": "user", "content": _QUESTIONS[i % len(_QUESTIONS)]}]
        workload.append((names[i % len(names)], tuple(engine.tokenizer.encode_chat(messages))))
    engine.start()
    try:
        ours = [_time_engine(engine, workload, num_tokens) for _ in range(repeats + 1)][1:]
    finally:
        engine.close()
    result = {
        "command": f"python -m slora_jax.bench demo --requests {num_requests} --tokens {num_tokens} "
        f"--repeats {repeats}" + (" --torch-python PYTHON" if torch_python else ""),
        "machine": cpu(),
        "workload": {"requests": num_requests, "tokens_each": num_tokens, "adapters": names, "dtype": "float32"},
        "slora_jax": _summary(ours, num_requests * num_tokens),
    }
    if torch_python is not None:
        peft = _time_peft(torch_python, workload, config, num_tokens, repeats)
        result["peft"] = _summary(peft["seconds"], num_requests * num_tokens) | {"versions": peft["versions"]}
        medians = (result[side]["tokens_per_second"]["median"] for side in ("slora_jax", "peft"))
        result["speedup"] = round(next(medians) / next(medians), 2)
    return result


def _time_engine(engine: Engine, workload: list[tuple[str, tuple[int, ...]]], num_tokens: int) -> float:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    generations = [engine.submit(Request(prompt, adapter, sampling)) for adapter, prompt in workload]
    results = [generation.result() for generation in generations]
    seconds = time.perf_counter() - start
    assert all(len(r.completions[0].token_ids) == num_tokens for r in results), "a request did not get its tokens"
    return seconds


def _time_peft(torch_python: str, workload, config: EngineConfig, num_tokens: int, repeats: int) -> dict:
    job = {
        "model": config.model,
        "adapters": {name: config.adapters[name] for name, _ in workload},
        "requests": [[name, list(prompt)] for name, prompt in workload],
        "num_tokens": num_tokens,
        "repeats": repeats,
    }
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job))
        script = Path(__file__).with_name("peft_baseline.py")
        # Not as a script, whose folder Python would search for modules: transformers imports one named like ours.
        command = [torch_python, "-c", script.read_text(), job_file]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _summary(seconds: list[float], tokens: int) -> dict:
    rates = [round(tokens / s, 1) for s in seconds]
    return {
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": {"median": statistics.median(rates), "runs": rates},
    }


def cpu() -> dict[str, object]:
    """What a result measured on a CPU must say of where that was."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
