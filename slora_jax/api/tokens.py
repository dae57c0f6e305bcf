"""Text to tokens and back over HTTP, with vLLM's bodies: ``/tokenize`` and ``/detokenize``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from slora_jax.api.openai import Body, ChatTemplating, encode_chat, read_body, read_messages, source_for_tools
from slora_jax.api.tools import read_tools
from slora_jax.errors import InvalidRequest, shown
from slora_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

_MOST_IDS = 2**20

type Resolve = Callable[[str], str | None]
"""The adapter that a model's name asks for, or None for the base model; raises for what is not there or not allowed."""


class TextToTokens(Body):
    """Body of ``/tokenize`` with a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class ChatToTokens(ChatTemplating):
    """Body of ``/tokenize`` with a chat."""

    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False


class TokensToText(Body):
    """Body of ``/detokenize``."""

    tokens: Annotated[list[int], pydantic.Field(max_length=_MOST_IDS), pydantic.FailFast()]
    model: str | None = None


def tokenized(body: Any, engine: "Engine", resolve: Resolve) -> dict[str, Any]:
    """The answer to ``/tokenize``: ``tokens``, ``count``, ``max_model_len`` and ``token_strs``.

    The body has ``prompt``, or ``messages`` (and ``tools``) for the chat template of the model that it names, the base
    model if none. A text gets what the tokenizer adds to it unless ``add_special_tokens`` is false; of a chat, the
    template writes all. With ``return_token_strs`` the tokens come as the vocabulary writes them, else null does.

    Raises:
      InvalidRequest: with the field at fault in ``param``.
    """
    if isinstance(body, dict) and "messages" in body:
        chat = read_body(ChatToTokens, body)
        tokenizer = _tokenizer(engine, chat.model, resolve, "messages")
        tools = read_tools(chat.tools, None, None)
        if tools is not None:
            source_for_tools(tokenizer)
        messages = read_messages(chat.messages)
        tokens = encode_chat(chat, messages, tools, tokenizer, add_special_tokens=chat.add_special_tokens)
        wants_texts = chat.return_token_strs
    else:
        text = read_body(TextToTokens, body)
        tokenizer = _tokenizer(engine, text.model, resolve, "prompt")
        tokens = tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
        wants_texts = text.return_token_strs
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": [tokenizer.piece(token) for token in tokens] if wants_texts else None,
    }


def detokenized(body: Any, engine: "Engine", resolve: Resolve) -> dict[str, Any]:
    """The answer to ``/detokenize``: the text of ``tokens`` as ``prompt``, special tokens included.

    Raises:
      InvalidRequest: with the field at fault in ``param``.
    """
    fields = read_body(TokensToText, body)
    tokenizer = _tokenizer(engine, fields.model, resolve, "tokens")
    vocabulary = engine.model_config.vocab_size
    if (bad := next((token for token in fields.tokens if not 0 <= token < vocabulary), None)) is not None:
        raise InvalidRequest(f"tokens must be ids in [0, {vocabulary}), got {shown(bad)}", "tokens")
    return {"prompt": tokenizer.decode(fields.tokens, skip_special_tokens=False)}


def _tokenizer(engine: "Engine", model: str | None, resolve: Resolve, param: str) -> Tokenizer:
    tokenizer = engine.tokenizer_of(None if model is None else resolve(model))
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer (dummy weights), so it has no text", param)
    return tokenizer
