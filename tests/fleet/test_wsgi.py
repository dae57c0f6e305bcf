"""The application of serve.py called from an event loop, as a replica calls it."""

import asyncio
import json
import threading
import time

import pytest

from slora_jax.api.app import create_app
from slora_jax.fleet.wsgi import Head, Sent, WsgiThreads
from tests.helpers.fake_engine import WAITS, FakeEngine

JSON = (("content-type", "application/json"), ("host", "127.0.0.1:8000"))


@pytest.fixture
def engine(tmp_path):
    engine = FakeEngine(tmp_path / "model")
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def app(engine):
    return create_app(engine, allow_adapter_loading=True)


@pytest.fixture
def threads(app):
    threads = WsgiThreads(app, 8)
    yield threads
    threads.close()


def sent(path: str, fields=None, method="POST", headers=JSON, query="") -> Sent:
    return Sent(method, path, query, headers, b"" if fields is None else json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("path", "fields", "method", "query"),
    [
        ("/v1/completions", {"model": "pirate", "prompt": "ahoy", "max_tokens": 5}, "POST", ""),
        ("/v1/completions", {"model": "nobody", "prompt": "ahoy"}, "POST", ""),
        ("/v1/completions", {"model": "pirate", "prompt": "ahoy", "odd": 1}, "POST", ""),
        ("/v1/completions", None, "POST", ""),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}, "POST", ""),
        ("/v1/models", None, "GET", ""),
        ("/v1/models/org%2Fhaiku", None, "GET", ""),
        ("/v1/capacity", None, "GET", "adapter=pirate&prompt_tokens=10&max_tokens=5"),
        ("/v1/capacity", None, "GET", "prompt_tokens=%C3%A9"),
        ("/v1/completions", None, "GET", ""),
        ("/caf%C3%A9", None, "GET", ""),
    ],
)
def test_an_answer_is_that_of_the_application(app, threads, path, fields, method, query):
    expected = app.test_client().open(f"{path}?{query}", method=method, json=fields, headers={"Host": "127.0.0.1:8000"})
    answer = asyncio.run(threads.whole(sent(path, fields, method, query=query)))
    assert answer.head.status == expected.status_code
    if answer.head.status != 415:  # the test client sends no type where it sends nothing
        assert without_names(answer.body) == without_names(expected.data)
    assert dict(answer.head.headers)["Content-Type"] == expected.headers["Content-Type"]


def without_names(body: bytes):
    value = json.loads(body)
    return {key: item for key, item in value.items() if key not in ("id", "created")}


def test_a_stream_comes_piece_by_piece(engine, threads):
    async def read():
        fields = {"model": "pirate", "prompt": f"{WAITS}ait", "max_tokens": 4, "stream": True}
        pieces = threads.answer(sent("/v1/completions", fields))
        head = await anext(pieces)
        engine.go.set()
        return head, [piece async for piece in pieces]

    head, pieces = asyncio.run(read())
    assert isinstance(head, Head) and head.status == 200
    assert dict(head.headers)["Content-Type"].startswith("text/event-stream")
    assert len(pieces) > 1 and pieces[-1].endswith(b"data: [DONE]\n\n")


def test_a_caller_that_goes_cancels_what_it_asked_for(engine, threads):
    async def go():
        fields = {"model": "pirate", "prompt": f"{WAITS}ait", "max_tokens": 4}
        waiting = asyncio.create_task(threads.whole(sent("/v1/completions", fields)))
        while not engine.generations:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(go())
    deadline = time.monotonic() + 10
    while not engine.generations[0].cancelled:
        assert time.monotonic() < deadline, "the generation goes on though nobody waits for it"
        time.sleep(0.01)


def test_a_fault_of_the_application_is_the_callers():
    def broken(environment, start_response):
        raise RuntimeError("broken")

    threads = WsgiThreads(broken, 1)
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(threads.whole(sent("/")))
    threads.close()


def test_as_many_requests_run_as_there_are_threads():
    together = threading.Barrier(3)

    def app(environment, start_response):
        together.wait(10)
        start_response("200 OK", [])
        return [b"done"]

    async def ask():
        return await asyncio.gather(*(threads.whole(sent("/")) for _ in range(3)))

    threads = WsgiThreads(app, 3)
    assert [answer.body for answer in asyncio.run(ask())] == [b"done"] * 3
    threads.close()
