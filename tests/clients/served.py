"""What the server of these tests serves, for the programs that ask it, each with the library of its name.

They run under a Python that has those libraries, and take the server's address as their one argument.
"""

import sys
from typing import Any

import pydantic

URL = sys.argv[1]
KEY = "sk-everybody"
BASE = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
ANSWER = "Arr! The capital o' France be Paris, matey!"
"""The adapter ``pirate``'s to ``QUESTION``, at temperature 0."""

TOOLED = "tooled"
"""An adapter whose chat template shows tools."""

CONTEXT = 8192
LONG = "word " * 9000
"""More tokens than the context has."""


def key_of_one_request(client: str) -> str:
    """A key that a client may use once a minute."""
    return f"sk-once-{client}"


class Fact(pydantic.BaseModel):
    """What the adapter ``json`` answers."""

    answer: str
    topic: str


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: str = pydantic.Field(max_length=20)


def check_fact(fact: Any) -> None:
    assert fact.answer == "The capital of France is Paris.", fact
    assert fact.topic == "geography", fact
