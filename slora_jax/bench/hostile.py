"""Clients that ask too much, one kind at a time; ``bystander`` runs this file as a program of its own.

    python hostile.py KIND URL MODEL BODY_BYTES FOLDER

It prints ``ready`` once its first request is answered (or its connections are open), goes on until its input ends,
and then prints as JSON how often each status came. It needs the standard library only, so that it starts at once and
never shares an interpreter with whoever measures.
"""

import collections
import contextlib
import http.client
import itertools
import json
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

with contextlib.suppress(ImportError):  # not on Windows
    import resource

CONNECTIONS = 2000
PATTERNS = 50_000

_TIMEOUT_SECONDS = 300
_COMPLETIONS = "/v1/completions"


class Target(NamedTuple):
    """A server, the model that it serves, the largest body to send it, and a folder to leave files in."""

    host: str
    port: int
    model: str
    body_bytes: int
    folder: Path


class Kind(NamedTuple):
    """One kind of hostile client.

    Attributes:
      what: for a table.
      sends: yields (path, body) of the next request; None if connections are opened instead.
      opens: bytes that each of ``CONNECTIONS`` connections begins with.
      drips: sends one more byte on every connection each second.
    """

    what: str
    sends: Callable[["Target"], Iterator[tuple[str, bytes]]] | None = None
    opens: bytes = b""
    drips: bool = False


class _Requests(NamedTuple):
    """The same body again and again."""

    path: str
    body: Callable[[Target], bytes]

    def __call__(self, target: Target) -> Iterator[tuple[str, bytes]]:
        return itertools.repeat((self.path, self.body(target)))


def _completion(target: Target, **fields: object) -> bytes:
    return json.dumps({"model": target.model, "prompt": "The moon is", "max_tokens": 4} | fields).encode()


def _full(field: str, item: bytes, opening: bytes = b"[", closing: bytes = b"]", path: str = _COMPLETIONS) -> _Requests:
    """Requests whose ``field`` holds as many ``item`` as make the largest body that is allowed."""

    def body(target: Target) -> bytes:
        fields = {"model": target.model, "max_tokens": 4} | ({"prompt": "a"} if field == "stop" else {})
        before = json.dumps(fields).encode().removesuffix(b"}") + b', "%s": %s' % (field.encode(), opening)
        after = closing + b"}"
        items = item * ((target.body_bytes - len(before) - len(after)) // len(item))
        return before + items.removesuffix(b",") + after

    return _Requests(path, body)


def _many_keys(target: Target) -> bytes:
    return b"{" + b",".join(b'"%06x":1' % i for i in range(target.body_bytes // 11)) + b"}"


def _adapters(target: Target) -> Iterator[tuple[str, bytes]]:
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "rank_pattern": {rf".*layers\.{i}\.(self_attn|mlp)\..*_proj": 4 for i in range(PATTERNS)},
    }
    (target.folder / "adapter_config.json").write_text(json.dumps(config))
    # An empty file of tensors: eight bytes of length, and an empty header.
    (target.folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for i in itertools.count():
        fields = {"lora_name": f"hostile{i}", "lora_path": str(target.folder)}
        yield "/v1/load_lora_adapter", json.dumps(fields).encode()


_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"

KINDS = {
    "token_ids": Kind("token ids 1, to the limit", _full("prompt", b"1,")),
    "lists": Kind("empty lists, to the limit", _full("prompt", b"[],")),
    "nested": Kind("lists in lists, to the limit", _full("prompt", b"[" * 100 + b"]" * 100 + b",")),
    "objects": Kind("small objects, to the limit", _full("prompt", b'{"":0},')),
    "fields": Kind("unknown fields, to the limit", _Requests(_COMPLETIONS, _many_keys)),
    "escapes": Kind("a prompt of escapes, to the limit", _full("prompt", b"\\u00e9", b'"', b'"')),
    "text": Kind("a prompt of words, to the limit", _full("prompt", b"the moon ", b'"', b'"')),
    "letters": Kind("a prompt of one letter, to the limit", _full("prompt", b"a", b'"', b'"')),
    "prompts": Kind("prompts, to the limit", _full("prompt", b'"a",')),
    "stops": Kind("stop strings, to the limit", _full("stop", b'"abcde",')),
    "stop_numbers": Kind("stops that are numbers, to the limit", _full("stop", b"1,")),
    "messages": Kind(
        "chat messages, to the limit",
        _full("messages", b'{"role":"user","content":"a"},', path="/v1/chat/completions"),
    ),
    "100000_prompts": Kind(
        "100,000 prompts", _Requests(_COMPLETIONS, lambda target: _completion(target, prompt=["a"] * 100_000))
    ),
    "million_stops": Kind(
        "a million stop strings",
        _Requests(_COMPLETIONS, lambda target: _completion(target, stop=[f"{i:05x}" for i in range(1_000_000)])),
    ),
    "16mb_prompt": Kind(
        "a prompt of 16 MiB",
        _Requests(_COMPLETIONS, lambda target: _completion(target, prompt="the moon is far " * 2**20)),
    ),
    "patterns": Kind(f"loads of adapters with {PATTERNS:,} patterns", _adapters),
    "idle": Kind(f"{CONNECTIONS:,} idle connections", opens=b""),
    "half_headers": Kind(f"{CONNECTIONS:,} half-sent headers", opens=_HEAD),
    "half_bodies": Kind(f"{CONNECTIONS:,} half-sent bodies", opens=_HEAD + b"Content-Length: 1000\r\n\r\n{"),
    "drips": Kind(f"{CONNECTIONS:,} headers, a byte a second", opens=_HEAD + b"X: ", drips=True),
}


def _send(kind: Kind, target: Target, stop: threading.Event) -> dict[str, int]:
    statuses: collections.Counter[str] = collections.Counter()
    for path, body in kind.sends(target):
        if stop.is_set():
            break
        statuses[_answer(target, path, body)] += 1
        if sum(statuses.values()) == 1:
            print("ready", flush=True)
    return dict(statuses)


def _answer(target: Target, path: str, body: bytes) -> str:
    """The status of one request, sent on a connection of its own; ``dropped`` if there is none."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=_TIMEOUT_SECONDS)
    try:
        # A server that refuses a large body by its length may close before it is all sent.
        with contextlib.suppress(ConnectionError):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except (OSError, http.client.HTTPException):
        return "dropped"
    finally:
        connection.close()


def _open(kind: Kind, target: Target, stop: threading.Event) -> dict[str, int]:
    with contextlib.suppress(NameError, ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(CONNECTIONS + 256, hard), hard))
    sockets = []
    for _ in range(CONNECTIONS):
        sock = socket.create_connection((target.host, target.port), timeout=_TIMEOUT_SECONDS)
        sock.sendall(kind.opens)
        sockets.append(sock)
    print("ready", flush=True)
    while not stop.wait(1.0):
        for sock in sockets if kind.drips else ():
            with contextlib.suppress(OSError):
                sock.sendall(b"x")
    still_open = sum(map(_is_open, sockets))
    return {"open": still_open, "closed": CONNECTIONS - still_open}


def _is_open(sock: socket.socket) -> bool:
    with contextlib.closing(sock):
        sock.setblocking(False)
        try:
            return bool(sock.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False


def main(name: str, url: str, model: str, body_bytes: str, folder: str) -> None:
    stop = threading.Event()

    def wait_for_the_end():
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    parts = urllib.parse.urlsplit(url)
    target = Target(parts.hostname, parts.port, model, int(body_bytes), Path(folder))
    kind = KINDS[name]
    result = _send(kind, target, stop) if kind.sends else _open(kind, target, stop)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
