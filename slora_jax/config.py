"""Everything a launch decides, as frozen values; a YAML file or command-line flags hold the same fields.

Unknown keys are refused, so a mistyped option cannot vanish. Derived numbers (pages that fit, bucket sizes)
belong to the runtime objects and are never written back here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml

from slora_jax.errors import InvalidRequest

PAGE_SIZE = 16
"""Token rows per page. Fixed: kernels tile by it, and 16 rows suit the tensor cores' smallest tile."""

type Policy = Literal["fcfs", "lcfs", "vtc", "cluster", "abort", "priority"]
POLICIES: tuple[Policy, ...] = get_args(Policy.__value__)


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class PoolConfig(_Frozen):
    """Size of the unified pool that holds the KV cache and adapter weights alike.

    Attributes:
      memory_fraction: share of the device memory still free after loading the weights, used when neither
        ``pages`` nor ``gigabytes`` is given. On the CPU it is a share of the free host memory, of which the
        pool then takes at most 2 GiB.
      gigabytes: the pool's size in GiB, on each device.
      pages: the pool's size in pages of 16 token rows (one of them is the trash page).
    """

    memory_fraction: float = pydantic.Field(0.9, gt=0, le=1)
    gigabytes: float | None = pydantic.Field(None, gt=0)
    pages: int | None = pydantic.Field(None, ge=2)


class SchedulerConfig(_Frozen):
    """Limits of one engine step and of the queue.

    Attributes:
      max_batch_tokens: most tokens of one step, prefill and decode together: the prefill chunk.
      max_sequences: most sequences of one step.
      max_waiting: most requests waiting; one more is refused (HTTP 429).
      prefix_cache: keep finished prompts' pages, to be found by (adapter content hash, tokens).
      policy: which waiting request goes next: first come (``fcfs``), last come (``lcfs``), fair shares for tenants by
        a virtual token counter (``vtc``), requests of the adapters in the batch (``cluster``), early abort by a
        first-token objective (``abort``), or by ``Request.priority``. See ``slora_jax.scheduler.policies``.
      max_wait_s: a request that waits for longer is overdue; one in eight starts is an overdue request's, whatever
        the policy. Seconds.
      fair_weights: for ``vtc``: a tenant's share relative to others', by adapter name (or the base model's); 1 for
        those not named.
      input_price, output_price: for ``vtc``: what a token of a prompt and of an output count.
      batch_adapters: for ``cluster``: adapters in the batch from which on their requests are preferred.
      slo_ms: for ``abort``: milliseconds within which a request's first token is due, where it names none itself.
    """

    max_batch_tokens: int = pydantic.Field(512, ge=16)
    max_sequences: int = pydantic.Field(256, ge=1)
    max_waiting: int = pydantic.Field(100_000, ge=1)
    prefix_cache: bool = True
    policy: Policy = "fcfs"
    max_wait_s: float = pydantic.Field(60.0, gt=0)
    fair_weights: dict[str, Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]] = {}
    input_price: float = pydantic.Field(1.0, ge=0, allow_inf_nan=False)
    output_price: float = pydantic.Field(2.0, ge=0, allow_inf_nan=False)
    batch_adapters: int = pydantic.Field(32, ge=1)
    slo_ms: float = pydantic.Field(6000.0, gt=0, allow_inf_nan=False)

    @pydantic.model_validator(mode="after")
    def _budget_covers_sequences(self):
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_sequences ({self.max_sequences}): "
                "a step decodes one token of every running sequence"
            )
        return self


class MeshConfig(_Frozen):
    """The devices that share the model and the pool: tensor parallelism.

    Attributes:
      tp: how many, over all hosts.
      coordinator: ``address:port`` where the first host's process waits for the others; None for one host.
      num_hosts: processes, each with the devices of its host.
      host_id: which of them this one is, from 0; number 0 answers requests.
    """

    tp: int = pydantic.Field(1, ge=1)
    coordinator: str | None = None
    num_hosts: int = pydantic.Field(1, ge=1)
    host_id: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _hosts_can_meet(self):
        if (self.num_hosts > 1) != (self.coordinator is not None):
            raise ValueError("num_hosts above 1 and coordinator go together: the hosts meet there")
        if self.host_id >= self.num_hosts:
            raise ValueError(f"host_id ({self.host_id}) must be below num_hosts ({self.num_hosts}); they count from 0")
        return self


class EngineConfig(_Frozen):
    """One engine: a base model, its adapters, and how much of the machine it takes.

    Attributes:
      model: a local Hugging Face folder, a Hugging Face id, ``demo`` (the embedded SmolLM2-135M-Instruct) or,
        with ``dummy``, the YAML file of a shape in ``configs/``.
      served_name: the base model's name in the API; None takes the folder's or id's last part.
      dummy: draw random weights of the shape on the device instead of loading any.
      adapters: adapter name to PEFT folder or Hugging Face id.
      adapter_dirs: folders each of whose subfolders is a PEFT adapter, registered under the subfolder's name.
      pinned: names of adapters that are brought to the pool at the start and stay there; in all at most half of it.
      host_adapter_gigabytes: host memory, page-locked on a GPU, in which adapters wait between disk and pool, in GiB;
        None takes half of what is free after the pool was made. On several hosts, of each.
      dtype: weights, activations and pool; "auto" is bfloat16 on a GPU and float32 on a CPU.
      max_model_len: longest sequence (prompt + output) in tokens; None takes the model's own limit.
      generation_config: requests that do not say how to sample do as the model's ``generation_config.json`` says.
      checkpoint_cache: where ready-to-serve weights are kept as Orbax checkpoints; None keeps none.
      compilation_cache: where compiled steps are kept, for faster starts; None keeps none.
      warm_up: compile every shape of step before the server says that it is ready, so that no request waits for it;
        None does so on a GPU, and on a CPU for the shapes that a few short requests need.
      pool, scheduler, mesh: see there.
      seed: seeds dummy weights and requests that bring no seed.
    """

    model: str = "demo"
    served_name: str | None = None
    dummy: bool = False
    adapters: dict[str, str] = {}
    adapter_dirs: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    host_adapter_gigabytes: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = pydantic.Field(None, ge=1)
    generation_config: bool = True
    checkpoint_cache: str | None = "~/.cache/slora-jax/checkpoints"
    compilation_cache: str | None = "~/.cache/slora-jax/compiled"
    warm_up: bool | None = None
    pool: PoolConfig = PoolConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def build_config(fields: dict[str, Any]) -> EngineConfig:
    """Validates plain fields (from YAML, flags or keyword arguments).

    Raises:
      InvalidRequest: an unknown key or a bad value; the message lists each by its path.
    """
    return validated(EngineConfig, fields)


def validated[Model: pydantic.BaseModel](model: type[Model], fields: Mapping[str, Any], section: str = "") -> Model:
    """Builds a config model from plain fields; ``section`` is where they stand in the file.

    Raises:
      InvalidRequest: an unknown key or a bad value; the message lists each by its path.
    """
    try:
        return model(**fields)
    except pydantic.ValidationError as e:
        problems = []
        for problem in e.errors():
            path = ".".join(map(str, ((section,) if section else ()) + problem["loc"])) or "config"
            problems.append(f"{path}: {problem['msg']} (got {problem['input']!r})")
        raise InvalidRequest(f"invalid configuration: {'; '.join(problems)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
      InvalidRequest: no such file, not YAML, or not a mapping at the top.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as e:
        raise InvalidRequest(f"cannot read config {path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise InvalidRequest(f"config {path} is not valid YAML: {e}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"config {path} must hold a mapping of fields, got {type(fields).__name__}")
    return fields
