"""Who may ask for what: API keys and their limits, the admin key, and which browsers' pages may talk to the server.

A key is kept as its SHA-256 only, and compared in constant time; none is ever part of a message or a log line. The
module knows headers and names, but no web framework: its errors are given their status codes by ``app``.
"""

import contextlib
import fnmatch
import hashlib
import hmac
import ipaddress
import itertools
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from slora_jax.api.body import UnsupportedBody, read_json
from slora_jax.config import Section, Text, checked, read_yaml
from slora_jax.errors import InvalidRequest, SLoRAError, shown
from slora_jax.request import MAX_PRIORITY

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/ready", "/openapi.json", "/", "/page/<name>"})
"""Paths, as routes are written, that need no key: what probes ask, the API's description, and a page's own files. None
of it is secret."""

WATCH_PATHS = frozenset({"/metrics", "/v1/pool"})
"""Paths that show what all tenants do. They need the admin key where there is one, else a key where there are some."""

ADMIN_PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/pin_lora_adapter",
        "/v1/unpin_lora_adapter",
    }
)
"""Paths that change what the server serves."""

EXPOSED_HEADERS = "X-Request-Id, Retry-After"
"""Headers of an answer that a page of an allowed origin may read."""

_PREFLIGHT_SECONDS = "600"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_KEYS = 10_000
_MOST_FILE_BYTES = 2**20
_MOST_SAID = 10
_TOKEN_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,1000}")

_log = logging.getLogger("slora_jax.start")
"""Of what an operator asked for, and so said at every level but error."""


class Unauthorized(SLoRAError):
    """The request needs a key and has none that this server knows."""


class Forbidden(SLoRAError):
    """The request is not for its sender, or not by this way; ``code`` tells programs why, ``param`` names the field."""

    def __init__(self, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.code = code
        self.param = param


class RateLimited(SLoRAError):
    """The key's requests or tokens of this minute are used up.

    Attributes:
      retry_after: whole seconds, at least 1, after which there is room again.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class _Entry(Section):
    """One key of the keys file.

    Attributes:
      sha256: of the key's UTF-8 bytes, as 64 hexadecimal digits.
      name: what the holder is called in logs.
      adapters: the models that it may use: ``all``, or names, in which ``*`` stands for anything. The base model is one
        of them, under its own name.
      requests_per_minute, tokens_per_minute: None for no limit. Tokens are those of prompts and answers together.
      priority: under the policy ``priority``, what its requests have; they may ask for less, and not for more.
    """

    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9A-Fa-f]{64}$")]
    name: Text
    adapters: Literal["all"] | tuple[Text, ...] = "all"
    requests_per_minute: int | None = pydantic.Field(None, ge=1, le=10**9)
    tokens_per_minute: int | None = pydantic.Field(None, ge=1, le=10**12)
    priority: int = pydantic.Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)


class _File(Section):
    keys: Annotated[tuple[_Entry, ...], pydantic.Field(max_length=_MOST_KEYS)]

    @pydantic.model_validator(mode="after")
    def _each_once(self):
        for field in ("sha256", "name"):
            values = [getattr(entry, field).lower() for entry in self.keys]
            if len(set(values)) < len(values):
                twice = next(i for i, value in enumerate(values) if value in values[:i])
                raise ValueError(f"keys.{twice}.{field} is there twice; each key and each name may be there once")
        return self


class _Bucket:
    """An allowance that refills steadily, to at most a minute's worth. It may fall below zero, and then blocks."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._spent = 0.0
        self._seen = clock()

    def wait(self, per_minute: int, least: float) -> float:
        """Seconds until ``least`` of the allowance is there; 0 if it is."""
        now = self._clock()
        self._spent = max(0.0, self._spent - (now - self._seen) * per_minute / 60)
        self._seen = now
        return max(0.0, (self._spent + least - per_minute) * 60 / per_minute)

    def spend(self, amount: float) -> None:
        self._spent += amount


class _Usage:
    """What a key has used lately; it outlives a reading of the keys file."""

    def __init__(self, clock: Callable[[], float]):
        self.lock = threading.Lock()
        self.requests = _Bucket(clock)
        self.tokens = _Bucket(clock)


@dataclass(frozen=True)
class Caller:
    """Who sent a request, and what that allows.

    Attributes:
      name: for logs; "" where the server asks for no keys.
      is_admin: it brought the admin key, with which there are no limits.
      patterns: names of the models that it may use, with ``*``; None for all.
      requests_per_minute, tokens_per_minute: None for no limit.
      priority: most that its requests may have, and what they have if they ask for none; None for what they ask for.
    """

    name: str = ""
    is_admin: bool = False
    patterns: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int | None = None
    _usage: _Usage | None = None

    def may_use(self, model: str) -> bool:
        """Whether it may use the adapter, or the base model, of this name."""
        return self.patterns is None or any(fnmatch.fnmatchcase(model, pattern) for pattern in self.patterns)

    def check_model(self, model: str) -> None:
        """Says no in the same words whether the model exists or not.

        Raises:
          Forbidden: it may not use the model.
        """
        if not self.may_use(model):
            raise Forbidden(
                f"this API key may not use the model {shown(model)}; GET /v1/models lists what it may use",
                "model_not_allowed",
                "model",
            )

    def admit(self) -> None:
        """Counts one request.

        Raises:
          RateLimited: there have been too many of late, or too many tokens; it is not counted then.
        """
        if self._usage is None:
            return
        with self._usage.lock:
            for bucket, per_minute, what in (
                (self._usage.requests, self.requests_per_minute, "requests"),
                (self._usage.tokens, self.tokens_per_minute, "tokens"),
            ):
                wait = 0.0 if per_minute is None else bucket.wait(per_minute, 1)
                if wait > 0:
                    seconds = max(1, math.ceil(wait))
                    raise RateLimited(
                        f"this API key may use {per_minute} {what} a minute, and they are used up; "
                        f"try again in {seconds} s",
                        seconds,
                    )
            self._usage.requests.spend(1)

    def spend(self, tokens: int) -> None:
        """Counts tokens, which may use up more than is left: later requests then wait for it."""
        if self._usage is not None and self.tokens_per_minute is not None:
            with self._usage.lock:
                self._usage.tokens.wait(self.tokens_per_minute, 0)  # what came back meanwhile is taken in first
                self._usage.tokens.spend(tokens)

    def allowed_priority(self, asked: int) -> int:
        """What a request's priority is when it asks for this one, within ±``MAX_PRIORITY``."""
        return asked if self.priority is None else max(self.priority + min(asked, 0), -MAX_PRIORITY)


_ANYBODY = Caller()
_ADMIN = Caller("admin", is_admin=True)


class Access:
    """The rules of one server. Thread-safe.

    Args:
      keys: API keys that may do everything but administer.
      keys_file: a YAML or JSON file with more of them; see ``_Entry`` for its fields.
      admin_key: what the routes of ``ADMIN_PATHS`` need; it is good for all others too.
      allow_adapter_loading: without an ``admin_key``, open those routes to whoever reaches this machine's own address.
      host: the address that the server listens on.
      allowed_hosts: further names that the server is called by, in the header Host.
      allowed_origins: origins (``https://example.org``) of pages that may use the server from a browser; ``*`` for any.
      clock: monotonic seconds.

    Raises:
      InvalidRequest: the keys file cannot be used, and why.
    """

    def __init__(
        self,
        *,
        keys: Iterable[str] = (),
        keys_file: str | Path | None = None,
        admin_key: str | None = None,
        allow_adapter_loading: bool = False,
        host: str = "127.0.0.1",
        allowed_hosts: Collection[str] = (),
        allowed_origins: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._given = {_digest(key): Caller(f"api-key-{i}") for i, key in enumerate(keys, 1)}
        self._file = None if keys_file is None else Path(keys_file)
        self._admin = None if admin_key is None else _digest(admin_key)
        self._allows_adapter_loading = allow_adapter_loading
        self._hosts = _LOOPBACK | {host.lower()} | {name.lower() for name in allowed_hosts}
        self._any_address = host in ("", "0.0.0.0", "::")
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._clock = clock
        self._usage: dict[bytes, _Usage] = {}
        self._reading = threading.Lock()
        self._callers: Mapping[bytes, Caller] = self._read()

    # Keys

    @property
    def needs_key(self) -> bool:
        """Whether paths outside of ``OPEN_PATHS`` need a key."""
        return bool(self._given) or self._file is not None

    def reload(self) -> None:
        """Reads the keys file again. If it cannot be used, all keys stay as they are, and the log says so."""
        if self._file is None:
            return
        with self._reading:
            try:
                self._callers = self._read()
            except InvalidRequest as e:
                _log.error("the keys stay as they were: %s", " ".join(str(e).split()))
            else:
                _log.info("%s: %d keys", self._file, len(self._callers) - len(self._given))

    @contextlib.contextmanager
    def reloaded_by_sighup(self) -> Iterator[None]:
        """Inside, SIGHUP reads the keys file again; in the main thread, and where there is a file."""
        if self._file is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: object) -> None:
            # Not here: a handler may interrupt whoever holds the log's lock.
            threading.Thread(target=self.reload, name="slora-jax-keys", daemon=True).start()

        before = signal.signal(signal.SIGHUP, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def identify(self, authorization: str | None, path: str) -> Caller:
        """Who sends a request to this path.

        Args:
          authorization: the header; None if there is none.
          path: as its route is written; as it was sent, if there is no such route.

        Raises:
          Unauthorized: the path needs a key, and this is none that is good for it.
          Forbidden: the path is an admin's, and the key an ordinary one; or there are no admins here.
        """
        digest = _digest(_bearer(authorization))
        known: Caller | None = None
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            known = _ADMIN
        for other, caller in self._callers.items():  # all of them: how long it takes tells nothing about any
            if hmac.compare_digest(digest, other):
                known = known or caller
        if path in ADMIN_PATHS or (path in WATCH_PATHS and self._admin is not None):
            return self._admin_or_refusal(known)
        if known is None:
            if self.needs_key and path not in OPEN_PATHS:
                raise Unauthorized(_no_key(authorization))
            return _ANYBODY
        return known

    def _admin_or_refusal(self, known: Caller | None) -> Caller:
        if self._admin is not None:
            if known is _ADMIN:
                return known
            if known is None:
                raise Unauthorized("this needs the admin key; send it as the header Authorization: Bearer KEY")
            raise Forbidden("this API key may not administer; send the admin key", "admin_only")
        if not self._allows_adapter_loading:
            raise Forbidden(
                "this server does not load adapters on request; start it with --allow-adapter-loading or --admin-key",
                "adapter_loading_not_allowed",
            )
        if self.needs_key:
            raise Forbidden(
                "holders of API keys may not administer; start the server with an --admin-key", "admin_only"
            )
        return _ANYBODY

    def _read(self) -> dict[bytes, Caller]:
        callers = dict(self._given)
        for entry in [] if self._file is None else _read_keys(self._file):
            digest = bytes.fromhex(entry.sha256)
            callers[digest] = Caller(
                entry.name,
                patterns=None if entry.adapters == "all" else entry.adapters,
                requests_per_minute=entry.requests_per_minute,
                tokens_per_minute=entry.tokens_per_minute,
                priority=entry.priority,
                _usage=self._usage.setdefault(digest, _Usage(self._clock)),
            )
        return callers

    # Browsers

    def check_sender(self, path: str, *, host: str, origin: str | None, content_type: str | None) -> None:
        """Keeps pages of strangers, opened in a browser that reaches this server, from administering it.

        A browser sends what such a page asks for, without asking the server first, if it is a simple request: it has
        no JSON type and no key. It names the page's origin, and as Host what the page called the server.

        Args:
          host, origin, content_type: the headers; None where absent.

        Raises:
          UnsupportedBody, Forbidden: the path is an admin's, and the request may come from such a page.
        """
        if path not in ADMIN_PATHS:
            return
        if (content_type or "").partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedBody(f"{path} takes Content-Type: application/json only, got {shown(content_type)}")
        if self._admin is None and not self._is_mine(host):
            raise Forbidden(
                f"this server is not called {shown(host)}; use the address that it listens on, or start it with "
                "--allowed-hosts",
                "host_not_allowed",
            )
        if origin is not None and not self.allows_origin(origin, host):
            raise Forbidden(
                f"the origin {shown(origin)} may not use this server; start it with --allowed-origins",
                "origin_not_allowed",
            )

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may use the server: it is this server's own, or one of those allowed."""
        origin = origin.lower()
        # With an admin key a stranger's page gets nowhere, whatever it calls the server.
        own = origin.partition("://")[2] == host.lower() and (self._admin is not None or self._is_mine(host))
        return own or origin in self._origins or "*" in self._origins

    def cross_origin_headers(
        self, *, host: str, origin: str | None, method: str | None, headers: str | None
    ) -> dict[str, str]:
        """What an answer says to a browser about the page that asked; nothing, if the page may not read it.

        Args:
          host, origin: headers of the request.
          method, headers: of a preflight, Access-Control-Request-Method and -Headers; else None.
        """
        if not self._origins:
            return {}
        said = {"Vary": "Origin"}
        if origin is None or not self.allows_origin(origin, host):
            return said
        said |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED_HEADERS}
        if method is not None:
            said |= {
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
            }
            if headers and _TOKEN_HEADER.fullmatch(headers):
                said["Access-Control-Allow-Headers"] = headers
        return said

    def _is_mine(self, host: str) -> bool:
        name = _without_port(host).lower()
        if name in self._hosts:
            return True
        # A page can give a name of its own any address, but it cannot make a browser take an address for a name.
        return self._any_address and _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this address."""
    if host.lower() == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _no_key(authorization: str | None) -> str:
    if not authorization:
        return "this server needs an API key; send it as the header Authorization: Bearer KEY"
    return "the API key is not one of this server's; send a good one as the header Authorization: Bearer KEY"


def _read_keys(path: Path) -> tuple[_Entry, ...]:
    """Raises InvalidRequest, in words that hold no value of the file: one could be a key."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_FILE_BYTES + 1)
    except OSError as e:
        raise InvalidRequest(f"cannot read the keys file {path}: {e.strerror or e}") from None
    if text.lstrip()[:1] == b"{" and len(text) <= _MOST_FILE_BYTES:
        try:
            fields: Any = read_json(text, None, None)
        except InvalidRequest:
            raise InvalidRequest(f"the keys file {path} is not valid JSON") from None
    else:
        fields = read_yaml(path)
    read, problems = checked(_File, fields)
    if read is None:
        said = "; ".join(itertools.starmap(_without_values, problems[:_MOST_SAID]))
        raise InvalidRequest(f"the keys file {path} cannot be used: {said}")
    return read.keys


def _without_values(place: str, text: str) -> str:
    if text.startswith("there is no such field"):
        place, text = place.rpartition(".")[0] or "the file", f"has another field than {', '.join(_Entry.model_fields)}"
    return f"{place}: {text.partition(' (got ')[0]}"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
