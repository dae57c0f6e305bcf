"""The Orbax cache of ready-to-serve parameters: when it is used, and what happens when it is damaged."""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from slora_jax.model import checkpoint
from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.config import ModelConfig
from slora_jax.model.weights import load_params

FIXTURE = Path(__file__).parents[1] / "oracle" / "fixtures" / "llama3_gqa" / "model"


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(model, cache, caplog):
    """Calls ``load_or_restore``, checks the parameters, and returns their source; warnings must be expected."""

    def run(dtype=jnp.float32, warning: str | None = None, **options) -> str:
        caplog.clear()
        config = ModelConfig.from_folder(model)
        with caplog.at_level(logging.INFO):
            params, provenance = load_or_restore(
                model, config, dtype, options.pop("cache_root", cache), progress=False, **options
            )
        logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(logged) == (warning is not None), logged
        assert warning is None or warning in logged[0]
        expected = load_params(model, config, dtype, progress=False)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        kinds = [jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), tree) for tree in (params, expected)]
        assert kinds[0] == kinds[1]
        assert provenance.seconds > 0
        return provenance.source

    return run


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_second_start_restores(run, cache, monkeypatch):
    assert run() == "safetensors"
    assert len(entries(cache)) == 1

    def read_nothing(*args, **options):
        pytest.fail("the weights were read again")

    monkeypatch.setattr(checkpoint, "load_params", read_nothing)
    assert run() == "orbax"


def test_nothing_is_logged_or_printed(run, capfd, caplog):
    for source in ("safetensors", "orbax"):
        assert run() == source
        assert [record.name for record in caplog.records if record.name == "absl"] == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_without_a_cache(run, cache):
    assert run(cache_root=None) == "safetensors"
    assert not cache.exists()


def test_another_dtype_is_another_entry(run, cache):
    assert run(jnp.float32) == "safetensors"
    assert run(jnp.bfloat16) == "safetensors"
    assert run(jnp.bfloat16) == "orbax"
    assert run(jnp.float32) == "orbax"
    assert len(entries(cache)) == 2


def test_changed_source_replaces_the_entry(run, model, cache):
    run(jnp.float32)
    run(jnp.bfloat16)
    old = entries(cache)
    file = next(model.glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert run() == "safetensors"
    assert len(entries(cache)) == 1
    assert entries(cache)[0] not in old
    assert run() == "orbax"


def test_other_models_entries_stay(run, cache):
    run()
    (entry,) = entries(cache)
    shutil.rmtree(entry)
    other = cache / "0123456789abcdef-0-0"
    other.mkdir()
    run()
    assert entries(cache) == sorted([entry, other])


def cut_largest(entry: Path) -> None:
    file = max((path for path in entry.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def overwrite_metadata(entry: Path) -> None:
    file = entry / "params" / "_METADATA"
    file.write_bytes(b"x" * file.stat().st_size)


def overwrite_small_files(entry: Path) -> None:
    for file in entry.rglob("*.ocdbt"):
        file.write_bytes(b"\xff" * file.stat().st_size)


def empty_everything(entry: Path) -> None:
    for file in entry.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def delete_data(entry: Path) -> None:
    shutil.rmtree(next(path for path in entry.rglob("d") if path.is_dir()))


def delete_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def delete_params(entry: Path) -> None:
    shutil.rmtree(entry / "params")


def flip_a_bit(entry: Path) -> None:
    file = max((path for path in entry.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with file.open("r+b") as data:
        data.seek(file.stat().st_size // 2)
        (byte,) = data.read(1)
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_largest, flip_a_bit, overwrite_metadata, overwrite_small_files, empty_everything),
        *(delete_data, delete_manifest, delete_params),
    ],
)
def test_damaged_entry_is_made_anew(run, cache, damage):
    run()
    damage(entries(cache)[0])
    assert run(warning="cannot be restored") == "safetensors"
    assert run() == "orbax"
    assert len(entries(cache)) == 1


def test_interrupted_write_leaves_nothing_to_restore(run, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: 1 / 0)
        assert run(warning="weights could not be cached in") == "safetensors"
    assert entries(cache) == []
    assert run() == "safetensors"
    assert run() == "orbax"


def test_leftovers_of_a_killed_process_are_removed(run, cache):
    run()
    (entry,) = entries(cache)
    leftover = cache / f".{entry.name.split('-')[0]}.tmp-abcdefgh"
    entry.rename(leftover)  # all its data, but never renamed
    assert run() == "safetensors"
    assert entries(cache) == [entry]


def test_leftovers_of_other_models_are_removed_unless_they_are_written_now(run, cache):
    cache.mkdir()
    left, written = cache / ".0123.tmp-abcdefgh", cache / ".4567.tmp-abcdefgh"
    left.mkdir()
    written.mkdir()
    with (cache / ".4567.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run()
    assert not left.exists()
    assert written.exists()


@pytest.mark.parametrize("limit", [3_000, 20_000])
def test_a_disk_that_gets_full_costs_one_line(tmp_path, limit):
    """By the kernel's limit on the size of a file, which TensorStore meets as it meets a full disk."""
    code = textwrap.dedent("""
        import logging, resource, signal, sys
        from pathlib import Path
        import jax.numpy as jnp
        from slora_jax.model.checkpoint import load_or_restore
        from slora_jax.model.config import ModelConfig

        logging.basicConfig(level="WARNING")
        model, cache, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        config = ModelConfig.from_folder(model)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        params, provenance = load_or_restore(model, config, jnp.float32, cache, progress=False)
        assert provenance.source == "safetensors"
    """)
    # To a pipe, to which the limit does not apply.
    command = [sys.executable, "-c", code, str(FIXTURE), str(tmp_path), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"WARNING:slora_jax.model.checkpoint:weights could not be cached in {tmp_path} (")
    assert "File too large" in line
    assert entries(tmp_path) == []


def test_only_one_process_writes(run, cache):
    run()
    (entry,) = entries(cache)
    shutil.rmtree(entry)
    with (cache / f".{entry.name.split('-')[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run() == "safetensors"
        assert entries(cache) == []
    assert run() == "safetensors"
    assert run() == "orbax"


def test_cache_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert run(cache_root=tmp_path / "file" / "cache", warning="weights could not be cached") == "safetensors"


def test_full_disk(run, cache, monkeypatch):
    usage = shutil.disk_usage(Path(__file__).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run(warning="0.0 GB are free") == "safetensors"
    assert entries(cache) == []


def test_full_device_does_not_cost_the_entry(run, model, cache, monkeypatch):
    run()

    def out_of_memory(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.Checkpointer, "restore", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        load_or_restore(model, ModelConfig.from_folder(model), jnp.float32, cache)
    assert len(entries(cache)) == 1
