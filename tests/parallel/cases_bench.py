"""The benchmark of tensor parallelism on two devices, with a model of nothing."""

import json

from slora_jax import Engine
from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.bench.baselines import SILENT
from slora_jax.bench.tensor_parallel import Load, Point, measure, share_of_base, table
from slora_jax.bench.workload import Case, Lengths, draw_workload
from slora_jax.config import build_config
from slora_jax.engine.build import load_base, make_parts
from slora_jax.model.modules import MODULES
from tests.helpers.engine_cases import greedy, make_dummy_engine, run

SHAPE = (
    "{model_type: llama, vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256, tie_word_embeddings: true}"
)


def test_a_point_has_the_base_adapters_and_adapters_that_send_nothing(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(SHAPE)
    load = Load(
        requests=6,
        lengths=Lengths.below(12),
        adapters=(1, 3),
        max_sequences=4,
        max_batch_tokens=16,
        pool_gigabytes=0.01,
        seed=1,
    )
    results = list(measure(Point(str(file), 2), file, load, "the command"))
    result = json.loads(json.dumps(results[-1]))
    assert [(row["series"], row["n"]) for row in result["rows"]] == [
        ("base", 0),
        ("S-LoRA", 1),
        ("S-LoRA", 3),
        ("without its messages", 3),
    ]
    tokens = sum(item.num_output for item in draw_workload(6, 3, 64, 1, Lengths.below(12)))
    for row in result["rows"]:
        assert round(row["output_tokens_per_second"] / row["requests_per_second"] * 6) == tokens
        assert row["launch_milliseconds"] > 0 and share_of_base(result, row) > 0
    assert result["weight_bytes_per_device"] > 0 and result["one_user"]["over_floor"] > 1
    assert result["setting"] == "S2" and Case("S2", 3).rank(0) == 64
    assert table([result]).count("\n") == 6


def test_adapters_that_send_nothing_do_the_same_work_to_another_result(tmp_path):
    """So the comparison is of something: what is left out changes what the adapters do, and nothing of the base."""
    file = tmp_path / "toy.yaml"
    file.write_text(SHAPE)
    sending = make_dummy_engine(file, 2, 8)
    fields = {"model": str(file), "dummy": True, "checkpoint_cache": None, "compilation_cache": None, "seed": 3}
    config = build_config(
        fields
        | {
            "dtype": "float32",
            "pool": {"pages": 400},
            "mesh": {"tp": 2},
            "scheduler": {"max_batch_tokens": 32, "max_sequences": 16},
        }
    )
    silent = Engine(make_parts(config, load_base(config, progress=False), SILENT))
    packed = synthetic_weights(8, MODULES, silent.pool_layout, silent.dtype, seed=8)
    silent.register_loaded_adapter("r8", dict.fromkeys(MODULES, 8), packed, scale=4.0)
    answers = []
    for engine in (sending, silent):
        results = run(engine, *(engine.submit(greedy(range(1, 9), adapter, 16)) for adapter in (None, "r8")))
        answers.append([result.completions[0].token_ids for result in results])
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] != answers[1][1]
