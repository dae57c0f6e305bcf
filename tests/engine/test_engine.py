"""What the engine promises its callers, on a small real model."""

import dataclasses
import json
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax import Engine, Request, SamplingParams
from slora_jax.adapters.peft import load_adapter
from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.engine.build import available_memory
from slora_jax.errors import BadAdapter, EngineStopped, InvalidRequest, Overloaded, UnknownAdapter
from slora_jax.memory.budget import PageBudget
from slora_jax.memory.pages import PageAllocator
from tests.helpers.engine_cases import forced_logits, greedy, make_engine, run

PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module")
def engine(tiny_case):
    return tiny_case.engine()


def sampled(seed, prompt=PROMPT, adapter=None, max_tokens=12, **changes):
    return Request(prompt, adapter, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **changes))


def tokens_of(result, index=0):
    return result.completions[index].token_ids


# Sampling


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 2.0}])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(engine, rules):
    (alone,) = run(engine, engine.submit(sampled(7, **rules)))
    adapters = [None, *engine.adapters()]
    crowd = [sampled(i, prompt=PROMPT[: 5 + i], adapter=adapters[i % 4], temperature=1.5) for i in range(9)]
    generations = [engine.submit(r) for r in (*crowd[:4], sampled(7, **rules), *crowd[4:])]
    assert tokens_of(run(engine, *generations)[4]) == tokens_of(alone)
    (other,) = run(engine, engine.submit(sampled(8, **rules)))
    assert tokens_of(other) != tokens_of(alone)


def test_no_seed_draws_a_new_one_each_time(engine):
    first, second = run(engine, *(engine.submit(sampled(None, temperature=2.0)) for _ in range(2)))
    assert tokens_of(first) != tokens_of(second)


def test_completion_i_of_n_equals_a_request_with_seed_plus_i(engine):
    request = sampled(100, prompt=PROMPT, max_tokens=8)
    many = Request(request.prompt, None, request.sampling.replace(n=3))
    (result,) = run(engine, engine.submit(many))
    singles = run(engine, *(engine.submit(sampled(100 + i, max_tokens=8)) for i in range(3)))
    assert [c.index for c in result.completions] == [0, 1, 2]
    assert [c.token_ids for c in result.completions] == [tokens_of(s) for s in singles]


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({}, lambda p: p > 0),
        ({"temperature": 0.5}, lambda p: p > 0),
        ({"top_k": 3}, lambda p: p >= np.sort(p)[-3]),
        ({"top_p": 0.6}, lambda p: p >= np.sort(p)[::-1][np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.6)]),
        ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
    ],
)
def test_first_tokens_follow_the_filtered_distribution(engine, rules, allowed):
    """A chi-square test of 600 draws against the model's own distribution, filtered by a few lines of NumPy."""
    logits = forced_logits(engine, list(PROMPT), None)[-1].astype(np.float64) / rules.get("temperature", 1.0)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p = np.where(allowed(p), p, 0.0)
    p /= p.sum()
    draws = []
    for start in range(0, 600, 120):
        many = Request(PROMPT, None, SamplingParams(max_tokens=1, seed=start, n=120, ignore_eos=True, **rules))
        (result,) = run(engine, engine.submit(many))
        draws += [c.token_ids[0] for c in result.completions]
    counts = Counter(draws)
    assert all(p[token] > 0 for token in counts), "a token outside the filter was drawn"
    expected = 600 * p
    likely = expected >= 5
    observed = np.array([counts.get(i, 0) for i in range(len(p))], float)
    cells = np.append(observed[likely], observed[~likely].sum()), np.append(expected[likely], expected[~likely].sum())
    chi2 = sum((o - e) ** 2 / e for o, e in zip(*cells, strict=True) if e > 0)
    degrees = max(1, int(likely.sum()))
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees), f"chi-square {chi2:.1f} with {degrees} degrees of freedom"


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    ],
)
def test_penalties_equal_a_plain_loop_over_the_models_logits(engine, rules):
    (result,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=20, **rules)))
    params = SamplingParams(**rules)
    prompt, output = list(PROMPT), []
    for _ in range(20):
        logits = forced_logits(engine, prompt + output, None)[-1].astype(np.float64)
        for token in set(prompt + output):
            logits[token] *= (1 / params.repetition_penalty) if logits[token] > 0 else params.repetition_penalty
        for token, count in Counter(output).items():
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
        output.append(int(logits.argmax()))
    assert list(tokens_of(result)) == output


def test_penalties_do_not_leak_to_neighbours(engine):
    (plain,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=10)))
    both = [
        engine.submit(greedy(PROMPT, max_tokens=10)),
        engine.submit(greedy(PROMPT, max_tokens=10, repetition_penalty=2.0)),
    ]
    neighbour, penalized = run(engine, *both)
    assert tokens_of(neighbour) == tokens_of(plain) != tokens_of(penalized)


# Ends


def test_max_tokens_and_context_end_with_length(tiny_case):
    engine = tiny_case.engine(max_model_len=64)
    short, long = run(
        engine, engine.submit(greedy(PROMPT, max_tokens=3)), engine.submit(greedy(PROMPT, max_tokens=500))
    )
    assert (short.completions[0].finish_reason, len(tokens_of(short))) == ("length", 3)
    assert (long.completions[0].finish_reason, len(tokens_of(long))) == ("length", 64 - len(PROMPT))


def test_a_stop_token_ends_the_completion_and_stays_out_of_the_text(engine):
    (free,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=20)))
    stop = tokens_of(free)[7]
    (result,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=20, stop_token_ids=(stop,))))
    first = tokens_of(free).index(stop)
    assert result.completions[0].finish_reason == "stop"
    assert tokens_of(result) == tokens_of(free)[: first + 1]
    assert result.completions[0].text == engine.tokenizer.decode(tokens_of(free)[:first])


def test_eos_ends_the_completion_unless_ignored(tiny_case, tmp_path):
    engine = tiny_case.engine()
    (free,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=20)))
    eos = tokens_of(free)[5]
    folder = tmp_path / "model"
    shutil.copytree(tiny_case.model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    engine = make_engine(folder)
    ends, goes_on = run(
        engine,
        engine.submit(greedy(PROMPT, max_tokens=20, ignore_eos=False)),
        engine.submit(greedy(PROMPT, max_tokens=20)),
    )
    assert (ends.completions[0].finish_reason, tokens_of(ends)[-1]) == ("stop", eos)
    assert len(tokens_of(ends)) <= 6
    assert tokens_of(goes_on) == tokens_of(free)


def test_a_stop_string_ends_the_text_before_it(engine):
    (free,) = run(engine, engine.submit(greedy(PROMPT, max_tokens=30)))
    text = free.completions[0].text
    stop = text[10:13]
    generation = engine.submit(greedy(PROMPT, max_tokens=30, stop=(stop,)))
    (result,) = run(engine, generation)
    assert result.completions[0].text == text[: text.index(stop)]
    assert result.completions[0].finish_reason == "stop"
    assert len(tokens_of(result)) < 30


def test_deltas_join_to_the_result(engine):
    generation = engine.submit(greedy(PROMPT, max_tokens=10, logprobs=3, n=2))
    while engine.step():
        pass
    deltas, result = list(generation), generation.result()
    for completion in result.completions:
        mine = [d for d in deltas if d.index == completion.index]
        assert "".join(d.text for d in mine) == completion.text
        assert sum((d.token_ids for d in mine), ()) == completion.token_ids
        assert [d.finish_reason for d in mine[:-1]] == [None] * (len(mine) - 1)
        assert len(completion.logprobs) == 10
        assert all(len(p.top) == 3 for p in completion.logprobs)


# Refusals


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (greedy(()), InvalidRequest, "empty"),
        (greedy([288]), InvalidRequest, r"\[0, 288\)"),
        (greedy([-1]), InvalidRequest, r"\[0, 288\)"),
        (greedy([1] * 5000), InvalidRequest, "5000 tokens"),
        (greedy([1], "nobody"), UnknownAdapter, "nobody"),
    ],
)
def test_bad_requests_are_refused_at_once(engine, request_, error, says):
    with pytest.raises(error, match=says):
        engine.submit(request_)
    assert engine.stats()["waiting"] == 0


def test_a_request_larger_than_the_pool_is_refused_with_the_numbers(tiny_case):
    engine = tiny_case.engine(pages=20)
    with pytest.raises(InvalidRequest, match=r"needs .* pages .* the pool has 19"):
        engine.submit(greedy([1] * 200, "all7-r1", max_tokens=100))


def test_a_full_queue_refuses_and_then_recovers(tiny_case):
    engine = tiny_case.engine(scheduler={"max_waiting": 3})
    held = [engine.submit(greedy(PROMPT, max_tokens=2)) for _ in range(3)]
    with pytest.raises(Overloaded, match="at most 3"):
        engine.submit(greedy(PROMPT))
    run(engine, *held)
    run(engine, engine.submit(greedy(PROMPT, max_tokens=2)))


# Policies


def test_a_request_that_cannot_meet_its_objective_ends_with_a_reason_and_leaves_others_alone(tiny_case):
    engine = tiny_case.engine(scheduler={"policy": "abort"})
    hopeless = engine.submit(dataclasses.replace(greedy(PROMPT, max_tokens=2, n=2), slo_ms=0.001))
    patient = engine.submit(greedy(PROMPT, max_tokens=2))
    late, answered = run(engine, hopeless, patient)
    assert [c.finish_reason for c in late.completions] == ["late", "late"]
    assert "objective of 0 ms" in late.completions[0].error
    assert answered.completions[0].finish_reason == "length"
    assert engine.stats()["late"] == 1 and engine.stats()["waiting"] == 0


def test_fields_for_another_policy_are_refused(tiny_case, engine):
    for changes, says in (({"priority": 1}, "policy=priority"), ({"slo_ms": 5}, "policy=abort")):
        with pytest.raises(InvalidRequest, match=says):
            engine.submit(dataclasses.replace(greedy(PROMPT), **changes))


def test_tenants_are_adapters_and_the_base_model(tiny_case):
    engine = tiny_case.engine(scheduler={"policy": "vtc", "max_sequences": 1})
    generations = [engine.submit(greedy(PROMPT, name, max_tokens=2)) for name in (None, "qv-r8")]
    assert [g.sequences[0].tenant for g in generations] == [engine.model_name, "qv-r8"]
    run(engine, *generations)


# Adapters


def test_a_broken_adapter_fails_its_own_requests_only(tiny_case, tmp_path):
    source = tiny_case.adapters / "qv-r8"
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    engine = tiny_case.engine()
    engine.register_adapter("broken", str(broken))
    used = engine.stats()["pages_used"]
    generations = [engine.submit(greedy(PROMPT, name, max_tokens=5)) for name in (None, "broken", "qv-r8")]
    base, failed, good = run(engine, *generations)
    assert failed.completions[0].finish_reason == "error"
    assert name in failed.completions[0].error
    assert len(tokens_of(base)) == len(tokens_of(good)) == 5
    assert engine.stats()["pages_used"] == used == 0


def test_replacing_an_adapter_gives_new_requests_the_new_weights_and_no_stale_prefix(tiny_case, tmp_path):
    engine = tiny_case.engine()
    mine = tmp_path / "mine"
    shutil.copytree(tiny_case.adapters / "all7-r1", mine)
    engine.register_adapter("mine", str(mine))
    before = engine.submit(greedy(PROMPT, "mine", max_tokens=8))
    engine.step()
    other = tmp_path / "other"
    shutil.copytree(tiny_case.adapters / "mlp-r3", other)
    engine.register_adapter("mine", str(other))
    after = engine.submit(greedy(PROMPT, "mine", max_tokens=8))
    expected = [engine.submit(greedy(PROMPT, name, max_tokens=8)) for name in ("all7-r1", "mlp-r3")]
    old, new, *references = run(engine, before, after, *expected)
    assert [tokens_of(old), tokens_of(new)] == [tokens_of(r) for r in references]
    assert tokens_of(old) != tokens_of(new)


def test_requests_outlive_their_adapters_name(engine):
    engine.register_adapter("short-lived", str(engine.adapters()["qv-r8"].path))
    generation = engine.submit(greedy(PROMPT, "short-lived", max_tokens=6))
    engine.unregister_adapter("short-lived")
    (result,) = run(engine, generation)
    assert len(tokens_of(result)) == 6
    with pytest.raises(UnknownAdapter):
        engine.submit(greedy(PROMPT, "short-lived"))


def test_weights_from_memory_answer_like_the_same_weights_from_disk(tiny_case):
    engine = tiny_case.engine()
    header = engine.parts.store.get("qv-r8").header
    packed = load_adapter(header, engine.dtype).packed
    (scale,) = set(header.scales) - {0.0}
    start = time.perf_counter()
    for i in range(2000):
        engine.register_loaded_adapter(f"mine-{i}", header.ranks, packed, scale)
    # A second would do; other processes may be using the machine.
    assert time.perf_counter() - start < 5
    names = ["qv-r8", *(f"mine-{i}" for i in range(6))]
    expected, *results = run(engine, *(engine.submit(greedy(PROMPT, name, max_tokens=8)) for name in names))
    assert all(tokens_of(result) == tokens_of(expected) for result in results)
    assert engine.stats()["adapter_loads"] == 7, "equal weights, but other adapters"
    assert engine.stats()["adapter_load_bytes"] == 7 * packed.nbytes
    assert engine.stats()["cached_tokens"] == 0
    staged = {id(engine.parts.store.get(name).host().packed) for name in names[1:]}
    assert len(staged) == 1, "host memory is shared"


def test_bad_weights_from_memory_are_refused(engine):
    packed = synthetic_weights(4, "q", engine.pool_layout, engine.dtype)
    for name, ranks, says in (
        (engine.model_name, {"q": 4}, "is the base model"),
        ("bad name", {"q": 4}, "is not allowed"),
        ("mine", {"q": 400}, "ranks must be"),
        ("mine", {"x": 4}, "ranks must be"),
        ("mine", {"q": 200}, "have shape"),
    ):
        with pytest.raises(BadAdapter, match=says):
            engine.register_loaded_adapter(name, ranks, packed)
    with pytest.raises(ValueError, match="float32"):
        engine.register_loaded_adapter("mine", {"q": 4}, packed.astype(np.float16))
    assert "mine" not in engine.adapters()


# Threads


def test_threads_get_their_own_answers(tiny_case):
    engine = tiny_case.engine()
    expected = {r["id"]: r["tokens"] for r in tiny_case.requests}
    engine.start()
    wrong = []

    def ask(request):
        result = engine.submit(greedy(request["prompt"], request["adapter"])).result(timeout=120)
        if list(tokens_of(result)) != expected[request["id"]]:
            wrong.append(request["id"])

    threads = [threading.Thread(target=ask, args=(r,)) for r in tiny_case.requests * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not wrong
    assert engine.stats()["pages_used"] == 0


def test_cancel_frees_the_pages(tiny_case):
    engine = tiny_case.engine()
    keep, drop = engine.submit(greedy(PROMPT, max_tokens=30)), engine.submit(greedy(PROMPT, "qv-r8", n=2))
    for _ in range(4):
        engine.step()
    for _ in range(2):
        drop.cancel()
    kept, dropped = run(engine, keep, drop)
    assert len(tokens_of(kept)) == 30
    assert [c.finish_reason for c in dropped.completions] == ["abort", "abort"]
    assert len(tokens_of(dropped)) < 30
    assert engine.stats()["pages_used"] == 0


def test_close_ends_what_runs_and_refuses_what_comes(tiny_case):
    engine = tiny_case.engine()
    engine.start()
    generations = [engine.submit(greedy(PROMPT, max_tokens=400)) for _ in range(3)]
    next(iter(generations[0]))
    engine.close()
    engine.close()
    assert {g.result(timeout=5).completions[0].finish_reason for g in generations} == {"abort"}
    with pytest.raises(EngineStopped, match="closed"):
        engine.submit(greedy(PROMPT))


def test_a_device_that_fails_again_and_again_ends_the_engine_with_the_reason(tiny_case, monkeypatch):
    engine = tiny_case.engine()

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.device, "launch", fail)
    sentences = []
    engine.start(on_failure=sentences.append)
    errors = []
    for _ in range(3):
        (completion,) = engine.submit(greedy(PROMPT)).result(timeout=10).completions
        assert completion.finish_reason == "error"
        errors.append(completion.error)
    assert all("out of memory" in error for error in errors)
    with pytest.raises(EngineStopped, match="3 times in a row: RuntimeError: out of memory"):
        engine.submit(greedy(PROMPT))
    engine.close()
    assert not engine.is_running and len(sentences) == 1 and sentences[0] in errors[-1]


def test_abandoning_ends_what_runs_and_what_waits_while_the_device_hangs(tiny_case, monkeypatch):
    engine = tiny_case.engine()
    launched, goes_on = threading.Event(), threading.Event()
    launch = engine.device.launch

    def hang(batch):
        launched.set()
        assert goes_on.wait(30)
        return launch(batch)

    monkeypatch.setattr(engine.device, "launch", hang)
    engine.start()
    try:
        running = engine.submit(greedy(PROMPT, n=2))
        assert launched.wait(30)
        waiting = engine.submit(greedy(PROMPT))
        engine.abandon("host 1 was lost")
        for generation in (running, waiting):
            completions = generation.result(timeout=5).completions
            assert {(c.finish_reason, c.error) for c in completions} == {("error", "host 1 was lost")}
        with pytest.raises(EngineStopped, match="host 1 was lost"):
            engine.submit(greedy(PROMPT))
    finally:
        goes_on.set()
        engine.close()


# Engines that follow each other over the same parts


def test_another_engine_over_the_same_parts_has_other_settings_and_an_empty_pool(tiny_case):
    engine = tiny_case.engine()
    adapter = next(iter(engine.adapters()))
    (before,) = run(engine, engine.submit(greedy(PROMPT, adapter, 8)))
    config = engine.config.scheduler
    other = Engine(
        engine.parts,
        config.model_copy(update={"policy": "priority", "max_sequences": 2}),
        lambda: PageBudget(PageAllocator(60)),
    )
    assert other.stats()["pages_used"] == other.stats()["pages_cached"] == 0 and other.stats()["pages_total"] == 59
    request = dataclasses.replace(greedy(PROMPT, adapter, 8), priority=3)
    (after,) = run(other, other.submit(request))
    assert tokens_of(after) == tokens_of(before) and other.stats()["adapter_loads"] == 1
    third = Engine(engine.parts)
    with pytest.raises(InvalidRequest, match="priority"):
        third.submit(request)
    (again,) = run(third, third.submit(greedy(PROMPT, adapter, 8)))
    assert tokens_of(again) == tokens_of(before)
    with pytest.raises(ValueError, match="make others"):
        Engine(engine.parts, config.model_copy(update={"max_sequences": config.max_sequences + 1}))
    with pytest.raises(ValueError, match="the pool's"):
        Engine(engine.parts, config, lambda: PageBudget(PageAllocator(10_000)))
    engine.close()


def test_pins_that_would_take_more_than_half_of_the_pages_are_refused(tiny_case):
    name = "qv-r8"
    parts = tiny_case.engine(pinned=[name]).parts
    pages = parts.store.get(name).num_pages
    with pytest.raises(ValueError, match=f"pinned adapters take {pages} pages, more than the {pages - 1}"):
        Engine(parts, create_budget=lambda: PageBudget(PageAllocator(2 * pages)))
    engine = Engine(parts, create_budget=lambda: PageBudget(PageAllocator(2 * pages + 1)))
    with pytest.raises(BadAdapter, match=f"pinned ones may take {pages} together"):
        engine.register_adapter("more", str(tiny_case.adapters / "mlp-r3"), pinned=True)
    Engine(parts).register_adapter("more", str(tiny_case.adapters / "mlp-r3"), pinned=True)


def test_a_containers_limit_bounds_the_host_memory(tmp_path):
    free = available_memory(tmp_path)
    assert free > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, available in (("max\n", 2**20), ("1500\n", 500), ("900\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert min(2**20, available_memory(tmp_path)) == available


# Faults, injected under a running engine; the scheduler's side of this is tests/host/test_core.py


def texts(outputs):
    return [(c.token_ids, c.text, c.finish_reason) for output in outputs for c in output.completions]


@pytest.mark.parametrize("method", ["launch", "lay_out", "arrived", "start_copy"])
def test_a_fault_of_the_device_ends_what_it_must_and_the_engine_goes_on(tiny_case, monkeypatch, method):
    engine = tiny_case.engine(scheduler={"max_sequences": 4})
    requests = [greedy(r["prompt"], r["adapter"], 12) for r in tiny_case.requests] * 2
    expected = texts(run(engine, *(engine.submit(r) for r in requests)))
    real, calls = getattr(engine.device, method), []

    def faulty(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return real(*args)

    monkeypatch.setattr(engine.device, method, faulty)
    if method == "start_copy":
        engine.device.forget()
        engine = Engine(engine.parts)  # with an empty pool, so that adapters are copied again
    answers = texts(run(engine, *(engine.submit(r) for r in requests)))
    assert len(calls) > 3
    failed = [answer for answer in answers if answer[2] == "error"]
    assert len(failed) <= 4 < len(answers)
    assert all(got == right for got, right in zip(answers, expected, strict=True) if got[2] != "error")
    assert engine.stats()["recoveries"] == (0 if method == "lay_out" else 1)
    assert texts(run(engine, *(engine.submit(r) for r in requests))) == expected


def test_a_fault_of_the_text_is_its_own_requests(tiny_case, monkeypatch):
    engine = tiny_case.engine()
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12]]
    expected = texts(run(engine, *(engine.submit(greedy(p, None, 10)) for p in prompts)))
    generations = [engine.submit(greedy(p, None, 10)) for p in prompts]
    put, seen = generations[1].put, []

    def faulty(delta, at):
        seen.append(delta)
        if len(seen) == 4:
            raise UnicodeDecodeError("utf-8", b"?", 0, 1, "injected")
        put(delta, at)

    generations[1].put = faulty
    answers = texts(run(engine, *generations))
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    tokens, _, reason = answers[1]
    assert reason == "error" and tokens == expected[1][0][:3]
    assert engine.stats()["pages_used"] == 0


def test_an_adapter_whose_answers_are_not_finite_ends_its_requests_with_its_name(tiny_case, tmp_path):
    folder = shutil.copytree(tiny_case.adapters / "qv-r8", tmp_path / "huge")
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {n: np.full_like(w, 1e37) if "lora_B" in n else w for n, w in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    engine = tiny_case.engine()
    engine.register_adapter("huge", str(folder))
    others = [r for r in tiny_case.requests if r["adapter"] != "huge"][:4]
    generations = [engine.submit(greedy(r["prompt"], r["adapter"], 12)) for r in others]
    bad = [engine.submit(greedy(PROMPT, "huge", 12, **changes)) for changes in ({}, {"temperature": 1.0, "seed": 1})]
    results = run(engine, *generations, *bad)
    for request, result in zip(others, results, strict=False):
        assert list(result.completions[0].token_ids) == request["tokens"][:12]
    for result in results[-2:]:
        (completion,) = result.completions
        assert completion.finish_reason == "error" and "adapter 'huge' gave numbers that are not" in completion.error
        assert completion.token_ids == ()
