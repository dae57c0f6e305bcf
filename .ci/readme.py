"""Runs a README's commands as a reader would: every fenced block marked ``bash`` or ``python``, in order.

A ``bash`` block that starts the server goes on in the background until the last block is done, and is then asked to
stop with Ctrl-C's signal; the blocks after it wait until it answers. Blocks of other kinds, such as ``console`` for
machines with a GPU, are shown to readers and not run.
"""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEALTH = "http://127.0.0.1:8000/health"
START_SECONDS = 900


def main(readme: str) -> None:
    server = None
    try:
        for kind, text in BLOCK.findall(Path(readme).read_text()):
            if kind not in ("bash", "python"):
                continue
            print(f"\n=== {kind}\n{text.rstrip()}\n---", flush=True)
            if kind == "bash" and "serve.py" in text and "--help" not in text:
                server = subprocess.Popen(["bash", "-euo", "pipefail", "-c", text], start_new_session=True)
                wait_until_healthy(server)
            elif kind == "bash":
                subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
            else:
                subprocess.run(["uv", "run", "python", "-c", text], check=True)
        if server is None:
            sys.exit("the README starts no server")
        os.killpg(server.pid, signal.SIGINT)
        if code := server.wait(timeout=60):
            sys.exit(f"the server ended with exit code {code} after Ctrl-C")
    finally:
        if server is not None and server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_healthy(server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode} before it answered")
        try:
            with urllib.request.urlopen(HEALTH, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server did not answer {HEALTH} within {START_SECONDS} s")


if __name__ == "__main__":
    main(sys.argv[1])
