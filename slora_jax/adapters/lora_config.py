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

from slora_jax.adapters.names import BadExpression, Expression, Expressions, NamePatterns, ends
from slora_jax.errors import BadAdapter, shown

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
    "layers_pattern",
}

# Where it came from, how it was trained, or how it was initialised (the tensors say what came of it).
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    # It says how GPT-2's layers store their weights; PEFT sets it to false for linear layers, which Llama's all are.
    "fan_in_fan_out",
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

_ALL_LINEAR = "all-linear"
_PROJECTIONS = r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
_DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT adapts in a Llama, and in the models that are built like it, where the config names nothing."""

_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_LONG_TARGET_LIST = 20
_MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Rank, scale and targets of every projection, by PEFT's rules.

    Names are the base model's: ``model.layers.0.self_attn.q_proj``.

    Attributes:
      rank, alpha: for projections that no pattern names.
      rank_patterns, alpha_patterns: values by expression.
      is_rank_stabilized: rsLoRA: the scale is alpha / sqrt(rank) instead of alpha / rank.
      targets, excluded: what the adapter changes and what it leaves, of that: names and ends of names, or an
        expression for whole names.
      layers: the only layers it changes, if not all.
      layers_patterns: what comes before the layer's number in a name; any if there are none.
    """

    rank: int
    alpha: float
    rank_patterns: NamePatterns[int]
    alpha_patterns: NamePatterns[float]
    is_rank_stabilized: bool
    targets: frozenset[str] | Expression
    excluded: frozenset[str] | Expression
    layers: frozenset[int] | None
    layers_patterns: tuple[Expression, ...]

    def digest(self) -> bytes:
        """The same for configs that ask for the same, whatever else their files say."""
        targets, excluded = (
            names.text if isinstance(names, Expression) else sorted(names) for names in (self.targets, self.excluded)
        )
        everything = (
            self.rank, self.alpha, self.rank_patterns.items, self.alpha_patterns.items, self.is_rank_stabilized,
            targets, excluded, None if self.layers is None else sorted(self.layers),
            [pattern.text for pattern in self.layers_patterns],
        )  # fmt: skip
        return hashlib.sha256(repr(everything).encode("utf-8", "backslashreplace")).digest()

    def rank_of(self, name: str) -> int:
        return self.rank_patterns.get(name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the product B A x is multiplied with."""
        rank = self.rank_of(name)
        return self.alpha_patterns.get(name, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def is_target(self, name: str) -> bool:
        """Whether the adapter changes this module: PEFT's rules."""
        if _is_among(name, self.excluded):
            return False
        if not _is_among(name, self.targets):
            return False
        # What is named in whole is changed whatever its layer.
        if self.layers is None or isinstance(self.targets, Expression) or name in self.targets:
            return True
        return self._layer_of(name) in self.layers

    def _layer_of(self, name: str) -> int | None:
        if not self.layers_patterns:
            match = _LAYER_NUMBER.match(name)
            return int(match[1]) if match else None
        for pattern in self.layers_patterns:
            if pattern.match(name):
                return pattern.number(name)
        return None


def parse_lora_config(raw: bytes) -> LoraConfig:
    """Parses the bytes of ``adapter_config.json``.

    Raises:
      BadAdapter: not JSON, a value of the wrong kind, or something other than plain LoRA; the message names the field.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadAdapter("adapter_config.json is not valid JSON; save or copy the adapter again") from None
    if not isinstance(config, dict):
        raise BadAdapter(f"adapter_config.json must hold a JSON object, got {shown(config)}")
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
        name = field if field.isidentifier() and field.isascii() and len(field) <= _MAX_SHOWN else shown(field)
        raise _refusal(name, value, _REFUSED.get(field, "the field is unknown here and may change what it computes"))
    expressions = Expressions()
    targets, layers = _targets(config, expressions), _layers(config)
    _check_layers_fit(config, targets, layers)
    return LoraConfig(
        rank=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        rank_patterns=_patterns(config, "rank_pattern", _rank, expressions),
        alpha_patterns=_patterns(config, "alpha_pattern", _alpha, expressions),
        is_rank_stabilized=_flag(config, "use_rslora"),
        targets=targets,
        excluded=_names(config, "exclude_modules", expressions) or frozenset(),
        layers=layers,
        layers_patterns=_layers_patterns(config, expressions),
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


def _patterns(
    config: dict[str, Any], field: str, check: Callable[[str, Any, str], Any], expressions: Expressions
) -> NamePatterns:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _refusal(field, patterns, "expected an object from names to numbers")
    items = [(key, check(field, value, key)) for key, value in patterns.items()]
    try:
        return NamePatterns(items, expressions)
    except BadExpression as e:
        raise _refusal(field, e.text, e.reason) from None


def _is_among(name: str, names: frozenset[str] | Expression) -> bool:
    """PEFT's rule: an expression matches the whole name; a listed one is the name or an end of it after a dot."""
    if isinstance(names, Expression):
        return names.fullmatch(name)
    return not names.isdisjoint(ends(name))


def _targets(config: dict[str, Any], expressions: Expressions) -> frozenset[str] | Expression:
    targets = config.get("target_modules")
    if targets is None:
        return frozenset(_DEFAULT_TARGETS)
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return expressions.compile(_PROJECTIONS)
    names = _names(config, "target_modules", expressions)
    assert names is not None, "only exclude_modules may be empty"
    return names


def _names(config: dict[str, Any], field: str, expressions: Expressions) -> frozenset[str] | Expression | None:
    names = config.get(field)
    if names is None or (names == "" and field == "exclude_modules"):
        return None
    if isinstance(names, str):
        try:
            return expressions.compile(names)
        except BadExpression as e:
            raise _refusal(field, names, e.reason) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(field, names, "expected a list of module names")
    return frozenset(names)


def _layers_patterns(config: dict[str, Any], expressions: Expressions) -> tuple[Expression, ...]:
    patterns = config.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _refusal("layers_pattern", patterns, "expected the name of what holds the layers, or a list of such")
    try:
        return tuple(expressions.compile(pattern, r"(?:^|.*?\.){}\.(\d+)\.") for pattern in patterns)
    except BadExpression as e:
        raise _refusal("layers_pattern", patterns, e.reason) from None


def _check_layers_fit(
    config: dict[str, Any], targets: frozenset[str] | Expression, layers: frozenset[int] | None
) -> None:
    """Refuses what PEFT refuses, and what it may read in another way than it is written."""
    if isinstance(config.get("target_modules"), str):
        for field in ("layers_to_transform", "layers_pattern"):
            if config.get(field) is not None:
                raise _refusal(
                    field,
                    config[field],
                    "target_modules is an expression, which says itself for which layers it is; leave the field out, "
                    "or list module names in target_modules",
                )
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise _refusal("layers_pattern", config["layers_pattern"], "it needs layers_to_transform")
    if layers is None or isinstance(targets, Expression):
        return
    if len(targets) >= _LONG_TARGET_LIST and any(name.startswith("model.") for name in targets):
        raise _refusal(
            "target_modules",
            config["target_modules"],
            "PEFT shortens a long list of whole names, and then layers_to_transform bears on them; name ends of them",
        )


def _layers(config: dict[str, Any]) -> frozenset[int] | None:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers):
        raise _refusal("layers_to_transform", layers, "expected layer numbers")
    return frozenset(layers)


def _rank(field: str, value: Any, key: str | None = None) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise _refusal(_place(field, key), value, "a rank must be a positive integer")
    return value


def _alpha(field: str, value: Any, key: str | None = None) -> float:
    try:
        alpha = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise _refusal(_place(field, key), value, "alpha must be a finite number")
    return alpha


def _place(field: str, key: str | None) -> str:
    return field if key is None else f"{field}[{shown(key)}]"


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _refusal(field, value, "expected true or false")
    return bool(value)


def _refusal(field: str, value: Any, reason: str) -> BadAdapter:
    return BadAdapter(f"adapter_config.json: {field}={shown(value)} is not supported: {reason}")
