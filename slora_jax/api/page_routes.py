"""The page at ``/`` and what it asks for once a second: the pool as a picture, adapters by tier, rates and latencies.

The page is three plain files beside this one (``page/``), which load nothing from elsewhere. Its picture of the pool is
bounded whatever the pool's size: see ``MAX_CELLS``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask
import numpy as np

from slora_jax.api.traffic import Served, Traffic, quantile

if TYPE_CHECKING:
    from collections.abc import Callable

    from slora_jax.api.metrics import Onlooker
    from slora_jax.engine.engine import Engine
    from slora_jax.engine.observation import AdapterSeen, Observation

MAX_CELLS = 8192
"""Cells of the picture. In a larger pool a cell stands for several pages, the first of which is shown."""

MAX_OWNERS = 400
"""Owners that the picture tells apart, those with most pages. The adapters among the others have no name in it."""

MAX_LISTED = 200
"""Adapters that are listed: those in faster memory and with more traffic."""

_FOLDER = Path(__file__).parent / "page"
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SHOWN_STATS = (
    "running", "waiting", "steps", "prompt_tokens", "generated_tokens", "cached_tokens", "evictions", "preemptions",
    "adapter_loads", "host_adapter_loads", "host_adapter_bytes", "recoveries", "compilations",
)  # fmt: skip
_TIERS = ("pool", "host", "disk")


def add_page(
    app: flask.Flask,
    engine: "Engine",
    traffic: Traffic,
    onlooker: "Onlooker",
    as_json: "Callable[[Any], flask.Response]",
) -> None:
    """Adds the page, its files and ``/v1/pool`` to an application."""
    files = {name: (_FOLDER / name).read_bytes() for name in ("index.html", *_FILES)}

    def served(name: str, mimetype: str) -> flask.Response:
        response = flask.Response(files[name], mimetype=mimetype)
        response.headers.update(_SECURITY)
        response.add_etag()
        response.make_conditional(flask.request)
        return response

    @app.get("/")
    def page():
        return served("index.html", "text/html")

    @app.get("/page/<name>")
    def page_file(name: str):
        if name not in _FILES:
            flask.abort(404)
        return served(name, _FILES[name])

    @app.get("/v1/pool")
    def pool():
        response = as_json(_shown(engine, traffic, onlooker.look()))
        response.headers["Cache-Control"] = "no-store"
        return response


def _shown(engine: "Engine", traffic: Traffic, seen: "Observation") -> dict[str, Any]:
    stats = engine.stats()
    first_tokens = traffic.recent_first_tokens()
    tiers = dict.fromkeys(_TIERS, 0)
    for adapter in seen.adapters:
        tiers[adapter.tier] += 1
    tokenizer = engine.tokenizer
    return {
        "model": engine.model_name,
        "takes_text": tokenizer is not None,
        "takes_chats": tokenizer is not None and tokenizer.has_chat_template,
        "page_tokens": engine.pool_layout.page_tokens,
        "pages": seen.pool.count(),
        **_picture(seen),
        "tiers": tiers,
        "adapters": _listed(traffic, seen),
        "base": _served(traffic.by_adapter(), engine.model_name),
        "stats": {name: stats[name] for name in _SHOWN_STATS},
        "first_token": {
            "count": len(first_tokens),
            "p50": quantile(first_tokens, 0.5),
            "p95": quantile(first_tokens, 0.95),
        },
    }


def _picture(seen: "Observation") -> dict[str, Any]:
    """The pool's cells, run-length encoded, and their owners."""
    pages_per_cell, runs = seen.pool.runs(MAX_CELLS)
    owners = seen.pool.owners
    if len(owners) > MAX_OWNERS:
        marks = np.array(runs[::2])
        by_size = np.bincount(marks, weights=runs[1::2], minlength=len(owners)).argsort()[::-1]
        named = set(by_size[:MAX_OWNERS].tolist())
        owners = tuple(o if i in named else o._replace(adapter=None) for i, o in enumerate(owners))
    table = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    place = [table[owner] for owner in owners]
    return {
        "pages_per_cell": pages_per_cell,
        "owners": [{"kind": owner.kind, "adapter": owner.adapter} for owner in table],
        "runs": [place[number] if i % 2 == 0 else number for i, number in enumerate(runs)],
    }


def _listed(traffic: Traffic, seen: "Observation") -> list[dict[str, Any]]:
    served = traffic.by_adapter()

    def order(adapter: "AdapterSeen") -> tuple[int, int]:
        name = adapter.info.name
        return _TIERS.index(adapter.tier), -served[name].prompt_tokens if name in served else 0

    return [
        {
            "name": adapter.info.name,
            "tier": adapter.tier,
            "rank": adapter.info.rank,
            "pages": adapter.info.num_pages,
            "pinned": adapter.info.pinned,
            **_served(served, adapter.info.name),
        }
        for adapter in sorted(seen.adapters, key=order)[:MAX_LISTED]
    ]


def _served(by_adapter: dict[str, Served], name: str) -> dict[str, int]:
    served = by_adapter.get(name, Served(0, 0, 0))
    return {"requests": served.requests, "tokens": served.generated_tokens}
