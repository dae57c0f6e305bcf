"""What an ingress makes of requests and answers that it hands on, without reading more of them than it must."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from slora_jax.api.access import WATCH_PATHS
from slora_jax.api.app import error_body
from slora_jax.api.body import inflated, read_json
from slora_jax.api.bounds import check_parts
from slora_jax.api.server import MOST_BODY_BYTES
from slora_jax.errors import SLoRAError
from slora_jax.fleet.wsgi import Answer, Head, Sent

LOST = "the replica that answered has ended; send the request again"

_LONGEST_NAME = 1000
"""No adapter has a longer name, and Ray keeps the names for a while."""


class About(NamedTuple):
    """What an ingress must know of its replicas: the base model's name, and the largest body they read."""

    model_name: str
    max_body_bytes: int

    def adapter_of(self, sent: Sent) -> str:
        """The adapter that a request asks for; empty if it asks for the base model, or is none that can be read.

        Whether there is such an adapter, and what is wrong with a request, is the replica's to say. Whoever looks on
        is to see one and the same replica each time, so the paths to look at count as adapters too.
        """
        if sent.method != "POST":
            return sent.path if sent.path in WATCH_PATHS else ""
        model = fields_of(sent, self.max_body_bytes).get("model")
        if not isinstance(model, str) or model == self.model_name or len(model) > _LONGEST_NAME:
            return ""
        return model.removeprefix(f"{self.model_name}:")


def fields_of(sent: Sent, most_bytes: int = MOST_BODY_BYTES) -> dict[str, Any]:
    """The object that a request's body is; an empty one if it is none, or cannot be read.

    Args:
      most_bytes: that it may have.
    """
    headers = dict(sent.headers)
    try:
        body, encoding = inflated(sent.body, headers.get("content-encoding"), most_bytes)
        check_parts(body)
        fields = read_json(body, headers.get("content-type"), encoding)
    except SLoRAError:
        return {}
    return fields if isinstance(fields, dict) else {}


def lost_event(path: str, events: int) -> bytes:
    """The last event of a stream of this path whose replica ended; ``events`` came before."""
    if path != "/v1/responses":
        return b"data: " + error_body(LOST, 500) + b"\n\n"
    event = {"type": "error", "code": "server_error", "message": LOST, "param": None, "sequence_number": events}
    return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"


def partly_refused(refused: Sequence[Answer], count: int) -> Answer:
    """What is said if only some of ``count`` replicas could make a change: the word of one that could not."""
    said = json.loads(refused[0].body)["error"]["message"]
    message = f"{len(refused)} of {count} replicas refused what the others did, so undo it or do it again: {said}"
    status = refused[0].head.status
    return Answer(Head(status, (("Content-Type", "application/json"),)), error_body(message, status))
