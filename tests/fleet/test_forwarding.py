"""What an ingress reads of a request, and what it says where a replica cannot."""

import gzip
import json

import pytest

from slora_jax.api.app import error_body
from slora_jax.fleet.forwarding import LOST, About, lost_event, partly_refused
from slora_jax.fleet.wsgi import Answer, Head, Sent

ABOUT = About("base", 1000)
JSON = ("content-type", "application/json")


@pytest.mark.parametrize(
    ("body", "headers", "adapter"),
    [
        (b'{"model": "pirate"}', (JSON,), "pirate"),
        (b'{"model": "base:pirate"}', (JSON,), "pirate"),
        (b'{"model": "base"}', (JSON,), ""),
        (b'{"model": "org/haiku", "prompt": "x"}', (), "org/haiku"),
        # Without the time: tests are named by their arguments, and all workers of a run must name them alike.
        (gzip.compress(b'{"model": "pirate"}', mtime=0), (JSON, ("content-encoding", "gzip")), "pirate"),
        (gzip.compress(b" " * 2000 + b'{"model": "pirate"}', mtime=0), (JSON, ("content-encoding", "gzip")), ""),
        (b'{"model": 3}', (JSON,), ""),
        (b'{"model": "a", "model": "b"}', (JSON,), ""),
        (b'["pirate"]', (JSON,), ""),
        (b"[" * 900, (JSON,), ""),
        (b'{"model": "\\ud800"}', (JSON,), ""),
        (b"\xff", (JSON,), ""),
        (b"", (JSON,), ""),
    ],
)
def test_the_adapter_of_a_request(body, headers, adapter):
    assert ABOUT.adapter_of(Sent("POST", "/v1/completions", "", headers, body)) == adapter


def test_onlookers_see_one_replica():
    assert ABOUT.adapter_of(Sent("GET", "/v1/pool", "", (), b"")) == "/v1/pool"
    assert ABOUT.adapter_of(Sent("GET", "/v1/models", "", (), b"")) == ""


def test_the_end_of_a_lost_stream_has_the_form_of_its_route():
    for path in ("/v1/completions", "/v1/chat/completions"):
        said = lost_event(path, 3)
        assert said.startswith(b"data: ") and said.endswith(b"\n\n")
        assert json.loads(said[6:])["error"]["message"] == LOST
    first, second = lost_event("/v1/responses", 7).decode().rstrip().split("\n")
    event = json.loads(second.removeprefix("data: "))
    assert first == f"event: {event['type']}" and event["type"] == "error" and event["sequence_number"] == 7


def test_a_change_that_some_refuse_is_told_in_their_words():
    refusal = Answer(Head(400, ()), error_body("/x holds no adapter_config.json", 400))
    answer = partly_refused([refusal], 3)
    message = json.loads(answer.body)["error"]["message"]
    assert answer.head.status == 400 and message.startswith("1 of 3 replicas") and "holds no adapter_config" in message
