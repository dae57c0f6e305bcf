"""The page's files and /v1/pool, without a browser."""

from array import array

import numpy as np
import pytest

from slora_jax.api.app import create_app
from slora_jax.api.page_routes import MAX_CELLS
from slora_jax.memory.pages import PageAllocator
from slora_jax.request import SamplingParams
from slora_jax.scheduler.sequence import Sequence
from slora_jax.scheduler.view import Owner, PoolView, view_pool
from tests.helpers.engine_cases import FIXTURES, Case, running
from tests.helpers.fake_engine import AdapterInfo

CASE = Case(FIXTURES / "llama3_gqa")


@pytest.fixture(scope="module")
def engine():
    with running(CASE, pages=60) as engine:
        yield engine


def test_files_are_served_under_a_strict_policy(client):
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        response = client.get(path)
        assert response.status_code == 200 and response.mimetype == kind
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy) and "http" not in str(policy)
        assert client.get(path, headers={"If-None-Match": response.headers["ETag"]}).status_code == 304
    for path in ("/page/index.html", "/page/../app.py", "/page/page.png", "/page/"):
        assert client.get(path).status_code == 404


def cells_of(body: dict) -> list[dict]:
    owners, runs = body["owners"], body["runs"]
    return [owners[runs[i]] for i in range(0, len(runs), 2) for _ in range(runs[i + 1])]


def test_the_picture_is_the_pool(engine):
    client = create_app(engine).test_client()
    asked = sorted(engine.adapters())[0]
    fields = {"prompt": list(range(3, 60)), "max_tokens": 5, "ignore_eos": True}
    assert client.post("/v1/completions", json={"model": asked} | fields).status_code == 200
    body = client.get("/v1/pool").get_json()
    cells = cells_of(body)
    assert len(cells) == sum(body["pages"].values()) == engine.stats()["pages_total"] == 59
    for kind, number in body["pages"].items():
        assert sum(cell["kind"] == kind for cell in cells) == number
    assert cells.count({"kind": "adapters", "adapter": asked}) == engine.adapter(asked).num_pages
    assert body["pages"]["prefix"] == 3 and body["pages"]["kv"] == 0  # full pages of 57 + 4 tokens that were computed
    first, *others = body["adapters"]
    assert (first["name"], first["tier"], first["requests"], first["tokens"]) == (asked, "pool", 1, 5)
    assert all(other["tier"] == "disk" for other in others) and body["tiers"] == {"pool": 1, "host": 0, "disk": 2}
    assert body["first_token"]["count"] == 1 and body["first_token"]["p50"] > 0


def test_running_sequences_own_what_they_compute_with():
    pages = PageAllocator(20)
    weights, prompt, own = pages.allocate(4), pages.allocate(2), pages.allocate(3)
    pages.publish(("adapter", "hash"), weights)
    for number, page in enumerate(prompt):
        pages.publish(bytes([number]), [page])
    sequence = Sequence(0, [1], 1, 1, SamplingParams(), 0, adapter=AdapterInfo("a"), tenant="a")
    sequence.pages = array("i", [prompt[0], *own])
    view = view_pool(pages, [sequence], {("adapter", "hash"): "a"})
    assert view.count() == {"free": 10, "kv": 4, "prefix": 1, "adapters": 4}
    assert view.owners[view.pages[own[0] - 1]] == Owner("kv", "a")
    assert view.owners[view.pages[weights[0] - 1]] == Owner("adapters", "a")


@pytest.mark.parametrize("total", [1, 7, MAX_CELLS, MAX_CELLS + 1, 10 * MAX_CELLS + 3])
def test_the_picture_is_bounded(total):
    marks = np.random.default_rng(total).integers(0, 5, total, dtype=np.int32)
    view = PoolView(tuple(Owner("kv", str(i)) for i in range(5)), marks)
    per_cell, runs = view.runs(MAX_CELLS)
    cells = np.repeat(runs[::2], runs[1::2])
    assert len(cells) == -(-total // per_cell) <= MAX_CELLS
    assert (cells == marks[::per_cell]).all() and (np.diff(runs[::2]) != 0).all()
    assert sum(view.count().values()) == total
