"""What grammars cost: a batch in which half of the answers must have a form, beside the same batch without.

On the embedded model. All answers have the same number of tokens, so that both batches do the same work but for the
grammars. Every request's adapter and prompt is another's too, with and without a grammar.
"""

import json
import statistics
import time

from slora_jax import Engine, Request, SamplingParams
from slora_jax.bench.demo import cpu
from slora_jax.config import build_config
from slora_jax.demo import with_demo
from slora_jax.request import Grammar

_SCHEMA = {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "string"}}, "minItems": 1000}
"""Of an answer that does not end in the time measured."""

_PROMPT = "Tell me about the planets, as much as you know."


def run_structured(num_requests: int, num_tokens: int, repeats: int, command: str) -> dict:
    """Times both batches, in turn, and compares the free answers of the two token for token.

    Args:
      num_requests: of a batch; half of them get the grammar.
      num_tokens: of each answer.
      repeats: runs of each batch; medians are given.
      command: for the result.

    Raises:
      AssertionError: a free answer is another one beside constrained ones.
    """
    engine = Engine.create(with_demo(build_config({})), progress=False)
    engine.warm_up()
    names = [None, *engine.adapters()]
    engine.start()
    grammar = Grammar("json_schema", json.dumps(_SCHEMA))
    try:
        prompt = tuple(engine.tokenizer.encode_chat([{"role": "user", "content": _PROMPT}]))

        def run(some: Grammar | None) -> tuple[float, list[tuple[int, ...]]]:
            requests = [
                Request(
                    prompt,
                    names[i // 2 % len(names)],
                    SamplingParams(
                        max_tokens=num_tokens,
                        temperature=0.0,
                        ignore_eos=True,
                        grammar=some if i % 2 else None,
                    ),
                )
                for i in range(num_requests)
            ]
            start = time.perf_counter()
            results = [generation.result() for generation in [engine.submit(request) for request in requests]]
            seconds = time.perf_counter() - start
            tokens = [result.completions[0].token_ids for result in results]
            assert {len(answer) for answer in tokens} == {num_tokens}, "every answer has its full length"
            return seconds, tokens

        run(None), run(grammar)
        free, half = [], []
        for _ in range(repeats):
            seconds, tokens = run(None)
            free.append(seconds)
            seconds, beside = run(grammar)
            half.append(seconds)
            assert tokens[::2] == beside[::2], "free answers are what they are without constrained ones beside"
    finally:
        engine.close()
    total = num_requests * num_tokens
    rates = {name: total / statistics.median(seconds) for name, seconds in (("free", free), ("half", half))}
    return {
        "command": command,
        "machine": cpu(),
        "requests": num_requests,
        "tokens_each": num_tokens,
        "tokens_per_second": {
            "all free": round(rates["free"], 1),
            "half with a grammar": round(rates["half"], 1),
        },
        "lost": round(1 - rates["half"] / rates["free"], 4),
        "free answers unchanged": True,
    }
