"""Errors a caller can act on. Each message says what was wrong, what was got, and what to do.

Only ``slora_jax.api`` knows HTTP status codes; it maps these classes to them. Expected shortage (no free page,
an adapter still loading) is not an error and never raises: see ``memory.pages`` and ``adapters.store``.
"""

import itertools
import json
from collections.abc import Mapping, Set
from typing import Any

_LONGEST_SHOWN = 80
_MOST_SHOWN = 6
_DEEPEST_SHOWN = 3


def shown(value: Any) -> str:
    """What was got, for a message: JSON of at most 80 characters, whatever the value's size or depth.

    Only as much of the value is looked at as is shown. What JSON does not have is shown by its ``repr``.
    """
    text = json.dumps(_pruned(value, _DEEPEST_SHOWN), default=lambda other: repr(other)[:_LONGEST_SHOWN])
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def _pruned(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value[:_LONGEST_SHOWN]
    if isinstance(value, int) and value.bit_length() > 256:
        # Python refuses to write numbers of thousands of digits.
        return f"an integer of {value.bit_length()} bits"
    if not isinstance(value, (list, tuple, Set, Mapping)):
        return value
    if value and depth == 0:
        return "..."
    if isinstance(value, Mapping):
        items = itertools.islice(value.items(), _MOST_SHOWN)
        return {str(_pruned(name, 0)): _pruned(item, depth - 1) for name, item in items}
    first = [_pruned(item, depth - 1) for item in itertools.islice(value, _MOST_SHOWN)]
    return first + ["..."] * (len(value) > _MOST_SHOWN)


class SLoRAError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequest(SLoRAError, ValueError):
    """A request parameter is out of range, or the prompt cannot fit; ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room in the model's context for the answer that was asked for, or for any."""


class UnknownAdapter(SLoRAError, LookupError):
    """No adapter (or model) of that name is registered."""


class BadAdapter(SLoRAError, ValueError):
    """An adapter folder was refused: it cannot be served exactly as trained."""


class AdapterExists(BadAdapter):
    """The name stands for an adapter already, and nobody asked for it to be replaced."""


class UnsupportedModel(SLoRAError, ValueError):
    """A base model's configuration or weights ask for something this engine does not compute."""


class Overloaded(SLoRAError):
    """The waiting queue is full; the request was not taken. Try again later."""


class ObjectiveMissed(Overloaded):
    """The request was given up before its first token, which could not have come within its objective."""


class EngineStopped(SLoRAError, RuntimeError):
    """The engine was closed, or its loop failed; no request can be answered any more."""


class PoolMisuse(SLoRAError, RuntimeError):
    """A page was freed twice or used without being owned: a bug in the caller, never load."""
