"""What was changed of the adapters since a fleet's start, as far as a new replica must do it again."""

from collections.abc import Sequence
from typing import NamedTuple

from slora_jax.fleet.forwarding import fields_of
from slora_jax.fleet.wsgi import Sent

_UNLOAD = "/v1/unload_lora_adapter"


class Change(NamedTuple):
    """A request that changed which adapters there are.

    Attributes:
      number: 1 for the first, and so on.
      first: the replica that answered it, before all others were told.
    """

    number: int
    sent: Sent
    first: str


def with_change(log: Sequence[Change], change: Change) -> list[Change]:
    """The log with one change more, and without those that it makes void.

    An adapter that is unloaded, or replaced, has no history before that. So the log is as long as there are adapters
    that came or went, and not as there were changes.
    """
    name, is_void = _about(change.sent)
    return [*(before for before in log if not is_void or _about(before.sent)[0] != name), change]


def _about(sent: Sent) -> tuple[str | None, bool]:
    """The adapter's name, and whether what was done to it before does not matter any more."""
    fields = fields_of(sent)
    return fields.get("lora_name"), sent.path == _UNLOAD or fields.get("load_inplace") is True
