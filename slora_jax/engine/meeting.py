"""Hosts that serve one model together: how they meet, compare what must be alike, wait for each other, and end.

Host 0 listens on the coordinator's port, and each other host's process holds one connection to it for as long as it
lives. What one host tells another goes over that connection, and whoever loses it knows at once that the other is gone.

JAX has such a service of its own, which it needs to set up what devices send each other. It ends a process from C++,
with a stack trace and code 134, as soon as its connection breaks. So the other hosts reach it through a relay in their
own process, which keeps JAX's side of a broken connection open: what the end of a host means is decided here alone.
"""

import contextlib
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any, NoReturn

from slora_jax.config import MeshConfig
from slora_jax.errors import EngineStopped, SLoRAError

logger = logging.getLogger(__name__)

MEET_SECONDS = 300
"""How long the first processes wait for the last."""

LOST_SECONDS = 30
"""A process that gave no sign for so long is lost. One whose connection closes is lost at once."""

ASKED = 0
"""Exit code of hosts that were asked to stop."""

BAD_START = 2
"""Exit code where flags or files must be mended first."""

LOST = 70
"""Exit code where all hosts must be started again, as they are."""

_BEAT_SECONDS = 3
_POLL_SECONDS = 0.5
_HELLO_SECONDS = 10
_FAREWELL_SECONDS = 3
_SAME_SIGNAL_SECONDS = 1.0
_MAX_HELLO_BYTES = 4096
_JAX_SECONDS = 3600
"""JAX's own patience, longer than ours, so that it is never JAX that ends a process."""


@dataclass(frozen=True)
class Ending:
    """Why all hosts end: ``reason`` is a sentence, or empty where one was asked to stop; ``code`` is for the shell."""

    reason: str
    code: int


def end_process(ending: Ending) -> NoReturn:
    """Says why, and ends this process at once, whatever its other threads do."""
    print(f"Error: {ending.reason}" if ending.reason else "Stopped.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(ending.code)


class Connection:
    """Messages to and from one other host, over a socket. ``send`` is thread-safe."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a dict of what msgpack knows and numpy arrays.

        Raises:
          OSError: the connection is gone.
        """
        body = _serialization().msgpack_serialize(dict(message))
        with self._sending:
            self._sock.sendall(struct.pack(">Q", len(body)) + body)

    def receive(self, timeout: float, max_bytes: int | None = None) -> dict[str, Any]:
        """The next message.

        Raises:
          EOFError: the other side closed the connection.
          TimeoutError: nothing came for ``timeout`` seconds.
          OSError: the connection broke.
          ValueError: what came is not such a message, or longer than ``max_bytes``.
        """
        self._sock.settimeout(timeout)
        (size,) = struct.unpack(">Q", self._exactly(8))
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"a message of {size} bytes")
        try:
            return _serialization().msgpack_restore(self._exactly(size))
        except (EOFError, OSError):
            raise
        except Exception as e:
            raise ValueError("not a message") from e

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._sock.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def finish(self) -> None:
        """Sends no more: the other side sees the end of the connection after what was sent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()


class Meeting:
    """One process's place among those of all hosts. Thread-safe.

    However a host ends (asked by a signal, by an error, or lost), ``end`` is what all of them do then: each says why
    and leaves with the same code. Nothing here has a deadline while the others live, but ``join``.
    """

    def __init__(
        self,
        host: int,
        connections: Mapping[int, Connection] | None = None,
        end_process: Callable[[Ending], None] = end_process,
    ):
        """
        Args:
          host: this one's number; 0 is connected to all, the others to 0.
          connections: by the number of the other host; ``join`` makes them.
          end_process: called once, by any thread, when this process should end.
        """
        self.host = host
        self._connections: dict[int, Connection] = {}
        self._end_process = end_process
        self._messages: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._on_answer: Callable[[int, dict[str, Any]], None] = lambda host, answer: None
        self._on_stop: Callable[[], None] | None = None
        self._on_fail: Callable[[str], None] = lambda reason: None
        self._signal_means_asking = False
        self._asked_at: float | None = None
        self._ending: Ending | None = None
        self._ended = threading.Event()
        self._closed = False
        self._said: dict[str, dict[int, Any]] = {}
        self._agreed: dict[str, list[Any]] = {}
        self._welcome: int | None = None
        self._readers: list[threading.Thread] = []
        # Guards what is above; notified whenever something came.
        self._changed = threading.Condition()
        for other, connection in (connections or {}).items():
            self._add(other, connection)

    @property
    def others(self) -> tuple[int, ...]:
        """Numbers of the hosts that this one is connected to."""
        with self._changed:
            return tuple(self._connections)

    # Meeting

    def join(self, config: MeshConfig, patience: float = MEET_SECONDS) -> None:
        """Meets all other hosts' processes, or ends this one with a sentence after ``patience`` seconds.

        Raises:
          EngineStopped: this process was to end, where ``end_process`` did not end it.
        """
        assert config.coordinator is not None, "one host has nobody to meet"
        address, _, port = config.coordinator.rpartition(":")
        address = address.strip("[]")
        if self.host == 0:
            jax_port = self._welcome_all(config, int(port), patience)
        else:
            jax_port = _relay(address, self._find_first(config, address, int(port), patience), self)
            address = "127.0.0.1"
        _initialize_jax(config, f"[{address}]:{jax_port}" if ":" in address else f"{address}:{jax_port}")

    def _welcome_all(self, config: MeshConfig, port: int, patience: float) -> int:
        try:
            server = _listening(port)
        except OSError as e:
            self.end(
                f"host 0 cannot listen on port {port}, where the other hosts look for it: {os.strerror(e.errno or 0)}; "
                "end what has that port, or give all hosts a --coordinator with another one",
                BAD_START,
            )
        deadline = time.monotonic() + patience
        with contextlib.closing(server):
            server.settimeout(_POLL_SECONDS)
            while missing := set(range(1, config.num_hosts)) - set(self.others):
                self._check()
                if time.monotonic() > deadline:
                    names = ", ".join(map(str, sorted(missing)))
                    self.end(f"host {names} did not come within {patience:.0f} s; start all hosts together", LOST)
                with contextlib.suppress(TimeoutError):
                    threading.Thread(target=self._meet, args=(server.accept()[0], config), daemon=True).start()
        jax_port = _free_port()
        for other in self.others:
            self._send(other, {"kind": "welcome", "port": jax_port})
        return jax_port

    def _meet(self, sock: socket.socket, config: MeshConfig) -> None:
        connection = Connection(_without_delay(sock))
        try:
            hello = connection.receive(_HELLO_SECONDS, _MAX_HELLO_BYTES)
            other, num_hosts = hello["slora_jax"], hello["num_hosts"]
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            connection.close()  # not one of us: a port scanner, say
            return
        refusal = None
        if num_hosts != config.num_hosts:
            refusal = (
                f"host {other} was started with --num-hosts {num_hosts}, host 0 with {config.num_hosts}; "
                "start all hosts with the same flags but --host-id"
            )
        elif other in self.others:
            refusal = f"two processes were started with --host-id {other}; give each host its own"
        if refusal is None:
            self._add(other, connection)
            return
        with contextlib.suppress(OSError):
            connection.send({"kind": "end", "reason": refusal, "code": BAD_START})
        connection.finish()
        self.end(refusal, BAD_START)

    def _find_first(self, config: MeshConfig, address: str, port: int, patience: float) -> int:
        deadline = time.monotonic() + patience
        while True:
            self._check()
            try:
                sock = socket.create_connection((address, port), timeout=5)
                if sock.getsockname() != sock.getpeername():
                    break
                # On one machine, a port that nobody listens on may be given to the very socket that looks for it.
                sock.close()
            except OSError as e:
                if time.monotonic() > deadline:
                    self.end(
                        f"host 0 did not answer at {config.coordinator} for {patience:.0f} s ({e}); start it, or "
                        "mend --coordinator",
                        LOST,
                    )
            time.sleep(_POLL_SECONDS)
        connection = Connection(_without_delay(sock))
        with contextlib.suppress(OSError):  # the reader finds out
            connection.send({"slora_jax": self.host, "num_hosts": config.num_hosts})
        self._add(0, connection)
        with self._changed:
            while self._welcome is None:
                self._changed.wait(_POLL_SECONDS)
                self._check()
            return self._welcome

    def _add(self, other: int, connection: Connection) -> None:
        reader = threading.Thread(target=self._read, args=(other, connection), name=f"slora-host-{other}", daemon=True)
        with self._changed:
            self._connections[other] = connection
            self._readers.append(reader)
            if len(self._readers) == 1:
                threading.Thread(target=self._beat, name="slora-hosts", daemon=True).start()
        reader.start()

    # Being alike

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Waits until every host has come here, and gives what each said, by its number.

        Args:
          name: of this place; each host comes to it once.
          value: of what msgpack knows.

        Raises:
          EngineStopped: this process was to end, where ``end_process`` did not end it.
        """
        if self.host == 0:
            with self._changed:
                said = self._said.setdefault(name, {})
                said[0] = value
                while len(said) <= len(self._connections):
                    self._changed.wait(_POLL_SECONDS)
                    self._check()
                del self._said[name]
            values = [said[host] for host in sorted(said)]
            self.send({"kind": "agreed", "name": name, "values": values})
            return values
        self.send({"kind": "said", "name": name, "value": value})
        with self._changed:
            while name not in self._agreed:
                self._changed.wait(_POLL_SECONDS)
                self._check()
            return self._agreed.pop(name)

    def agree(self, name: str, fields: Mapping[str, Any]) -> None:
        """Ends all hosts with a sentence that names the first of ``fields`` that is not the same on all of them."""
        first, *others = self.exchange(name, dict(fields))
        for host, other in enumerate(others, 1):
            for field in (*first, *(field for field in other if field not in first)):
                if first.get(field) != other.get(field):
                    self.end(
                        f"host {host} has another {field} than host 0 ({other.get(field)} there, {first.get(field)} "
                        "here on host 0); all hosts need the same flags, model and version",
                        BAD_START,
                    )

    # Messages

    def send(self, message: Mapping[str, Any]) -> None:
        """From host 0 to all others, from another one to host 0. That a host is gone, others find out."""
        for other in self.others:
            self._send(other, message)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What host 0 tells this one, for ever.

        Raises:
          EngineStopped: this process was to end, where ``end_process`` did not end it.
        """
        while True:
            self._check()
            with contextlib.suppress(Empty):
                yield self._messages.get(timeout=_POLL_SECONDS)

    def on_answer(self, callback: Callable[[int, dict[str, Any]], None]) -> None:
        """On host 0, ``callback(host, answer)`` is given what others answer, by one thread for each of them."""
        self._on_answer = callback

    # Ending

    def serve(self, on_stop: Callable[[], None], on_fail: Callable[[str], None]) -> None:
        """From now on, host 0's server stops them all by itself.

        Args:
          on_stop: called, perhaps several times, when another host was asked to stop. Signals to this process are the
            caller's from now on.
          on_fail: called once, with the reason, when a host was lost or failed; when it returns, the process ends.
        """
        with self._changed:
            self._on_fail = on_fail
            self._on_stop = on_stop

    def follow(self) -> None:
        """From now on, a signal to this process asks host 0 to stop them all; a second one does not wait for that."""
        with self._changed:
            self._signal_means_asking = True

    def leave(self) -> NoReturn:
        """Ends all hosts when host 0 has done its work; the others wait for its word, which may be an error.

        Raises:
          EngineStopped: where ``end_process`` did not end this process.
        """
        if self.host == 0:
            self.end("", ASKED)
        with self._changed:
            while True:
                self._check()
                self._changed.wait(_POLL_SECONDS)

    def close(self) -> None:
        """From now on, nothing that others do or say ends this process; for one that goes on without them."""
        with self._changed:
            self._closed = True
        for connection in self._connections.values():
            connection.finish()
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join(_FAREWELL_SECONDS)
        for connection in self._connections.values():
            connection.close()

    def ask_to_stop(self) -> None:
        """What a signal does: ends all hosts with code 0, in the way that fits what they are doing."""
        now = time.monotonic()
        with self._changed:
            if self._on_stop is not None or self._closed:
                return
            asks = self._signal_means_asking and self._asked_at is None
            # One Ctrl-C can come twice, from the terminal and from a launcher.
            if self._asked_at is not None and now - self._asked_at < _SAME_SIGNAL_SECONDS:
                return
            self._asked_at = now
        if asks:
            self.send({"kind": "end", "reason": "", "code": ASKED})
        else:
            self._end(Ending("", ASKED))

    def end(self, reason: str, code: int) -> NoReturn:
        """Ends all hosts for a reason.

        Raises:
          EngineStopped: with the reason, where ``end_process`` did not end this process.
        """
        self._end(Ending(reason, code))
        self._ended.wait(2 * _FAREWELL_SECONDS)  # another thread may have been first, for another reason
        raise EngineStopped(reason)

    def wait_until_lost(self, seconds: float) -> None:
        """Gives a host that may be lost time to be noticed: what devices say of it is a trace, not a sentence."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending is not None, seconds)
        if self._ending is not None:
            self._ended.wait(2 * _FAREWELL_SECONDS)

    def _end(self, ending: Ending) -> None:
        with self._changed:
            if self._ending is not None or self._closed:
                return
            self._ending = ending
            self._changed.notify_all()
        if ending.reason:
            try:
                self._on_fail(ending.reason)
            except Exception:  # the others must hear of it all the same
                logger.exception("what this host does at the end failed")
        self.send({"kind": "end", "reason": ending.reason, "code": ending.code})
        # Who ends while the other still sends takes back what it has said.
        for other in self.others:
            self._connections[other].finish()
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for reader in list(self._readers):
            if reader is not threading.current_thread():
                reader.join(max(0.0, deadline - time.monotonic()))
        try:
            self._end_process(ending)
        finally:
            self._ended.set()

    def _check(self) -> None:
        if self._ending is not None:
            raise EngineStopped(self._ending.reason or "asked to stop")

    # Threads

    def _send(self, other: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its reader says so
            self._connections[other].send(message)

    def _beat(self) -> None:
        while self._ending is None and not self._closed:
            self.send({"kind": "beat"})
            time.sleep(_BEAT_SECONDS)

    def _read(self, other: int, connection: Connection) -> None:
        try:
            while True:
                self._take(other, connection.receive(LOST_SECONDS))
        except TimeoutError:
            why = f"no sign of it for {LOST_SECONDS} s"
        except EOFError:
            why = "its process ended"
        except OSError as e:
            why = e.strerror or str(e)
        except ValueError:
            why = "it sends what no host does"
        self._end(Ending(f"host {other} was lost ({why}); start all hosts again", LOST))

    def _take(self, other: int, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        if kind == "end":
            if not message["reason"] and self._on_stop is not None:
                self._on_stop()
            else:
                self._end(Ending(**message))
        elif kind == "told":
            self._messages.put(message)
        elif kind == "answer":
            self._on_answer(other, message)
        else:
            with self._changed:
                if kind == "said":
                    self._said.setdefault(message["name"], {})[other] = message["value"]
                elif kind == "agreed":
                    self._agreed[message["name"]] = message["values"]
                elif kind == "welcome":
                    self._welcome = message["port"]
                self._changed.notify_all()


@contextlib.contextmanager
def signals_heard(on_signal: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call ``on_signal`` in a thread, at once; for the main thread.

    Python's own handlers would wait until the main thread comes back from compiling, or from the devices. Others may
    be set inside: they are called too.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen():
        with contextlib.suppress(OSError):
            while numbers := reading.recv(16):
                if {signal.SIGINT, signal.SIGTERM} & set(numbers):
                    on_signal()

    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, name="slora-signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()
        listener.join()
        reading.close()


@contextlib.contextmanager
def together(config: MeshConfig) -> Iterator[Meeting | None]:
    """A meeting to ``join``, or None for one host. Whatever ends the block ends the other hosts with the reason.

    For the main thread of a process that does nothing else: with several hosts, it ends with the block.
    """
    if config.num_hosts == 1:
        yield None
        return
    meeting = Meeting(config.host_id)
    with signals_heard(meeting.ask_to_stop):
        try:
            yield meeting
            # Not by the interpreter's own end: there JAX waits for the others, and aborts if one does not come.
            meeting.leave()
        except (SLoRAError, OSError, ModuleNotFoundError) as e:
            meeting.end(f"host {config.host_id}: {' '.join(str(e).split()) or type(e).__name__}", BAD_START)
        except Exception as e:
            meeting.wait_until_lost(_POLL_SECONDS * 4)
            logger.debug("this host failed", exc_info=True)
            what = (str(e).splitlines() or [""])[0]
            meeting.end(f"host {config.host_id} failed: {type(e).__name__}: {what}", LOST)


def _serialization() -> ModuleType:
    """Imported late: it brings JAX along, and signals should be heard before that."""
    from flax import serialization

    return serialization


def _initialize_jax(config: MeshConfig, address: str) -> None:
    """Before anything else that JAX does."""
    import jax

    # It would keep SIGTERM from ending the process, in wait for a training loop that saves its state.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        config.num_hosts,
        config.host_id,
        heartbeat_timeout_seconds=_JAX_SECONDS,
        shutdown_timeout_seconds=LOST_SECONDS,
    )
    # While all are still here: it waits for the others' devices, with a deadline of its own.
    jax.devices()


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _without_delay(sock: socket.socket) -> socket.socket:
    """So that the network sends small messages at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _free_port() -> int:
    with contextlib.closing(_listening(0)) as sock:
        return sock.getsockname()[1]


def _relay(address: str, port: int, meeting: Meeting) -> int:
    """Listens for JAX on this machine, and passes what it says to host 0's service; returns the port."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            here, _ = server.accept()
            there = None
            while there is None:
                try:
                    there = socket.create_connection((address, port), timeout=LOST_SECONDS)
                except OSError:  # not up yet
                    time.sleep(0.1)
            for sock in (here, there):
                _without_delay(sock).settimeout(None)
            threading.Thread(target=_pass_on, args=(here, there, True), daemon=True).start()
            threading.Thread(target=_pass_on, args=(there, here, False), daemon=True).start()

    threading.Thread(target=accept, name="slora-relay", daemon=True).start()
    return server.getsockname()[1]


def _pass_on(source: socket.socket, target: socket.socket, tells_end: bool) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    # JAX's side stays open when host 0's closes: see the module's docstring.
    if tells_end:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
