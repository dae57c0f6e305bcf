"""The registry: versions, loading in the background, and that one adapter's failure is nobody else's."""

import gc
import os
import random
import shutil
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import slora_jax.adapters.store as store_module
from slora_jax.adapters.peft import read_header
from slora_jax.adapters.store import AdapterStore
from slora_jax.errors import BadAdapter, UnknownAdapter
from tests.helpers.peft_folders import MODEL, POOL, make_tensors, tensor_name, write_adapter

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


def test_hold_loads_in_the_background(store, tmp_path, gate, changes):
    store.register("a", write_adapter(tmp_path))
    version = store.get("a")
    version.hold()
    version.hold()
    assert version.status == "loading"
    assert version.host() is None
    assert version.wait(0.01) is None
    gate.set()
    host = version.wait(WAIT)
    assert version.status == "ready"
    assert version.host() is host is store.get("a").host()
    assert version.content_hash == host.content_hash == store.infos()["a"].content_hash
    assert host.packed.dtype == np.float32
    version.hold()
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
    bad.hold()
    good.hold()
    assert good.wait(WAIT) is not None
    with pytest.raises(BadAdapter, match="holds NaN"):
        bad.wait(WAIT)
    assert bad.status == "failed"
    assert "holds NaN" in bad.failure
    with pytest.raises(BadAdapter, match="holds NaN"):
        bad.host()
    bad.hold()
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


def test_registering_again_reads_the_folder_anew_whatever_sizes_and_times_say(store, tmp_path):
    folder = write_adapter(tmp_path, make_tensors(seed=0))
    store.register("a", folder)
    old = store.get("a")
    old_host = old.wait(WAIT)
    write_unnoticed(folder, make_tensors(seed=1))
    store.register("a", folder)
    new = store.get("a")
    assert new is not old and new.wait(WAIT).content_hash != old_host.content_hash
    assert old.host() is old_host, "requests that began with it keep it"
    store.register("a", str(folder))
    assert store.get("a").wait(WAIT).content_hash == new.content_hash, "so that both share their pages"


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
        store.get(name).hold()
    store.unregister("second")
    loaded, gated = [], store_module.load_adapter
    monkeypatch.setattr(
        store_module, "load_adapter", lambda header, dtype: loaded.append(header.path.name) or gated(header, dtype)
    )
    gate.set()
    store.get("first").wait(WAIT)
    store.close()
    assert "second" not in loaded


# A bounded host memory


def small_store(room: int, changes: list, **options) -> AdapterStore:
    """Room for so many adapters of ``write_adapter``."""
    size = POOL.page_bytes(4) * read_header(options.pop("like"), MODEL, POOL).num_pages
    return AdapterStore(
        MODEL, POOL, np.float32, capacity=room * size, on_change=lambda: changes.append(None), **options
    )


@pytest.fixture
def four(tmp_path, changes):
    """A store with room for two of its four adapters."""
    folders = [write_adapter(tmp_path / name, make_tensors(seed=i)) for i, name in enumerate("abcd")]
    store = small_store(2, changes, like=folders[0])
    for folder in folders:
        store.register(folder.name, folder)
    yield store
    store.close()


def wait_for(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def test_the_longest_unheld_leaves_first_and_comes_back(four):
    a, b, c, d = map(four.get, "abcd")
    packed = weakref.ref(a.wait(WAIT).packed)
    content = a.content_hash
    b.wait(WAIT)
    a.hold()
    a.let_go()
    c.wait(WAIT)
    assert [v.status for v in (a, b, c, d)] == ["ready", "registered", "ready", "registered"]
    d.wait(WAIT)
    assert (a.status, a.host()) == ("registered", None)
    assert a.content_hash == a.info.content_hash == content, "known from now on"
    assert packed() is None, "its memory is free"
    assert a.wait(WAIT).content_hash == content


def test_a_load_without_room_waits_until_something_is_let_go(four):
    a, b, c, d = map(four.get, "abcd")
    for version in (a, b, c, d):
        version.hold()
    wait_for(lambda: a.status == b.status == "ready")
    assert c.wait(0.02) is None and c.status == d.status == "loading"
    b.let_go()
    wait_for(lambda: c.status == "ready")
    assert (a.status, b.status, d.status) == ("ready", "registered", "loading")
    d.let_go()
    a.let_go()
    assert b.wait(WAIT) is not None
    assert d.status == "registered", "nobody wants it any more"


def test_an_adapter_of_a_larger_rank_than_allowed_is_not_registered(tmp_path):
    low, high = (write_adapter(tmp_path / str(rank), make_tensors(rank=rank), r=rank) for rank in (4, 5))
    store = AdapterStore(MODEL, POOL, np.float32, max_rank=4)
    assert store.register("low", low).rank == 4
    with pytest.raises(BadAdapter, match=f"{high}: its rank is 5, and this server takes at most 4 "):
        store.register("high", high)
    assert set(store.infos()) == {"low"} and store.num_loads == 0
    store.close()


def test_an_adapter_larger_than_host_memory_is_not_registered(tmp_path, changes):
    folder = write_adapter(tmp_path / "adapters" / "a")
    store = small_store(0, changes, like=folder)
    reason = (
        r"takes 5.72e-06 GiB of host memory, but all adapters may take 0; raise host_adapter_gigabytes "
        r"\(--host-adapter-memory\) to 5.8e-06 or more"
    )
    with pytest.raises(BadAdapter, match=reason):
        store.register("a", folder)
    infos, refused = store.register_dir(tmp_path / "adapters")
    assert not infos and not store.infos() and "raise host_adapter_gigabytes" in refused["a"]
    store.close()


def test_a_version_that_was_freed_gives_its_room_back(four):
    for name in "ab":
        version = four.get(name)
        version.hold()
        assert version.wait(WAIT) is not None
        four.unregister(name)
    del version
    assert four.get("c").wait(WAIT) is not None


def test_a_version_that_was_freed_while_nobody_held_it_gives_its_room_back_once(four):
    assert four.get("a").wait(WAIT) is not None
    four.unregister("a")
    gc.collect()
    for name in "bcdb":
        assert four.get(name).wait(WAIT) is not None


def write_unnoticed(folder, tensors):
    times = {path: path.stat() for path in folder.iterdir()}
    write_adapter(folder, tensors)
    for path, before in times.items():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_old_version_never_loads_the_weights_that_took_its_place(four, tmp_path):
    old = four.get("a")
    write_adapter(tmp_path / "a", make_tensors(seed=9))
    four.register("a", tmp_path / "a")
    assert four.get("a").wait(WAIT) is not None
    with pytest.raises(BadAdapter, match="its files changed since it was registered"):
        old.wait(WAIT)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), "truncated"),
        (lambda folder: write_adapter(folder, make_tensors(seed=9)), "its files changed since it was registered"),
        (lambda folder: write_unnoticed(folder, make_tensors(seed=9)), "its weights changed since"),
    ],
    ids=["vanished", "truncated", "changed", "changed, with its times put back"],
)
def test_what_cannot_be_read_again_fails_alone(four, tmp_path, how, reason):
    a, b, c = map(four.get, "abc")
    for version in (a, b, c):
        version.wait(WAIT)
    how(tmp_path / "a")
    with pytest.raises(BadAdapter, match=reason):
        a.wait(WAIT)
    assert a.status == "failed" and reason in a.failure
    for version in (b, c, four.get("d")):
        assert version.wait(WAIT) is not None, "its room is free again"


def test_what_came_with_its_weights_never_leaves(four):
    host = four.get("a").wait(WAIT)
    four.register_loaded("mine", host)
    mine = four.get("mine")
    mine.hold()
    mine.let_go()
    for name in "bcd":
        four.get(name).wait(WAIT)
    assert mine.status == "ready" and mine.host() is not None


def test_letting_go_more_often_than_holding_is_a_bug(four):
    with pytest.raises(RuntimeError, match="more often than held"):
        four.get("a").let_go()


def test_threads_share_a_small_host_memory(four):
    def work(seed):
        rng = random.Random(seed)
        for _ in range(60):
            version = four.get(rng.choice("abcd"))
            version.hold()
            host = version.wait(WAIT)
            assert host is version.host() is not None, "held"
            version.let_go()
            assert four.host_bytes_used <= 2 * POOL.page_bytes(4) * version.num_pages

    with ThreadPoolExecutor(2) as threads:
        for result in [threads.submit(work, seed) for seed in range(2)]:
            result.result(WAIT)


# Pins


def test_pins_are_bounded_and_a_refused_one_leaves_nothing_registered(tmp_path):
    folders = [write_adapter(tmp_path / name, make_tensors(seed=i)) for i, name in enumerate("abc")]
    pages = read_header(folders[0], MODEL, POOL).num_pages
    store = AdapterStore(MODEL, POOL, np.float32, max_pinned_pages=2 * pages)
    assert store.pinned == ()
    assert store.register("a", folders[0], pinned=True).pinned
    store.register("b", folders[1])
    store.pin("b")
    assert store.pinned == (store.get("a"), store.get("b")) and store.infos()["b"].pinned
    before = store.pinned
    with pytest.raises(BadAdapter, match=f"takes {pages} pages, .* may take {2 * pages} together and {2 * pages} are"):
        store.register("c", folders[2], pinned=True)
    assert "c" not in store and store.pinned is before
    assert store.register("c", folders[2]).pinned is False
    with pytest.raises(BadAdapter, match="cannot be pinned"):
        store.pin("c")
    assert not store.infos()["c"].pinned
    with pytest.raises(UnknownAdapter):
        store.pin("d")


def test_a_pin_is_what_the_last_registration_says(tmp_path):
    folders = [write_adapter(tmp_path / name, make_tensors(seed=i)) for i, name in enumerate("ab")]
    store = AdapterStore(MODEL, POOL, np.float32)
    store.register("a", folders[0], pinned=True)
    first = store.get("a")
    store.register("a", folders[0])
    assert store.pinned == () and not store.get("a").info.pinned
    store.pin("a")
    store.register("a", folders[1], pinned=True)
    assert store.pinned == (store.get("a"),) != (first,)
    store.unregister("a")
    assert store.pinned == ()


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


def test_a_bad_folder_costs_itself_only(store, tmp_path, monkeypatch):
    for name in ("good", "memory", "recursion", "system"):
        write_adapter(tmp_path / name)
    errors = {"memory": MemoryError(), "recursion": RecursionError("too deep"), "system": OSError(5, "I/O error")}
    for name in ("loop", "pipe", "folder"):
        write_adapter(tmp_path / name)
        (tmp_path / name / "adapter_config.json").unlink()
    (tmp_path / "loop" / "adapter_config.json").symlink_to("adapter_config.json")
    os.mkfifo(tmp_path / "pipe" / "adapter_config.json")
    (tmp_path / "folder" / "adapter_config.json").mkdir()
    write_adapter(tmp_path / os.fsdecode(b"\xff"))
    original = store_module.read_header

    def read(folder, *args):
        if folder.name in errors:
            raise errors[folder.name]
        return original(folder, *args)

    monkeypatch.setattr(store_module, "read_header", read)
    infos, refused = store.register_dir(tmp_path)
    assert list(infos) == ["good"]
    assert set(refused) == {*errors, "loop", "pipe", "folder", r"\udcff"}
    assert all(reason.encode() for reason in refused.values()), "each can be printed"
    assert "RecursionError: too deep" in refused["recursion"]


@pytest.mark.parametrize("name", ["Base-1B", "Base-1B:pirate"])
def test_names_of_the_base_model_are_refused(tmp_path, name):
    store = AdapterStore(MODEL, POOL, np.float32, base_name="Base-1B")
    write_adapter(tmp_path / "adapters" / name)
    with pytest.raises(BadAdapter, match="is taken: 'Base-1B' is the base model"):
        store.register(name, tmp_path / "adapters" / name)
    infos, refused = store.register_dir(tmp_path / "adapters")
    assert not infos and "is taken" in refused[name]
    store.register("Base-1B-pirate", tmp_path / "adapters" / name)


def test_register_dir_that_is_not_there(store, tmp_path):
    with pytest.raises(BadAdapter, match=r"cannot read the folder of adapters .*nowhere: No such file"):
        store.register_dir(tmp_path / "nowhere")


# Threads


def test_many_threads_hold_and_read(store, tmp_path, monkeypatch):
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
            version.hold()
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
    a.hold()
    b.hold()
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
    folders = [write_adapter(tmp_path / str(i), make_tensors(seed=i)) for i in range(300)]
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
        assert used / len(group) < 5_000
