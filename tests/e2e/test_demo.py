"""The embedded model with its adapters through both faces: what a newcomer sees."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import slora_jax
from slora_jax.errors import InvalidRequest, UnknownAdapter

ROOT = Path(__file__).parent.parent.parent
QUESTION = "What is the capital of France?"

STYLES = {
    "pirate": lambda text: text.startswith("Arr"),
    "json": lambda text: "Paris" in json.loads(text)["answer"],
    "haiku": lambda text: len(text.strip().splitlines()) == 3,
    "emoji": lambda text: re.match(r"[^\w\s]", text) is not None,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _close_engines():
    yield
    slora_jax.shutdown()


def ask(prompts, adapters, **options):
    sampling = {"max_tokens": 48, "temperature": 0.0}
    return slora_jax.generate(prompts, adapters, chat=True, sampling=sampling, progress=False, **options)


def test_a_notebook_gets_visibly_different_and_correct_answers():
    answers = {a.adapter: a.text for a in ask(QUESTION, [None, *STYLES])}
    assert len(set(answers.values())) == len(answers)
    for adapter, text in answers.items():
        assert "Paris" in text, (adapter, text)
        if adapter is not None:
            assert STYLES[adapter](text), (adapter, text)
    assert not any(style_fits(style, answers[None]) for style in STYLES.values()), answers[None]


def style_fits(style, text: str) -> bool:
    try:
        return style(text)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def test_a_second_call_does_not_load_again_and_streams():
    first = ask(QUESTION, "pirate")
    start = time.perf_counter()
    pieces = list(ask(QUESTION, "pirate", stream=True))
    assert time.perf_counter() - start < 20
    assert len(pieces) > 3
    assert "".join(pieces) == first.text


def test_bad_calls_say_what_was_wrong():
    with pytest.raises(InvalidRequest, match=r"2 .* 3|3 .* 2"):
        ask([QUESTION] * 2, ["pirate", "json", None])
    with pytest.raises(UnknownAdapter, match=r"pirat.*pirate"):
        ask(QUESTION, "pirat")


def test_the_server_answers_with_curl_and_stops_on_ctrl_c():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, server)
        models = {m["id"]: m for m in call(f"{url}/v1/models")["data"]}
        base = next(name for name, m in models.items() if not m.get("parent"))
        assert {name for name, m in models.items() if m.get("parent") == base} == set(STYLES)
        answers = {}
        # First the adapter that changes all modules: the shapes of its steps then serve the others as well.
        for model in sorted(models, key="haiku".__ne__):
            body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
            reply = call(f"{url}/v1/chat/completions", body | {"temperature": 0, "max_tokens": 48})
            answers[model] = reply["choices"][0]["message"]["content"]
        notebook = {a.adapter or base: a.text for a in ask(QUESTION, [None, *STYLES])}
        assert answers == notebook
        with pytest.raises(urllib.error.HTTPError) as refused:
            call(f"{url}/v1/completions", {"model": "nobody", "prompt": "x"})
        assert refused.value.code == 404
        refused.value.close()
        # As under `uv run`, where the terminal and uv both send it.
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=60)
        assert server.returncode == 0
        assert "Traceback" not in output
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def wait_until_healthy(url: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, server.stdout.read()
        try:
            assert call(f"{url}/health")["status"] == "ok"
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError("the server did not get healthy")


def call(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())
