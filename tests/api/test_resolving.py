"""Adapters that are registered when first asked for."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from slora_jax.api.access import Access
from slora_jax.api.app import create_app
from slora_jax.api.folders import AdapterFolders, Place
from slora_jax.api.resolving import MAX_MISSES, REMEMBERED_SECONDS, AdapterResolver
from slora_jax.api.server import ServerConfig
from slora_jax.errors import AdapterExists, BadAdapter, Overloaded, UnknownAdapter
from tests.api.test_adapter_routes import adapter_at
from tests.api.test_app import chat, complete, error, post


@pytest.fixture
def root(tmp_path):
    adapter_at(tmp_path / "root" / "sql")
    adapter_at(tmp_path / "root" / "team" / "poem")
    return tmp_path / "root"


@pytest.fixture
def client(engine, root):
    return create_app(engine, folders=AdapterFolders([str(root)], ["good"]), resolve_adapters=True).test_client()


@pytest.mark.parametrize("ask", [complete, chat], ids=["completions", "chat"])
@pytest.mark.parametrize("name", ["sql", "base:sql", "team/poem"])
def test_a_folder_of_the_name_is_served(client, engine, root, ask, name):
    own = name.removeprefix("base:")
    assert own not in engine.adapters()
    assert ask(client, model=name, max_tokens=200).status_code == 200
    assert engine.generations[-1].request.adapter == own
    assert engine.adapters()[own].path == str(root / own)


def test_tokens_are_of_its_own_template_too(client, engine):
    assert post(client, "/tokenize", model="sql", prompt="x").status_code == 200
    assert "sql" in engine.adapters()


def test_looking_at_a_model_loads_none(client, engine):
    error(client.get("/v1/models/sql"), 404, "model_not_found", "model")
    assert "sql" not in engine.adapters()


def test_off_by_default(engine, root):
    client = create_app(engine, folders=AdapterFolders([str(root)])).test_client()
    error(complete(client, model="sql"), 404, "model_not_found", "model")


def test_absent_and_forbidden_are_told_in_the_same_words(client, engine, root, tmp_path):
    adapter_at(tmp_path / "outside")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "linked").mkdir()
    (root / "linked" / "adapter_config.json").symlink_to(tmp_path / "outside" / "adapter_config.json")
    names = ["absent", "../outside", "team/../../outside", "out", "linked", "team", "/etc", str(root / "sql"), "sql/",
             "sql/.", ".", "~", "a\0b", "x" * 5000, "sql//x", "evil/x", "é"]  # fmt: skip
    said = {error(complete(client, model=n), 404, "model_not_found", "model").replace(repr(n[:200]), "") for n in names}
    assert len(said) == 1
    assert set(engine.adapters()) == {"pirate", "json", "org/haiku"}


def test_a_key_that_may_not_use_a_name_has_nothing_looked_for(engine, root, tmp_path, monkeypatch):
    keys = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"sk-a").hexdigest()
    keys.write_text(f"keys: [{{name: a, sha256: {digest}, adapters: [team/*]}}]")
    folders = AdapterFolders([str(root)])
    looked = []
    monkeypatch.setattr(folders, "find", lambda name: looked.append(name))
    client = create_app(engine, access=Access(keys_file=keys), folders=folders, resolve_adapters=True).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Bearer sk-a"
    for path in ("/v1/completions", "/tokenize"):
        for name in ("sql", "base:sql", "absent"):
            error(post(client, path, model=name, prompt="x"), 403, "model_not_allowed", "model")
    assert looked == []
    error(complete(client, model="team/x"), 404, "model_not_found", "model")
    assert looked == ["team/x"]


# ---- the resolver alone


class Registry:
    """As much of an engine as the resolver knows; ``broken`` names cannot be served."""

    model_name = "base"

    def __init__(self, *broken):
        self.broken = broken
        self.go = threading.Event()
        self.go.set()
        self.asked: list[str] = []
        self.names: set[str] = set()

    def adapter(self, name):
        if name not in self.names:
            raise UnknownAdapter(name)

    def register_adapter(self, name, path, pinned=False, replace=True):
        assert not replace
        self.asked.append(name)
        assert self.go.wait(10)
        if name in self.names:
            raise AdapterExists(name)
        if name in self.broken or path.startswith("good/absent"):
            raise BadAdapter(f"{path} cannot be served")
        self.names.add(name)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def resolver_of(registry, places=lambda name: Place(f"/root/{name}", is_hub=False)):
    clock = Clock()
    return AdapterResolver(registry, SimpleNamespace(find=places), clock), clock


def test_many_requests_at_once_share_one_load():
    registry = Registry()
    registry.go.clear()
    resolver, _ = resolver_of(registry)
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(resolver.look_for, "sql") for _ in range(8)]
        threading.Timer(0.2, registry.go.set).start()
        for one in found:
            one.result(10)
            assert "sql" in registry.names
    assert registry.asked == ["sql"]
    resolver.look_for("sql")
    resolver.look_for("base")
    assert registry.asked == ["sql"]


def test_all_who_wait_hear_of_the_failure_and_it_is_remembered_for_a_while():
    registry = Registry("sql")
    registry.go.clear()
    resolver, clock = resolver_of(registry)

    def fails() -> str:
        with pytest.raises(BadAdapter) as refusal:
            resolver.look_for("sql")
        return str(refusal.value)

    with ThreadPoolExecutor(4) as threads:
        told = [threads.submit(fails) for _ in range(4)]
        threading.Timer(0.2, registry.go.set).start()
        (said,) = {one.result(10) for one in told}
    assert "log says why" in said and "/root" not in said
    assert registry.asked == ["sql"]
    clock.now = REMEMBERED_SECONDS - 1
    fails()
    assert registry.asked == ["sql"]
    clock.now = REMEMBERED_SECONDS + 1
    registry.broken = ()
    resolver.look_for("sql")
    assert registry.asked == ["sql", "sql"] and "sql" in registry.names


def test_the_hub_is_asked_for_few_names_in_vain():
    registry = Registry()
    resolver, clock = resolver_of(registry, lambda name: Place(name, is_hub=True) if name.startswith("good/") else None)
    for i in range(MAX_MISSES):
        for _ in range(2):
            resolver.look_for(f"good/absent-{i}")  # nothing is said: it is a model that does not exist
    assert len(registry.asked) == MAX_MISSES
    with pytest.raises(Overloaded):
        resolver.look_for("good/other")
    resolver.look_for("absent here")
    clock.now = REMEMBERED_SECONDS + 1
    resolver.look_for("good/other")
    assert registry.names == {"good/other"}


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = AdapterFolders([], ["good"])
    assert folders.find("good/x") == Place("good/x", is_hub=True)
    for name in ("good", "good/x/y", "evil/x", "good/../x", "Good/x"):
        assert folders.find(name) is None
    adapter_at(tmp_path / "good" / "x")
    assert folders.find("good/x") is None, "a folder would go first"


def test_it_needs_a_place_to_look():
    with pytest.raises(ValueError, match="needs an adapter_root or an adapter_hub"):
        ServerConfig(resolve_adapters=True)
    assert ServerConfig(resolve_adapters=True, adapter_roots=("x",)).resolve_adapters
