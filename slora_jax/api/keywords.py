"""What to write instead of keyword arguments that ``generate`` does not have: misplaced, other libraries', misspelt."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from slora_jax.config import EngineConfig
from slora_jax.errors import InvalidRequest
from slora_jax.request import SamplingParams

SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))

_OWN = ("prompts", "adapters", "model", "sampling", "priority", "slo_ms", "chat", "stream", "progress")

_CALLED = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "best_of": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "guided_decoding": "grammar",
    "structured_outputs": "grammar",
}
"""Fields of sampling by what transformers, vLLM or OpenAI call them."""

_INSTEAD = {
    "sampling_params": "sampling=...",
    "generation_config": "sampling={...}, or generation_config=False to leave the model's own out",
    "lora_request": 'adapters="NAME", or the path of a PEFT folder',
    "lora_path": "adapters=...",
    "lora": "adapters=...",
    "adapter": "adapters=...",
    "adapter_name": "adapters=...",
    "prompt": "prompts=...",
    "inputs": "prompts=...",
    "input_ids": "prompts=...; token ids are a prompt",
    "prompt_token_ids": "prompts=...; token ids are a prompt",
    "messages": "prompts=...; chat messages are a prompt",
    "use_tqdm": "progress=...",
    "streamer": "stream=True",
    "tensor_parallel_size": 'mesh={"tp": ...}',
    "gpu_memory_utilization": "gpu_memory_fraction=...",
    "max_num_seqs": 'scheduler={"max_sequences": ...}',
    "max_num_batched_tokens": 'scheduler={"max_batch_tokens": ...}',
    "max_loras": "nothing: there are no slots, and as many adapters run as there are pages for",
    "max_lora_rank": "nothing: every adapter keeps its own rank",
    "enable_lora": "nothing: adapters need no switch",
    "num_beams": "nothing: there is no beam search",
}
"""What stands for other arguments of theirs."""


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the names of ``generate``'s keyword arguments that are to be fields of ``EngineConfig``.

    Raises:
      InvalidRequest: one is not, and what to write instead.
    """
    unknown = {name: value for name, value in options.items() if name not in EngineConfig.model_fields}
    fields: dict[str, Any] = {}
    for name, value in unknown.items():
        if name == "do_sample":
            fields |= {} if value else {"temperature": 0}
        elif (called := _CALLED.get(name, name)) in SAMPLING_FIELDS:
            fields[called] = value
    for name in [*(name for name in unknown if name in _INSTEAD), *unknown]:
        if name in _INSTEAD:
            instead = _INSTEAD[name]
        elif name == "do_sample" and not fields:
            instead = "nothing: answers are sampled unless the temperature is 0"
        elif name == "do_sample" or _CALLED.get(name, name) in SAMPLING_FIELDS:
            written = ", ".join(f'"{field}": {repr(value)[:80]}' for field, value in fields.items())
            instead = f"sampling={{{written}}}"
        else:
            hint = _meant(name, (*_OWN, *EngineConfig.model_fields, *SAMPLING_FIELDS))
            raise InvalidRequest(f"generate has no argument {name!r}{hint}", name)
        raise InvalidRequest(f"generate has no argument {name!r}; write {instead}", name)


def check_sampling_fields(names: Iterable[object]) -> None:
    """Checks the names of a mapping that is to be ``SamplingParams``.

    Raises:
      InvalidRequest: one is no field of it, and what it is called.
    """
    for name in names:
        if name in SAMPLING_FIELDS:
            continue
        text = str(name)
        if text == "do_sample":
            hint = '; write "temperature": 0 for greedy answers, and else leave it out'
        elif text in _CALLED:
            hint = f"; it is called {_CALLED[text]!r}"
        else:
            hint = _meant(text, SAMPLING_FIELDS) or f"; it has {', '.join(SAMPLING_FIELDS)}"
        raise InvalidRequest(f"sampling has no field {text[:80]!r}{hint}", text[:80])


def _meant(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""
