"""Replicas under a Ray of their own, in processes beside this one, for benchmarks and tests that ask over HTTP.

Run as a module it is that other process: it serves what it reads on its standard input, one JSON object a line, each
in place of the one before, and ends with the input.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

_SERVED = "Served"


class RayFleet:
    """A fleet that answers.

    Attributes:
      url: where.
      admin_key: what its administrators send.
    """

    admin_key = "the-admin-key"

    def __init__(self, url: str, process: subprocess.Popen[str]):
        self.url = url
        self._process = process

    def serve(self, **fields: Any) -> None:
        """Serves with these fields (see ``fleet.app.app``), in place of others replica by replica; returns when all do.

        Raises:
          RuntimeError: the other process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_SERVED):
                return
        raise RuntimeError("the fleet's process ended")

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ServeReplica" in (line := " ".join(process.cmdline())) and ":Replica" in line:
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_fleet(**fields: Any) -> Iterator[RayFleet]:
    """Serves with these fields on a free port, until the context ends.

    Raises:
      RuntimeError: it did not come to that; what was said is in the message.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = dict(os.environ) | {"SLORA_ADMIN_KEY": RayFleet.admin_key, "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray would otherwise start its workers as this process was started, if that was by `uv run`.
    environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "slora_jax.bench.ray_fleet", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        fleet = RayFleet(f"http://127.0.0.1:{port}", process)
        try:
            try:
                fleet.serve(**fields)
            except (RuntimeError, OSError) as failure:
                log.seek(0)
                raise RuntimeError(f"the fleet did not start: {log.read()[-4000:]}") from failure
            yield fleet
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Asks for the end, and sees to it that nothing is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(children, timeout=10)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.stdout.close()


def _serve_from(lines: Iterator[str], port: int) -> None:
    import ray
    from ray import serve

    from slora_jax.fleet.app import app

    def fields_of(line: str) -> Mapping[str, Any]:
        return json.loads(line)

    # Ray counts cores, of which there may be fewer than replicas; they share them.
    ray.init(num_cpus=64, include_dashboard=False, log_to_driver=True, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    try:
        for line in lines:
            serve.run(app(dict(fields_of(line))), name="slora-jax", route_prefix="/")
            print(_SERVED, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    _serve_from(iter(sys.stdin.readline, ""), int(sys.argv[1]))
