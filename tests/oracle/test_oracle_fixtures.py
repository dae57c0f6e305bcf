"""The fixtures are well formed, and a plain NumPy Llama agrees with them. Needs no torch and no JAX."""

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tests.oracle.cases import ALL_SEVEN, CASES, MAX_NEW_TOKENS
from tests.oracle.reference_numpy import load_adapter, load_model, logits

FIXTURES = Path(__file__).parent / "fixtures"
MIN_GAP = 0.01
MAX_BYTES = 600_000


@cache
def expected(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder = FIXTURES / case
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


def relative_error(value, reference) -> float:
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


def all_requests():
    return [pytest.param(name, i, id=f"{name}-{i}") for name, case in CASES.items() for i in range(len(case.requests))]


def test_fixtures_are_all_there_and_small():
    assert {folder.name for folder in FIXTURES.iterdir()} == set(CASES)
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("name", CASES)
def test_requests_are_those_of_the_case(name):
    case, (record, tensors) = CASES[name], expected(name)

    assert (record["format"], record["case"], record["max_new_tokens"]) == (1, name, MAX_NEW_TOKENS)
    assert tuple(record["features"]) == case.features
    assert [request["adapter"] for request in record["requests"]] == [adapter for adapter, _ in case.requests]
    assert [request["id"] for request in record["requests"]] == list(range(len(case.requests)))
    assert len(tensors) == 3 * len(case.requests)
    assert {folder.name for folder in (FIXTURES / name / "adapters").iterdir()} == set(case.adapters)
    assert {adapter for adapter, _ in case.requests} == {None, *case.adapters}


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_shared_as_the_case_says(name):
    case, (record, _) = CASES[name], expected(name)
    prompts = {}
    for (_, prompt), request in zip(case.requests, record["requests"], strict=True):
        assert prompts.setdefault(prompt, request["prompt"]) == request["prompt"]
    for prompt, spec in case.prompts.items():
        if spec.kind == "ids":
            assert len(prompts[prompt]) == spec.length
        if spec.shares:
            assert prompts[prompt][: spec.shared] == prompts[spec.shares][: spec.shared]


@pytest.mark.parametrize(("name", "index"), all_requests())
def test_request_is_well_formed(name, index):
    record, tensors = expected(name)
    request, vocab_size = record["requests"][index], CASES[name].model["vocab_size"]
    last = len(request["prompt"]) - 1

    assert all(0 <= token < vocab_size for token in request["prompt"] + request["tokens"])
    assert len(request["tokens"]) == MAX_NEW_TOKENS
    assert request["logit_positions"] == [last, last + MAX_NEW_TOKENS - 1]
    rows, top2 = tensors[f"{index}.logits"], tensors[f"{index}.top2_logits"]
    logsumexp = tensors[f"{index}.logsumexp"]
    assert rows.shape == (2, vocab_size)
    assert top2.shape == (MAX_NEW_TOKENS, 2)
    assert logsumexp.shape == (MAX_NEW_TOKENS,)
    assert {rows.dtype, top2.dtype, logsumexp.dtype} == {np.dtype(np.float32)}
    for row, step in zip(rows, (0, MAX_NEW_TOKENS - 1), strict=True):
        assert row.argmax() == request["tokens"][step]
        np.testing.assert_array_equal(np.sort(row)[:-3:-1], top2[step])
        np.testing.assert_allclose(np.log(np.exp(row.astype(np.float64)).sum()), logsumexp[step], rtol=1e-6)
    np.testing.assert_allclose(top2[:, 0] - top2[:, 1], request["gaps"], atol=1e-4)


@pytest.mark.parametrize(("name", "index"), all_requests())
def test_greedy_choices_are_clear_and_varied(name, index):
    """A token comparison must be no coin toss, and no constant loop that a wrong engine could also fall into."""
    record, _ = expected(name)
    request = record["requests"][index]
    assert min(request["gaps"]) >= max(record["min_gap"], MIN_GAP)
    assert len(set(request["tokens"])) >= 12


@pytest.mark.parametrize("name", CASES)
def test_adapters_change_what_the_same_prompt_gives(name):
    record, tensors = expected(name)
    compared = 0
    for one, other in itertools.combinations(record["requests"], 2):
        if one["prompt"] == other["prompt"]:
            compared += 1
            first_rows = [tensors[f"{request['id']}.logits"][0] for request in (one, other)]
            assert one["tokens"] != other["tokens"]
            assert relative_error(*first_rows) > 0.1
    assert compared >= 3


@pytest.mark.parametrize(("name", "index"), all_requests())
def test_numpy_reference_agrees(name, index):
    record, tensors = expected(name)
    request = record["requests"][index]
    model = load_model(FIXTURES / name / "model")
    adapter = request["adapter"] and load_adapter(FIXTURES / name / "adapters" / request["adapter"])

    computed = logits(model, request["prompt"] + request["tokens"][:-1], adapter)

    steps = computed[len(request["prompt"]) - 1 :]
    assert steps.argmax(axis=1).tolist() == request["tokens"]
    for row, recorded in zip(computed[request["logit_positions"]], tensors[f"{index}.logits"], strict=True):
        assert relative_error(recorded, row) < 1e-5
    assert relative_error(tensors[f"{index}.top2_logits"], np.sort(steps, axis=1)[:, :-3:-1]) < 1e-5
    assert relative_error(tensors[f"{index}.logsumexp"], np.log(np.exp(steps).sum(axis=1))) < 1e-5


def test_adapter_files_hold_the_ranks_and_modules_of_the_case():
    loaded = {
        (name, adapter): load_adapter(FIXTURES / name / "adapters" / adapter)
        for name, case in CASES.items()
        for adapter in case.adapters
    }
    ranks = {lora.a.shape[0] for adapter in loaded.values() for lora in adapter.values()}
    assert ranks == {1, 3, 4, 6, 8, 16, 33}
    assert all(lora.b.any() for adapter in loaded.values() for lora in adapter.values())

    patterns = loaded["llama1_mha", "patterns-r4"]
    assert len(patterns) == 2 * len(ALL_SEVEN)
    down, v = patterns["model.layers.0.mlp.down_proj"], patterns["model.layers.1.self_attn.v_proj"]
    assert (down.a.shape[0], down.scaling) == (6, 3 / 6)
    assert (v.a.shape[0], v.scaling) == (4, 20 / 4)
    assert patterns["model.layers.1.self_attn.q_proj"].a.shape[0] == 1
    assert patterns["model.layers.0.self_attn.q_proj"].a.shape[0] == 4
    assert loaded["llama1_mha", "qv-r8-rslora"]["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(16 / 8**0.5)
    assert set(loaded["llama1_mha", "qv-r33-layer1"]) == {f"model.layers.1.self_attn.{m}" for m in ("q_proj", "v_proj")}
    regex = {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.k_proj", "mlp.down_proj")}
    assert set(loaded["llama3_gqa", "regex-r3"]) == regex


def test_text_prompts_are_tokenized_as_recorded():
    name = "smollm_gqa3"
    tokenizer = Tokenizer.from_file(str(FIXTURES / name / "model" / "tokenizer.json"))
    record, _ = expected(name)
    with_text = [request for request in record["requests"] if "text" in request]
    assert with_text
    assert any("messages" in request for request in with_text)
    for request in with_text:
        assert tokenizer.encode(request["text"], add_special_tokens=False).ids == request["prompt"]
        assert tokenizer.decode(request["tokens"], skip_special_tokens=True) == request["completion"]
