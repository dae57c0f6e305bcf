"""Reading the JSON body of an HTTP request: strictly, and with a sentence for whatever else was sent."""

import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from slora_jax.errors import InvalidRequest, SLoRAError, shown
from slora_jax.request import has_lone_surrogate

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


_PIECE_BYTES = 2**16
_MOST_MEMBERS = 64  # of gzip data that follow each other; what is left is copied after each


class BodyTooLarge(SLoRAError, ValueError):
    """The body has more bytes, inflated, than the server reads."""


class UnsupportedBody(SLoRAError, ValueError):
    """The body is said to be something other than plain JSON."""


def read_json(body: bytes, content_type: str | None, content_encoding: str | None) -> Any:
    """The value of a body, which must be one JSON text (RFC 8259) in UTF-8; a byte order mark is ignored.

    Refused, because what they mean would have to be guessed: ``NaN`` and ``Infinity``, an object that has a name
    twice, and strings with half of a surrogate pair.

    Args:
      content_type, content_encoding: the headers; None where absent. Without a type, JSON is taken for granted.

    Raises:
      UnsupportedBody: another type or encoding.
      InvalidRequest: it is not such a text.
    """
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedBody(f"the body must be JSON, got {shown(content_type)}; send Content-Type: application/json")
    if (content_encoding or "identity").strip().lower() != "identity":
        raise UnsupportedBody(
            f"the body may be compressed as gzip only, got Content-Encoding: {shown(content_encoding)}"
        )
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"the body is not valid JSON: byte {e.start} is not UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"the body is not valid JSON: {e}") from None
    except RecursionError:
        raise InvalidRequest("the body is not usable JSON: its values are nested too deeply") from None
    except InvalidRequest:
        raise
    except ValueError:  # Python's bound on the digits of an integer
        raise InvalidRequest("the body is not usable JSON: a number in it has thousands of digits") from None
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(value)
    return value


def inflated(body: bytes, content_encoding: str | None, most_bytes: int) -> tuple[bytes, str | None]:
    """A gzip body's content, and no encoding; any other as it is, with its encoding for ``read_json`` to judge.

    It is inflated in pieces, between which other threads run, and no further than it is allowed to go.

    Args:
      most_bytes: that the content may have.

    Raises:
      BodyTooLarge: it has more.
      InvalidRequest: it is not whole gzip data.
    """
    if (content_encoding or "").strip().lower() not in ("gzip", "x-gzip"):
        return body, content_encoding
    pieces: list[bytes] = []
    size, rest, members = 0, body, 0
    while rest or not members:
        members += 1
        if members > _MOST_MEMBERS:
            raise InvalidRequest(f"the body is more than {_MOST_MEMBERS} pieces of gzip data; compress it as one")
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            try:
                piece = member.decompress(rest, _PIECE_BYTES)
            except zlib.error:
                raise InvalidRequest("the body is not valid gzip data; send it as Content-Encoding says") from None
            rest = member.unused_data if member.eof else member.unconsumed_tail
            if not (piece or rest or member.eof):
                raise InvalidRequest("the body's gzip data ends too early; send all of it")
            size += len(piece)
            if size > most_bytes:
                raise BodyTooLarge(f"the body has more than {most_bytes} bytes when inflated; send less at a time")
            pieces.append(piece)
    return b"".join(pieces), None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = set()
        for name, _ in pairs:
            if name in names:
                raise InvalidRequest(
                    f"the body has the field {shown(name)} twice in one object; send it once", name[:80]
                )
            names.add(name)
    return value


def _refuse_constant(name: str) -> float:
    raise InvalidRequest(f"the body is not valid JSON: {name} is no number there; leave the field out")


def _refuse_lone_surrogates(value: Any) -> None:
    for place, text in _strings(value):
        if has_lone_surrogate(text):
            where = _written(place)[:80] or None
            raise InvalidRequest(
                f"{where or 'the body'}: {shown(text)} is not valid Unicode: it holds half of a surrogate pair", where
            )


type _Place = tuple["_Place", str | int] | None
"""Where a value is: where the list or object is that holds it, and its index or name there; None for the whole."""


def _strings(value: Any) -> Iterator[tuple[_Place, str]]:
    """Every string of a value and where it is; of a field's name, where the object is."""
    todo: list[tuple[_Place, Any]] = [(None, value)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, list):
            todo += [((place, i), item) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            yield from ((place, name) for name in value)
            todo += [((place, name), item) for name, item in value.items()]


def _written(place: _Place) -> str:
    """Such as ``messages[0].content``."""
    parts = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "".join(reversed(parts)).removeprefix(".")
