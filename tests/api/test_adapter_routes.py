"""Adapters at run time: vLLM's routes and bodies, pins, and the folders that a client may name."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slora_jax.api.access import Access
from slora_jax.api.app import create_app
from slora_jax.api.folders import AdapterFolders, NoSuchFolder
from slora_jax.errors import AdapterExists, BadAdapter, UnknownAdapter
from tests.api.test_app import error, post
from tests.helpers.engine_cases import FIXTURES, Case

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PIN, UNPIN = "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"


def adapter_at(path):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return str(path)


@pytest.fixture
def admin(engine):
    return create_app(engine, allow_adapter_loading=True).test_client()


# ---- vLLM's bodies


def test_load_and_unload_as_scripts_for_vllm_do(admin, tmp_path):
    folder = adapter_at(tmp_path / "a")
    fields = {"lora_name": "sql", "lora_path": folder}
    response = post(admin, LOAD, **fields, lora_int_id=7, base_model_name="base", is_3d_lora_weight=False)
    assert response.status_code == 200
    assert "Success: LoRA adapter 'sql' added successfully." in response.text
    assert response.get_json()["id"] == "sql"
    assert "already been loaded" in error(post(admin, LOAD, **fields), 400, "adapter_exists")
    error(post(admin, LOAD, **fields, load_inplace=False), 400, "adapter_exists")
    assert post(admin, LOAD, **fields, load_inplace=True).status_code == 200
    response = post(admin, UNLOAD, lora_name="sql", lora_int_id=7)
    assert "Success: LoRA adapter 'sql' removed successfully." in response.text
    error(post(admin, UNLOAD, lora_name="sql"), 404, "model_not_found", "model")
    gone = error(
        post(admin, LOAD, lora_name="x", lora_path=str(tmp_path / "no")), 404, "adapter_not_found", "lora_path"
    )
    assert "--adapter-root" in gone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"load_inplace": "yes"}, "load_inplace"),
        ({"load_inplace": 1}, "load_inplace"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_path": None}, "lora_path"),
        ({"lora_path": ""}, "lora_path"),
        ({"lora_name": 5}, "lora_name"),
        ({"lora_weight": 5}, "lora_weight"),
    ],
)
def test_bad_bodies(admin, tmp_path, fields, param):
    body = {"lora_name": "x", "lora_path": adapter_at(tmp_path / "a")} | fields
    error(post(admin, LOAD, **body), 400, None, param)


def test_pin_and_unpin(admin):
    assert post(admin, PIN, lora_name="pirate").get_json()["pinned"] is True
    assert admin.get("/v1/models/pirate").get_json()["pinned"] is True
    assert post(admin, PIN, lora_name="base:pirate").get_json()["pinned"] is True
    assert post(admin, UNPIN, lora_name="pirate").get_json()["pinned"] is False
    assert admin.get("/v1/models/pirate").get_json()["pinned"] is False
    for route in (PIN, UNPIN):
        error(post(admin, route, lora_name="nobody"), 404, "model_not_found", "model")
        error(post(admin, route, lora_name="base"), 400, None, "lora_name")
        error(post(admin, route), 400, None, "lora_name")


def test_of_many_loads_of_one_name_one_wins(tiny_case):
    """The same name at the same time: without load_inplace the second may not take the first's place."""
    engine = tiny_case.engine()
    folder = str(tiny_case.adapters / "qv-r8")
    start = threading.Barrier(8)

    def load(_) -> bool:
        start.wait()
        try:
            engine.register_adapter("new", folder, replace=False)
        except AdapterExists:
            return False
        return True

    try:
        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(load, range(8))) == 1
    finally:
        engine.close()


# ---- folders


def test_folders_within_the_roots_after_links_are_followed(tmp_path):
    inside = adapter_at(tmp_path / "root" / "team" / "a")
    outside = adapter_at(tmp_path / "outside")
    (tmp_path / "root" / "link-in").symlink_to(inside)
    (tmp_path / "root" / "link-out").symlink_to(outside)
    (tmp_path / "link-to-root").symlink_to(tmp_path / "root")
    adapter_at(tmp_path / "root-of-another" / "a")
    weights = adapter_at(tmp_path / "root" / "weights-elsewhere")
    (tmp_path / "outside" / "secret").write_text("x")
    (tmp_path / "root" / "weights-elsewhere" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "secret")
    templates = adapter_at(tmp_path / "root" / "templates-elsewhere")
    (tmp_path / "root" / "templates-elsewhere" / "additional_chat_templates").symlink_to(tmp_path / "outside")
    folders = AdapterFolders([str(tmp_path / "link-to-root")])
    for path in (inside, str(tmp_path / "root" / "link-in"), str(tmp_path / "link-to-root" / "team" / "a")):
        assert folders.checked(path) == inside
    said = set()
    for path in (
        outside,
        str(tmp_path / "root" / "link-out"),
        str(tmp_path / "root" / ".." / "outside"),
        str(tmp_path / "root" / "absent"),
        str(tmp_path / "root-of-another" / "a"),
        weights,
        templates,
        "/etc",
        "/nowhere",
        "a\0b",
        "/" + "x" * 5000,
        "org/name",
        "~root",
    ):
        with pytest.raises(NoSuchFolder) as refusal:
            folders.checked(path)
        said.add(str(refusal.value).partition(", or this server")[2])
    assert len(said) == 1, "the words do not tell what is there"
    with pytest.raises(NoSuchFolder):
        AdapterFolders([]).checked(inside)
    assert AdapterFolders().checked(outside) == outside


def test_a_folder_of_very_many_files_is_refused(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    for i in range(1001):
        (folder / str(i)).touch()
    with pytest.raises(BadAdapter, match="more than 1000 files"):
        AdapterFolders([str(folder)]).checked(str(folder))


def test_hub_ids_need_their_organisation_to_be_allowed(tmp_path, monkeypatch):
    folders = AdapterFolders(hubs=["good"])
    assert folders.checked("good/adapter") == "good/adapter"
    for path in ("evil/adapter", "good/../evil", "good/a/b", "good", "Good/adapter", "good/", "./good/adapter"):
        with pytest.raises(NoSuchFolder):
            folders.checked(path)
    # A folder of that name goes first when it is loaded, and so it must be allowed itself.
    monkeypatch.chdir(tmp_path)
    adapter_at(tmp_path / "good" / "adapter")
    with pytest.raises(NoSuchFolder):
        AdapterFolders([str(tmp_path / "roots")], hubs=["good"]).checked("good/adapter")


def test_the_route_asks_the_folders(engine, tmp_path):
    inside, outside = adapter_at(tmp_path / "root" / "a"), adapter_at(tmp_path / "b")
    folders = AdapterFolders([str(tmp_path / "root")])
    client = create_app(engine, access=Access(allow_adapter_loading=True), folders=folders).test_client()
    assert post(client, LOAD, lora_name="x", lora_path=inside).status_code == 200
    refused = error(post(client, LOAD, lora_name="y", lora_path=outside), 404, "adapter_not_found", "lora_path")
    shutil.rmtree(outside)
    assert error(post(client, LOAD, lora_name="y", lora_path=outside), 404, "adapter_not_found", "lora_path") == refused
    error(post(client, LOAD, lora_name="y", lora_path="org/name"), 404, "adapter_not_found", "lora_path")
    error(client.get("/v1/models/y"), 404, "model_not_found", "model")


# ---- a real engine


def tokens(client, model: str, prompt: list[int], max_tokens: int) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body | {"return_token_ids": True})
    assert response.status_code == 200, response.text
    return response.get_json()["choices"][0]["token_ids"]


def test_a_request_that_runs_ends_on_the_weights_it_began_with(tiny_case, tmp_path):
    """Token for token: the name is replaced, and then forgotten, while a stream of it runs."""
    prompt, length = list(range(5, 25)), 160
    engine = tiny_case.engine(max_model_len=192, pages=200)
    engine.start()
    client = create_app(engine, allow_adapter_loading=True).test_client()
    folder = tmp_path / "adapter"
    try:
        old, new = (tokens(client, name, prompt, length) for name in ("qv-r8", "mlp-r3"))
        assert old != new
        shutil.copytree(tiny_case.adapters / "qv-r8", folder)
        assert post(client, LOAD, lora_name="it", lora_path=str(folder)).status_code == 200
        stream = client.post(
            "/v1/completions",
            json={
                **{"model": "it", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True},
                **{"stream": True, "return_token_ids": True},
            },
        )
        events = iter(stream.response)
        seen = [next(events)]
        # The files too are another adapter's from now on.
        shutil.rmtree(folder)
        shutil.copytree(tiny_case.adapters / "mlp-r3", folder)
        assert post(client, LOAD, lora_name="it", lora_path=str(folder), load_inplace=True).status_code == 200
        assert engine.stats()["running"] == 1, "the stream runs on"
        assert tokens(client, "it", prompt, length) == new
        assert post(client, UNLOAD, lora_name="it").status_code == 200
        error(client.post("/v1/completions", json={"model": "it", "prompt": prompt}), 404, "model_not_found", "model")
        seen += events
        payloads = b"".join(seen).decode().split("\n\n")
        assert payloads[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(payload.removeprefix("data: ")) for payload in payloads[:-2]]
        assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids") or []] == old
    finally:
        engine.close()
    engine.check_integrity()


def test_pins_of_a_real_engine(tiny_case):
    engine = tiny_case.engine()
    try:
        assert engine.pin_adapter("qv-r8").pinned
        assert engine.adapter("qv-r8").pinned
        deadline = time.monotonic() + 20
        while engine.whereabouts("qv-r8").pool != "used":
            assert time.monotonic() < deadline, "a pinned adapter is brought to the pool"
            engine.step()
        assert not engine.unpin_adapter("qv-r8").pinned
        engine.step()
        assert engine.whereabouts("qv-r8").pool == "cached"
        assert not engine.unpin_adapter("qv-r8").pinned
        for change in (engine.pin_adapter, engine.unpin_adapter):
            with pytest.raises(UnknownAdapter):
                change("nobody")
    finally:
        engine.close()


@pytest.fixture(scope="module")
def tiny_case():
    return Case(FIXTURES / "smollm_gqa3")
