"""Ready-to-serve parameters kept on disk as an Orbax checkpoint, so that the next start only reads them.

An entry of the cache is a folder ``<source folder>-<source files>-<form>``, each part a digest; ``form`` covers the
config, the dtype and the sharding. It is written under another name, recorded with the size of every file and the
digests of small ones, and renamed when whole. One process at a time writes the entries of one source folder; the others
serve without writing.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

_FORMAT = 5  # raise when the parameter tree or the manifest changes; entries of other formats are then stale
_PARAMS = "params"
_MANIFEST = "manifest.json"
_SMALL_FILE_BYTES = 2**16
_PIECE_BYTES = 2**22
_REMOVALS = 20
_SECONDS_BETWEEN_REMOVALS = 0.2
_OS_ERROR = re.compile(r"os_error_code='?(\d+)")
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

    An entry with files missing, cut short, damaged or unreadable is deleted and made anew: every file has a digest or a
    checksum. A cache that cannot be written costs a warning, nothing else.

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
    restored = _restore(entry, abstract)
    if restored is not None:
        return restored, Provenance("orbax", time.perf_counter() - start)
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
            "cached weights %s cannot be restored (%s); deleting them and reading the safetensors",
            entry.path,
            _reason(e),
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
            for path in entry.stale():
                shutil.rmtree(path, ignore_errors=True)
            _remove_leftovers(entry)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            free = shutil.disk_usage(entry.root).free
            if free < needed * 1.05:
                raise OSError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            fresh = Path(tempfile.mkdtemp(prefix=f".{entry.source}.tmp-", dir=entry.root))
            try:
                with _quiet(), _checkpointer(params) as checkpointer:
                    checkpointer.save(fresh / _PARAMS, args=ocp.args.PyTreeSave(params))
                (fresh / _MANIFEST).write_text(json.dumps(_described(fresh)))
                _flush(fresh)  # or a power failure after the rename could leave files of the right size, all zeros
                fresh.rename(entry.path)
            except BaseException:
                _remove(fresh)
                raise
    except Exception as e:  # the cache is a convenience: whatever goes wrong, the server has its weights
        logger.warning(
            "weights could not be cached in %s (%s); the next start will read the safetensors again",
            entry.root,
            _reason(e),
        )


def _remove_leftovers(entry: _Entry) -> None:
    """What killed writers left behind, of this source folder, whose lock is held, and of others that nobody writes."""
    for path in entry.root.glob(".*.tmp-*"):
        source = path.name[1:].partition(".")[0]
        if source == entry.source:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with _lock(entry.root / f".{source}.lock") as held:
            if held:
                shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of TensorStore may write for a moment after they failed."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        # Before looking, for they make the folder anew if it is gone.
        time.sleep(_SECONDS_BETWEEN_REMOVALS)
        if not folder.exists():
            return


def _reason(error: Exception) -> str:
    """In one line; TensorStore names every file that it was at, one within another, and somewhere what was wrong."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if len(text) <= 300:
        return text
    cause = _OS_ERROR.search(text)
    return f"{text[:100]} ... {os.strerror(int(cause[1])) if cause else text[-195:]}"


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
    """Keeps Orbax and TensorStore from printing each of their steps, and dozens of traces of what they raise anyway."""
    log = logging.getLogger("absl")
    level, hook = log.level, sys.unraisablehook
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_callbacks(hook)
    # For good: when one write fails, Orbax drops the others, and Python tells of each whenever it comes across it.
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
    warnings.filterwarnings("ignore", "coroutine '.*write_fragment' was never awaited", RuntimeWarning)
    try:
        yield
    finally:
        log.setLevel(level)
        # After a failure TensorStore's threads go on for a while, and so the hook stays.
        if sys.exc_info()[0] is None:
            sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()


def _without_late_callbacks(hook: Callable) -> Callable:
    """The hook, but for what TensorStore's threads have to say to an event loop that one failure has closed."""

    def filtered(unraisable: "sys.UnraisableHookArgs") -> None:
        trace = unraisable.exc_traceback
        is_late = trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
        if not (is_late and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    return filtered


def _described(folder: Path) -> dict[str, list]:
    """Every file's size and digest. Reads all of them, which they are going to be anyway."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        described = workers.map(_size_and_digest, files)
        return {str(path.relative_to(folder)): found for path, found in zip(files, described, strict=True)}


def _size_and_digest(path: Path) -> list:
    """SHA-256 of a small file. Of a large one, which holds the numbers, a checksum that takes a tenth of the time."""
    size = path.stat().st_size
    if size <= _SMALL_FILE_BYTES:
        return [size, hashlib.sha256(path.read_bytes()).hexdigest()]
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return [size, f"{checksum:08x}"]


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_manifest(folder: Path) -> None:
    """Raises ValueError unless the files are those that were written, by name, size and digest."""
    expected, found = json.loads((folder / _MANIFEST).read_text()), _described(folder)
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{len(wrong)} files are missing, damaged or unknown, such as {wrong[0]}")


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
