"""Building an engine: the base model loaded, memory divided, caches opened, shapes of steps chosen; and following."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from slora_jax.config import PAGE_SIZE, EngineConfig, PoolConfig, read_yaml
from slora_jax.engine.batch import Buckets
from slora_jax.engine.hosts import Follower
from slora_jax.engine.meeting import Meeting
from slora_jax.engine.runner import Runner, code_digest
from slora_jax.errors import InvalidRequest
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import dummy_params, resolve_model, weight_files
from slora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_CPU_POOL_BYTES = 2 * 2**30
_COMPARED_BYTES = 2**20


def follow(config: EngineConfig, meeting: Meeting, progress: bool = True) -> None:
    """What the other hosts do in place of an engine: follows the first one's until that is closed.

    Args:
      meeting: with the first host; see ``together``.
      progress: show bars.

    Raises:
      UnsupportedModel, BadAdapter, InvalidRequest: what cannot be loaded, and why.
    """
    base = load_base(config, progress, meeting)
    model, mesh = base.model_config, base.mesh
    layout = pool_layout_of(model, mesh)
    pool, max_len = make_pool(config, model, layout, jax.tree.leaves(base.params)[0].dtype, mesh, meeting)
    host_adapter_bytes(config, meeting)
    runner = Runner(model, base.params, pool, make_buckets(config), max_len, mesh)
    meeting.follow()
    Follower(meeting, model, layout, pool, runner).follow()


@dataclass(frozen=True)
class BaseModel:
    """The base model, loaded."""

    model_config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    name: str
    mesh: ModelMesh | None


def load_base(config: EngineConfig, progress: bool, meeting: Meeting | None = None) -> BaseModel:
    if config.mesh.num_hosts > 1:
        if meeting is None:
            raise InvalidRequest(
                "several hosts are started with serve.py, or inside of slora_jax.engine.meeting.together"
            )
        meeting.agree("flags", _fields_that_must_agree(config))
    enable_compilation_cache(config.compilation_cache)
    dtype = dtype_of(config)
    if config.dummy:
        model_config = ModelConfig.from_hf(read_yaml(Path(config.model)))
        mesh = ModelMesh.create(model_config, config.mesh.tp)
        params = dummy_params(model_config, dtype, config.seed, mesh)
        _agree_on_model(meeting, model_config, ())
        return BaseModel(model_config, params, None, config.served_name or Path(config.model).stem, mesh)
    folder = resolve_model(config.model)
    model_config = ModelConfig.from_folder(folder)
    _agree_on_model(meeting, model_config, weight_files(folder))
    mesh = ModelMesh.create(model_config, config.mesh.tp)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(folder)
    else:
        logger.warning("%s has no tokenizer.json: prompts must be token ids, and answers have no text", folder)
    # Several hosts each read their slices of the safetensors.
    cached = config.checkpoint_cache is not None and config.mesh.num_hosts == 1
    cache = Path(config.checkpoint_cache).expanduser() if cached else None
    params, provenance = load_or_restore(folder, model_config, dtype, cache, mesh, progress=progress)
    logger.info("weights from %s in %.1f s", provenance.source, provenance.seconds)
    name = folder.name if config.model == "demo" else config.model.rstrip("/").split("/")[-1]
    return BaseModel(model_config, params, tokenizer, config.served_name or name, mesh)


def pool_layout_of(model: ModelConfig, mesh: ModelMesh | None) -> PoolLayout:
    return PoolLayout.for_model(model, mesh.size if mesh else 1)


def make_pool(
    config: EngineConfig,
    model: ModelConfig,
    layout: PoolLayout,
    dtype: jnp.dtype,
    mesh: ModelMesh | None,
    meeting: Meeting | None = None,
) -> tuple[UnifiedPool, int]:
    """The pool, the same on all hosts, and the longest sequence that model, configuration and pool allow."""
    num_pages = num_pages_of(config.pool, layout.page_bytes(dtype.itemsize), layout.shards.count)
    num_pages = _least(meeting, "pool pages", num_pages)
    limit = config.max_model_len or model.max_position_embeddings
    max_len = min(limit, model.max_position_embeddings, (num_pages - 1) * PAGE_SIZE)
    return UnifiedPool(layout, num_pages, dtype, mesh.pool if mesh else None), max_len


def enable_compilation_cache(folder: str | None) -> None:
    """Compiled steps are kept on disk: JAX holds this per process, so the first engine's choice stays."""
    if folder is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        # Warming up compiles many shapes on a GPU: each counts, however short.
        least = 0.5 if jax.default_backend() == "cpu" else 0
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def program_folder(config: EngineConfig) -> Path | None:
    """Beside what JAX keeps. Programs of several hosts cannot be kept."""
    if config.compilation_cache is None or config.mesh.num_hosts > 1:
        return None
    return Path(config.compilation_cache).expanduser() / "programs"


def dtype_of(config: EngineConfig) -> jnp.dtype:
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def num_pages_of(config: PoolConfig, page_bytes: int, num_devices: int) -> int:
    """Pages that the configured share of memory holds; ``page_bytes`` of each on every device."""
    if config.pages is not None:
        return config.pages
    if config.gigabytes is not None:
        budget = config.gigabytes * 2**30
    elif jax.default_backend() == "cpu":
        budget = min(config.memory_fraction * available_memory(), _MAX_CPU_POOL_BYTES) / num_devices
    else:
        memory = [device.memory_stats() for device in jax.local_devices()[:num_devices]]
        budget = config.memory_fraction * min(m["bytes_limit"] - m["bytes_in_use"] for m in memory)
    pages = int(budget // page_bytes)
    if pages < 2:
        raise InvalidRequest(
            f"the pool's {budget / 2**30:.2f} GiB a device hold {pages} pages of {page_bytes} bytes, at least 2 are "
            "needed; raise pool.gigabytes"
        )
    return pages


def host_adapter_bytes(config: EngineConfig, meeting: Meeting | None = None) -> int:
    """Of host memory, for adapters. Every host keeps what host 0 keeps, so the one with the least memory decides."""
    if config.host_adapter_gigabytes is not None:
        least = int(config.host_adapter_gigabytes * 2**30)
    else:
        least = available_memory() // 2
    return _least(meeting, "adapter memory", least)


def _least(meeting: Meeting | None, name: str, value: int) -> int:
    return value if meeting is None else min(meeting.exchange(name, value))


def _fields_that_must_agree(config: EngineConfig) -> dict[str, str | None]:
    """By the names that a person knows them by; those that may differ, such as paths, are left out."""
    limits, pool = config.scheduler, config.pool
    fields = {
        "--tp": config.mesh.tp,
        "--dummy": config.dummy,
        "--dtype": config.dtype,
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
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            digest.update(stream.read(_COMPARED_BYTES))
            stream.seek(max(0, file.stat().st_size - _COMPARED_BYTES))
            digest.update(stream.read(_COMPARED_BYTES))
    fields = {f"model ({field.name})": str(getattr(model, field.name)) for field in dataclasses.fields(model)}
    meeting.agree("model", fields | {"weights": digest.hexdigest()[:12]})


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still take: the machine's, or its container's if that is less."""
    available = psutil.virtual_memory().available
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # no limit, or not version 2 of control groups
    return max(0, min(available, limit))


def make_buckets(config: EngineConfig) -> Buckets:
    limits = config.scheduler
    if jax.default_backend() == "cpu":
        # Compiling takes seconds a shape there, and a padded step costs little for the small models it can run.
        return Buckets.geometric(limits.max_batch_tokens, limits.max_sequences, ratio=4)
    return Buckets.fine(limits.max_batch_tokens, limits.max_sequences)
