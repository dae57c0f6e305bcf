"""How much of a request is read at all.

Python reads JSON in one piece, and while it does so no other thread runs: the work must be bounded beforehand, by
the bytes and by what costs most, the lists and objects.
"""

import numpy as np

from slora_jax.errors import InvalidRequest

MOST_PARTS = 32_768
"""Most lists and objects in a request's JSON. Each costs Python as much as a hundred letters, and its garbage
collector more; a chat of 10,000 messages with text parts has 30,000."""

_LEAST_BYTES = 2**20
_BYTES_PER_TOKEN = 16


def useful_body_bytes(max_model_len: int) -> int:
    """The largest body that the API has use for with this context (tokens): a MiB, or 16 bytes for each token.

    A token id is at most 8 bytes of JSON and a token of text 4 or 5 on average, so the context fits twice and more;
    a small context leaves the MiB to many prompts.
    """
    return max(_LEAST_BYTES, _BYTES_PER_TOKEN * max_model_len)


def check_parts(body: bytes) -> None:
    """Looks at JSON text before it is read.

    Raises:
      InvalidRequest: it holds more than ``MOST_PARTS`` lists and objects.
    """
    # Most bodies are told by their brackets alone, those in strings included.
    if body.count(b"[") + body.count(b"{") > MOST_PARTS and (parts := _parts(body)) > MOST_PARTS:
        raise InvalidRequest(f"the body holds {parts} JSON lists and objects; send at most {MOST_PARTS}")


def _parts(body: bytes) -> int:
    """How many lists and objects JSON text holds, counted without making a Python object of any."""
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(without_escapes, np.uint8)
    in_string = np.logical_xor.accumulate(characters == ord('"'))
    opening = (characters == ord("[")) | (characters == ord("{"))
    return int(np.count_nonzero(opening & ~in_string))
