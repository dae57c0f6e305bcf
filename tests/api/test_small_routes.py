"""Probes, the version, request ids, tokens and text, and gzip bodies."""

import gzip
import json
import re
import tracemalloc
import zlib

import pytest

import slora_jax
from slora_jax.api.app import create_app
from slora_jax.api.body import BodyTooLarge, inflated
from slora_jax.api.drain import Drain
from slora_jax.errors import InvalidRequest
from tests.api.test_app import complete, error, post

# ---- probes


def test_probes(client, engine):
    assert client.get("/version").get_json() == {"version": slora_jax.__version__}
    assert client.get("/ping").get_json() == client.post("/ping").get_json() == {}
    assert client.get("/ready").get_json() == {"status": "ready"}
    engine.close()
    for path in ("/ping", "/ready"):
        error(client.get(path), 503, "engine_stopped")
    assert client.get("/version").status_code == 200


def test_a_draining_server_is_alive_and_not_ready(engine):
    drain = Drain()
    client = create_app(engine, drain=drain).test_client()
    stream = complete(client, stream=True, max_tokens=200)
    events = iter(stream.response)
    next(events)
    assert not drain.is_done
    drain.begin()
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    for response in (
        client.get("/ready"),
        complete(client),
        complete(client, stream=True),
        post(client, "/tokenize", prompt="x"),
    ):
        error(response, 503, "draining")
        assert response.headers["Retry-After"] == "1"
    assert not drain.is_done, "the stream runs"
    assert b"".join(events).endswith(b"data: [DONE]\n\n")
    stream.close()
    assert drain.is_done


# ---- request ids


@pytest.mark.parametrize("sent", ["a", "trace 7/é".replace("é", "~"), "x" * 128])
def test_a_request_id_goes_through_and_comes_back(client, engine, sent):
    headers = {"X-Request-Id": sent}
    body = {"model": "base", "prompt": ["a", "b"], "max_tokens": 2}
    for fields in ({}, {"stream": True}, {"prompt": 5}, {"model": "nobody"}):
        response = client.post("/v1/completions", json=body | fields, headers=headers)
        assert response.headers.getlist("X-Request-Id") == [sent]
        assert response.text
    assert [g.request.request_id for g in engine.generations] == [sent] * 4
    for path in ("/health", "/nowhere", "/v1/models/nobody"):
        assert client.get(path, headers=headers).headers["X-Request-Id"] == sent
    assert client.put("/health", headers=headers).headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "caf\xe9", "a\tb", "\x7f"])
def test_other_request_ids_are_replaced(client, engine, sent):
    headers = {} if sent is None else {"X-Request-Id": sent}
    seen = {complete_with(client, headers) for _ in range(2)}
    assert len(seen) == 2 and sent not in seen
    assert {g.request.request_id for g in engine.generations} == seen


def complete_with(client, headers) -> str:
    body = {"model": "base", "prompt": "x", "max_tokens": 2}
    given = client.post("/v1/completions", json=body, headers=headers).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    return given


# ---- tokens


def test_tokenize_a_prompt(client, engine):
    answer = post(client, "/tokenize", model="base", prompt="hello you").get_json()
    ids = engine.tokenizer.encode("hello you")
    assert answer == {"count": len(ids), "max_model_len": 300, "tokens": ids, "token_strs": None}
    bare = post(client, "/tokenize", prompt="hello you", add_special_tokens=False, return_token_strs=True).get_json()
    assert bare["tokens"] == engine.tokenizer.encode("hello you", add_special_tokens=False)
    assert bare["count"] == len(bare["tokens"]) == len(ids) - (engine.tokenizer.encode("") != [])
    assert "".join(bare["token_strs"]) == "helloĠyou"  # as a byte-level vocabulary writes it


def test_tokenize_a_chat(client, engine):
    messages = [{"role": "user", "content": "hi"}]
    expected = engine.tokenizer.encode_chat(messages)
    assert post(client, "/tokenize", model="pirate", messages=messages).get_json()["tokens"] == expected
    closed = post(client, "/tokenize", messages=messages, add_generation_prompt=False).get_json()["tokens"]
    assert closed == engine.tokenizer.encode_chat(messages, False) != expected


def test_tokenize_a_chat_as_a_chat_is_made(client, engine):
    """What comes back is the prompt that the same chat would have."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for fields in (
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"self": 1, "max_tokens": 2}},
        {"messages": [{"role": "assistant", "content": "As I"}], "continue_final_message": True},
    ):
        tokens = post(client, "/tokenize", model="base", **fields).get_json()["tokens"]
        answer = post(client, "/v1/chat/completions", model="base", max_tokens=1, return_token_ids=True, **fields)
        assert answer.get_json()["choices"][0]["prompt_token_ids"] == tokens
    going_on = post(client, "/tokenize", messages=[{"role": "assistant", "content": "As I"}])
    assert going_on.get_json()["tokens"] != tokens
    messages = [{"role": "user", "content": "hi"}]
    error(post(client, "/tokenize", messages=messages, tools=[tool]), 400, None, "tools")  # it has no place for them
    error(post(client, "/tokenize", messages=messages, tools=[5]), 400, None, "tools[0]")
    error(
        post(client, "/tokenize", messages=messages, continue_final_message=True), 400, None, "continue_final_message"
    )
    kwargs = {"messages": []}
    error(
        post(client, "/tokenize", messages=messages, chat_template_kwargs=kwargs),
        400,
        None,
        "chat_template_kwargs.messages",
    )


def test_tokens_and_text_are_each_others_inverse(client):
    for text in ("hello", "é😀 x\n", "", "a" * 1000):
        ids = post(client, "/tokenize", prompt=text, add_special_tokens=False).get_json()["tokens"]
        assert post(client, "/detokenize", model="base", tokens=ids).get_json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("tokenize", {}, 400, "prompt"),
        ("tokenize", {"prompt": 5}, 400, "prompt"),
        ("tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("tokenize", {"messages": []}, 400, "messages"),
        ("tokenize", {"messages": 5}, 400, "messages"),
        ("tokenize", {"prompt": "x", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("tokenize", {"prompt": "x", "return_token_strs": "x"}, 400, "return_token_strs"),
        ("tokenize", {"prompt": "x", "model": 5}, 400, "model"),
        ("tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("tokenize", {"prompt": "x", "more": 1}, 400, "more"),
        ("detokenize", {}, 400, "tokens"),
        ("detokenize", {"tokens": "x"}, 400, "tokens"),
        ("detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("detokenize", {"tokens": [True]}, 400, "tokens[0]"),
        ("detokenize", {"tokens": [1, 1.0]}, 400, "tokens[1]"),
        ("detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_bad_token_bodies(client, path, fields, status, param):
    response = post(client, f"/{path}", **fields)
    assert (response.status_code, response.get_json()["error"]["param"]) == (status, param)


# ---- gzip


def send(client, body: bytes, encoding="gzip"):
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    return client.post("/v1/completions", data=body, headers=headers)


def body_of(**fields) -> bytes:
    return json.dumps({"model": "base", "prompt": "hello", "max_tokens": 3} | fields).encode()


def test_a_gzip_body_is_answered_as_the_plain_one(client):
    plain = client.post("/v1/completions", data=body_of(), content_type="application/json").get_json()
    half = len(body_of()) // 2
    for data in (gzip.compress(body_of()), gzip.compress(body_of()[:half]) + gzip.compress(body_of()[half:])):
        for encoding in ("gzip", "GZip", "x-gzip"):
            response = send(client, data, encoding)
            assert response.status_code == 200
            assert response.get_json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too early"),
        (b"{}", "not valid gzip"),
        (gzip.compress(body_of(), mtime=0)[:-9], "too early"),
        (gzip.compress(body_of(), mtime=0)[:-1], "too early"),
        (gzip.compress(body_of(), mtime=0)[:-8] + b"\0" * 8, "not valid gzip"),
        (gzip.compress(body_of(), mtime=0) + b"more", "not valid gzip"),
        (zlib.compress(body_of()), "not valid gzip"),
        (gzip.compress(b"", mtime=0) * 50_000, "more than 64 pieces"),
    ],
    ids=["nothing", "plain", "cut", "cut by one", "bad sum", "more after it", "zlib", "many"],
)
def test_broken_gzip(client, data, said):
    assert said in error(send(client, data), 400)


def test_what_inflates_too_far_is_refused_without_being_inflated(engine):
    client = create_app(engine, max_body_bytes=5000).test_client()
    padded = body_of() + b" " * (5000 - len(body_of()))
    assert send(client, gzip.compress(padded)).status_code == 200
    assert "more than 5000 bytes" in error(send(client, gzip.compress(padded + b" ")), 413)
    compressor = zlib.compressobj(9, wbits=31)
    bomb = b"".join(compressor.compress(b" " * 2**20) for _ in range(256)) + compressor.flush()
    members = gzip.compress(b" " * 4000) * 2000
    for data in (bomb, members):
        tracemalloc.start()
        try:
            with pytest.raises(BodyTooLarge):
                inflated(data, "gzip", 5000)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
    with pytest.raises(InvalidRequest):
        inflated(b"x", "gzip", 5000)
    assert inflated(b"x", "br", 5000) == (b"x", "br")
