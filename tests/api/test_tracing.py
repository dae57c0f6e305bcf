"""OpenTelemetry: a span for each request, its parent, and nothing at all where nobody asked for any."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from slora_jax.api.app import create_app
from slora_jax.api.tracing import Tracing, tracing_to
from slora_jax.errors import InvalidRequest
from tests.api.test_app import chat, complete
from tests.helpers.fake_engine import FAILS, WAITS

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def client(engine, exporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return create_app(engine, tracing=Tracing(provider)).test_client()


def only(exporter):
    (span,) = exporter.get_finished_spans()
    exporter.clear()
    return span


def test_a_span_says_what_was_asked_for_and_what_came_of_it(client, exporter):
    headers = {"X-Request-Id": "mine"}
    body = {"model": "pirate", "prompt": ["hello", "hello"], "max_tokens": 7, "temperature": 0.5, "n": 2, "stop": "zz"}
    answer = client.post("/v1/completions", json=body, headers=headers).get_json()
    span = only(exporter)
    assert (span.name, span.kind, span.parent) == ("text_completion pirate", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    said = dict(span.attributes)
    assert 0 <= said.pop("gen_ai.latency.time_in_queue") <= said["gen_ai.latency.time_to_first_token"]
    assert 0 < said.pop("gen_ai.latency.time_to_first_token") <= said["gen_ai.latency.e2e"]
    assert said.pop("gen_ai.latency.e2e") <= (span.end_time - span.start_time) / 1e9 + 0.05
    assert said == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slora-jax",
        "gen_ai.request.model": "pirate",
        "gen_ai.response.model": "pirate",
        "gen_ai.response.id": answer["id"],
        "gen_ai.request.id": "mine",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.stop_sequences": ("zz",),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 6,
        "gen_ai.response.finish_reasons": ("length",) * 4,
        "http.route": "/v1/completions",
    }


def test_a_stream_is_one_span_that_ends_with_it(client, exporter):
    response = chat(client, stream=True)
    assert not exporter.get_finished_spans()
    assert response.text and response.status_code == 200
    response.close()
    span = only(exporter)
    assert span.name == "chat base" and span.attributes["gen_ai.usage.output_tokens"] == 12


def test_it_is_part_of_the_clients_trace(client, exporter):
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    for name in ("traceparent", "Traceparent"):
        client.post("/v1/completions", json=body, headers={name: f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"})
        span = only(exporter)
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
        assert span.context.trace_state.get("a") == "b"
    client.post("/v1/completions", json=body, headers={"traceparent": "nonsense"})
    assert only(exporter).parent is None
    # A client that does not record its own trace is not recorded here either.
    client.post("/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not exporter.get_finished_spans()


def test_failures_and_clients_that_go_away(client, exporter, engine):
    assert complete(client, prompt=FAILS).status_code == 500
    span = only(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    stream = complete(client, prompt=f"{WAITS} a while", stream=True, echo=True)  # which comes at once
    stream.close()
    span = only(exporter)
    assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert "gen_ai.latency.time_to_first_token" not in span.attributes
    assert complete(client, n=0).status_code == 400
    assert client.get("/v1/models").status_code == 200
    assert not exporter.get_finished_spans(), "of what reaches the engine only"


def test_spans_are_sent_to_the_collector(engine):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            """Nowhere."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with tracing_to(f"http://127.0.0.1:{server.server_port}/v1/traces") as tracing:
                client = create_app(engine, tracing=tracing).test_client()
                assert complete(client, model="pirate", max_tokens=2).status_code == 200
        finally:
            server.shutdown()
            thread.join()
    ((path, body),) = got
    assert path == "/v1/traces" and b"text_completion pirate" in body


def test_without_an_endpoint_nothing_is_imported():
    script = (
        "import sys, slora_jax.api.app, slora_jax.api.tracing as t\n"
        "with t.tracing_to(None) as tracing: assert tracing is None\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidRequest, match=r"install slora-jax\[otel\]"), tracing_to("http://x"):
        pass
