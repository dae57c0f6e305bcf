"""Whatever a client sends, the answer is 200 or a 4xx that says what is wrong, in OpenAI's shape."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings

from slora_jax.api.app import create_app
from slora_jax.api.body import UnsupportedBody, read_json
from slora_jax.api.openai import MAX_CHOICES, MAX_MESSAGES
from slora_jax.errors import InvalidRequest, shown
from slora_jax.request import BOUNDS, MAX_STOPS
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.json_values import VALUES, fields

ROUTES = {
    "/v1/completions": {"model": "base", "prompt": "hi", "max_tokens": 3},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}
OTHERS = [
    *(f"/v1/{what}_lora_adapter" for what in ("load", "unload", "pin", "unpin")),
    *("/tokenize", "/detokenize"),
]
GENERATED = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def strict(text: str):
    """JSON as RFC 8259 has it."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def post(client, path, value, **headers):
    return client.post(path, data=json.dumps(value).encode(), content_type="application/json", headers=headers)


def check(response) -> dict | None:
    """Asserts that this is an answer, or a refusal in OpenAI's shape, which is returned."""
    text = response.get_data(as_text=True)
    if response.content_type.startswith("text/event-stream"):
        for line in text.split("\n\n")[:-1]:
            assert line == "data: [DONE]" or "error" not in strict(line.removeprefix("data: ")), line
        return None
    value = strict(text)
    if response.status_code == 200:
        assert "error" not in value
        return None
    assert 400 <= response.status_code < 500, text
    error = value["error"]
    assert set(value) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 600
    assert error["param"] is None or (isinstance(error["param"], str) and len(error["param"]) < 300)
    return error


def refused(response, status=400) -> dict:
    error = check(response)
    assert response.status_code == status, response.text
    assert error is not None
    return error


@pytest.mark.parametrize("path", ROUTES)
def test_any_value_in_any_field(client, path):
    @GENERATED
    @given(fields())
    def ask(changed):
        check(post(client, path, ROUTES[path] | changed))

    ask()
    assert check(post(client, path, ROUTES[path])) is None


@pytest.mark.parametrize("path", [*ROUTES, *OTHERS])
def test_any_value_as_the_body(engine, path):
    client = create_app(engine, allow_adapter_loading=True).test_client()

    @GENERATED
    @given(VALUES)
    def ask(value):
        refused(post(client, path, value))

    ask()


NUMBERS = [name for name in BOUNDS if name not in ("prompt", "logprobs")]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_checked_and_named(client, path, name):
    bounds = BOUNDS[name]
    values = [bounds.most + 1, bounds.least - 1, 10**400, True, str(bounds.least), [bounds.least], {}]
    for value in values:
        if (name, value) == ("top_k", -1):  # means all of them, as 0 does
            assert check(post(client, path, ROUTES[path] | {name: value})) is None
            continue
        sent = [value] if name.endswith("_token_ids") else {"5": value} if name == "logit_bias" else value
        error = refused(post(client, path, ROUTES[path] | {name: sent}))
        assert error["param"].startswith(name)
        assert name in error["message"] and "got" in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_limits_of_a_chat_are_checked(client, field):
    body = ROUTES["/v1/chat/completions"] | {"max_tokens": 5, "max_completion_tokens": 5, field: 0}
    assert refused(post(client, "/v1/chat/completions", body))["param"] == field


def test_the_number_that_ended_the_engine(client):
    error = refused(post(client, "/v1/completions", {"model": "base", "prompt": "a", "top_k": 2**31}))
    assert error["message"] == "top_k must be an integer from 0 to 2147483647, got 2147483648"


def test_stop_tokens_are_of_the_vocabulary(client, engine):
    size = engine.model_config.vocab_size
    body = ROUTES["/v1/completions"]
    assert check(post(client, "/v1/completions", body | {"stop_token_ids": [size - 1]})) is None
    error = refused(post(client, "/v1/completions", body | {"stop_token_ids": [0, size]}))
    assert str(size) in error["message"] and error["param"] == "stop_token_ids"


@pytest.mark.parametrize(
    "harmless", [{"store": 0}, {"parallel_tool_calls": 1}, {"store": ""}, {"tools": {}}, {"logit_bias": []}]
)
def test_values_of_another_type_are_not_taken_for_harmless_ones(client, harmless):
    (name,) = harmless
    assert refused(post(client, "/v1/chat/completions", ROUTES["/v1/chat/completions"] | harmless))["param"] == name


# ---- bodies


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b" ", "JSON"),
        (b'{"model": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"model": "base"} {}', "Extra data"),
        (b'{"model": "base",}', "JSON"),
        (b"{'model': 'base'}", "JSON"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
        ('{"model": "base"}'.encode("utf-16"), "UTF-8"),
        ('{"model": "base"}'.encode("utf-32"), "UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "twice"),
        (b"[" * 30_000, "deep"),
        (b'{"a":' * 30_000, "deep"),
        (b"[" * 30_000 + b"]" * 30_000, "deep"),
        (b'{"user": "\\ud800"}', "surrogate"),
        (b'{"metadata": {"a": ["\\udc00"]}}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
    ],
)
def test_bodies_that_are_not_one_json_text(client, body, word):
    for path in ROUTES:
        assert word in refused(client.post(path, data=body))["message"]


def test_lone_surrogates_are_named_by_place():
    for text, place in [
        (r'{"stop": ["x", "\ud800"]}', "stop[1]"),
        (r'{"messages": [{"content": [{"text": "a\udfff"}]}]}', "messages[0].content[0].text"),
        (r'{"a": {"\udfff": 1}}', "a"),
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            read_json(text.encode(), None, None)
        assert refusal.value.param == place
    assert read_json(rb'"\ud83d\ude00"', None, None) == "😀"


def test_a_byte_order_mark_is_ignored(client):
    body = b"\xef\xbb\xbf" + json.dumps(ROUTES["/v1/completions"]).encode()
    assert check(client.post("/v1/completions", data=body)) is None


@pytest.mark.parametrize("depth", [50, 900, 990, 1100, 3000])
@pytest.mark.parametrize("field", ["prompt", "messages", "stop", "metadata", "tools", "model", "temperature", "x"])
def test_deep_values(client, field, depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * depth + "1" + closing * depth
        for path, body in ROUTES.items():
            text = json.dumps(body | {field: 0}).replace(f'"{field}": 0', f'"{field}": {deep}')
            check(client.post(path, data=text.encode()))


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Content-Type", "application/json", 200),
        ("Content-Type", "Application/JSON; charset=utf-8", 200),
        ("Content-Type", "application/problem+json", 200),
        ("Content-Type", "", 200),
        ("Content-Type", "application/x-www-form-urlencoded", 415),
        ("Content-Type", "multipart/form-data; boundary=x", 415),
        ("Content-Type", "text/plain", 415),
        ("Content-Type", "\xff" * 3000, 415),
        ("Content-Encoding", "identity", 200),
        ("Content-Encoding", "gzip", 400),
        ("Content-Encoding", "gzip, br", 415),
    ],
)
def test_types_and_encodings(client, header, value, status):
    body = json.dumps(ROUTES["/v1/completions"]).encode()
    response = client.post("/v1/completions", data=body, headers={header: value})
    assert response.status_code == status
    if error := check(response):
        assert header == "Content-Encoding" or "application/json" in error["message"]
    with pytest.raises(UnsupportedBody):
        read_json(body, "text/html", None)


def test_bounds_on_lists(client):
    for changed, word in [
        ({"prompt": ["a"] * (MAX_CHOICES + 1)}, str(MAX_CHOICES)),
        ({"prompt": ["a"] * (MAX_CHOICES // 128 + 1), "n": 128}, str(MAX_CHOICES)),
        ({"prompt": [[1]] * 20_000}, str(MAX_CHOICES)),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, str(MAX_STOPS)),
        ({"stop": ["five5"] * 100_000}, str(MAX_STOPS)),
        ({"stop_token_ids": [1] * (MAX_STOPS + 1)}, str(MAX_STOPS)),
    ]:
        error = refused(post(client, "/v1/completions", ROUTES["/v1/completions"] | changed))
        assert word in error["message"] and error["param"] in changed
    message = {"role": "user", "content": "x"}
    parts = [{"type": "text", "text": "x"}] * (MAX_MESSAGES + 1)
    for messages in ([message] * 20_000, [message | {"content": parts}]):
        body = ROUTES["/v1/chat/completions"] | {"messages": messages}
        assert str(MAX_MESSAGES) in refused(post(client, "/v1/chat/completions", body))["message"]


def test_refusing_costs_no_more_than_reading(client):
    """Errors are found once, not a million times over, and shown without writing out all that was sent."""
    many = {f"field{i}": i for i in range(40_000)}
    wrong = ["x"] * 150_000
    options = {"stream": True, "stream_options": many}
    for changed in (many, options, {"prompt": [*wrong, 1]}, {"stop_token_ids": wrong}, {"messages": {"a": wrong}}):
        body = json.dumps(ROUTES["/v1/completions"] | changed).encode()
        start = time.process_time()
        json.loads(body)
        reading = time.process_time() - start
        start = time.process_time()
        refused(client.post("/v1/completions", data=body))
        assert time.process_time() - start < 10 * reading + 0.1


def test_what_is_shown_is_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        "x" * 10**7,
        [1] * 10**6,
        {str(i): i for i in range(10**5)},
        deep,
        10**5000,
        [{"a": [[["b"]]]}],
        object(),
        {16**9999},
    ):
        assert 0 < len(shown(value)) <= 80
    assert shown({"a": [1, True, None, "é"]}) == '{"a": [1, true, null, "\\u00e9"]}'
    assert shown(float("nan")) == "NaN"
    assert shown(10**100) == '"an integer of 333 bits"'


# ---- names


def test_every_route_knows_the_names_that_chat_knows(engine):
    client = create_app(engine, allow_adapter_loading=True).test_client()
    card = client.get("/v1/models/org/haiku").get_json()
    assert client.get("/v1/models/base:org/haiku").get_json() == card
    capacity = "/v1/capacity?prompt_tokens=5&max_tokens=5&adapter="
    assert client.get(f"{capacity}base:json").get_json() == client.get(f"{capacity}json").get_json()
    assert client.get(f"{capacity}base").get_json()["adapter_pages"] == 0
    for name in ("base:nobody", "base:", "base:base", "base:base:json", "", ":json"):
        refused(client.get(f"{capacity}{name}"), 404)
        refused(post(client, "/v1/completions", ROUTES["/v1/completions"] | {"model": name}), 404)
        if name:
            refused(client.get(f"/v1/models/{name}"), 404)
            refused(post(client, "/v1/unload_lora_adapter", {"lora_name": name}), 404)
    assert refused(post(client, "/v1/unload_lora_adapter", {"lora_name": "base"}))["param"] == "lora_name"
    assert post(client, "/v1/unload_lora_adapter", {"lora_name": "base:json"}).get_json()["id"] == "json"
    refused(client.get("/v1/models/json"), 404)


@pytest.mark.parametrize(
    "path", ["//", "//health", "/v1//models", "/%ff", "/v1/models/%ff%00", "/v1/models/%2e%2e", "/" + "x" * 60_000]
)
def test_paths_of_nothing(client, path):
    # The test's client would take what follows two slashes for a host.
    whole = {"PATH_INFO": path} if path.startswith("//") else {}
    assert len(refused(client.get(path, environ_overrides=whole), 404)["message"]) < 400


def test_a_parameter_given_twice(client):
    query = "prompt_tokens=5&max_tokens=5&adapter=json&adapter=pirate"
    assert refused(client.get(f"/v1/capacity?{query}"))["param"] == "adapter"


# ---- answers


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprob", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_an_error_that_names_its_adapter(tmp_path, path, stream, logprob):
    engine = FakeEngine(tmp_path, logprob=logprob)
    engine.start()
    body = ROUTES[path] | {"model": "pirate", "stream": stream, "logprobs": 1 if path == "/v1/completions" else True}
    response = post(create_app(engine).test_client(), path, body)
    text = response.get_data(as_text=True)
    if stream:
        error = strict(text.split("\n\n")[-2].removeprefix("data: "))["error"]
    else:
        assert response.status_code == 500
        error = strict(text)["error"]
    assert error["code"] == "generation_failed" and "'pirate'" in error["message"]
    engine.close()
