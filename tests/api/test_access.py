"""Keys, their limits, the admin key, and browsers' pages: who is let in, and what the others are told."""

import hashlib
import json
import logging
import os
import signal
import time

import pydantic
import pytest

from slora_jax.api.access import Access, Caller, Forbidden, Unauthorized, is_loopback
from slora_jax.api.app import create_app
from slora_jax.api.server import ServerConfig
from slora_jax.errors import InvalidRequest
from tests.api.test_app import error

KEY, OTHER, ADMIN = "sk-tenant-one", "sk-tenant-two", "sk-the-admin"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def keys_file(folder, *entries, name="keys.yaml"):
    path = folder / name
    path.write_text(json.dumps({"keys": list(entries)}))
    return path


def entry(key: str = KEY, **fields):
    return {"sha256": sha256(key), "name": f"name of {key[-3:]}"} | fields


def client_of(engine, **rules):
    return create_app(engine, access=Access(**rules)).test_client()


def complete(client, key=None, model="base", **fields):
    body = {"model": model, "prompt": "hello", "max_tokens": 4} | fields
    return client.post("/v1/completions", json=body, headers=bearer(key) if key else {})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- keys


def test_without_keys_nobody_needs_one(client):
    assert complete(client).status_code == 200
    assert complete(client, KEY).status_code == 200


def test_a_key_opens_and_nothing_else_does(engine):
    client = client_of(engine, keys=[KEY, OTHER])
    assert complete(client, KEY).status_code == complete(client, OTHER).status_code == 200
    for headers in (
        {},
        bearer("wrong"),
        bearer(""),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-Api-Key": KEY},
    ):
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/models/pirate"),
            ("GET", "/v1/capacity?prompt_tokens=1&max_tokens=1"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/nowhere"),
        ):
            response = client.open(path, method=method, headers=headers, json={} if method == "POST" else None)
            message = error(response, 401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert KEY not in message and "wrong" not in message
    assert client.get("/v1/models", headers={"Authorization": f"bearer  {KEY} "}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/ready"])
def test_probes_need_no_key(engine, path):
    assert client_of(engine, keys=[KEY]).get(path).status_code == 200
    assert client_of(engine, keys=[KEY]).get(path, headers=bearer("wrong")).status_code == 200


def test_a_key_of_the_file_uses_its_adapters_only(engine, tmp_path):
    path = keys_file(tmp_path, entry(adapters=["pirate", "org/*"]), entry(OTHER))
    client = client_of(engine, keys_file=path)
    for model, status in {"pirate": 200, "base:pirate": 200, "org/haiku": 200, "base": 403, "json": 403}.items():
        assert complete(client, KEY, model).status_code == status, model
        assert complete(client, OTHER, model).status_code == 200
        assert client.get(f"/v1/models/{model}", headers=bearer(KEY)).status_code == status
        capacity = f"/v1/capacity?adapter={model}&prompt_tokens=3&max_tokens=3"
        assert client.get(capacity, headers=bearer(KEY)).status_code == status
        tokenize = client.post("/tokenize", json={"model": model, "prompt": "x"}, headers=bearer(KEY))
        assert tokenize.status_code == status
    listed = [card["id"] for card in client.get("/v1/models", headers=bearer(KEY)).get_json()["data"]]
    assert listed == ["pirate", "org/haiku"]
    assert len(client.get("/v1/models", headers=bearer(OTHER)).get_json()["data"]) == 4


def test_a_name_that_is_not_allowed_is_refused_in_the_same_words_whether_it_exists_or_not(engine, tmp_path):
    client = client_of(engine, keys_file=keys_file(tmp_path, entry(adapters=["pirate", "gone"])))
    there = error(complete(client, KEY, "json"), 403, "model_not_allowed", "model")
    absent = error(complete(client, KEY, "nosj"), 403, "model_not_allowed", "model")
    assert there.replace("json", "nosj") == absent
    error(complete(client, KEY, "gone"), 404, "model_not_found", "model")


def test_requests_a_minute(engine, tmp_path):
    clock = Clock()
    path = keys_file(tmp_path, entry(requests_per_minute=3), entry(OTHER))
    client = client_of(engine, keys_file=path, clock=clock)
    assert [complete(client, KEY).status_code for _ in range(3)] == [200] * 3
    response = complete(client, KEY)
    error(response, 429, "rate_limit_exceeded")
    assert response.headers["Retry-After"] == "20"  # a third of a minute brings one back
    assert complete(client, OTHER).status_code == 200
    assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200
    clock.now += 19.9
    assert complete(client, KEY).status_code == 429
    clock.now += 0.2
    assert complete(client, KEY).status_code == 200
    assert complete(client, KEY).status_code == 429
    clock.now += 3600
    assert [complete(client, KEY).status_code for _ in range(4)] == [200] * 3 + [429], "no more than a minute is saved"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute_count_prompts_and_answers(engine, tmp_path, stream):
    clock = Clock()
    client = client_of(engine, keys_file=keys_file(tmp_path, entry(tokens_per_minute=60)), clock=clock)
    prompt = [5] * 30
    assert complete(client, KEY, prompt=prompt, max_tokens=20, stream=stream).text  # 50 of 60
    assert complete(client, KEY, prompt=prompt, max_tokens=20, stream=stream).text  # 100 of 60: the rest is owed
    response = complete(client, KEY, prompt=prompt)
    error(response, 429, "rate_limit_exceeded")
    assert response.headers["Retry-After"] == "41"
    clock.now += 40.5
    assert complete(client, KEY).status_code == 429
    clock.now += 0.6
    assert complete(client, KEY).status_code == 200


def test_a_stream_that_is_hung_up_is_paid_for(engine, tmp_path):
    client = client_of(engine, keys_file=keys_file(tmp_path, entry(tokens_per_minute=60)), clock=Clock())
    stream = complete(client, KEY, prompt=[5] * 70, max_tokens=50, stream=True)
    next(iter(stream.response))
    stream.close()
    assert complete(client, KEY).status_code == 429


def test_priorities(engine, tmp_path):
    engine.orders_by_priority = True
    client = client_of(engine, keys_file=keys_file(tmp_path, entry(priority=5), entry(OTHER, priority=-1_000_000)))

    def given(key: str, **fields) -> int:
        assert complete(client, key, **fields).status_code == 200
        return engine.generations[-1].request.priority

    assert given(KEY) == given(KEY, priority=0) == given(KEY, priority=99) == 5
    assert given(KEY, priority=-2) == 3
    assert given(OTHER, priority=-7) == -1_000_000
    assert Caller().allowed_priority(7) == 7
    engine.orders_by_priority = False
    assert given(KEY) == 0


# ---- the file


def test_the_file_is_read_again_on_sighup_and_a_bad_one_keeps_the_old(engine, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("slora_jax.start"), "propagate", True)  # a launch turns that off
    path = keys_file(tmp_path, entry(requests_per_minute=2))
    access = Access(keys_file=path, clock=Clock())
    client = create_app(engine, access=access).test_client()

    def hang_up(seen: str) -> None:
        caplog.clear()
        os.kill(os.getpid(), signal.SIGHUP)
        deadline = time.monotonic() + 5
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert seen in caplog.text

    before = signal.getsignal(signal.SIGHUP)
    with access.reloaded_by_sighup(), caplog.at_level(logging.INFO, logger="slora_jax.start"):
        assert complete(client, KEY).status_code == 200
        keys_file(tmp_path, entry(requests_per_minute=2), entry(OTHER))
        hang_up("2 keys")
        assert complete(client, OTHER).status_code == 200
        path.write_text(f"keys:\n- {KEY}: [")
        hang_up("stay as they were")
        assert KEY not in caplog.text
        assert complete(client, OTHER).status_code == 200
        assert [complete(client, KEY).status_code for _ in range(2)] == [200, 429], "what was used stays used"
        keys_file(tmp_path, entry(OTHER))
        hang_up("1 keys")
        error(complete(client, KEY), 401, "invalid_api_key")
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "mapping"),
        ("{}", "keys"),
        ('{"keys": [}', "not valid JSON"),
        (json.dumps({"keys": [{"name": "x", "sha256": KEY}]}), "keys.0.sha256"),
        (json.dumps({"keys": [{"name": "x", "key": KEY}]}), "another field than sha256, name"),
        (json.dumps({"keys": [{"name": "x", KEY: "key"}]}), "another field than sha256, name"),
        (json.dumps({"keys": [entry(), entry(name="y")]}), "keys.1.sha256"),
        (json.dumps({"keys": [entry(), entry(OTHER, name="name of one")]}), "keys.1.name"),
        (json.dumps({"keys": [entry(adapters="some")]}), "keys.0.adapters"),
        (json.dumps({"keys": [entry(requests_per_minute=0)]}), "keys.0.requests_per_minute"),
        (json.dumps({"keys": [entry(tokens_per_minute=True)]}), "keys.0.tokens_per_minute"),
        (json.dumps({"keys": [entry(priority=1e9)]}), "keys.0.priority"),
        (f"keys:\n  - name: {KEY}\n   sha256: x", "not valid YAML"),
        (f"keys: {KEY}", "keys"),
    ],
)
def test_bad_files_are_refused_without_a_word_of_what_they_hold(tmp_path, text, said):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as refusal:
        Access(keys_file=path)
    assert said in str(refusal.value) and str(path) in str(refusal.value)
    assert KEY not in str(refusal.value)
    with pytest.raises(InvalidRequest, match="No such file"):
        Access(keys_file=tmp_path / "none")


def test_a_yaml_file_and_given_keys_go_together(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - sha256: {sha256(KEY).upper()}\n    name: one\n    adapters: [pirate]\n")
    access = Access(keys=[OTHER], keys_file=path)
    one, other = (access.identify(f"Bearer {key}", "/v1/models") for key in (KEY, OTHER))
    assert (one.name, one.patterns) == ("one", ("pirate",))
    assert other.patterns is None


# ---- administration

LOAD = "/v1/load_lora_adapter"
ADMIN_ROUTES = [LOAD, "/v1/unload_lora_adapter", "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"]


@pytest.mark.parametrize("path", ADMIN_ROUTES)
def test_admin_routes_need_the_admin_key_where_there_is_one(engine, path):
    client = client_of(engine, keys=[KEY], admin_key=ADMIN, allow_adapter_loading=True)
    body = {"lora_name": "pirate"}
    error(client.post(path, json=body), 401, "invalid_api_key")
    error(client.post(path, json=body, headers=bearer("wrong")), 401, "invalid_api_key")
    error(client.post(path, json=body, headers=bearer(KEY)), 403, "admin_only")
    assert client.post(path, json=body, headers=bearer(ADMIN)).status_code == (400 if path == LOAD else 200)
    assert complete(client, ADMIN).status_code == 200
    without = client_of(engine)
    assert "--allow-adapter-loading" in error(without.post(path, json=body), 403, "adapter_loading_not_allowed")
    assert without.post(path, json=body, headers=bearer(ADMIN)).status_code == 403
    tenants = client_of(engine, keys=[KEY], allow_adapter_loading=True)
    error(tenants.post(path, json=body, headers=bearer(KEY)), 403, "admin_only")


@pytest.mark.parametrize("path", ["/metrics", "/v1/pool"])
def test_what_shows_all_tenants_needs_the_admin_key_where_there_is_one(path):
    access = Access(keys=[KEY], admin_key=ADMIN)
    assert access.identify(f"Bearer {ADMIN}", path).is_admin
    with pytest.raises(Forbidden, match="admin key"):
        access.identify(f"Bearer {KEY}", path)
    with pytest.raises(Unauthorized):
        access.identify(None, path)
    tenants = Access(keys=[KEY])
    assert not tenants.identify(f"Bearer {KEY}", path).is_admin
    with pytest.raises(Unauthorized):
        tenants.identify(None, path)
    assert Access().identify(None, path) == Caller()
    assert access.identify(None, "/") == access.identify(None, "/page/<name>") == Caller()


@pytest.mark.parametrize("path", ADMIN_ROUTES)
def test_pages_of_strangers_cannot_administer(engine, path):
    rules = {"allowed_origins": ["https://good.example"], "allowed_hosts": ["box"]}
    client = client_of(engine, allow_adapter_loading=True, **rules)

    def status(content_type="application/json", **headers) -> int:
        data = json.dumps({"lora_name": "none"})
        return client.post(path, data=data, content_type=content_type, headers=headers).status_code

    known = 400 if path == LOAD else 404
    for content_type in ("text/plain", "", "application/x-www-form-urlencoded", "application/problem+json"):
        assert status(content_type) == 415
    assert status("Application/JSON; charset=utf-8") == known
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "box", "BOX:1"):
        assert status(Host=host) == known, host
        assert status(Host=host, Origin=f"http://{host}") == known, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "10.0.0.1:8000",
        "[::2]:1",
        "localhost.x",
    ):
        assert status(Host=host) == 403, host
        assert status(Host=host, Origin=f"http://{host}") == 403, host
    for origin in ("http://evil.example", "null", "http://localhost:9999", "https://good.example.evil", ""):
        assert status(Host="localhost:8000", Origin=origin) == 403, origin
    assert status(Origin="https://good.example") == known


def test_a_server_for_every_address_is_called_by_any_address_but_no_name():
    access = Access(allow_adapter_loading=True, host="0.0.0.0")

    def ask(host: str) -> None:
        access.check_sender(LOAD, host=host, origin=None, content_type="application/json")

    ask("10.1.2.3:8000")
    ask("[fe80::1]:8000")
    with pytest.raises(Forbidden, match="not called"):
        ask("rebound.example:8000")


def test_a_configuration_that_would_let_strangers_administer_is_refused():
    for fields in ({"host": "0.0.0.0"}, {"host": "example.org"}, {"api_keys": ["12345678"]}, {"api_keys_file": "x"}):
        with pytest.raises(pydantic.ValidationError, match="needs an admin_key") as refusal:
            ServerConfig(allow_adapter_loading=True, **fields)
        ServerConfig(allow_adapter_loading=True, admin_key="87654321", **fields)
        assert "allow_adapter_loading" in str(refusal.value)
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "localhost.example")))


# ---- browsers


def test_cors(engine):
    client = client_of(engine, keys=[KEY], allowed_origins=["https://app.example/"])
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    good, bad = {"Origin": "https://app.example"}, {"Origin": "https://other.example"}
    preflight = client.options("/v1/completions", headers=good | ask)
    assert (preflight.status_code, preflight.data) == (204, b"")
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    for key in (KEY, "wrong"):  # a page may read why it was refused
        answer = client.get("/v1/models", headers=good | bearer(key))
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.headers["Vary"] == "Origin"
    for response in (
        client.options("/v1/completions", headers=bad | ask),
        client.get("/v1/models", headers=bad | bearer(KEY)),
        create_app(engine).test_client().options("/v1/completions", headers=good | ask),
        create_app(engine).test_client().get("/v1/models", headers=good),
    ):
        assert not [name for name, _ in response.headers if name.startswith("Access-Control")]
    anybody = client_of(engine, allowed_origins=["*"])
    assert anybody.get("/health", headers=bad).headers["Access-Control-Allow-Origin"] == "https://other.example"
    odd = ask | {"Access-Control-Request-Headers": "x\x7f"}
    assert "Access-Control-Allow-Headers" not in client.options("/v1/models", headers=good | odd).headers


# ---- keys are never shown


def test_keys_are_in_no_message_no_repr_and_no_log(engine, caplog):
    config = ServerConfig(api_keys=[KEY], admin_key=ADMIN)
    assert KEY not in repr(config) and ADMIN not in repr(config)
    with caplog.at_level(logging.DEBUG):
        client = client_of(engine, keys=[KEY], admin_key=ADMIN)
        for key in (KEY, ADMIN, "sk-unknown"):
            for response in (complete(client, key), client.post(LOAD, json={}, headers=bearer(key))):
                assert key not in response.text
    for key in (KEY, ADMIN, "sk-unknown"):
        assert key not in caplog.text


def test_given_keys_have_no_limits():
    caller = Access(keys=[KEY]).identify(f"Bearer {KEY}", "/v1/models")
    for _ in range(1000):
        caller.admit()
        caller.spend(10**9)
    assert caller.may_use("anything")
