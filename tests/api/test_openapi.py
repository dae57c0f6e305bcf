"""``/openapi.json``: complete, true of the answers, and nothing that a fuzzer makes of it is the server's fault."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import jsonschema_rs
import pytest

from slora_jax.api.access import Access
from slora_jax.api.app import create_app
from slora_jax.api.openapi import PATH
from slora_jax.api.server import Server, listen
from slora_jax.config import EngineConfig, PoolConfig
from slora_jax.demo import with_demo
from slora_jax.engine.engine import Engine
from slora_jax.text.grammar import Grammars
from tests.api.test_app import chat, complete, post
from tests.api.test_fuzz import LEGAL
from tests.helpers.engine_cases import FIXTURES, Case
from tests.helpers.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
NO_JSON = {"/", "/page/<name>", "/metrics", "/static/<path:filename>", PATH}
SAMPLES = [
    None, True, False, 0, 1, -1, 2, 129, 2**31, 2**65, 0.5, -2.5, 1e300, "", "a", "auto", [], [1], [-1], [2**31], ["a"],
    [""], [None], [{}], [[1]], [True], {}, {"a": 1}, {"1": 1}, {"1": "a"}, {"type": "text"}, {"type": "json_schema"},
    {"type": "function"}, {"include_usage": True}, {"json_object": True}, {"regex": 5}, [{"role": "user"}],
    [{"role": "user", "content": 5}], [{"type": "function", "function": {"name": "f"}}], ["a"] * 200, [1] * 200,
]  # fmt: skip
TAKEN = LEGAL | {"stop_token_ids": ([1], [])}


class Plain(FakeEngine):
    """Answers every prompt, those too that have a meaning for other tests, and checks grammars as the real one does."""

    def submit(self, request):
        if request.sampling.grammar is not None:
            Grammars(self._backend, self._backend.vocab_size, ()).constraint(request.sampling.grammar)
        generation = super().submit(request)
        generation.prompt_text = ""
        return generation


@pytest.fixture
def engine(tmp_path):
    engine = Plain(tmp_path / "model")
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def app(engine):
    return create_app(engine, allow_adapter_loading=True)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def document(client):
    return client.get(PATH).get_json()


def valid(document, schema, value) -> None:
    """Asserts that a value is as a schema of the document says."""
    whole = schema | {"components": document["components"]}
    jsonschema_rs.validator_for(whole).validate(value)


def answered(document, method, path, response) -> None:
    """Asserts that an answer is as the document says."""
    described = document["paths"][path][method]["responses"][str(response.status_code)]
    valid(document, described["content"]["application/json"]["schema"], response.get_json())


def test_it_has_every_route_that_speaks_json(app, document):
    routes = {
        (method.lower(), re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.rule not in NO_JSON
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert routes == {(method, path) for path, methods in document["paths"].items() for method in methods}


def test_it_needs_no_key(engine):
    client = create_app(engine, access=Access(keys=["sk-x"])).test_client()
    assert client.get(PATH).status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_its_schemas_are_schemas(document):
    for schema in document["components"]["schemas"].values():
        assert jsonschema_rs.meta.is_valid(schema)
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert used <= set(document["components"]["schemas"])


@pytest.mark.parametrize("ask", [complete, chat], ids=["completions", "chat"])
def test_fields_that_are_taken_are_in_the_schema_of_the_body(client, document, ask):
    path = "/v1/completions" if ask is complete else "/v1/chat/completions"
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    usual = {"model": "base", "max_tokens": 12} | (
        {"prompt": "hello"} if ask is complete else {"messages": [{"role": "user", "content": "hi"}]}
    )
    for name, values in TAKEN.items():
        for value in (*values, None):
            response = ask(client, **{name: value})
            assert response.status_code == 200, (name, value, response.text)
            valid(document, body, usual | {name: value})
    more = (
        [{"prompt": p} for p in ("x", ["x", "y"], [1, 2], [[1], [2, 3]])]
        if ask is complete
        else [
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"}]},
            {"logprobs": True, "top_logprobs": 2},
        ]
    )
    for fields in [*more, {"user": 5, "use_beam_search": False, "logit_bias": {"3": 1.5}}, {"stop": "x"}]:
        response = ask(client, **fields)
        assert response.status_code == 200, (fields, response.text)
        valid(document, body, usual | fields)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_what_the_schema_of_a_body_forbids_is_refused(client, document, path):
    """Of every field, and so what is read by code of its own is described as it is read."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    known = set().union(*(part["properties"] for part in schema.get("anyOf", [schema])))
    usual: dict = {
        "/v1/completions": {"model": "base", "prompt": "x", "max_tokens": 1},
        "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        "/v1/responses": {"model": "base", "input": "x", "max_output_tokens": 1},
        "/tokenize": {"prompt": "x"},
    }[path]
    whole = jsonschema_rs.validator_for(schema | {"components": document["components"]})
    num_forbidden = 0
    for name in sorted(known):
        for value in SAMPLES:
            body = usual | {name: value}
            is_valid = whole.is_valid(body)
            num_forbidden += not is_valid
            response = client.post(path, json=body)
            assert response.status_code < 500, body
            assert is_valid or response.status_code == 400, f"taken, and against the schema: {body}"
    assert num_forbidden > len(known)


def test_answers_are_as_it_says(client, document, tmp_path):
    for fields in (
        {},
        {"logprobs": 3, "n": 2, "return_token_ids": True},
        {"logprobs": 0, "echo": True, "prompt_logprobs": 2},
        {"prompt": ["a", "b"], "stop": " "},
        {"model": "nobody"},
        {"n": 0},
    ):
        answered(document, "post", "/v1/completions", complete(client, **fields))
    for fields in (
        {},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"prompt_logprobs": 1},
        {"n": 0},
    ):
        answered(document, "post", "/v1/chat/completions", chat(client, **fields))
    asked = {"model": "pirate", "input": "hi", "max_output_tokens": 4}
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"}, "user": "u"}
    for fields in ({}, logprobs, {"text": {"format": {"type": "text"}}, "instructions": "x"}, {"input": 5}):
        valid_body = fields != {"input": 5}
        response = post(client, "/v1/responses", **asked | fields)
        assert response.status_code == (200 if valid_body else 400), response.text
        answered(document, "post", "/v1/responses", response)
    for path in ("/v1/models", "/health", "/ping", "/ready", "/version"):
        answered(document, "get", path, client.get(path))
    for name in ("base", "pirate", "org/haiku", "nobody"):
        answered(document, "get", "/v1/models/{name}", client.get(f"/v1/models/{name}"))
    for query in ("prompt_tokens=9&max_tokens=9", "adapter=pirate&prompt_tokens=9&max_tokens=9", "x=1"):
        answered(document, "get", "/v1/capacity", client.get(f"/v1/capacity?{query}"))
    for fields in ({"prompt": "x", "return_token_strs": True}, {"messages": [{"role": "user", "content": "x"}]}, {}):
        answered(document, "post", "/tokenize", post(client, "/tokenize", **fields))
    answered(document, "post", "/detokenize", post(client, "/detokenize", tokens=[1, 2]))
    (tmp_path / "adapter_config.json").write_text("{}")
    for path, fields in (
        ("load", {"lora_name": "x", "lora_path": str(tmp_path), "lora_int_id": 3}),
        ("load", {"lora_name": "x", "lora_path": str(tmp_path)}),
        ("pin", {"lora_name": "x"}),
        ("unpin", {"lora_name": "x"}),
        ("unload", {"lora_name": "x"}),
        ("unload", {"lora_name": "x"}),
    ):
        route = f"/v1/{path}_lora_adapter"
        answered(document, "post", route, post(client, route, **fields))


def test_the_pool_is_as_it_says(document):
    engine = Case(FIXTURES / "smollm_gqa3").engine()
    try:
        client = create_app(engine).test_client()
        assert client.get("/v1/pool").get_json()["adapters"]
        answered(document, "get", "/v1/pool", client.get("/v1/pool"))
    finally:
        engine.close()


# ---- a fuzzer


@contextmanager
def serving(app):
    """A server that listens, and its URL."""
    server = Server(app, listen("127.0.0.1", 0), max_streams=32)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


def fuzzed(url: str, models: str, seconds: int, tmp_path: Path, *options: str) -> None:
    """Has schemathesis send what the document allows and what it forbids: the one is answered as it says, and the other
    refused; nothing is answered 500."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", url + PATH, "--max-time", str(seconds), "--seed", "1"),
        # A body that looks right may ask for what cannot be had.
        *("--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "all", "--no-color", *options),
        *("--request-timeout", "100"),  # a shape of step that is new is compiled first
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.helpers.openapi_hooks", "FUZZED_MODELS": models, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, timeout=seconds + 120
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) generated", run.stdout)[1]) > 10 * seconds


def test_a_fuzzer_finds_nothing(app, engine, tmp_path):
    with serving(app) as url:
        # Which the fake engine does not have.
        fuzzed(url, "base pirate", 20, tmp_path, "--exclude-path", "/v1/pool")
    assert len(engine.generations) > 50, "many of its requests are good ones"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fuzzer_finds_nothing_of_the_embedded_model(tmp_path):
    engine = Engine.create(with_demo(EngineConfig(pool=PoolConfig(pages=600))), progress=False)
    engine.start()
    try:
        with serving(create_app(engine, allow_adapter_loading=True)) as url:
            fuzzed(url, f"{engine.model_name} pirate", 150, tmp_path)
    finally:
        engine.close()
    engine.check_integrity()
