"""Adapters on their way to the pool while requests come, go and change their minds. Answers are the oracle's."""

import json
import shutil

import pytest

from slora_jax.adapters.peft import load_adapter
from slora_jax.errors import BadAdapter, InvalidRequest
from slora_jax.scheduler import traffic
from slora_jax.scheduler.capacity import Capacity
from tests.helpers.engine_cases import greedy, run

NUM_TOKENS = 12
PAGES = 19
"""Of a pool for three adapters and one sequence; the same in all tests, so that steps are compiled once."""


class SlowCopy:
    """A copy that is not seen to arrive before it was asked ``polls`` times; each step asks the first one once."""

    def __init__(self, copy, polls: int):
        self._copy = copy
        self._polls = polls
        self.array, self.pages = copy.array, copy.pages

    @property
    def is_ready(self) -> bool:
        self._polls -= 1
        return self._polls < 0 and self._copy.is_ready

    def wait(self) -> None:
        self._polls = 0
        self._copy.wait()


def slow_engine(case, polls: int, **options):
    engine = case.engine(pages=PAGES, **options)
    start_copy = engine.device.pool.start_copy
    engine.device.pool.start_copy = lambda staged, pages: SlowCopy(start_copy(staged, pages), polls)
    return engine


class Asked:
    """The oracle's requests for each adapter, asked under any name and checked."""

    def __init__(self, case, engine):
        self._requests = case.requests
        self._engine = engine
        self._asked = []

    def submit(self, adapter: str | None, name: str | None = None, place: int = 0):
        request = [r for r in self._requests if r["adapter"] == adapter][place]
        generation = self._engine.submit(greedy(request["prompt"], name or adapter, NUM_TOKENS))
        self._asked.append((generation, request))
        return generation

    def check(self):
        """Runs until idle and compares all that was not cancelled."""
        results = run(self._engine, *(generation for generation, _ in self._asked))
        for (_, request), result in zip(self._asked, results, strict=True):
            (completion,) = result.completions
            if completion.finish_reason != "abort":
                assert list(completion.token_ids) == request["tokens"][:NUM_TOKENS], request["id"]
        self._asked.clear()
        assert self._engine.stats()["pages_used"] == 0 and not self._engine.device.is_copying
        return [result.completions[0].finish_reason for result in results]


def step_until_copying(engine, polls: int = 600) -> None:
    for _ in range(polls):
        engine.step()
        engine.check_integrity()
        if engine.device.is_copying:
            return
        engine.wait_for_work(timeout=0.1)
    raise AssertionError("no copy was started")


@pytest.mark.parametrize("others", [True, False])
def test_cancelling_while_the_adapter_is_copied(tiny_case, others):
    engine = slow_engine(tiny_case, polls=3)
    asked = Asked(tiny_case, engine)
    if others:
        asked.submit(None)
    dropped = asked.submit("qv-r8")
    step_until_copying(engine)
    dropped.cancel()
    assert asked.check() == ["length", "abort"][not others :]
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0
    asked.submit("qv-r8")
    asked.check()
    assert engine.stats()["adapter_loads"] == 1, "the copy that nobody waited for is used later"


def test_a_name_gets_other_weights_while_its_copies_are_under_way(tiny_case, tmp_path):
    engine = slow_engine(tiny_case, polls=4)
    asked = Asked(tiny_case, engine)
    folder = tmp_path / "mine"
    for adapter in ("all7-r1", "mlp-r3", "all7-r1"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_case.adapters / adapter, folder)
        engine.register_adapter("mine", str(folder))
        asked.submit(adapter, "mine")
        # Of equal weights the second copy is none: the pages are there, or on their way.
        if engine.stats()["adapter_loads"] < 2:
            step_until_copying(engine)
        engine.unregister_adapter("mine")
    assert engine.device.is_copying
    assert asked.check() == ["length"] * 3
    assert engine.stats()["adapter_loads"] == 2
    assert "mine" not in engine.adapters()


def test_an_adapter_larger_than_all_copies_may_be_is_copied_alone(tiny_case, monkeypatch):
    monkeypatch.setattr(traffic, "COPY_SHARE", 9)
    engine = slow_engine(tiny_case, polls=2)
    limit = engine.stats()["pages_total"] // 9
    assert {info.num_pages for info in engine.adapters().values()} == {limit, limit + 1}
    asked = Asked(tiny_case, engine)
    start_copy = engine.device.pool.start_copy
    in_flight = []

    def counted(staged, pages):
        in_flight.append(engine.device.is_copying)
        return start_copy(staged, pages)

    engine.device.pool.start_copy = counted
    for adapter in ("mlp-r3", "qv-r8", None, "all7-r1", "qv-r8"):
        asked.submit(adapter)
    asked.check()
    assert len(in_flight) >= 3 and not any(in_flight)


@pytest.mark.parametrize(("polls", "prefix_cache"), [(0, True), (3, False)])
def test_fifty_adapters_take_turns_in_a_pool_of_three(tiny_case, polls, prefix_cache):
    loaded = {}
    source = tiny_case.engine()
    for adapter in source.adapters():
        header = source.parts.store.get(adapter).header
        (scale,) = set(header.scales) - {0.0}
        loaded[adapter] = header.ranks, load_adapter(header, source.dtype).packed, scale
    engine = slow_engine(tiny_case, polls, scheduler={"prefix_cache": prefix_cache})
    names = [(f"adapter-{i}", adapter) for i, adapter in zip(range(50), 17 * list(loaded), strict=False)]
    for name, adapter in names:
        engine.register_loaded_adapter(name, *loaded[adapter])
    asked = Asked(tiny_case, engine)
    for _ in range(2):
        for i, (name, adapter) in enumerate(names):
            generation = asked.submit(adapter, name)
            if i % 7 == 3:
                generation.cancel()
            elif i % 5 == 3:
                engine.step()
                generation.cancel()
        asked.check()
    stats = engine.stats()
    assert stats["adapter_loads"] > 50 and stats["evictions"] > 50


def test_six_adapters_in_use_and_host_memory_for_two(tiny_case, tmp_path):
    for i in range(6):
        folder = shutil.copytree(tiny_case.adapters / ("qv-r8", "mlp-r3")[i % 2], tmp_path / f"a{i}")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8 + i}))
    roomy, engine = (slow_engine(tiny_case, 1, adapter_dirs=[str(tmp_path)], host_adapter_gigabytes=gigabytes)
                     for gigabytes in (1, 2**-30 * _two_adapters(tiny_case)))  # fmt: skip
    prompt = tiny_case.requests[0]["prompt"]
    names = [f"a{i % 6}" for i in range(18)]
    answers = []
    for one in (roomy, engine):
        outputs = run(one, *(one.submit(greedy(prompt, name, NUM_TOKENS)) for name in names))
        answers.append([output.completions[0].token_ids for output in outputs])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
    loads = engine.stats()["host_adapter_loads"]
    assert roomy.stats()["host_adapter_loads"] == 6
    # Each byte travels once for each time that the pool lacks it.
    assert 6 <= loads <= engine.stats()["adapter_loads"]
    assert engine.stats()["host_adapter_bytes"] <= _two_adapters(tiny_case)
    assert not any(engine.whereabouts(name).is_held for name in engine.adapters())
    # Neither in host memory nor in the pool: it must be read again.
    lost = next(name for name in engine.adapters() if engine.whereabouts(name) == ("registered", False, "absent"))
    shutil.rmtree(tmp_path / lost)
    results = run(engine, *(engine.submit(greedy(prompt, name, NUM_TOKENS)) for name in names[:6]))
    for name, result in zip(names, results, strict=False):
        (completion,) = result.completions
        assert (completion.finish_reason == "error") == (name == lost)
        assert name != lost or "no such folder" in completion.error


def test_a_pinned_adapter_is_there_before_its_first_request(tiny_case):
    engine = slow_engine(tiny_case, 1, pinned=["qv-r8"])
    run(engine)
    for _ in range(20):
        engine.wait_for_work(0.1)
        run(engine)
        if engine.stats()["adapter_loads"]:
            break
    assert engine.stats()["pages_used"] == engine.adapters()["qv-r8"].num_pages
    total, pages = engine.stats()["pages_total"], engine.adapters()["mlp-r3"].num_pages
    left = total - engine.adapters()["qv-r8"].num_pages
    assert engine.capacity("qv-r8", 32) == Capacity(min(left // 2, 16), 2, 0, left, 16)
    assert engine.capacity("mlp-r3", 32) == Capacity(min((left - pages) // 2, 16), 2, pages, left, 16)
    with pytest.raises(InvalidRequest, match="must have 2 to"):
        engine.capacity(None, 10**6)
    half = engine.stats()["pages_total"] // 2
    for i in range(half):
        pinned = sum(info.num_pages for info in engine.adapters().values() if info.pinned)
        if pinned + engine.adapters()["mlp-r3"].num_pages > half:
            with pytest.raises(BadAdapter, match="cannot be pinned"):
                engine.register_adapter(f"more-{i}", str(tiny_case.adapters / "mlp-r3"), pinned=True)
            break
        engine.register_adapter(f"more-{i}", str(tiny_case.adapters / "mlp-r3"), pinned=True)
    assert i > 0 and f"more-{i}" not in engine.adapters()
    asked = next(r for r in tiny_case.requests if r["adapter"] == "qv-r8")
    (result,) = run(engine, engine.submit(greedy(asked["prompt"], "qv-r8", NUM_TOKENS)))
    assert list(result.completions[0].token_ids) == asked["tokens"][:NUM_TOKENS]


@pytest.mark.parametrize("how", ["unload", "replace"])
def test_an_unloaded_adapter_takes_neither_pages_nor_host_memory(tiny_case, tmp_path, how):
    folder = shutil.copytree(tiny_case.adapters / "all7-r1", tmp_path / "mine")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    engine = slow_engine(tiny_case, polls=1)
    for name in ("idle", "used"):
        engine.register_adapter(name, str(folder))
        prompt = tiny_case.requests[0]["prompt"]
        first = engine.submit(greedy(prompt, name, NUM_TOKENS))
        if name == "idle":
            run(engine, first)
        assert engine.observe().pool.count()["adapters"] > 0 or name == "used"
        if how == "unload":
            engine.unregister_adapter(name)
        else:
            engine.register_adapter(name, str(tiny_case.adapters / "qv-r8"))
        run(engine, first)
        del first
        assert engine.observe().pool.count()["adapters"] == 0
        assert engine.stats()["host_adapter_bytes"] == 0
        assert engine.stats()["pages_used"] == 0
    engine.check_integrity()


def _two_adapters(case) -> int:
    engine = case.engine(pages=PAGES)
    return 2 * engine.device.pool.staged_bytes(max(info.num_pages for info in engine.adapters().values()))
