"""What settings do to answers: the command's words, and the embedded model measured in small."""

import math

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main
from slora_jax.bench.accuracy import run_accuracy, table
from tests.helpers.quantized_folders import write


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fp8"], "fp8 is not FIELD=VALUE, such as kv_cache_dtype=fp8"),
        ([], "Missing argument"),
        (["kv_cache_dtype=fp8", "--texts", "0"], "--texts"),
        (["--baseline", "dtype", "kv_cache_dtype=fp8"], "dtype is not FIELD=VALUE"),
        (["--baseline", "dtype=int8", "kv_cache_dtype=fp8"], "invalid configuration: dtype"),
    ],
)
def test_bad_settings_get_a_sentence(arguments, message):
    done = CliRunner().invoke(main, ["accuracy", *arguments])
    assert done.exit_code in (1, 2) and message in done.output and "Traceback" not in done.output


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    write(tmp_path, "awq")
    done = CliRunner().invoke(main, ["accuracy", f"model={tmp_path}", "--texts", "1", "--turns", "1", "--tokens", "1"])
    assert done.exit_code == 1
    assert "is it another base model's adapter?" in done.output


@pytest.mark.slow
def test_the_embedded_model_answers_much_the_same_with_a_kv_cache_in_fp8():
    check_a_little_worse({"kv_cache_dtype": "fp8"})


@pytest.mark.slow
def test_the_embedded_model_answers_much_the_same_with_weights_in_fp8():
    check_a_little_worse({"quantization": "fp8"})


def check_a_little_worse(setting):
    result = run_accuracy([setting], {}, texts=1, turns=2, tokens=4, command="")
    baseline, float8 = ([row for row in result["rows"] if (row["setting"] == "as it comes") == same] for same in (1, 0))
    assert [row["model"] for row in baseline] == [row["model"] for row in float8]
    assert {"base", "pirate", "json"} < {row["model"] for row in baseline}
    for row in baseline:
        assert (row["more_than_baseline"], row["same_likeliest"], row["same_answers"]) == (0, 1, row["answers"])
        # Of a model that has seen nothing it would be the size of the vocabulary.
        assert 1 < row["perplexity"] < 30 and row["scored_tokens"] > 50
    for one, other in zip(baseline, float8, strict=True):
        assert one["scored_tokens"] == other["scored_tokens"]
        assert 0 < abs(other["more_than_baseline"]) < 0.2 and 0.8 < other["same_likeliest"] <= 1
        assert math.isclose(other["perplexity"], one["perplexity"] * (1 + other["more_than_baseline"]))
    assert table(result).count("\n") == 1 + len(result["rows"])
