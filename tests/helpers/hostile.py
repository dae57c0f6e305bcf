"""Strategies for files that somebody else wrote: real documents with any place changed, real bytes with any changed.

``mutated`` stays within JSON that ``json.dumps`` writes, so that what is tested is the reader of the values;
``hostile_bytes`` leaves JSON behind, so that what is tested is the reader of the file.
"""

import copy
from typing import Any

from hypothesis import strategies as st

type Place = tuple[str | int, ...]
"""Keys and indices that lead from a document to one of its values."""

_SPAN = 64

edges = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 3, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, -1.5),
        *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400),
        *(float("nan"), float("inf"), float("-inf")),
        *(
            "",
            " ",
            "0",
            "1",
            "-1",
            "1e3",
            "true",
            "null",
            "nan",
            "None",
            "\0",
            "\ud800",
            "é",
            "ﬁ",
            "../x",
            "/",
            "a" * 5000,
        ),
        *([], {}, [[]], [None], [{}], {"": None}, [1, 2], ["a"], {"a": 1}, [True], [1.5], [[1], [2]]),
    ]
).map(copy.deepcopy)  # or one example would change what the next one draws
"""Values at which readers of numbers, names and containers have stumbled."""

values: st.SearchStrategy[Any] = edges | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value, and what Python's ``json`` takes for one: NaN and the infinities."""


def places(document: Any) -> list[Place]:
    """Every place in a JSON document, the document itself (``()``) first."""
    found: list[Place] = [()]
    if isinstance(document, dict):
        found += [(key, *rest) for key, value in document.items() for rest in places(value)]
    elif isinstance(document, list):
        found += [(i, *rest) for i, value in enumerate(document) for rest in places(value)]
    return found


def value_at(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def mutated(document: Any) -> st.SearchStrategy[Any]:
    """The document with one to three places changed; ``document`` itself is left as it is.

    A place is replaced (by any JSON value, or by what stands elsewhere in the document), deleted, renamed, or doubled:
    an entry of a list is there twice, a value of an object under a second key too.
    """

    @st.composite
    def strategy(draw) -> Any:
        result = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 3))):
            result = _changed(draw, result)
        return result

    return strategy()


def _changed(draw, document: Any) -> Any:
    found = places(document)
    place = draw(st.sampled_from(found))
    if not place:
        # The whole document is one place of many, and the least telling one to change.
        place = draw(st.sampled_from(found))
    if not place:
        return draw(values)
    parent, key = value_at(document, place[:-1]), place[-1]
    match draw(st.sampled_from(("value", "value", "value", "other", "delete", "rename", "double"))):
        case "value":
            parent[key] = draw(values)
        case "other":
            parent[key] = copy.deepcopy(value_at(document, draw(st.sampled_from(found))))
        case "delete":
            del parent[key]
        case "rename" if isinstance(parent, dict):
            name = draw(_keys(parent))
            parent[name] = parent.pop(key)
        case "double" if isinstance(parent, dict):
            parent[draw(_keys(parent))] = copy.deepcopy(parent[key])
        case _:
            parent.insert(key, copy.deepcopy(parent[key]))
    return document


def _keys(siblings: dict[str, Any]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(siblings)) | st.text(max_size=8)


def hostile_bytes(raw: bytes) -> st.SearchStrategy[bytes]:
    """``raw`` cut short, with bytes changed, repeated or put in: marks of order, invalid UTF-8, nesting bombs, numbers
    of thousands of digits. Rarely, something else altogether."""

    @st.composite
    def strategy(draw) -> bytes:
        at = draw(st.integers(0, len(raw)))
        end = min(len(raw), at + draw(st.integers(0, _SPAN)))
        match draw(st.sampled_from(("cut", "replace", "insert", "insert", "repeat", "encode", "other"))):
            case "cut":
                return raw[:at]
            case "replace":
                return raw[:at] + draw(_fragments) + raw[end:]
            case "insert":
                return raw[:at] + draw(_fragments) + raw[at:]
            case "repeat":
                return raw[:end] + raw[at:end] + raw[end:]
            case "encode":
                return draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n"))) + raw
            case _:
                return draw(_fragments)

    return strategy()


_fragments = st.binary(max_size=12) | st.sampled_from(
    [
        *(
            b"",
            b"\0",
            b"\xff",
            b"\xc3",
            b"\xed\xa0\x80",
            b"\xef\xbb\xbf",
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b",",
            b":",
            b"\\",
        ),
        *(
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"-0",
            b"0x10",
            b"null",
            b"true",
            b"9" * 5000,
            b"1" * 400,
            b"1." + b"0" * 9999,
        ),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 2000 + b"]" * 2000, b"- " * 2000, b"\xff" * 8, b"\x7f" * 8),
    ]
)
