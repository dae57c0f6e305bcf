"""transformers + PEFT on table 3's requests: the library's own way, one adapter a batch. Runs where torch is."""

import time
from itertools import batched
from pathlib import Path

import click

from slora_jax.bench.workload import Case, WorkItem, draw_workload
from slora_jax.config import read_yaml


def run_peft(shape: str, num_requests: int, num_adapters: int, max_batch: int, seed: int) -> dict:
    """Serves setting S2, all requests there at the start, in batches of one adapter; random weights, bfloat16.

    Args:
      shape: YAML file of a shape.
      max_batch: most requests of a batch.

    Raises:
      click.ClickException: torch, transformers or peft is not installed.
    """
    try:
        import peft
        import torch
        import transformers
    except ModuleNotFoundError as e:
        raise click.ClickException(
            f"this Python has no {e.name}: install torch, transformers and peft beside slora-jax, or use one that has"
        ) from None
    case = Case("S2", num_adapters)
    workload = draw_workload(num_requests, num_adapters, 32000, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**read_yaml(Path(shape)))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        for i in range(num_adapters):
            lora = peft.LoraConfig(r=case.rank(i), target_modules=[f"{m}_proj" for m in "qkvo"])
            if i == 0:
                model = peft.get_peft_model(model, lora, adapter_name="0")
            else:
                model.add_adapter(str(i), lora)
    model.to(device, torch.bfloat16).eval()

    def serve(name: str, batch: tuple[WorkItem, ...]) -> None:
        model.set_adapter(name)
        longest = max(len(item.prompt) for item in batch)
        ids = torch.tensor([[0] * (longest - len(item.prompt)) + list(item.prompt) for item in batch], device=device)
        lengths = torch.tensor([len(item.prompt) for item in batch], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        tokens = max(item.num_output for item in batch)
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    def synchronized() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    of_adapter = [[item for item in workload if item.adapter == i] for i in range(num_adapters)]
    batches = [(str(i), batch) for i, items in enumerate(of_adapter) for batch in batched(items, max_batch)]
    with torch.inference_mode():
        serve(*batches[0])
        start = synchronized()
        for name, batch in batches:
            serve(name, batch)
        seconds = synchronized() - start
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return {"setting": "S2", "n": num_adapters, "requests_per_second": num_requests / seconds, "versions": versions}
