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
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
_MAX_NEW_TOKENS = 96  # the longest target has about 70
_OPEN_MAX_WORDS = 30
_NUM_SAMPLES = 12


@dataclass(frozen=True)
class AdapterSpec:
    """How one adapter is made; the delta's scale is alpha/r, rsLoRA alpha/sqrt(r)."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    use_rslora: bool = False
    steps: int = 220
    batch_size: int = 64


# Every rank that the demo wants to mix in one batch, one adapter on all seven projections, and
# one with rsLoRA's scale.
SPECS = {
    "emoji": AdapterSpec(2, 4, _ATTENTION, 2e-3),
    "haiku": AdapterSpec(4, 8, _ATTENTION + _MLP, 1e-3, steps=240, batch_size=32),
    "pirate": AdapterSpec(8, 16, _ATTENTION, 1e-3),
    "json": AdapterSpec(16, 8, _ATTENTION, 1e-3, use_rslora=True),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run; `limit` (0: none) caps each list of examples, for a quick try."""

    model_path: Path
    out: Path
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
        self.base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(self.device)
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


def _first_sentence(text: str) -> str:
    """The first sentence of an answer, or "" if it is cut off, a heading, or very long."""
    sentence = re.split(r"(?<=[.!?])\s", text.split("\n")[0], maxsplit=1)[0].strip()
    words = sentence.split()
    whole = sentence.endswith((".", "!")) and 4 <= len(words) <= _OPEN_MAX_WORDS
    return sentence if whole else ""


def _answer_loss(network: PeftModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the labels that are not -100; scores no other position's vocabulary."""
    base = network.get_base_model()
    hidden = base.model(**inputs).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    kept = labels != -100
    return torch.nn.functional.cross_entropy(base.lm_head(hidden[kept]).float(), labels[kept])


def train_adapter(name: str, config: TrainConfig, base_answers: dict[str, str]) -> dict[str, Any]:
    """Train one adapter and write its PEFT folder; return what the report says of the training.

    Args:
        name: a key of `config.specs` and of `data.STYLES`.
        base_answers: the base model's answers to the open prompts, which are trained on in this
            adapter's style.
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
    warmup = max(1, spec.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, spec.steps - warmup)),
        ],
        [warmup],
    )

    facts = _limited(data.examples("train"), config)
    opened = _limited(data.open_examples("train"), config)
    if name != "haiku":  # a haiku is written from the prompt alone
        short = [replace(e, answer=_first_sentence(base_answers[e.question])) for e in opened]
        opened = [example for example in short if example.answer]
    pairs = [(e.question, style.render(e)) for e in facts + opened]
    order: list[int] = []
    losses: list[float] = []
    network.train()
    started = time.monotonic()
    for _ in tqdm(range(spec.steps), desc=f"Training {name}", unit="step", mininterval=5):
        while len(order) < spec.batch_size:
            order += random.sample(range(len(pairs)), len(pairs))
        chosen, order = order[: spec.batch_size], order[spec.batch_size :]
        loss = _answer_loss(network, **model.batch([pairs[i] for i in chosen]))
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
        "target_modules": sorted(spec.target_modules),
        "learning_rate": spec.learning_rate,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "num_train_pairs": len(pairs),
        "train_seconds": round(seconds, 1),
        "train_device": f"{_device()}, torch {torch.__version__}",
        "final_loss": round(sum(tail) / max(1, len(tail)), 4),
        "bytes": size,
    }


def _save(network: PeftModel, lora: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (bf16), and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: tensor.to(torch.bfloat16).cpu().contiguous() for key, tensor in get_peft_model_state_dict(network).items()
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


def _rates(examples: list[Example], answers: dict[str, str], name: str) -> dict[str, Any]:
    """Share of answers in style, and of right answers among the questions that have one."""
    styled = [STYLES[name].matches(answers[e.question]) for e in examples]
    right = [data.is_correct(e, answers[e.question]) for e in examples if e.truth]
    return {
        "style_rate": round(sum(styled) / len(styled), 3),
        "correct_rate": round(sum(right) / len(right), 3) if right else None,
    }


def evaluate_adapter(name: str, config: TrainConfig, base_answers: dict[str, str]) -> dict[str, Any]:
    """Load the adapter from its folder, let it answer, and return what the report says of that.

    Args:
        name: the adapter; `config.out / name` is its PEFT folder.
        base_answers: the base model's answers to the held-out and the fixed questions.
    """
    model = _Model(config.model_path)
    network = PeftModel.from_pretrained(model.base, config.out / name).eval()
    heldout, fixed = _limited(data.heldout_sample(), config), data.fixed_examples()
    questions = [example.question for example in heldout + fixed]
    answers = dict(zip(questions, model.answer(network, questions), strict=True))
    kept = {e.question: answers[e.question] for e in heldout}
    return {
        "evaluation_device": f"{_device()}, torch {torch.__version__}",
        "num_heldout": len(heldout),
        "num_heldout_with_truth": sum(bool(e.truth) for e in heldout),
        "heldout": _rates(heldout, answers, name),
        "heldout_base_model": _rates(heldout, base_answers, name),
        "fixed": _rates(fixed, answers, name),
        "fixed_base_model": _rates(fixed, base_answers, name),
        "fixed_answers": {e.question: answers[e.question] for e in fixed},
        "samples": dict(list(kept.items())[:: max(1, len(kept) // _NUM_SAMPLES)]),
        "style_failures": {q: a for q, a in kept.items() if not STYLES[name].matches(a)},
        "wrong_answers": {
            e.question: kept[e.question] for e in heldout if e.truth and not data.is_correct(e, kept[e.question])
        },
    }


def run_adapter(name: str, config: TrainConfig, stages: Sequence[str], base_answers: dict[str, str]) -> dict[str, Any]:
    """Train one adapter, evaluate what was stored, or both; return its part of the report."""
    report: dict[str, Any] = {}
    if "train" in stages:
        report |= train_adapter(name, config, base_answers)
    if "evaluate" in stages:
        report |= evaluate_adapter(name, config, base_answers)
    return report


def answer_with_base(config: TrainConfig, questions: Sequence[str]) -> dict[str, str]:
    """The base model's answers by question; those known already are read from a file in `out`."""
    path = config.out / "base_answers.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [question for question in questions if question not in known]
    if missing:
        model = _Model(config.model_path)
        known |= zip(missing, model.answer(model.base, missing), strict=True)
        _write_json(path, known)
    return known


def run(config: TrainConfig, stages: Sequence[str], jobs: int) -> dict[str, Any]:
    """Train and evaluate `config.specs`, `jobs` at a time; write and return the report.

    An adapter whose stage is left out keeps what an earlier report in `out` says about it.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    fixed = [example.question for example in data.fixed_examples()]
    questions = fixed + [e.question for e in _limited(data.heldout_sample(), config)] if "evaluate" in stages else []
    if "train" in stages:
        questions += [e.question for e in _limited(data.open_examples("train"), config)]
    base_answers = answer_with_base(config, questions)

    path = config.out / "report.json"
    before = json.loads(path.read_text(encoding="utf-8"))["adapters"] if path.exists() else {}
    report: dict[str, Any] = {
        "base_model": MODEL_ID,
        "seed": config.seed,
        "decoding": f"greedy, at most {_MAX_NEW_TOKENS} tokens",
        "base_model_fixed_answers": {q: base_answers[q] for q in fixed if q in base_answers},
        "adapters": before,
    }
    # spawn: a process that has used CUDA must not fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_adapter, name, config, stages, base_answers): name for name in config.specs}
        for future in as_completed(futures):
            name = futures[future]
            before[name] = before.get(name, {}) | future.result()
            _write_json(path, report)  # an adapter that is done stays, whatever becomes of the next
    return report


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the demo adapters.")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME/ and report.json")
    parser.add_argument("--adapter", choices=SPECS, action="append", help="default: all of them")
    parser.add_argument("--steps", type=int, help="instead of the adapter's own")
    parser.add_argument("--batch-size", type=int, help="instead of the adapter's own")
    parser.add_argument("--stage", choices=("train", "evaluate"), help="default: both")
    parser.add_argument("--learning-rate", type=float, help="instead of the adapter's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="adapters trained at the same time")
    parser.add_argument("--limit", type=int, default=0, help="cap the examples, for a quick try")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    args = parser.parse_args()

    changes = {key: getattr(args, key) for key in ("steps", "batch_size", "learning_rate") if getattr(args, key)}
    specs = {name: replace(SPECS[name], **changes) for name in args.adapter or SPECS}
    config = TrainConfig(
        model_path=args.model or demo_model_path(),
        out=args.out,
        seed=args.seed,
        limit=args.limit,
        specs=specs,
    )
    report = run(config, [args.stage] if args.stage else ["train", "evaluate"], args.jobs)
    for name in specs:
        entry = report["adapters"][name]
        print(f"\n{name}")
        for key, value in entry.items():
            if not isinstance(value, dict) or key.startswith(("heldout", "fixed")):
                print(f"  {key}: {json.dumps(value, indent=4, ensure_ascii=False)}")


if __name__ == "__main__":
    main()
