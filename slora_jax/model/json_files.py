"""Reading JSON that somebody else wrote: whatever stands in it, it is checked, or refused in a sentence."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from slora_jax.errors import UnsupportedModel, shown

_MAX_BYTES = 100 * 10**6
"""No file of a model folder that is JSON comes near; it is what safetensors allows a header."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UnsupportedModel: there is no such file, or it holds something else; the message names it.
    """
    try:
        if not path.is_file():
            got = "is no file" if path.exists() else "not found"
            raise UnsupportedModel(f"{path} {got}; a model folder holds config.json and *.safetensors")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UnsupportedModel(f"{path} has {size} bytes, which no such file needs; fetch it again")
        raw = path.read_bytes()
    except OSError as e:
        raise UnsupportedModel(f"{path} cannot be read: {e.strerror or e}") from None
    return parse_json(raw, str(path))


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same; empty where there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def parse_json(raw: bytes, source: str) -> dict[str, Any]:
    """The object that JSON text holds; ``source`` is what messages call it.

    Raises:
      UnsupportedModel: it is not UTF-8, not JSON, not an object, or an object in it has a key twice: readers differ in
        which they take.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise UnsupportedModel(f"{source} is not valid JSON that can be read: it is nested too deep") from None
    except UnicodeDecodeError as e:
        raise UnsupportedModel(f"{source} is not valid JSON: not UTF-8 at byte {e.start}") from None
    except ValueError as e:
        raise UnsupportedModel(f"{source} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{source} must hold a JSON object, got {shown(value)}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (double, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the field {shown(double)} twice")
    return found


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of an object in a file, each read as what it must be.

    Every method raises ``UnsupportedModel`` with file, field, what it got and what it takes. A field that is missing is
    its ``default``; one that is null is None where ``null`` allows it, and refused elsewhere.

    Attributes:
      values: the object.
      source: what messages call the file.
      prefix: what stands before a field's name in messages, for an object within an object.
    """

    values: Mapping[str, Any]
    source: str
    prefix: str = ""

    def refuse(self, name: str, problem: str) -> UnsupportedModel:
        """The error that says what is wrong with a field."""
        return UnsupportedModel(f"{self.source}: {self.prefix}{name}{problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there, and not null."""
        return self.values.get(name) is not None

    @overload
    def integer(self, name: str, default: int, low: int, high: int, *, null: Literal[False] = False) -> int: ...

    @overload
    def integer(self, name: str, default: int | None, low: int, high: int, *, null: bool = False) -> int | None: ...

    def integer(self, name: str, default: int | None, low: int, high: int, *, null: bool = False) -> int | None:
        value = self.values.get(name, default)
        if value is None and (null or name not in self.values):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f" must be an integer from {low} to {high}, got {shown(value)}")
        return value

    @overload
    def number(self, name: str, default: float, low: float, high: float, *, null: Literal[False] = False) -> float: ...

    @overload
    def number(
        self, name: str, default: float | None, low: float, high: float, *, null: bool = False
    ) -> float | None: ...

    def number(self, name: str, default: float | None, low: float, high: float, *, null: bool = False) -> float | None:
        value = self.values.get(name, default)
        if value is None and (null or name not in self.values):
            return None
        if not _is_number(value) or not low <= value <= high:
            raise self.refuse(name, f" must be a number from {low:g} to {high:g}, got {shown(value)}")
        return float(value)

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        value = self.values.get(name)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(_is_number(item) and low <= item <= high for item in value)
        ):
            raise self.refuse(name, f" must be {count} numbers from {low:g} to {high:g}, got {shown(value)}")
        return tuple(float(item) for item in value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, f" must be true or false, got {shown(value)}")
        return value

    def tokens(self, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
        """Token ids: one, a list, or null for none, each once.

        Those that the vocabulary has not are left out: no step can choose them, and folders are saved with -1 for none.
        """
        value = self.values.get(name, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.refuse(name, f" must be a token id or a list of them, got {shown(value)}")
        return tuple(dict.fromkeys(item for item in ids if 0 <= item < vocab_size))

    def object(self, name: str) -> "Fields | None":
        """An object within this one, or None where it is missing, null or empty."""
        value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, f" must be an object, got {shown(value)}")
        return Fields(value, self.source, f"{self.prefix}{name}.")


def _is_number(value: Any) -> bool:
    # Comparing with bounds comes next; an integer that no float holds is compared all the same.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )
