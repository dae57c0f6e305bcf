"""Two processes with two CPU devices each serve one model, as two hosts would."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.engine_cases import FIXTURES

ROOT = Path(__file__).parents[2]
DEVICES = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
CASE = FIXTURES / "smollm_gqa3"


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(host: int, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "serve.py", "--host-id", str(host), *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": DEVICES},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_until_healthy(url: str, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError("the server did not answer")


@pytest.mark.slow
@pytest.mark.parametrize(("host", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_two_processes_answer_mixed_adapters_like_the_oracle_and_stop_by_a_signal_to_either(host, number):
    port = free_port()
    flags = ["--model", str(CASE / "model"), "--adapter-dir", str(CASE / "adapters"), "--dtype", "float32"]
    flags += ["--tp", "4", "--num-hosts", "2", "--coordinator", f"127.0.0.1:{free_port()}", "--port", str(port)]
    flags += ["--no-compilation-cache", "--pool-pages", "60", "--max-batch-tokens", "32", "--max-sequences", "16"]
    requests = json.loads((CASE / "expected.json").read_text())["requests"]
    tokenizer = Tokenizer.from_folder(CASE / "model")
    processes = [start(host, *flags) for host in (0, 1)]
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, processes)

        def ask(request) -> str:
            body = {"model": request["adapter"] or "model", "prompt": request["prompt"], "max_tokens": 32}
            answer = post(f"{url}/v1/completions", body | {"temperature": 0, "ignore_eos": True})
            return answer["choices"][0]["text"]

        with ThreadPoolExecutor(len(requests)) as clients:
            texts = list(clients.map(ask, requests))
        assert texts == [tokenizer.decode(request["tokens"][:32]) for request in requests]
        assert len({request["adapter"] for request in requests}) > 2
        processes[host].send_signal(number)  # the second asks the first, which stops as by Ctrl-C and tells it to
        for process in processes:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
            assert output.rstrip().endswith("Stopped."), output
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
