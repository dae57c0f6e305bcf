import random
import time

import pytest

from slora_jax.text.stop import StopMatcher


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool, list[str]]:
    matcher = StopMatcher(stops)
    emitted = []
    for piece in pieces:
        text, stopped = matcher.push(piece)
        emitted.append(text)
        if stopped:
            break
    emitted.append(matcher.flush())
    return "".join(emitted), matcher.stopped, emitted


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The match that ends first (the longest of those), found by trying every prefix of the whole text."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


def test_equals_a_search_of_the_whole_text_for_every_split():
    rng = random.Random(0)
    for _ in range(4000):
        text = "".join(rng.choices("ab\n", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert run(pieces, stops)[:2] == naive(text, stops), (pieces, stops)


def test_nothing_is_withheld_that_cannot_begin_a_stop_string():
    matcher = StopMatcher(["END"])
    assert matcher.push("one E") == ("one ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("T") == ("ENT", False)
    assert matcher.push("END") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_without_stops_text_passes():
    matcher = StopMatcher([])
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_flush_gives_the_withheld_tail_once():
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a <en") == ("a ", False)
    assert matcher.flush() == "<en"
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_the_number_of_stop_strings_does_not_matter():
    rng = random.Random(1)
    text = "".join(rng.choices("abcdefgh", k=20_000))
    times = {}
    for count in (1, 2_000):
        stops = ["".join(rng.choices("abcdefgh", k=20)) + "z" for _ in range(count)]
        StopMatcher(stops)  # making the first one is in proportion to their characters
        best = 1e9
        for _ in range(3):
            started = time.perf_counter()
            assert run([text[i : i + 4] for i in range(0, len(text), 4)], stops)[0] == text
            best = min(best, time.perf_counter() - started)
        times[count] = best
    # More of them miss the processor's caches more often; trying each took 2,000 times as long.
    assert times[2_000] < 60 * times[1]


def test_a_stop_string_may_be_kept():
    for size in (1, 2, 100):
        matcher, text = StopMatcher(["END", "."], include=True), "one END two"
        pieces = [matcher.push(text[i : i + size])[0] for i in range(0, len(text), size)]
        assert "".join(pieces) == "one END" and matcher.stopped
