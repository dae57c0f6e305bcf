"""Weights of small models, as Hugging Face folders hold them."""

import ml_dtypes
import numpy as np

from slora_jax.model.config import ModelConfig


def random_tensors(config: ModelConfig, dtype: type = ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, ``[out, in]`` as Hugging Face stores linear maps."""
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for i in range(config.num_layers):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (config.hidden_size,),
                "post_attention_layernorm": (config.hidden_size,),
                "self_attn.q_proj": (config.q_size, config.hidden_size),
                "self_attn.k_proj": (config.kv_size, config.hidden_size),
                "self_attn.v_proj": (config.kv_size, config.hidden_size),
                "self_attn.o_proj": (config.hidden_size, config.q_size),
                "mlp.gate_proj": (config.intermediate_size, config.hidden_size),
                "mlp.up_proj": (config.intermediate_size, config.hidden_size),
                "mlp.down_proj": (config.hidden_size, config.intermediate_size),
            }.items()
        }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
