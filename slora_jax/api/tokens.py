"""Text to tokens and back over HTTP, with vLLM's bodies: ``/tokenize`` and ``/detokenize``."""

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from slora_jax.api.openai import read_messages
from slora_jax.errors import InvalidRequest, shown
from slora_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

_OF_TEXT = {"model", "prompt", "add_special_tokens", "return_token_strs"}
_OF_CHAT = {"model", "messages", "add_generation_prompt", "add_special_tokens", "return_token_strs"}
_MOST_IDS = 2**20

type Resolve = Callable[[str], str | None]
"""The adapter that a model's name asks for, or None for the base model; raises for what is not there or not allowed."""


def tokenized(body: Any, engine: "Engine", resolve: Resolve) -> dict[str, Any]:
    """The answer to ``/tokenize``: ``tokens``, ``count``, ``max_model_len`` and ``token_strs``.

    The body has ``prompt``, or ``messages`` for the chat template of the model that it names, the base model if none.
    A text gets what the tokenizer adds to it unless ``add_special_tokens`` is false; of a chat, the
    template writes all. With ``return_token_strs`` the tokens come as the vocabulary writes them, else null does.

    Raises:
      InvalidRequest: with the field at fault in ``param``.
    """
    fields = _fields(body, _OF_CHAT if isinstance(body, dict) and "messages" in body else _OF_TEXT)
    adapter = _adapter(fields, resolve)
    if "messages" in fields:
        tokenizer = _tokenizer(engine, adapter, "messages")
        opened = _truth(fields, "add_generation_prompt", True)
        text = tokenizer.apply_chat_template(read_messages(fields["messages"]), opened)
        tokens = tokenizer.encode(text, add_special_tokens=_truth(fields, "add_special_tokens", False))
    else:
        prompt = fields.get("prompt")
        if not isinstance(prompt, str):
            raise InvalidRequest(f"prompt must be a string, got {shown(prompt)}; or send messages", "prompt")
        tokenizer = _tokenizer(engine, adapter, "prompt")
        tokens = tokenizer.encode(prompt, add_special_tokens=_truth(fields, "add_special_tokens", True))
    wants_texts = _truth(fields, "return_token_strs", False)
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
    fields = _fields(body, {"model", "tokens"})
    tokenizer = _tokenizer(engine, _adapter(fields, resolve), "tokens")
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or len(tokens) > _MOST_IDS:
        raise InvalidRequest(f"tokens must be a list of at most {_MOST_IDS} token ids, got {shown(tokens)}", "tokens")
    vocabulary = engine.model_config.vocab_size
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise InvalidRequest(f"tokens must be ids in [0, {vocabulary}), got {shown(token)}", "tokens")
    return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}


def _fields(body: Any, known: Container[str]) -> dict[str, Any]:
    """The body's fields, less those that are null."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(body)}")
    if unknown := next((name for name in body if name not in known), None):
        raise InvalidRequest(f"unknown field: {shown(unknown)}; leave it out", unknown[:80])
    return {name: value for name, value in body.items() if value is not None}


def _adapter(fields: dict[str, Any], resolve: Resolve) -> str | None:
    model = fields.get("model")
    if model is None:
        return None
    if not isinstance(model, str):
        raise InvalidRequest(f"model must be a string, got {shown(model)}", "model")
    return resolve(model)


def _truth(fields: dict[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {shown(value)}", name)
    return value


def _tokenizer(engine: "Engine", adapter: str | None, param: str) -> Tokenizer:
    tokenizer = engine.tokenizer_of(adapter)
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer (dummy weights), so it has no text", param)
    return tokenizer
