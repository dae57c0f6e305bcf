"""What other settings do to answers: the embedded model and its adapters, beside the same as they come.

Texts that nobody was trained on are dealt to the base model and to each adapter: conversations of several questions,
answered in the adapter's style, of a few hundred tokens. Each setting gives for them

- the perplexity of every token after the first;
- how often the token that it finds most likely is the one that the baseline finds most likely, with the same tokens
  before (no error can build up);
- how many of as many questions it answers greedily token for token as the baseline does, where one other token
  changes all that follow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora_jax import Engine, Request, SamplingParams
from slora_jax.bench.demo import cpu
from slora_jax.config import build_config
from slora_jax.demo import with_demo
from slora_jax.demo.data import STYLES, Example, heldout_sample
from slora_jax.errors import InvalidRequest
from slora_jax.text.tokenizer import Tokenizer

_BASE = "base"


@dataclass(frozen=True)
class _Scored:
    """Of one setting and model: log-probabilities and most likely tokens of all texts, and greedy answers."""

    logprobs: list[float]
    likeliest: list[int]
    answers: list[tuple[int, ...]]


def run_accuracy(
    settings: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    texts: int,
    turns: int,
    tokens: int,
    command: str,
) -> dict:
    """Measures settings one after the other, in this process.

    Args:
      settings: fields of the engine's configuration, such as ``{"kv_cache_dtype": "fp8"}``; ``model`` is a checkpoint
        to serve in the embedded one's place, under the embedded adapters.
      baseline: those that all are compared with.
      texts: conversations for each model.
      turns: questions with their answers in each.
      tokens: of each greedy answer.
      command: for the result.

    Raises:
      InvalidRequest: a setting that the engine does not take, or a checkpoint of another model.
      BadAdapter: a checkpoint of another model, which the adapters do not fit.
      UnsupportedModel: a checkpoint that cannot be read.
    """
    compared = _measure(baseline, texts, turns, tokens)
    rows = [_row(baseline, name, scored, scored) for name, scored in compared.items()]
    for setting in settings:
        measured = _measure(setting, texts, turns, tokens)
        rows += [_row(setting, name, scored, compared[name]) for name, scored in measured.items()]
    return {
        "command": command,
        "machine": cpu(),
        "texts": texts,
        "turns": turns,
        "tokens_each": tokens,
        "baseline": _words(baseline),
        "rows": rows,
    }


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "as it comes"


def _row(setting: Mapping[str, Any], name: str, scored: _Scored, baseline: _Scored) -> dict:
    pairs = list(zip(scored.likeliest, baseline.likeliest, strict=True))
    answers = list(zip(scored.answers, baseline.answers, strict=True))
    return {
        "setting": _words(setting),
        "model": name,
        "scored_tokens": len(scored.logprobs),
        "perplexity": _perplexity(scored),
        "more_than_baseline": _perplexity(scored) / _perplexity(baseline) - 1,
        "same_likeliest": sum(a == b for a, b in pairs) / len(pairs),
        "same_answers": sum(a == b for a, b in answers),
        "answers": len(answers),
    }


def _perplexity(scored: _Scored) -> float:
    return math.exp(-sum(scored.logprobs) / len(scored.logprobs))


def _measure(setting: Mapping[str, Any], texts: int, turns: int, tokens: int) -> dict[str, _Scored]:
    """By the base model's and the adapters' names."""
    demo = with_demo(build_config({name: value for name, value in setting.items() if name != "model"}))
    model = setting.get("model", demo.model)
    engine = Engine.create(demo.model_copy(update={"model": model}), progress=False)
    engine.start()
    try:
        expected = Tokenizer.from_folder(Path(demo.model)).to_json()
        if engine.tokenizer is None or engine.tokenizer.to_json() != expected:
            raise InvalidRequest(
                f"{model} is no checkpoint of the embedded model: its tokenizer is another", param="model"
            )
        score = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        greedy = SamplingParams(max_tokens=tokens, temperature=0.0)
        running = {}
        for name in (None, *engine.adapters()):
            chats = _chats(name, texts, turns)
            whole = [_encoded(engine, chat) for chat in chats]
            # All but the last answer.
            open_ended = [_encoded(engine, chat[:-1]) for chat in chats]
            running[name or _BASE] = (
                [engine.submit(Request(prompt, name, score)) for prompt in whole],
                [engine.submit(Request(prompt, name, greedy)) for prompt in open_ended],
            )
        measured = {}
        for name, (scores, answers) in running.items():
            found = [entry for g in scores for entry in g.result().prompt_logprobs or () if entry is not None]
            measured[name] = _Scored(
                [entry.logprob for entry in found],
                [entry.top[0][0] for entry in found],
                [g.result().completions[0].token_ids for g in answers],
            )
        return measured
    finally:
        engine.close()


def _encoded(engine: Engine, chat: list[dict[str, str]]) -> tuple[int, ...]:
    assert engine.tokenizer is not None, "the embedded model has one"
    return tuple(engine.tokenizer.encode_chat(chat))


def _chats(adapter: str | None, texts: int, turns: int) -> list[list[dict[str, str]]]:
    """Conversations about what the adapters were not trained on, answered as the adapter should."""
    examples = [example for example in heldout_sample() if example.answer and example.haiku]
    step = max(1, len(examples) // texts)
    chats = []
    for i in range(texts):
        first = i * step
        taken = [examples[(first + j) % len(examples)] for j in range(turns)]
        chats.append([message for example in taken for message in _turn(example, adapter)])
    return chats


def _turn(example: Example, adapter: str | None) -> list[dict[str, str]]:
    answer = example.answer if adapter is None else STYLES[adapter].render(example)
    return [{"role": "user", "content": example.question}, {"role": "assistant", "content": answer}]


def table(result: dict) -> str:
    """The result for people."""
    lines = ["| setting | model | perplexity | beside the baseline | likeliest token the same | answers the same |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {row['setting']} | {row['model']} | {row['perplexity']:.3f} | {row['more_than_baseline']:+.2%} | "
        f"{row['same_likeliest']:.2%} of {row['scored_tokens']:,} | {row['same_answers']} of {row['answers']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)
