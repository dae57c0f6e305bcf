"""The process that writes to the sockets of streams, so that the server's does not: see ``relay``.

It is started by this file's path, and imports nothing but the standard library: in a hundredth of a second it is there.
It ends when the server's process does, however that ends, for its own end of the connection is then closed.
"""

import contextlib
import select
import socket
import struct
import sys

with contextlib.suppress(ImportError):  # not on Windows
    import resource

ORDER = struct.Struct("<IBI")
"""What the server says: a stream's number, one of OPEN, DATA and CLOSE, and the bytes that follow."""
OPEN, DATA, CLOSE = range(3)
"""A stream begins, and its socket comes along; bytes for its client; there will be no more."""

STATUS = struct.Struct("<IB")
"""What it is told: a stream's number, and one of the following."""
FULL, EMPTY, GONE, CLOSED = range(4)
"""The client does not take all that was sent; it has taken all; nobody reads it any more; all is sent after CLOSE."""

_MOST_BYTES = 1 << 20
_MOST_SOCKETS = 64


class _Stream:
    """One client's socket, and what it has not taken yet."""

    def __init__(self, number: int, sock: socket.socket):
        self.number = number
        self.socket = sock
        self.waiting = bytearray()
        self.ends = False

    def take(self) -> bool:
        """Sends what the client takes now. Returns whether it is still there."""
        try:
            while self.waiting:
                del self.waiting[: self.socket.send(self.waiting)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class _Writer:
    """All streams, and the connection to the server."""

    def __init__(self, server: socket.socket):
        self._server = server
        self._streams: dict[int, _Stream] = {}
        self._of_descriptor: dict[int, _Stream] = {}
        self._poll = select.poll()
        self._poll.register(server, select.POLLIN)
        self._sockets: list[int] = []
        self._heard = bytearray()
        self._told = bytearray()

    def run(self) -> None:
        """Until the server closes its end."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._server.fileno():
                    self._go_on(self._of_descriptor[descriptor])
                elif not self._hear():
                    return
            if self._told:
                told, self._told = self._told, bytearray()
                self._server.sendall(told)

    def _hear(self) -> bool:
        """Does what the server has said by now. Returns whether there is a server."""
        data, sockets, *_ = socket.recv_fds(self._server, _MOST_BYTES, _MOST_SOCKETS)
        if not data:
            return False
        self._sockets += sockets
        self._heard += data
        begin, changed = 0, {}
        while len(self._heard) - begin >= ORDER.size:
            number, order, size = ORDER.unpack_from(self._heard, begin)
            end = begin + ORDER.size + size
            if len(self._heard) < end:
                break
            stream = self._do(number, order, self._heard[begin + ORDER.size : end])
            if stream is not None:
                changed[number] = stream
            begin = end
        del self._heard[:begin]
        for stream in changed.values():
            if stream.socket.fileno() not in self._of_descriptor:
                self._go_on(stream)
        return True

    def _do(self, number: int, order: int, data: bytearray) -> _Stream | None:
        if order == OPEN:
            sock = socket.socket(fileno=self._sockets.pop(0))
            sock.setblocking(False)
            self._streams[number] = _Stream(number, sock)
            return None
        stream = self._streams.get(number)
        if stream is not None:  # else its client is gone, and the server does not know yet
            stream.waiting += data
            stream.ends |= order == CLOSE
        elif order == CLOSE:
            self._tell(number, CLOSED)
        return stream

    def _go_on(self, stream: _Stream) -> None:
        """Sends what there is, and says what has changed."""
        descriptor = stream.socket.fileno()
        waited = descriptor in self._of_descriptor
        is_there = stream.take()
        waits = is_there and bool(stream.waiting)
        if waits and not waited:
            self._of_descriptor[descriptor] = stream
            self._poll.register(descriptor, select.POLLOUT)
            self._tell(stream.number, FULL)
        elif waited and not waits:
            del self._of_descriptor[descriptor]
            self._poll.unregister(descriptor)
            self._tell(stream.number, EMPTY)
        if waits:
            return
        if not is_there:
            self._tell(stream.number, GONE)
        if stream.ends:
            self._tell(stream.number, CLOSED)
        if stream.ends or not is_there:
            # Its other descriptor, the server's, stays open.
            stream.socket.close()
            del self._streams[stream.number]

    def _tell(self, number: int, status: int) -> None:
        self._told += STATUS.pack(number, status)


def main() -> None:
    """Serves the connection whose descriptor is the first argument."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        _Writer(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
