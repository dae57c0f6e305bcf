"""What a model folder says of its model: the shape of a Llama-family decoder, which tokens end an answer, and how to
sample where a request does not say.

A folder means what transformers 5 makes of it, or is refused with the field's name. A field that is missing has the
default of transformers' config class of its ``model_type``: a Mistral without ``sliding_window`` has one of 4096. (Only
``eos_token_id`` has none; see ``ending_tokens``.)

No JAX here: the scheduler and the memory layout read shapes from this too.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slora_jax.errors import InvalidRequest, UnsupportedModel, shown
from slora_jax.model.json_files import Fields, read_json, read_optional_json
from slora_jax.model.quantization import WeightLayout
from slora_jax.model.quantized_files import QuantizedFiles, read_quantization
from slora_jax.model.rope import LinearRope, Llama3Rope, ProportionalRope, RopeScaling, ShortRope, YarnRope
from slora_jax.request import ANSWER_TOKENS, SamplingParams, check_number

_DEFAULTS = MappingProxyType(
    {
        "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
        "mistral": {
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    }
)
"""Where the config classes of transformers differ in what a missing field means."""

SUPPORTED_MODEL_TYPES = tuple(_DEFAULTS)

_LARGEST = MappingProxyType(
    {
        "vocab_size": 2**24,
        "hidden_size": 2**20,
        "intermediate_size": 2**22,
        "num_hidden_layers": 2**12,
        "num_attention_heads": 2**14,
        "num_key_value_heads": 2**14,
        "head_dim": 2**12,
        "max_position_embeddings": 2**31 - 1,
    }
)
"""Far beyond every model, and near enough that a misread number is refused before anything of its size is made."""

_MAX_THETA = 1e30
_MIN_FACTOR, _MAX_FACTOR = 1e-6, 1e9

_DONE_WITHOUT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        # With biases, or other norms.
        **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias"), (False, None)),
        **dict.fromkeys(("attention_qkv_bias", "attention_out_bias", "qk_norm", "use_qk_norm"), (False, None)),
        # With other scales.
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1, None)),
        **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_emb", "scale_depth"), (None,)),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (None,)),
        # With other attention, or another order of computing.
        **dict.fromkeys(("attention_chunk_size", "per_layer_config", "no_rope_layers", "kv_lora_rank"), (None, [], {})),
        **dict.fromkeys(("alibi", "parallel_attn", "use_parallel_residual", "add_cross_attention"), (False, None)),
        **dict.fromkeys(("is_encoder_decoder", "rope_interleave", "rope_interleaved"), (False, None)),
        "is_causal": (True, None),
        "position_embedding_type": ("rope", "rotary", None),
        # With experts.
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (0, None)),
        # From other files.
        **dict.fromkeys(("transformers_weights", "configuration_files"), (None, [], {})),
        "compression_config": (None,),  # what compressed-tensors once called quantization_config
    }
)
"""Fields that say how else a model computes, each with the values that mean: not at all."""

_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama decoder.

    Attributes:
      vocab_size, hidden_size, num_layers, intermediate_size: as in Llama.
      num_heads, num_kv_heads, head_dim: query heads, KV heads (equal for multi-head attention), and the width
        of each; ``num_heads * head_dim`` need not be ``hidden_size``.
      max_position_embeddings: longest context in tokens.
      rope_theta, rope_scaling: base of the rotary embedding, and its variant; None is the plain one.
      rms_norm_eps: epsilon of RMSNorm.
      tie_word_embeddings: the output projection is the embedding, transposed.
      bos_token_id, eos_token_ids: special tokens; any of ``eos_token_ids`` ends a completion.
      dtype: the checkpoint's own dtype name.
      weight_layout: how devices hold the projections' weights; None in the dtype of all else.
      weight_files: how files hold them; None as they were trained.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    weight_layout: WeightLayout | None = None
    weight_files: QuantizedFiles | None = None

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UnsupportedModel(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width in elements of one token's K (or V) in one layer: the pool's row width W."""
        return self.num_kv_heads * self.head_dim

    def num_params(self) -> int:
        """Parameters of the base model."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + embeddings + self.hidden_size

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the parameters on a device, ``itemsize`` for each that is not quantised."""
        if self.weight_layout is None:
            return self.num_params() * itemsize
        hidden, ffn = self.hidden_size, self.intermediate_size
        maps = (
            (hidden, self.q_size + 2 * self.kv_size, 0),
            (self.q_size, hidden, self.head_dim),
            (hidden, 2 * ffn, 0),
            (ffn, hidden, ffn),
        )
        others = self.num_params() - self.num_layers * sum(d_in * d_out for d_in, d_out, _ in maps)
        quantized = sum(self.weight_layout.num_bytes(*map_) for map_ in maps)
        return self.num_layers * quantized + others * itemsize

    def num_step_params(self) -> int:
        """Parameters that a step reads: all but an embedding table that is not the output's too."""
        return self.num_params() - (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)

    @classmethod
    def from_folder(cls, folder: Path, max_model_len: int | None = None) -> "ModelConfig":
        """Reads ``config.json``, and from ``generation_config.json`` the EOS ids; see ``ending_tokens``.

        Args:
          max_model_len: the longest context that will be asked for, where that is less than the model's: a model may
            be refused for what it does beyond.

        Raises:
          UnsupportedModel: a field asks for something not computed here; the message names file and field.
        """
        file = folder / "config.json"
        config = cls.from_hf(read_json(file), max_model_len, str(file))
        file = folder / "generation_config.json"
        generation = Fields(read_optional_json(file), str(file))
        if not generation.has("eos_token_id"):
            return config
        return dataclasses.replace(config, eos_token_ids=generation.tokens("eos_token_id", None, config.vocab_size))

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], max_model_len: int | None = None, source: str = "config.json"
    ) -> "ModelConfig":
        """Builds from a parsed ``config.json``, which messages call ``source``; see ``from_folder``."""
        fields = Fields(config, source)
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _DEFAULTS:
            raise UnsupportedModel(
                f"{source}: model_type {shown(model_type)} is not supported; "
                f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        defaults = _DEFAULTS[model_type]

        def size(name: str, default: int) -> int:
            return fields.integer(name, default, 1, _LARGEST[name])

        def optional_size(name: str, default: int | None = None) -> int | None:
            return fields.integer(name, default, 1, _LARGEST[name], null=True)

        _refuse_what_is_not_done(fields)
        vocab_size, hidden_size = size("vocab_size", 32000), size("hidden_size", 4096)
        num_heads = size("num_attention_heads", 32)
        num_kv_heads = optional_size("num_key_value_heads", defaults.get("num_key_value_heads")) or num_heads
        if num_heads % num_kv_heads:
            raise fields.refuse(
                "num_attention_heads",
                f" ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})",
            )
        head_dim = optional_size("head_dim")
        if head_dim is None:
            if hidden_size % num_heads:
                raise fields.refuse(
                    "hidden_size", f" ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise fields.refuse("head_dim", f" must be even for rotary embedding, got {head_dim}")
        max_positions = size("max_position_embeddings", defaults["max_position_embeddings"])
        context = min(max_positions, max_model_len or max_positions)
        _check_attention(fields, defaults.get("sliding_window"), context)
        theta, scaling = _rope(fields, head_dim, max_positions, context)
        bos = fields.tokens("bos_token_id", 1, vocab_size)
        num_layers = size("num_hidden_layers", 32)
        tied = fields.boolean("tie_word_embeddings", False)
        quantization = fields.object("quantization_config")
        files = None
        if quantization is not None:
            files = read_quantization(quantization, projection_names(num_layers), needs_head=not tied)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size", defaults["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, 0.0, 1.0),
            tie_word_embeddings=tied,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=fields.tokens("eos_token_id", None, vocab_size),
            dtype=_dtype(fields),
            weight_layout=None if files is None else files.layout,
            weight_files=files,
        )


def projection_names(num_layers: int) -> list[str]:
    """Of all linear maps of the layers, as files call them."""
    maps = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return [f"model.layers.{i}.{name}" for i in range(num_layers) for name in maps]


def ending_tokens(config: ModelConfig, tokenizer_ids: Iterable[int]) -> tuple[int, ...]:
    """The tokens any of which ends an answer: those of the model, and the tokenizer's own.

    The model's are ``eos_token_id`` of ``generation_config.json``, or of ``config.json`` where that file or field is
    missing. So ``generate`` of transformers does, but that a ``generation_config.json`` which names none makes it go on
    to the token limit; it reads ``config.json`` itself here, so that the default of the config class, 2, ends nothing,
    and does not look at the tokenizer. vLLM ends at the tokenizer's ``eos_token`` and at those of
    ``generation_config.json``. Here any of all these ends an answer: a model was taught at least one of them, and
    ``ignore_eos`` leaves all out.
    """
    return tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer_ids)))


def default_sampling(folder: Path) -> Mapping[str, Any]:
    """Fields of ``SamplingParams`` that ``generation_config.json`` gives to requests that do not say.

    As in vLLM these are ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and, from
    ``max_new_tokens``, ``max_tokens``; null is as good as missing, and ``top_k`` -1 keeps all tokens. ``do_sample`` is
    not read, in vLLM neither: false means greedy to transformers, but a file of a model that is meant to be sampled
    often says nothing, which is false too. A folder without the file gives none.

    Raises:
      UnsupportedModel: a value that no request could have; the message names file and field.
    """
    file = folder / "generation_config.json"
    fields = Fields(read_optional_json(file), str(file))
    defaults = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"):
        if not fields.has(name):
            continue
        value = fields.values[name]
        if name == "top_k" and value == -1:
            value = 0
        field = "max_tokens" if name == "max_new_tokens" else name
        try:
            SamplingParams(**{field: value})
            if field == "max_tokens":
                check_number(field, value, ANSWER_TOKENS)
        except (InvalidRequest, OverflowError):
            # Whatever stands there is shown short.
            raise fields.refuse(
                name, f" is {shown(value)}, which no request could ask for; correct it, or give --no-generation-config"
            ) from None
        defaults[field] = value
    return MappingProxyType(defaults)


def _refuse_what_is_not_done(fields: Fields) -> None:
    for name, neutral in _DONE_WITHOUT.items():
        value = fields.values.get(name)
        if not any(type(value) in (type(one), float) and value == one for one in neutral):
            raise fields.refuse(
                name,
                f"={shown(value)} is not supported; a plain Llama is computed here, from bf16, fp16 or fp32 weights",
            )
    act = fields.values.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise fields.refuse("hidden_act", f" {shown(act)} is not supported; only 'silu', or 'swish', is")
    fields.integer("pretraining_tp", 1, 1, 2**31, null=True)  # how it was trained: the weights are the whole ones


def _check_attention(fields: Fields, default_window: int | None, context: int) -> None:
    """Refuses a window that a context could outgrow, and layers of other kinds.

    ``use_sliding_window: false`` alone says nothing to transformers' Llama and Mistral.
    """
    window = fields.integer("sliding_window", default_window, 1, sys.maxsize, null=True)
    if window is not None and window < context:
        missing = "" if "sliding_window" in fields.values else ", which is what it means to leave it out,"
        raise fields.refuse(
            "sliding_window",
            f"={window}{missing} is not supported for contexts of {context} tokens: attention here is full causal; "
            f"set max_model_len to {window} or less",
        )
    fields.boolean("use_sliding_window", False)
    layers = fields.values.get("layer_types")
    done = ("full_attention", "attention", *(["sliding_attention"] if window else []))
    if layers is not None and not (isinstance(layers, list) and all(layer in done for layer in layers)):
        raise fields.refuse("layer_types", f"={shown(layers)} is not supported; every layer has full attention here")


def _dtype(fields: Fields) -> str:
    name = next((name for name in ("dtype", "torch_dtype") if fields.has(name)), None)
    if name is None:
        return "bfloat16"
    value = fields.values[name]
    dtype = value.removeprefix("torch.") if isinstance(value, str) else None
    if dtype not in ("bfloat16", "float16", "float32"):
        raise fields.refuse(name, f" {shown(value)} is not supported; supported are bfloat16, float16 and float32")
    return dtype


def _rope(fields: Fields, head_dim: int, max_positions: int, context: int) -> tuple[float, RopeScaling | None]:
    """Rope base and variant, from ``rope_scaling`` or else from ``rope_parameters``, as transformers 5 takes them.

    ``rope_theta`` and ``partial_rotary_factor`` within either object win over those beside it, but
    ``original_max_position_embeddings`` beside it wins over the one within.
    """
    scaling, parameters = fields.object("rope_scaling"), fields.object("rope_parameters")
    inner = scaling or parameters or Fields({}, fields.source, "rope_parameters.")
    for key, value in inner.values.items():
        if isinstance(value, Mapping):
            raise inner.refuse(key, " is not supported; every layer has the same rotary embedding here")

    def beside(key: str) -> Fields:
        return inner if key in inner.values else fields

    theta = beside("rope_theta").number("rope_theta", 10000.0, 1.0, _MAX_THETA)
    share = beside("partial_rotary_factor").number("partial_rotary_factor", 1.0, 0.0, 1.0, null=True)
    share = 1.0 if share is None else share
    rope_type = inner.values.get("rope_type", inner.values.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise inner.refuse(
            "rope_type", f" {shown(rope_type)} is not supported; supported are {', '.join(map(repr, _ROPE_TYPES))}"
        )
    if share != 1.0 and rope_type != "proportional":
        raise beside("partial_rotary_factor").refuse(
            "partial_rotary_factor", f"={share} is not supported; rotary embedding covers the head"
        )
    if inner.has("mrope_section"):
        raise inner.refuse("mrope_section", " is not supported; positions are those of a text")

    def need(key: str) -> None:
        if key not in inner.values:
            raise inner.refuse(key, f" is missing for rope_type {rope_type!r}")

    def factor(key: str = "factor") -> float:
        need(key)
        value = inner.number(key, None, _MIN_FACTOR, _MAX_FACTOR)
        assert value is not None, "a field that is there was not read"
        return value

    def original() -> int:
        name = "original_max_position_embeddings"
        return (fields if name in fields.values else inner).integer(name, max_positions, 2, 2**31 - 1)

    match rope_type:
        case "linear":
            return theta, LinearRope(factor())
        case "proportional":
            scale = inner.number("factor", 1.0, _MIN_FACTOR, _MAX_FACTOR)
            return theta, ProportionalRope(share, scale)
        case "llama3":
            low, high = factor("low_freq_factor"), factor("high_freq_factor")
            if high <= low:
                raise inner.refuse("high_freq_factor", f" ({high}) must be above low_freq_factor ({low})")
            return theta, Llama3Rope(factor(), low, high, original())
        case "yarn":
            need("factor")
            return theta, _yarn(inner, theta, head_dim, max_positions, original())
        case "longrope":
            return theta, _longrope(inner, head_dim, max_positions, original(), context, need)
        case "dynamic":
            factor()  # of contexts beyond max_position_embeddings, which are not served; within, it is the plain one
    return theta, None


def _yarn(inner: Fields, theta: float, head_dim: int, max_positions: int, original: int) -> YarnRope:
    if theta == 1.0:
        raise inner.refuse("rope_theta", " must be above 1 for rope_type 'yarn'")
    factor = inner.number("factor", None, _MIN_FACTOR, _MAX_FACTOR, null=True) or max_positions / original

    def optional(key: str, default: float, low: float) -> float:
        return inner.number(key, default, low, _MAX_FACTOR, null=True) or default

    def gain(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = optional("mscale", 0.0, 0.0), optional("mscale_all_dim", 0.0, 0.0)
    given = inner.number("attention_factor", None, 0.0, _MAX_FACTOR, null=True)
    if given is None:
        given = gain(mscale) / gain(mscale_all_dim) if mscale and mscale_all_dim else gain(1.0)
    return YarnRope.of(
        theta,
        head_dim,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=optional("beta_fast", 32.0, _MIN_FACTOR),
        beta_slow=optional("beta_slow", 1.0, _MIN_FACTOR),
        truncate=inner.boolean("truncate", True),
        gain=given,
    )


def _longrope(
    inner: Fields, head_dim: int, max_positions: int, original: int, context: int, need: Callable[[str], None]
) -> ShortRope:
    for key in ("short_factor", "long_factor"):
        need(key)
    short, _ = (inner.numbers(key, head_dim // 2, _MIN_FACTOR, _MAX_FACTOR) for key in ("short_factor", "long_factor"))
    factor = inner.number("factor", None, _MIN_FACTOR, _MAX_FACTOR, null=True) or max_positions / original
    gain = inner.number("attention_factor", None, 0.0, _MAX_FACTOR, null=True)
    if gain is None:
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if context > original:
        raise inner.refuse(
            "rope_type",
            f" 'longrope' is supported within the original context of {original} tokens only: beyond, transformers "
            f"turns tokens otherwise that are cached already; set max_model_len to {original} or less",
        )
    return ShortRope(short, gain)
