"""PEFT folders: ``adapter_config.json`` + ``adapter_model.safetensors``, checked and laid out for the pool.

An adapter is served exactly as trained or refused. ``read_header`` decides from the config and the table of tensors
alone, so that registering thousands of adapters reads no weights; ``load_adapter`` then reads the weights.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax.adapters.lora_config import LoraConfig, parse_lora_config
from slora_jax.adapters.tensor_file import DTYPES, MAX_TABLE_BYTES, TensorEntry, parse_table, read_table, read_tensor
from slora_jax.errors import BadAdapter, shown
from slora_jax.memory.layout import AdapterLayout, PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES

MAX_RANK = 256
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Parsing holds the interpreter's lock: so much takes at most some 10 ms. A config with a rank and an alpha for each
# projection of the largest Llama takes 130 kB.
_MAX_CONFIG_BYTES = 256 * 2**10
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MODULE_PATHS = {m: f"{'self_attn' if m in 'qkvo' else 'mlp'}.{m}_proj" for m in MODULES}
# What PEFT can adapt besides the projections, and is not adapted here.
_OTHER_MODULES = ("model.embed_tokens", "lm_head")
_MODULE_OF_PATH = {path: module for module, path in _MODULE_PATHS.items()}
# With the adapter's name before ".weight" as state dicts taken from a running model have it, or without.
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9]\d{0,5})\."
    r"(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.lora_([AB])(?:\.([!-\-/-~]{1,100}))?\.weight"
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterShape:
    """What an adapter's config and table of tensors say, the same for all adapters that were trained alike.

    Attributes:
      ranks: largest rank over the layers of each module it changes.
      scales: in ``MODULES`` order, the float32 that the product B A x is multiplied with; 0 where there is none.
      layout: where its weights go in the pool.
      num_pages: pool pages it takes.
    """

    ranks: Mapping[str, int]
    scales: tuple[float, ...]
    layout: AdapterLayout
    num_pages: int


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHeader:
    """What is known of an adapter without its weights.

    Attributes:
      path: its folder, with links resolved.
      shape: ranks, scales and place in the pool.
      file_bytes: size of its weight file.
      fingerprint: digest of its config and its table of tensors, not of its weights.
      modified_ns: when its config and its weights were last written.
    """

    path: Path
    shape: AdapterShape
    file_bytes: int
    fingerprint: bytes
    modified_ns: tuple[int, int]

    @property
    def digest(self) -> str:
        """``fingerprint`` as text: equal on hosts that found the same config, table of tensors and size of file.

        Costs nothing, as registering computes it. Weights that differ under one table are found only when they are
        loaded: see ``HostAdapter.content_hash``.
        """
        return self.fingerprint.hex()

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.shape.ranks

    @property
    def scales(self) -> tuple[float, ...]:
        return self.shape.scales

    @property
    def layout(self) -> AdapterLayout:
        return self.shape.layout

    @property
    def num_pages(self) -> int:
        return self.shape.num_pages

    @property
    def max_rank(self) -> int:
        return max(self.shape.ranks.values())


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """An adapter in host memory, ready to be copied to the pool.

    Attributes:
      packed: ``[layers, 2, R, W]`` in the pool's dtype as from ``AdapterLayout.pack``, read-only; or what the store's
        ``stage`` made of it.
      content_hash: SHA-256 of everything that determines what it computes: effective scales and weights. The same
        wherever it is stored and however the file orders or names it; never the same for different weights.
    """

    header: AdapterHeader
    packed: Any
    content_hash: str


@dataclass(frozen=True, slots=True)
class _Projection:
    """One changed projection; ``ratio`` is its scale over its module's."""

    a: TensorEntry
    b: TensorEntry
    scale: float
    ratio: float


_Projections = Mapping[tuple[int, str], _Projection]


def read_header(
    folder: Path, model: ModelConfig, pool: PoolLayout, known: MutableMapping[bytes, AdapterShape] | None = None
) -> AdapterHeader:
    """Checks everything that can be checked without reading weights.

    Args:
      folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
      model: the base model.
      pool: its pool's layout.
      known: shapes of adapters checked before for the same model, by what their config asks for and their table of
        tensors, to which this one's is added. Adapters trained alike need then not be checked one by one.

    Raises:
      BadAdapter: it cannot be served exactly as trained; the message says why.
    """
    assert pool.num_layers == model.num_layers, "the pool's layout must be the model's"
    folder = Path(folder)
    with _naming(folder), _opened(folder) as source:
        config = parse_lora_config(source.config)
        key = config.digest() + source.table_digest
        shape = known.get(key) if known is not None else None
        if shape is None:
            shape, _ = _check(source, config, pool)
            if known is not None:
                known[key] = shape
        return AdapterHeader(folder.resolve(), shape, source.file_bytes, source.fingerprint, source.modified_ns)


def load_adapter(header: AdapterHeader, dtype: np.dtype) -> HostAdapter:
    """Reads the weights, one tensor at a time, and lays them out for the pool.

    The pool keeps one scale per module. Where layers differ in scale, the ratio to the module's is multiplied into
    their B, in float32 before the cast.

    Raises:
      BadAdapter: a weight is NaN or infinite or overflows ``dtype``, the file is truncated, or config or file changed
        since ``read_header``.
    """
    dtype = np.dtype(dtype)
    with _naming(header.path), _opened(header.path) as source:
        if (source.fingerprint, source.modified_ns) != (header.fingerprint, header.modified_ns):
            raise BadAdapter("its files changed since it was registered; register it again")
        _, projections = _check(source, parse_lora_config(source.config), header.layout.pool)
        weights = _WeightReader(source.file, projections, dtype)
        packed = header.layout.pack(weights, dtype)
        status = os.fstat(source.file.fileno())
        if (status.st_size, status.st_mtime_ns) != (source.file_bytes, source.modified_ns[1]):
            raise BadAdapter(f"{WEIGHTS_FILE} was written to while it was read; register it again")
    packed.flags.writeable = False
    return HostAdapter(header, packed, weights.content_hash())


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an adapter may be, as far as an operator says so.

    Attributes:
      rank: the largest.
      file_bytes: of its weights' file; no adapter of that rank has more.
    """

    rank: int
    file_bytes: int

    @classmethod
    def of_rank(cls, rank: int, pool: PoolLayout) -> "AdapterLimits":
        """With the size that an adapter has which changes every projection at this rank, in the widest element type."""
        widths = sum(shape.d_in + shape.d_out for shape in pool.shapes.values())
        widest = max(dtype.itemsize for dtype in DTYPES.values())
        return cls(rank, rank * widths * pool.num_layers * widest + MAX_TABLE_BYTES)

    def check_rank(self, rank: int) -> None:
        """
        Raises:
          BadAdapter: it is above the limit.
        """
        if rank > self.rank:
            raise BadAdapter(
                f"its rank is {rank}, and this server takes at most {self.rank} (--max-lora-rank); train with a lower "
                "rank, or start the server with a higher limit"
            )


def resolve_adapter_path(spec: str, limits: AdapterLimits | None = None) -> Path:
    """Finds the folder of an adapter, downloading its two files if ``spec`` is a Hugging Face id.

    Args:
      spec: a local folder (``~`` is the home folder) or a Hugging Face id, ``owner/name``. A folder goes first.
      limits: of what is downloaded; None for none.

    Raises:
      BadAdapter: neither a folder nor an id, the id cannot be downloaded, or it exceeds the limits: then at most its
        config was.
    """
    folder = os.path.expanduser(spec)
    if os.path.isdir(folder):
        return Path(folder)
    if not _HUB_ID.fullmatch(spec):
        raise BadAdapter(f"adapter {spec[:200]!r} is neither an existing folder nor a Hugging Face id (owner/name)")
    # Imported late: it is slow to import and most adapters are local.
    from huggingface_hub import errors

    try:
        return _download(spec, limits)
    except BadAdapter as e:
        raise BadAdapter(f"adapter {spec!r}: {e}") from None
    except errors.GatedRepoError:
        raise BadAdapter(
            f"adapter {spec!r}: access to this Hugging Face repository is restricted; ask for it and log in"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadAdapter(f"adapter {spec!r}: no such folder here and no such public Hugging Face repository") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise BadAdapter(
            f"adapter {spec!r}: no such folder here, and Hugging Face cannot be reached; "
            "give the path of a downloaded folder, or go online"
        ) from None
    except (OSError, ValueError, errors.EntryNotFoundError, errors.HTTPError) as e:
        raise BadAdapter(f"adapter {spec!r}: the download failed: {type(e).__name__}: {e}") from None


def _download(spec: str, limits: AdapterLimits | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    revision = None
    if limits is not None:
        try:
            planned = huggingface_hub.snapshot_download(spec, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], dry_run=True)
        except errors.DryRunError:
            planned = []  # the hub cannot be reached: what it has may lie here from before
        for file in planned:
            revision = file.commit_hash
            most = limits.file_bytes if file.filename == WEIGHTS_FILE else _MAX_CONFIG_BYTES
            if file.file_size is not None and file.file_size > most:
                raise BadAdapter(
                    f"{file.filename} has {file.file_size} bytes, and no adapter of this model of rank {limits.rank} "
                    f"(--max-lora-rank) has more than {most}; it was not downloaded"
                )
        if any(file.filename == WEIGHTS_FILE and file.will_download for file in planned):
            config_only = huggingface_hub.snapshot_download(spec, revision=revision, allow_patterns=[CONFIG_FILE])
            with _open(Path(config_only), CONFIG_FILE, "save it with PEFT's save_pretrained") as opened:
                config = parse_lora_config(opened.read(_MAX_CONFIG_BYTES + 1))
            if not config.rank_patterns.items:  # which may all name lower ones; the table of tensors tells
                limits.check_rank(config.rank)
    # What was looked at is what is downloaded, whatever is uploaded meanwhile.
    return Path(huggingface_hub.snapshot_download(spec, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Puts the adapter's folder before the reason for its refusal, and makes unreadable files a refusal."""
    try:
        yield
    except BadAdapter as e:
        raise BadAdapter(printable(f"adapter {folder}: {e}")) from None
    except OSError as e:
        raise BadAdapter(printable(f"adapter {folder}: cannot be read: {e.strerror or e}")) from None


def printable(text: str) -> str:
    """Without the halves of characters that names of files may have, and that no client can be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class _Source:
    """An adapter's files: the config and the table of tensors read, the weights not yet."""

    config: bytes
    table: bytes
    file: BufferedIOBase
    file_bytes: int
    table_digest: bytes
    fingerprint: bytes
    modified_ns: tuple[int, int]


@contextmanager
def _opened(folder: Path) -> Iterator[_Source]:
    if not folder.is_dir():
        raise BadAdapter("no such folder; give a folder that PEFT's save_pretrained wrote")
    with _reading(CONFIG_FILE), _open(folder, CONFIG_FILE, "save it with PEFT's save_pretrained") as file:
        status = os.fstat(file.fileno())
        config, config_modified_ns = file.read(_MAX_CONFIG_BYTES + 1), status.st_mtime_ns
        if len(config) > _MAX_CONFIG_BYTES:
            raise BadAdapter(f"{CONFIG_FILE} has {status.st_size} bytes, more than the {_MAX_CONFIG_BYTES} allowed")
    with _reading(WEIGHTS_FILE), _open(folder, WEIGHTS_FILE, "save it with PEFT's save_pretrained") as file:
        with _in_weights_file():
            table, file_bytes = read_table(file)
        table_digest = hashlib.sha256(f"{file_bytes}\n".encode() + table).digest()
        fingerprint = hashlib.sha256(table_digest + config).digest()
        modified_ns = (config_modified_ns, os.fstat(file.fileno()).st_mtime_ns)
        yield _Source(config, table, file, file_bytes, table_digest, fingerprint, modified_ns)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Makes an unreadable file a refusal that names it."""
    try:
        yield
    except OSError as e:
        raise BadAdapter(f"{name}: cannot be read: {e.strerror or e}") from None


@contextmanager
def _in_weights_file() -> Iterator[None]:
    try:
        yield
    except BadAdapter as e:
        raise BadAdapter(f"{WEIGHTS_FILE}: {e}") from None


def _open(folder: Path, name: str, remedy: str) -> BufferedIOBase:
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadAdapter(f"{name} is not a regular file; {remedy}")
        # Should a pipe take its place now, this does not wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise BadAdapter(f"{name} is not a regular file; {remedy}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles and name == WEIGHTS_FILE:
        remedy = (
            f"{pickles[0]} is a pickle, which can run code and is never read: "
            "convert it with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    raise BadAdapter(f"{name} not found; {remedy}")


def _check(source: _Source, config: LoraConfig, pool: PoolLayout) -> tuple[AdapterShape, _Projections]:
    """Everything that the config and the table of tensors say, or a refusal; projections are sorted."""
    with _in_weights_file():
        entries = parse_table(source.table, source.file_bytes)
    pairs = _pair_tensors(entries, config, pool)
    scales = {}
    module_scales = dict.fromkeys(MODULES, 0.0)
    ranks = dict.fromkeys(MODULES, 0)
    for (layer, module), (a, _) in pairs.items():
        scale = config.scale_of(_module_name(layer, module))
        if abs(scale) > _FLOAT32_MAX:
            raise BadAdapter(f"the scale {scale} of {_module_name(layer, module)} overflows float32; lower lora_alpha")
        scales[layer, module] = scale
        module_scales[module] = module_scales[module] or scale
        ranks[module] = max(ranks[module], a.shape[0])
    projections = {
        key: _Projection(a, b, scales[key], scales[key] / (module_scales[key[1]] or 1.0))
        for key, (a, b) in pairs.items()
    }
    layout = pool.adapter(ranks)
    shape = AdapterShape(
        ranks={module: rank for module, rank in ranks.items() if rank},
        scales=tuple(float(np.float32(scale)) for scale in module_scales.values()),
        layout=layout,
        num_pages=layout.num_pages,
    )
    return shape, projections


def _pair_tensors(
    entries: list[TensorEntry], config: LoraConfig, pool: PoolLayout
) -> dict[tuple[int, str], tuple[TensorEntry, TensorEntry]]:
    """A and B of every (layer, module), sorted, checked for name, shape and rank; all that the config targets."""
    found = _tensors_by_projection(entries, pool)
    pairs: dict[tuple[int, str], tuple[TensorEntry, TensorEntry]] = {}
    missing = [name for name in _OTHER_MODULES if config.is_target(name)]
    num_targets = len(missing)
    for key in ((layer, module) for layer in range(pool.num_layers) for module in MODULES):
        name, tensors = _module_name(*key), found.get(key)
        is_target = config.is_target(name)
        num_targets += is_target
        if tensors is None:
            if is_target:
                missing.append(name)
            continue
        if len(tensors) < 2:
            (part,) = tensors
            other = {"A": "B", "B": "A"}[part]
            raise BadAdapter(f"tensor {tensors[part].name} has no lora_{other} beside it; save the adapter again")
        if not is_target:
            raise BadAdapter(
                f"tensor {tensors['A'].name} is for a module that {CONFIG_FILE} does not target (target_modules, "
                "exclude_modules, layers_to_transform), so PEFT would ignore it; correct the config or remove the "
                "tensor"
            )
        _check_projection(*key, tensors["A"], tensors["B"], config, pool)
        pairs[key] = (tensors["A"], tensors["B"])
    if missing:
        raise BadAdapter(
            f"{WEIGHTS_FILE} has no tensors for {len(missing)} of the {num_targets} modules that {CONFIG_FILE} targets "
            f"(target_modules, exclude_modules, layers_to_transform), the first of them {missing[0]}; save the whole "
            "adapter, or let the config target what it has"
        )
    return pairs


def _tensors_by_projection(
    entries: list[TensorEntry], pool: PoolLayout
) -> dict[tuple[int, str], dict[str, TensorEntry]]:
    """The tensors by (layer, module), then "A" and "B"."""
    if not entries:
        raise BadAdapter(f"{WEIGHTS_FILE} holds no tensors; save the adapter again")
    found: dict[tuple[int, str], dict[str, TensorEntry]] = {}
    infixes: dict[str | None, str] = {}
    for entry in entries:
        match = _TENSOR_NAME.fullmatch(entry.name)
        if match is None:
            raise BadAdapter(f"tensor {shown(entry.name)} matches nothing here: {_why_unmatched(entry.name)}")
        layer, module, part = int(match[1]), _MODULE_OF_PATH[match[2]], match[3]
        if layer >= pool.num_layers:
            raise BadAdapter(
                f"tensor {entry.name} is for layer {layer}, but the base model has {pool.num_layers} layers; "
                "is it another base model's adapter?"
            )
        infixes.setdefault(match[4], entry.name)
        found.setdefault((layer, module), {})[part] = entry
    if len(infixes) > 1:
        raise BadAdapter(f"it mixes tensors of several adapters: {', '.join(list(infixes.values())[:2])}; save one")
    return found


def _check_projection(
    layer: int, module: str, a: TensorEntry, b: TensorEntry, config: LoraConfig, pool: PoolLayout
) -> None:
    name = _module_name(layer, module)
    rank = config.rank_of(name)
    if rank > MAX_RANK:
        raise BadAdapter(f"rank {rank} of {name} is too high: at most {MAX_RANK} is served; train with a lower rank")
    shape = pool.shapes[module]
    for entry, expected in ((a, (rank, shape.d_in)), (b, (shape.d_out, rank))):
        if entry.shape != expected:
            raise BadAdapter(
                f"tensor {entry.name} has shape {list(entry.shape)}, expected {list(expected)} from the base model and "
                f"the rank that {CONFIG_FILE} gives; is it another base model's adapter?"
            )


def _why_unmatched(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "it belongs to DoRA, which is not supported"
    if "modules_to_save" in name or any(part in name for part in ("lm_head", "embed_tokens", "norm", "score")):
        return f"only {', '.join(_MODULE_PATHS.values())} can be adapted; train without embeddings, heads and norms"
    if name.endswith(".bias"):
        return "biases are not supported; train with bias='none' and lora_bias=false"
    return (
        "expected names like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; "
        "is it another architecture's adapter?"
    )


def _module_name(layer: int, module: str) -> str:
    """The projection's name in the base model, which patterns of the config match."""
    return f"model.layers.{layer}.{_MODULE_PATHS[module]}"


class _WeightReader(Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]):
    """A and B of every projection, read when asked for, so that one pair is in memory at a time."""

    def __init__(self, file: BufferedIOBase, projections: _Projections, dtype: np.dtype):
        self._file = file
        self._projections = projections
        self._dtype = dtype
        self._digests: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._projections)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._projections)

    def __getitem__(self, key: tuple[int, str]) -> tuple[np.ndarray, np.ndarray]:
        projection = self._projections[key]
        return self._read(projection.a, 1.0), self._read(projection.b, projection.ratio)

    def content_hash(self) -> str:
        """To be asked for once every pair has been read."""
        content = hashlib.sha256()
        for (layer, module), projection in self._projections.items():
            content.update(f"{_module_name(layer, module)} {float(projection.scale).hex()}\n".encode())
            for entry in (projection.a, projection.b):
                content.update(f"{entry.dtype} {entry.shape} {self._digests[entry.name]}\n".encode())
        return content.hexdigest()

    def _read(self, entry: TensorEntry, ratio: float) -> np.ndarray:
        stored = read_tensor(self._file, entry)
        self._digests[entry.name] = hashlib.sha256(stored.reshape(-1).view(np.uint8)).hexdigest()
        with np.errstate(over="ignore", invalid="ignore"):
            values = stored.astype(np.float32, copy=ratio != 1.0)
            if ratio != 1.0:
                values *= np.float32(ratio)
            # The largest magnitude overflows first, and NaN survives a maximum.
            largest = np.maximum(values.max(), -values.min())
            if not np.isfinite(largest.astype(self._dtype)):
                exact = stored.astype(np.float64)
                bad = np.count_nonzero(~np.isfinite(exact))
                if bad:
                    raise BadAdapter(f"tensor {entry.name} holds NaN or infinity ({bad} of {exact.size} values)")
                raise BadAdapter(
                    f"tensor {entry.name} overflows {self._dtype}: it holds {np.abs(exact).max() * ratio:.6g}; "
                    "serve with dtype bfloat16 or float32"
                )
            return values.astype(self._dtype, copy=False)
