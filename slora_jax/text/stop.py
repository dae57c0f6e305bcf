"""Stop strings in a text that arrives in pieces."""

import functools
from collections import deque
from collections.abc import Iterable


class StopMatcher:
    """Passes text through until one of ``stops`` is complete, and lets none of that out, unless ``include`` says so.

    The first match is the one that ends first; of two that end together, the longer. So the result does not
    depend on how the text was cut into pieces: ``"".join`` of all that is emitted (and ``flush``) is the text
    up to the first match, or all of it.

    A character of the text costs the same however many stops there are. Making the first matcher of a set of stops
    takes time in proportion to their characters (about 1 ms for 1,000); the next ones of the same set share it.
    """

    def __init__(self, stops: Iterable[str], include: bool = False):
        self._include = include
        self._stops = _automaton(tuple(sorted(set(stops))))
        self._node = _START
        self._withheld = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may be shown now, and whether a stop string is complete."""
        if self._stopped:
            return "", True
        stops, node = self._stops, self._node
        if stops.is_empty:
            return text, False
        for position, character in enumerate(text, 1):
            node = stops.next(node, character)
            if length := stops.match_length[node]:
                self._stopped = True
                window, self._withheld = self._withheld + text[:position], ""
                return window if self._include else window[: len(window) - length], True
        self._node = node
        window = self._withheld + text
        keep = len(window) - stops.depth[node]
        self._withheld = window[keep:]
        return window[:keep], False

    def flush(self) -> str:
        """What was withheld, when the text ended without a match."""
        text, self._withheld = self._withheld, ""
        self._node = _START
        return text


_START = 0


class _Automaton:
    """Aho and Corasick's: a node for each beginning of a stop string. After any text one is at the node of the longest
    beginning that the text ends with.

    Attributes:
      depth: of each node, the length of that beginning.
      match_length: of each node, the length of the longest stop string that it ends with; 0 for none.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match_length = [0]
        for stop in stops:
            self.match_length[self._add(stop)] = len(stop)
        self._shorter = self._shorter_beginnings()

    @property
    def is_empty(self) -> bool:
        """Whether there are no stop strings."""
        return len(self.depth) == 1

    def next(self, node: int, character: str) -> int:
        """Where ``character`` leads to from ``node``."""
        while (child := self._children[node].get(character)) is None and node != _START:
            node = self._shorter[node]
        return _START if child is None else child

    def _add(self, stop: str) -> int:
        node = _START
        for depth, character in enumerate(stop, 1):
            child = self._children[node].get(character)
            if child is None:
                child = self._children[node][character] = len(self._children)
                self._children.append({})
                self.depth.append(depth)
                self.match_length.append(0)
            node = child
        return node

    def _shorter_beginnings(self) -> list[int]:
        """Of each node, the node of the longest beginning that is a proper end of it."""
        self._shorter = shorter = [_START] * len(self._children)
        waiting = deque(self._children[_START].values())
        while waiting:
            node = waiting.popleft()
            self.match_length[node] = self.match_length[node] or self.match_length[shorter[node]]
            for character, child in self._children[node].items():
                shorter[child] = self.next(shorter[node], character)
                waiting.append(child)
        return shorter


@functools.lru_cache(maxsize=16)  # the completions of a request, and requests alike, share one
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    if not all(stops):
        raise ValueError("stop strings must not be empty")
    return _Automaton(stops)
