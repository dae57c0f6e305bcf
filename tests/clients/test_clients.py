"""The server as users of four client libraries meet it: OpenAI's client, LangChain, LiteLLM and ``llm``.

Runs where SLORA_CLIENTS_PYTHON names a Python that has the versions of ``requirements.txt``. They need other versions
of packages than this project does, and so a Python of their own.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENTS = ("openai", "langchain", "litellm", "llm")
TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\nAnswer with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def python():
    python = os.environ.get("SLORA_CLIENTS_PYTHON")
    if not python:
        pytest.skip(
            "needs client libraries: set SLORA_CLIENTS_PYTHON to a Python that has tests/clients/requirements.txt"
        )
    return python


@pytest.fixture(scope="module")
def url(python, tmp_path_factory):
    """Of a server of the embedded model, with the keys and the adapter that ``served.py`` names."""
    folder = tmp_path_factory.mktemp("clients")
    # The embedded model's own template shows no tools.
    shutil.copytree(ROOT / "slora_jax" / "demo" / "adapters" / "json", folder / "tooled")
    (folder / "tooled" / "chat_template.jinja").write_text(TEMPLATE)
    once = {f"once-{name}": {"requests_per_minute": 1} for name in CLIENTS}
    keys = [
        {"name": name, "sha256": hashlib.sha256(f"sk-{name}".encode()).hexdigest(), **limits}
        for name, limits in ({"everybody": {}} | once).items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--adapter", f"tooled={folder / 'tooled'}"]
    flags += ["--api-keys-file", str(folder / "keys.yaml")]
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, "serve.py", *flags], cwd=ROOT, stdout=file, stderr=file)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/ready", server, log)
        yield f"http://127.0.0.1:{port}/v1"
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


def wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not get ready: {log.read_text()}")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client(python, url, name):
    # It must not see this interpreter's packages, nor the keys of the user who runs it.
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "OPENAI_API_KEY", "OPENAI_BASE_URL")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    ended = subprocess.run(
        [python, str(HERE / f"with_{name}.py"), url], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
