"""What a fleet is told: the fields of ``configs/server.yaml``, and a section ``fleet`` beside them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic

from slora_jax.api.server import ServerConfig
from slora_jax.config import Amount, EngineConfig, Section, checked
from slora_jax.errors import InvalidRequest, shown
from slora_jax.fleet.routing import Rule


class FleetConfig(Section):
    """How many replicas there are, on what, and which of them answers a request.

    Attributes:
      replicas: how many; the fewest, where there is a ``max_replicas``.
      max_replicas: as many as there may be when requests queue; None for no more than ``replicas``.
      target_ongoing_requests: requests that a replica should answer at a time. With more of them replicas are added, up
        to ``max_replicas``, and with fewer they are taken away.
      gpus: GPUs of each replica; None for as many as share the model (``mesh.tp``) where the cluster has any, else 0.
      cpus: CPU cores that Ray sets aside for each.
      routing: who answers; see ``routing``.
      spill_at: under ``affinity_with_spill``, requests that a replica answers before it counts as busy.
    """

    replicas: int = pydantic.Field(1, ge=1, le=10_000)
    max_replicas: int | None = pydantic.Field(None, ge=1, le=10_000)
    target_ongoing_requests: Amount = 64.0
    gpus: int | None = pydantic.Field(None, ge=0, le=1024)
    cpus: float = pydantic.Field(1.0, ge=0, le=1024, allow_inf_nan=False)
    routing: Rule = "affinity_with_spill"
    spill_at: int = pydantic.Field(16, ge=1, le=10_000)

    @pydantic.model_validator(mode="after")
    def _most_are_no_fewer(self):
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, fewer than replicas, {self.replicas}")
        return self


class Settings(NamedTuple):
    """What each replica is, how it answers, and how many there are."""

    engine: EngineConfig
    server: ServerConfig
    fleet: FleetConfig


def read_settings(fields: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Reads plain fields, as a YAML file has them.

    Keys that they leave out are taken from ``SLORA_ADMIN_KEY`` and ``SLORA_API_KEY`` (one, or several with spaces
    between) of the environment.

    ``server.host`` is where Ray Serve listens, which is Ray's to decide. Left out, strangers may reach it, so that
    adapters are loaded at run time by holders of an ``admin_key`` only.

    Raises:
      InvalidRequest: unknown keys or bad values; the message names each by its path.
    """
    fields = dict(fields)
    sections, problems = {}, []
    for name in ("fleet", "server"):
        section = fields.pop(name, None) or {}
        if not isinstance(section, Mapping):
            problems.append((name, f"must be a mapping, got {shown(section)}"))
            section = {}
        sections[name] = dict(section)
    sections["server"].setdefault("host", "0.0.0.0")
    if admin_key := environment.get("SLORA_ADMIN_KEY"):
        sections["server"].setdefault("admin_key", admin_key)
    if keys := environment.get("SLORA_API_KEY", "").split():
        sections["server"].setdefault("api_keys", keys)
    fleet, more = checked(FleetConfig, sections["fleet"], section="fleet")
    server, still_more = checked(ServerConfig, sections["server"], section="server")
    engine, of_engine = checked(EngineConfig, fields)
    problems += more + still_more + of_engine
    if engine is not None and engine.mesh.num_hosts > 1:
        problems.append(
            ("mesh.num_hosts", "must be 1: each replica is one process; give it GPUs of one host (mesh.tp)")
        )
    if problems or engine is None or server is None or fleet is None:
        raise InvalidRequest(f"invalid configuration: {'; '.join(f'{path}: {text}' for path, text in problems)}")
    return Settings(engine, server, fleet)
