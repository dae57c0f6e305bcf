"""What schemathesis is told so that its requests reach the engine: names of models that there are, and short answers.

It imports this module itself (``SCHEMATHESIS_HOOKS``). What is of another type than it should be stays as it is.
"""

import os

import schemathesis

MODELS = os.environ.get("FUZZED_MODELS", "base").split()
MOST_TOKENS = 4


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    for name in ("model", "lora_name"):
        if isinstance(sent := body.get(name), str) and sent:
            body[name] = MODELS[len(sent) % len(MODELS)]
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "min_tokens"):
        sent = body.get(name)
        if type(sent) is int and MOST_TOKENS < sent < 128:
            body[name] = MOST_TOKENS
    if "prompt" in body and "tokens" not in body:
        body.setdefault("max_tokens", MOST_TOKENS)
    if "input" in body and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = MOST_TOKENS
    if "messages" in body and body.get("max_completion_tokens") is None:
        body.setdefault("max_tokens", MOST_TOKENS)
    return body
