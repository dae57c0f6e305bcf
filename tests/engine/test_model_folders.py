"""What a model folder says beside its weights, seen in an engine's answers; the expected tokens are transformers'."""

import json
import shutil

import pytest

from slora_jax.errors import InvalidRequest
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.engine_cases import FIXTURES, Case, greedy, make_engine, run
from tests.helpers.small_tokenizers import byte_level_folder


@pytest.fixture
def copied(tmp_path):
    """A function that copies an oracle case's model and changes its JSON files; None deletes one."""

    def copy(name: str, **changes: dict | None):
        case = Case(FIXTURES / name)
        folder = tmp_path / "model"
        shutil.copytree(case.model, folder)
        for stem, change in changes.items():
            file = folder / f"{stem}.json"
            if change is None:
                file.unlink()
            else:
                file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | change))
        return folder, next(r for r in case.requests if r["adapter"] is None)

    return copy


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # rope_scaling, which the fixture has, wins.
        ("llama3_gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
        ("llama3_gqa", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        # An lm_head that is not the embedding is not tied to it.
        ("llama1_mha", {"tie_word_embeddings": True}),
        ("llama1_mha", {"hidden_act": "swish", "sliding_window": 512, "use_sliding_window": False}),
    ],
)
def test_what_changes_nothing_to_transformers_changes_nothing_here(copied, name, change):
    folder, request = copied(name, config=change)
    engine = make_engine(folder)
    (result,) = run(engine, engine.submit(greedy(request["prompt"])))
    assert list(result.completions[0].token_ids) == request["tokens"]


@pytest.mark.parametrize(
    ("model", "generation", "tokenizer", "last"),
    [
        (170, None, 2, 170),
        (9, None, 12, 12),
        (9, {"eos_token_id": [170, 9]}, 12, 170),
        # config.json's are not those of a folder whose generation_config.json names others.
        (170, {"eos_token_id": 240}, 9, 240),
        (170, {}, 12, 170),
    ],
)
def test_an_answer_ends_at_the_models_eos_and_at_the_tokenizers(copied, model, generation, tokenizer, last):
    config = json.loads((FIXTURES / "smollm_gqa3" / "model" / "tokenizer.json").read_text())
    names = {token: name for name, token in config["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in config["added_tokens"]}
    folder, request = copied(
        "smollm_gqa3",
        config={"eos_token_id": model},
        generation_config=None,
        tokenizer_config={"eos_token": names[tokenizer]},
    )
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    engine = make_engine(folder)
    (result,) = run(engine, engine.submit(greedy(request["prompt"], ignore_eos=False)))
    answer = result.completions[0]
    assert answer.finish_reason == "stop"
    assert list(answer.token_ids) == request["tokens"][: request["tokens"].index(last) + 1]


def test_sampling_of_the_generation_config_is_the_engines_default(copied):
    folder, _ = copied("smollm_gqa3", generation_config={"temperature": 0.5, "max_new_tokens": 7})
    assert make_engine(folder).default_sampling == {"temperature": 0.5, "max_tokens": 7}
    assert make_engine(folder, generation_config=False).default_sampling == {}


def test_random_weights_speak_with_a_tokenizer_of_ones_choice(tmp_path):
    folder = byte_level_folder(tmp_path / "tokenizer")
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        f"{{model_type: llama, vocab_size: {Tokenizer.from_folder(folder).vocab_size}, hidden_size: 16, "
        "intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}"
    )
    engine = make_engine(shape, dummy=True, tokenizer=str(folder))
    (result,) = run(engine, engine.submit(greedy((1, 2, 3))))
    (answer,) = result.completions
    assert answer.text == engine.tokenizer.decode(answer.token_ids) != ""
    with pytest.raises(InvalidRequest, match=r"has no tokenizer\.json; give a model's folder"):
        make_engine(shape, dummy=True, tokenizer=str(tmp_path))
    with pytest.raises(InvalidRequest, match="the model's folder has its own"):
        make_engine(folder, tokenizer=str(folder))
