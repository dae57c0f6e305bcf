"""What a new replica of a fleet must do again, of what was done to the adapters."""

import json

import pytest

from slora_jax.fleet.changes import Change, with_change
from slora_jax.fleet.wsgi import Sent


def log_of(*done: tuple) -> list[int]:
    """The numbers of the changes that are left of these, each an action and fields of its body."""
    log: list[Change] = []
    for number, (action, fields) in enumerate(done, 1):
        body = json.dumps(fields).encode()
        log = with_change(log, Change(number, Sent("POST", f"/v1/{action}_lora_adapter", "", (), body), "a"))
    return [change.number for change in log]


A, B = {"lora_name": "a"}, {"lora_name": "b"}


@pytest.mark.parametrize(
    ("done", "left"),
    [
        ([("load", A), ("load", B)], [1, 2]),
        ([("load", A), ("pin", A), ("load", B), ("unload", A)], [3, 4]),
        # One that is not in the fleet's file needs no unloading, but one that is does: nobody knows here.
        ([("unload", A), ("load", A)], [1, 2]),
        ([("load", A), ("pin", A), ("load", A | {"load_inplace": True})], [3]),
        ([("load", A), ("unload", A)] * 50, [100]),
    ],
)
def test_what_is_void_is_forgotten(done, left):
    assert log_of(*done) == left
