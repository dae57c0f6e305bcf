"""Tokens that a tokenizer beside an adapter adds, which the base model must have.

Training saves its tokenizer into the adapter's folder. A token added there beyond the base's vocabulary has no
embedding here, and what was trained with it cannot be asked for.
"""

import json
from collections.abc import Iterator
from typing import Any

from slora_jax.adapters.tensor_file import shown
from slora_jax.errors import BadAdapter

MAX_FILE_BYTES = 256 * 2**10
"""Read of each file, and all of it but in the case of ``tokenizer.json``, which has added tokens before the rest."""

TOKENIZER_FILE = "tokenizer.json"
TOKEN_FILES = ("added_tokens.json", "tokenizer_config.json", TOKENIZER_FILE)
_ADDED = '"added_tokens"'


def check_tokens(file: str, content: bytes, vocab_size: int) -> None:
    """Refuses added tokens that the base model has not.

    Args:
      file: one of ``TOKEN_FILES``.
      content: its first ``MAX_FILE_BYTES`` bytes.
      vocab_size: tokens of the base model.

    Raises:
      BadAdapter: such a token, or a file that says nothing certain; the message names the file and the field.
    """
    for token, number in _added_tokens(file, content):
        if type(number) is not int or number < 0:
            raise BadAdapter(f"{file}: the id of added token {shown(token)} must be a number, got {shown(number)}")
        if number >= vocab_size:
            raise BadAdapter(
                f"{file} adds token {shown(token)} with id {number}, but the base model has {vocab_size} tokens: its "
                "embedding is in no file; serve the base model that it was trained with, or train without new tokens"
            )


def _added_tokens(file: str, content: bytes) -> Iterator[tuple[Any, Any]]:
    """Texts and ids, as far as the file lists them."""
    if file == TOKENIZER_FILE:
        for token in _list_of_tokenizer(content):
            fields = token if isinstance(token, dict) else {}
            yield fields.get("content", token), fields.get("id")
        return
    field = None if file == "added_tokens.json" else "added_tokens_decoder"
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise BadAdapter(
            f"{file} is not valid JSON, or too long; save the tokenizer again or remove the file"
        ) from None
    tokens = document.get(field) if field and isinstance(document, dict) else document
    if tokens is None:
        return
    if not isinstance(tokens, dict):
        raise BadAdapter(f"{file}: {field or 'the whole'} must be an object, got {shown(tokens)}")
    for key, value in tokens.items():
        if field is None:
            yield key, value
        else:
            yield value.get("content") if isinstance(value, dict) else value, _number(key)


def _number(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key


def _list_of_tokenizer(content: bytes) -> list:
    """The list without the rest of the file, whose vocabulary may have megabytes."""
    text = content.decode("utf-8", "replace")
    place = text.find(_ADDED)
    if place < 0:
        return []
    start = text.find("[", place)
    try:
        # Anything but a colon between the two is another use of the words.
        is_list = start >= 0 and text[place + len(_ADDED) : start].strip() == ":"
        tokens = json.JSONDecoder().raw_decode(text, start)[0] if is_list else []
    except (ValueError, RecursionError):
        raise BadAdapter(
            f"{TOKENIZER_FILE}: added_tokens is not valid JSON, or longer than {MAX_FILE_BYTES} bytes; save the "
            "tokenizer again or remove the file"
        ) from None
    return tokens
