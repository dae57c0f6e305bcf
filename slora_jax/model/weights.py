"""Parameters of a base model: from Hugging Face ``*.safetensors``, or random.

A weight file is read one parameter at a time: the bytes go as they are into a host buffer for each device of this
process, which joins the tensors that make one parameter (q, k, v; gate, up), and from there to the device, to be
transposed and cast, or rounded to fp8 (``EngineConfig.quantization``). With several devices each gets its slice only
(``Shards``), and what other processes hold is neither read into memory nor sent anywhere.

The linear maps of a file that is quantised already (``quantized_files``) are read whole, one parameter at a time, and
put into another order on the host.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from pallas_kernels import pack_integers
from slora_jax.errors import InvalidRequest, UnsupportedModel, shown
from slora_jax.model.config import ModelConfig
from slora_jax.model.json_files import parse_json, read_json
from slora_jax.model.llama import abstract_params
from slora_jax.model.mesh import PROJECTIONS, ModelMesh, ParamPath
from slora_jax.model.projection import group_unit, quantize_map
from slora_jax.model.quantization import ChannelFp8, WeightLayout
from slora_jax.model.quantized_files import Grid, QuantizedFiles, Unreadable
from slora_jax.model.shards import Run, Shards, joined_runs

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DTYPES_OF_PARTS = _DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""Of tensors that belong to a quantised linear map."""
_KV_SCALE = re.compile(r".*\.self_attn\.([kvq]_scale|[kvq]_proj\.output_scale)")  # of a KV cache in fp8
_DOWNLOADED = ("*.safetensors", _INDEX, "config.json", "generation_config.json", "*token*.json", "*.jinja")
_NOT_DOWNLOADED = ("*/*", "consolidated*")  # other formats' copies of the same weights
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # buffers that old checkpoints carry along
_INIT_STD = 0.02
_SCRATCH_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 100 * 10**6  # what safetensors allows
_MAX_AXES = 8
_SHARD = re.compile(r"[^/\\\0\ud800-\udfff]{1,250}\.safetensors")
type _Leaves = dict[str, jax.ShapeDtypeStruct]
"""The parameters of one module, by name."""

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resolve_model(spec: str) -> Path:
    """The folder of a model: a local folder, or a Hugging Face id that is downloaded or in its cache.

    Raises:
      InvalidRequest: there is no such folder or id, or it cannot be reached.
      UnsupportedModel: the folder holds no ``config.json`` or no safetensors, or an adapter too.
    """
    folder = Path(spec).expanduser()
    if not spec or not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec):
            raise InvalidRequest(
                f"model {spec!r} is neither a folder nor a Hugging Face id; give the path of a folder with config.json "
                "and *.safetensors, or an id such as 'organization/name'",
                param="model",
            )
        folder = _download(spec)
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json; a model folder holds config.json and *.safetensors")
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder} holds a model and an adapter (adapter_config.json), which transformers would apply to it; move "
            "the adapter to a folder of its own"
        )
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
            "HF_HUB_OFFLINE is set); give the path of a local folder"
        )
    except (OSError, errors.HfHubHTTPError) as e:
        problem = f"could not be downloaded ({type(e).__name__}: {e}); try again, or give the path of a local folder"
    raise InvalidRequest(f"model {repo_id!r} {problem}", param="model") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: ``model.safetensors``, or those the index names, or all ``*.safetensors``.

    Where there are both of the first, transformers takes the one file.

    Raises:
      UnsupportedModel: there are none, one that the index names is missing, or the index is none.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        files = [single]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UnsupportedModel(f"{index}: weight_map must be an object, got {shown(weight_map)}; fetch it again")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise UnsupportedModel(
                    f"{index}: weight_map has {shown(name)} for {shown(tensor)}, not the name of a *.safetensors file"
                )
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UnsupportedModel(f"{file} is missing, though {_INDEX} names it; the download is not complete")
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        got = f"only pickles ({', '.join(pickles[:3])}), and unpickling can run any code" if pickles else "none"
        raise UnsupportedModel(
            f"{folder}: weights must be in *.safetensors, found {got}; save them with transformers: "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    return files


def untied_where_different(folder: Path, config: ModelConfig) -> ModelConfig:
    """``config``, without ``tie_word_embeddings`` where the files hold an ``lm_head`` that is not the embedding.

    So transformers 5 does: what was trained is in the files, and such a config is wrong. Reads both tensors, where both
    are there.

    Raises:
      UnsupportedModel: a file cannot be read; the message names it.
    """
    if not config.tie_word_embeddings:
        return config
    tensors = _read_headers(folder)
    if _EMBEDDING not in tensors or _LM_HEAD not in tensors:
        return config
    try:
        if _same(tensors[_EMBEDDING], tensors[_LM_HEAD]):
            return config
    except OSError as e:
        raise UnsupportedModel(f"{folder}: the weights cannot be read: {e}") from None
    logger.warning("%s: tie_word_embeddings is true, but %s is not the embedding; they are not tied", folder, _LM_HEAD)
    return dataclasses.replace(config, tie_word_embeddings=False)


def _same(one: "_Tensor", other: "_Tensor") -> bool:
    """Whether two tensors have the same bytes, dtype and shape."""
    if (one.dtype_name, one.shape, one.nbytes) != (other.dtype_name, other.shape, other.nbytes):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for at in range(0, one.nbytes, _SCRATCH_BYTES):
            size = min(_SCRATCH_BYTES, one.nbytes - at)
            if first.read(size) != second.read(size):
                return False
    return True


def load_params(
    folder: Path, config: ModelConfig, dtype: jnp.dtype, mesh: ModelMesh | None = None, progress: bool = True
) -> dict[str, Any]:
    """Reads the weights onto their devices, in the tree of ``abstract_params``.

    Needs host memory for this process's slices of one parameter beside the result.

    Args:
      folder: holds the safetensors, with or without an index.
      config: the shape that they must have, of ``untied_where_different``.
      dtype: what to cast them to.
      mesh: the devices that share the model; None takes the default device.
      progress: show a progress bar, in bytes.

    Raises:
      UnsupportedModel: a tensor is missing, left over, or of another shape or dtype; the message names it.
    """
    tensors = _read_headers(folder)
    shards = mesh.shards if mesh else Shards(config)
    recipes = _recipes(config, tensors, shards)
    maps = _quantized_maps(folder, config, recipes, tensors)
    _check_tensors(folder, recipes, tensors, config, maps)

    def names(recipe: _Recipe) -> Iterator[str]:
        for name in recipe.shapes:
            yield from maps[name].parts.values() if name in maps else [name]

    total = sum(tensors[name].nbytes for recipe in recipes.values() for name in names(recipe))
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
    ) as bar:

        def load(module: ParamPath, leaves: _Leaves) -> dict[str, jax.Array]:
            recipe = recipes[module]
            if maps.keys() >= recipe.shapes.keys():
                params = _convert(recipe, {name: maps[name].read(tensors) for name in recipe.shapes}, config, leaves)
            elif config.weight_layout is not None and module[-1] in PROJECTIONS:
                dtype = next(tensors[name].dtype for name in recipe.shapes)
                kernel = _build(recipe, tensors, _unquantized(recipe, dtype, module, mesh))
                unit = group_unit(module[-1], shards.local)
                params = _quantize(kernel, config.weight_layout, unit, leaves)
            else:
                ((name, leaf),) = leaves.items()
                params = {name: _build(recipe, tensors, leaf)}
            bar.update(sum(tensors[name].nbytes for name in names(recipe)))
            return params

        return _map_params(load, config, dtype, mesh)


def dummy_params(config: ModelConfig, dtype: jnp.dtype, seed: int, mesh: ModelMesh | None = None) -> dict[str, Any]:
    """Random weights in the tree of ``abstract_params``, drawn on the devices.

    They depend on ``seed`` and the model's shapes only, not on the mesh, and are small enough for activations to stay
    finite in 80 layers. A quantised layout holds the same ones, rounded.
    """
    num_drawn = 0
    shards = mesh.shards if mesh else Shards(config)
    recipes = _recipes(config, (), shards)

    def draw(module: ParamPath, leaves: _Leaves) -> dict[str, jax.Array]:
        nonlocal num_drawn
        num_drawn += 1
        if "scale" in leaves:
            leaf = leaves["scale"]
            return {"scale": jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)}
        # One program a shape, whatever the number of layers.
        if config.weight_layout is not None and module[-1] in PROJECTIONS:
            leaf = _unquantized(recipes[module], dtype, module, mesh)
            kernel = draw_as(leaf, recipes[module])
            return _quantize(kernel, config.weight_layout, group_unit(module[-1], shards.local), leaves)
        ((name, leaf),) = leaves.items()
        return {name: draw_as(leaf, recipes[module])}

    def draw_as(leaf: jax.ShapeDtypeStruct, recipe: _Recipe) -> jax.Array:
        program = jax.jit(_draw, static_argnums=(2, 3), out_shardings=leaf.sharding)
        return program(np.uint32(seed % 2**32), num_drawn, recipe.form, leaf.dtype)

    return _map_params(draw, config, dtype, mesh)


def default_sharding() -> Sharding:
    """Where JAX puts an array when nothing is said."""
    return jnp.zeros(()).sharding


def sharded_abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: ModelMesh | None) -> dict[str, Any]:
    """``abstract_params`` with each leaf's sharding."""
    return _map_params(lambda _, leaves: leaves, config, dtype, mesh)


def _map_params(make: Callable[[ParamPath, _Leaves], Mapping[str, Any]], config, dtype, mesh: ModelMesh | None):
    """The tree of parameters of what ``make`` gives for each module: by name, one for each of its leaves."""
    abstract = abstract_params(config, dtype, mesh.size if mesh else 1)
    modules: dict[ParamPath, _Leaves] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        *module, name = (key.key for key in keys)
        place = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding((*module, name), mesh))
        modules.setdefault(tuple(module), {})[name] = place
    made = {module: make(module, leaves) for module, leaves in modules.items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: made[tuple(key.key for key in keys[:-1])][keys[-1].key], abstract
    )


def _sharding(path: ParamPath, mesh: ModelMesh | None) -> Sharding:
    return mesh.param(path) if mesh else default_sharding()


def _draw(seed, index, form: "_Form", dtype):
    # In float32 whatever the dtype, so that a bfloat16 model is the float32 one, rounded.
    key = jax.random.fold_in(jax.random.key(seed), index)
    values = jax.random.normal(key, form.shape, jnp.float32)
    pieces = [
        jnp.zeros([size if axis == form.axis else n for axis, n in enumerate(form.shape)], jnp.float32)
        if first is None
        else jax.lax.slice_in_dim(values, first, first + size, axis=form.axis)
        for first, size in form.runs
    ]
    values = jnp.concatenate(pieces, form.axis) if len(pieces) > 1 else values
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
        return _DTYPES_OF_PARTS[self.dtype_name]


@dataclass(frozen=True)
class _Piece:
    """Some rows, or columns, of a tensor as the file has it; or, without a name, zeros."""

    name: str | None
    first: int
    size: int


@dataclass(frozen=True)
class _Form:
    """How devices share a parameter out: the runs of one device's parameter of this shape, of all devices in order."""

    shape: tuple[int, ...]
    axis: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class _Recipe:
    """How to make a parameter: join ``pieces`` along ``axis`` and, if ``transposed``, swap the axes.

    Files hold linear maps as ``[out, in]``, parameters as ``[in, out]``.

    Attributes:
      shapes: of each tensor that it takes pieces of.
      axis, pieces: in the file's order of axes.
      transposed: see above.
    """

    shapes: dict[str, tuple[int, ...]]
    axis: int
    pieces: tuple[_Piece, ...]
    transposed: bool

    @property
    def joined_shape(self) -> tuple[int, ...]:
        """Of the parameter over all devices, in its own order of axes."""
        shape = list(next(iter(self.shapes.values())))
        shape[self.axis] = sum(piece.size for piece in self.pieces)
        return tuple(reversed(shape)) if self.transposed else tuple(shape)

    @property
    def form(self) -> _Form:
        """The same, with the parameter on one device as the source."""
        starts, total = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = total
            total += shape[self.axis]
        whole = list(next(iter(self.shapes.values())))
        whole[self.axis] = total
        runs = joined_runs((None if p.name is None else starts[p.name] + p.first, p.size) for p in self.pieces)
        if self.transposed:
            return _Form(tuple(reversed(whole)), len(whole) - 1 - self.axis, runs)
        return _Form(tuple(whole), self.axis, runs)


def _recipes(config: ModelConfig, names, shards: Shards) -> dict[ParamPath, _Recipe]:
    """By module, the recipe of its parameter; ``names`` are those of the checkpoint."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    each = range(shards.count)

    def pieces(name: str, runs: Sequence[Run]) -> list[_Piece]:
        return [_Piece(None if first is None else name, first or 0, size) for first, size in runs]

    def whole(name: str, *shape: int) -> _Recipe:
        name = f"{name}.weight"
        return _Recipe({name: shape}, 0, (_Piece(name, 0, shape[0]),), transposed=False)

    def vocabulary(name: str, transposed: bool) -> _Recipe:
        name = f"{name}.weight"
        parts = [piece for i in each for piece in pieces(name, shards.vocabulary(i))]
        return _Recipe({name: (config.vocab_size, hidden)}, 0, tuple(parts), transposed)

    def outputs(maps: dict[str, tuple[int, Callable[[int], Sequence[Run]]]]) -> _Recipe:
        """Column-parallel: by name, the width and each device's columns."""
        maps = {f"{name}.weight": of for name, of in maps.items()}
        parts = [piece for i in each for name, (_, runs) in maps.items() for piece in pieces(name, runs(i))]
        return _Recipe({name: (width, hidden) for name, (width, _) in maps.items()}, 0, tuple(parts), transposed=True)

    def inputs(name: str, width: int, runs: Callable[[int], Sequence[Run]]) -> _Recipe:
        """Row-parallel: the width, and each device's rows."""
        name = f"{name}.weight"
        parts = [piece for i in each for piece in pieces(name, runs(i))]
        return _Recipe({name: (hidden, width)}, 1, tuple(parts), transposed=True)

    embedding = "model.embed_tokens"
    if config.tie_word_embeddings and f"{embedding}.weight" not in names and "lm_head.weight" in names:
        embedding = "lm_head"  # of two tied tensors a file may keep either
    recipes: dict[ParamPath, _Recipe] = {
        ("embed",): vocabulary(embedding, transposed=False),
        ("norm",): whole("model.norm", hidden),
    }
    if not config.tie_word_embeddings:
        recipes[("lm_head",)] = vocabulary("lm_head", transposed=True)
    for i in range(config.num_layers):
        layer, prefix = f"layers_{i}", f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        recipes |= {
            (layer, "attention_norm"): whole(f"{prefix}.input_layernorm", hidden),
            (layer, "mlp_norm"): whole(f"{prefix}.post_attention_layernorm", hidden),
            (layer, "qkv"): outputs(
                {
                    f"{attention}.q_proj": (config.q_size, shards.query),
                    f"{attention}.k_proj": (config.kv_size, shards.key_value),
                    f"{attention}.v_proj": (config.kv_size, shards.key_value),
                }
            ),
            (layer, "o"): inputs(f"{attention}.o_proj", config.q_size, shards.query),
            (layer, "gate_up"): outputs({f"{mlp}.gate_proj": (ffn, shards.ffn), f"{mlp}.up_proj": (ffn, shards.ffn)}),
            (layer, "down"): inputs(f"{mlp}.down_proj", ffn, shards.ffn),
        }
    return recipes


def _build(recipe: _Recipe, tensors: dict[str, _Tensor], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # On a CPU `raw` may be the host buffers themselves, so every path below ends in a new array. Transposing and
    # casting are two programs because XLA's CPU back end is several times slower at both in one.
    shape, place = leaf.shape, leaf.sharding
    if recipe.transposed:
        shape, place = shape[::-1], _file_sharding(place)
    return _finished(_read(recipe, tensors, shape, place), recipe.transposed, leaf)


def _finished(raw: jax.Array, transposed: bool, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A new array, as ``leaf`` says, of one in the file's dtype and order of axes."""
    if transposed:
        # Packed values have an axis more.
        bits = 0 if len(leaf.shape) == raw.ndim else 256 * leaf.shape[0] // raw.shape[1]
        raw = jax.jit(_transposed, static_argnums=1, out_shardings=leaf.sharding)(raw, bits)
    if not transposed or raw.dtype != leaf.dtype:
        raw = jax.jit(_copy_as, static_argnums=1, out_shardings=leaf.sharding)(raw, leaf.dtype)
    assert raw.shape == leaf.shape, (raw.shape, leaf.shape)
    return raw.block_until_ready()


def _transposed(values: jax.Array, packed_bits: int) -> jax.Array:
    return pack_integers(values.T, packed_bits) if packed_bits else values.T


def _unquantized(recipe: _Recipe, dtype: jnp.dtype, module: ParamPath, mesh: ModelMesh | None) -> jax.ShapeDtypeStruct:
    """A projection's parameter ahead of its quantisation."""
    return jax.ShapeDtypeStruct(recipe.joined_shape, dtype, sharding=_sharding((*module, "kernel"), mesh))


def _quantize(kernel: jax.Array, layout: WeightLayout, unit: int, leaves: _Leaves) -> dict[str, jax.Array]:
    """A projection's parameters, from its weights ``[in, out]``; ``layout`` and ``unit`` are as in ``Projection``."""
    # One program a shape, whatever the number of layers.
    places = {name: leaf.sharding for name, leaf in leaves.items()}
    program = jax.jit(quantize_map, static_argnums=(1, 2), out_shardings=places)
    return jax.block_until_ready(program(kernel, layout, unit))


def _convert(recipe: _Recipe, grids: dict[str, Grid], config: ModelConfig, leaves: _Leaves) -> dict[str, jax.Array]:
    """A projection's parameters of the quantised maps that make it."""
    if config.weight_layout == ChannelFp8():
        grids = {name: grid.in_channel_fp8() for name, grid in grids.items()}

    def put(leaf: jax.ShapeDtypeStruct, arrays: Sequence[np.ndarray], unit: int = 1, transposed: bool = False):
        """Joins one array ``[out, in / unit]``, or ``[out]``, of each map."""
        joined = arrays[0]
        if recipe.axis < joined.ndim:
            by_name = dict(zip(grids, arrays, strict=True))
            joined = np.concatenate([_cut(by_name, piece, recipe.axis, unit) for piece in recipe.pieces], recipe.axis)
        place = _file_sharding(leaf.sharding) if transposed else leaf.sharding
        raw = jax.make_array_from_callback(joined.shape, place, lambda index: joined[index])
        return _finished(raw, transposed, leaf)

    params = {}
    for name, leaf in leaves.items():
        if name in ("weight", "kernel", "packed"):
            params[name] = put(leaf, [grid.values for grid in grids.values()], transposed=name != "weight")
        elif name == "channel_scale":
            params[name] = put(leaf, [grid.scales[:, 0] for grid in grids.values()])
        else:
            size = recipe.joined_shape[0] // leaf.shape[0]
            scales, zeros = zip(*(grid.regrouped(size) for grid in grids.values()), strict=True)
            arrays = zeros if name == "group_zero" else scales
            params[name] = put(leaf, arrays, size if recipe.axis == 1 else 1, transposed=True)
    return params


def _cut(arrays: dict[str, np.ndarray], piece: _Piece, axis: int, unit: int) -> np.ndarray:
    """A piece of the arrays along an axis, of which an element stands for ``unit`` of the map's."""
    size = piece.size // unit
    if piece.name is None:
        like = next(iter(arrays.values()))
        return np.zeros([size if at == axis else n for at, n in enumerate(like.shape)], like.dtype)
    first = piece.first // unit
    return arrays[piece.name][(slice(None),) * axis + (slice(first, first + size),)]


@dataclass(frozen=True)
class _QuantizedMap:
    """A linear map whose file is quantised: ``parts`` are the names of its tensors by what they are to it."""

    name: str
    files: QuantizedFiles
    shape: tuple[int, int]
    parts: dict[str, str]

    def read(self, tensors: dict[str, _Tensor]) -> Grid:
        try:
            return self.files.grid({part: _whole(tensors[name]) for part, name in self.parts.items()}, *self.shape)
        except Unreadable as e:
            file = tensors[next(iter(self.parts.values()))].file
            raise UnsupportedModel(f"{file}: {self.name}: {e}") from None


def _whole(tensor: _Tensor) -> np.ndarray:
    array = np.empty(math.prod(tensor.shape), tensor.dtype)
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        _read_into(stream, array.view(np.uint8))
    return array.reshape(tensor.shape)


def _quantized_maps(
    folder: Path, config: ModelConfig, recipes, tensors: dict[str, _Tensor]
) -> dict[str, _QuantizedMap]:
    """The maps that quantised files hold, by the name that their weights would have in others."""
    files = config.weight_files
    maps: dict[str, _QuantizedMap] = {}
    if files is None:
        return maps
    for module, recipe in recipes.items():
        if module[-1] not in PROJECTIONS:
            continue
        for weight, (d_out, d_in) in recipe.shapes.items():
            name = weight.removesuffix(".weight")
            try:
                expected = files.parts(d_out, d_in)
            except Unreadable as e:
                raise UnsupportedModel(f"{folder}: {name}: {e}") from None
            found = {}
            for part, (dtypes, shapes, is_needed) in expected.items():
                tensor = tensors.get(f"{name}.{part}")
                if tensor is None and not is_needed:
                    continue
                if tensor is None:
                    raise UnsupportedModel(
                        f"{folder}: tensor {shown(f'{name}.{part}')} is missing, which quantization_config of "
                        "config.json asks for"
                    )
                if tensor.dtype_name not in dtypes or tensor.shape not in shapes:
                    raise UnsupportedModel(
                        f"{tensor.file}: tensor {shown(f'{name}.{part}')} has dtype {shown(tensor.dtype_name)} and "
                        f"shape {tensor.shape}; config.json and its quantization_config ask for "
                        f"{' or '.join(dtypes)} and {' or '.join(map(str, shapes))}"
                    )
                found[part] = f"{name}.{part}"
            maps[weight] = _QuantizedMap(name, files, (d_out, d_in), found)
    return maps


def _read(recipe: _Recipe, tensors: dict[str, _Tensor], shape: tuple[int, ...], place: Sharding) -> jax.Array:
    """The recipe's pieces, joined, in the file's dtype and order of axes; each device reads its own."""
    dtype = next(tensors[name].dtype for name in recipe.shapes)
    ranges = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        assert index is not None, "a device that was asked for has its part of every parameter"
        ranges[device] = index[recipe.axis].indices(shape[recipe.axis])[:2]
    buffers = {}
    for start, stop in set(ranges.values()):
        local = [stop - start if axis == recipe.axis else size for axis, size in enumerate(shape)]
        raw = _aligned_empty(math.prod(local) * dtype.itemsize)
        buffers[start, stop] = raw.view(dtype).reshape(local)
    copies = []
    for (start, stop), buffer in buffers.items():
        at = 0
        for piece in recipe.pieces:
            # The part of the piece that lies in the buffer.
            first, last = max(at, start), min(at + piece.size, stop)
            if first < last:
                target = buffer[(slice(None),) * recipe.axis + (slice(first - start, last - start),)]
                copies.append((piece.name, piece.first + first - at, target))
            at += piece.size
    for name, first, target in copies:
        if name is None:
            target[...] = 0
        elif recipe.axis == 0:
            _read_rows(tensors[name], first, target)
    if recipe.axis == 1:
        for name in recipe.shapes:
            _read_columns(tensors[name], [(first, target) for source, first, target in copies if source == name])
    arrays = [jax.device_put(buffers[part], device) for device, part in ranges.items()]
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _read_rows(tensor: _Tensor, first: int, target: np.ndarray) -> None:
    """Rows of a tensor from ``first`` on into ``target``, which is contiguous."""
    row_bytes = tensor.nbytes // tensor.shape[0]
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset + first * row_bytes)
        _read_into(stream, target.reshape(-1).view(np.uint8))


def _read_columns(tensor: _Tensor, targets: Sequence[tuple[int, np.ndarray]]) -> None:
    """Columns of a tensor from each ``first`` on into its target; the tensor passes through memory once, in part."""
    num_rows, num_columns = tensor.shape
    block_rows = max(1, _SCRATCH_BYTES // (num_columns * tensor.dtype.itemsize))
    block = np.empty((min(block_rows, num_rows), num_columns), tensor.dtype)
    for row in range(0, num_rows, block_rows):
        part = block[: num_rows - row]
        _read_rows(tensor, row, part)
        for first, target in targets:
            target[row : row + len(part)] = part[:, first : first + target.shape[1]]


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
        except (OSError, _Damaged, UnsupportedModel) as e:
            raise UnsupportedModel(f"{file} is not a whole safetensors file: {e}; fetch it again") from None
        for name in found.keys() & tensors.keys():
            raise UnsupportedModel(
                f"tensor {shown(name)} is both in {tensors[name].file.name} and in {file.name}; add {_INDEX} or delete "
                "one"
            )
        tensors |= found
    return tensors


class _Damaged(Exception):
    """What is wrong with a safetensors file."""


def _read_header(file: Path) -> dict[str, _Tensor]:
    """Reads the table of contents: a little-endian 64-bit length, that much JSON, then the tensors' bytes.

    As safetensors asks, the tensors' bytes follow each other without gaps or overlaps, to the end of the file.

    Raises:
      OSError, _Damaged, UnsupportedModel: it cannot be read, or is not this; the message names the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _Damaged("no header")
        header = parse_json(stream.read(length), "its header")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise _Damaged("__metadata__ is no object")
    data = 8 + length
    tensors = {name: _tensor_of(file, data, name, entry) for name, entry in header.items()}
    at = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise _Damaged(f"the bytes of tensor {shown(name)} do not begin where those before it end")
        at += tensor.nbytes
    if at != size:
        raise _Damaged(f"the tensors end at byte {at} of {size}; the file may have been cut short, or added to")
    return tensors


def _tensor_of(file: Path, data: int, name: str, entry: Any) -> _Tensor:
    """A tensor from its entry in the header; ``data`` is where the tensors' bytes begin."""

    def sizes(field: str, most: int) -> list[int]:
        value = entry.get(field)
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(type(item) is int and 0 <= item < 2**63 for item in value)
        ):
            raise _Damaged(f"{field} of tensor {shown(name)} is {shown(value)}")
        return value

    if not isinstance(entry, dict):
        raise _Damaged(f"the entry of tensor {shown(name)} is {shown(entry)}, no object")
    dtype_name, shape, offsets = entry.get("dtype"), sizes("shape", _MAX_AXES), sizes("data_offsets", 2)
    if not isinstance(dtype_name, str):
        raise _Damaged(f"dtype of tensor {shown(name)} is {shown(dtype_name)}")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _Damaged(f"data_offsets of tensor {shown(name)} is {shown(offsets)}")
    start, end = offsets
    dtype = _DTYPES_OF_PARTS.get(dtype_name)
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - start:
        raise _Damaged(f"tensor {shown(name)} has {end - start} bytes, not those of its shape {tuple(shape)}")
    return _Tensor(file, dtype_name, tuple(shape), data + start, end - start)


def _check_tensors(
    folder: Path, recipes, tensors: dict[str, _Tensor], config: ModelConfig, maps: dict[str, _QuantizedMap]
) -> None:
    """Whether the files hold all that is needed, which ``maps`` do, and nothing else."""
    used = {part for map_ in maps.values() for part in map_.parts.values()}
    for recipe in recipes.values():
        if maps.keys() >= recipe.shapes.keys():
            continue
        first = next(iter(recipe.shapes))
        for name, shape in recipe.shapes.items():
            used.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                raise UnsupportedModel(
                    f"{folder}: tensor {shown(name)} is missing; the files must hold every weight of a Llama with the "
                    "shape that config.json gives"
                )
            if tensor.dtype_name not in _DTYPES:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {shown(name)} has dtype {shown(tensor.dtype_name)}, supported are "
                    f"{', '.join(_DTYPES)}; quantized weights need a quantization_config in config.json, which says how"
                )
            if tensor.shape != shape:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {shown(name)} has shape {tensor.shape}, config.json asks for {shape}"
                )
            if tensor.dtype != tensors[first].dtype:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {shown(name)} has dtype {tensor.dtype_name} but {shown(first)} has "
                    f"{tensors[first].dtype_name}; save the model in one dtype"
                )
    redundant = {_EMBEDDING, _LM_HEAD} if config.tie_word_embeddings else set()
    derived = [_DERIVED, _KV_SCALE] if maps else [_DERIVED]
    extra = sorted(
        name for name in tensors.keys() - used - redundant if not any(pattern.fullmatch(name) for pattern in derived)
    )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UnsupportedModel(
            f"{tensors[extra[0]].file}: tensor {shown(extra[0])}{more} belongs to no layer that config.json describes; "
            "ignoring weights would change the model's answers"
        )
