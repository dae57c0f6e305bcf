import itertools
import threading

import numpy as np
import pytest

import slora_jax.demo
from slora_jax.api.notebook import generate
from slora_jax.demo import demo_adapters
from slora_jax.engine.engine import Engine
from slora_jax.errors import BadAdapter, EngineStopped, InvalidRequest, ObjectiveMissed, UnknownAdapter
from slora_jax.request import SamplingParams
from tests.helpers.fake_engine import FAILS, LATE, WAITS, FakeEngine

SHORT = {"max_tokens": 24}


@pytest.fixture
def ask(engine):
    def ask(*args, **kwargs):
        return generate(*args, **({"model": engine, "sampling": SHORT} | kwargs))

    return ask


def test_one_prompt(ask, engine):
    result = ask("hello", "pirate")
    assert result.text == str(result) == "pirate says hello. pirate sa"
    assert (result.adapter, result.prompt, result.finish_reason, result.error) == ("pirate", "hello", "length", None)
    assert result.prompt_token_ids == tuple(engine.tokenizer.encode("hello"))
    assert len(result.token_ids) == 24
    assert result.logprobs is None
    assert repr(result) == f"<pirate: {result.text!r} (24 tokens, length)>"


def test_many_prompts_in_parallel(ask, engine, capsys):
    results = ask(["a", "b", "c"], ["pirate", None, "json"], sampling=[SHORT, SamplingParams(max_tokens=9), None])
    assert [r.adapter for r in results] == ["pirate", None, "json"]
    assert [len(r.token_ids) for r in results] == [24, 9, 16]
    assert results[1].text == "base says"
    assert "3/3" in capsys.readouterr().err  # the progress bar


@pytest.mark.parametrize(("prompts", "adapters"), [("a", ["pirate", "json"]), (["a", "b"], "json"), (["a"], None)])
def test_one_stands_for_all(ask, prompts, adapters):
    results = ask(prompts, adapters, progress=False)
    assert isinstance(results, list)
    assert len(results) == max(len(prompts) if isinstance(prompts, list) else 1, 2 if adapters else 1)


def test_no_prompts(ask):
    assert ask([]) == []


def test_fields_left_out_are_as_the_generation_config_says(ask, engine):
    engine.default_sampling = {"temperature": 0.25, "max_tokens": 9}
    ask(["a"] * 4, sampling=[None, {"top_k": 3}, {"temperature": 1.0, "max_tokens": 2}, SamplingParams()])
    chosen = [generation.request.sampling for generation in engine.generations]
    assert chosen[:2] == [SamplingParams(9, 0.25), SamplingParams(9, 0.25, top_k=3)]
    assert chosen[2:] == [SamplingParams(2), SamplingParams()]


def test_progress_is_quiet_for_one_prompt(ask, capsys):
    ask("a")
    ask(["a", "b"], progress=False)
    assert capsys.readouterr().err == ""


def test_the_bar_says_that_a_compiler_is_waited_for(ask, engine, capsys):
    engine.compiling = "programs for steps of up to 64 tokens"
    threading.Timer(1.0, engine.go.set).start()
    ask([WAITS] * 2)
    shown = capsys.readouterr().err
    assert "compiling programs for steps of up to 64 tokens" in shown
    assert "compiling" not in shown.rpartition("2/2")[2], "nor after the end"


def test_kinds_of_prompts(ask, engine):
    ids = engine.tokenizer.encode("hello")
    message = {"role": "user", "content": "hello"}
    text, *same = ask(["hello", ids, tuple(ids), np.array(ids)], progress=False)
    assert all(r.token_ids == text.token_ids for r in same)
    assert ask(np.array(ids)).token_ids == text.token_ids
    assert isinstance(ask([message]).text, str)
    assert ask([message]).prompt_token_ids == ask("hello", chat=True).prompt_token_ids
    assert ask([message]).prompt_token_ids == tuple(engine.tokenizer.encode_chat([message]))
    one, two = ask([[message], [message, message]], progress=False)
    assert len(one.prompt_token_ids) < len(two.prompt_token_ids)
    assert len(ask((p for p in ["a", "b"]), progress=False)) == 2
    assert ask("").prompt_token_ids == (engine.tokenizer.bos_token_id,)


def test_completions_and_logprobs(ask):
    result = ask("hello", sampling={"n": 3, "max_tokens": 6, "logprobs": 1})
    assert [c.text for c in result.completions] == ["base s", "ase s", "se s"]
    assert result.text == "base s"
    assert [p.logprob for p in result.logprobs[1:]] == [-0.5] * 5
    assert "[2] 'se s' (4 tokens, length)" in repr(result)


def test_an_error_is_in_the_result(ask):
    result = ask(FAILS)
    assert (result.finish_reason, result.error) == ("error", "the logits are not finite")
    assert "not finite" in repr(result)


def test_a_prompt_that_cannot_meet_its_objective(ask, engine):
    result = ask(LATE, slo_ms=5, priority=2)
    assert (result.finish_reason, result.text) == ("late", "") and "objective of 5 ms" in result.error
    assert (engine.generations[0].request.slo_ms, engine.generations[0].request.priority) == (5, 2)
    with pytest.raises(ObjectiveMissed):
        list(ask(LATE, stream=True))


def test_folder_adapters(ask, engine, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(BadAdapter):
        ask("x", folder)
    config = folder / "adapter_config.json"
    config.write_text("{}")
    by_path, by_text, again = ask("x", [folder, str(folder), folder], progress=False)
    assert by_path.adapter == by_text.adapter == again.adapter
    assert by_path.adapter.startswith("mine-")
    assert by_path.adapter in engine.adapters()
    config.write_text('{"changed": true}')
    assert ask("x", folder).adapter != by_path.adapter


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        (["a", "b"], {"adapters": ["json"] * 3}, "2 prompts, 3 adapters"),
        (["a"], {"adapters": ["json"] * 3}, "1 prompts, 3 adapters"),
        ("a", {"adapters": ["json"] * 3, "sampling": [{}] * 2}, "3 adapters, 2 sampling"),
        (5, {}, "int"),
        ({"role": "user"}, {}, "dict"),
        (["a", 1], {}, "mixed"),
        (["a", []], {}, "empty"),
        ("a", {"sampling": {"temprature": 1}}, "temprature"),
        ("a", {"sampling": {"temperature": -1}}, "temperature"),
        ("a", {"sampling": 5}, "int"),
        ("a", {"adapters": 5}, "int"),
        ("a", {"stream": True, "sampling": {"n": 2}}, "n must be 1"),
        ("a", {"dtype": "float32"}, "dtype"),
        ([{"role": "robot", "content": "x"}], {}, "role"),
    ],
)
def test_bad_arguments(ask, engine, prompts, kwargs, message):
    with pytest.raises(InvalidRequest, match=message):
        ask(prompts, **kwargs)
    assert not engine.generations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "has no argument 'temperature'; write sampling={\"temperature\": 0}"),
        ({"max_new_tokens": 20, "do_sample": False}, 'write sampling={"max_tokens": 20, "temperature": 0}'),
        ({"do_sample": True}, "'do_sample'; write nothing: answers are sampled"),
        ({"sampling_params": SHORT}, "'sampling_params'; write sampling=..."),
        ({"temperature": 0, "lora_request": "json"}, "'lora_request'; write adapters="),
        ({"adapter": "json"}, "'adapter'; write adapters=..."),
        ({"tensor_parallel_size": 2}, 'write mesh={"tp": ...}'),
        ({"use_tqdm": False}, "write progress=..."),
        ({"promts": "x"}, "has no argument 'promts'; did you mean 'prompts'?"),
        ({"zzz": 1}, "generate has no argument 'zzz'"),
        ({"sampling": {"max_new_tokens": 20}}, "sampling has no field 'max_new_tokens'; it is called 'max_tokens'"),
        ({"sampling": {"do_sample": False}}, 'write "temperature": 0'),
        ({"sampling": {"temprature": 0}}, "did you mean 'temperature'?"),
        ({"sampling": {"zzz": 0}}, "it has max_tokens, temperature"),
    ],
)
def test_arguments_that_there_are_not_say_what_to_write_instead(loaded, options, message):
    with pytest.raises(InvalidRequest) as refused:
        generate("x", **options)
    assert message in str(refused.value) and refused.value.param
    assert not loaded


@pytest.mark.parametrize(
    ("prompts", "kwargs", "place"),
    [
        (["a", [], "b"], {}, "prompts[1]"),
        (["a", "b", [1] * 10**5], {}, "prompts[2]"),
        (["a", "b", [1] * 10**5], {"stream": True}, "prompts[2]"),
        ([[{"role": "user", "content": "x"}], [{"role": "robot", "content": "x"}]], {}, "prompts[1]"),
        ("a", {"adapters": [None, "json", "nobody"]}, "adapters[2]"),
        ("a", {"sampling": [SHORT, {"top_p": 7}]}, "sampling[1]"),
        (["a", FAILS], {"stream": True}, "prompts[1]"),
    ],
)
def test_what_fails_in_a_list_is_named_by_its_place(ask, engine, prompts, kwargs, place):
    with pytest.raises(slora_jax.errors.SLoRAError) as failed:
        list(ask(prompts, **kwargs))
    assert str(failed.value).startswith(f"{place}: ")
    assert all(generation.cancelled or generation.finished for generation in engine.generations)


def test_what_stands_for_all_has_no_place(ask):
    with pytest.raises(UnknownAdapter, match=r"^no adapter"):
        ask(["a", "b"], "nobody")
    with pytest.raises(InvalidRequest, match=r"^sampling has no field"):
        ask(["a", "b"], sampling={"zzz": 1})


def test_unknown_adapter(ask):
    with pytest.raises(UnknownAdapter, match="registered are: pirate, json"):
        ask("x", "nobody")


def test_stream_of_one(ask):
    stream = ask("hello", "json", stream=True)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.results.text == ask("hello", "json").text
    assert next(stream, None) is None


def test_stream_of_many(ask):
    stream = ask(["a", "b"], ["json", "pirate"], stream=True)
    texts = ["", ""]
    for index, piece in stream:
        texts[index] += piece
    assert texts == [r.text for r in stream.results] == [r.text for r in ask(["a", "b"], ["json", "pirate"])]


def test_a_dropped_stream_is_cancelled(ask, engine):
    with ask(WAITS, stream=True) as stream:
        pass
    assert engine.generations[-1].cancelled
    assert next(stream, None) is None
    assert stream.results is None
    ask(WAITS, stream=True)  # dropped at once
    assert engine.generations[-1].cancelled


def test_a_failing_stream_raises(ask, engine):
    with pytest.raises(slora_jax.errors.SLoRAError, match="not finite"):
        list(ask(FAILS, stream=True))
    stream = ask(WAITS, stream=True)
    engine.close()
    with pytest.raises(EngineStopped):
        next(stream)


def test_an_interrupt_cancels_what_was_submitted(ask, engine, monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.helpers.fake_engine.FakeGeneration.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask([WAITS] * 3, progress=False)
    assert [g.cancelled for g in engine.generations] == [True] * 3
    assert ask("hello", "pirate").text == "pirate says hello. pirate sa", "the next call works"


def test_an_engine_closed_meanwhile_raises(ask, engine):
    threading.Timer(0.1, engine.close).start()
    with pytest.raises(EngineStopped):
        ask([WAITS] * 2, progress=False)


def test_more_prompts_than_the_engine_takes_at_once(tmp_path):
    engine = FakeEngine(tmp_path, max_running=3)
    engine.start()
    results = generate([str(i) for i in range(20)], "json", model=engine, sampling=SHORT, progress=False)
    assert [r.text.split()[2] for r in results] == [f"{i}." for i in range(20)]
    engine.close()


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Engines that ``generate`` loads by itself."""
    engines = []

    def create(config):
        engine = FakeEngine(tmp_path / str(len(engines)))
        engines.append((config, engine))
        return engine

    monkeypatch.setattr(Engine, "create", create)
    monkeypatch.setattr(slora_jax.demo, "demo_model_path", lambda: tmp_path)
    yield engines
    slora_jax.shutdown()


def test_a_second_call_does_not_load_again(loaded):
    for _ in range(2):
        generate("x", model="some/model", max_model_len=100, pool={"pages": 50})
    assert len(loaded) == 1
    config = loaded[0][0]
    assert (config.model, config.max_model_len, config.pool.pages) == ("some/model", 100, 50)
    generate("x", model="some/model", max_model_len=200)
    assert len(loaded) == 2
    slora_jax.shutdown()
    assert not any(engine.is_running for _, engine in loaded)
    generate("x", model="some/model", max_model_len=200)
    assert len(loaded) == 3


def test_an_engine_that_stopped_is_replaced(loaded):
    generate("x")
    loaded[0][1].close()
    generate("x")
    assert len(loaded) == 2


def test_two_threads_load_once(loaded):
    threads = [threading.Thread(target=generate, args=("x",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1


def test_the_default_is_the_demo_model_with_its_adapters(loaded, tmp_path):
    generate("x")
    assert loaded[0][0].model == str(tmp_path)
    assert list(loaded[0][0].adapters) == list(demo_adapters())


def test_options_are_checked_before_anything_is_loaded(loaded):
    for options, message in [
        ({"max_len": 5}, "max_len"),
        ({"dtype": "int4"}, "dtype"),
        ({"pool": {"page": 1}}, "page"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            generate("x", **options)
    assert not loaded


def test_iteration_ends_with_the_stream(ask):
    assert len(list(itertools.islice(ask("x", stream=True), 2))) == 2
