"""The log: a line for each request without its text, one for what changes what is served, plain or as JSON."""

import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slora_jax.api.app import create_app
from tests.helpers.engine_cases import FIXTURES, Case, compiled_fast
from tests.helpers.fake_engine import FAILS

CASE = Case(FIXTURES / "llama3_gqa")
ROOT = Path(__file__).parents[2]
SECRET = "xylophone-under-the-bed"


def said(caplog, logger: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger]


def fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split()[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_a_request(client, caplog, stream):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="slora_jax")  # a launch in this process may have set another
    body = {"model": "pirate", "prompt": SECRET, "max_tokens": 5, "stream": stream}
    with client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {SECRET}"}) as response:
        answer = response.text
    (line,) = said(caplog, "slora_jax.requests")
    found = fields(line)
    assert found["request"].startswith("cmpl-") and found["request"] in answer
    assert (found["model"], found["output_tokens"], found["reason"]) == ("pirate", "5", "length")
    assert int(found["prompt_tokens"]) > 1
    assert 0 <= float(found["first_token_s"]) <= float(found["total_s"]) < 60
    assert SECRET not in caplog.text and "pirate says" not in caplog.text


def test_what_fails_or_is_refused_has_its_line_without_what_was_sent(client, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="slora_jax")  # a launch in this process may have set another
    client.post("/v1/completions", json={"model": "base", "prompt": FAILS + SECRET, "max_tokens": 9})
    client.post("/v1/completions", json={"model": SECRET, "prompt": SECRET})
    client.post("/v1/completions", json={"model": "base", "prompt": SECRET, "temperature": SECRET})
    ended, *refused = [line for line in said(caplog, "slora_jax.requests") if "generation_failed" not in line]
    assert fields(ended)["reason"] == "error"
    assert refused == [
        "refused route=/v1/completions status=404 code=model_not_found param=-",
        "refused route=/v1/completions status=400 code=invalid_request_error param=temperature",
    ]
    assert SECRET not in caplog.text


def test_a_line_for_what_changes_what_is_served(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    adapter = next(CASE.adapters.iterdir())
    with compiled_fast():
        engine = CASE.engine(slow_step_s=1e-9)
        assert said(caplog, "slora_jax.events") == []  # a start says how many, not each
        engine.start()
        client = create_app(engine, allow_adapter_loading=True).test_client()
        try:
            (tmp_path / "nothing").mkdir()
            for path in (adapter, adapter, tmp_path / "nothing"):
                body = {"lora_name": "new", "lora_path": str(path), "load_inplace": True}
                client.post("/v1/load_lora_adapter", json=body)
            client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
            lines = [line for line in said(caplog, "slora_jax.events") if line.startswith("adapter")]
            assert [line.split(":")[0] for line in lines] == [
                "adapter new loaded", "adapter new replaced", "adapter refused", "adapter new unloaded",
            ]  # fmt: skip
            assert str(tmp_path / "nothing") in lines[2]
            body = {"model": engine.model_name, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
            for _ in range(2):  # the first compiles
                assert client.post("/v1/completions", json=body).status_code == 200
        finally:
            engine.close()
    assert any(line.startswith("a step took ") for line in said(caplog, "slora_jax.events"))
    assert any("compiling programs" in message for message in caplog.messages)


def log_of(level: str, as_json: bool) -> list[str]:
    """What a process says whose loggers are each told the same."""
    code = f"""
        import logging
        from slora_jax.api.logs import set_up_logging
        set_up_logging({level!r}, {as_json})
        for name in ("slora_jax.engine.core", "slora_jax.events", "slora_jax.start", "slora_jax.requests", "jax._src.x",
                     "waitress", "werkzeug", "orbax", "urllib3"):
            for severity in (10, 20, 30, 40):
                logging.getLogger(name).log(severity, "%s of %s\\u2028", severity, name, extra={{"fields": {{"n": 1}}}})
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("slora_jax.x").exception("it failed")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.split("\n")[:-1]


@pytest.mark.parametrize(
    ("level", "own", "heard"), [("debug", 10, 10), ("info", 20, 20), ("warning", 30, 20), ("error", 40, 40)]
)
def test_levels(level, own, heard):
    seen = {}
    for line in map(json.loads, log_of(level, as_json=True)):
        assert line["time"].endswith("+00:00") and {"level", "logger", "message"} <= set(line)
        if line["logger"] != "slora_jax.x":
            assert line["n"] == 1
            seen.setdefault(line["logger"], []).append(int(line["message"].split()[0]))
        else:
            assert line["message"] == "it failed" and "ZeroDivisionError" in line["exception"]
    for name, least in {"slora_jax.engine.core": own, "slora_jax.requests": own, "slora_jax.start": heard,
                        "slora_jax.events": heard}.items():  # fmt: skip
        assert seen[name] == [s for s in (10, 20, 30, 40) if s >= least], name
    for name in ("jax._src.x", "waitress", "werkzeug", "orbax", "urllib3"):
        assert seen[name] == [s for s in (30, 40) if s >= own], name


def test_plain_lines_say_what_a_start_says_as_it_stands():
    lines = log_of("warning", as_json=False)
    assert "20 of slora_jax.start\u2028" in lines
    assert any(line.endswith("INFO slora_jax.events: 20 of slora_jax.events\u2028") for line in lines)
