"""The embedded model behind a real ``serve.py``, in a process of its own, for benchmarks that ask over HTTP."""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 300
"""How long a client waits for the next bytes of an answer."""

_SERVE = Path(__file__).parents[2] / "serve.py"


class Served(NamedTuple):
    """A server that answers: where, and as which process."""

    url: str
    pid: int


class Failed(Exception):
    """A request was answered otherwise than by 200; or its answer broke off, with ``status`` 0."""

    def __init__(self, status: int, message: str):
        super().__init__(f"{status or 'broken off'}: {message}")
        self.status = status


@contextlib.contextmanager
def demo_server(flags: Sequence[str] = ("--max-model-len", "512")) -> Iterator[Served]:
    """Serves the embedded model on a free port, with adapters to be loaded over HTTP, until the context ends.

    Args:
      flags: more flags of ``serve.py``.

    Raises:
      RuntimeError: it ended at the start; what it said is in the message.
    """
    command = [sys.executable, str(_SERVE), "--port", "0", "--allow-adapter-loading", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(process)  # which waits for its end
            stack.callback(process.terminate)
            for line in process.stdout:
                if line.startswith("Serving"):
                    yield Served(next(word for word in line.split() if word.startswith("http://")), process.pid)
                    return
            log.seek(0)
            raise RuntimeError(f"the server did not start: {log.read()[-1000:]}")


def connect(url: str, receive_bytes: int | None = None) -> http.client.HTTPConnection:
    """A connection of its own to a server.

    Args:
      receive_bytes: of what the server sends, as much as the kernel is to take ahead of the reader; its own choice if
        None.
    """
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    if receive_bytes is not None:
        connection.sock = socket.socket()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.sock.settimeout(TIMEOUT_SECONDS)
        connection.sock.connect((parts.hostname, parts.port))
    return connection


def ask(url: str, path: str, fields: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Sends ``fields`` as JSON, or asks without a body where there are none; returns the status and what JSON came."""
    with contextlib.closing(connect(url)) as connection:
        send(connection, path, fields)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def send(connection: http.client.HTTPConnection, path: str, fields: dict[str, Any] | None) -> None:
    """Sends one request, whose answer is ``connection.getresponse()``."""
    if fields is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})


def post(url: str, path: str, **fields: Any) -> Any:
    """Sends ``fields`` as JSON, and returns what came. Raises Failed if the status is not 200."""
    status, answer = ask(url, path, fields)
    if status != 200:
        raise Failed(status, answer["error"]["message"])
    return answer


def load_adapter(url: str, name: str, folder: Path, **more: bool) -> None:
    """Registers an adapter over HTTP. Raises Failed if that is refused."""
    post(url, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)


def write_variant(source: Path, folder: Path, strength: float) -> Path:
    """Writes another adapter's PEFT folder, whose change of the base model is ``strength`` times the source's."""
    shutil.copytree(source, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * strength}))
    return folder
