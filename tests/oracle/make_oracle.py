"""Expected results from transformers + PEFT: greedy tokens and float32 logits of many adapters of one Llama.

    python make_oracle.py --out DIR [--seed N] [--case NAME ...]
    python make_oracle.py --real MODEL_DIR --adapters DIR --prompts FILE.json --out DIR

The first form creates small random models and adapters (see cases.py) together with their expected results; the
second computes the same expected results for a model and adapters that exist. Nothing here is shared with the engine:
each request runs alone, once with its adapter switched on by PEFT and once with the adapter merged into the weights,
and both must agree. Formats are described in README.md.
"""

import argparse
import copy
import json
import math
import platform
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import CASES, MAX_NEW_TOKENS, Adapter, Case, Prompt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

FORMAT = 1
MIN_GAP = 1e-2  # smallest top1 - top2 logit difference of a generated case: far above float32 noise
MIN_DISTINCT_TOKENS = 12  # of 64: the continuation is no constant loop
MIN_ADAPTER_EFFECT = 0.2  # relative change of the last prompt position's logits against the base
TOLERANCE = 2e-5  # relative: PEFT's adapter against merged weights, and decoding against one full pass
MAX_NOISE = 5e-6  # relative, the same at any single step of a generated case: no step amplifies rounding
MAX_DRAWS = 2000

CORPUS = (
    "adapter apple bridge café cloud dance eight forest garden hello island jazz kernel lamp memory night ocean page "
    "quiet river stone tokens under violet water yellow zebra naïve 42 2024 — however, the batch of many models is "
    "served at once; ranks differ."
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class Rejected(Exception):
    """A drawn prompt is no good test: a near-tie, a loop, noise, or an adapter without much effect. Draw again."""


# --- Random models and adapters ---------------------------------------------------------------------------------------


def create_model(case: Case, folder: Path, generator: torch.Generator) -> None:
    """Writes a random Llama as a Hugging Face folder."""
    config = LlamaConfig(**case.model)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.2 * values
        elif name == "model.embed_tokens.weight":
            # Small beside what the layers add, or tied embeddings would repeat the input token for ever.
            values = 0.25 * values
        elif name == "lm_head.weight":
            values = values * 4.0 / math.sqrt(weight.shape[1])
        else:
            values = values * 1.4 / math.sqrt(weight.shape[1])
        weight.data.copy_(values)
    shards = {"max_shard_size": case.max_shard_size} if case.max_shard_size else {}
    model.to(getattr(torch, case.dtype)).save_pretrained(folder, **shards)
    rewrite_config(case, folder / "config.json")
    if not case.tokenizer:
        (folder / "generation_config.json").unlink()


def rewrite_config(case: Case, path: Path) -> None:
    """Respells a config.json that transformers 5 wrote the way earlier checkpoints spell it."""
    config = json.loads(path.read_text())
    if case.config_style != "v5":
        rope = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if case.config_style == "llama1":
        for name in ("rope_theta", "rope_scaling", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
            del config[name]
    path.write_text(json.dumps(config, indent=1) + "\n")


def create_tokenizer(case: Case, folder: Path) -> None:
    """Trains a byte-level BPE tokenizer of exactly the model's vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=case.model["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    assert tokenizer.get_vocab_size() == case.model["vocab_size"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")


def create_adapter(case: Case, spec: Adapter, model_folder: Path, folder: Path, generator: torch.Generator) -> None:
    """Writes a PEFT folder whose B A products are about as large as the weights they change."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        use_rslora=spec.rslora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        layers_to_transform=list(spec.layers) if spec.layers else None,
    )
    model = get_peft_model(load_model(model_folder), config)
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        rank, fan_in = a.shape
        a.data.copy_(torch.randn(a.shape, generator=generator) / math.sqrt(fan_in))
        wanted = 0.7 * module.base_layer.weight.std().item() * math.sqrt(fan_in)  # s B A deviates 0.7 times as W does
        b_std = wanted / (module.scaling["default"] * math.sqrt(rank))
        b.data.copy_(torch.randn(b.shape, generator=generator) * b_std)
    # Embeddings are not adapted; "auto" would ask the hub whether they were resized.
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = case.name
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT keeps a set: its order changes from run to run
    path.write_text(json.dumps(config, indent=1) + "\n")


# --- Running one request --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A greedy continuation; ``logits`` are those of every position of prompt + continuation but the last."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor  # [len(prompt) + MAX_NEW_TOKENS - 1, vocab] float32
    merged_error: float
    noise: float  # largest relative difference at one step between the ways to compute it

    @property
    def steps(self) -> torch.Tensor:
        """Logits that chose each new token: [MAX_NEW_TOKENS, vocab]."""
        return self.logits[len(self.prompt) - 1 :]

    @property
    def top2(self) -> torch.Tensor:
        return self.steps.topk(2).values

    @property
    def gaps(self) -> torch.Tensor:
        return self.top2[:, 0] - self.top2[:, 1]


def load_model(folder: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # No end-of-sequence token at all. min_new_tokens would not do: it forbids that token, where a server told to
    # ignore it may well choose it and go on.
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return model.eval()


class Oracle:
    """A model with its adapters, and one merged copy of the model for each adapter."""

    def __init__(self, model_folder: Path, adapter_folders: dict[str, Path]):
        base = load_model(model_folder)
        self._merged: dict[str | None, torch.nn.Module] = {None: copy.deepcopy(base)}
        for name, folder in adapter_folders.items():
            peft_model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
            self._merged[name] = peft_model.merge_and_unload()
        self._model = base
        for name, folder in adapter_folders.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        self._model.eval()

    @torch.no_grad()
    def run(self, adapter: str | None, prompt: list[int]) -> Result:
        """Greedy continuation of one prompt, alone.

        Asserts that three ways to compute it agree: step by step, in one pass, and with merged weights.
        """
        ids = torch.tensor([prompt])
        with self._switched_to(adapter):
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                return_dict_in_generate=True,
                output_logits=True,
            )
            full = generated.sequences[:, :-1]
            logits = self._model(full).logits[0]
        tokens = generated.sequences[0, len(prompt) :].tolist()
        assert len(tokens) == MAX_NEW_TOKENS
        steps = logits[len(prompt) - 1 :]
        merged = self._merged[adapter](full).logits[0]
        merged_steps, decoded_steps = merged[len(prompt) - 1 :], torch.cat(generated.logits)
        noise = max(
            relative_error(a, b) for way in (merged_steps, decoded_steps) for a, b in zip(way, steps, strict=True)
        )
        result = Result(prompt, tokens, logits, relative_error(merged, logits), noise)
        assert relative_error(decoded_steps, steps) < TOLERANCE
        assert result.merged_error < TOLERANCE, f"{adapter}: merged weights differ by {result.merged_error:.1e}"
        clear = result.gaps > MIN_GAP  # always, in generated cases
        for choice in (steps.argmax(-1), merged_steps.argmax(-1)):
            assert torch.equal(choice[clear], torch.tensor(tokens)[clear])
        return result

    def _switched_to(self, adapter: str | None):
        if adapter is not None:
            self._model.set_adapter(adapter)
            return nullcontext()
        return self._model.disable_adapter() if isinstance(self._model, PeftModel) else nullcontext()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


# --- Prompts --------------------------------------------------------------------------------------------------------


def draw_prompt(
    spec: Prompt, case: Case, drawn: dict[str, dict[str, Any]], tokenizer: Any, rng: random.Random
) -> dict[str, Any]:
    """Token ids under ``prompt``, and the ``text`` or ``messages`` they come from."""
    if spec.kind == "ids":
        start = drawn[spec.shares]["prompt"][: spec.shared] if spec.shares else []
        # Ids 0, 1 and 2 are special tokens by custom: not in random prompts.
        return {"prompt": start + [rng.randrange(3, case.model["vocab_size"]) for _ in range(spec.length - len(start))]}
    text = " ".join(rng.choice(CORPUS.split()) for _ in range(spec.length))
    return encode(tokenizer, text if spec.kind == "text" else [{"role": "user", "content": text}])


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> dict[str, Any]:
    """A string is tokenized as it is, without special tokens; a list of messages goes through the chat template."""
    if isinstance(prompt, str):
        return {"prompt": tokenizer(prompt, add_special_tokens=False)["input_ids"], "text": prompt}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"prompt": ids, "messages": prompt, "text": text}


def run_until_clear(
    spec: Prompt,
    case: Case,
    adapters: Iterable[str | None],
    oracle: Oracle,
    drawn: dict[str, dict[str, Any]],
    tokenizer: Any,
    rng: random.Random,
) -> tuple[dict[str, Any], dict[str | None, Result]]:
    """Draws prompts until each of ``adapters`` continues it with clear greedy choices."""
    for _ in range(MAX_DRAWS):
        prompt = draw_prompt(spec, case, drawn, tokenizer, rng)
        try:
            base = check(oracle.run(None, prompt["prompt"]))
            results: dict[str | None, Result] = {None: base}
            for adapter in adapters:
                if adapter is not None:
                    results[adapter] = check(oracle.run(adapter, prompt["prompt"]), base)
        except Rejected:
            continue
        if len({tuple(result.tokens) for result in results.values()}) == len(results):
            return prompt, results
    raise RuntimeError(f"{case.name}: no good prompt {spec} in {MAX_DRAWS} draws; try another seed")


def check(result: Result, base: Result | None = None) -> Result:
    if result.noise > MAX_NOISE or result.gaps.min() < MIN_GAP or len(set(result.tokens)) < MIN_DISTINCT_TOKENS:
        raise Rejected
    if base is not None and relative_error(result.steps[0], base.steps[0]) < MIN_ADAPTER_EFFECT:
        raise Rejected
    return result


# --- Output -----------------------------------------------------------------------------------------------------------


def describe(
    index: int, adapter: str | None, prompt: dict[str, Any], result: Result, positions: list[int], tokenizer: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One request's entry in expected.json and its tensors."""
    entry = {"id": index, "adapter": adapter, **prompt, "tokens": result.tokens}
    if tokenizer is not None:
        entry["completion"] = tokenizer.decode(result.tokens, skip_special_tokens=True)
    entry["logit_positions"] = positions
    entry["gaps"] = [round(gap, 4) for gap in result.gaps.tolist()]
    tensors = {
        f"{index}.logits": result.logits[positions].contiguous(),
        f"{index}.top2_logits": result.top2.contiguous(),
        f"{index}.logsumexp": result.steps.logsumexp(-1).contiguous(),
    }
    return entry, tensors


def write_expected(
    folder: Path, header: dict[str, Any], described: Iterator[tuple[dict, dict]], errors: Iterable[float]
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for entry, of_request in described:
        entries.append(entry)
        tensors.update(of_request)
    header = {
        "format": FORMAT,
        **header,
        "max_new_tokens": MAX_NEW_TOKENS,
        "min_gap": min(min(entry["gaps"]) for entry in entries),
        "max_merged_error": float(f"{max(errors):.1e}"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "safetensors", "tokenizers")},
    }
    # One request a line: a change of one shows as one line.
    head = json.dumps(header, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join("  " + json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries)
    (folder / "expected.json").write_text(f'{head},\n "requests": [\n{lines}\n ]\n}}\n')
    save_file(tensors, folder / "expected.safetensors")


def make_case(case: Case, out: Path, seed: int) -> None:
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(f"{case.name}-{seed}")
    torch.manual_seed(seed)

    model_folder = folder / "model"
    create_model(case, model_folder, generator)
    tokenizer = None
    if case.tokenizer:
        create_tokenizer(case, model_folder)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
    adapter_folders = {name: folder / "adapters" / name for name in case.adapters}
    for name, spec in case.adapters.items():
        create_adapter(case, spec, model_folder, adapter_folders[name], generator)

    oracle = Oracle(model_folder, adapter_folders)
    prompts: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str | None, Result]] = {}
    for name, spec in case.prompts.items():
        users = [adapter for adapter, prompt in case.requests if prompt == name]
        prompts[name], results[name] = run_until_clear(spec, case, users, oracle, prompts, tokenizer, rng)

    def described():
        for index, (adapter, prompt) in enumerate(case.requests):
            result = results[prompt][adapter]
            last = len(result.prompt) - 1
            positions = [last, last + MAX_NEW_TOKENS - 1]
            yield describe(index, adapter, prompts[prompt], result, positions, tokenizer)

    header = {"case": case.name, "seed": seed, "features": case.features}
    errors = [results[prompt][adapter].merged_error for adapter, prompt in case.requests]
    write_expected(folder, header, described(), errors)


def make_real(model_folder: Path, adapters: Path, prompts: Path, out: Path) -> None:
    """Every prompt under the base and under each adapter; near-ties are kept, so read ``gaps`` before comparing."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    adapter_folders = {path.parent.name: path.parent for path in sorted(adapters.glob("*/adapter_config.json"))}
    oracle = Oracle(model_folder, adapter_folders)
    encoded = [
        encode(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        for prompt in json.loads(prompts.read_text())
    ]
    out.mkdir(parents=True, exist_ok=True)
    errors = [0.0]

    def described():
        pairs = [(adapter, prompt) for prompt in encoded for adapter in (None, *adapter_folders)]
        for index, (adapter, prompt) in enumerate(pairs):
            result = oracle.run(adapter, prompt["prompt"])
            errors.append(result.merged_error)
            yield describe(index, adapter, prompt, result, [len(result.prompt) - 1], tokenizer)

    write_expected(out, {"case": model_folder.name}, described(), errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--real", type=Path, metavar="MODEL_DIR", help="a model folder with its tokenizer")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="with --real: a folder of PEFT folders")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.json",
        help="with --real: a list of user messages (strings) or of message lists, put through the chat template",
    )
    args = parser.parse_args()
    disable_progress_bar()
    if args.real:
        if not (args.adapters and args.prompts):
            parser.error("--real needs --adapters and --prompts")
        make_real(args.real, args.adapters, args.prompts, args.out)
        return
    for name in args.case:
        make_case(CASES[name], args.out, args.seed)
        print(f"{name}: written to {args.out / name}")


if __name__ == "__main__":
    main()
