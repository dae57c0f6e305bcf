"""Parameters of a base model: from Hugging Face ``*.safetensors``, or random.

A weight file is read one parameter at a time: the bytes go as they are into one host buffer, which joins tensors that
make one parameter (q, k, v; gate, up), and from there to the device, to be transposed and cast.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from slora_jax.errors import InvalidRequest, UnsupportedModel
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import abstract_params

ParamPath = tuple[str, ...]
"""Keys from the root of the parameter tree to a leaf, such as ``("layers_0", "qkv", "kernel")``."""

ShardingRule = Callable[[ParamPath, jax.ShapeDtypeStruct], Sharding]
"""Says where a parameter lives: a ``NamedSharding``, or one that does not split arrays."""

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DOWNLOADED = ("*.safetensors", _INDEX, "config.json", "generation_config.json", "*token*.json", "*.jinja")
_NOT_DOWNLOADED = ("*/*", "consolidated*")  # other formats' copies of the same weights
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # buffers that old checkpoints carry along
_INIT_STD = 0.02


def resolve_model(spec: str) -> Path:
    """The folder of a model: a local folder, ``demo``, or a Hugging Face id that is downloaded or in its cache.

    Raises:
      InvalidRequest: there is no such folder or id, or it cannot be reached.
      UnsupportedModel: the folder holds no ``config.json`` or no safetensors.
    """
    if spec == "demo":
        from slora_jax.demo.model import demo_model_path

        return demo_model_path()
    folder = Path(spec).expanduser()
    if not spec or not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec):
            raise InvalidRequest(
                f"model {spec!r} is neither a folder nor a Hugging Face id; give the path of a folder with config.json "
                "and *.safetensors, an id such as 'organization/name', or 'demo'",
                param="model",
            )
        folder = _download(spec)
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json; a model folder holds config.json and *.safetensors")
    weight_files(folder)
    return folder


def _download(repo_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=list(_DOWNLOADED), ignore_patterns=list(_NOT_DOWNLOADED)
            )
        )
    except errors.GatedRepoError:
        problem = "needs its owner's permission; accept its terms on its page, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "was not found; check the spelling, and run `hf auth login` if it is private"
    except errors.HFValidationError as e:
        problem = f"is not a Hugging Face id ({e})"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            "is no folder here and not in the local Hugging Face cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set); give the path of a local folder, or 'demo'"
        )
    except (OSError, errors.HfHubHTTPError) as e:
        problem = f"could not be downloaded ({type(e).__name__}: {e}); try again, or give the path of a local folder"
    raise InvalidRequest(f"model {repo_id!r} {problem}", param="model") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those the index names, or ``model.safetensors``, or all ``*.safetensors``.

    Raises:
      UnsupportedModel: there are none, or one that the index names is missing.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UnsupportedModel(f"{index} cannot be read ({type(e).__name__}: {e}); fetch it again") from None
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise UnsupportedModel(f"{file} is missing, though {_INDEX} names it; the download is not complete")
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        got = f"only pickles ({', '.join(pickles[:3])}), and unpickling can run any code" if pickles else "none"
        raise UnsupportedModel(
            f"{folder}: weights must be in *.safetensors, found {got}; save them with transformers: "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    return files


def load_params(
    folder: Path, config: ModelConfig, dtype: jnp.dtype, sharding: ShardingRule | None = None, progress: bool = True
) -> dict[str, Any]:
    """Reads the weights onto the device, in the tree of ``abstract_params(config, dtype)``.

    Needs host memory for one parameter beside the result.

    Args:
      folder: holds the safetensors, with or without an index.
      config: the shape that they must have.
      dtype: what to cast them to.
      sharding: where each parameter lives; None takes the default device.
      progress: show a progress bar, in bytes.

    Raises:
      UnsupportedModel: a tensor is missing, left over, or of another shape or dtype; the message names it.
    """
    tensors = _read_headers(folder)
    recipes = _recipes(config, tensors)
    _check_tensors(folder, recipes, tensors, config)
    total = sum(tensors[piece.name].nbytes for recipe in recipes.values() for piece in recipe.pieces)
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
    ) as bar:

        def load(path: ParamPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            recipe = recipes[path]
            param = _build(recipe, tensors, leaf.dtype, sharding(path, leaf) if sharding else default_sharding())
            assert param.shape == leaf.shape, (path, param.shape, leaf.shape)
            bar.update(sum(tensors[piece.name].nbytes for piece in recipe.pieces))
            return param

        return _map_params(load, config, dtype)


def dummy_params(
    config: ModelConfig, dtype: jnp.dtype, seed: int, sharding: ShardingRule | None = None
) -> dict[str, Any]:
    """Random weights in the tree of ``abstract_params(config, dtype)``, drawn on the device.

    They depend on ``seed`` and the shapes only, and are small enough for activations to stay finite in 80 layers.
    """
    key = jax.random.key(seed)
    num_drawn = 0

    def draw(path: ParamPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        nonlocal num_drawn
        num_drawn += 1
        place = sharding(path, leaf) if sharding else default_sharding()
        if path[-1] == "scale":
            return jnp.ones(leaf.shape, leaf.dtype, device=place)
        # One program a shape, whatever the number of layers.
        return jax.jit(_draw, static_argnums=(2, 3), out_shardings=place)(key, num_drawn, leaf.shape, leaf.dtype)

    return _map_params(draw, config, dtype)


def default_sharding() -> Sharding:
    """Where JAX puts an array when nothing is said."""
    return jnp.zeros(()).sharding


def sharded_abstract_params(config: ModelConfig, dtype: jnp.dtype, sharding: ShardingRule | None) -> dict[str, Any]:
    """``abstract_params`` with each leaf's sharding."""

    def place(path, leaf):
        where = sharding(path, leaf) if sharding else default_sharding()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return _map_params(place, config, dtype)


def _map_params(make: Callable[[ParamPath, jax.ShapeDtypeStruct], Any], config, dtype) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: make(tuple(key.key for key in keys), leaf), abstract_params(config, dtype)
    )


def _draw(key, index, shape, dtype):
    # In float32 whatever the dtype, so that a bfloat16 model is the float32 one, rounded.
    values = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
    return (values * _INIT_STD).astype(dtype)


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.dtype_name]


@dataclass(frozen=True)
class _Piece:
    """A tensor, and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Recipe:
    """How to make a parameter: join ``pieces`` along the first axis and, if ``transposed``, swap the axes.

    Files hold linear maps as ``[out, in]``, parameters as ``[in, out]``.
    """

    pieces: tuple[_Piece, ...]
    transposed: bool = True


def _recipes(config: ModelConfig, names) -> dict[ParamPath, _Recipe]:
    """Recipe of every parameter; ``names`` are those of the checkpoint."""
    hidden, ffn = config.hidden_size, config.intermediate_size

    def linear(num_in, *maps):
        return _Recipe(tuple(_Piece(f"{name}.weight", (num_out, num_in)) for name, num_out in maps))

    def plain(name, *shape):
        return _Recipe((_Piece(f"{name}.weight", shape),), transposed=False)

    embedding = "model.embed_tokens"
    if config.tie_word_embeddings and f"{embedding}.weight" not in names and "lm_head.weight" in names:
        embedding = "lm_head"  # of two tied tensors a file may keep either
    recipes = {
        ("embed", "embedding"): plain(embedding, config.vocab_size, hidden),
        ("norm", "scale"): plain("model.norm", hidden),
    }
    if not config.tie_word_embeddings:
        recipes["lm_head", "kernel"] = linear(hidden, ("lm_head", config.vocab_size))
    for i in range(config.num_layers):
        layer, prefix = f"layers_{i}", f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        recipes |= {
            (layer, "attention_norm", "scale"): plain(f"{prefix}.input_layernorm", hidden),
            (layer, "mlp_norm", "scale"): plain(f"{prefix}.post_attention_layernorm", hidden),
            (layer, "qkv", "kernel"): linear(
                hidden,
                (f"{attention}.q_proj", config.q_size),
                (f"{attention}.k_proj", config.kv_size),
                (f"{attention}.v_proj", config.kv_size),
            ),
            (layer, "o", "kernel"): linear(config.q_size, (f"{attention}.o_proj", hidden)),
            (layer, "gate_up", "kernel"): linear(hidden, (f"{mlp}.gate_proj", ffn), (f"{mlp}.up_proj", ffn)),
            (layer, "down", "kernel"): linear(ffn, (f"{mlp}.down_proj", hidden)),
        }
    return recipes


def _build(recipe: _Recipe, tensors: dict[str, _Tensor], dtype: jnp.dtype, place: Sharding) -> jax.Array:
    # On a CPU `raw` may be the host buffer itself, so every path below ends in a new array. Transposing and casting
    # are two programs because XLA's CPU back end is several times slower at both in one.
    host = _read(recipe, tensors)
    raw = jax.device_put(host, _file_sharding(place) if recipe.transposed else place)
    del host
    if recipe.transposed:
        raw = jax.jit(jnp.transpose, out_shardings=place)(raw)
    if not recipe.transposed or raw.dtype != dtype:
        raw = jax.jit(_copy_as, static_argnums=1, out_shardings=place)(raw, dtype)
    return raw.block_until_ready()


def _read(recipe: _Recipe, tensors: dict[str, _Tensor]) -> np.ndarray:
    """The recipe's tensors, joined, in the file's dtype."""
    found = [tensors[piece.name] for piece in recipe.pieces]
    host = _aligned_empty(sum(tensor.nbytes for tensor in found))
    start = 0
    for tensor in found:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset)
            _read_into(stream, host[start : start + tensor.nbytes])
        start += tensor.nbytes
    return host.view(found[0].dtype).reshape(-1, *found[0].shape[1:])


def _aligned_empty(nbytes: int) -> np.ndarray:
    """Bytes at an address that JAX's CPU back end takes over without a copy."""
    alignment = 64
    spare = np.empty(nbytes + alignment, np.uint8)
    start = -spare.ctypes.data % alignment
    return spare[start : start + nbytes]


def _read_into(stream, target: np.ndarray) -> None:
    # One read may return less than asked for, and never gives more than 2 GiB.
    left = memoryview(target)
    while left:
        count = stream.readinto(left)
        if not count:
            raise UnsupportedModel(f"{stream.name} ended early; it changed while it was read")
        left = left[count:]


def _copy_as(x, dtype):
    return jnp.copy(x).astype(dtype)


def _file_sharding(place: Sharding) -> Sharding:
    """The sharding of ``[out, in]`` that makes ``[in, out]`` have sharding ``place``."""
    if not isinstance(place, NamedSharding):
        return place
    spec = (*place.spec, *[None] * (2 - len(place.spec)))
    return NamedSharding(place.mesh, PartitionSpec(*reversed(spec)), memory_kind=place.memory_kind)


def _read_headers(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of the folder's weight files, by name."""
    tensors: dict[str, _Tensor] = {}
    for file in weight_files(folder):
        try:
            found = _read_header(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UnsupportedModel(
                f"{file} is not a whole safetensors file ({type(e).__name__}: {e}); fetch it again"
            ) from None
        for name in found.keys() & tensors.keys():
            raise UnsupportedModel(
                f"tensor {name!r} is both in {tensors[name].file.name} and in {file.name}; add {_INDEX} or delete one"
            )
        tensors |= found
    return tensors


def _read_header(file: Path) -> dict[str, _Tensor]:
    """Reads the table of contents: a little-endian 64-bit length, that much JSON, then the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if not 0 <= start <= end <= size - 8 - length:
            raise ValueError(f"tensor {name!r} lies outside the file")
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"tensor {name!r} has {end - start} bytes, not those of its shape {shape}")
        tensors[name] = _Tensor(file, entry["dtype"], shape, 8 + length + start, end - start)
    return tensors


def _check_tensors(folder: Path, recipes, tensors: dict[str, _Tensor], config: ModelConfig) -> None:
    used = set()
    for recipe in recipes.values():
        for piece in recipe.pieces:
            used.add(piece.name)
            tensor = tensors.get(piece.name)
            if tensor is None:
                raise UnsupportedModel(
                    f"{folder}: tensor {piece.name!r} is missing; the files must hold every weight of a Llama with the "
                    "shape that config.json gives"
                )
            if tensor.dtype_name not in _DTYPES:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {piece.name!r} has dtype {tensor.dtype_name}, supported are "
                    f"{', '.join(_DTYPES)}; give the unquantized checkpoint"
                )
            if tensor.shape != piece.shape:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {piece.name!r} has shape {tensor.shape}, config.json asks for {piece.shape}"
                )
            first = recipe.pieces[0].name
            if tensor.dtype != tensors[first].dtype:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {piece.name!r} has dtype {tensor.dtype_name} but {first!r} has "
                    f"{tensors[first].dtype_name}; save the model in one dtype"
                )
    redundant = {"lm_head.weight", "model.embed_tokens.weight"} if config.tie_word_embeddings else set()
    extra = sorted(name for name in tensors.keys() - used - redundant if not _DERIVED.fullmatch(name))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UnsupportedModel(
            f"{tensors[extra[0]].file}: tensor {extra[0]!r}{more} belongs to no layer that config.json describes; "
            "ignoring weights would change the model's answers"
        )
