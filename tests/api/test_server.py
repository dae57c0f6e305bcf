"""The server over real sockets: many streams at once, clients that go away, clean ends."""

import contextlib
import http.client
import json
import re
import selectors
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from slora_jax.api.app import create_app
from slora_jax.api.server import Server, ServerConfig, listen, run_server
from tests.helpers.fake_engine import FAILS, WAITS, FakeEngine


@contextlib.contextmanager
def serving(engine, max_streams=512, max_connections=None, **app_options):
    app = create_app(engine, max_streams=max_streams, **app_options)
    server = Server(
        app,
        listen("127.0.0.1", 0),
        max_streams=max_streams,
        max_connections=max_connections,
        max_body_bytes=app.config["MAX_CONTENT_LENGTH"],
        on_stop=engine.close,
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def request_bytes(path, body=None, headers=""):
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


def connect(server):
    return socket.create_connection((server.host, server.port), timeout=20)


def ask(server, path, body=None):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def completion(prompt, model="base", max_tokens=20, **fields):
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens} | fields


def unchunk(data: bytes) -> str:
    """The body of a chunked HTTP response."""
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), data
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return body.decode()
        body, rest = body + rest[:length], rest[length + 2 :]


def read_stream(stream: str) -> tuple[str, list[int]]:
    """Text and token ids of a stream of one choice."""
    payloads = re.findall(r"data: (.*)\n\n", stream)
    assert payloads.pop() == "[DONE]"
    choices = [json.loads(p)["choices"][0] for p in payloads]
    return "".join(c["text"] for c in choices), [t for c in choices for t in c.get("token_ids", [])]


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_512_open_streams(engine):
    """All are open at once before the first token; each gets its own tokens, and nobody else is kept waiting."""
    names = ["base", "pirate", "json", "org/haiku"]
    prompts = [f"{WAITS}{i} é😀" for i in range(512)]
    with serving(engine) as server, selectors.DefaultSelector() as selector:
        received = {}
        for i, prompt in enumerate(prompts):
            sock = connect(server)
            body = completion(prompt, names[i % 4], stream=True, echo=True, return_token_ids=True)
            sock.sendall(request_bytes("/v1/completions", body))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, i)
            received[i] = b""
        wait_until(lambda: len(engine.running) == 512)

        assert ask(server, "/health")[0] == 200
        status, body = ask(server, "/v1/completions", completion("one more"))
        assert (status, body["error"]["code"]) == (429, "engine_overloaded")

        engine.go.set()
        while selector.get_map():
            ready = selector.select(timeout=20)
            assert ready, "the streams stand still"
            for key, _ in ready:
                if data := key.fileobj.recv(65536):
                    received[key.data] += data
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
        expected = {g.prompt_text: engine.answer(g.request) for g in engine.generations}
        for i, prompt in enumerate(prompts):
            text, token_ids = read_stream(unchunk(received[i]))
            assert token_ids == expected[prompt]
            assert text == prompt + engine.tokenizer.decode(token_ids)
        assert ask(server, "/v1/completions", completion("one more"))[0] == 200


def test_each_event_goes_out_at_once(engine):
    with serving(engine) as server, connect(server) as sock:
        sock.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
        data = b""
        while b"\n\n\r\n" not in data:  # the echo arrives though no token is there yet
            data += sock.recv(4096)
        assert f'"text":"{WAITS}"'.encode() in data


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("produces", [True, False])
def test_a_client_that_goes_away_frees_its_request(tmp_path, stream, produces):
    engine = FakeEngine(tmp_path, step_seconds=0.02)
    engine.start()
    with serving(engine) as server:
        sock = connect(server)
        sock.sendall(
            request_bytes("/v1/completions", completion("x" if produces else WAITS, max_tokens=290, stream=stream))
        )
        wait_until(lambda: engine.running)
        (generation,) = engine.generations
        time.sleep(0.1)
        assert not generation.cancelled
        sock.close()
        wait_until(lambda: generation.cancelled and not engine.running, seconds=3)
        assert sum(len(d.token_ids) for d in generation.deltas) < 200


def test_a_reset_connection_frees_its_request(engine):
    with serving(engine) as server:
        sock = connect(server)
        sock.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
        sock.recv(100)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        sock.close()
        wait_until(lambda: engine.generations and engine.generations[0].cancelled, seconds=3)


def test_stop_tells_open_streams(engine, caplog):
    with serving(engine) as server:
        stream = connect(server)
        stream.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
        whole = connect(server)
        whole.sendall(request_bytes("/v1/completions", completion(WAITS)))
        wait_until(lambda: len(engine.running) == 2)
    with stream, whole:
        assert '"code":"engine_stopped"' in unchunk(b"".join(iter(lambda: stream.recv(4096), b"")))
        assert whole.recv(100).startswith(b"HTTP/1.1 503")
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    assert not caplog.records


def test_malformed_http_and_huge_bodies_are_refused_in_json(engine):
    with serving(engine) as server:
        for data, status in [
            (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
            (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n", 413),
        ]:
            with connect(server) as sock:
                sock.sendall(data)
                head, _, body = b"".join(iter(lambda: sock.recv(4096), b"")).partition(b"\r\n\r\n")
            assert int(head.split()[1]) == status
            assert b"X-Request-Id: " in head
            assert json.loads(body)["error"]["type"] == "invalid_request_error"


def answer_to(server, data):
    """Status and JSON of what comes back for these bytes, until the server closes."""
    with connect(server) as sock:
        sock.sendall(data)
        head, _, body = b"".join(iter(lambda: sock.recv(4096), b"")).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_large_body_is_refused_by_its_length_unread(engine):
    with serving(engine, max_body_bytes=1000) as server:
        status, body = answer_to(server, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert answer_to(server, chunked + b"fff\r\n" + b" " * 1001)[0] == 413
        with connect(server) as sock:
            body = json.dumps(completion("x")).encode()
            sock.sendall(
                request_bytes("/v1/completions", completion("x")).replace(
                    b"Content-Length: %d" % len(body), b"Content-Length: 1000"
                )
                + b" " * (1000 - len(body))
            )
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_sends_a_large_body_all_the_same_gets_its_answer(engine):
    with serving(engine) as server:
        status, body = ask(server, "/v1/completions", completion("x" * 2**21))
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")


def test_a_client_may_end_its_sentence_before_it_hears_that_it_was_too_long(engine):
    with serving(engine) as server, connect(server) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 8388608\r\n\r\n")
        for _ in range(128):
            time.sleep(0.004)
            sock.sendall(b"x" * 2**16)
        answer = b""
        while piece := sock.recv(2**16):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 413 ") and b"invalid_request_error" in answer


IDLE = {
    "silent": b"",
    "half a header": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: ",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
}


def is_open(sock):
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        sock.settimeout(20)


@pytest.mark.parametrize("sent", IDLE.values(), ids=IDLE.keys())
def test_idle_connections_make_room_oldest_first(engine, sent):
    with serving(engine, max_streams=4, max_connections=50) as server, contextlib.ExitStack() as sockets:
        busy = [sockets.enter_context(connect(server)) for _ in range(4)]
        for sock in busy:
            sock.sendall(request_bytes("/v1/completions", completion(WAITS)))
        wait_until(lambda: len(engine.running) == 4)
        used = http.client.HTTPConnection(server.host, server.port, timeout=20)
        sockets.callback(used.close)
        idle = []
        for i in range(300):
            idle.append(sockets.enter_context(connect(server)))
            idle[-1].sendall(sent)
            if i % 20 == 0:  # keeps this one younger than twenty others
                used.request("GET", "/v1/models")
                used.getresponse().read()
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/v1/completions", completion("x"))[0] == 429
        wait_until(lambda: sum(map(is_open, idle)) <= 45)
        states = [is_open(sock) for sock in idle]
        assert states == sorted(states) and sum(states) >= 40, "those that came last are open"
        assert is_open(used.sock) and all(map(is_open, busy))
        engine.go.set()
        assert all(sock.recv(100).startswith(b"HTTP/1.1 200") for sock in busy)


def test_bytes_that_trickle_in_make_no_connection_younger(engine):
    with serving(engine, max_connections=8) as server, contextlib.ExitStack() as sockets:
        slow = sockets.enter_context(connect(server))
        slow.sendall(IDLE["half a header"])
        others = [sockets.enter_context(connect(server)) for _ in range(7)]
        slow.sendall(b"a byte later")
        wait_until(lambda: ask(server, "/health")[0] == 200 and not is_open(slow))
        assert sum(map(is_open, others)) >= 6


SOFT_LIMIT = """
    import resource, sys
    from slora_jax.api.server import Server, listen
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    Server(lambda environ, start: [], listen("127.0.0.1", 0), max_streams=64).close()
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_limit_on_open_files_is_raised_to_what_the_connections_need():
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SOFT_LIMIT)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) >= 2 * 64 + 256


def test_keep_alive(engine):
    with serving(engine) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
        for _ in range(3):
            connection.request("POST", "/v1/completions", json.dumps(completion("hello")))
            assert json.loads(connection.getresponse().read())["choices"]
        local = connection.sock.getsockname()
        connection.request("GET", "/health")
        connection.getresponse().read()
        assert connection.sock.getsockname() == local
        connection.close()


def test_a_failed_generation_ends_one_stream_only(engine):
    with serving(engine) as server:
        status, body = ask(server, "/v1/completions", completion(FAILS))
        assert (status, body["error"]["code"]) == (500, "generation_failed")
        assert ask(server, "/v1/completions", completion("x"))[0] == 200


def test_a_taken_port_fails_before_anything_else():
    with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", first.getsockname()[1])


def test_run_server_binds_and_reports(engine):
    urls = []
    app = create_app(engine)

    def ready(url):
        urls.append(url)
        raise KeyboardInterrupt  # as good a way to end here as any

    with pytest.raises(KeyboardInterrupt):
        run_server(app, "127.0.0.1", 0, max_streams=2, on_ready=ready)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", urls[0])


def test_server_config_is_checked():
    with pytest.raises(ValueError, match="port"):
        ServerConfig(port=70_000)
    with pytest.raises(ValueError, match="log_level"):
        ServerConfig(log_level="loud")


SERVE_FAKE = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.helpers.fake_engine import FakeEngine
    from slora_jax.api.app import create_app
    from slora_jax.api.server import run_server
    engine = FakeEngine(Path(sys.argv[2]))
    engine.start()
    run_server(create_app(engine), "127.0.0.1", 0, on_stop=engine.close, on_ready=lambda url: print(url, flush=True))
    print("ended", flush=True)
"""


@contextlib.contextmanager
def process_serving(script: str, folder: Path):
    """A process that runs a script like ``SERVE_FAKE``; yields it and the address that it serves at."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(Path(__file__).parents[2]), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        host, port = process.stdout.readline().removeprefix("http://").strip().split(":")
        yield process, (host, int(port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_process_cleanly(tmp_path, number):
    with process_serving(SERVE_FAKE, tmp_path) as (process, address):
        with socket.create_connection(address, timeout=20) as sock:
            sock.sendall(request_bytes("/v1/completions", completion(WAITS, stream=True, echo=True)))
            assert sock.recv(10)
            process.send_signal(number)
            rest = b"".join(iter(lambda: sock.recv(4096), b""))
        out, errors = process.communicate(timeout=20)
    assert b"engine_stopped" in rest
    assert (process.returncode, out, errors) == (0, "ended\n", "")
