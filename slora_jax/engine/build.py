"""Building an engine: the base model loaded, memory divided, caches opened, shapes of steps chosen; and following."""

import contextlib
import dataclasses
import hashlib
import logging
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from pallas_kernels import choose_backend
from slora_jax.adapters.store import AdapterStore
from slora_jax.config import EngineConfig, PoolConfig, read_yaml
from slora_jax.engine.batch import Buckets
from slora_jax.engine.device import ModelDevice
from slora_jax.engine.hosts import Follower, Followers
from slora_jax.engine.meeting import Meeting
from slora_jax.engine.runner import Runner, code_digest
from slora_jax.errors import InvalidRequest
from slora_jax.gpu_memory import is_reserved_at_once, set_share
from slora_jax.memory.costs import PageCosts
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.config import ModelConfig, default_sampling, ending_tokens
from slora_jax.model.llama import GATHERED, Llama, LoraOps
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.quantization import ChannelFp8, least_rows
from slora_jax.model.weights import dummy_params, resolve_model, untied_where_different, weight_files
from slora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
start = logging.getLogger("slora_jax.start")
"""What whoever starts an engine should read, whatever else is logged."""

_MAX_CPU_POOL_BYTES = 2 * 2**30
_COMPARED_BYTES = 2**20


@dataclass(frozen=True)
class BaseModel:
    """The base model, loaded.

    ``default_sampling`` are the fields of ``SamplingParams`` that requests which do not give them have.
    """

    model_config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    name: str
    mesh: ModelMesh | None
    default_sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    meeting: Meeting | None = None


def load_base(config: EngineConfig, progress: bool, meeting: Meeting | None = None) -> BaseModel:
    """The base model, on its devices. Decides how much of a GPU JAX takes, if JAX has not started yet.

    Args:
      config: of the engine.
      progress: show bars.
      meeting: several hosts: where they meet, which they do here.
    """
    set_share(config.gpu_memory_fraction, config.mesh.tp)
    if config.mesh.num_hosts > 1:
        if meeting is None:
            raise InvalidRequest("several hosts need a meeting: start them with serve.py, or inside of together()")
        meeting.join(config.mesh)
        meeting.agree("flags", _fields_that_must_agree(config))
    enable_compilation_cache(config.compilation_cache)
    dtype = dtype_of(config)
    if config.dummy:
        model_config = ModelConfig.from_hf(read_yaml(Path(config.model)), config.max_model_len, config.model)
        model_config = _held(model_config, config)
        _agree_on_model(meeting, model_config, ())
        mesh = ModelMesh.create(model_config, config.mesh.tp)
        with _room_for_weights(model_config, dtype, mesh):
            params = dummy_params(model_config, dtype, config.seed, mesh)
        name = config.served_name or Path(config.model).stem
        return BaseModel(model_config, params, _tokenizer_of_dummy(config), name, mesh, meeting=meeting)
    folder = resolve_model(config.model)
    model_config = untied_where_different(folder, ModelConfig.from_folder(folder, config.max_model_len))
    model_config = _held(model_config, config)
    defaults = default_sampling(folder) if config.generation_config else MappingProxyType({})
    if defaults:
        told = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.info("requests that do not say are sampled as generation_config.json says: %s", told)
    _agree_on_model(meeting, model_config, weight_files(folder))
    mesh = ModelMesh.create(model_config, config.mesh.tp)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(folder)
    else:
        logger.warning("%s has no tokenizer.json: prompts must be token ids, and answers have no text", folder)
    # Several hosts each read their slices of the safetensors.
    place = config.checkpoint_cache if config.mesh.num_hosts == 1 else None
    cache = None if place is None else _folder(place, "weights")
    with _room_for_weights(model_config, dtype, mesh):
        params, provenance = load_or_restore(folder, model_config, dtype, cache, mesh, progress=progress)
    logger.info("weights from %s in %.1f s", provenance.source, provenance.seconds)
    name = config.model.rstrip("/").split("/")[-1]
    ends = ending_tokens(model_config, tokenizer.eos_token_ids if tokenizer else ())
    model_config = dataclasses.replace(model_config, eos_token_ids=ends)
    return BaseModel(model_config, params, tokenizer, config.served_name or name, mesh, defaults, meeting)


def _tokenizer_of_dummy(config: EngineConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    folder = Path(config.tokenizer).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise InvalidRequest(f"tokenizer: {folder} has no tokenizer.json; give a model's folder, or leave it out")
    return Tokenizer.from_folder(folder)


def _held(model: ModelConfig, config: EngineConfig) -> ModelConfig:
    """The model with its weights held as is asked for."""
    return model if config.quantization is None else dataclasses.replace(model, weight_layout=ChannelFp8())


def make_model(base: BaseModel, lora_ops: LoraOps = GATHERED, tokens_per_row: int = 1) -> Llama:
    """What steps compute, on the kernels that suit the device.

    Raises:
      InvalidRequest: the device has no instructions for what K and V are kept as.
    """
    dtype = jax.tree.leaves(base.params)[0].dtype
    try:
        backend = choose_backend(jax.devices()[0], base.model_config.head_dim, dtype, tokens_per_row)
    except NotImplementedError as e:
        raise InvalidRequest(f"kv_cache_dtype (--kv-cache-dtype) is fp8, and {e}") from None
    num_shards = base.mesh.size if base.mesh else 1
    return Llama(base.model_config, dtype, backend, num_shards, lora_ops, tokens_per_row)


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of. Engines may follow each other over the same parts, one at a time.

    Attributes:
      config: what they were built for.
      model_name, model_config, tokenizer, default_sampling: see ``Engine``.
      pool_layout, dtype: of the pool.
      max_model_len: longest sequence, prompt and output, in tokens.
      device: the model and its pool on the devices, with the other hosts.
      store: the adapters.
      costs: which pages go first when room is needed.
      max_rank: the largest rank of adapters; None for any that an adapter may have.
      wake_event: set whenever an adapter got ready, to wake the engine's loop.
    """

    config: EngineConfig
    model_name: str
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    default_sampling: Mapping[str, Any]
    pool_layout: PoolLayout
    dtype: jnp.dtype
    max_model_len: int
    device: ModelDevice
    store: AdapterStore
    costs: PageCosts
    max_rank: int | None
    wake_event: threading.Event

    def close(self) -> None:
        """Ends the other hosts and the threads that load adapters. Idempotent."""
        try:
            self.device.followers.stop()
        finally:
            self.store.close()


def build_parts(config: EngineConfig, progress: bool = True, meeting: Meeting | None = None) -> EngineParts:
    """Loads the base model and divides the memory that is left. ``meeting`` is where several hosts meet.

    Raises:
      UnsupportedModel, InvalidRequest: what cannot be loaded, and why.
    """
    return make_parts(config, load_base(config, progress, meeting))


def make_parts(
    config: EngineConfig, base: BaseModel, lora_ops: LoraOps = GATHERED, buckets: Buckets | None = None
) -> EngineParts:
    """Divides the memory beside a loaded base model.

    Args:
      config: of the engine.
      base: its model, loaded.
      lora_ops: what computes low-rank updates, for comparisons.
      buckets: shapes that steps are padded to; None for those that suit the device.

    Raises:
      InvalidRequest: the memory does not suffice.
    """
    model, mesh = base.model_config, base.mesh
    dtype = jax.tree.leaves(base.params)[0].dtype
    layout = pool_layout_of(config, model, mesh, dtype)
    llama = make_model(base, lora_ops, layout.tokens_per_row)
    pool, max_len = make_pool(config, model, layout, dtype, mesh, base.meeting)
    if layout.shards.num_idle:
        logger.warning(
            "%d of %d devices have no attention heads, only their share of the MLP: the model has %d KV heads",
            layout.shards.num_idle,
            layout.shards.count,
            model.num_kv_heads,
        )
    wake_event = threading.Event()
    store = AdapterStore(
        model,
        layout,
        dtype,
        on_change=wake_event.set,
        stage=pool.stage,
        capacity=_least(base.meeting, "adapter memory", host_adapter_bytes(config)),
        host_bytes=pool.staged_bytes,
        base_name=base.name,
        confirm=lambda host: followers.confirm(host),
        max_rank=config.max_lora_rank,
    )
    runner = Runner(
        llama,
        base.params,
        pool,
        buckets or make_buckets(config, base.model_config),
        max_len,
        mesh,
        # Programs are kept by the model's shape, which does not tell other updates apart.
        program_folder(config) if lora_ops is GATHERED else None,
        free_for_compiling(layout.shards.count),
    )
    followers = Followers(base.meeting, runner)
    page_bytes = layout.page_bytes(dtype.itemsize)
    return EngineParts(
        config=config,
        model_name=base.name,
        model_config=model,
        tokenizer=base.tokenizer,
        default_sampling=base.default_sampling,
        pool_layout=layout,
        dtype=dtype,
        max_model_len=max_len,
        device=ModelDevice(runner, pool, followers),
        store=store,
        costs=PageCosts.estimate(
            model, page_bytes, layout.shards.count, jax.default_backend() != "cpu", layout.page_tokens
        ),
        max_rank=lora_ops.max_rank,
        wake_event=wake_event,
    )


def follow(config: EngineConfig, meeting: Meeting, progress: bool = True) -> None:
    """What the other hosts do in place of an engine: follows the first one's until that is closed.

    Args:
      config: as on the first host, but for its number.
      meeting: with the first host; see ``together``.
      progress: show bars.

    Raises:
      UnsupportedModel, BadAdapter, InvalidRequest: what cannot be loaded, and why.
    """
    base = load_base(config, progress, meeting)
    model, mesh = base.model_config, base.mesh
    dtype = jax.tree.leaves(base.params)[0].dtype
    layout = pool_layout_of(config, model, mesh, dtype)
    llama = make_model(base, tokens_per_row=layout.tokens_per_row)
    pool, max_len = make_pool(config, model, layout, dtype, mesh, meeting)
    # Host 0 decides what is kept, and each host keeps the same.
    _least(meeting, "adapter memory", host_adapter_bytes(config))
    free = free_for_compiling(layout.shards.count)
    runner = Runner(llama, base.params, pool, make_buckets(config, model), max_len, mesh, free=free)
    meeting.follow()
    Follower(meeting, model, layout, pool, runner).follow()


@contextlib.contextmanager
def _room_for_weights(model: ModelConfig, dtype: jnp.dtype, mesh: ModelMesh | None) -> Iterator[None]:
    """Refuses weights that the devices cannot hold, at once where that is known, else when they are full."""
    shape = mesh.shards.local if mesh else model
    needed = shape.weight_bytes(dtype.itemsize)
    memory = DeviceMemory.now(mesh.size if mesh else 1)
    remedy = "take a smaller model or dtype, or share it among more devices (mesh.tp)"
    if memory is not None and needed > memory.free:
        raise InvalidRequest(
            f"the weights take {needed / 2**30:.3g} GiB on each device, and {memory.free / 2**30:.3g} GiB are free "
            f"({memory.source}); {remedy}"
        )
    with _told_when_full(f"the weights, {needed / 2**30:.3g} GiB on each device, do not fit", remedy):
        yield


@contextlib.contextmanager
def _told_when_full(problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        first_line = (str(e).splitlines() or [type(e).__name__])[0]
        raise InvalidRequest(f"{problem} ({first_line}); {remedy}, or end what else uses the memory") from None


def pool_layout_of(config: EngineConfig, model: ModelConfig, mesh: ModelMesh | None, dtype: jnp.dtype) -> PoolLayout:
    """Of a pool of ``dtype``, with the KV cache in what the configuration says."""
    tokens_per_row = dtype.itemsize if config.kv_cache_dtype == "fp8" else 1
    return PoolLayout.for_model(model, mesh.size if mesh else 1, tokens_per_row)


def make_pool(
    config: EngineConfig,
    model: ModelConfig,
    layout: PoolLayout,
    dtype: jnp.dtype,
    mesh: ModelMesh | None,
    meeting: Meeting | None = None,
) -> tuple[UnifiedPool, int]:
    """The pool, the same on all hosts, and the longest sequence that model, configuration and pool allow.

    Raises:
      InvalidRequest: the devices cannot hold a pool of that size, or of any that is of use.
    """
    if mesh is not None:
        # Ahead of the pool, which takes what is left.
        mesh.connect(config.scheduler.max_batch_tokens * model.hidden_size * dtype.itemsize)
        if mesh.peers is not None:
            start.info("Messages between the devices: %.3g GiB on each", mesh.peers.nbytes / 2**30)
    page_bytes = layout.page_bytes(dtype.itemsize)
    memory = DeviceMemory.now(layout.shards.count)
    num_pages = _least(meeting, "pool pages", num_pages_of(config.pool, page_bytes, memory))
    with _told_when_full(
        f"a pool of {num_pages:,} pages, {num_pages * page_bytes / 2**30:.3g} GiB on each device, does not fit",
        "lower pool.memory_fraction, pool.gigabytes or pool.pages",
    ):
        pool = UnifiedPool(layout, num_pages, dtype, mesh.pool if mesh else None)
        pool.array.block_until_ready()
    start.info(
        "KV cache and adapters: %s pages of %d tokens%s, %.3g GiB%s%s",
        f"{num_pages:,}",
        layout.page_tokens,
        " in float8" if layout.tokens_per_row > 1 else "",
        num_pages * page_bytes / 2**30,
        f" on each of {layout.shards.count} devices" if layout.shards.count > 1 else "",
        f" ({memory.source})" if memory else "",
    )
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        start.warning(
            "max_model_len is %d, but the model takes %d tokens at most: longer requests are refused",
            config.max_model_len,
            model.max_position_embeddings,
        )
    limit = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    tokens = (num_pages - 1) * layout.page_tokens
    if tokens < limit:
        start.warning(
            "The pool holds %d tokens, fewer than the %d of the longest request that the model takes: longer ones are "
            "refused. A larger pool or more devices hold them; max_model_len=%d says that this is meant.",
            tokens,
            limit,
            tokens,
        )
    return pool, min(limit, tokens)


def enable_compilation_cache(folder: str | None) -> None:
    """Compiled steps are kept on disk: JAX holds this per process, so the first engine's choice stays."""
    if folder is None or jax.config.jax_compilation_cache_dir is not None:
        return
    path = _folder(folder, "compiled programs")
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Asked once here, or JAX warns of every program that it cannot keep.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0" * 4096)
    except OSError as e:
        logger.warning("compiled programs are not kept in %s: %s", path, e.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A step is made of many programs: each counts, however short.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _folder(path: str, of_what: str) -> Path | None:
    """The folder that a path means; None where it begins with ~ and this user has no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        logger.warning(
            "%s are not kept in %s: this user has no home folder; set HOME, or another folder", of_what, path
        )
        return None


def program_folder(config: EngineConfig) -> Path | None:
    """Beside what JAX keeps. Programs of several hosts cannot be kept."""
    if config.compilation_cache is None or config.mesh.num_hosts > 1:
        return None
    folder = _folder(config.compilation_cache, "compiled programs")
    return folder and folder / "programs"


def dtype_of(config: EngineConfig) -> jnp.dtype:
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


@dataclass(frozen=True)
class DeviceMemory:
    """What each device of this process can still hold.

    Attributes:
      free: bytes, of the fullest device.
      source: where that number comes from, for people.
      most: bytes that a pool takes of it where nobody asks for more.
    """

    free: int
    source: str
    most: int

    @classmethod
    def now(cls, num_devices: int) -> "DeviceMemory | None":
        """Of the devices that share the model; None where JAX's allocator keeps no count."""
        devices = jax.local_devices()[:num_devices]
        if devices[0].platform == "cpu":
            free = available_memory()
            share, most = free // len(devices), _MAX_CPU_POOL_BYTES // len(devices)
            return cls(share, "host memory", most)
        stats = [device.memory_stats() or {} for device in devices]
        if not all("bytes_limit" in s and "bytes_in_use" in s for s in stats):
            return None
        return min((cls._of_gpu(s) for s in stats), key=lambda memory: memory.free)

    @classmethod
    def _of_gpu(cls, stats: dict[str, int]) -> "DeviceMemory":
        limit, used = stats["bytes_limit"], stats["bytes_in_use"]
        reserved = stats.get("pool_bytes", 0)
        source = f"{used / 2**30:.3g} of JAX's {limit / 2**30:.3g} GiB of the GPU were in use before"
        # What JAX could not reserve when it started, it will not get later.
        if is_reserved_at_once() and used < reserved < 0.98 * limit:
            source = (
                f"{used / 2**30:.3g} of {reserved / 2**30:.3g} GiB were in use before; JAX wanted {limit / 2**30:.3g} "
                "GiB of the GPU, but other processes hold memory there, which nvidia-smi lists"
            )
            limit = reserved
        return cls(limit - used, source, limit - used)


def free_for_compiling(num_devices: int) -> float:
    """Bytes of each device that compilers may take beside the weights and the pool, all together.

    Infinite on a CPU, where XLA tries no products, and where JAX's allocator keeps no count.
    """
    if jax.local_devices()[0].platform == "cpu":
        return math.inf
    memory = DeviceMemory.now(num_devices)
    return math.inf if memory is None else memory.free


def num_pages_of(config: PoolConfig, page_bytes: int, memory: DeviceMemory | None) -> int:
    """Pages that the configured share of memory holds.

    Args:
      config: says how large the pool is to be.
      page_bytes: of a page on each device.
      memory: what each device can hold; None if that is not known.

    Raises:
      InvalidRequest: the devices cannot hold so many, or hold too few to be of use.
    """
    budget: float
    if config.pages is not None:
        budget, field = config.pages * page_bytes, "pool.pages"
    elif config.gigabytes is not None:
        budget, field = config.gigabytes * 2**30, "pool.gigabytes"
    elif memory is None:
        raise InvalidRequest(
            "JAX's allocator does not say how much memory the GPU has; set pool.gigabytes (--pool-gigabytes), or take "
            "XLA_PYTHON_CLIENT_ALLOCATOR out of the environment"
        )
    else:
        budget, field = min(config.memory_fraction * memory.free, memory.most), "pool.memory_fraction"
    if memory is not None and budget > memory.free:
        raise InvalidRequest(
            f"{field} asks for a pool of {budget / 2**30:.4g} GiB on each device, where {memory.free / 2**30:.4g} GiB "
            f"are free ({memory.source}); lower it, or leave it out for a size that fits"
        )
    pages = config.pages if config.pages is not None else int(budget // page_bytes)
    if pages < 2:
        raise InvalidRequest(
            f"the pool's {budget / 2**30:.2f} GiB a device hold {pages} pages of {page_bytes} bytes, at least 2 are "
            f"needed; raise pool.gigabytes{f' ({memory.source})' if memory else ''}"
        )
    return pages


def _least(meeting: Meeting | None, name: str, value: int) -> int:
    """The least of all hosts' values."""
    return value if meeting is None else min(meeting.exchange(name, value))


def _fields_that_must_agree(config: EngineConfig) -> dict[str, str | None]:
    """By the names that a person knows them by; those that may differ, such as paths, are left out."""
    limits, pool = config.scheduler, config.pool
    fields = {
        "--tp": config.mesh.tp,
        "--dummy": config.dummy,
        "--dtype": config.dtype,
        "--quantization": config.quantization,
        "--kv-cache-dtype": config.kv_cache_dtype,
        "--max-model-len": config.max_model_len,
        "--seed": config.seed if config.dummy else None,
        "--max-batch-tokens": limits.max_batch_tokens,
        "--max-sequences": limits.max_sequences,
        "--pool-memory-fraction": pool.memory_fraction,
        "--pool-gigabytes": pool.gigabytes,
        "--pool-pages": pool.pages,
        "JAX version": jax.__version__,
        "kind of device": jax.devices()[0].platform,
        "version of slora-jax's code": code_digest(),
    }
    return {name: None if value is None else str(value) for name, value in fields.items()}


def _agree_on_model(meeting: Meeting | None, model: ModelConfig, files: Sequence[Path]) -> None:
    """A part of the weights stands for all of them: whoever trains a model changes every tensor."""
    if meeting is None:
        return
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            digest.update(stream.read(_COMPARED_BYTES))
            stream.seek(max(0, size - _COMPARED_BYTES))
            digest.update(stream.read(_COMPARED_BYTES))
    fields = {f"model ({field.name})": str(getattr(model, field.name)) for field in dataclasses.fields(model)}
    meeting.agree("model", fields | {"weights": digest.hexdigest()[:12]})


def host_adapter_bytes(config: EngineConfig) -> int:
    """Bytes of host memory for adapters.

    Raises:
      InvalidRequest: more than this machine has.
    """
    if config.host_adapter_gigabytes is None:
        return available_memory() // 2
    wanted, there = int(config.host_adapter_gigabytes * 2**30), psutil.virtual_memory().total
    if wanted > there:
        raise InvalidRequest(
            f"host_adapter_gigabytes (--host-adapter-memory) is {config.host_adapter_gigabytes:g} GiB, and this "
            f"machine has {there / 2**30:.3g}; lower it, or leave it out for half of what is free"
        )
    return wanted


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still take: the machine's, or its container's if that is less."""
    available = psutil.virtual_memory().available
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # no limit, or not version 2 of control groups
    return max(0, min(available, limit))


def make_buckets(config: EngineConfig, model: ModelConfig) -> Buckets:
    limits = config.scheduler
    if jax.default_backend() == "cpu":
        # Compiling takes a second a shape there, and a padded step costs little for the small models it can run.
        return Buckets.coarse(limits.max_batch_tokens, limits.max_sequences, few_ahead=not config.warm_up)
    return Buckets.fine(limits.max_batch_tokens, limits.max_sequences, least_rows(model.weight_layout))
