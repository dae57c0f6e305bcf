"""What quantising the base model costs in answers: the embedded model with and without its adapters.

Two numbers for the base model and for each adapter. Perplexity of answers that training has not seen, in the adapter's
style. And agreement: along the answers that the unquantised model gives by itself, the share of tokens which the
quantised one would have chosen, too, and of answers in which that is all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from slora_jax import Engine, Request, SamplingParams
from slora_jax.bench.demo import cpu
from slora_jax.config import build_config
from slora_jax.demo import data, with_demo
from slora_jax.errors import InvalidRequest

QUANTIZATIONS = ("fp8",)
"""What can be had at load; anything else is a folder of a quantised checkpoint of the same model."""


@dataclass(frozen=True)
class _Text:
    """A prompt's tokens, an answer's, and the adapter that answers; None is the base model."""

    adapter: str | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def run_quality(variants: Sequence[str], num_questions: int, num_tokens: int, dtype: str, command: str) -> dict:
    """Measures each variant beside the unquantised model.

    Args:
      variants: of ``QUANTIZATIONS``, or folders.
      num_questions: asked of the base model and of each adapter, at most; they are spread over all held-out ones.
      num_tokens: of an answer, at most.
      dtype: of what is not quantised.
      command: for the result.

    Raises:
      InvalidRequest, BadAdapter: a folder is no checkpoint of this model.
      UnsupportedModel: a folder cannot be read.
    """
    held_out = [example for example in data.heldout_sample() if example.answer]
    examples = held_out[:: max(1, len(held_out) // num_questions)][:num_questions]
    engine = _engine(None, dtype)
    try:
        tokenizer = engine.tokenizer
        assert tokenizer is not None, "the embedded model has a tokenizer"
        names = (None, *engine.adapters())
        prompts = [tuple(tokenizer.encode_chat([{"role": "user", "content": e.question}])) for e in examples]
        answers = {
            name: [e.answer if name is None else data.STYLES[name].render(e) for e in examples] for name in names
        }
        written = [
            _Text(name, prompt, tuple(tokenizer.encode(answer, add_special_tokens=False)))
            for name in names
            for prompt, answer in zip(prompts, answers[name], strict=True)
        ]
        own = _answered(engine, [_Text(name, prompt, ()) for name in names for prompt in prompts], num_tokens)
        scored = {"unquantised": _scored(engine, written, own)}
        vocabulary = tokenizer.to_json()
    finally:
        engine.close()
    for variant in variants:
        engine = _engine(variant, dtype)
        try:
            if engine.tokenizer is None or engine.tokenizer.to_json() != vocabulary:
                raise InvalidRequest(
                    f"{variant} is no checkpoint of this model: its tokenizer is another", param="against"
                )
            scored[variant] = _scored(engine, written, own)
        finally:
            engine.close()
    return {
        "command": command,
        "machine": cpu() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "model": "SmolLM2-135M-Instruct",
        "dtype": dtype,
        "questions": len(examples),
        "tokens_written": sum(len(text.answer) for text in written),
        "tokens_own": sum(len(text.answer) for text in own),
        "results": scored,
    }


def _engine(variant: str | None, dtype: str) -> Engine:
    config = with_demo(build_config({"dtype": dtype, "checkpoint_cache": None}))
    if variant in QUANTIZATIONS:
        config = config.model_copy(update={"quantization": variant})
    elif variant is not None:
        config = config.model_copy(update={"model": variant})
    engine = Engine.create(config, progress=False)
    engine.start()
    return engine


def _answered(engine: Engine, texts: Sequence[_Text], num_tokens: int) -> list[_Text]:
    """The same prompts with the answers that the engine gives."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=False)
    generations = [engine.submit(Request(text.prompt, text.adapter, sampling)) for text in texts]
    results = [generation.result() for generation in generations]
    return [
        _Text(text.adapter, text.prompt, tuple(result.completions[0].token_ids))
        for text, result in zip(texts, results, strict=True)
    ]


def _scored(engine: Engine, written: Sequence[_Text], own: Sequence[_Text]) -> dict[str, dict[str, float]]:
    """By adapter, what the engine makes of answers that are written, and of those that the unquantised model gave."""
    sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    texts = [text for text in (*written, *own) if text.answer]
    generations = [engine.submit(Request(text.prompt + text.answer, text.adapter, sampling)) for text in texts]
    tokens = {}
    for text, generation in zip(texts, generations, strict=True):
        scores = generation.result().prompt_logprobs
        assert scores is not None, "every token of the prompt was asked for"
        tokens[text] = [score for score in scores[len(text.prompt) :] if score is not None]
    found = {}
    for name in dict.fromkeys(text.adapter for text in written):
        logprobs = [token.logprob for text in written if text.adapter == name for token in tokens[text]]
        chosen = [[token.rank == 1 for token in tokens[text]] for text in own if text.adapter == name and text.answer]
        found[name or "base"] = {
            "perplexity": round(math.exp(-sum(logprobs) / len(logprobs)), 4),
            "tokens_agreed": round(sum(map(sum, chosen)) / sum(map(len, chosen)), 4),
            "answers_agreed": round(sum(map(all, chosen)) / len(chosen), 4),
        }
    return found
