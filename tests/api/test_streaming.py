"""How the events of many streams are sent by one thread, and that events written in two ways are the same."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from functools import partial

import psutil
import pytest

from slora_jax.api.app import create_app
from slora_jax.api.server import Server, listen
from slora_jax.api.streaming import Sender, pulled
from slora_jax.engine.generation import Generation
from slora_jax.request import Delta, Request, SamplingParams
from tests.helpers.fake_engine import FakeEngine, FakeGeneration

THREAD = "slora-jax-streams"


class Wire:
    """Keeps what is sent, straight away and by its socket.

    Attributes:
      fails: raise when something is sent.
      client: the other end of its socket.
    """

    def __init__(self, fails=False):
        self.is_full = False
        self.fails = fails
        self.senders = set()
        self._socket, self.client = socket.socketpair()
        self.client.setblocking(False)
        self._got = b""

    @property
    def got(self):
        """All of it."""
        with contextlib.suppress(BlockingIOError):
            while data := self.client.recv(1 << 16):
                self._got += data
        return self._got

    def seen(self, most):
        """The next bytes, which stay where they are."""
        with contextlib.suppress(BlockingIOError):
            return self.client.recv(most, socket.MSG_PEEK)
        return b""

    def send(self, data):
        if self.fails:
            raise self.gone()
        self._socket.sendall(self.framed(data))
        self.senders.add(threading.current_thread().name)

    def framed(self, data):
        return data

    def fileno(self):
        return self._socket.fileno()

    def gone(self):
        return ConnectionError("gone")

    def close(self):
        self._socket.close()
        self.client.close()


@pytest.fixture
def new_wire():
    """Makes wires."""
    with contextlib.ExitStack() as closing:

        def make(**options):
            return closing.enter_context(contextlib.closing(Wire(**options)))

        yield make


def generation():
    return Generation(Request((1,), None, SamplingParams()), lambda generation: None)


def numbers(made):
    """The events of a generation: each look's tokens."""
    while not made.finished:
        yield "".join(f"{delta.token_ids[0]} " for delta in made.take()).encode()
    yield b"end"


def put(made, token, reason=None):
    made.put(Delta(0, "", (token,), finish_reason=reason), time.monotonic())


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def begin(sender, made, wire):
    """A stream's own thread, and what it raises."""
    raised = []

    def own():
        try:
            assert list(sender.sent(numbers(made), [made], wire)) == []
        except Exception as failure:
            raised.append(failure)

    thread = threading.Thread(target=own)
    thread.start()
    return thread, raised


def num_senders():
    return sum(thread.name == THREAD for thread in threading.enumerate())


def test_one_thread_sends_all_and_is_gone_with_the_last(new_wire):
    sender, made, wires = Sender(), [generation() for _ in range(20)], [new_wire() for _ in range(20)]
    threads = [begin(sender, one, wire)[0] for one, wire in zip(made, wires, strict=True)]
    for token in range(5):
        for one in made:
            put(one, token, "length" if token == 4 else None)
        eventually(lambda token=token: all(f"{token} ".encode() in wire.got for wire in wires))
        assert num_senders() == (token < 4) or token == 4
    for thread in threads:
        thread.join(10)
    assert {wire.got for wire in wires} == {b"0 1 2 3 4 end"}
    assert {name for wire in wires for name in wire.senders} == {THREAD}
    eventually(lambda: num_senders() == 0)
    again, _ = begin(sender, made[0], new_wire())  # of a stream that has ended already
    again.join(10)
    assert not again.is_alive()


def test_what_came_before_is_sent_without_further_news(new_wire):
    sender, made, wire = Sender(), generation(), new_wire()
    put(made, 1)
    start = time.monotonic()
    thread, _ = begin(sender, made, wire)
    eventually(lambda: wire.got)
    assert time.monotonic() - start < 0.3
    put(made, 2, "length")
    thread.join(10)
    assert wire.got == b"1 2 end"


def test_a_full_wire_gets_all_that_piled_up_at_once_and_keeps_nobody_waiting(new_wire):
    sender, (slow, quick), (full, free) = Sender(), (generation(), generation()), (new_wire(), new_wire())
    full.is_full = True
    threads = [begin(sender, slow, full)[0], begin(sender, quick, free)[0]]
    for token in range(3):
        put(slow, token)
        put(quick, token)
        eventually(lambda token=token: free.got.endswith(f"{token} ".encode()))
    assert full.got == b""
    full.is_full = False
    eventually(lambda: full.got)
    assert full.got == b"0 1 2 "
    for one in (slow, quick):
        put(one, 3, "length")
    for thread in threads:
        thread.join(10)
    assert full.got == b"0 1 2 3 end"


def test_a_client_that_is_gone_ends_its_own_stream_only(new_wire):
    sender, (lost, good), wire = Sender(), (generation(), generation()), new_wire()
    gone, raised = begin(sender, lost, new_wire(fails=True))
    thread, none = begin(sender, good, wire)
    put(lost, 1)
    gone.join(10)
    assert [str(failure) for failure in raised] == ["gone"]
    put(good, 2, "length")
    thread.join(10)
    assert (wire.got, none) == (b"2 end", [])


def writers():
    """The processes that write to clients, by their numbers."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("relay_process" in part for part in child.cmdline()):
                found.add(child.pid)
    return found


def test_a_process_writes_all_but_the_first_event(new_wire, monkeypatch):
    sent = []
    monkeypatch.setattr(Wire, "send", lambda self, data: sent.append(data) or self._socket.sendall(data))
    before = writers()
    sender, made, wire = Sender(), generation(), new_wire()
    thread, _ = begin(sender, made, wire)
    for token in range(4):
        put(made, token, "length" if token == 3 else None)
        eventually(lambda token=token: wire.got.endswith((b"%d " % token, b"end")))
    thread.join(10)
    assert (wire.got, sent) == (b"0 1 2 3 end", [b"0 "])
    assert len(writers() - before) == 1
    del sender
    eventually(lambda: writers() <= before)


def test_a_client_that_leaves_ends_its_own_stream_only(new_wire):
    sender, (lost, good), (left, wire) = Sender(), (generation(), generation()), (new_wire(), new_wire())
    gone, raised = begin(sender, lost, left)
    thread, none = begin(sender, good, wire)
    for token in range(2):
        put(lost, token)
        put(good, token)
        eventually(lambda token=token: left.got == wire.got == b"0 1 "[: 2 * token + 2])
    left.client.close()
    while gone.is_alive():  # what is sent to nobody is noticed, and told of, a little later
        put(lost, 2)
        gone.join(0.05)
    assert [str(failure) for failure in raised] == ["gone"]
    put(good, 2, "length")
    thread.join(10)
    assert (wire.got, none) == (b"0 1 2 end", [])


def test_a_client_that_reads_nothing_keeps_only_itself_waiting(new_wire):
    sender, (slow, quick), (full, free) = Sender(), (generation(), generation()), (new_wire(), new_wire())
    much = [b"." * 4096 + b"%d " % token for token in range(2000)]  # several times what a socket holds

    def events(made, looks):
        while not made.finished:
            tokens = [delta.token_ids[0] for delta in made.take()]
            looks.append(len(tokens))
            yield b"".join(much[token] for token in tokens)

    looks = {slow: [], quick: []}
    threads = []
    for made, wire in ((slow, full), (quick, free)):
        own = partial(lambda made, wire: list(sender.sent(events(made, looks[made]), [made], wire)), made, wire)
        threads.append(threading.Thread(target=own))
        threads[-1].start()
    for token in range(len(much)):
        for made in (slow, quick):
            put(made, token, "length" if token == len(much) - 1 else None)
        if token % 20 == 0:
            eventually(lambda token=token: len(free.got) >= sum(map(len, much[: token + 1])))
    threads[1].join(10)
    assert not threads[1].is_alive() and threads[0].is_alive()
    waiting = sum(looks[slow])
    assert waiting < len(much) / 2, "what the client does not take stays where deltas are merged"
    eventually(lambda: len(full.got) == sum(map(len, much)))
    threads[0].join(10)
    assert full.got == free.got == b"".join(much)


def test_streams_end_with_the_process_that_writes_them_and_others_get_another(new_wire, caplog):
    sender, (lost, good), (broken, wire) = Sender(), (generation(), generation()), (new_wire(), new_wire())
    before = writers()
    gone, raised = begin(sender, lost, broken)
    for token in range(2):
        put(lost, token)
        eventually(lambda token=token: broken.got == b"0 1 "[: 2 * token + 2])
    (process,) = writers() - before
    os.kill(process, signal.SIGKILL)
    gone.join(1)
    put(lost, 2)
    gone.join(10)
    assert [str(failure) for failure in raised] == ["gone"]
    assert "the process that writes to clients has ended; 1 streams end with it" in caplog.text
    thread, none = begin(sender, good, wire)
    for token in range(3):
        put(good, token, "length" if token == 2 else None)
        eventually(lambda token=token: f"{token} ".encode() in wire.got)
    thread.join(10)
    assert (wire.got, none) == (b"0 1 2 end", [])
    assert len(writers() - before - {process}) == 1


@pytest.mark.parametrize("is_over", [False, True], ids=["goes-on", "is-over"])
def test_a_stream_whose_client_is_slow_fails_with_the_process_that_writes_it(new_wire, is_over):
    sender, made, wire = Sender(), generation(), new_wire()
    before = writers()

    def events():
        yield b"first"
        yield b"." * 2_000_000  # several times what a socket holds
        while not is_over:
            yield b"more"

    raised = []

    def run():
        try:
            list(sender.sent(events(), [made], wire))
        except ConnectionError as failure:
            raised.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    put(made, 1)
    put(made, 2, "length" if is_over else None)
    # Seen, but not taken: or all of it might come before the end.
    eventually(lambda: len(wire.seen(6)) > 5)
    (process,) = writers() - before
    os.kill(process, signal.SIGSTOP)  # so that nothing of the rest gets to the client meanwhile
    os.kill(process, signal.SIGKILL)
    thread.join(10)
    assert not thread.is_alive(), "what is full for ever must not keep a stream for ever"
    assert [str(failure) for failure in raised] == ["gone"], "a body that was cut must not end as if whole"
    assert len(wire.got) < 2_000_000


def test_without_a_process_the_server_writes_itself(new_wire, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fail)
    sender = Sender()
    for _ in range(2):
        made, wire = generation(), new_wire()
        thread, none = begin(sender, made, wire)
        for token in range(3):
            put(made, token, "length" if token == 2 else None)
            eventually(lambda token=token, wire=wire: f"{token} ".encode() in wire.got)
        thread.join(10)
        assert (wire.got, none) == (b"0 1 2 end", [])
    assert caplog.text.count("no process can be started to do so: no more processes") == 1


def test_a_server_that_asks_gets_the_same():
    made, got = generation(), []
    thread = threading.Thread(target=lambda: got.extend(pulled(numbers(made), [made], lambda: 0.0)))
    thread.start()
    for token in range(3):
        put(made, token, "length" if token == 2 else None)
    thread.join(10)
    assert b"".join(got) == b"0 1 2 end" and b"" not in got


@pytest.fixture
def served(tmp_path):
    engine = FakeEngine(tmp_path / "model")
    engine.start()
    server = Server(create_app(engine, max_streams=1), listen("127.0.0.1", 0), max_streams=1, on_stop=engine.close)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(20)


def ask(server, fields, version="1.1"):
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.settimeout(20)
    sock.connect((server.host, server.port))
    sock.sendall(head + body)
    return sock


FIELDS = {"model": "pirate", "prompt": "hi", "max_tokens": 30, "stream": True}


def test_whoever_has_read_the_end_finds_the_place_free(served, monkeypatch):
    monkeypatch.setattr(FakeGeneration, "cancel", lambda self: time.sleep(0.05))  # the cleaning up takes its time
    for _ in range(3):
        with ask(served, FIELDS) as sock:
            got = b""
            while b"[DONE]" not in got:
                got += sock.recv(65536)
            assert got.startswith(b"HTTP/1.1 200"), got


def test_old_clients_get_the_body_without_chunks(served):
    with ask(served, FIELDS, "1.0") as sock:
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    head, body = got.split(b"\r\n\r\n", 1)
    assert b"chunked" not in head
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def test_a_client_that_reads_late_loses_nothing(served):
    fields = {**FIELDS, "max_tokens": 250, "logprobs": 20, "n": 48}  # more than the kernel's buffers hold
    with ask(served, fields) as sock:
        time.sleep(1)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    assert got.count(b'"finish_reason":"length"') == 48 and got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("text", ["plain", 'quote " and \\', "line\nbreak\ttab\x01", "é 漢 🏴‍☠️", "\u2028"])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_events_of_text_are_what_json_would_write(tmp_path, monkeypatch, text, route):
    engine = FakeEngine(tmp_path / "model")
    monkeypatch.setattr(engine, "_next", lambda index, sequence, request: next_delta(index, sequence), raising=False)

    def next_delta(index, sequence):
        sequence.done += 1
        return Delta(index, f"{text}{sequence.done}", (5,), finish_reason="length" if sequence.done == 4 else None)

    engine.start()
    client = create_app(engine).test_client()
    fields = {"model": "pirate", "max_tokens": 9, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    fields |= {"prompt": ["a", "b"]} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    body = client.post(f"/v1/{route}", json=fields).data
    engine.close()
    events = [line[6:] for line in body.split(b"\n\n")[:-2]]
    said = {}
    for data in events:
        event = json.loads(data)
        assert json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() == data
        assert event["model"] == "pirate" and "usage" in event
        for choice in event["choices"]:
            got = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            said[choice["index"]] = said.get(choice["index"], "") + got
    assert said == dict.fromkeys(range(4 if route == "completions" else 2), "".join(f"{text}{i}" for i in range(1, 5)))
