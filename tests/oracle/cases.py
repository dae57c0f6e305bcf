"""What the oracle's cases are made of, as data: no torch, no numpy, no JAX.

A case is one small random Llama, some adapters of it, and requests: pairs of an adapter (or none) and a named prompt.
"""

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_SEVEN = ATTENTION + MLP

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Adapter:
    """A LoRA configuration. ``dtype`` is what its file stores; ``targets`` as a string is a PEFT regex."""

    r: int
    alpha: float
    targets: tuple[str, ...] | str
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Prompt:
    """How a prompt is drawn.

    Attributes:
      length: number of tokens (kind ``ids``) or of words (``text``, ``chat``).
      kind: ``ids`` are random token ids; ``text`` is tokenized as it is; ``chat`` is one user message put through the
        chat template.
      shares: name of an earlier ``ids`` prompt whose first ``shared`` tokens start this one.
    """

    length: int
    kind: str = "ids"
    shares: str | None = None
    shared: int = 0


@dataclass(frozen=True)
class Case:
    """A model, its adapters and requests.

    Attributes:
      model: arguments of ``transformers.LlamaConfig``.
      dtype: what the weight file stores; all expected values are computed in float32 from these stored values.
      config_style: how config.json spells rope and dtype: ``v5`` (as transformers 5 writes it), ``v4``
        (``rope_theta`` + ``rope_scaling`` + ``torch_dtype``) or ``llama1`` (v4 without the fields Llama 1 predates).
      max_shard_size: given, the weights are split into shards with an index.
      requests: (adapter name or None, prompt name); served together they make one mixed batch.
    """

    name: str
    features: tuple[str, ...]
    model: dict[str, Any]
    dtype: str
    config_style: str
    adapters: dict[str, Adapter]
    prompts: dict[str, Prompt]
    requests: tuple[tuple[str | None, str], ...]
    max_shard_size: str | None = None
    tokenizer: bool = False


LLAMA1_MHA = Case(
    name="llama1_mha",
    features=(
        "multi-head attention (kv heads = heads)",
        "untied embeddings",
        "float16 weights in one file",
        "config.json as Llama 1 had it: no num_key_value_heads, rope_theta or head_dim",
        "ranks 1, 3, 4, 6, 8, 16, 33 in one batch",
        "rsLoRA",
        "rank_pattern and alpha_pattern",
        "layers_to_transform",
        "q,v only; MLP only; all seven modules",
        "adapters stored in float32 and bfloat16",
        "same prompt under five adapters and the base; prompts that share a prefix; a one-token prompt",
    ),
    model={
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    dtype="float16",
    config_style="llama1",
    adapters={
        "all7-r1": Adapter(r=1, alpha=2, targets=ALL_SEVEN, dtype="float32"),
        "attention-r3": Adapter(r=3, alpha=5, targets=ATTENTION),
        "qv-r8-rslora": Adapter(r=8, alpha=16, targets=("q_proj", "v_proj"), rslora=True),
        "mlp-r16": Adapter(r=16, alpha=16, targets=MLP),
        "qv-r33-layer1": Adapter(r=33, alpha=16, targets=("q_proj", "v_proj"), layers=(1,)),
        "patterns-r4": Adapter(
            r=4,
            alpha=8,
            targets=ALL_SEVEN,
            rank_pattern={"down_proj": 6, "layers.1.self_attn.q_proj": 1},
            alpha_pattern={"down_proj": 3, "v_proj": 20},
        ),
    },
    prompts={
        "shared": Prompt(40),
        "long": Prompt(200),
        "long-tail": Prompt(90, shares="long", shared=48),
        "chunk": Prompt(32),
        "chunk+1": Prompt(33),
        "one": Prompt(1),
    },
    requests=(
        (None, "shared"),
        ("all7-r1", "shared"),
        ("attention-r3", "shared"),
        ("qv-r8-rslora", "shared"),
        ("mlp-r16", "shared"),
        ("patterns-r4", "shared"),
        ("qv-r33-layer1", "long"),
        ("qv-r33-layer1", "long-tail"),
        (None, "long-tail"),
        ("patterns-r4", "chunk"),
        ("mlp-r16", "chunk+1"),
        ("attention-r3", "one"),
    ),
)

LLAMA3_GQA = Case(
    name="llama3_gqa",
    features=(
        "grouped-query attention, 8 query heads on 2 kv heads",
        "head_dim 16 given, not hidden_size / heads (5)",
        "rope scaling llama3",
        "untied embeddings",
        "bfloat16 weights in shards with an index",
        "config.json with rope_theta, rope_scaling and torch_dtype (transformers 4)",
        "target_modules given as a regex",
    ),
    model={
        "vocab_size": 256,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    dtype="bfloat16",
    config_style="v4",
    max_shard_size="50KB",
    adapters={
        "attention-r8": Adapter(r=8, alpha=16, targets=ATTENTION),
        "all7-r4-rslora": Adapter(r=4, alpha=4, targets=ALL_SEVEN, rslora=True),
        "regex-r3": Adapter(r=3, alpha=9, targets=r".*\.(k_proj|down_proj)"),
    },
    prompts={"shared": Prompt(70), "long": Prompt(180), "short": Prompt(5)},
    requests=(
        (None, "shared"),
        ("attention-r8", "shared"),
        ("all7-r4-rslora", "shared"),
        ("regex-r3", "shared"),
        ("attention-r8", "long"),
        ("all7-r4-rslora", "short"),
    ),
)

SMOLLM_GQA3 = Case(
    name="smollm_gqa3",
    features=(
        "SmolLM2 style: 9 query heads on 3 kv heads, hidden size no multiple of 16",
        "tied embeddings",
        "bfloat16 weights in one file",
        "config.json with rope_parameters and dtype (transformers 5)",
        "byte-level BPE tokenizer and chat template; prompts as text and as chat messages",
    ),
    model={
        "vocab_size": 288,
        "hidden_size": 72,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    dtype="bfloat16",
    config_style="v5",
    tokenizer=True,
    adapters={
        "all7-r1": Adapter(r=1, alpha=1, targets=ALL_SEVEN),
        "qv-r8": Adapter(r=8, alpha=16, targets=("q_proj", "v_proj")),
        "mlp-r3": Adapter(r=3, alpha=6, targets=MLP, dtype="float32"),
    },
    prompts={"text": Prompt(8, kind="text"), "chat": Prompt(16, kind="chat"), "long": Prompt(120)},
    requests=(
        (None, "text"),
        ("all7-r1", "text"),
        ("qv-r8", "chat"),
        ("mlp-r3", "chat"),
        (None, "chat"),
        ("mlp-r3", "long"),
    ),
)

CASES = {case.name: case for case in (LLAMA1_MHA, LLAMA3_GQA, SMOLLM_GQA3)}
