"""Two real GPUs, their kernels and NCCL between them, answer like one."""

import jax
import numpy as np
import pytest

from tests.helpers.engine_cases import greedy, make_dummy_engine, run

pytestmark = pytest.mark.gpu


def test_two_gpus_give_the_tokens_of_one(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        "{model_type: llama, vocab_size: 97, hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
    )
    tokens = {}
    for tp in (1, 2):
        engine = make_dummy_engine(shape, tp, 5, 16)
        requests = [
            greedy(np.arange(1, 40) * (i + 1) % 97, adapter, 24) for i, adapter in enumerate((None, "r5", "r16"))
        ]
        results = run(engine, *[engine.submit(request) for request in requests])
        tokens[tp] = [list(result.completions[0].token_ids) for result in results]
        assert len(engine.device.pool.array.addressable_shards) == tp
    assert tokens[1] == tokens[2]
    assert len({tuple(answer) for answer in tokens[1]}) == 3
