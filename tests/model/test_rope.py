"""Rotary embedding against what ``LlamaRotaryEmbedding`` of transformers 5.23 computes for each rope_type."""

import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import rotary_angles

MODEL = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}

# rope_parameters, inv_freq and attention_scaling, with rope_theta 10000 and head_dim 16.
OF_TRANSFORMERS = [
    (
        {"rope_type": "default"},
        [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00999999978, 0.00316227786, 0.00100000005, 0.000316227786],
        1.0,
    ),
    (
        {"rope_type": "linear", "factor": 2.5},
        [
            0.400000006,
            0.1264911,
            0.0399999991,
            0.0126491114,
            0.00399999972,
            0.00126491114,
            0.000400000019,
            0.000126491112,
        ],
        1.0,
    ),
    (
        {"rope_type": "dynamic", "factor": 4.0},
        [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00999999978, 0.00316227786, 0.00100000005, 0.000316227786],
        1.0,
    ),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        [1.0, 0.244384587, 0.0130422562, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.0,
    ),
    (
        {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
        [0.5, 0.158113882, 0.0500000007, 0.0158113893, 0.0, 0.0, 0.0, 0.0],
        1.0,
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        [1.0, 0.25693506, 0.0625, 0.0138349654, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    (
        {
            "rope_type": "yarn",
            "factor": None,
            "attention_factor": 0.5,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
            "original_max_position_embeddings": 512,
        },
        [1.0, 0.316227764, 0.0756644011, 0.0107961092, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        0.5,
    ),
    (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        [1.0, 0.316227764, 0.100000001, 0.0239147246, 0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06],
        0.9210423553163399,
    ),
    (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [2, 2, 2, 2, 2, 2, 2, 2],
            "factor": 4.0,
        },
        [1.0, 0.287479758, 0.0833333358, 0.0243252143, 0.00714285718, 0.00210818532, 0.000624999986, 0.000186016332],
        1.087114613009218,
    ),
]


@pytest.mark.parametrize(("rope", "turns", "gain"), OF_TRANSFORMERS)
def test_angles_are_those_of_transformers(rope, turns, gain):
    config = ModelConfig.from_hf(MODEL | {"rope_parameters": rope})
    positions = np.array([0, 1, 7, 100, 2047], np.int32)
    cosine, sine = rotary_angles(jnp.asarray(positions), config)
    assert cosine.dtype == sine.dtype == jnp.float32
    angles = positions[:, None].astype(np.float64) * np.array(turns)
    np.testing.assert_allclose(cosine, gain * np.cos(angles), atol=5e-4)
    np.testing.assert_allclose(sine, gain * np.sin(angles), atol=5e-4)
    # Far from zero a last digit counts 2047 times; near it, all the digits that were written down.
    np.testing.assert_allclose(sine[1], gain * np.sin(angles[1]), rtol=1e-6, atol=1e-9)
