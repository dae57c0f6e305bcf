"""What ``bench quality`` counts, on the embedded model."""

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main
from slora_jax.bench.quality import run_quality
from slora_jax.demo import demo_adapters
from tests.helpers.quantized_folders import write


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fp8_costs_a_little_and_nothing_costs_nothing():
    result = run_quality(["fp8"], num_questions=2, num_tokens=8, dtype="float32", command="")
    exact, rounded = result["results"]["unquantised"], result["results"]["fp8"]
    assert set(exact) == set(rounded) == {"base", *demo_adapters()}
    for name, row in exact.items():
        assert row["tokens_agreed"] == row["answers_agreed"] == 1, name
        assert 1 < row["perplexity"] < 30, name
        assert rounded[name]["perplexity"] == pytest.approx(row["perplexity"], rel=0.2), name
        assert rounded[name]["perplexity"] != row["perplexity"], name
    assert 0.6 < rounded["base"]["tokens_agreed"] < 1 or rounded["base"]["answers_agreed"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    write(tmp_path, "awq")
    done = CliRunner().invoke(main, ["quality", "--against", str(tmp_path), "--questions", "1", "--tokens", "1"])
    assert done.exit_code == 1
    assert "is it another base model's adapter?" in done.output
