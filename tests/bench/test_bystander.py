import json
import threading
from pathlib import Path

import pytest

from slora_jax.api.app import create_app
from slora_jax.api.server import Server, listen
from slora_jax.bench.bystander import bystander_report, percentile, run_bystander
from slora_jax.bench.hostile import KINDS, Target
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def url(tmp_path):
    engine = FakeEngine(tmp_path / "model")
    engine.start()
    app = create_app(engine, max_body_bytes=20_000)
    server = Server(app, listen("127.0.0.1", 0), max_streams=8, max_body_bytes=20_000, on_stop=engine.close)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server.url
    server.stop()
    thread.join(20)


def test_rows_say_what_was_sent_and_answered(url):
    rows = list(run_bystander(url, 0.2, ["lists", "16mb_prompt", "idle"], 20_000))
    assert [row["kind"] for row in rows] == ["alone", "lists", "16mb_prompt", "idle", "alone again"]
    assert [set(row["answers"]) for row in rows[1:4]] == [{"400"}, {"413"}, {"open", "closed"}]
    for row in rows:
        assert row["failed"] == 0 and row["requests"] > 0 and row["p50_ms"] <= row["p99_ms"] <= row["most_ms"]
        assert row.get("bound_ms", row["p99_ms"]) >= row["p99_ms"] or not row["holds"]


def test_one_row_that_fails_makes_the_whole_fail():
    assert bystander_report([{}, {"holds": True}], "command")["holds"]
    assert not bystander_report([{"holds": False}, {"holds": True}], "command")["holds"]


def test_percentiles_are_values_of_the_sample():
    assert [percentile(range(1, 101), p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([3.0], 99) == 3.0


LARGER = {"100000_prompts", "million_stops", "16mb_prompt"}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.sends and name not in LARGER])
def test_bodies_are_json_and_as_large_as_allowed(name, tmp_path):
    path, body = next(iter(KINDS[name].sends(Target("here", 1, "base", 10_000, Path(tmp_path)))))
    assert path.startswith("/v1/") and json.loads(body)
    assert len(body) <= 10_000
    if name != "patterns":
        assert len(body) > 9_000
