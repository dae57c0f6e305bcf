"""SIGTERM: new requests are sent elsewhere, running ones end, and then the process does."""

import contextlib
import signal
import socket
import threading
import time

import pytest

from slora_jax.api.app import create_app
from slora_jax.api.drain import Drain, Draining
from slora_jax.api.server import Server, listen
from tests.api.test_server import ask, completion, connect, process_serving, request_bytes, unchunk, wait_until
from tests.helpers.fake_engine import WAITS


@contextlib.contextmanager
def served(engine):
    drain = Drain()
    server = Server(create_app(engine, drain=drain), listen("127.0.0.1", 0), on_stop=engine.close, drain=drain)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, thread
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_running_requests_end_and_new_ones_are_refused(engine, caplog):
    with served(engine) as (server, thread):
        with connect(server) as stream, connect(server) as whole:
            stream.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
            whole.sendall(request_bytes("/v1/completions", completion(WAITS)))
            wait_until(lambda: len(engine.running) == 2)
            server.drain(60)
            server.drain(0)  # the first one counts
            wait_until(lambda: ask(server, "/ready")[0] == 503)
            status, body = ask(server, "/v1/completions", completion("x"))
            assert (status, body["error"]["code"]) == (503, "draining")
            assert ask(server, "/health")[0] == 200
            time.sleep(0.2)
            assert thread.is_alive(), "it waits for those that run"
            engine.go.set()
            text = unchunk(b"".join(iter(lambda: stream.recv(4096), b"")))
            assert text.endswith("data: [DONE]\n\n") and "error" not in text
            assert whole.recv(100).startswith(b"HTTP/1.1 200")
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            connect(server)
    assert not caplog.records


def test_a_server_without_requests_ends_at_once(engine):
    with served(engine) as (server, thread):
        assert ask(server, "/ready")[0] == 200
        server.drain(60)
        thread.join(10)
        assert not thread.is_alive()


def test_what_does_not_end_in_time_is_told(engine, caplog):
    with served(engine) as (server, thread):
        with connect(server) as stream:
            stream.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
            wait_until(lambda: len(engine.running) == 1)
            start = time.monotonic()
            server.drain(0.5)
            assert '"code":"engine_stopped"' in unchunk(b"".join(iter(lambda: stream.recv(4096), b"")))
            assert 0.5 <= time.monotonic() - start < 10
        thread.join(10)
        assert not thread.is_alive()
    assert "grace period" in caplog.text


def test_the_count_of_running_requests():
    drain = Drain()
    with drain.running():
        assert not drain.is_done
        drain.begin()
        assert not drain.is_done
        with pytest.raises(Draining), drain.running():
            pytest.fail("it is let in")
    assert drain.is_done


SERVE_FAKE = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.helpers.fake_engine import FakeEngine
    from slora_jax.api.app import create_app
    from slora_jax.api.drain import Drain
    from slora_jax.api.server import run_server
    engine, drain = FakeEngine(Path(sys.argv[2]), step_seconds=0.02), Drain()
    engine.start()
    run_server(create_app(engine, drain=drain), "127.0.0.1", 0, on_stop=engine.close, drain=drain, grace_s=60,
               on_ready=lambda url: print(url, flush=True))
    print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("signals", "ends_well"),
    [
        ([signal.SIGTERM], True),
        ([signal.SIGTERM, signal.SIGTERM], True),  # a launcher may pass it on
        ([signal.SIGINT], False),
        ([signal.SIGTERM, signal.SIGINT], False),
    ],
)
def test_signals(tmp_path, signals, ends_well):
    with process_serving(SERVE_FAKE, tmp_path) as (process, address):
        with socket.create_connection(address, timeout=20) as sock:
            # A step each 20 ms: it runs for some seconds.
            sock.sendall(request_bytes("/v1/completions", completion("x", max_tokens=150, stream=True)))
            assert sock.recv(10)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.02)
            rest = b"".join(iter(lambda: sock.recv(4096), b""))
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, "ended\n", "")
    assert (b"[DONE]" in rest) == ends_well
    assert (b"engine_stopped" in rest) != ends_well
