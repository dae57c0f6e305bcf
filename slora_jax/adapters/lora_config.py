"""What PEFT's ``adapter_config.json`` asks for, and whether that is plain LoRA.

Every field that PEFT writes is either used, known not to change what the adapter computes, or refused with its
reason. A field not known here is refused when it is set: a newer PEFT may have given it a meaning.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slora_jax.errors import BadAdapter

_USED = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
}

# Where it came from, how it was trained, or how it was initialised (the tensors say what came of it).
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "merge_weights",
}

_MERGE = "merge the adapter into the base model and serve that"
_REFUSED = {
    "use_dora": f"DoRA also rescales the base weights; train with use_dora=false, or {_MERGE}",
    "lora_bias": "LoRA here has no bias; train with lora_bias=false",
    "modules_to_save": f"it replaces whole modules of the base model; train without it, or {_MERGE}",
    "fan_in_fan_out": "Llama's projections are stored as (out, in); train with fan_in_fan_out=false",
    "trainable_token_indices": f"it changes the base model's embeddings; train without it, or {_MERGE}",
    "layer_replication": f"it changes the number of layers of the base model; {_MERGE}",
    "target_parameters": "only whole q,k,v,o,gate,up,down projections can be adapted; use target_modules",
    "alora_invocation_tokens": "activated LoRA, which is on for a part of the prompt only, is not computed here",
    "use_qalora": f"QA-LoRA averages groups of inputs; {_MERGE}",
    "monteclora_config": "MonteCLoRA draws random weights in the forward pass",
    "use_bdlora": "block-diagonal LoRA stores its weights in another form; train with use_bdlora unset",
    "arrow_config": "Arrow mixes several adapters per token; serve them one by one",
    "kasa_config": f"KaSA also changes the base weights; {_MERGE}",
    "velora_config": "VeLoRA adds tensors of its own; set velora_config to null and save without them",
    "megatron_config": "Megatron's parallel layers store their weights in another form; convert the adapter to PEFT's",
}
# PEFT enables these by their presence, even with no value inside.
_ENABLED_BY_PRESENCE = {"monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "velora_config"}

_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MAX_PATTERN_LENGTH = 500
_MAX_PATTERN_QUANTIFIERS = 4


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Rank, scale and targets of every projection. Names are the base model's: ``model.layers.0.self_attn.q_proj``.

    Attributes:
      rank, alpha: for projections that no pattern names.
      rank_patterns, alpha_patterns: expression and value, the first match counts.
      is_rank_stabilized: rsLoRA: the scale is alpha / sqrt(rank) instead of alpha / rank.
      targets, excluded: names, or ends of names, that the adapter changes and leaves; None where the config does not
        list them.
      layers: the only layers it changes, if not all.
    """

    rank: int
    alpha: float
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    is_rank_stabilized: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None

    def digest(self) -> bytes:
        """The same for configs that ask for the same, whatever else their files say."""
        rank_patterns, alpha_patterns = (
            [(pattern.pattern, value) for pattern, value in patterns]
            for patterns in (self.rank_patterns, self.alpha_patterns)
        )
        layers = None if self.layers is None else sorted(self.layers)
        everything = (
            self.rank, self.alpha, rank_patterns, alpha_patterns, self.is_rank_stabilized, self.targets, self.excluded,
            layers,
        )  # fmt: skip
        return hashlib.sha256(repr(everything).encode("utf-8", "backslashreplace")).digest()

    def rank_of(self, name: str) -> int:
        return _first_match(self.rank_patterns, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the product B A x is multiplied with."""
        rank = self.rank_of(name)
        return _first_match(self.alpha_patterns, name, self.alpha) / (
            math.sqrt(rank) if self.is_rank_stabilized else rank
        )

    def is_target(self, name: str, layer: int) -> bool:
        """Whether the adapter changes this projection, as far as the config lists it."""
        if any(_ends_with(name, end) for end in self.excluded):
            return False
        if self.targets is not None and name in self.targets:
            return True
        in_layers = self.layers is None or layer in self.layers
        return in_layers and (self.targets is None or any(_ends_with(name, end) for end in self.targets))


def parse_lora_config(raw: bytes) -> LoraConfig:
    """Parses the bytes of ``adapter_config.json``.

    Raises:
      BadAdapter: not JSON, a value of the wrong kind, or something other than plain LoRA.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadAdapter("adapter_config.json is not valid JSON; save or copy the adapter again") from None
    if not isinstance(config, dict):
        raise BadAdapter(f"adapter_config.json must hold a JSON object, got {_show(config)}")
    if config.get("peft_type") != "LORA":
        raise _refusal("peft_type", config.get("peft_type"), "only 'LORA' is served")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refusal("task_type", config["task_type"], "only 'CAUSAL_LM' is served: other tasks need their own head")
    if config.get("bias") not in (None, "none"):
        raise _refusal("bias", config["bias"], "it changes biases of the base model; train with bias='none'")
    _check_init(config.get("init_lora_weights"))
    for field, value in config.items():
        if field in _USED or field in _HARMLESS or not _is_set(field, value):
            continue
        raise _refusal(field, value, _REFUSED.get(field, "the field is unknown here and may change what it computes"))
    return LoraConfig(
        rank=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        rank_patterns=_patterns(config, "rank_pattern", _rank),
        alpha_patterns=_patterns(config, "alpha_pattern", _alpha),
        is_rank_stabilized=_flag(config, "use_rslora"),
        targets=_names(config, "target_modules"),
        excluded=_names(config, "exclude_modules") or (),
        layers=_layers(config),
    )


def _is_set(field: str, value: Any) -> bool:
    return value not in (None, False) if field in _ENABLED_BY_PRESENCE else bool(value)


def _check_init(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    name = str(value).lower()
    if name in _HARMLESS_INITS:
        return
    if name.startswith(_BASE_CHANGING_INITS):
        raise _refusal(
            "init_lora_weights",
            value,
            "this initialisation changes the base weights; convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    raise _refusal("init_lora_weights", value, f"known are true, false, {', '.join(_HARMLESS_INITS)}")


def _patterns(config: dict[str, Any], field: str, check: Callable) -> tuple[tuple[re.Pattern[str], Any], ...]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _refusal(field, patterns, "expected an object from names to numbers")
    return tuple((_compile(field, key), check(f"{field}[{key!r}]", value)) for key, value in patterns.items())


def _compile(field: str, key: str) -> re.Pattern[str]:
    """PEFT's rule: the key, as an expression, matches a whole name or the end of one that starts after a dot."""
    bare = re.sub(r"\[[^\]]*\]", "x", re.sub(r"\\.", "x", key)).replace("(?", "(")
    quantifiers = re.findall(r"(?:[*+?]|\{[^}]*\})[?+]?", bare)
    if (
        len(key) > _MAX_PATTERN_LENGTH
        or len(quantifiers) > _MAX_PATTERN_QUANTIFIERS
        or re.search(r"\)(?:[*+]|\{)", bare)
    ):
        # Python's matcher backtracks without a time limit, and adapters come from strangers.
        raise _refusal(field, key, "the expression could take for ever to match; write it without repeated groups")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as e:
        raise _refusal(field, key, f"not a valid expression: {e}") from None


def _first_match(patterns: tuple[tuple[re.Pattern[str], Any], ...], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _names(config: dict[str, Any], field: str) -> tuple[str, ...] | None:
    names = config.get(field)
    # A string is an expression or a shorthand; then the file's tensors say what was meant.
    if names is None or isinstance(names, str):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(field, names, "expected a list of module names")
    # PEFT writes a set, in any order.
    return tuple(sorted(names))


def _layers(config: dict[str, Any]) -> frozenset[int] | None:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers):
        raise _refusal("layers_to_transform", layers, "expected layer numbers")
    return frozenset(layers)


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _refusal(field, value, "a rank must be a positive integer")
    return value


def _alpha(field: str, value: Any) -> float:
    try:
        alpha = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise _refusal(field, value, "alpha must be a finite number")
    return alpha


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _refusal(field, value, "expected true or false")
    return bool(value)


def _refusal(field: str, value: Any, reason: str) -> BadAdapter:
    return BadAdapter(f"adapter_config.json: {field}={_show(value)} is not supported: {reason}")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
