"""Compiled programs found again on disk, and made anew when they cannot be."""

import errno
import os
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from slora_jax.engine.programs import Programs
from tests.helpers.engine_cases import FAST_TO_COMPILE


class Counting:
    """Programs that add their shape to a vector they are given for good; counts how many were lowered."""

    def __init__(self, folder, made_of="a model", code=Path(__file__).parent, **memory):
        self.lowered = []
        devices = jax.devices()[:1]
        self.programs = Programs(self.lower, lambda shape: FAST_TO_COMPILE, folder, made_of, [code], devices, **memory)

    def lower(self, shape):
        self.lowered.append(shape)
        vector = jax.ShapeDtypeStruct((3,), jnp.float32)
        return jax.jit(lambda x: {"sum": x["x"] + shape}, donate_argnums=0).lower({"x": vector})

    def results(self, *shapes):
        sums = []
        for shape in shapes:
            arguments = {"x": jnp.zeros(3)}
            sums.append(self.programs.get(shape)(arguments)["sum"].tolist())
            assert arguments["x"].is_deleted(), "what is donated is donated to a program from disk too"
        return sums


def test_programs_are_found_on_disk(tmp_path):
    first = Counting(tmp_path)
    first.programs.prepare([1, 2, 2])
    assert first.results(1, 2, 1) == [[1.0] * 3, [2.0] * 3, [1.0] * 3]
    assert sorted(first.lowered) == [1, 2] and set(first.programs) == {1, 2}
    second = Counting(tmp_path)
    second.programs.prepare([1])
    assert second.results(1, 2, 3) == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert second.lowered == [3]


def test_programs_of_something_else_are_not_found(tmp_path, monkeypatch):
    Counting(tmp_path).programs.prepare([1])
    other = Counting(tmp_path, made_of="another model")
    assert other.results(1) == [[1.0] * 3] and other.lowered == [1]
    code = Counting(tmp_path, code=Path(__file__).parents[1] / "host")
    assert code.results(1) == [[1.0] * 3] and code.lowered == [1]
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} ")
    flags = Counting(tmp_path)
    assert flags.results(1) == [[1.0] * 3] and flags.lowered == [1]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        programs = Counting(None)
        assert programs.results(1) == [[1.0] * 3] and programs.lowered == [1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"no pickle"])
def test_a_damaged_file_costs_a_compilation(tmp_path, damage, caplog):
    Counting(tmp_path).programs.prepare([1])
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(damage)
    again = Counting(tmp_path)
    assert again.results(1) == [[1.0] * 3] and again.lowered == [1]
    assert str(file) in caplog.text
    assert file.stat().st_size > 1000, "mended"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    programs = Counting(tmp_path / "file")
    assert programs.results(1) == [[1.0] * 3]
    assert "not kept" in caplog.text


def test_a_full_disk_is_told_once(tmp_path, monkeypatch, caplog):
    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    counting = Counting(tmp_path)
    counting.programs.prepare(range(8))
    assert counting.results(0, 9) == [[0.0] * 3, [9.0] * 3]
    (told,) = (line for line in caplog.messages if "No space left" in line)
    assert str(tmp_path) in told and "kept on disk" not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)  # as if the process had ended just before
        Counting(tmp_path).programs.prepare([1, 2])
    left, being_written = (path for path in tmp_path.rglob("*") if path.is_file())
    os.utime(left, (1000, 1000))
    assert Counting(tmp_path).results(1) == [[1.0] * 3]
    assert not left.exists() and being_written.exists()


def test_makes_unused_for_longest_are_removed(tmp_path):
    for i in range(6):
        Counting(tmp_path, made_of=i).programs.prepare([1])
        for age, make in enumerate(sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_mtime)):
            os.utime(make, (1000 - age, 1000 - age))
        if i == 3:
            assert Counting(tmp_path, made_of=0).results(1) and len(list(tmp_path.iterdir())) == 4
    assert len(list(tmp_path.iterdir())) == 4
    kept = Counting(tmp_path, made_of=0)
    assert kept.results(1) == [[1.0] * 3] and not kept.lowered, "used again later than 1 and 2"


def test_what_jax_keeps_is_not_kept_again(tmp_path):
    """A program that JAX's cache has loaded cannot be serialized whole: it is compiled anew, JAX's cache goes on."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for _ in range(2):
            Counting(None).programs.prepare([1])
        (entry,) = kept_by_jax(tmp_path / "jax")
        entry.write_bytes(b"what would fail if JAX looked at it")
        assert Counting(tmp_path / "programs").results(1) == [[1.0] * 3]
        Counting(tmp_path / "programs").programs.prepare([2])
        assert kept_by_jax(tmp_path / "jax") == [entry]
        Counting(None).programs.prepare([3])
        assert len(kept_by_jax(tmp_path / "jax")) == 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def kept_by_jax(folder):
    return [path for path in folder.iterdir() if path.name.endswith("-cache") and "lambda" in path.name]


def test_what_finds_no_memory_beside_others_is_compiled_alone():
    class Crowded:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    class OnceCrowded(Counting):
        def lower(self, shape):
            lowered = super().lower(shape)
            return Crowded() if self.lowered.count(shape) == 1 and shape > 1 else lowered

    crowded = OnceCrowded(None)
    crowded.programs.prepare([1, 2, 3])
    assert crowded.lowered == [1, 2, 3, 2, 3]
    assert crowded.results(1, 2, 3) == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


def test_programs_compiled_at_a_time_share_the_devices_memory(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    needs = {**dict.fromkeys(range(12), 3), **dict.fromkeys(range(12, 15), 40)}
    lock, three, running, most = threading.Lock(), threading.Barrier(3), [], {3: 0, 40: 0}

    class Slow:
        def __init__(self, need):
            self.need = need

        def compile(self, options):
            with lock:
                running.append(self.need)
                most[self.need] = max(most[self.need], len(running))
                assert sum(running) <= 10 or running == [40]
            if self.need == 3:
                three.wait(20)  # for two others: as many as have room are compiled side by side
            time.sleep(0.02)
            with lock:
                running.remove(self.need)

    programs = Programs(
        lambda shape: Slow(needs[shape]),
        lambda shape: FAST_TO_COMPILE,
        None,
        "a model",
        [],
        jax.devices()[:1],
        needs.__getitem__,
        free=10,
    )
    programs.prepare(needs)
    assert most == {3: 3, 40: 1} and set(programs) == set(needs)


def test_memory_too_short_for_a_compiler_is_told(caplog):
    counting = Counting(None, needs=lambda shape: shape * 2**30, free=3 * 2**30)
    counting.programs.prepare([1, 2, 3])
    assert "kernels" not in caplog.text
    counting.programs.prepare([4, 5])
    (told,) = (line for line in caplog.messages if "kernels" in line)
    assert "5 GiB" in told and "3 GiB are free" in told and "a smaller pool leaves more" in told


def test_a_compiler_that_fails_gives_its_memory_back():
    class Failing:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    class FailingOnce(Counting):
        def lower(self, shape):
            lowered = super().lower(shape)
            return lowered if self.lowered.count(shape) > 1 else Failing()

    counting = FailingOnce(None, needs=lambda shape: 6, free=10)
    counting.programs.prepare([1, 2, 3])
    assert counting.results(1, 2, 3) == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


def test_who_waits_for_a_compiler_is_told(tmp_path, caplog):
    told = []

    class Watched(Counting):
        def lower(self, shape):
            told.append(self.programs.compiling)
            return super().lower(shape)

    watched = Watched(tmp_path)
    watched.programs.prepare([1, 2], "what the test needs")
    assert told == ["what the test needs"] * 2 and watched.programs.compiling is None
    before, after = (record.getMessage() for record in caplog.records)
    assert before == "compiling what the test needs, this first time ..."
    assert after.startswith("compiled what the test needs in ") and after.endswith(" s, kept on disk")
    caplog.clear()
    watched.programs.prepare([1, 2], "what is in memory")
    Counting(tmp_path).programs.prepare([1, 2], "what is on disk")
    assert not caplog.records


def test_a_compiler_that_fails_leaves_nobody_waiting():
    class Failing(Counting):
        def lower(self, shape):
            raise RuntimeError("no such thing")

    failing = Failing(None)
    with pytest.raises(RuntimeError, match="no such thing"):
        failing.programs.get(1)
    assert failing.programs.compiling is None and not len(failing.programs)


def test_when_one_fails_the_others_are_not_compiled(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    all_lowered, begun = threading.Event(), []

    class Failing:
        def compile(self, options):
            assert all_lowered.wait(10)
            begun.append(self)
            time.sleep(0.02)
            raise RuntimeError("no such instruction")

    def lower(shape):
        if shape == 49:
            all_lowered.set()
        return Failing()

    programs = Programs(lower, lambda shape: FAST_TO_COMPILE, None, "a model", [], jax.devices()[:1])
    with pytest.raises(RuntimeError, match="no such instruction"):
        programs.prepare(range(50))
    assert len(begun) < 10


def test_programs_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("slora_jax.engine.programs.MAX_PASSING", 3)
    counting = Counting(tmp_path)
    counting.programs.prepare([1, 2], lasting=True)
    assert counting.results(3, 4, 5, 3, 6) == [[float(n)] * 3 for n in (3, 4, 5, 3, 6)]
    assert list(counting.programs) == [1, 2, 5, 3, 6] and len(counting.programs) == 5
    assert 4 not in counting.programs, "the longest unused went"
    assert counting.results(4) == [[4.0] * 3]
    assert counting.lowered == [1, 2, 3, 4, 5, 6], "and came back from disk"
    counting.programs.prepare([3, 7])
    assert list(counting.programs) == [1, 2, 4, 3, 7], "what is asked for together stays together"
    counting.programs.prepare([3], lasting=True)
    assert counting.results(5, 6, 8) and 3 in counting.programs and len(counting.programs) == 6
