"""transformers + PEFT on the demo workload, one adapter at a time. Run by ``bench.demo`` in a Python that has torch.

    python -c "$(cat peft_baseline.py)" JOB.json

Prints one JSON line: seconds of each timed run, after one that warms up.
"""

import json
import sys
import time

import peft
import torch
import transformers


def main(job_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    names = list(job["adapters"])
    model = peft.PeftModel.from_pretrained(model, job["adapters"][names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(job["adapters"][name], adapter_name=name)
    model.eval()
    batches = [(name, _left_padded([ids for n, ids in job["requests"] if n == name])) for name in names]
    seconds = [_run(model, batches, job["num_tokens"]) for _ in range(job["repeats"] + 1)][1:]
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    print(json.dumps({"seconds": seconds, "versions": versions}))


def _left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def _run(model, batches, num_tokens: int) -> float:
    start = time.perf_counter()
    for name, batch in batches:
        model.set_adapter(name)
        out = model.generate(
            **batch, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        assert out.shape[1] == batch["input_ids"].shape[1] + num_tokens
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1])
