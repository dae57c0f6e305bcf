"""Checkpoints that are quantised already: which tensors hold a linear map, and what they mean. NumPy, no JAX.

``config.json`` says how, in ``quantization_config``: compressed-tensors, block fp8 (``quant_method`` "fp8"), GPTQ or
AWQ. Each is read into one form, ``Grid``. What does not fit is refused with the file and the field.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from slora_jax.errors import UnsupportedModel, shown
from slora_jax.model.json_files import Fields
from slora_jax.model.quantization import ChannelFp8, GroupedWeights, WeightLayout

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST_FP8 = np.float32(ml_dtypes.finfo(FP8).max)
_LEAST_AMPLITUDE = np.float32(1e-30)
_SCALES = ("F32", "F16", "BF16")
_METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MAX_GROUP = 2**20


@dataclass(frozen=True)
class Grid:
    """A linear map as it was quantised: ``(values - zeros) * scales``, each scale and zero for a group of inputs.

    Attributes:
      values: ``[out, in]`` int8 or float8_e4m3fn.
      scales: ``[out, G]`` float32.
      zeros: ``[out, G]`` int8, or None.
      group_size: inputs of a group; the last one may have fewer.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    group_size: int

    def regrouped(self, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zeros ``[out, in / size]`` of smaller groups; ``size`` divides ``group_size`` and the inputs."""
        group = np.arange(0, self.values.shape[1], size) // self.group_size
        return self.scales[:, group], None if self.zeros is None else self.zeros[:, group]

    def in_channel_fp8(self) -> "Grid":
        """The same in float8_e4m3fn with a scale for each output: rounded to it where it is not so already."""
        if self.values.dtype == FP8 and self.zeros is None and self.scales.shape[1] == 1:
            return self
        weights = self.dequantized()
        scales = np.maximum(np.abs(weights).max(axis=1, keepdims=True), _LEAST_AMPLITUDE) / _LARGEST_FP8
        return Grid((weights / scales).astype(FP8), scales, None, weights.shape[1])

    def dequantized(self) -> np.ndarray:
        """Weights ``[out, in]`` float32."""
        scales, zeros = self.regrouped(1)
        values = self.values.astype(np.float32)
        return (values if zeros is None else values - zeros) * scales


class Part(NamedTuple):
    """A tensor that belongs to a linear map.

    Attributes:
      dtypes: safetensors' names of those that it may have.
      shapes: that it may have.
      is_needed: the map cannot be read without it.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_needed: bool = True


class Unreadable(Exception):
    """What in a map's tensors cannot be computed; without file and map, which the reader knows."""


class QuantizedFiles(Protocol):
    """How the files of a model hold its quantised linear maps."""

    @property
    def layout(self) -> WeightLayout:
        """How devices hold them."""
        ...

    def parts(self, d_out: int, d_in: int) -> Mapping[str, Part]:
        """The tensors of a map, by what follows the map's name and a dot.

        Raises:
          Unreadable: no map of this shape can be stored so.
        """
        ...

    def grid(self, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Grid:
        """The map that they hold; those that are not needed may be missing.

        Raises:
          Unreadable: they hold something that is not computed here.
        """
        ...


@dataclass(frozen=True, slots=True)
class ElementFiles:
    """A tensor ``weight`` with an element for each value, beside scales for blocks of it.

    Attributes:
      values: dtype of the elements.
      block: rows and columns that share a scale; 0 for all of them.
      scale: name of the tensor of scales.
      rounds_activations: the model was made for activations that are rounded to fp8, too.
    """

    values: str
    block: tuple[int, int]
    scale: str = "weight_scale"
    rounds_activations: bool = True

    @property
    def layout(self) -> WeightLayout:
        if self.values == "int8":
            return GroupedWeights("int8", self.block[1] or None)
        by_channel = not self.block[1]
        return (
            ChannelFp8()
            if by_channel and self.rounds_activations
            else GroupedWeights("float8_e4m3fn", self.block[1] or None)
        )

    def parts(self, d_out: int, d_in: int) -> Mapping[str, Part]:
        rows, columns = (-(-size // (block or size)) for size, block in zip((d_out, d_in), self.block, strict=True))
        shapes: tuple[tuple[int, ...], ...] = ((rows, columns),)
        if rows == columns == 1:
            shapes += ((1,), ())
        elif columns == 1:
            shapes += ((rows,),)
        dtype = "I8" if self.values == "int8" else "F8_E4M3"
        return {
            "weight": Part((dtype,), ((d_out, d_in),)),
            self.scale: Part(_SCALES, shapes),
            "weight_zero_point": Part(("I8", dtype), shapes, is_needed=False),
            # Of activations, whose scales are found anew for each token here.
            "input_scale": Part(_SCALES, ((1,), (), (1, 1)), is_needed=False),
            "input_zero_point": Part(("I8", "F8_E4M3"), ((1,), (), (1, 1)), is_needed=False),
        }

    def grid(self, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Grid:
        _check_no_zeros(tensors.get("weight_zero_point"))
        rows, columns = (block or size for size, block in zip((d_out, d_in), self.block, strict=True))
        scales = tensors[self.scale].astype(np.float32)
        scales = scales.reshape(-(-d_out // rows), -(-d_in // columns))
        return Grid(tensors["weight"], np.repeat(scales, rows, axis=0)[:d_out], None, columns)


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """compressed-tensors' ``pack-quantized``: integers packed along the inputs, as 32-bit words of which the lowest
    bits come first, each less by half its range.

    Attributes:
      bits: of an integer, 4 or 8.
      group_size: inputs that share a scale; None for all of them.
      has_zeros: there are zero points.
    """

    bits: int
    group_size: int | None
    has_zeros: bool

    @property
    def layout(self) -> WeightLayout:
        return GroupedWeights("int4" if self.bits == 4 else "int8", self.group_size, self.has_zeros)

    def parts(self, d_out: int, d_in: int) -> Mapping[str, Part]:
        in_word = 32 // self.bits
        _check_groups(d_in, self.group_size)
        num_groups = d_in // (self.group_size or d_in)
        zeros = Part(("I32",), ((-(-d_out // in_word), num_groups),)) if self.has_zeros else None
        return {
            "weight_packed": Part(("I32",), ((d_out, -(-d_in // in_word)),)),
            "weight_scale": Part(_SCALES, ((d_out, num_groups), *([(d_out,)] if num_groups == 1 else []))),
            "weight_shape": Part(("I64", "I32"), ((2,),), is_needed=False),
            "weight_zero_point": zeros or Part(("I8",), ((d_out, num_groups),), is_needed=False),
            "weight_g_idx": Part(("I32",), ((d_in,),), is_needed=False),
        }

    def grid(self, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Grid:
        group_size = self.group_size or d_in
        _check_order(tensors.get("weight_g_idx"), group_size, "weight_g_idx", "actorder")
        scales = tensors["weight_scale"].astype(np.float32).reshape(d_out, -1)
        zeros = tensors.get("weight_zero_point")
        if not self.has_zeros:
            _check_no_zeros(zeros)
            zeros = None
        else:
            assert zeros is not None, "a tensor that is needed was not read"
            zeros = np.ascontiguousarray(_unpacked(zeros.T, self.bits)[:, :d_out].T)
        return Grid(_unpacked(tensors["weight_packed"], self.bits)[:, :d_in], scales, zeros, group_size)


@dataclass(frozen=True, slots=True)
class GptqFiles:
    """GPTQ: integers packed along the inputs, zero points along the outputs; in the older format less by one.

    Attributes:
      bits: of an integer, 4 or 8.
      group_size: inputs that share a scale; None for all of them.
      zeros_less_one: ``checkpoint_format`` is "gptq", not "gptq_v2".
    """

    bits: int
    group_size: int | None
    zeros_less_one: bool

    @property
    def layout(self) -> WeightLayout:
        return GroupedWeights("int4" if self.bits == 4 else "int8", self.group_size, has_zeros=True)

    def parts(self, d_out: int, d_in: int) -> Mapping[str, Part]:
        in_word = 32 // self.bits
        _check_groups(d_in, self.group_size)
        _check_words(in_word, d_in, d_out)
        num_groups = d_in // (self.group_size or d_in)
        return {
            "qweight": Part(("I32",), ((d_in // in_word, d_out),)),
            "qzeros": Part(("I32",), ((num_groups, d_out // in_word),)),
            "scales": Part(_SCALES, ((num_groups, d_out),)),
            "g_idx": Part(("I32",), ((d_in,),), is_needed=False),
            "bias": Part(_SCALES, ((d_out,),), is_needed=False),
        }

    def grid(self, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Grid:
        group_size = self.group_size or d_in
        _check_order(tensors.get("g_idx"), group_size, "g_idx", "desc_act")
        _check_bias(tensors.get("bias"))
        zeros = _unpacked(tensors["qzeros"], self.bits)
        if self.zeros_less_one:
            zeros = _one_more(zeros, self.bits)
        values = _unpacked(np.ascontiguousarray(tensors["qweight"].T), self.bits)
        scales = tensors["scales"].astype(np.float32)
        return Grid(values, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), group_size)


@dataclass(frozen=True, slots=True)
class AwqFiles:
    """AWQ's "gemm" version: 4-bit integers and zero points packed along the outputs, in an order of its own.

    ``group_size`` inputs share a scale; None for all of them.
    """

    group_size: int | None

    @property
    def layout(self) -> WeightLayout:
        return GroupedWeights("int4", self.group_size, has_zeros=True)

    def parts(self, d_out: int, d_in: int) -> Mapping[str, Part]:
        _check_groups(d_in, self.group_size)
        _check_words(8, d_out)
        num_groups = d_in // (self.group_size or d_in)
        return {
            "qweight": Part(("I32",), ((d_in, d_out // 8),)),
            "qzeros": Part(("I32",), ((num_groups, d_out // 8),)),
            "scales": Part(_SCALES, ((num_groups, d_out),)),
            "bias": Part(_SCALES, ((d_out,),), is_needed=False),
        }

    def grid(self, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Grid:
        _check_bias(tensors.get("bias"))
        values, zeros = (self._in_order(tensors[name]) for name in ("qweight", "qzeros"))
        scales = tensors["scales"].astype(np.float32)
        return Grid(values, np.ascontiguousarray(scales.T), zeros, self.group_size or d_in)

    def _in_order(self, packed: np.ndarray) -> np.ndarray:
        """``[out, n]`` of words ``[n, out / 8]``."""
        stored = _unpacked(packed, 4).reshape(len(packed), -1, 8)
        ordered = np.empty_like(stored)
        ordered[:, :, _AWQ_ORDER] = stored
        return np.ascontiguousarray(ordered.reshape(len(packed), -1).T)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The integers of words int32 ``[n, m]``, each less by half its range: int8 ``[n, m * 32 / bits]``."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return (stored ^ 0x80).view(np.int8)
    values = np.empty((*stored.shape, 2), np.int8)
    np.bitwise_and(stored, 0xF, out=values[..., 0], casting="unsafe")
    np.right_shift(stored, 4, out=values[..., 1], casting="unsafe")
    values -= 8
    return values.reshape(len(stored), -1)


def _one_more(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Adds one to integers of so many bits, the largest of which becomes the smallest."""
    half = 2 ** (bits - 1)
    return ((zeros.astype(np.int16) + half + 1) % (2 * half) - half).astype(np.int8)


def _check_groups(d_in: int, group_size: int | None) -> None:
    if group_size is not None and d_in % group_size:
        raise Unreadable(f"{d_in} inputs are not a multiple of group_size {group_size}")


def _check_words(in_word: int, *sizes: int) -> None:
    for size in sizes:
        if size % in_word:
            raise Unreadable(f"a width of {size} is not a multiple of the {in_word} integers of a word")


def _check_order(order: np.ndarray | None, group_size: int, tensor: str, field: str) -> None:
    if order is not None and not np.array_equal(order, np.arange(len(order)) // group_size):
        raise Unreadable(
            f"tensor {tensor} puts inputs into groups in the order of their activations ({field}), which is not "
            "supported: groups are consecutive inputs here; quantize the model without it"
        )


def _check_no_zeros(zeros: np.ndarray | None) -> None:
    if zeros is not None and zeros.astype(np.float32).any():
        raise Unreadable("weight_zero_point is not zero, though quantization_config calls the weights symmetric")


def _check_bias(bias: np.ndarray | None) -> None:
    if bias is not None and bias.astype(np.float32).any():
        raise Unreadable("bias is not zero, and a plain Llama without biases is computed here")


def read_quantization(fields: Fields, maps: Sequence[str], needs_head: bool) -> QuantizedFiles:
    """What a ``quantization_config`` says of the files.

    Args:
      fields: the object.
      maps: names of all linear maps that are quantised here, such as "model.layers.0.mlp.down_proj".
      needs_head: there is an output projection that is not the embedding.

    Raises:
      UnsupportedModel: it asks for what is not done here; the message names the field.
    """
    method = fields.values.get("quant_method")
    if method not in _METHODS:
        raise fields.refuse(
            "quant_method",
            f" {shown(method)} is not supported; supported are {', '.join(_METHODS)}, and plain bf16, fp16 or fp32 "
            "weights",
        )
    files: QuantizedFiles
    if method == "compressed-tensors":
        files, left_out = _compressed(fields), "ignore"
    elif method == "fp8":
        files, left_out = _block_fp8(fields), "modules_to_not_convert"
    elif method == "gptq":
        files, left_out = _gptq(fields), ""
    else:
        files, left_out = _awq(fields), "modules_to_not_convert"
    if left_out:
        _check_left_out(fields, left_out, maps, needs_head)
    return files


def _compressed(fields: Fields) -> QuantizedFiles:
    for name in ("sparsity_config", "transform_config"):
        other = fields.object(name)
        if other is not None and other.values.get("format") != "dense":
            raise fields.refuse(name, f"={shown(fields.values[name])} is not supported; leave the weights dense")
    status = fields.values.get("quantization_status", "compressed")
    if status != "compressed":
        raise fields.refuse("quantization_status", f" must be 'compressed', got {shown(status)}")
    groups = fields.object("config_groups")
    if groups is None or len(groups.values) != 1:
        raise fields.refuse(
            "config_groups",
            f" must be one group, in which all projections are quantised alike, got "
            f"{0 if groups is None else len(groups.values)}",
        )
    (name,) = groups.values
    group = groups.object(name)
    if group is None:
        raise groups.refuse(name, " must not be empty")
    if group.values.get("targets") != ["Linear"]:
        raise group.refuse("targets", f" must be ['Linear'], got {shown(group.values.get('targets'))}")
    form = group.values.get("format") or fields.values.get("format")
    if form not in _FORMATS:
        raise fields.refuse("format", f" {shown(form)} is not supported; supported are {', '.join(_FORMATS)}")
    weights, activations = group.object("weights"), group.object("input_activations")
    if weights is None:
        raise group.refuse("weights", " is missing: without quantised weights there is nothing to read")
    kind, bits = _one_of(weights, "type", ("int", "float"), "int"), weights.integer("num_bits", 8, 1, 64)
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "group", "block"), "tensor")
    order = weights.values.get("actorder")
    if order not in (None, False, "weight", "static"):
        raise weights.refuse(
            "actorder",
            f" {shown(order)} is not supported: groups are consecutive inputs here; quantize the model with 'weight', "
            "or without it",
        )
    symmetric = weights.boolean("symmetric", True)
    group_size = weights.integer("group_size", None, 1, _MAX_GROUP, null=True) if strategy == "group" else None
    if strategy == "group" and group_size is None:
        raise weights.refuse("group_size", " is missing for strategy 'group'")
    if activations is not None:
        rounded = (activations.values.get("type", "int"), activations.values.get("num_bits", 8))
        if rounded != (kind, 8):
            raise activations.refuse("num_bits", f" and type {shown(rounded[::-1])} do not go with {kind} weights")
    if form == "pack-quantized":
        if kind != "int" or bits not in (4, 8):
            raise weights.refuse("num_bits", f" {bits} of type {kind!r} is not supported; 4 or 8 of type 'int' are")
        if strategy not in ("channel", "group"):
            raise weights.refuse("strategy", f" {strategy!r} is not supported for packed weights")
        return PackedFiles(bits, group_size, not symmetric)
    if bits != 8:
        raise weights.refuse("num_bits", f" {bits} is not supported in format {form!r}; 8 is")
    if not symmetric:
        raise weights.refuse("symmetric", f"=false is not supported in format {form!r}; packed weights may be that")
    block = {"tensor": (0, 0), "channel": (1, 0), "group": (1, group_size or 0)}.get(strategy) or _block(
        weights, "block_structure"
    )
    return ElementFiles("int8" if kind == "int" else "float8_e4m3fn", block, rounds_activations=activations is not None)


def _block_fp8(fields: Fields) -> QuantizedFiles:
    for name, only in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        _one_of(fields, name, (only,), only)
    return ElementFiles("float8_e4m3fn", _block(fields, "weight_block_size"), "weight_scale_inv")


def _block(fields: Fields, name: str) -> tuple[int, int]:
    block = fields.values.get(name)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and 0 < size <= _MAX_GROUP for size in block)
    ):
        raise fields.refuse(name, f" must be two integers above 0, rows and columns of a block, got {shown(block)}")
    return block[0], block[1]


def _gptq(fields: Fields) -> QuantizedFiles:
    version = _one_of(fields, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    _one_of(fields, "pack_dtype", ("int32",), "int32")
    for name in ("lm_head", "is_marlin_format"):
        if fields.has(name) and fields.boolean(name, False):
            raise fields.refuse(name, "=true is not supported")
    if fields.values.get("dynamic"):
        raise fields.refuse("dynamic", " is not supported: all projections are quantised alike here")
    # Whether desc_act has changed the order of inputs is seen in the files.
    return GptqFiles(_bits(fields, (4, 8)), _group_size(fields), version == "gptq")


def _awq(fields: Fields) -> QuantizedFiles:
    version = fields.values.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.refuse("version", f" {shown(version)} is not supported; 'gemm' is")
    if not fields.boolean("zero_point", True):
        raise fields.refuse("zero_point", "=false is not supported; AWQ's kernels need zero points too")
    _bits(fields, (4,))
    return AwqFiles(_group_size(fields))


def _bits(fields: Fields, known: tuple[int, ...]) -> int:
    name = "w_bit" if "bits" not in fields.values and "w_bit" in fields.values else "bits"
    bits = fields.integer(name, None, 1, 64)
    if bits is None or bits not in known:
        raise fields.refuse(name, f"={bits} is not supported; {' and '.join(map(str, known))} are")
    return bits


def _group_size(fields: Fields) -> int | None:
    name = "q_group_size" if "group_size" not in fields.values and "q_group_size" in fields.values else "group_size"
    size = fields.integer(name, 128, -1, _MAX_GROUP)
    if size == 0:
        raise fields.refuse(name, " must be above 0, or -1 for all inputs, got 0")
    return None if size == -1 else size


def _one_of(fields: Fields, name: str, known: tuple[str, ...], default: str) -> str:
    value = fields.values.get(name)
    value = default if value is None else value
    if value not in known:
        raise fields.refuse(name, f" {shown(value)} is not supported; supported are {', '.join(map(repr, known))}")
    return value


def _check_left_out(fields: Fields, name: str, maps: Sequence[str], needs_head: bool) -> None:
    """Refuses a list of what is not quantised that names a projection, or leaves the output projection out."""
    listed: Any = fields.values.get(name) or []
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise fields.refuse(name, f" must be a list of names, got {shown(listed)}")
    for item in listed:
        found = next((map_ for map_ in maps if _names(item, map_)), None)
        if found is not None:
            raise fields.refuse(
                name, f" has {shown(item)}, which leaves {found} as it is; all projections are quantised alike here"
            )
    if needs_head and name == "ignore" and not any(_names(item, "lm_head") for item in listed):
        raise fields.refuse(name, " must have 'lm_head': a quantised output projection is not supported")


def _names(item: str, map_: str) -> bool:
    """Whether an entry of such a list means a linear map: its name, a part that ends at dots, a class or a pattern."""
    if item.startswith("re:"):
        try:
            return re.match(item.removeprefix("re:"), map_) is not None
        except (re.error, RecursionError, OverflowError) as e:
            raise UnsupportedModel(f"quantization_config: {shown(item)} is not a regular expression: {e}") from None
    return item == "Linear" or f".{item}." in f".{map_}."
