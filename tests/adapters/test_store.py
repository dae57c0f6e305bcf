"""The registry: versions, loading in the background, and that one adapter's failure is nobody else's."""

import gc
import shutil
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from peft_folders import MODEL, POOL, make_tensors, tensor_name, write_adapter

import slora_jax.adapters.store as store_module
from slora_jax.adapters.store import AdapterStore
from slora_jax.errors import BadAdapter, UnknownAdapter

WAIT = 20


@pytest.fixture
def changes():
    return []


@pytest.fixture
def store(changes):
    store = AdapterStore(MODEL, POOL, np.float32, on_change=lambda: changes.append(threading.current_thread().name))
    yield store
    store.close()


@pytest.fixture
def gate(monkeypatch):
    """Loads wait until this event is set."""
    event = threading.Event()

    def gated(*args):
        assert event.wait(WAIT)
        return original(*args)

    original = store_module.load_adapter
    monkeypatch.setattr(store_module, "load_adapter", gated)
    yield event
    event.set()


def broken(folder):
    tensors = make_tensors()
    tensors[tensor_name(0, "q", "A")][0, 0] = np.nan
    return write_adapter(folder, tensors)


def test_registering_reads_no_weights(store, tmp_path, changes):
    before = int(time.time())
    info = store.register("pirate", write_adapter(tmp_path, make_tensors(("q", "up")), lora_alpha=4))
    assert (info.name, info.path, info.rank, info.ranks) == ("pirate", tmp_path, 4, {"q": 4, "up": 4})
    assert info.content_hash is None
    assert before <= info.created <= time.time()
    version = store.get("pirate")
    assert version.info == info
    assert version.num_pages == info.num_pages == version.header.num_pages
    assert (version.status, version.host(), version.failure, version.content_hash) == ("registered", None, "", None)
    assert changes == []


def test_prefetch_loads_in_the_background(store, tmp_path, gate, changes):
    store.register("a", write_adapter(tmp_path))
    version = store.get("a")
    version.prefetch()
    version.prefetch()
    assert version.status == "loading"
    assert version.host() is None
    assert version.wait(0.01) is None
    gate.set()
    host = version.wait(WAIT)
    assert version.status == "ready"
    assert version.host() is host is store.get("a").host()
    assert version.content_hash == host.content_hash == store.infos()["a"].content_hash
    assert host.packed.dtype == np.float32
    version.prefetch()
    assert version.host() is host
    store.close()
    assert len(changes) == 1
    assert changes[0].startswith("slora-adapter")


def test_wait_starts_loading(store, tmp_path):
    store.register("a", write_adapter(tmp_path))
    assert store.get("a").wait(WAIT) is not None


def test_a_failed_load_is_nobody_elses(store, tmp_path, changes):
    store.register("good", write_adapter(tmp_path / "good"))
    store.register("bad", broken(tmp_path / "bad"))
    bad, good = store.get("bad"), store.get("good")
    bad.prefetch()
    good.prefetch()
    assert good.wait(WAIT) is not None
    with pytest.raises(BadAdapter, match="holds NaN"):
        bad.wait(WAIT)
    assert bad.status == "failed"
    assert "holds NaN" in bad.failure
    with pytest.raises(BadAdapter, match="holds NaN"):
        bad.host()
    bad.prefetch()
    assert bad.status == "failed"
    store.close()
    assert len(changes) == 2


def test_a_failed_load_is_tried_again_when_registered_again(store, tmp_path):
    folder = broken(tmp_path)
    store.register("a", folder)
    with pytest.raises(BadAdapter):
        store.get("a").wait(WAIT)
    failed = store.get("a")
    store.register("a", folder)
    assert store.get("a") is not failed
    assert store.get("a").status == "registered"
    write_adapter(tmp_path)
    store.register("a", folder)
    assert store.get("a").wait(WAIT) is not None
    assert failed.status == "failed"


def test_an_unexpected_error_is_a_failed_load(store, tmp_path, monkeypatch):
    def explode(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(store_module, "load_adapter", explode)
    store.register("a", write_adapter(tmp_path))
    with pytest.raises(BadAdapter, match="loading failed: MemoryError: no room"):
        store.get("a").wait(WAIT)


def test_a_failing_callback_stops_nothing(tmp_path):
    def fail():
        raise RuntimeError("nobody listens")

    store = AdapterStore(MODEL, POOL, np.float32, loader_threads=1, on_change=fail)
    for name in "ab":
        store.register(name, write_adapter(tmp_path / name))
        assert store.get(name).wait(WAIT) is not None
    store.close()


def test_a_refused_adapter_changes_nothing(store, tmp_path):
    info = store.register("a", write_adapter(tmp_path / "a"))
    version = store.get("a")
    with pytest.raises(BadAdapter, match="use_dora"):
        store.register("a", write_adapter(tmp_path / "b", use_dora=True))
    with pytest.raises(BadAdapter, match="use_dora"):
        store.register("b", tmp_path / "b")
    assert store.get("a") is version
    assert dict(store.infos()) == {"a": info}
    assert version.wait(WAIT) is not None


# Versions


def test_registering_the_same_again_changes_nothing(store, tmp_path):
    folder = write_adapter(tmp_path)
    info = store.register("a", folder)
    version = store.get("a")
    host = version.wait(WAIT)
    again = store.register("a", str(folder))
    assert store.get("a") is version
    assert again.created == info.created
    assert again.content_hash == host.content_hash


def test_changed_content_is_a_new_version_and_the_old_one_stays(store, tmp_path):
    folder = write_adapter(tmp_path, make_tensors(seed=0))
    store.register("a", folder)
    old = store.get("a")
    old_host = old.wait(WAIT)
    write_adapter(folder, make_tensors(seed=1))
    store.register("a", folder)
    new = store.get("a")
    assert new is not old
    assert old.host() is old_host
    assert new.status == "registered"
    assert new.wait(WAIT).content_hash != old_host.content_hash
    assert not np.array_equal(new.host().packed, old.host().packed)


def test_another_folder_is_a_new_version_with_the_same_hash_for_the_same_content(store, tmp_path):
    store.register("a", write_adapter(tmp_path / "a"))
    old = store.get("a")
    store.register("a", shutil.copytree(tmp_path / "a", tmp_path / "b"))
    new = store.get("a")
    assert new is not old
    assert new.info.path == tmp_path / "b"
    assert new.wait(WAIT).content_hash == old.wait(WAIT).content_hash


def test_a_link_is_followed_once(store, tmp_path):
    write_adapter(tmp_path / "v1", make_tensors(seed=1))
    write_adapter(tmp_path / "v2", make_tensors(seed=2))
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    store.register("a", tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "v2")
    old = store.get("a")
    store.register("a", tmp_path / "current")
    store.register("v1", tmp_path / "v1")
    assert store.get("a") is not old
    assert old.wait(WAIT).content_hash == store.get("v1").wait(WAIT).content_hash
    assert store.get("a").wait(WAIT).content_hash != old.content_hash


def test_one_folder_under_two_names(store, tmp_path):
    folder = write_adapter(tmp_path)
    store.register("a", folder)
    store.register("b", folder)
    assert store.get("a") is not store.get("b")
    assert store.get("a").wait(WAIT).content_hash == store.get("b").wait(WAIT).content_hash


@pytest.mark.parametrize("how", ["unregister", "replace"])
def test_host_memory_goes_when_nobody_uses_it(store, tmp_path, how):
    store.register("a", write_adapter(tmp_path / "a"))
    version = store.get("a")
    packed = weakref.ref(version.wait(WAIT).packed)
    if how == "unregister":
        store.unregister("a")
    else:
        store.register("a", write_adapter(tmp_path / "b"))
    assert version.host().packed is packed()
    del version
    deadline = time.monotonic() + WAIT
    while packed() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert packed() is None, "freed without the help of the garbage collector"


def test_a_version_that_nobody_wants_is_not_loaded(tmp_path, gate, monkeypatch):
    store = AdapterStore(MODEL, POOL, np.float32, loader_threads=1)
    for name in ("first", "second"):
        store.register(name, write_adapter(tmp_path / name))
        store.get(name).prefetch()
    store.unregister("second")
    loaded = []
    monkeypatch.setattr(store_module, "load_adapter", lambda header, dtype: loaded.append(header.path.name))
    gate.set()
    store.get("first").wait(WAIT)
    store.close()
    assert loaded == []


# Names


def test_unknown_names(store, tmp_path):
    store.register("pirate-speech", write_adapter(tmp_path))
    assert "pirate-speech" in store
    assert "pirat-speech" not in store
    with pytest.raises(UnknownAdapter, match="no adapter is named 'pirat-speech'; close names: pirate-speech"):
        store.get("pirat-speech")
    with pytest.raises(UnknownAdapter, match="no adapter is named 'zzz'; register it first"):
        store.get("zzz")
    with pytest.raises(UnknownAdapter):
        store.unregister("zzz")
    store.unregister("pirate-speech")
    with pytest.raises(UnknownAdapter):
        store.get("pirate-speech")
    assert dict(store.infos()) == {}


def test_unknown_name_of_any_length(store):
    with pytest.raises(UnknownAdapter) as unknown:
        store.get("x" * 10**6)
    assert len(str(unknown.value)) < 300


@pytest.mark.parametrize("name", ["a", "org/name", "base:adapter@v1.2", "A_b-c+d=e", "0", "_x", "a" * 200])
def test_allowed_names(store, tmp_path, name):
    assert store.register(name, write_adapter(tmp_path)).name == name
    assert name in store


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a\n", "a\x00", "é", "/a", "a/", "a//b", ".", "..", "a/../b", "-x", "a?b"]
)
def test_refused_names(store, tmp_path, name):
    with pytest.raises(BadAdapter, match="is not allowed: use at most 200 letters"):
        store.register(name, write_adapter(tmp_path))


def test_too_long_a_name(store, tmp_path):
    with pytest.raises(BadAdapter, match="is not allowed"):
        store.register("a" * 201, write_adapter(tmp_path))


# Folders of adapters


def test_register_dir(store, tmp_path):
    for name in ("b", "a"):
        write_adapter(tmp_path / name)
    write_adapter(tmp_path / "dora", use_dora=True)
    write_adapter(tmp_path / "not allowed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    infos, refused = store.register_dir(tmp_path)
    assert list(infos) == ["a", "b"]
    assert list(store.infos()) == ["a", "b"]
    assert list(refused) == ["dora", "not allowed"]
    assert "use_dora=true" in refused["dora"]
    assert "is not allowed" in refused["not allowed"]


def test_register_dir_that_is_not_there(store, tmp_path):
    with pytest.raises(BadAdapter, match=r"cannot read the folder of adapters .*nowhere: No such file"):
        store.register_dir(tmp_path / "nowhere")


# Threads


def test_many_threads_prefetch_and_read(store, tmp_path, monkeypatch):
    loads = []
    original = store_module.load_adapter

    def counted(header, dtype):
        loads.append(header.path)
        return original(header, dtype)

    monkeypatch.setattr(store_module, "load_adapter", counted)
    names = [f"a{i}" for i in range(6)]
    for i, name in enumerate(names):
        store.register(name, (broken if i == 3 else write_adapter)(tmp_path / name))
    versions = [store.get(name) for name in names]
    start = threading.Barrier(16)

    def work(i):
        start.wait(WAIT)
        seen = set()
        for version in versions[i % 6 :] + versions[: i % 6]:
            version.prefetch()
            assert version.status != "registered"
            try:
                seen.add(id(version.wait(WAIT)))
            except BadAdapter:
                assert version is versions[3]
        return seen

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(work, range(16)))
    assert all(result == results[0] for result in results)
    assert len(results[0]) == 5
    assert len(loads) == 6, "each adapter is read once"


def test_many_threads_register_and_unregister(store, tmp_path):
    folders = [write_adapter(tmp_path / str(i), make_tensors(seed=i)) for i in range(2)]
    hashes = set()
    stop = threading.Event()

    def change(i):
        while not stop.is_set():
            store.register("x", folders[i])
            if i:
                try:
                    store.unregister("x")
                except UnknownAdapter:
                    continue

    def use():
        for _ in range(30):
            try:
                hashes.add(store.get("x").wait(WAIT).content_hash)
            except UnknownAdapter:
                time.sleep(0.001)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(5) as threads:
            changers = [threads.submit(change, i) for i in range(2)]
            users = [threads.submit(use) for _ in range(3)]
            for user in users:
                user.result(WAIT)
            stop.set()
            for changer in changers:
                changer.result(WAIT)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    assert len(hashes) <= 2


def test_close_fails_what_is_queued_and_leaves_what_is_loaded(tmp_path, gate):
    store = AdapterStore(MODEL, POOL, np.float32, loader_threads=1)
    for name in "abc":
        store.register(name, write_adapter(tmp_path / name))
    a, b, c = (store.get(name) for name in "abc")
    a.prefetch()
    b.prefetch()
    closer = threading.Thread(target=store.close)
    closer.start()
    time.sleep(0.05)
    gate.set()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert a.host() is not None
    for version in (b, c):
        with pytest.raises(BadAdapter, match="the adapter store was closed"):
            version.wait(WAIT)
    store.close()
    assert a.status == "ready"


def test_an_unused_store_starts_no_thread(tmp_path):
    before = threading.active_count()
    store = AdapterStore(MODEL, POOL, np.float32)
    for i in range(20):
        store.register(f"a{i}", write_adapter(tmp_path))
    assert threading.active_count() == before
    store.close()


def test_a_registration_takes_little_memory(store, tmp_path):
    folders = [write_adapter(tmp_path / str(i), make_tensors(seed=i)) for i in range(50)]
    distinct = [write_adapter(tmp_path / f"d{i}", make_tensors(seed=i), lora_alpha=i + 1) for i in range(50)]
    store.register("warm", folders[0])
    for group in (folders, distinct):
        gc.collect()
        tracemalloc.start()
        for folder in group:
            store.register(folder.name, folder)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert used / len(group) < 10_000
