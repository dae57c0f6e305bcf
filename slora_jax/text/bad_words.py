"""Words that an answer must not have, as rules for the next token."""

from collections.abc import Iterable, Sequence

import numpy as np

from slora_jax.text.tokenizer import Tokenizer


def spellings(words: Iterable[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token sequences that must not come for none of the words to: each as it begins a text, and as it follows a space.

    As vLLM has it, the second counts only if it has as many tokens, of which the first is another one. Words are not
    found in other spellings: in capitals, or as part of a longer word.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
        if bare:
            found[bare] = None
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found[spaced] = None
    return list(found)


class NoBadWords:
    """What one answer may go on with: anything but the last token of a sequence whose others it ends with.

    For one thread at a time.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]):
        """
        Args:
          sequences: that must not come, none of them empty.
        """
        self._last: dict[tuple[int, ...], list[int]] = {}
        for *first, last in sequences:
            self._last.setdefault(tuple(first), []).append(last)
        self._lengths = sorted({len(first) for first in self._last})
        self._tokens: list[int] = []

    def accept(self, token: int) -> bool:
        """Takes the next token of the answer; any may follow, so it returns False."""
        self._tokens.append(token)
        longest = self._lengths[-1] if self._lengths else 0
        del self._tokens[: len(self._tokens) - longest]
        return False

    def allow(self, words: np.ndarray) -> None:
        """Writes which tokens may come next: bit ``t % 32`` of int32 word ``t // 32`` is set for token t."""
        words[:] = -1
        bits = words.view(np.uint32)
        count = len(self._tokens)
        for length in self._lengths:
            if length > count:
                break
            for token in self._last.get(tuple(self._tokens[count - length :]), ()):
                bits[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
