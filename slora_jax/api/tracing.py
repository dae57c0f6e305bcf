"""OpenTelemetry: a span for each request that reaches the engine, sent to a collector.

Attributes are named as OpenTelemetry's conventions for generative AI have them, and times as vLLM does. A request that
brings a W3C ``traceparent`` is part of that trace. The libraries are an extra (``otel``), imported only here and only
when a server is told where to send spans.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slora_jax.api.openai import Call
from slora_jax.errors import InvalidRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from slora_jax.engine.engine import Generation

SERVICE = "slora-jax"
_COLLECTOR_SECONDS = 3
"""How long a collector that does not answer may keep a server from ending."""

_OPERATIONS = {"/v1/completions": "text_completion"}
_ASKED = ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed")
_FAILURES = frozenset({"error", "abort", "late"})


class Tracing:
    """Makes spans. Thread-safe.

    Args:
      provider: where they go.
    """

    def __init__(self, provider: "TracerProvider"):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("slora_jax")
        self._extract = TraceContextTextMapPropagator().extract
        self._kind = trace.SpanKind.SERVER
        self._failed = trace.StatusCode.ERROR

    def begin(
        self,
        headers: Mapping[str, str],
        route: str,
        call: Call,
        answer_id: str,
        generations: Sequence["Generation"],
    ) -> Callable[[], None]:
        """Begins the span of a request.

        Args:
          headers: of the HTTP request.
          route: it came by.
          call: what it asks for.
          answer_id: the answer's.
          generations: that answer it.

        Returns:
          What ends the span; to be called once, when all deltas that are ever taken were taken.
        """
        operation = _OPERATIONS.get(route, "chat")
        sampling = call.requests[0].sampling
        asked = {f"gen_ai.request.{name}": getattr(sampling, name) for name in _ASKED}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": call.model,
            "gen_ai.response.model": call.model,
            "gen_ai.response.id": answer_id,
            "gen_ai.request.id": call.requests[0].request_id,
            "gen_ai.request.choice.count": sampling.n,
            "gen_ai.usage.input_tokens": sum(len(request.prompt) for request in call.requests),
            "http.route": route,
            **{name: value for name, value in asked.items() if value is not None},
        }
        if sampling.stop:
            attributes["gen_ai.request.stop_sequences"] = list(sampling.stop)
        known = {name.lower(): value for name, value in headers.items()}
        span = self._tracer.start_span(
            f"{operation} {call.model}", self._extract(known), kind=self._kind, attributes=attributes
        )

        def end() -> None:
            if span.is_recording():
                span.set_attributes(_outcome(generations))
                if not _FAILURES.isdisjoint(_reasons(generations)):
                    span.set_status(self._failed)
            span.end()

        return end


@contextmanager
def tracing_to(endpoint: str | None) -> Iterator[Tracing | None]:
    """Inside, spans are sent to a collector in the background; at the end those that are left.

    Args:
      endpoint: URL of the collector's OTLP over HTTP, such as ``http://localhost:4318/v1/traces``; None for none.

    Raises:
      InvalidRequest: the libraries are not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as e:
        raise InvalidRequest(
            f"--otlp-traces-endpoint needs OpenTelemetry, and {e.name} is not installed; install slora-jax[otel]"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_COLLECTOR_SECONDS)))
    try:
        yield Tracing(provider)
    finally:
        provider.shutdown()


def _outcome(generations: Sequence["Generation"]) -> dict[str, Any]:
    now = time.monotonic()
    submitted = min(generation.submitted for generation in generations)
    started = [generation.started for generation in generations if generation.started is not None]
    firsts = [generation.timing.first for generation in generations if generation.timing.first is not None]
    last = max((g.timing.last for g in generations if g.timing.last is not None), default=now)
    attributes = {
        "gen_ai.usage.output_tokens": sum(generation.num_generated for generation in generations),
        "gen_ai.usage.cache_read.input_tokens": sum(generation.cached_tokens for generation in generations),
        "gen_ai.response.finish_reasons": _reasons(generations),
        "gen_ai.latency.e2e": last - submitted,
    }
    if started:
        attributes["gen_ai.latency.time_in_queue"] = min(started) - submitted
    if firsts:
        attributes["gen_ai.latency.time_to_first_token"] = min(firsts) - submitted
    return attributes


def _reasons(generations: Sequence["Generation"]) -> list[str]:
    """Why each of the sequences ended; "abort" for those that were not waited for."""
    reasons: list[str] = []
    for generation in generations:
        ended = generation.finish_reasons
        reasons += [*ended, *["abort"] * (generation.request.sampling.n - len(ended))]
    return reasons
