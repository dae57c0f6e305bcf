import json
import random

import pytest

from slora_jax.api.bounds import MOST_PARTS, check_parts, useful_body_bytes
from slora_jax.errors import InvalidRequest


def nested(parts: int) -> list:
    """A value of so many lists and objects, whose strings hold brackets, quotes and backslashes."""
    draw = random.Random(parts)
    open_parts = [value := []]
    for _ in range(parts - 1):
        part = draw.choice(([], {}))
        holder = draw.choice(open_parts[-50:])
        noise = "".join(draw.choices('[{]}"\\,:é\n', k=draw.randrange(4)))
        if isinstance(holder, list):
            holder += [noise, part]
        else:
            holder[f"{len(holder)}{noise}"] = part
        open_parts.append(part)
    return value


def test_parts_are_counted_exactly():
    check_parts(json.dumps(nested(MOST_PARTS)).encode())
    for more in (1, 2, 1000):
        with pytest.raises(InvalidRequest, match=f"holds {MOST_PARTS + more} JSON lists and objects"):
            check_parts(json.dumps(nested(MOST_PARTS + more), ensure_ascii=False).encode())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"' * 100_000, "\\[" * 100_000, '\\"[' * 100_000, "\\" * 100_001 + "["]
)
def test_brackets_in_a_text_are_no_parts(text):
    check_parts(json.dumps({"prompt": text, "stop": [text]}).encode())


@pytest.mark.parametrize("body", [b"", b"{", b'"', b'{"a": "' + b"[" * 100_000, b"\xff" * 10])
def test_what_is_no_json_is_left_to_whoever_reads_it(body):
    check_parts(body)


def test_brackets_that_are_no_json_are_too_many_all_the_same():
    with pytest.raises(InvalidRequest, match="100000"):
        check_parts(b"[" * 100_000)


@pytest.mark.parametrize("context", [512, 131_072, 1_048_576])
def test_a_context_of_token_ids_fits_in_a_body(context):
    body = json.dumps({"model": "m" * 100, "prompt": [128_255] * context, "max_tokens": 1})
    assert len(body) <= useful_body_bytes(context)
