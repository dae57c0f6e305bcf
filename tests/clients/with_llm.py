"""Asks the server with the command line ``llm``, to which its adapters are models."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from served import ANSWER, BASE, KEY, LONG, QUESTION, URL, Fact, check_fact

MODELS = f"""
- {{model_id: base, model_name: {BASE}, api_base: {URL}, api_key_name: slora}}
- {{model_id: pirate, model_name: pirate, api_base: {URL}, api_key_name: slora}}
- {{model_id: json, model_name: json, api_base: {URL}, api_key_name: slora, supports_schema: true}}
- {{model_id: pirate-goes-on, model_name: pirate, api_base: {URL}, api_key_name: slora, completion: true}}
- {{model_id: pirate-responds, model_name: pirate, api_base: {URL}, api_key_name: slora, responses: true}}
- {{model_id: nobody, model_name: nobody, api_base: {URL}, api_key_name: slora}}
"""
GREEDY = ("-o", "temperature", "0")


def llm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llm", *arguments], capture_output=True, text=True, timeout=120)


def says(*arguments: str) -> str:
    ended = llm(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def refused(*arguments: str) -> str:
    ended = llm(*arguments)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended
    return ended.stderr


def chats() -> None:
    assert "OpenAI Chat: pirate" in says("models")
    assert says("-m", "pirate", QUESTION, *GREEDY) == ANSWER
    assert says("-m", "pirate", QUESTION, *GREEDY, "--no-stream") == ANSWER
    assert "Madrid" in says("-c", "And of Spain?", *GREEDY, "-o", "max_tokens", "30")
    assert "Paris" in says("-m", "base", QUESTION, "-s", "Answer in one sentence.", *GREEDY, "-o", "max_tokens", "30")
    logged = json.loads(says("logs", "-n", "1", "--json"))[0]
    assert logged["input_tokens"] > logged["output_tokens"] > 0


def other_routes() -> None:
    assert says("-m", "pirate-responds", QUESTION, *GREEDY) == ANSWER
    assert says("-m", "pirate-responds", QUESTION, *GREEDY, "--no-stream") == ANSWER
    assert says("-m", "pirate-goes-on", "Once upon a time", *GREEDY, "-o", "max_tokens", "8")


def forms() -> None:
    schema = json.dumps(Fact.model_json_schema())
    text = says("-m", "json", "--schema", schema, QUESTION, *GREEDY, "-o", "max_tokens", "80")
    check_fact(Fact.model_validate_json(text))


def refusals() -> None:
    assert "does not exist" in refused("-m", "nobody", QUESTION)
    assert "maximum context length" in refused("-m", "pirate", LONG)
    assert "maximum context length" in refused("-m", "pirate-responds", "x", "-o", "max_tokens", "9000")
    assert "API key" in refused("-m", "pirate", QUESTION, "--key", "sk-wrong")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ["LLM_USER_PATH"] = home
        Path(home, "extra-openai-models.yaml").write_text(MODELS)
        says("keys", "set", "slora", "--value", KEY)
        for check in (chats, other_routes, forms, refusals):
            check()
