"""Errors a caller can act on. Each message says what was wrong, what was got, and what to do.

Only ``slora_jax.api`` knows HTTP status codes; it maps these classes to them. Expected shortage (no free page,
an adapter still loading) is not an error and never raises: see ``memory.pages`` and ``adapters.store``.
"""


class SLoRAError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequest(SLoRAError, ValueError):
    """A request parameter is out of range, or the prompt cannot fit; ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for an answer in the model's context."""


class UnknownAdapter(SLoRAError, LookupError):
    """No adapter (or model) of that name is registered."""


class BadAdapter(SLoRAError, ValueError):
    """An adapter folder was refused: it cannot be served exactly as trained."""


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
