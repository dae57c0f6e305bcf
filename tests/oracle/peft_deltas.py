"""What PEFT makes of adapter folders: run by a Python that has torch, transformers and peft.

``python peft_deltas.py JOB OUT``: JOB is a JSON list of cases, each with "config" (fields of a LoraConfig) and "edit"
(fields to put into the saved adapter_config.json; null where nothing is edited), for a Llama of three layers. Each
adapter gets random weights, is saved by PEFT to OUT/NUMBER, edited and loaded again into a fresh model.

OUT/deltas.npz holds what PEFT adds to each weight, as NUMBER/MODULE. OUT/cases.json holds for each case "complete", or
"loaded" if PEFT missed tensors, or "saved: ..." if PEFT did not load it again, or "not made: ...", with its reason.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip


def main(job: Path, out: Path) -> None:
    cases = json.loads(job.read_text())
    deltas, states = {}, []
    for number, case in enumerate(cases):
        torch.manual_seed(number)
        states.append(run_case(case, out / str(number), number, deltas))
    np.savez(out / "deltas.npz", **deltas)
    (out / "cases.json").write_text(json.dumps(states))


def run_case(case: dict, folder: Path, number: int, deltas: dict[str, np.ndarray]) -> str:
    try:
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), LoraConfig(**case["config"]))
    except Exception as e:
        return f"not made: {type(e).__name__}: {e}"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    if case["edit"]:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | case["edit"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**SHAPE)), folder)
        except Exception as e:
            return f"saved: {type(e).__name__}: {e}"
    for name, module in loaded.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            deltas[f"{number}/{name}"] = module.get_delta_weight("default").detach().numpy()
    missing = any("missing" in str(warning.message) for warning in caught)
    return "loaded" if missing else "complete"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
