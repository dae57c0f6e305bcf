"""Ready-to-serve parameters kept on disk as an Orbax checkpoint, so that the next start only reads them.

An entry of the cache is a folder ``<source folder>-<source files>-<form>``, each part a digest; ``form`` covers the
config, the dtype and the sharding. It is written under another name, recorded with the size of every file, and
renamed when whole. One process at a time writes the entries of one source folder; the others serve without writing.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import load_params, sharded_abstract_params, weight_files

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise when the parameter tree changes; entries of other formats are then stale
_PARAMS = "params"
_MANIFEST = "manifest.json"
_HOST_COPY_GB = 2  # host memory for arrays on their way between disk and device


@dataclass(frozen=True)
class Provenance:
    """Where parameters came from, and how long reading them took (writing the cache is not counted)."""

    source: Literal["safetensors", "orbax"]
    seconds: float


@dataclass(frozen=True)
class _Entry:
    """The place of one cached form of one source folder."""

    root: Path
    source: str
    files: str
    form: str

    @property
    def path(self) -> Path:
        return self.root / f"{self.source}-{self.files}-{self.form}"

    @property
    def lock_path(self) -> Path:
        return self.root / f".{self.source}.lock"

    def leftovers(self) -> list[Path]:
        """What interrupted writers of this source folder left behind; meaningful only under the lock."""
        return list(self.root.glob(f".{self.source}.tmp-*"))

    def stale(self) -> list[Path]:
        """Entries made from files that the source folder no longer has."""
        return [p for p in self.root.glob(f"{self.source}-*") if not p.name.startswith(f"{self.source}-{self.files}-")]


def load_or_restore(
    folder: Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    cache_root: Path | None,
    mesh: ModelMesh | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Provenance]:
    """``load_params``, or the same parameters from the cache if the source files have not changed since.

    An entry with files missing, cut short or unreadable is deleted and made anew. The numbers in it are trusted, as
    those in the safetensors are. A cache that cannot be written costs a warning, nothing else.

    Args:
      folder, config, dtype, mesh, progress: as in ``load_params``.
      cache_root: folder of the cache; None keeps none.

    Raises:
      UnsupportedModel: as ``load_params``.
    """
    start = time.perf_counter()
    if cache_root is None:
        params = load_params(folder, config, dtype, mesh, progress)
        return params, Provenance("safetensors", time.perf_counter() - start)

    abstract = sharded_abstract_params(config, dtype, mesh)
    entry = _entry(Path(cache_root).expanduser().absolute(), folder, config, abstract)
    params = _restore(entry, abstract)
    if params is not None:
        return params, Provenance("orbax", time.perf_counter() - start)
    start = time.perf_counter()
    params = load_params(folder, config, dtype, mesh, progress)
    seconds = time.perf_counter() - start
    _save(entry, params)
    return params, Provenance("safetensors", seconds)


def _entry(root: Path, folder: Path, config: ModelConfig, abstract) -> _Entry:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(folder)]
    leaves = [
        (jax.tree_util.keystr(keys), leaf.shape, str(leaf.dtype), str(leaf.sharding))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    ]
    return _Entry(root, _digest(folder.resolve()), _digest(_FORMAT, stats), _digest(config, leaves))


def _digest(*values) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _restore(entry: _Entry, abstract) -> dict[str, Any] | None:
    """The entry's parameters, or None if there is no such entry or it was damaged (and is now deleted)."""
    if not entry.path.is_dir():
        return None
    import orbax.checkpoint as ocp

    try:
        _check_manifest(entry.path)
        with _quiet(), _checkpointer(abstract) as checkpointer:
            arguments = ocp.args.PyTreeRestore(
                abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            )
            params = checkpointer.restore(entry.path / _PARAMS, args=arguments)
        return jax.block_until_ready(params)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device or the host is full: the entry is not to blame
    except Exception as e:  # whatever Orbax and TensorStore raise on files they cannot read
        logger.warning(
            "cached weights %s cannot be restored (%s: %s); deleting them and reading the safetensors",
            entry.path,
            type(e).__name__,
            e,
        )
        shutil.rmtree(entry.path, ignore_errors=True)
        return None


def _save(entry: _Entry, params) -> None:
    """Writes the entry, and removes those that it replaces; logs a warning if that fails."""
    import orbax.checkpoint as ocp

    try:
        entry.root.mkdir(parents=True, exist_ok=True)
        with _lock(entry.lock_path) as held:
            if not held or entry.path.exists():
                return  # another process writes it, or just has
            for path in [*entry.leftovers(), *entry.stale()]:
                shutil.rmtree(path, ignore_errors=True)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            free = shutil.disk_usage(entry.root).free
            if free < needed * 1.05:
                raise OSError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            fresh = Path(tempfile.mkdtemp(prefix=f".{entry.source}.tmp-", dir=entry.root))
            try:
                with _quiet(), _checkpointer(params) as checkpointer:
                    checkpointer.save(fresh / _PARAMS, args=ocp.args.PyTreeSave(params))
                (fresh / _MANIFEST).write_text(json.dumps(_file_sizes(fresh)))
                _flush(fresh)  # or a power failure after the rename could leave files of the right size, all zeros
                fresh.rename(entry.path)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    except Exception as e:  # the cache is a convenience: whatever goes wrong, the server has its weights
        logger.warning(
            "weights could not be cached in %s (%s: %s); the next start will read the safetensors again",
            entry.root,
            type(e).__name__,
            e,
        )


def _checkpointer(tree):
    import orbax.checkpoint as ocp

    # Uncompressed: float32 weights shrink by a twelfth, and decompressing takes longer than reading.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    gigabytes = max(_HOST_COPY_GB, math.ceil(largest / 1e9) + 1)
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        save_concurrent_gb=gigabytes,
        save_device_host_concurrent_gb=gigabytes,
        restore_concurrent_gb=gigabytes,
    )
    return ocp.Checkpointer(handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging each of its steps; what goes wrong it raises."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_manifest(folder: Path) -> None:
    """Raises ValueError unless the files are those that were written, by name and size."""
    expected, found = json.loads((folder / _MANIFEST).read_text()), _file_sizes(folder)
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{len(wrong)} files are missing, cut short or unknown, such as {wrong[0]}")


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Tries to lock the file; yields whether it could. The lock ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)
