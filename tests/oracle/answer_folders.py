"""What transformers makes of model folders: python answer_folders.py ROOT PROMPT.json

Every folder in ROOT is loaded as ``AutoModelForCausalLM`` does, in float32. ROOT/answers.safetensors gets the logits
``[len(prompt), vocabulary]`` of each under the folder's name, ROOT/answers.json the tokens that end an answer, or why
it could not be loaded.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def main(root: Path, prompt: list[int]) -> None:
    logits, answers = {}, {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                logits[folder.name] = model(torch.tensor([prompt])).logits[0].float().contiguous()
            eos = model.generation_config.eos_token_id
        except Exception as e:
            answers[folder.name] = {"refused": f"{type(e).__name__}: {e}"[:500]}
        else:
            answers[folder.name] = {"eos": [] if eos is None else eos if isinstance(eos, list) else [eos]}
    save_file(logits, root / "answers.safetensors")
    (root / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
