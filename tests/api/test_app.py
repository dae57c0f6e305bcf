import json
import time

import pytest
from werkzeug.test import EnvironBuilder

from slora_jax.api.app import create_app
from slora_jax.request import SamplingParams
from tests.helpers.fake_engine import FAILS, LATE, WAITS, FakeEngine


def post(client, path, **body):
    return client.post(path, json=body)


def complete(client, **body):
    return post(client, "/v1/completions", **{"model": "base", "prompt": "hello", "max_tokens": 100} | body)


def chat(client, **body):
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12} | body
    return post(client, "/v1/chat/completions", **body)


def events(response):
    assert response.status_code == 200, response.text
    assert response.content_type == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    payloads = [line.removeprefix("data: ") for line in lines]
    done = payloads[-1] == "[DONE]"
    return [json.loads(p) for p in payloads[: -1 if done else None]], done


def error(response, status, code=None, param=None):
    assert response.status_code == status, response.text
    assert response.content_type == "application/json"
    body = response.get_json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["code"], body["param"]) == (code, param)
    assert "Traceback" not in body["message"]
    return body["message"]


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


# ---- completions


def test_completion(client):
    body = complete(client, model="pirate").get_json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "pirate"
    (choice,) = body["choices"]
    assert choice["text"].startswith("pirate says hello. pirate says hello. ")
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    prompt_tokens = 1  # the test vocabulary has "hello"
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 100,
        "total_tokens": prompt_tokens + 100,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


@pytest.mark.parametrize(
    ("model", "speaker"),
    [("base", "base"), ("json", "json"), ("base:json", "json"), ("org/haiku", "org/haiku")],
)
def test_model_names_the_base_or_an_adapter(client, model, speaker):
    assert complete(client, model=model).get_json()["choices"][0]["text"].startswith(f"{speaker} says")


def test_prompt_forms(client, engine):
    ids = engine.tokenizer.encode("hello")
    text = complete(client, prompt="hello").get_json()["choices"][0]["text"]
    for prompt in (ids, [ids], ["hello"]):
        assert [c["text"] for c in complete(client, prompt=prompt).get_json()["choices"]] == [text]
    body = complete(client, prompt=["hello", "bye"], n=2).get_json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    starts = ["base says hello", "ase says hello", "base says bye", "ase says bye"]
    assert [c["text"][: len(s)] for c, s in zip(body["choices"], starts, strict=True)] == starts
    assert body["usage"]["completion_tokens"] == 100 + 99 + 100 + 99
    assert complete(client, prompt="").get_json()["usage"]["prompt_tokens"] == 1  # the begin-of-sequence token


def test_default_max_tokens(client, engine):
    body = client.post("/v1/completions", json={"model": "base", "prompt": "x"}).get_json()
    assert body["usage"]["completion_tokens"] == 16
    body = client.post("/v1/completions", json={"model": "base", "prompt": "x" * 295}).get_json()
    assert body["usage"]["completion_tokens"] == 5


def test_fields_left_out_are_as_the_generation_config_says(client, engine):
    engine.default_sampling = {"temperature": 0.25, "top_k": 7, "max_tokens": 9}

    def sampling(path: str, **fields) -> SamplingParams:
        answer = client.post(f"/v1/{path}", json={"model": "base"} | fields)
        assert answer.status_code == 200, answer.get_json()
        return engine.generations[-1].request.sampling

    for path, prompt in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        assert sampling(path, **prompt) == SamplingParams(max_tokens=9, temperature=0.25, top_k=7)
        nulls = dict.fromkeys(("temperature", "top_k", "max_tokens", "top_p"))
        assert sampling(path, **prompt, **nulls) == SamplingParams(max_tokens=9, temperature=0.25, top_k=7)
        assert sampling(path, **prompt, temperature=1.0, top_k=-1, max_tokens=3) == SamplingParams(max_tokens=3)
    assert sampling("completions", prompt="x" * 295).max_tokens == 5


def test_stop(client):
    body = complete(client, stop=["hello", "never"]).get_json()
    assert body["choices"][0]["text"] == "base says "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert complete(client, stop="says").get_json()["choices"][0]["text"] == "base "


def test_echo(client):
    assert complete(client, echo=True, max_tokens=4).get_json()["choices"][0]["text"] == "hellobase"
    ids = [1, 2, 3]
    assert complete(client, prompt=ids, echo=True, max_tokens=4).get_json()["choices"][0]["text"].endswith("base")
    chunks, _ = events(complete(client, prompt=["hello", "by"], echo=True, n=2, stream=True))
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert [texts[i][:8] for i in range(4)] == ["hellobas", "helloase", "bybase s", "byase sa"]


def test_completion_logprobs(client):
    shape = complete(client, logprobs=2, max_tokens=3).get_json()["choices"][0]["logprobs"]
    assert shape["tokens"] == ["b", "a", "s"]
    assert shape["token_logprobs"] == [-9999.0, -0.5, -0.5]
    assert shape["text_offset"] == [0, 1, 2]
    assert shape["top_logprobs"][1] == {"!": -1.0, '"': -2.0, "a": -0.5}
    chosen_only = complete(client, logprobs=0, max_tokens=1).get_json()["choices"][0]["logprobs"]
    assert chosen_only["top_logprobs"] == [{"b": -9999.0}]


def test_logprobs_of_parts_of_a_character_stay_distinct(client):
    shape = complete(client, prompt="é", logprobs=0, max_tokens=14).get_json()["choices"][0]["logprobs"]
    assert shape["tokens"][10:12] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_completion_stream(client):
    whole = complete(client).get_json()
    chunks, done = events(complete(client, stream=True, stream_options={"include_usage": True}))
    assert done
    *pieces, usage = chunks
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    assert all(c["usage"] is None for c in pieces)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert "".join(c["choices"][0]["text"] for c in pieces) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in pieces if c["choices"][0]["finish_reason"]] == ["length"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in c for c in events(complete(client, stream=True))[0])


def test_stream_of_many_prompts_and_completions_equals_the_whole(client):
    body = {"prompt": ["hello", "bye 😀", "x"], "n": 3, "logprobs": 1, "return_token_ids": True}
    whole = complete(client, **body).get_json()["choices"]
    texts, logprobs, ids = ({i: [] for i in range(9)} for _ in range(3))
    for chunk in events(complete(client, stream=True, **body))[0]:
        (choice,) = chunk["choices"]
        texts[choice["index"]].append(choice["text"])
        ids[choice["index"]] += choice["token_ids"]
        if choice["logprobs"]:
            logprobs[choice["index"]].append(choice["logprobs"])
    for choice in whole:
        i = choice["index"]
        assert "".join(texts[i]) == choice["text"]
        assert ids[i] == choice["token_ids"]
        assert {k: [x for part in logprobs[i] for x in part[k]] for k in choice["logprobs"]} == choice["logprobs"]


def test_token_ids_on_request(client, engine):
    (choice,) = complete(client, return_token_ids=True).get_json()["choices"]
    assert choice["prompt_token_ids"] == engine.tokenizer.encode("hello")
    assert choice["token_ids"][:4] == engine.tokenizer.encode("base")


# ---- chat


def test_chat(client):
    body = chat(client, model="pirate").get_json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "pirate says ", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)


def test_chat_applies_the_template(client, engine):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
    messages = [{"role": "developer", "content": "Be nice."}, {"role": "user", "content": parts, "name": "Ada"}]
    chat(client, messages=messages)
    prompt = engine.tokenizer.decode(engine.generations[-1].request.prompt, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi\nthere<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_takes_the_rest_of_the_context_by_default(client, engine):
    body = client.post(
        "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    ).get_json()
    assert body["usage"]["total_tokens"] == engine.max_model_len
    assert chat(client, max_tokens=5, max_completion_tokens=7).get_json()["usage"]["completion_tokens"] == 7


def test_chat_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=1).get_json()["choices"][0]["logprobs"]["content"]
    assert content[1] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "!", "logprob": -1.0, "bytes": [33]}],
    }
    without = chat(client, logprobs=True).get_json()["choices"][0]["logprobs"]["content"]
    assert without[1]["top_logprobs"] == []


def test_chat_stream(client):
    chunks, done = events(chat(client, stream=True, n=2, stream_options={"include_usage": True}))
    assert done
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    roles = [c["choices"][0] for c in chunks[:2]]
    assert [(r["index"], r["delta"]) for r in roles] == [(i, {"role": "assistant", "content": ""}) for i in (0, 1)]
    texts = {0: "", 1: ""}
    for chunk in chunks[2:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "base says us", 1: "ase says us"}
    assert chunks[-1]["usage"]["completion_tokens"] == 12 + 11


def test_non_ascii_text_is_sent_readably(client):
    assert "😀".encode() in complete(client, prompt="😀").data


# ---- models, health, adapters


def test_models(client):
    cards = {card["id"]: card for card in client.get("/v1/models").get_json()["data"]}
    assert list(cards) == ["base", "pirate", "json", "org/haiku"]
    assert cards["base"]["parent"] is None
    assert cards["pirate"] == {
        "id": "pirate",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "slora-jax",
        "root": "base",
        "parent": "base",
        "rank": 8,
        "pinned": False,
        "max_model_len": 300,
    }
    for name, card in cards.items():
        assert client.get(f"/v1/models/{name}").get_json() == card
    error(client.get("/v1/models/nobody"), 404, "model_not_found", "model")


@pytest.mark.parametrize(("name", "requests"), [("adapter=base&", 10), ("", 10), ("adapter=org/haiku&", 9)])
def test_capacity(client, name, requests):
    answer = client.get(f"/v1/capacity?{name}prompt_tokens=50&max_tokens=14").get_json()
    haiku = 3 * ("haiku" in name)
    assert answer == {
        "requests": requests,
        "pages_each": 4,
        "adapter_pages": haiku,
        "pages_available": 42,
        "sequences_available": 100,
    }


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("prompt_tokens=5", 400, None, "max_tokens"),
        ("prompt_tokens=0&max_tokens=5", 400, None, "prompt_tokens"),
        ("prompt_tokens=%C2%B2&max_tokens=5", 400, None, "prompt_tokens"),
        ("prompt_tokens=5&max_tokens=-1", 400, None, "max_tokens"),
        ("prompt_tokens=5&max_tokens=5&more=1", 400, None, "more"),
        ("prompt_tokens=5&max_tokens=5&adapter=nobody", 404, "model_not_found", "model"),
    ],
)
def test_capacity_of_nothing(client, query, status, code, param):
    error(client.get(f"/v1/capacity?{query}"), status, code, param)


def test_health(client, engine):
    assert client.get("/health").get_json() == {"status": "ok", "running": 0}
    engine.close()
    error(client.get("/health"), 503, "engine_stopped")
    error(complete(client), 503, "engine_stopped")


def test_adapters_on_request(engine, tmp_path):
    client = create_app(engine, allow_adapter_loading=True).test_client()
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = {"lora_name": "new", "lora_path": str(folder)}
    assert "adapter_config" in error(post(client, "/v1/load_lora_adapter", **fields), 400, "bad_adapter")
    (folder / "adapter_config.json").write_text("{}")
    assert post(client, "/v1/load_lora_adapter", **fields).get_json()["parent"] == "base"
    assert complete(client, model="new").get_json()["choices"][0]["text"].startswith("new says")
    assert post(client, "/v1/unload_lora_adapter", lora_name="new").get_json()["deleted"] is True
    error(complete(client, model="new"), 404, "model_not_found", "model")
    error(post(client, "/v1/unload_lora_adapter", lora_name="new"), 404, "model_not_found", "model")
    error(post(client, "/v1/load_lora_adapter", lora_name="x"), 400, None, "lora_path")
    error(post(client, "/v1/load_lora_adapter", more=1, **fields), 400, None, "more")
    error(client.post("/v1/load_lora_adapter", data="[]", content_type="application/json"), 400)


def test_pins_on_request(engine, tmp_path):
    client = create_app(engine, allow_adapter_loading=True).test_client()
    (tmp_path / "adapter_config.json").write_text("{}")
    fields = {"lora_name": "new", "lora_path": str(tmp_path)}
    assert post(client, "/v1/load_lora_adapter", pinned=True, **fields).get_json()["pinned"] is True
    assert post(client, "/v1/load_lora_adapter", load_inplace=True, **fields).get_json()["pinned"] is False
    error(post(client, "/v1/load_lora_adapter", pinned="yes", **fields), 400, None, "pinned")
    fields["lora_name"] = "too-large"
    error(post(client, "/v1/load_lora_adapter", pinned=True, **fields), 400, "bad_adapter")
    error(client.get("/v1/models/too-large"), 404, "model_not_found", "model")
    error(post(client, "/v1/unload_lora_adapter", lora_name="new", pinned=True), 400, None, "pinned")


def test_adapters_on_request_need_permission(client):
    for route in ("load_lora_adapter", "unload_lora_adapter"):
        message = error(post(client, f"/v1/{route}", lora_name="x"), 403, "adapter_loading_not_allowed")
        assert "--allow-adapter-loading" in message


# ---- errors

TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"min_tokens": 101}, "min_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": []}, "messages"),
        ({"temprature": 1}, "temprature"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_bad_completion_parameters(client, fields, param):
    message = error(complete(client, **fields), 400, None, param)
    assert param.split(".")[0].split("[")[0] in message or "surrogate" in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"logit_bias": {"1.5": 2}}, "logit_bias"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": "f"}]}, "messages[0].tool_calls"),
    ],
)
def test_bad_chat_parameters(client, fields, param):
    assert param.split("[")[0] in error(chat(client, **fields), 400, None, param)


def test_fields_that_change_nothing_are_taken(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "seed": None, "stop": None, "logit_bias": {}, "n": 1}
    assert complete(client, **harmless, suffix=None, best_of=1, top_k=-1).status_code == 200
    chat_only = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert chat(client, **harmless, **chat_only).status_code == 200


def test_sampling_reaches_the_engine(client, engine):
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "seed": 11,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "n": 2,
    }
    complete(client, **fields)
    sampling = engine.generations[-1].request.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields | {"stop_token_ids": (3, 4)}


def test_unknown_model(client):
    assert "'nobody'" in error(complete(client, model="nobody"), 404, "model_not_found", "model")
    error(chat(client, model="base:nobody"), 404, "model_not_found", "model")


def test_too_long_a_prompt(client):
    message = error(complete(client, prompt="x" * 300), 400, "context_length_exceeded", "prompt")
    assert "300" in message
    long = [{"role": "user", "content": "x" * 300}]
    error(chat(client, messages=long), 400, "context_length_exceeded", "messages")


def test_a_longer_answer_than_the_context_has_room_for(client, engine):
    exact = engine.max_model_len - len(engine.tokenizer.encode("hello"))
    assert complete(client, max_tokens=exact).get_json()["usage"]["total_tokens"] == engine.max_model_len
    message = error(complete(client, max_tokens=exact + 1), 400, "context_length_exceeded", "max_tokens")
    # LiteLLM looks for the first, LangChain for the second.
    assert message.startswith("This model's maximum context length is 300 tokens.")
    assert message.endswith("(context_length_exceeded)") and f"{exact + 1} for the answer" in message
    for name in ("max_tokens", "max_completion_tokens"):
        error(chat(client, **{name: 2**31 - 1}), 400, "context_length_exceeded", name)
    # What generation_config.json says is a wish, and no client's.
    engine.default_sampling = {"max_tokens": 5000}
    assert complete(client, max_tokens=None).get_json()["usage"]["total_tokens"] == engine.max_model_len
    assert chat(client, max_tokens=None).get_json()["usage"]["total_tokens"] == engine.max_model_len


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"])
def test_malformed_json(client, body):
    assert "JSON" in error(client.post("/v1/completions", data=body), 400)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
def test_json_that_is_no_object(client, body):
    assert "JSON object" in error(client.post("/v1/chat/completions", data=body), 400)


def test_routes(client):
    error(client.get("/v1/nothing"), 404)
    error(client.post("/nothing"), 404)
    response = client.get("/v1/completions")
    error(response, 405)
    assert "POST" in response.headers["Allow"]


def test_too_many_parts(client):
    for body in (b"[" * 100_000, json.dumps({"prompt": [[]] * 50_000}).encode()):
        assert "lists and objects" in error(client.post("/v1/completions", data=body), 400)
    assert "context" in error(complete(client, prompt="[" * 100_000), 400, "context_length_exceeded", "prompt")


def test_too_large_a_body(engine):
    client = create_app(engine, max_body_bytes=1000).test_client()
    error(complete(client, prompt="x" * 1000), 413)


def test_overload(engine, tmp_path):
    small = FakeEngine(tmp_path / "small", max_running=2)  # never started: nothing ends
    response = complete(create_app(small).test_client(), prompt=["a", "b", "c"])
    error(response, 429, "engine_overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    assert [g.cancelled for g in small.generations] == [True, True]


def test_an_answer_that_cannot_be_built_ends_in_an_error(client, monkeypatch):
    """Whatever fails after the tokens are there, the client hears of it in OpenAI's shape."""

    monkeypatch.setattr("slora_jax.api.replies.LOWEST_LOGPROB", None)  # no number is larger or smaller than that
    error(complete(client, logprobs=1), 500, "internal_error")
    chunks, done = events(complete(client, logprobs=1, stream=True))
    assert (chunks[-1]["error"]["code"], done) == ("internal_error", False)
    assert complete(client).status_code == 200


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_answer_holds_what_is_no_json(client, engine, monkeypatch, number):
    monkeypatch.setattr(engine, "stats", lambda: {"share": number})
    error(client.get("/health"), 500, "internal_error")


def test_long_answers_are_whole(client):
    """Long lists are written in several pieces."""
    body = complete(client, n=3, max_tokens=200, logprobs=2, return_token_ids=True).get_json()
    for choice in body["choices"]:
        length = 200 - choice["index"]  # as the engine has it
        assert [len(choice["logprobs"][name]) for name in ("tokens", "top_logprobs", "text_offset")] == [length] * 3
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert len(choice["token_ids"]) == length
    exact = complete(client, max_tokens=32, logprobs=2).get_json()["choices"][0]["logprobs"]
    assert {len(items) for items in exact.values()} == {32}


def test_loads_take_streams(engine, tmp_path):
    """A load may wait for a disk; the threads beyond the streams are for what is answered at once."""
    client = create_app(engine, max_streams=1, allow_adapter_loading=True).test_client()
    (tmp_path / "adapter_config.json").write_text("{}")
    fields = {"lora_name": "new", "lora_path": str(tmp_path)}
    open_stream = complete(client, prompt=WAITS, stream=True, echo=True)
    error(post(client, "/v1/load_lora_adapter", **fields), 429, "engine_overloaded")
    error(post(client, "/v1/unload_lora_adapter", lora_name="pirate"), 429, "engine_overloaded")
    assert client.get("/health").status_code == 200
    open_stream.close()
    assert post(client, "/v1/load_lora_adapter", **fields).status_code == 200


def test_more_streams_than_allowed(engine):
    client = create_app(engine, max_streams=1).test_client()
    open_stream = complete(client, prompt=WAITS, stream=True, echo=True)  # the echo comes before the wait
    error(complete(client), 429, "engine_overloaded")
    assert client.get("/health").status_code == 200
    open_stream.close()
    assert engine.generations[0].cancelled
    assert complete(client).status_code == 200
    error(complete(client, prompt=5), 400, None, "prompt")
    assert complete(client).status_code == 200  # a refused request gave its place back


def test_an_unexpected_error_shows_no_traceback(client, engine, monkeypatch, caplog):
    monkeypatch.setattr(engine, "submit", lambda request: 1 / 0)
    message = error(complete(client), 500, "internal_error")
    assert "division" not in message
    assert "ZeroDivisionError" in caplog.text


def test_a_failed_generation(client):
    assert "not finite" in error(complete(client, prompt=FAILS), 500, "generation_failed")
    chunks, done = events(complete(client, prompt=FAILS, stream=True))
    assert not done
    assert "not finite" in chunks[-1]["error"]["message"]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "ba"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_meet_its_objective(client, engine, stream):
    engine.gives_up_late = True
    response = complete(client, prompt=LATE, stream=stream)
    assert "objective of 5 ms" in error(response, 429, "objective_missed")
    assert int(response.headers["Retry-After"]) >= 1
    chunks, done = events(complete(client, prompt="x", stream=True))
    assert done and chunks[-1]["choices"][0]["finish_reason"] == "length", "others stream as ever"


def test_a_late_one_of_several_prompts_ends_the_stream(client):
    chunks, done = events(complete(client, prompt=["x", LATE], stream=True))
    assert not done and chunks[-1]["error"]["code"] == "objective_missed"


@pytest.mark.parametrize(
    "fields",
    [{"priority": "high"}, {"priority": 2**40}, {"priority": 1.5}, {"slo_ms": 0}, {"slo_ms": -5}, {"slo_ms": "soon"}],
)
def test_scheduling_fields_are_checked(client, fields):
    (field,) = fields
    assert field in error(complete(client, **fields), 400, None, field)


def test_scheduling_fields_reach_the_engine_and_the_user_field_does_not(client, engine):
    assert complete(client, priority=-3, slo_ms=250, user="somebody else").status_code == 200
    messages = [{"role": "user", "content": "hello"}]
    chat(client, messages=messages, priority=7)
    first, second = (g.request for g in engine.generations)
    assert (first.priority, first.slo_ms, first.adapter) == (-3, 250, None)
    assert (second.priority, second.slo_ms) == (7, None)


def test_a_stream_hears_that_the_engine_closes(client, engine):
    response = complete(client, prompt=WAITS, stream=True, echo=True)
    engine.close()
    chunks, done = events(response)
    assert not done
    assert chunks[-1]["error"]["code"] == "engine_stopped"


def test_a_dropped_stream_is_cancelled_even_before_its_first_event(client, engine):
    body = {"model": "base", "prompt": WAITS, "stream": True}
    environ = EnvironBuilder("/v1/completions", method="POST", json=body).get_environ()
    client.application.wsgi_app(environ, lambda status, headers: None).close()
    wait_until(lambda: not engine.running)
    assert engine.generations[0].cancelled


def test_a_model_without_tokenizer(tmp_path):
    engine = FakeEngine(tmp_path, with_tokenizer=False)
    engine.start()
    client = create_app(engine).test_client()
    assert "token ids" in error(complete(client), 400, None, "prompt")
    assert "tokenizer" in error(chat(client), 400, None, "messages")
    body = complete(client, prompt=[1, 2], return_token_ids=True, logprobs=0, max_tokens=4).get_json()
    assert len(body["choices"][0]["token_ids"]) == 4
    assert body["choices"][0]["text"] == ""
    assert body["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    chunks, _ = events(complete(client, prompt=[1, 2], stream=True, max_tokens=4))
    assert chunks  # an event for each step, though there is no text
    engine.close()
