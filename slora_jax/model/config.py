"""A Llama-family model's shape, read from a Hugging Face ``config.json``.

No JAX here: the scheduler and the memory layout read shapes from this too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora_jax.errors import UnsupportedModel

SUPPORTED_MODEL_TYPES = ("llama", "mistral")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent rope scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama decoder.

    Attributes:
      vocab_size, hidden_size, num_layers, intermediate_size: as in Llama.
      num_heads, num_kv_heads, head_dim: query heads, KV heads (equal for multi-head attention), and the width
        of each; ``num_heads * head_dim`` need not be ``hidden_size``.
      max_position_embeddings: longest context in tokens.
      rope_theta, rope_scaling: rotary embedding base and optional llama3 scaling.
      rms_norm_eps: epsilon of RMSNorm.
      tie_word_embeddings: the output projection is the embedding, transposed.
      bos_token_id, eos_token_ids: special tokens; any of ``eos_token_ids`` ends a completion.
      dtype: the checkpoint's own dtype name.
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
            if not isinstance(value, int) or value < 1:
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

    def num_step_params(self) -> int:
        """Parameters that a step reads: all but an embedding table that is not the output's too."""
        return self.num_params() - (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads ``config.json`` (and ``generation_config.json`` for more EOS ids).

        Raises:
          UnsupportedModel: a field asks for something not computed here; the message names the field.
        """
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            extra_eos = _read_json(generation).get("eos_token_id")
            config = dict(config, eos_token_id=_merge_ids(config.get("eos_token_id"), extra_eos))
        return cls.from_hf(config)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Builds from a parsed ``config.json``; see ``from_folder``."""
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedModel(
                f"config.json: model_type {model_type!r} is not supported; "
                f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise UnsupportedModel(f"config.json: {name}=true is not supported; projections here have no bias")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"config.json: hidden_act {config['hidden_act']!r} is not supported; only 'silu' is")
        if config.get("quantization_config"):
            raise UnsupportedModel(
                "config.json: quantization_config is not supported; "
                "give the unquantized checkpoint (bf16, fp16 or fp32)"
            )
        if config.get("sliding_window"):
            raise UnsupportedModel(
                f"config.json: sliding_window={config['sliding_window']} is not supported; "
                "attention here is full causal"
            )
        try:
            num_heads = config["num_attention_heads"]
            hidden_size = config["hidden_size"]
            required = {
                "vocab_size": config["vocab_size"],
                "hidden_size": hidden_size,
                "intermediate_size": config["intermediate_size"],
                "num_layers": config["num_hidden_layers"],
                "num_heads": num_heads,
            }
        except KeyError as e:
            raise UnsupportedModel(f"config.json: field {e.args[0]!r} is missing") from None
        theta, scaling = _rope(config)
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return cls(
            **required,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(_merge_ids(config.get("eos_token_id"), None)),
            dtype=str(dtype).removeprefix("torch."),
        )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rope base and scaling; transformers 5 writes ``rope_parameters``, earlier versions two separate fields."""
    parameters = config.get("rope_parameters")
    field = "rope_parameters" if parameters else "rope_scaling"
    scaling = parameters or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor is not supported; rotary embedding covers the head")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise UnsupportedModel(
            f"config.json: {field}.rope_type {rope_type!r} is not supported; supported are 'default' and 'llama3'"
        )
    try:
        return theta, RopeScaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        )
    except KeyError as e:
        raise UnsupportedModel(f"config.json: {field}.{e.args[0]} is missing for rope_type 'llama3'") from None


def _merge_ids(*values: int | list[int] | None) -> list[int]:
    ids: list[int] = []
    for value in values:
        for token in [value] if isinstance(value, int) else value or []:
            if token not in ids:
                ids.append(token)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} not found; a model folder holds config.json and *.safetensors") from None
    except json.JSONDecodeError as e:
        raise UnsupportedModel(f"{path} is not valid JSON: {e}") from None
