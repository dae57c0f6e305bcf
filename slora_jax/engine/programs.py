"""Compiled programs, in memory and on disk; who waits for a compiler is told.

JAX's compilation cache saves XLA's part of a start only: to ask it, a program must be traced and lowered first, which
takes half a second of one thread for each of a hundred programs. What is kept here is found by what a program was made
of, and a restart does neither. Files hold pickles, of JAX's making: keep them where only their owner can write.

A program is kept in one of the two caches only. One that JAX's has loaded loses functions when serialized again (seen
on a CPU), so that cache is off while what is kept here is compiled.
"""

import hashlib
import itertools
import logging
import math
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

logger = logging.getLogger(__name__)

_KEPT_MAKES = 4
"""Folders of programs that are kept: those of other code, models or pools go, the longest unused first."""

_PARTIAL = "partial-"
_PARTIAL_SECONDS = 3600.0
"""A file that is still being written is younger; older ones were left by processes that were killed."""

MAX_PASSING = 128
"""Programs in memory that nobody asked to last: beyond that many the longest unused go."""


class Programs[Shape: Hashable]:
    """Programs by *shape*: any hashable value whose ``repr`` says all of it.

    A shape that is asked for is taken from memory, else from disk, else compiled. Memory holds the programs that are to
    last, and of the others the ``MAX_PASSING`` used last. For one thread; ``compiling`` may be read by any.

    Attributes:
      compiling: words for what a compiler is working on, None while none works.
      num_compiled: programs compiled so far, rather than read from disk.
    """

    def __init__(
        self,
        lower: Callable[[Shape], jax.stages.Lowered],
        options: Callable[[Shape], dict[str, str | bool]],
        folder: Path | None,
        made_of: object,
        code: Iterable[Path],
        devices: Sequence[jax.Device],
        needs: Callable[[Shape], int] = lambda shape: 0,
        free: float = math.inf,
    ):
        """
        Args:
          lower: traces and lowers a shape's program; called by one thread at a time.
          options: a shape's compiler options.
          folder: where to keep them, created if needed; None keeps none.
          made_of: with its ``repr``, all that programs depend on besides their shape, the code, JAX and the devices.
          code: folders of the source code that makes them, with its data.
          devices: those that run them, all of this process.
          needs: bytes of each device's memory that compiling a shape's program takes for its products to be tried.
          free: bytes of it that the programs compiled at a time may need together; one that needs more is compiled
            alone.
        """
        self._lower = lower
        self._options = options
        self._needs = needs
        self._memory = _Shared(free)
        self._devices = devices
        self._folder = (
            None if folder is None else _claimed(folder / _digest(repr(made_of), *_environment(code, devices)))
        )
        self._is_writable = self._folder is not None
        self._lock = threading.Lock()
        self.compiling: str | None = None
        self.num_compiled = 0
        self._lasting: dict[Shape, jax.stages.Compiled] = {}
        self._passing: OrderedDict[Shape, jax.stages.Compiled] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lasting) + len(self._passing)

    def __iter__(self) -> Iterator[Shape]:
        return itertools.chain(self._lasting, self._passing)

    def __contains__(self, shape: object) -> bool:
        return shape in self._lasting or shape in self._passing

    def get(self, shape: Shape) -> jax.stages.Compiled:
        """The shape's program."""
        if shape not in self._lasting:
            self.prepare([shape])
            return self._passing[shape]
        return self._lasting[shape]

    def prepare(self, shapes: Iterable[Shape], what: str = "a program", lasting: bool = False) -> None:
        """Gets these shapes' programs into memory, using all cores, as far as the devices' memory lets them.

        If one must be compiled, a line in the log says so before, and another how long it took.

        Args:
          shapes: whose programs; without ``lasting``, at most ``MAX_PASSING``.
          what: they are for, in words.
          lasting: they stay in memory.
        """
        missing = []
        for shape in dict.fromkeys(shapes):
            if shape in self._passing:
                if lasting:
                    self._lasting[shape] = self._passing.pop(shape)
                else:
                    self._passing.move_to_end(shape)
            elif shape not in self._lasting:
                missing.append(shape)
        if missing:
            programs = self._got(missing, what)
            if lasting:
                self._lasting |= programs
            else:
                self._passing |= programs
                while len(self._passing) > MAX_PASSING:
                    self._passing.popitem(last=False)

    def _got(self, shapes: Sequence[Shape], what: str) -> dict[Shape, jax.stages.Compiled]:
        """Reads or compiles them."""
        with (
            nullcontext() if self._folder is None else _without_jax_cache(),
            _workers() as workers,
        ):
            readings = {shape: workers.submit(self._read, shape) for shape in shapes}
            found = {shape: reading.result() for shape, reading in readings.items()}
            programs = {shape: program for shape, program in found.items() if program is not None}
            missing = [shape for shape in shapes if shape not in programs]
            if missing:
                with self._told(what):
                    programs |= self._compile_all(missing, workers)
                self.num_compiled += len(missing)
        return {shape: programs[shape] for shape in shapes}

    def _compile_all(self, shapes: Sequence[Shape], workers: Executor) -> dict[Shape, jax.stages.Compiled]:
        self._tell_if_memory_is_short(shapes)
        # XLA compiles outside of Python's lock, so while it does, this thread traces the next shape.
        compiling = {workers.submit(self._compile, shape, self._lower(shape)): shape for shape in shapes}
        programs = {}
        for future in as_completed(compiling):
            try:
                programs[compiling[future]] = future.result()
            except jax.errors.JaxRuntimeError as e:
                if "RESOURCE_EXHAUSTED" not in str(e):
                    raise
        # ``needs`` is an estimate: several at a time can still want more memory than a pool leaves.
        for shape in shapes:
            if shape not in programs:
                programs[shape] = self._compile(shape, self._lower(shape))
        return programs

    def _tell_if_memory_is_short(self, shapes: Sequence[Shape]) -> None:
        needed, free = max(map(self._needs, shapes)), self._memory.size
        if needed > free:
            logger.warning(
                "XLA tries kernels with up to %.3g GiB of each device, and %.3g GiB are free: it leaves out those that "
                "find no memory, and steps may be slower for it; a smaller pool leaves more",
                needed / 2**30,
                free / 2**30,
            )

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Says, to whoever may be waiting, that something is being compiled meanwhile."""
        logger.warning("compiling %s, this first time ...", what)
        start = time.perf_counter()
        self.compiling = what
        try:
            yield
        finally:
            self.compiling = None
        kept = ", kept on disk" if self._is_writable else ""
        logger.warning("compiled %s in %.1f s%s", what, time.perf_counter() - start, kept)

    def _compile(self, shape: Shape, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        with self._memory.taken(self._needs(shape)):
            program = lowered.compile(self._options(shape))
        if self._is_writable:
            self._write(shape, program)
        return program

    def _path(self, shape: Shape) -> Path:
        assert self._folder is not None, "programs that are not kept have no file"
        return self._folder / _digest(repr(shape))

    def _read(self, shape: Shape) -> jax.stages.Compiled | None:
        if self._folder is None:
            return None
        try:
            serialized, in_tree, out_tree = pickle.loads(self._path(shape).read_bytes())
            return deserialize_and_load(serialized, in_tree, out_tree, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as e:
            # A file cut short by a full disk, say: it costs a compilation, not the start.
            logger.warning("compiled program %s cannot be read and is made anew: %s", self._path(shape), e)
            return None

    def _write(self, shape: Shape, program: jax.stages.Compiled) -> None:
        path, partial = self._path(shape), None
        try:
            # Under a name of its own: another server may be writing the same.
            file, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
            with os.fdopen(file, "wb") as out:
                out.write(pickle.dumps(serialize(program)))
            os.replace(partial, path)
        except Exception as e:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            if isinstance(e, OSError):
                self._stop_writing(e)
            else:
                logger.warning("compiled program %s cannot be kept: %s", path, e)

    def _stop_writing(self, error: OSError) -> None:
        """A disk that is full, say, would fail every program alike: one of the workers says so, once."""
        with self._lock:
            is_first, self._is_writable = self._is_writable, False
        if is_first:
            logger.warning("compiled programs are kept in %s no longer, until a restart: %s", self._folder, error)


class _Shared:
    """Bytes, ``size`` in all, that threads take and give back."""

    def __init__(self, size: float):
        self.size = size
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Takes so many for a while. Waits until they are left; or, if there are fewer in all, until all are."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self.size)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


@contextmanager
def _workers() -> Iterator[Executor]:
    """One for each core. If the block fails, what none of them has begun is not begun any more."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        try:
            yield workers
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Switches it off for this process, as JAX has it for no less: what other threads compile meanwhile is not kept."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at the switch once only.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _environment(code: Iterable[Path], devices: Sequence[jax.Device]) -> Iterator[str]:
    """All that a compiled program depends on besides what is asked of it."""
    yield source_digest(code)
    for package in ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "flax", "jax-triton", "triton"):
        yield f"{package} {_version(package)}"
    yield f"{devices[0].client.platform_version} {[(d.id, d.device_kind) for d in devices]}"
    if devices[0].platform == "cpu":
        # Code is made for what the CPU can do, and a cache may be shared.
        yield str(_cpu_flags())
    yield f"{os.environ.get('XLA_FLAGS')} {jax.config.jax_enable_x64} {jax.config.jax_default_matmul_precision}"


def source_digest(code: Iterable[Path]) -> str:
    """Of all source files, and their data, in these folders."""
    return _digest(
        *(
            f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for root in code
            for path in sorted(root.rglob("*"))
            if path.suffix in (".py", ".json")
        )
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # no Triton where there is no NVIDIA GPU


def _cpu_flags() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), None)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _claimed(folder: Path) -> Path | None:
    """The folder, made and marked as used; None if it cannot be made.

    The folders unused for longest are removed, and what killed processes left half written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{_PARTIAL}*"):
            with suppress(FileNotFoundError):  # another process may be done with it
                if partial.stat().st_mtime < time.time() - _PARTIAL_SECONDS:
                    partial.unlink()
        os.utime(folder)
        makes = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in makes[:-_KEPT_MAKES]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        logger.warning("compiled programs are not kept: %s", e)
        return None
    return folder
