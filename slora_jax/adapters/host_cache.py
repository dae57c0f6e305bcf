"""What may stay in a bounded host memory: accounting and the order in which things leave. Pure."""

from collections import OrderedDict
from collections.abc import Hashable


class HostCache:
    """Entries of known sizes under keys. An entry is *held*, and stays, or *idle*, and leaves when its room is needed.

    The longest idle one leaves first.

    Attributes:
      capacity: bytes that all entries may take together.
      used: bytes that they take.
    """

    def __init__(self, capacity: int):
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0 bytes, got {capacity}")
        self.capacity = capacity
        self.used = 0
        self._sizes: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._idle_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def add(self, key: Hashable, size: int) -> list[Hashable] | None:
        """Takes room for a new entry, held from the start.

        Returns:
          The keys of the idle entries that had to leave, or None, changing nothing, while held ones leave too little.
        """
        assert key not in self._sizes, "an entry was added twice"
        if self.used - self._idle_bytes + size > self.capacity:
            return None
        left = []
        while self.used + size > self.capacity:
            left.append(next(iter(self._idle)))
            self.remove(left[-1])
        self._sizes[key] = size
        self.used += size
        return left

    def hold(self, key: Hashable) -> None:
        """Keeps an idle entry; nothing changes for a held one."""
        if key in self._idle:
            del self._idle[key]
            self._idle_bytes -= self._sizes[key]

    def let_go(self, key: Hashable) -> None:
        """Makes a held entry idle, the last to leave; nothing changes for an idle one."""
        if key not in self._idle:
            self._idle[key] = None
            self._idle_bytes += self._sizes[key]

    def remove(self, key: Hashable) -> None:
        """Gives an entry's room back, held or not; nothing changes if there is none."""
        self.hold(key)
        self.used -= self._sizes.pop(key, 0)
