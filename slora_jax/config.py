"""Everything a launch decides, as frozen values; a YAML file or command-line flags hold the same fields.

Unknown keys are refused, so a mistyped option cannot vanish. Derived numbers (pages that fit, bucket sizes)
belong to the runtime objects and are never written back here.
"""

import io
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml

from slora_jax.errors import InvalidRequest, shown

PAGE_SIZE = 16
"""Rows of a page. Fixed: kernels tile by it, and 16 rows suit the tensor cores' smallest tile."""

_MAX_FILE_BYTES = 2**20
_MAX_TEXT = 4096  # characters of a path; names are shorter
_MAX_COUNT = 10**12  # of anything: what is multiplied with it stays a number that arrays and messages can hold

type Policy = Literal["fcfs", "lcfs", "vtc", "cluster", "abort", "priority"]
POLICIES: tuple[Policy, ...] = get_args(Policy.__value__)


def _printable(text: str) -> str:
    """Names and paths end up in JSON, logs and system calls, which differ in what they make of anything else."""
    if not text:
        raise ValueError("must not be empty; leave the field out for its default")
    if len(text) > _MAX_TEXT:
        raise ValueError(f"must have at most {_MAX_TEXT} characters, has {len(text)}")
    if not text.isprintable():
        odd = next(character for character in text if not character.isprintable())
        raise ValueError(f"must hold printable characters only, has {odd!a}")
    return text


Text = Annotated[str, pydantic.AfterValidator(_printable)]
"""A name or a path: not empty, printable, of at most 4096 characters."""


def _no_truth(value: Any) -> Any:
    # YAML reads yes, no, on and off as booleans, which pydantic would take for 1 and 0.
    if isinstance(value, bool):
        raise ValueError("must not be true or false (which is also what YAML makes of yes, no, on and off)")
    return value


def _sendable(secret: pydantic.SecretStr) -> pydantic.SecretStr:
    if not re.fullmatch(r"[!-~]{8,512}", secret.get_secret_value()):
        raise ValueError("must have 8 to 512 characters, letters, digits and signs of ASCII, without spaces")
    return secret


Secret = Annotated[pydantic.SecretStr, pydantic.AfterValidator(_sendable)]
"""A key as a header can carry it; it is shown as asterisks."""

Amount = Annotated[float, pydantic.BeforeValidator(_no_truth), pydantic.Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""

Gigabytes = Annotated[float, pydantic.Field(gt=0, le=1e6, allow_inf_nan=False)]
"""GiB of memory."""

Share = Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)]
"""A part of something, at most all of it."""


class Section(pydantic.BaseModel):
    """Base of all parts of a configuration: unknown fields are refused, and true is no number."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        assert info.field_name is not None, "a validator of a field was called without one"
        annotation = cls.model_fields[info.field_name].annotation
        return value if bool in (annotation, *get_args(annotation)) else _no_truth(value)


class PoolConfig(Section):
    """Size of the unified pool that holds the KV cache and adapter weights alike.

    Attributes:
      memory_fraction: the pool's share of what the weights leave of the memory that JAX has (see
        ``EngineConfig.gpu_memory_fraction``), used when neither ``pages`` nor ``gigabytes`` is given. The rest is for
        what a step makes and for adapters on their way. On the CPU it is a share of the free host memory, of which
        the pool then takes at most 2 GiB.
      gigabytes: the pool's size in GiB, on each device.
      pages: the pool's size in pages of 16 token rows (one of them is the trash page).
    """

    memory_fraction: Share = 0.9
    gigabytes: Gigabytes | None = None
    pages: int | None = pydantic.Field(None, ge=2, le=_MAX_COUNT)


class SchedulerConfig(Section):
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

    max_batch_tokens: int = pydantic.Field(512, ge=16, le=2**17)
    max_sequences: int = pydantic.Field(256, ge=1, le=2**14)
    max_waiting: int = pydantic.Field(100_000, ge=1, le=_MAX_COUNT)
    prefix_cache: bool = True
    policy: Policy = "fcfs"
    max_wait_s: Amount = 60.0
    fair_weights: dict[Text, Amount] = {}
    input_price: float = pydantic.Field(1.0, ge=0, allow_inf_nan=False)
    output_price: float = pydantic.Field(2.0, ge=0, allow_inf_nan=False)
    batch_adapters: int = pydantic.Field(32, ge=1, le=_MAX_COUNT)
    slo_ms: Amount = 6000.0

    @pydantic.model_validator(mode="after")
    def _budget_covers_sequences(self):
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_sequences ({self.max_sequences}): "
                "a step decodes one token of every running sequence"
            )
        if self.fair_weights and self.policy != "vtc":
            raise ValueError(f"fair_weights are for policy vtc, and the policy is {self.policy}; leave one out")
        return self


class MeshConfig(Section):
    """The devices that share the model and the pool: tensor parallelism.

    Attributes:
      tp: how many, over all hosts.
      coordinator: ``address:port`` where the first host's process waits for the others; None for one host.
      num_hosts: processes, each with the devices of its host.
      host_id: which of them this one is, from 0; number 0 answers requests.
    """

    tp: int = pydantic.Field(1, ge=1, le=2**14)
    coordinator: Text | None = None
    num_hosts: int = pydantic.Field(1, ge=1, le=2**14)
    host_id: int = pydantic.Field(0, ge=0)

    @pydantic.field_validator("coordinator")
    @classmethod
    def _coordinator_is_an_address(cls, coordinator: str | None) -> str | None:
        if coordinator is not None:
            port = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/]+):([0-9]{1,5})", coordinator)
            if port is None or not 0 < int(port[1]) < 2**16:
                raise ValueError(
                    "must be ADDRESS:PORT of the first host, such as 10.0.0.1:8002, with a port below 65536"
                )
        return coordinator

    @pydantic.model_validator(mode="after")
    def _hosts_can_meet(self):
        if (self.num_hosts > 1) != (self.coordinator is not None):
            raise ValueError("num_hosts above 1 and coordinator go together: the hosts meet there")
        if self.host_id >= self.num_hosts:
            raise ValueError(f"host_id ({self.host_id}) must be below num_hosts ({self.num_hosts}); they count from 0")
        return self


class EngineConfig(Section):
    """One engine: a base model, its adapters, and how much of the machine it takes.

    Attributes:
      model: a local Hugging Face folder, a Hugging Face id or, with ``dummy``, the YAML file of a shape in
        ``configs/``. ``serve.py`` and ``generate`` also take ``demo``, the embedded SmolLM2-135M-Instruct.
      served_name: the base model's name in the API; None takes the folder's or id's last part.
      dummy: draw random weights of the shape on the device instead of loading any.
      tokenizer: a folder with a ``tokenizer.json`` for a ``dummy`` model, to measure what text costs; None for none:
        prompts must be token ids then, and answers have no text. Any other model has its own.
      adapters: adapter name to PEFT folder or Hugging Face id.
      adapter_dirs: folders each of whose subfolders is a PEFT adapter, registered under the subfolder's name.
      pinned: names of adapters that are brought to the pool at the start and stay there; in all at most half of it.
      host_adapter_gigabytes: host memory, page-locked on a GPU, in which adapters wait between disk and pool, in GiB;
        None takes half of what is free after the pool was made. On several hosts, of each.
      max_lora_rank: largest rank of an adapter; one with a larger is refused before its weights are read or downloaded.
      dtype: weights, activations and pool; "auto" is bfloat16 on a GPU and float32 on a CPU.
      quantization: how to hold the weights of the layers' projections; None as the files have them. ``fp8`` rounds
        weights, by output channel, and activations, by token, to 8 bits; adapters see the activations unrounded.
      kv_cache_dtype: what K and V of tokens are kept as: "auto" is ``dtype``; "fp8" is float8_e4m3fn, of which a page
        of the same bytes holds twice as many tokens as of 16-bit numbers. Adapters are kept in ``dtype`` either way.
      max_model_len: longest sequence (prompt + output) in tokens; None takes the model's own limit.
      generation_config: requests that do not say how to sample do as the model's ``generation_config.json`` says.
      checkpoint_cache: where ready-to-serve weights are kept as Orbax checkpoints; None keeps none.
      compilation_cache: where compiled steps are kept, for faster starts; None keeps none.
      gpu_memory_fraction: the share of each GPU's memory that JAX takes when it starts; None takes 0.92, and 0.88 where
        several devices share the model, as collectives keep their buffers outside (see ``slora_jax.gpu_memory``).
      warm_up: compile every shape of step before the server says that it is ready, so that no request waits for it;
        None does so on a GPU, and on a CPU for the shapes that a few short requests need.
      slow_step_s: steps that take longer are logged; seconds, of which compiling is no part.
      pool, scheduler, mesh: see there.
      seed: seeds dummy weights and requests that bring no seed.
    """

    model: Text = "demo"
    served_name: Text | None = None
    dummy: bool = False
    tokenizer: Text | None = None
    adapters: dict[Text, Text] = {}
    adapter_dirs: tuple[Text, ...] = ()
    pinned: tuple[Text, ...] = ()
    host_adapter_gigabytes: Gigabytes | None = None
    max_lora_rank: int = pydantic.Field(256, ge=1, le=256)
    gpu_memory_fraction: Share | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_model_len: int | None = pydantic.Field(None, ge=1)
    generation_config: bool = True
    checkpoint_cache: Text | None = "~/.cache/slora-jax/checkpoints"
    compilation_cache: Text | None = "~/.cache/slora-jax/compiled"
    warm_up: bool | None = None
    slow_step_s: Amount = 5.0
    pool: PoolConfig = PoolConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = pydantic.Field(0, ge=0, lt=2**63)

    @pydantic.model_validator(mode="after")
    def _models_have_their_own_tokenizer(self):
        if self.tokenizer is not None and not self.dummy:
            raise ValueError("tokenizer is for dummy models; leave it out, the model's folder has its own")
        return self


def build_config(fields: dict[str, Any]) -> EngineConfig:
    """Validates plain fields (from YAML, flags or keyword arguments).

    Raises:
      InvalidRequest: an unknown key or a bad value; the message lists each by its path.
    """
    built, problems = checked(EngineConfig, fields)
    if built is None:
        raise InvalidRequest(f"invalid configuration: {'; '.join(f'{path}: {text}' for path, text in problems)}")
    return built


def checked[Model: pydantic.BaseModel](
    model: type[Model], fields: Mapping[str, Any], section: str = ""
) -> tuple[Model | None, list[tuple[str, str]]]:
    """Builds a config model from plain fields; ``section`` is where they stand in the file.

    Returns:
      The config model, or None; and every problem as the path of its field and what is wrong there.
    """
    try:
        return model.model_validate(dict(fields)), []
    except pydantic.ValidationError as e:
        problems = []
        for problem in e.errors():
            parts = ((section,) if section else ()) + problem["loc"]
            # pydantic marks a bad key by a part of its own, and its name is there already.
            path = ".".join(_shown(part) for part in parts if part != "[key]") or "config"
            text = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                text = "there is no such field"
            got = "" if _is_secret(path) or _holds_secret(problem["input"]) else f" (got {shown(problem['input'])})"
            problems.append((path, f"{text}{got}"))
        return None, problems


def _is_secret(path: str) -> bool:
    """Whether a key may be there, or what was meant to be one, which no message may hold."""
    return "key" in path.lower()


def _holds_secret(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_secret(str(name)) or _holds_secret(v) for name, v in value.items())


def _shown(part: object) -> str:
    """A part of a field's path, which may be any key that somebody wrote."""
    return part if isinstance(part, str) and part.isprintable() and len(part) <= 80 else shown(part)


class _Loader(yaml.SafeLoader):
    """Refuses what a file of settings has no use for, and what YAML readers otherwise take in silence."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            # A few lines of them can stand for billions of values.
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise yaml.constructor.ConstructorError(
                        None, None, "the name of a field must be text; put it in quotes", key.start_mark
                    )
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_shown(key.value)} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping: plain values under names that are texts, each of them once.

    Raises:
      InvalidRequest: no such file, not YAML, larger than 1 MiB, with aliases, tags of other languages, a name twice or
        a name that is no text, or not a mapping at the top.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"cannot read config {_shown(str(path))}: {getattr(e, 'strerror', None) or e}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise InvalidRequest(f"config {path} is larger than 1 MiB; is it a configuration?")
    try:
        # As a stream: of a text, an error would quote the line, in which a key may be.
        fields = yaml.load(io.BytesIO(text), _Loader)
    except RecursionError:
        raise InvalidRequest(f"config {path} is not valid YAML: it is nested too deeply") from None
    except yaml.YAMLError as e:
        raise InvalidRequest(f"config {path} is not valid YAML: {e}") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as e:
        # What PyYAML's constructors let through: a date that is none, or a tag on a value that is not of its kind.
        raise InvalidRequest(f"config {path} is not valid YAML: a value is not what it is tagged as ({e})") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"config {path} must hold a mapping of fields, got {type(fields).__name__}")
    return fields
