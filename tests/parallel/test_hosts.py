"""Two processes with two CPU devices each serve one model, as two hosts would."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
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


SLOW_TO_COMPILE = """
import sys, time
from slora_jax.engine import programs
prepare = programs.Programs.prepare

def prepare_late(self, shapes, *arguments, **options):
    if len(self) == 0:
        time.sleep(40)  # CPU devices wait for each other for 30 s
    prepare(self, shapes, *arguments, **options)

programs.Programs.prepare = prepare_late
sys.path.insert(0, ".")
import serve
serve.main()
"""


CPUS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": DEVICES}


def start(host: int, environment: dict[str, str], *flags: str, program: str | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *(["-c", program] if program else ["serve.py"]), "--host-id", str(host), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_until_healthy(url: str, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError("the server did not answer")


@contextlib.contextmanager
def two_hosts(*flags: str, second: str | None = None, environments: tuple[dict[str, str], ...] = (CPUS, CPUS)):
    """The server's address and the two processes, when they serve.

    Args:
      flags: more of ``serve.py``'s; the last of a flag counts.
      second: what the second one runs in place of ``serve.py``.
      environments: of each process, beside this one's: which devices it has.
    """
    port = free_port()
    common = ("--model", str(CASE / "model"), "--dtype", "float32", "--tp", "4", "--num-hosts", "2")
    common += ("--coordinator", f"127.0.0.1:{free_port()}", "--port", str(port), "--no-compilation-cache")
    common += ("--pool-pages", "60", "--max-batch-tokens", "32", "--max-sequences", "16")
    first, other = environments
    processes = [start(0, first, *common, *flags), start(1, other, *common, *flags, program=second)]
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", processes)
        yield f"http://127.0.0.1:{port}", processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its code, and the last line that it said."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.rstrip().rpartition("\n")[2]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_two_processes_answer_mixed_adapters_like_the_oracle_and_stop_by_a_signal_to_either(host, number):
    requests = json.loads((CASE / "expected.json").read_text())["requests"]
    tokenizer = Tokenizer.from_folder(CASE / "model")
    with two_hosts("--adapter-dir", str(CASE / "adapters"), "--no-warm-up") as (url, processes):

        def ask(request) -> str:
            body = {"model": request["adapter"] or "model", "prompt": request["prompt"], "max_tokens": 32}
            answer = post(f"{url}/v1/completions", body | {"temperature": 0, "ignore_eos": True})
            return answer["choices"][0]["text"]

        with ThreadPoolExecutor(len(requests)) as clients:
            texts = list(clients.map(ask, requests))
        assert texts == [tokenizer.decode(request["tokens"][:32]) for request in requests]
        assert len({request["adapter"] for request in requests}) > 2
        body = {"model": "model", "prompt": "a", "max_tokens": 40, "temperature": 0, "guided_regex": "[xyz]{6}"}
        assert re.fullmatch("[xyz]{6}", post(f"{url}/v1/completions", body)["choices"][0]["text"])
        processes[host].send_signal(number)  # the second asks the first, which stops as by Ctrl-C and tells it to
        assert [ended(process) for process in processes] == [(0, "Stopped.")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence_and_its_clients_with_an_error(killed):
    with two_hosts("--no-warm-up") as (url, processes), ThreadPoolExecutor(1) as clients:
        body = {"model": "model", "prompt": "a", "temperature": 0, "ignore_eos": True}
        post(f"{url}/v1/completions", body | {"max_tokens": 2})
        running = clients.submit(post, f"{url}/v1/completions", body | {"max_tokens": 500})
        time.sleep(1)
        before = time.monotonic()
        processes[killed].kill()
        sentence = f"host {killed} was lost (its process ended); start all hosts again"
        assert ended(processes[1 - killed]) == (70, f"Error: {sentence}")
        assert time.monotonic() - before < 30
        if killed == 1:
            with pytest.raises(urllib.error.HTTPError) as refused:
                running.result()
            answer = refused.value.read().decode()
            assert refused.value.code == 500 and sentence in answer, answer
        else:
            assert running.exception() is not None


@pytest.mark.slow
def test_warming_up_takes_as_long_as_the_slowest_host_however_long():
    with two_hosts("--warm-up", "--max-sequences", "4", "--max-model-len", "64", second=SLOW_TO_COMPILE) as (
        url,
        processes,
    ):
        answer = post(f"{url}/v1/completions", {"model": "model", "prompt": "a", "max_tokens": 4, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 4
        processes[1].send_signal(signal.SIGTERM)
        assert [ended(process) for process in processes] == [(0, "Stopped.")] * 2
