"""Meetings of several hosts inside of one process."""

import contextlib
import socket
from collections.abc import Iterator

from slora_jax.engine.meeting import Connection, Ending, Meeting


class Host(Meeting):
    """One that only notes how it ended."""

    def __init__(self, host: int, connections: dict[int, Connection]):
        self.endings: list[Ending] = []
        super().__init__(host, connections, self.endings.append)


@contextlib.contextmanager
def hosts_that_met(count: int) -> Iterator[list[Host]]:
    pairs = [socket.socketpair(socket.AF_UNIX) for _ in range(1, count)]
    pairs = [tuple(map(Connection, pair)) for pair in pairs]
    first = Host(0, {host: pair[0] for host, pair in enumerate(pairs, 1)})
    others = [Host(host, {0: pair[1]}) for host, pair in enumerate(pairs, 1)]
    hosts = [first, *others]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.close()
