"""Stop strings in a text that arrives in pieces."""

from collections.abc import Iterable


class StopMatcher:
    """Passes text through until one of ``stops`` is complete, and never lets any of it out.

    The first match is the one that ends first; of two that end together, the longer. So the result does not
    depend on how the text was cut into pieces: ``"".join`` of all that is emitted (and ``flush``) is the text
    up to the first match, or all of it.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(dict.fromkeys(stops))
        if not all(self._stops):
            raise ValueError("stop strings must not be empty")
        self._longest_prefix = max(map(len, self._stops), default=1) - 1
        self._withheld = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may be shown now, and whether a stop string is complete."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        window = self._withheld + text
        found = [(start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            self._stopped, self._withheld = True, ""
            return window[: min(found)[1]], True
        keep = len(window) - self._unfinished(window)
        self._withheld = window[keep:]
        return window[:keep], False

    def flush(self) -> str:
        """What was withheld, when the text ended without a match."""
        text, self._withheld = self._withheld, ""
        return text

    def _unfinished(self, window: str) -> int:
        """Length of the longest end of ``window`` that begins a stop string."""
        for length in range(min(self._longest_prefix, len(window)), 0, -1):
            tail = window[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
