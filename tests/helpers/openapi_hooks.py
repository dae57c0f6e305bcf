"""What schemathesis is told so that its requests reach the engine: names of models that there are, short answers, and
few of the fields at a time that may contradict each other.

It imports this module itself (``SCHEMATHESIS_HOOKS``). What is not as the document says stays as it is.
"""

import os
from functools import cache

import jsonschema_rs
import schemathesis

MODELS = os.environ.get("FUZZED_MODELS", "base").split()
MOST_TOKENS = 4
RISKY = (
    "stream_options", "priority", "slo_ms", "best_of", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "tools",
    "tool_choice", "logit_bias", "allowed_token_ids", "stop_token_ids", "bad_words", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "structured_outputs", "response_format", "continue_final_message",
    "truncate_prompt_tokens", "min_tokens", "chat_template_kwargs", "text", "include",
)  # fmt: skip
"""Fields that may be refused beside others, or for what they hold. At most one that is as it should be is sent."""


@cache
def validators(operation):
    """Of the fields of an operation's body, by name."""
    whole = operation.schema.raw_schema
    body = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]
    fields = {}
    for schema in body.get("anyOf", [body]):
        fields |= schema["properties"]
    return {
        name: jsonschema_rs.validator_for(field | {"components": whole["components"]}) for name, field in fields.items()
    }


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    of = validators(case.operation)
    good = {name for name, value in body.items() if name in of and of[name].is_valid(value)}
    risky = sorted(good.intersection(RISKY))
    kept = len(str(body)) % (len(risky) + 1)
    for name in risky[:kept] + risky[kept + 1 :]:
        del body[name]
    if "model" in good:
        body["model"] = MODELS[len(str(body)) % len(MODELS)]
    if "lora_name" in good and "unload" not in case.operation.path:
        body["lora_name"] = MODELS[-1]
    if "stream_options" in good and body.get("stream") is not True:
        body.pop("stream_options", None)
    for message in body["messages"] if "messages" in good else []:
        if message.get("content") is None:
            message["content"] = "hi"
        if message["role"] == "tool":  # the small templates know no such role
            message["role"] = "user"
            message.pop("tool_call_id", None)
    for name in good.intersection(("max_tokens", "max_completion_tokens", "max_output_tokens", "n")):
        if type(body[name]) is int:
            body[name] = min(body[name], MOST_TOKENS)
    limit = {"prompt": "max_tokens", "messages": "max_tokens", "input": "max_output_tokens"}
    for name, tokens in limit.items():
        if name in body and tokens in of and body.get(tokens) is None:
            body[tokens] = MOST_TOKENS
