"""The benchmark of tensor parallelism: its points, its table and its picture; it runs in tests/parallel."""

import json

import pytest
from click.testing import CliRunner

from slora_jax.bench.__main__ import main
from slora_jax.bench.tensor_parallel import PAPER, POINTS, Point, draw, table


def a_result(model: str, tp: int) -> dict:
    rows = [
        {"series": series, "n": n, "requests_per_second": rate, "output_tokens_per_second": 260.0 * rate}
        | {"step_milliseconds": {"p50": 10.0}, **more}
        for series, n, rate, more in (
            ("base", 0, 20.0, {"launch_milliseconds": 1.0}),
            ("S-LoRA", 10, 19.0, {"launch_milliseconds": 2.0}),
            ("S-LoRA", 100, 18.0, {"launch_milliseconds": 3.0, "message_share": 0.125}),
            ("without its messages", 100, 19.5, {"launch_milliseconds": 1.5}),
        )
    ]
    user = {"step_milliseconds": 4.0, "over_floor": 1.25}
    return {"model": model, "tp": tp, "rows": rows, "one_user": user}


def test_points_are_models_and_numbers_of_devices():
    assert Point.parse("llama-13b:2") == Point("llama-13b", 2)
    assert Point.parse("/shapes/my.yaml:4").file_name == "my_tp4.json"
    assert [Point.parse(text).setting for text in POINTS] == ["S2", "S2", "S4", "S4", "S5", "S5", "S6"]
    for text in ("llama-13b", "llama-13b:", ":2", "llama-13b:0", "llama-13b:x"):
        with pytest.raises(ValueError, match="a model and on how many devices"):
            Point.parse(text)


def test_the_table_says_what_is_left_of_the_base_and_what_bounds_a_step():
    lines = table([a_result("llama-13b", 2)]).splitlines()
    assert lines[4] == "| llama-13b, 2 | S-LoRA, n = 100 | 18.0 | 4,680 | 0.90 | 10.00 | 3.00 | 12.5% |"
    assert lines[-1] == "| llama-13b, 2 | one user | | | | 4.00 (1.25 x reading the weights) | | |"


def test_the_papers_shares_are_those_of_its_published_numbers():
    """S-LoRA, the same without its messages, and the base alone, in requests a second, as the authors plot them."""
    published = {
        ("30B, 2 GPUs", 10): (0.60, 0.86, 1.21),
        ("30B, 2 GPUs", 100): (0.60, 0.73, 1.31),
        ("30B, 4 GPUs", 10): (3.29, 4.09, 5.09),
        ("30B, 4 GPUs", 100): (2.73, 3.42, 5.12),
        ("70B, 2 GPUs", 10): (0.22, 0.29, 0.60),
        ("70B, 4 GPUs", 10): (1.81, 2.41, 3.46),
    }
    for (point, n), (with_messages, without, base) in published.items():
        assert PAPER[point][f"S-LoRA:{n}"] == pytest.approx(with_messages / base, abs=0.006)
        assert PAPER[point][f"without its messages:{n}"] == pytest.approx(without / base, abs=0.006)
    assert sum(map(len, PAPER.values())) == 2 * len(published)


def test_a_folder_of_results_is_drawn_beside_the_paper(tmp_path):
    draw([a_result("llama-13b", 1), a_result("llama-13b", 2), a_result("llama-30b", 4)], tmp_path / "figure8.png")
    assert (tmp_path / "figure8.png").stat().st_size > 10_000
    (tmp_path / "figure8.png").unlink()
    (tmp_path / "llama-13b_tp2.json").write_text(json.dumps(a_result("llama-13b", 2)))
    result = CliRunner().invoke(main, ["tensor-parallel", "--plot-only", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| llama-13b, 2 | base | 20.0 | 5,200 | 1.00 |" in result.output
    assert (tmp_path / "figure8.png").is_file()
