"""The load generator, against servers whose answers are known."""

import contextlib
import json
import socketserver
import threading
import time

import pytest
from click.testing import CliRunner

from slora_jax.api.access import Access
from slora_jax.api.app import create_app
from slora_jax.api.server import Server, listen
from slora_jax.bench.__main__ import main
from slora_jax.bench.serve import Load, body_of, draw, summary
from slora_jax.bench.sse import Ask, ChunkedReader, EventReader, Heard, run_clients
from slora_jax.bench.workload import Lengths, OpenTrace, draw_workload
from tests.helpers.fake_engine import FakeEngine

LOAD = Load(
    requests=40, clients=8, rate=50.0, cv=1.0, choice="uniform", alpha=1.0, lengths=Lengths.below(20), vocab_size=100,
    route="completions", seed=3,
)  # fmt: skip
# Token ids below 30 are no letters: prompts that begin with some make the fake engine wait, or fail.
SMALL = ["--longest", "20", "--vocab-size", "30", "--requests", "24", "--warm-up", "4", "--no-calibrate"]


@contextlib.contextmanager
def served(engine, **rules):
    engine.start()
    server = Server(create_app(engine, **rules), listen("127.0.0.1", 0), max_streams=16, on_stop=engine.close)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join(20)


@pytest.fixture
def url(tmp_path):
    with served(FakeEngine(tmp_path / "model")) as url:
        yield url


def run(*arguments, code=0, **env):
    done = CliRunner().invoke(main, ["serve", *arguments], env=env)
    assert done.exit_code == code, done.output
    return done


def test_a_body_cut_anywhere_is_read_as_the_same_events():
    said = [b'{"a": 1}', b"[DONE]", b"two\nlines"]
    body = b": a comment\n\ndata: " + said[0] + b"\r\n\r\ndata:" + said[1] + b"\n\ndata: two\ndata: lines\n\n"
    pieces = [body[:7], body[7:8], body[8:30], body[30:]]
    chunked = b"".join(b"%X;x=y\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    for size in (1, 2, 3, 7, len(chunked)):
        chunks, events = ChunkedReader(), EventReader()
        got = [
            event for at in range(0, len(chunked), size) for event in events.push(chunks.push(chunked[at : at + size]))
        ]
        assert got == said, size


def test_the_workload_is_that_of_the_engine():
    assert draw(LOAD, 5, 40, 3) == draw_workload(40, 5, 100, 3, Lengths.below(20))
    assert draw(LOAD, 1, 40, 3) == draw_workload(40, 0, 100, 3, Lengths.below(20))
    as_open = Load(**{**vars(LOAD), "clients": None, "choice": "power"})
    assert draw(as_open, 5, 40, 3) == draw_workload(40, 5, 100, 3, Lengths.below(20), OpenTrace(50.0, 1.0, 1.0))


@pytest.mark.parametrize(("choice", "clients"), [("turn", 8), ("turn", None), ("power", 8), ("uniform", None)])
def test_how_models_are_chosen_changes_nothing_else(choice, clients):
    items = draw(Load(**{**vars(LOAD), "choice": choice, "clients": clients}), 4, 400, 3)
    assert [(i.prompt, i.num_output) for i in items] != [(i.prompt, i.num_output) for i in draw(LOAD, 4, 400, 4)]
    assert [len(i.prompt) for i in items] == [len(i.prompt) for i in draw(LOAD, 4, 400, 3)]
    counts = [sum(i.adapter == k for i in items) for k in range(4)]
    if choice == "turn":
        assert [i.adapter for i in items[:6]] == [0, 1, 2, 3, 0, 1]
    elif choice == "power":
        assert counts[0] > 1.5 * counts[1] > 0 and counts[0] > 2.5 * counts[3] > 0
    else:
        assert min(counts) > 70
    assert clients is not None or 0 < items[0].arrival < items[-1].arrival


def test_chats_have_as_many_words_as_prompts_have_tokens():
    item = draw_workload(1, 0, 100, 3, Lengths.below(20))[0]
    body = body_of(item, Load(**{**vars(LOAD), "route": "chat"}), "m", {"ignore_eos": True})
    assert "prompt" not in body and body["ignore_eos"] and body["max_tokens"] == item.num_output
    assert len(body["messages"][0]["content"].split()) == len(item.prompt)


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_every_request_is_answered_in_full_and_tokens_are_those_of_the_server(url, route):
    result = json.loads(run(url, *SMALL, "--clients", "6", "--processes", "2", "--route", route).stdout)
    expected = sum(item.num_output for item in draw_workload(24, 0, 30, 42, Lengths.below(20)))
    assert (result["answered"], result["errors"]) == (24, {})
    # The server merges what waits, so there may be fewer events than tokens.
    assert result["output_tokens"] == expected >= result["events"] > 0
    assert result["tokens_counted_by"] == "the server"
    assert result["requests_per_second"] == pytest.approx(24 / result["wall_seconds"])
    assert result["output_tokens_per_second"] == pytest.approx(expected / result["wall_seconds"])
    for name in ("first_token_seconds", "latency_seconds"):
        assert 0 < result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"] <= result[name]["most"]
    assert result["generator"]["processes"] == 2 and result["generator"]["cpu_seconds"] > 0
    assert url in result["command"]


def test_arrivals_are_kept_and_adapters_found_by_their_prefix(url):
    result = json.loads(
        run(url, *SMALL, "--trace", "open", "--rate", "40", "--model-prefix", "p", "--processes", "1").stdout
    )
    last = draw_workload(24, 0, 30, 42, Lengths.below(20), OpenTrace(40.0, 1.0, 1.0))[-1].arrival
    assert result["models"] == 1 and result["answered"] == 24
    assert last < result["wall_seconds"] < last + 2
    assert result["generator"]["sent_late_milliseconds"]["p50"] < 100


def test_keys_are_sent_and_not_noted(tmp_path):
    with served(FakeEngine(tmp_path / "model"), access=Access(keys=["sk-secret"])) as url:
        done = run(url, *SMALL, "--api-key", "sk-secret", "--processes", "1")
        assert json.loads(done.stdout)["answered"] == 24 and "sk-secret" not in done.output
        assert "lists no models" in run(url, *SMALL, code=1).output


def test_errors_are_counted_by_their_kind(tmp_path):
    # More clients than may run at a time.
    with served(FakeEngine(tmp_path / "model", max_running=2, step_seconds=0.01)) as url:
        done = run(url, *SMALL, "--clients", "12", "--processes", "1", code=1)
        result = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    ((kind, count),) = result["errors"].items()
    assert kind.startswith("HTTP 429: the waiting queue is full")
    assert count + result["answered"] == 24 and count > 0


def test_nobody_there_and_no_such_model_are_said_in_a_sentence(url):
    assert "begins with 'zz'" in run(url, *SMALL, "--model-prefix", "zz", code=1).output
    assert "does not answer" in run("http://127.0.0.1:9", *SMALL, code=1).output
    assert "refuses a small request: HTTP 404" in run(url, *SMALL, "--model", "zz", code=1).output


class _Plain(socketserver.StreamRequestHandler):
    """Answers each request with the next of the class's answers, given as pieces with pauses between."""

    answers: list[list[bytes]]
    pause = 0.05

    def handle(self):
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        for piece in self.answers.pop(0):
            self.wfile.write(piece)
            time.sleep(self.pause)


@contextlib.contextmanager
def plain(*answers):
    handler = type("Handler", (_Plain,), {"answers": list(answers)})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def event(text, **more):
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], **more}).encode() + b"\n\n"


def hear(*pieces):
    with plain(pieces) as url:
        return run_clients(url, [Ask("/v1/completions", b"{}")], 1, 0.0).heard[0]


def test_gaps_are_between_events_that_bring_text():
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 4}}\n\n'
    heard = hear(OK + event("a"), b": waiting\n\n", event("b") + event("c"), usage, b"data: [DONE]\n\n")
    assert (heard.tokens, heard.is_counted, heard.prompt_tokens, heard.error) == (7, True, 4, None)
    first, second = heard.events[1] - heard.events[0], heard.events[2] - heard.events[1]
    assert 0.09 < first < 0.2 and second == 0
    assert heard.end - heard.events[-1] > 0.09


def test_without_usage_events_are_counted():
    heard = hear(OK + event("a"), event("b"), b"data: [DONE]\n\n")
    assert (heard.tokens, heard.is_counted, heard.prompt_tokens) == (2, False, None)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([OK + event("a")], "broken off: the connection ended ahead of the answer"),
        ([b""], "broken off: the connection ended ahead of the answer"),
        ([b"HTTP/1.1 503 Busy\r\n\r\n", b'{"error": {"message": "later"}}'], "HTTP 503: later"),
        ([b"HTTP/1.1 502 Bad\r\n\r\n", b"<html>"], "HTTP 502: <html>"),
        ([OK + b'data: {"error": {"message": "not finite"}}\n\n'], "an error as event: not finite"),
        ([OK + b"data: {\n\n"], "an event that is not JSON"),
    ],
)
def test_what_goes_wrong_is_named(pieces, error):
    assert hear(*pieces).error == error


def test_figures_of_known_times():
    def one(due, events, tokens, error=None):
        return Heard(due, due, events, tokens, True, 5, events[-1] + 0.5, error)

    heard = [one(0.0, [1.0, 1.5, 2.0], 4), one(1.0, [2.0, 2.5, 5.0], 3), one(0.0, [9.0], 1, "broken")]
    result = summary(heard, 0.0, True, [4, 9, 1])
    assert result["errors"] == {"broken": 1, "an answer has not as many tokens as were asked for": 1}
    assert result["answered"] == 2 and result["wall_seconds"] == 5.5
    assert result["output_tokens"] == 7 and result["tokens_per_event"] == pytest.approx(7 / 6)
    assert result["gap_milliseconds"]["p50"] == 500 and result["gap_milliseconds"]["most"] == 2500
    assert result["gap_p99_over_median"] == pytest.approx(result["gap_milliseconds"]["p99"] / 500)
    assert result["first_token_seconds"]["mean"] == 1.0
    assert result["token_milliseconds"]["mean"] == pytest.approx((1000 / 3 + 3000 / 2) / 2)
    assert result["latency_seconds"]["most"] == 4.5
    assert summary([heard[2]], 0.0, True, [1]) == {"answered": 0, "errors": {"broken": 1}}


def test_the_generator_says_what_it_can_take(url):
    arguments = [*SMALL[:-1], "--calibrate", "--clients", "4", "--processes", "1"]
    limits = json.loads(run(url, *arguments).stdout)["generator"]["calibration"]
    assert limits["streams"] == 4 and limits["events"] == 4 * 200
    assert limits["events_per_second"] > 1000 and limits["events_per_cpu_second"] > 1000
