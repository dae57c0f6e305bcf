"""The server under load: in small as a test of every day, whole as one that is slow."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from slora_jax.bench import soak
from slora_jax.bench.__main__ import main
from slora_jax.bench.loads import run_loads
from slora_jax.bench.loads import table as table_of_loads


@pytest.mark.timeout(600)  # compiles, on a machine that never did
def test_a_short_load_loses_nothing(capsys):
    result = soak.run_soak(10, 12, print, changing=1)
    print(soak.table(result))
    checks = {name: holds for name, holds in result["checks"].items() if "memory grows" not in name}
    # So short a run is all warm-up: programs are loaded until its end.
    assert len(checks) == 7 and all(checks.values()), capsys.readouterr().out
    for name in ("completed", "slow", "hung_up"):
        assert result["requests"][name] > 0, name
    assert result["adapters"]["loads"] == result["adapters"]["unloads"] > 0
    assert result["at_rest"]["end"]["mib"] < 1.5 * result["at_rest"]["after_warm_up"]["mib"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_minutes_of_512_streams_lose_nothing(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "slora_jax.bench", "soak", "--out", str(out)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["streams"] == 512 and result["seconds"] == 300 and all(result["checks"].values())


@pytest.mark.slow
def test_loads_are_measured_beside_a_stream():
    result = run_loads(8, 20)
    assert [row["case"] for row in result["rows"]] == [
        "alone", "register", "bring", "first_use", "use", "alone_again"
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["gaps"] >= 20 and 0 < row["p50_ms"] <= row["p99_ms"] <= row["most_ms"]
        assert row["what"] in table_of_loads(result)


@pytest.mark.parametrize("command", ["soak", "loads"])
def test_what_fails_ends_with_code_1(command, monkeypatch, tmp_path):
    monkeypatch.setattr(f"slora_jax.bench.{command}.run_{command}", lambda *args: {"holds": False})
    monkeypatch.setattr(f"slora_jax.bench.{command}.table", lambda result: "FAILS")
    out = tmp_path / "out.json"
    done = CliRunner().invoke(main, [command, "--out", str(out)])
    assert done.exit_code == 1 and "FAILS" in done.output
    assert json.loads(out.read_text()) == {"command": f"python -m slora_jax.bench {command}", "holds": False}


def test_during_a_change_either_version_is_right():
    reigns, old, new = soak.Reigns(), Path("old"), Path("new")
    before = time.monotonic()
    with reigns.change(old):
        during = time.monotonic()
    loaded = time.monotonic()
    assert reigns.between(before, before) == {None}
    assert reigns.between(before, loaded) == reigns.between(during, during) == {None, old}
    assert reigns.between(loaded, loaded) == {old}
    with reigns.change(new):
        assert reigns.between(time.monotonic(), time.monotonic()) == {old, new}
    assert reigns.between(loaded, loaded) == {old}
    assert reigns.between(loaded, time.monotonic()) == {old, new}
    with pytest.raises(RuntimeError), reigns.change(None):
        raise RuntimeError("refused")
    assert reigns.between(time.monotonic(), time.monotonic()) == {new}
