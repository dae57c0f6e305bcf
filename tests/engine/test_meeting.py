"""Hosts wait for each other without a deadline, compare what must be alike, and end together, with a sentence."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slora_jax.config import MeshConfig
from slora_jax.engine import meeting as meeting_module
from slora_jax.engine.meeting import BAD_START, LOST, Connection, Ending, Meeting, together
from slora_jax.errors import EngineStopped, UnsupportedModel
from tests.helpers.meetings import hosts_that_met


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def endings_of(host) -> list[Ending]:
    """How it ended. Whoever called it may be told of the end before the thread that ends it has noted that."""
    wait_for(lambda: host.endings)
    return host.endings


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_place_is_passed_when_all_have_come_to_it():
    with hosts_that_met(3) as hosts, ThreadPoolExecutor(3) as threads:
        early = [threads.submit(host.exchange, "place", host.host * 10) for host in hosts[:2]]
        time.sleep(0.2)
        assert not any(future.done() for future in early)
        assert hosts[2].exchange("place", 20) == [0, 10, 20]
        assert [future.result(5) for future in early] == [[0, 10, 20]] * 2


def test_what_differs_is_named_to_all_and_ends_all():
    fields = [{"--tp": "2", "--seed": "1"}, {"--tp": "2", "--seed": "1"}, {"--tp": "2", "--seed": "7"}]
    with hosts_that_met(3) as hosts, ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(host.agree, "flags", own) for host, own in zip(hosts, fields, strict=True)]
        for host, future in zip(hosts, futures, strict=True):
            with pytest.raises(
                EngineStopped,
                match=r"host 2 has another --seed than host 0 \(7 there, 1 here on host 0\); all hosts need the same",
            ):
                future.result(20)
            assert [ending.code for ending in endings_of(host)] == [BAD_START]


def test_what_is_alike_passes():
    with hosts_that_met(2) as hosts, ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda host: host.agree("flags", {"--tp": "2", "--pool-pages": None}), hosts))
        assert not hosts[0].endings


def test_a_host_that_ends_by_an_error_ends_all_with_its_reason():
    with hosts_that_met(3) as hosts:
        with pytest.raises(EngineStopped, match="host 1: no such model"):
            hosts[1].end("host 1: no such model", BAD_START)
        for host in hosts:
            assert endings_of(host) == [Ending("host 1: no such model", BAD_START)]
        with pytest.raises(EngineStopped, match="no such model"):
            hosts[2].exchange("place", None)


def test_a_lost_host_is_named_to_all_and_the_server_hears_it_first():
    with hosts_that_met(3) as hosts:
        heard = []
        hosts[0].serve(on_stop=lambda: None, on_fail=lambda reason: heard.append((reason, list(hosts[0].endings))))
        hosts[2].close()
        sentence = "host 2 was lost (its process ended); start all hosts again"
        for host in hosts[:2]:
            assert endings_of(host) == [Ending(sentence, LOST)]
        assert heard == [(sentence, [])]


def test_all_end_even_if_what_the_server_does_first_fails():
    def fail(reason):
        raise RuntimeError("the engine is not what it was")

    with hosts_that_met(3) as hosts:
        hosts[0].serve(on_stop=lambda: None, on_fail=fail)
        hosts[2].close()
        for host in hosts[:2]:
            assert endings_of(host)


def test_the_others_wait_for_host_0s_last_word():
    with hosts_that_met(2) as hosts, ThreadPoolExecutor(1) as threads:
        leaving = threads.submit(hosts[1].leave)
        time.sleep(0.2)
        assert not leaving.done()
        with pytest.raises(EngineStopped, match="host 0: no such adapter"):
            hosts[0].end("host 0: no such adapter", BAD_START)
        with pytest.raises(EngineStopped, match="host 0: no such adapter"):
            leaving.result(10)
        assert endings_of(hosts[1]) == endings_of(hosts[0]) == [Ending("host 0: no such adapter", BAD_START)]


def test_a_silent_host_is_lost(monkeypatch):
    monkeypatch.setattr(meeting_module, "LOST_SECONDS", 0.5)
    here, there = socket.socketpair(socket.AF_UNIX)
    endings = []
    meeting = Meeting(0, {1: Connection(here)}, endings.append)
    wait_for(lambda: endings)
    assert endings == [Ending("host 1 was lost (no sign of it for 0.5 s); start all hosts again", LOST)]
    there.close()
    meeting.close()


def test_a_signal_to_a_host_that_loads_ends_all_and_to_one_that_follows_asks_the_server():
    with hosts_that_met(2) as hosts:
        stops = []
        hosts[0].serve(on_stop=lambda: stops.append(1), on_fail=lambda reason: None)
        hosts[1].follow()
        hosts[1].ask_to_stop()
        hosts[1].ask_to_stop()  # one Ctrl-C that came twice
        wait_for(lambda: stops)
        assert stops == [1]
        assert not hosts[0].endings and not hosts[1].endings
    with hosts_that_met(2) as hosts:
        hosts[1].ask_to_stop()
        assert [endings_of(host) for host in hosts] == [[Ending("", 0)], [Ending("", 0)]]


def test_one_host_meets_nobody():
    with together(MeshConfig()) as meeting:
        assert meeting is None
    with pytest.raises(UnsupportedModel), together(MeshConfig()):
        raise UnsupportedModel("for the caller")


JOIN = """
import hashlib, sys
from slora_jax.config import MeshConfig
from slora_jax.engine.meeting import together
host, count, port, patience, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]
config = MeshConfig(tp=count, num_hosts=count, coordinator="127.0.0.1:" + port, host_id=host)
with together(config) as all_hosts:
    print("here", flush=True)
    all_hosts.join(config, patience)
    print(all_hosts.exchange("place", host), flush=True)
    if what == "sleep":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # outside of Python for minutes, like a compiler
    elif what == "raise":
        from slora_jax.errors import UnsupportedModel
        raise UnsupportedModel("config.json: no")
    elif what == "bug":
        raise RuntimeError("first line\\nsecond line")
"""


class Process:
    def __init__(self, host: int, count: int, port: int, patience: float = 60, what: str = "end"):
        arguments = [sys.executable, "-c", JOIN, *map(str, (host, count, port, patience, what))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._process = subprocess.Popen(arguments, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **pipes)

    def wait_until(self, line: str) -> None:
        while (got := self._process.stdout.readline()) != line + "\n":
            assert got

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Its code, and what it said last."""
        output, _ = self._process.communicate(timeout=120)
        return self._process.returncode, output.rstrip().rpartition("\n")[2]


@pytest.fixture
def start():
    processes = []

    def start(*arguments, **options):
        processes.append(Process(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.signal(signal.SIGKILL)
        process.ended()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_at_once_with_a_sentence(start, killed):
    port = free_port()
    processes = [start(host, 2, port, what="sleep") for host in range(2)]
    for process in processes:
        process.wait_until("[0, 1]")
    processes[killed].signal(signal.SIGKILL)
    before = time.monotonic()
    sentence = f"Error: host {killed} was lost (its process ended); start all hosts again"
    assert processes[1 - killed].ended() == (LOST, sentence)
    assert time.monotonic() - before < 20


@pytest.mark.slow
@pytest.mark.parametrize(("host", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_all_though_the_main_thread_is_busy(start, host, number):
    port = free_port()
    processes = [start(host, 2, port, what="sleep") for host in range(2)]
    for process in processes:
        process.wait_until("[0, 1]")
    processes[host].signal(number)
    assert [process.ended() for process in processes] == [(0, "Stopped.")] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("raise", BAD_START, "Error: host 1: config.json: no"),
        ("bug", LOST, "Error: host 1 failed: RuntimeError: first line"),
    ],
)
def test_an_error_of_one_is_said_by_all(start, what, code, said):
    port = free_port()
    processes = [start(0, 2, port, what="sleep"), start(1, 2, port, what=what)]
    assert [process.ended() for process in processes] == [(code, said)] * 2


@pytest.mark.slow
def test_whoever_waits_for_others_gives_up_and_hears_signals(start):
    code, said = start(1, 2, free_port(), patience=1).ended()
    assert code == LOST and "host 0 did not answer at 127.0.0.1:" in said
    code, said = start(0, 2, free_port(), patience=1).ended()
    assert (code, said) == (LOST, "Error: host 1 did not come within 1 s; start all hosts together")
    for host in range(2):
        waiting = start(host, 2, free_port())
        waiting.wait_until("here")
        waiting.signal(signal.SIGTERM)
        assert waiting.ended() == (0, "Stopped.")


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_a_taken_port_and_another_number_of_hosts_are_sentences(start):
    with socket.create_server(("", free_port())) as sock:
        code, said = start(0, 2, sock.getsockname()[1]).ended()
        assert code == BAD_START and "Address already in use" in said and "--coordinator" in said
    port = free_port()
    first = start(0, 2, port)
    with connected(port) as stranger:  # who is sent away, and disturbs nobody
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises((OSError, EOFError)):
            Connection(stranger).receive(10)
    second = start(1, 3, port)
    sentence = "Error: host 1 was started with --num-hosts 3, host 0 with 2; start all hosts with the same flags but "
    assert [process.ended() for process in (first, second)] == [(BAD_START, sentence + "--host-id")] * 2


def test_messages_of_many_threads_stay_whole():
    here, there = map(Connection, socket.socketpair(socket.AF_UNIX))
    senders = [
        threading.Thread(target=lambda n=n: [here.send({"n": n, "body": "x" * 50_000}) for _ in range(20)])
        for n in range(4)
    ]
    for sender in senders:
        sender.start()
    got = [there.receive(10) for _ in range(80)]
    for sender in senders:
        sender.join()
    assert sorted(message["n"] for message in got) == sorted([*range(4)] * 20)
    assert {len(message["body"]) for message in got} == {50_000}
    here.finish()
    with pytest.raises(EOFError):
        there.receive(10)
    for connection in (here, there):
        connection.close()
