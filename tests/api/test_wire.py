"""Whatever bytes come in, they are a request, an error with a status, or not finished; never an exception."""

import json
import random
import socket
import threading

import pytest
from waitress.adjustments import Adjustments

from slora_jax.api.app import create_app
from slora_jax.api.parsing import RequestParser
from slora_jax.api.server import Server, listen

BODY = b'{"model": "base", "prompt": "a", "max_tokens": 2}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

REFUSED = {
    "a length of 5000 digits": (POST + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n", 400),
    "a length of 5000 zeros": (POST + b"Content-Length: " + b"0" * 5000 + b"\r\n\r\n", 400),
    "a length with a sign": (POST + b"Content-Length: +3\r\n\r\n", 400),
    "a length twice": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "no number for a length": (POST + b"Content-Length: \xb2\r\n\r\n", 400),
    "half of an IPv6 address": (b"GET http://[/x HTTP/1.1\r\n\r\n", 400),
    "no IPv6 address": (b"GET http://[::g]/x HTTP/1.1\r\n\r\n", 400),
    "a host that is no ASCII": ("GET http://a\u2100b/x HTTP/1.1\r\n\r\n".encode(), 400),
    "a target that is no ASCII": (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
    "a bad escape in the target": (b"GET /v1/models/%ff%00%zz HTTP/1.1\r\n\r\n", 404),
    "two slashes": (b"GET //v1//models HTTP/1.1\r\n\r\n", 404),
    "a star": (b"OPTIONS * HTTP/1.1\r\n\r\n", 404),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "lines that end in LF": (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
    "a header without a colon": (b"GET /health HTTP/1.1\r\nHost\r\n\r\n", 400),
    "a method in lower case": (b"get /health HTTP/1.1\r\n\r\n", 400),
    "an unknown method": (b"BREW /health HTTP/1.1\r\n\r\n", 405),
    "too many headers": (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, 431),
    "too large a body": (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
    "too large a body that waits": (POST + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n", 413),
    "an unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "chunks and a length": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a negative chunk": (CHUNKED + b"-1\r\nx", 400),
    "a chunk larger than a body may be": (CHUNKED + b"f" * 1000 + b"\r\nx", 413),
    "a chunk that does not end": (CHUNKED + b"1\r\nxyz\r\n", 400),
    "a bad chunk extension": (CHUNKED + b"1;\x00=\x01\r\nx\r\n0\r\n\r\n", 400),
    "a chunk's size that goes on": (CHUNKED + b"0" * 50_000, 400),
    "a trailer that goes on": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 50_000, 400),
    "a body that is no JSON": (POST + b"Content-Length: 4\r\n\r\n\xff\xff\xff\xff", 400),
}

ANSWERED = {
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "blank lines before": b"\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
    "an absolute target": b"GET http://anywhere/health HTTP/1.1\r\n\r\n",
    "a host that is none": b"GET /health HTTP/1.1\r\nHost: [::\r\n\r\n",
    "headers that are no ASCII": b"GET /health HTTP/1.1\r\nCookie: \xff=\xfe;;=\r\nConnection: \xff\r\n\r\n",
    "nothing to wait for": b"GET /health HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
    "an unknown expectation": b"GET /health HTTP/1.1\r\nExpect: something\r\n\r\n",
    "a body": POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunks": CHUNKED + b"%x;a=b\r\n" % len(BODY) + BODY + b"\r\n0\r\nA: b\r\n\r\n",
}


@pytest.fixture
def server(engine):
    server = Server(create_app(engine), listen("127.0.0.1", 0), max_streams=4, on_stop=engine.close)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


def exchange(server, data: bytes, pieces: int = 1) -> tuple[int, bytes]:
    """The status and the body of the first answer."""
    with socket.create_connection((server.host, server.port), timeout=20) as sock:
        size = -(-len(data) // pieces)
        try:
            for i in range(0, len(data), size):
                sock.sendall(data[i : i + size])
        except ConnectionError:
            pass  # it was answered before all was sent
        with sock.makefile("rb") as stream:
            status = int(stream.readline().split()[1])
            headers = dict(line.split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
            return status, stream.read(int(headers[b"Content-Length"]))


@pytest.mark.parametrize("name", REFUSED)
def test_errors_before_any_route_are_answered_in_json(server, name):
    data, expected = REFUSED[name]
    status, body = exchange(server, data)
    assert status == expected
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert exchange(server, b"GET /health HTTP/1.1\r\n\r\n")[0] == 200


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("pieces", [1, 7])
def test_odd_requests_are_answered(server, name, pieces):
    assert exchange(server, ANSWERED[name], pieces)[0] == 200


def test_a_client_that_waits_for_a_go_ahead_gets_it(server):
    with socket.create_connection((server.host, server.port), timeout=20) as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_sends_nonsense_and_goes_away_leaves_nothing(server, caplog):
    for _ in range(20):
        with socket.create_connection((server.host, server.port), timeout=20) as sock:
            sock.sendall(b"\xff\r\n\r\n")
    assert exchange(server, ANSWERED["a body"])[0] == 200
    assert not caplog.records


def parse(data: bytes, size: int) -> RequestParser | None:
    """Reads as the server does, in pieces; the request, once it is complete."""
    parser = RequestParser(Adjustments(max_request_header_size=4096, max_request_body_size=2**20))
    while data and not parser.completed:
        taken = parser.received(data[:size])
        assert taken >= 0
        data = data[max(taken, 1) :]
    return parser if parser.completed else None


def test_mutated_requests_never_raise():
    choose = random.Random(20261128)
    seeds = [data[:6000] for data, _ in REFUSED.values()] + list(ANSWERED.values())
    inserts = [
        b"\r\n",
        b"\n",
        b"[",
        b"]",
        b"//",
        b"%",
        b" ",
        b":",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"http://",
        b"@",
        b"?",
        b"#",
    ]
    inserts += [
        b"Content-Length: 9\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"9" * 5000,
        b"\x00",
        b"\xff",
        "\u2100".encode(),
    ]
    statuses = set()
    for _ in range(4000):
        data = bytearray(choose.choice(seeds))
        for _ in range(choose.randint(1, 4)):
            at = choose.randint(0, len(data))
            kind = choose.randrange(4)
            if kind == 0:
                del data[at : at + choose.randint(1, 5)]
            elif kind == 1:
                data[at:at] = choose.choice(inserts)
            elif kind == 2:
                other = choose.choice(seeds)
                data[at:] = other[choose.randint(0, len(other)) :]
            else:
                data[at : at + 1] = choose.randbytes(1)
        request = parse(bytes(data), choose.choice([3000, 8192]))
        statuses.add(None if request is None else request.error.code if request.error else 200)
    assert statuses == {None, 200, 400, 413, 431, 501}
