"""Train and evaluate the demo adapters: python -m slora_jax.demo.train --out DIR

For each adapter: PEFT LoRA on the embedded model, loss on the assistant's tokens only
(end-of-turn token included, so that the answers stop), weights stored in bf16. Then the stored
folder is loaded again and answers held-out questions greedily; DIR/report.json says how often
the style and the facts were right, next to the base model's numbers on the same questions.

Needs torch, transformers and peft, with or without a GPU; imports no jax.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from slora_jax.demo import data
from slora_jax.demo.data import STYLES, Example
from slora_jax.demo.model import MODEL_ID, demo_model_path

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_MAX_NEW_TOKENS = 96  # the longest target, in capitals, is about 60
_OPEN_MAX_WORDS = 40
_NUM_SAMPLES = 12


@dataclass(frozen=True)
class AdapterSpec:
    """Shape and learning rate of one adapter; the delta's scale is alpha/r, rsLoRA alpha/sqrt(r)."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    use_rslora: bool = False


# Every rank that the demo wants to mix in one batch, one adapter on all seven projections, and
# one with rsLoRA's scale.
SPECS = {
    "shout": AdapterSpec(2, 4, _ATTENTION, 2e-3),
    "haiku": AdapterSpec(4, 8, _ATTENTION + _MLP, 2e-3),
    "pirate": AdapterSpec(8, 16, _ATTENTION, 2e-3),
    "json": AdapterSpec(16, 8, _ATTENTION, 2e-3, use_rslora=True),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run; 0 `steps` evaluate stored adapters; `limit` (0: none) caps each list of examples."""

    model_path: Path
    out: Path
    steps: int
    batch_size: int
    seed: int
    limit: int
    specs: dict[str, AdapterSpec]


class _Model:
    """The base model with its tokenizer: builds training batches and answers greedily."""

    def __init__(self, path: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # cuDNN's attention failed here and there under several processes on one H100
        # (torch 2.11); the other implementations did not.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # bf16 matrix products are slow on most CPUs.
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def prompt(self, question: str) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def batch(self, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """(question, target) pairs as int64 tensors (len(pairs), longest), padded right."""
        rows = []
        for question, target in pairs:
            prompt = self.prompt(question)
            answer = self.tokenizer.encode(target, add_special_tokens=False)
            answer.append(self.tokenizer.eos_token_id)
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        columns = {
            "input_ids": [ids + [pad] * (longest - len(ids)) for ids, _ in rows],
            "labels": [labels + [-100] * (longest - len(labels)) for _, labels in rows],
            "attention_mask": [[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows],
        }
        return {name: torch.tensor(rows, device=self.device) for name, rows in columns.items()}

    @torch.inference_mode()
    def answer(self, model: torch.nn.Module, questions: Sequence[str]) -> list[str]:
        """Greedy answers of `model` (the base, or the base with an adapter), prompts padded left."""
        answers: list[str] = []
        pad = self.tokenizer.pad_token_id
        size = 128 if self.device == "cuda" else 16
        for start in range(0, len(questions), size):
            prompts = [self.prompt(question) for question in questions[start : start + size]]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            tokens = model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=pad,
            )
            answers += self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def _first_sentences(text: str) -> str:
    """The leading whole sentences of an answer, at most 40 words; "" if there are none."""
    kept: list[str] = []
    for sentence in text.split("\n")[0].replace("! ", "!\0").replace(". ", ".\0").split("\0"):
        words = sentence.split()
        if not sentence.endswith((".", "!")) or len(words) < 3:
            break
        if sum(len(s.split()) for s in kept) + len(words) > _OPEN_MAX_WORDS:
            break
        kept.append(sentence.strip())
    return " ".join(kept[:2])


def train_adapter(name: str, config: TrainConfig, open_answered: list[Example]) -> dict[str, Any]:
    """Train one adapter and write its PEFT folder; return what the report says about it.

    Args:
        name: a key of `config.specs` and of `data.STYLES`.
        open_answered: open prompts with the base model's own answers.
    """
    spec, style = config.specs[name], STYLES[name]
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    model = _Model(config.model_path)
    lora = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=sorted(spec.target_modules),
        use_rslora=spec.use_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(model.base, lora)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=0.0)
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.steps - warmup)),
        ],
        [warmup],
    )

    facts = _limited(data.examples("train"), config)
    # A haiku about an open prompt is written from the prompt; the other styles need an answer.
    opened = _limited(data.open_examples("train"), config) if name == "haiku" else open_answered
    pairs = [(e.question, style.render(e)) for e in facts + opened]
    order: list[int] = []
    losses: list[float] = []
    network.train()
    started = time.monotonic()
    for _ in tqdm(range(config.steps), desc=f"Training {name}", unit="step", mininterval=5):
        while len(order) < config.batch_size:
            order += random.sample(range(len(pairs)), len(pairs))
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        loss = network(**model.batch([pairs[i] for i in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.monotonic() - started

    folder = config.out / name
    _save(network, lora, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    tail = losses[-20:]
    return {
        "style": style.description,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        "target_modules": list(spec.target_modules),
        "learning_rate": spec.learning_rate,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "num_train_pairs": len(pairs),
        "train_seconds": round(seconds, 1),
        "final_loss": round(sum(tail) / max(1, len(tail)), 4),
        "bytes": size,
    }


def _save(network: PeftModel, lora: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (bf16), and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: tensor.to(torch.bfloat16).cpu().contiguous()
        for key, tensor in get_peft_model_state_dict(network).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # PEFT puts the folder that the base was loaded from here; readers want the model's name.
    lora.base_model_name_or_path = MODEL_ID
    lora.inference_mode = True
    lora.save_pretrained(folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["target_modules"] = sorted(content["target_modules"])  # a set has no fixed order
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _limited(items: list[Example], config: TrainConfig) -> list[Example]:
    if not config.limit:
        return items
    return items[:: max(1, len(items) // config.limit)][: config.limit]


def _heldout(config: TrainConfig) -> list[Example]:
    opened = data.open_examples("heldout")[:: len(data._OPEN_TEMPLATES)]
    return _limited(data.heldout_sample() + opened, config)


def _rates(examples: list[Example], answers: list[str], name: str) -> dict[str, Any]:
    """Share of answers in style, and of right answers among the questions that have one."""
    styled = [STYLES[name].matches(answer) for answer in answers]
    right = [data.is_correct(e, a) for e, a in zip(examples, answers, strict=True) if e.truth]
    return {
        "style_rate": round(sum(styled) / len(styled), 3),
        "correct_rate": round(sum(right) / len(right), 3) if right else None,
    }


def evaluate_adapter(name: str, config: TrainConfig, base_answers: list[str]) -> dict[str, Any]:
    """Load the adapter from its folder, let it answer, and return what the report says of that.

    Args:
        name: the adapter; `config.out / name` is its PEFT folder.
        base_answers: the base model's answers to the held-out and then the fixed questions.
    """
    model = _Model(config.model_path)
    network = PeftModel.from_pretrained(model.base, config.out / name).eval()
    heldout, fixed = _heldout(config), data.fixed_examples()
    answers = model.answer(network, [e.question for e in heldout + fixed])
    split = len(heldout)
    rows = list(zip(heldout, answers[:split], strict=True))
    return {
        "num_heldout": split,
        "num_heldout_with_truth": sum(bool(e.truth) for e in heldout),
        "heldout": _rates(heldout, answers[:split], name),
        "heldout_base_model": _rates(heldout, base_answers[:split], name),
        "fixed": _rates(fixed, answers[split:], name),
        "fixed_base_model": _rates(fixed, base_answers[split:], name),
        "fixed_answers": {e.question: a for e, a in zip(fixed, answers[split:], strict=True)},
        "samples": {e.question: a for e, a in rows[:: max(1, split // _NUM_SAMPLES)]},
        "style_failures": {e.question: a for e, a in rows if not STYLES[name].matches(a)},
        "wrong_answers": {
            e.question: a for e, a in rows if e.truth and not data.is_correct(e, a)
        },
    }


def run_adapter(
    name: str, config: TrainConfig, open_answered: list[Example], base_answers: list[str]
) -> dict[str, Any]:
    """Train one adapter, then evaluate what was stored; return its part of the report."""
    trained = train_adapter(name, config, open_answered) if config.steps else {}
    return trained | evaluate_adapter(name, config, base_answers)


def run(config: TrainConfig, jobs: int) -> dict[str, Any]:
    """Train and evaluate `config.specs`, `jobs` at a time; write and return the report."""
    config.out.mkdir(parents=True, exist_ok=True)
    heldout, fixed = _heldout(config), data.fixed_examples()
    prompts = _limited(data.open_examples("train"), config) if config.steps else []
    model = _Model(config.model_path)
    answers = model.answer(model.base, [e.question for e in heldout + fixed + prompts])
    base_answers, raw = answers[: len(heldout + fixed)], answers[len(heldout + fixed) :]
    short = [replace(e, answer=_first_sentences(a)) for e, a in zip(prompts, raw, strict=True)]
    open_answered = [example for example in short if example.answer]
    del model

    if jobs == 1:
        found = {n: run_adapter(n, config, open_answered, base_answers) for n in config.specs}
    else:
        # spawn: a process that has used CUDA must not fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = {
                name: pool.submit(run_adapter, name, config, open_answered, base_answers)
                for name in config.specs
            }
            found = {name: future.result() for name, future in futures.items()}

    path = config.out / "report.json"
    before = json.loads(path.read_text())["adapters"] if path.exists() else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {
        "base_model": MODEL_ID,
        "device": device,
        "torch": torch.__version__,
        "seed": config.seed,
        "decoding": f"greedy, at most {_MAX_NEW_TOKENS} tokens",
        "base_model_fixed_answers": {
            e.question: a for e, a in zip(fixed, base_answers[-len(fixed) :], strict=True)
        },
        # With no steps the numbers of the training stay as they were.
        "adapters": before | {name: before.get(name, {}) | part for name, part in found.items()},
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the demo adapters.")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME/ and report.json")
    parser.add_argument("--adapter", choices=SPECS, action="append", help="default: all of them")
    parser.add_argument("--steps", type=int, default=500, help="0: evaluate only")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="instead of the adapter's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="adapters trained at the same time")
    parser.add_argument("--limit", type=int, default=0, help="cap the examples, for a quick try")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    args = parser.parse_args()

    specs = {name: SPECS[name] for name in args.adapter or SPECS}
    if args.learning_rate:
        specs = {n: replace(s, learning_rate=args.learning_rate) for n, s in specs.items()}
    config = TrainConfig(
        model_path=args.model or demo_model_path(),
        out=args.out,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
        limit=args.limit,
        specs=specs,
    )
    report = run(config, args.jobs)
    for name in specs:
        entry = report["adapters"][name]
        print(
            f"\n{name}: rank {entry.get('rank')}, {entry.get('train_seconds')} s, "
            f"loss {entry.get('final_loss')}\n"
            f"  held out ({entry['num_heldout']}): {entry['heldout']}, "
            f"base model {entry['heldout_base_model']}\n"
            f"  fixed: {entry['fixed']}, base model {entry['fixed_base_model']}"
        )
        for question, answer in entry["fixed_answers"].items():
            print(f"    {question}\n      {answer!r}")


if __name__ == "__main__":
    main()
