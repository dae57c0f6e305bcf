"""Runs the commands of READMEs as a reader would: every fenced block marked ``bash`` or ``python``, in order.

A ``bash`` block that starts a server (``serve.py``, or Ray's ``serve run``) goes on in the background until the next
such block, or the last one, and is then asked to stop with Ctrl-C's signal; the blocks after it wait until it answers.
Blocks of other kinds, such as ``console`` for machines with a GPU, are shown to readers and not run.
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
SERVER = re.compile(r"serve\.py|serve run")
PORT = re.compile(r"--port (\d+)|http://127\.0\.0\.1:(\d+)")
START_SECONDS = 900


def main(readmes: list[str]) -> None:
    server = None
    try:
        for kind, text in (block for readme in readmes for block in BLOCK.findall(Path(readme).read_text())):
            if kind not in ("bash", "python"):
                continue
            print(f"\n=== {kind}\n{text.rstrip()}\n---", flush=True)
            if kind == "bash" and SERVER.search(text) and "--help" not in text:
                if server is not None:
                    stop(server)
                server = subprocess.Popen(["bash", "-euo", "pipefail", "-c", text], start_new_session=True)
                port = PORT.search(text)
                wait_until_healthy(server, f"http://127.0.0.1:{port[1] or port[2] if port else 8000}/health")
            elif kind == "bash":
                subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
            else:
                subprocess.run(["uv", "run", "python", "-c", text], check=True)
        if server is None:
            sys.exit("no README starts a server")
        stop(server)
    finally:
        if server is not None and server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def stop(server: subprocess.Popen) -> None:
    os.killpg(server.pid, signal.SIGINT)
    code = server.wait(timeout=120)
    # The signal reaches Ray's command twice, once through uv: it ends with 1 where the second comes before it is done.
    if code not in ((0, 1) if "serve run" in server.args[-1] else (0,)):
        sys.exit(f"the server ended with exit code {code} after Ctrl-C")


def wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode} before it answered")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server did not answer {url} within {START_SECONDS} s")


if __name__ == "__main__":
    main(sys.argv[1:])
