"""What a model with its adapters needs on N GPUs, worked out without any: memory, pages, and the floor of a step.

All numbers are of one device, in bytes, operations and seconds. Weights, rows and pages are those of the engine
(``Shards``, ``PoolLayout``); messages are those of ``slora_jax.model.llama``, counted as a ring sends them (paper,
section 6): of an array over N devices 2 (N - 1) / N for an all-reduce, (N - 1) / N for an all-gather.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from slora_jax.engine.batch import padded_rank
from slora_jax.errors import InvalidRequest
from slora_jax.gpu_memory import default_share
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import ROW_PARALLEL

_PARTIAL_SUM_BYTES = _LOGIT_BYTES = 4


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: bytes of memory; bytes a second of memory, and of the link each way; bf16 operations a
    second. The H200's memory speed is what its copies reach here.
    """

    memory: float
    memory_speed: float
    link_speed: float
    operations: float


GPUS = {
    "a10g": Gpu(24.1e9, 0.6e12, 32e9, 70e12),
    "a100-40g": Gpu(42.4e9, 1.555e12, 300e9, 312e12),
    "a100-80g": Gpu(85.0e9, 2.039e12, 300e9, 312e12),
    "h100-80g": Gpu(85.5e9, 3.35e12, 450e9, 989e12),
    "h200": Gpu(150.8e9, 4.42e12, 450e9, 989e12),
}


@dataclass(frozen=True)
class Load:
    """One step that decodes a token of each sequence.

    Attributes:
      sequences: their number, S.
      context: tokens in the pool of each.
      adapters: distinct ones among the sequences, 0 for the base alone.
      ranks: of every adapter, by module.
    """

    sequences: int
    context: int
    adapters: int = 0
    ranks: dict[str, int] = field(default_factory=dict)


def message_bytes(model: ModelConfig, tp: int, tokens: int, logits: int, ranks: dict[str, int], itemsize: int) -> dict:
    """Bytes that one device sends in a step, by what for.

    Args:
      model: the whole model.
      tp: devices.
      tokens: T of the step.
      logits: rows of logits, one a sequence.
      ranks: largest rank by module; modules that no adapter of the step changes are missing.
      itemsize: bytes of an activation; sums between A and B go in float32.
    """
    local = PoolLayout.for_model(model, tp).shards.local
    gather = (tp - 1) / tp
    largest = max(ranks.values(), default=0)
    width = tp * -(-padded_rank(largest) // tp) if largest else 0
    reduced = sum(module in ROW_PARALLEL for module in ranks)
    lora = model.num_layers * (2 * reduced + len(ranks) - reduced) * gather * tokens * width * _PARTIAL_SUM_BYTES
    return {
        "base": (2 * model.num_layers + 1) * 2 * gather * tokens * model.hidden_size * itemsize,
        "lora": lora,
        "logits": gather * logits * tp * local.vocab_size * _LOGIT_BYTES,
    }


def plan(
    model: ModelConfig,
    tp: int,
    gpu: Gpu,
    load: Load,
    memory_fraction: float = 0.9,
    itemsize: int = 2,
    gpu_share: float | None = None,
    float8_kv: bool = False,
) -> dict[str, float | dict]:
    """Memory, what fits, and the least time of a step.

    ``gpu_share`` is what JAX has of the GPU (``gpu_memory_fraction``), ``memory_fraction`` what the pool has of that
    less the weights. With ``float8_kv`` K and V take a byte each, as with ``--kv-cache-dtype fp8``.

    ``kv_share`` is what one device holds of a token's K and V: 1 / N, or more where KV heads are not a multiple of N.

    ``floor_seconds`` is the slower of bytes and operations at the GPU's full speed, and the messages after them. What
    it costs to start a message, however short, is not in it.

    Raises:
      InvalidRequest: so many devices cannot share the model, or the weights do not fit.
    """
    layout = PoolLayout.for_model(model, tp, itemsize if float8_kv else 1)
    local = layout.shards.local
    weights = local.num_params() * itemsize
    usable = gpu.memory * (default_share(tp) if gpu_share is None else gpu_share)
    page = layout.page_bytes(itemsize)
    pages = int(memory_fraction * (usable - weights) // page)
    if pages < 2:
        raise InvalidRequest(
            f"{weights / 1e9:.1f} GB of weights a device leave no room for a pool in {usable / 1e9:.1f} GB; raise tp"
        )
    adapter = layout.adapter(load.ranks)
    adapter_pages = adapter.num_pages if load.ranks else 0
    needed = load.sequences * layout.token_pages(load.context) + load.adapters * adapter_pages

    adapter_elements = model.num_layers * adapter.num_entries * layout.row_width
    read = {
        "weights": local.num_step_params() * itemsize,
        "kv": load.sequences * load.context * page / layout.page_tokens,
        "adapters": load.adapters * adapter_elements * itemsize,
    }
    operations = 2 * load.sequences * local.num_step_params()
    operations += 4 * load.sequences * load.context * model.num_layers * local.q_size
    operations += 2 * (load.sequences if load.adapters else 0) * adapter_elements
    ranks = load.ranks if load.adapters else {}
    sent = message_bytes(model, tp, load.sequences, load.sequences, ranks, itemsize)
    seconds = {
        "bytes": sum(read.values()) / gpu.memory_speed,
        "operations": operations / gpu.operations,
        "messages": sum(sent.values()) / gpu.link_speed,
    }
    return {
        "tp": tp,
        "devices_without_heads": layout.shards.num_idle,
        "kv_share": layout.row_width / model.kv_size,
        "memory": {"usable": usable, "weights": weights, "pool": pages * page},
        "pages": {
            "total": pages - 1,
            "bytes": page,
            "tokens": layout.page_tokens,
            "adapter": adapter_pages,
            "step": needed,
        },
        "fits": {
            "step": needed <= pages - 1,
            "tokens": (pages - 1) * layout.page_tokens,
            "adapters": (pages - 1) // adapter_pages if adapter_pages else 0,
            "tokens_beside_the_steps_adapters": max(0, pages - 1 - load.adapters * adapter_pages) * layout.page_tokens,
        },
        "step": {"load": asdict(load), "read": read, "operations": operations, "sent": sent, "seconds": seconds},
        "floor_seconds": max(seconds["bytes"], seconds["operations"]) + seconds["messages"],
    }


def table(result: dict) -> str:
    """The plan for people."""
    memory, pages, fits, step = (result[name] for name in ("memory", "pages", "fits", "step"))
    load, seconds = step["load"], step["seconds"]

    def parts(of: dict[str, float]) -> str:
        return ", ".join(f"{name} {value / 1e9:.3f}" for name, value in of.items())

    tp, idle = result["tp"], result["devices_without_heads"]
    devices = f"each of {tp} devices" if tp > 1 else "one device"
    if result["kv_share"] * tp > 1:  # heads that are kept twice, or places that stay empty
        devices += f", with {result['kv_share']:.3f} of the KV cache"
    if idle:
        devices += f"; {idle} of them hold no attention head"
    lines: Iterable[str] = [
        devices,
        f"  memory      {parts(memory)} GB",
        f"  pages       {pages['total']:,} of {pages['bytes'] / 1e6:.2f} MB and {pages['tokens']} tokens; "
        f"an adapter takes {pages['adapter']}",
        f"  fits        {fits['tokens']:,} tokens, or {fits['adapters']:,} adapters, or "
        f"{fits['tokens_beside_the_steps_adapters']:,} tokens beside {load['adapters']} adapters",
        f"a step of {load['sequences']} sequences with {load['context']} tokens, {load['adapters']} adapters: "
        f"{pages['step']:,} pages{'' if fits['step'] else ', which do not fit'}",
        f"  reads       {parts(step['read'])} GB: {seconds['bytes'] * 1e3:.2f} ms",
        f"  operations  {step['operations'] / 1e12:.3f} T: {seconds['operations'] * 1e3:.2f} ms",
        f"  sends       {parts(step['sent'])} GB: {seconds['messages'] * 1e3:.2f} ms",
        f"  floor       {result['floor_seconds'] * 1e3:.2f} ms",
    ]
    return "\n".join(lines)
