"""Padding to shapes, compiling them ahead, and what the compiled step does with the pool."""

import dataclasses
from array import array

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.config import PAGE_SIZE
from slora_jax.engine.batch import AdapterRoom, BatchShape, Buckets, HostBatch, build_batch
from slora_jax.engine.forward import ForwardInParts, Part, WholeForward
from slora_jax.engine.transfer import Transfer
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import Llama, abstract_params
from slora_jax.model.modules import MODULES
from slora_jax.model.quantization import ChannelFp8
from slora_jax.request import SamplingParams
from slora_jax.scheduler.sequence import ScheduledSequence, Sequence
from tests.helpers.engine_cases import FAST_TO_COMPILE, FIXTURES, greedy, make_engine, run

FINE = Buckets.fine(1100, 200)
# Pages of the longest sequence allowed: more than narrow tables have.
LONG = 8192
COARSE = Buckets.coarse(512, 200)


def test_sizes():
    decode = (2, 8, 16, 32, 64, 96, 128, 160, 192, 224)
    tokens = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1100)
    wide = Buckets((16, 128, 224), (256, 1024, 1100), (224,), (256 * 200,))
    assert Buckets(decode, tokens, (224,), (256 * 200,), narrow_width=512, wide=wide) == FINE
    wide = Buckets((16,), (64,), (16,), (256 * 16,))
    assert Buckets.fine(16, 16) == Buckets((2, 8, 16), (64,), (16,), (256 * 16,), narrow_width=512, wide=wide)
    assert Buckets.fine(2048, 512).tokens[-4:] == (768, 1024, 1536, 2048)
    assert Buckets.fine(1100, 200, 16) == dataclasses.replace(FINE, decode=decode[2:])
    ranks = (32, 128, 512, 2048, 8192, 32768, 131072)
    assert Buckets((4, 16, 64, 256), (16, 64, 256, 512), (16, 64, 256), ranks, few_ahead=True) == COARSE
    assert Buckets.coarse(16, 3) == Buckets((4,), (16,), (16,), ranks, few_ahead=True)


@pytest.mark.parametrize(
    ("buckets", "table_width", "pages"),
    [(FINE, 7, [1, 7]), (FINE, LONG, [1, 512, 513, LONG]), (COARSE, 7, [1, 7]), (COARSE, LONG, [1, LONG])],
)
def test_all_shapes_are_all_shapes(buckets, table_width, pages):
    max_tokens, seen = buckets.tokens[-1], set()
    for num_pages in pages:
        for num_sequences in range(1, 201):
            for num_tokens in range(num_sequences, max_tokens + 1):
                shape = buckets.shape(num_tokens, num_sequences, num_pages, table_width)
                assert shape.tokens >= num_tokens and shape.sequences >= num_sequences
                assert shape.table_width >= num_pages
                seen.add(shape)
    assert set(buckets.all_shapes(table_width, AdapterRoom())) == seen
    room = AdapterRoom((0, 2), 8, 32)
    for rank in buckets.total_ranks:
        for p in pages:
            seen |= {buckets.shape(n, m, p, table_width, rank, room) for n, m in ((1, 1), (200, 200), (201, 2))}
    both = buckets.all_shapes(table_width, room)
    assert seen <= set(both) and len(both) == len(set(both))
    assert {s.total_rank for s in both} == {0, *buckets.total_ranks}


@st.composite
def _steps(draw):
    """Limits of tokens and sequences, the pages of the longest sequence, and those three of a step within them."""
    max_sequences = draw(st.integers(1, 1100))
    max_tokens = draw(st.integers(max(16, max_sequences), 20_000))
    table_width = draw(st.sampled_from([1, 256, 511, 512, 513, LONG]) | st.integers(1, 2 * LONG))
    num_sequences = draw(st.integers(1, max_sequences))
    num_tokens = draw(st.just(num_sequences) | st.integers(num_sequences, max_tokens))
    return max_tokens, max_sequences, table_width, num_tokens, num_sequences, draw(st.integers(1, table_width))


@given(_steps(), st.sampled_from([Buckets.fine, Buckets.coarse]), st.integers(0, 256))
def test_every_step_has_one_of_all_shapes(step, make, rank):
    max_tokens, max_sequences, table_width, num_tokens, num_sequences, num_pages = step
    buckets, room = make(max_tokens, max_sequences), AdapterRoom((0, 2), 8, 32)
    shape = buckets.shape(num_tokens, num_sequences, num_pages, table_width, rank, room)
    assert shape in buckets.all_shapes(table_width, room)
    assert (shape.tokens >= num_tokens) and (shape.sequences >= num_sequences) and (shape.total_rank >= rank)
    narrow = make == Buckets.fine and num_pages <= 512 < table_width
    assert shape.table_width == (512 if narrow else table_width)
    # Programs that read what a step leaves are made for the largest of any.
    assert shape.tokens <= buckets.max_tokens and shape.sequences <= buckets.max_sequences


def test_few_shapes_are_compiled_for_long_sequences():
    buckets, room = Buckets.fine(8192, 512), AdapterRoom((0,), 64, 16)
    shapes = buckets.all_shapes(LONG, room)
    wide = [shape for shape in shapes if shape.table_width == LONG]
    narrow = [shape for shape in shapes if shape not in wide]
    assert {s.table_width for s in narrow} == {512}
    assert len(narrow) == len(buckets.all_shapes(512, room)), "as many as for a model of few tokens"
    assert len(wide) <= len(narrow) / 5
    assert {s.sequences for s in wide} <= {s.sequences for s in narrow}, "they need no samplers of their own"
    assert {s.max_rank for s in wide} == {0, 64}, "with adapters and without"


def test_what_a_step_of_a_long_model_sends_is_small_unless_a_sequence_is_long():
    # Llama-3.1-8B with 512 sequences: 131,072 tokens are 8,192 pages.
    buckets, room = Buckets.fine(8192, 512), AdapterRoom(tuple(range(len(MODULES))), 64, 64)
    for rank in (0, 512 * 64):
        for num_tokens in (512, 8192):
            shape = buckets.shape(num_tokens, 512, 8192 // PAGE_SIZE, LONG, rank, room)
            assert 4 * shape.packed_size < 2_000_000
            shape = buckets.shape(num_tokens, 512, 8192 // PAGE_SIZE + 1, LONG, rank, room)
            assert 4 * shape.packed_size > 16_000_000, "the size was that of all steps once"


def _entry(number: int, start: int, count: int, num_pages: int) -> ScheduledSequence:
    pages = array("i", range(1000 * number, 1000 * number + num_pages))
    sequence = Sequence(number, [number] * (start + count), start + count, 1, SamplingParams(), 0, pages=pages)
    return ScheduledSequence(sequence, start, count, True, 0)


@pytest.mark.parametrize("page_tokens", [16, 32])
def test_a_page_table_is_as_wide_as_its_sequences(page_tokens):
    narrow, few = 512 * page_tokens, [_entry(number, 20, 1, 2) for number in (1, 2)]
    for context, width in ((1, 512), (narrow - 1, 512), (narrow, 512), (narrow + 1, LONG), (LONG * page_tokens, LONG)):
        long = _entry(3, context - 1, 1, -(-context // page_tokens))
        batch = build_batch([few[0], long, few[1]], {}, {}, FINE, LONG, page_tokens)
        assert batch.shape == BatchShape(*((8, 8) if width == 512 else (16, 16)), width, 0, 0, (), True, 0)
        table = _field(batch, "page_table")
        for row, entry in zip(table, batch.entries, strict=False):
            pages = entry.sequence.pages
            assert row[: len(pages)].tolist() == pages.tolist() and not row[len(pages) :].any()
        assert not table[3:].any(), "padding has no pages"


def test_pages_for_later_pieces_of_a_prompt_do_not_widen_the_table():
    # A prompt of 600 pages, taken when it was admitted, of which this step computes the last tokens that fit.
    for start, width in ((512 * 16 - 100, 512), (512 * 16 - 99, LONG)):
        long, short = _entry(1, start, 100, 600), _entry(2, 5, 1, 1)
        batch = build_batch([long, short], {}, {}, FINE, LONG, 16)
        assert (batch.shape.tokens, batch.shape.table_width) == (128 if width == 512 else 256, width)
        table = _field(batch, "page_table")
        assert table[0, : min(600, width)].tolist() == long.sequence.pages[:width].tolist()
        assert table[1].tolist() == [2000] + [0] * (width - 1)


def _field(batch: HostBatch, name: str) -> np.ndarray:
    packed, fields = batch.shape.zeros()
    packed[:] = batch.packed
    return fields[name]


@pytest.mark.parametrize(
    ("pages", "options"), [(30, {}), pytest.param(16, {"kv_cache_dtype": "fp8"}, marks=pytest.mark.slow)]
)
def test_tokens_do_not_depend_on_the_width_of_page_tables(pages, options):
    """Some sequences grow beyond narrow tables, and are preempted, while others stay short."""
    case = FIXTURES / "llama3_gqa"
    # Tokens of the prompt and of the answer; a page holds 16, or 64 in float8.
    lengths = ((3, 10), (20, 100), (60, 150), (150, 40), (5, 20), (100, 120))
    results = []
    for narrow_width in (None, 2):
        engine = make_engine(case / "model", case / "adapters", pages, narrow_width=narrow_width, **options)
        names = [None, *engine.adapters()]
        generations = [
            engine.submit(greedy(range(1, 1 + prompt), names[i % len(names)], limit))
            for i, (prompt, limit) in enumerate(lengths)
        ]
        results.append([result.completions[0].token_ids for result in run(engine, *generations)])
        widths = {part.shape.table_width for part in engine.device.runner.programs if isinstance(part, Part)}
        assert engine.stats()["preemptions"] > 0
        assert len(widths) == (1 if narrow_width is None else 2) and (2 in widths) == (narrow_width == 2)
    assert results[0] == results[1]


def test_few_shapes_are_compiled_ahead_on_a_cpu():
    room = AdapterRoom((0,), 64, 16)
    ahead = COARSE.shapes_ahead(7, room, max_rank=33)
    sizes = [(4, 4), (16, 16), (16, 16), (64, 16), (256, 16)]
    assert [(s.tokens, s.sequences) for s in ahead] == 2 * sizes
    assert [s.total_rank for s in ahead] == 5 * [0] + 5 * [128]
    assert COARSE.shapes_ahead(7, AdapterRoom(), max_rank=1) == ahead[:5]
    assert FINE.shapes_ahead(7, room, 33) == FINE.all_shapes(7, room)
    every = Buckets.coarse(512, 200, few_ahead=False)
    assert every.shapes_ahead(7, room, 33) == COARSE.all_shapes(7, room)


def test_room_for_adapters_only_grows():
    room = AdapterRoom(max_rank=8)
    assert FINE.shape(20, 20, 1, 7, room=room).adapter_pages == 0
    shape = FINE.shape(20, 20, 1, 7, 8, room.including((3, 1), 5, 16))
    assert (shape.active, shape.max_rank, shape.adapter_pages) == ((1, 3), 8, 16 * 32)
    room = room.including((3, 1), 33, 17).including((0,), 1, 1)
    shape = FINE.shape(20, 20, 1, 7, 8, room)
    assert (shape.active, shape.max_rank, shape.adapter_pages) == ((0, 1, 3), 64, 32 * 32)


def test_an_adapter_of_many_pages_is_foreseen():
    limits = {"max_batch_tokens": 16, "max_sequences": 4}
    engine = make_engine(FIXTURES / "llama3_gqa" / "model", scheduler=limits, max_model_len=64)
    packed = synthetic_weights(64, MODULES, engine.pool_layout, engine.dtype, seed=1)
    engine.register_loaded_adapter("large", dict.fromkeys(MODULES, 64), packed)
    assert engine.adapters()["large"].num_pages > 16
    engine.warm_up()
    compiled = set(engine.device.runner.programs)
    run(engine, engine.submit(greedy((1, 2, 3), "large", 4)))
    assert set(engine.device.runner.programs) == compiled


def test_a_warm_engine_compiles_no_more():
    case = FIXTURES / "llama3_gqa"
    limits = {"max_batch_tokens": 16, "max_sequences": 4}
    engine = make_engine(case / "model", warm_up=True, scheduler=limits, max_model_len=64, few_shapes=False)
    engine.warm_up()
    compiled = set(engine.device.runner.programs)
    # (4, 4) decoding and (16, 16), of three programs each; for as many sequences each, two samplers.
    assert len(compiled) == 10
    random = {"temperature": 1.0, "seed": 3}
    for changes in ({}, random):
        run(engine, *(engine.submit(greedy((1, 2, 3), None, 4, **changes)) for _ in range(3)))
    assert set(engine.device.runner.programs) == compiled
    run(engine, engine.submit(greedy((1, 2, 3), None, 4, temperature=1.0, seed=3, top_k=2)))
    assert len(engine.device.runner.programs) == 12, "what was not foreseen is compiled when needed"


def test_short_requests_wait_for_no_compiler(caplog):
    """The README's five questions, in small: one after the other, then all at once, greedy and not."""
    case = FIXTURES / "llama3_gqa"
    limits = {"max_batch_tokens": 512, "max_sequences": 256}
    engine = make_engine(case / "model", case / "adapters", scheduler=limits, max_model_len=256, few_shapes=False)
    engine.warm_up()
    compiled = set(engine.device.runner.programs)
    prompt = range(1, 40)
    adapters = [None, *engine.adapters()]
    caplog.clear()
    for changes in ({}, {"temperature": 1.0, "seed": 3}):
        for adapter in adapters:
            for length in (3, 39):
                run(engine, engine.submit(greedy(prompt[:length], adapter, 20, **changes)))
        run(engine, *(engine.submit(greedy(prompt[1:], adapter, 20, **changes)) for adapter in adapters))
    assert set(engine.device.runner.programs) == compiled
    assert "compiling" not in caplog.text


@pytest.mark.parametrize("layout", [None, ChannelFp8()])
def test_a_forward_in_parts_is_the_whole_forward(layout):
    config = ModelConfig(64, 32, 48, 6, 4, 2, 8, weight_layout=layout)
    model = Llama(config, jnp.dtype(jnp.float32), "reference")
    key = jax.random.key(0)
    leaves, tree = jax.tree.flatten(abstract_params(config, jnp.float32))
    keys = jax.random.split(key, len(leaves))
    params = tree.unflatten(
        [(0.1 * jax.random.normal(k, x.shape)).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
    shape = BatchShape(8, 4, 3, 0, 0, (), False, 0)
    packed, arrays = shape.zeros()
    arrays["token_ids"][:5] = [1, 2, 3, 4, 5]
    arrays["query_start"][1:] = [3, 5, 5, 5]
    arrays["context_len"][:2] = [3, 2]
    arrays["page_table"][:2, 0] = [1, 2]
    tokens = jnp.zeros(4, jnp.int32)
    results = []
    for forward in (WholeForward(model, None, Transfer(None)), ForwardInParts(model, None)):
        pool = jnp.zeros((6, 2, 16 * 3, config.kv_size))
        hidden = jnp.full((20, config.hidden_size), 7.0)
        programs = {k: forward.lower(k, params, tokens, pool, hidden).compile() for k in forward.keys(shape)}
        results.append(forward.start(programs.get, shape, params, packed, tokens, pool, hidden))
        assert pool.is_deleted() and hidden.is_deleted()
    (hidden, pool), (again, same_pool) = results
    np.testing.assert_allclose(again[:5], hidden[:5], rtol=1e-5, atol=1e-6)
    assert (hidden[8:] == 7).all(), "only the step's tokens are written"
    # Page 0 takes what padding writes.
    np.testing.assert_allclose(same_pool[:, :, 16:], pool[:, :, 16:], rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(hidden[:5])) > 0.1


def test_a_second_engine_traces_nothing(tmp_path, monkeypatch):
    case = FIXTURES / "llama3_gqa"
    monkeypatch.setattr("slora_jax.engine.build.program_folder", lambda config: tmp_path)

    def tokens():
        engine = make_engine(case / "model", case / "adapters", warm_up=True)
        engine.warm_up()
        adapters = [None, *engine.adapters()]
        results = run(engine, *(engine.submit(greedy((1, 2, 3), adapter, 6)) for adapter in adapters))
        return [result.completions[0].token_ids for result in results]

    first = tokens()
    monkeypatch.setattr(Llama, "apply", lambda *args, **kwargs: pytest.fail("the model was traced"))
    assert tokens() == first


def test_warming_up_can_be_switched_off():
    engine = make_engine(FIXTURES / "llama3_gqa" / "model", warm_up=False)
    engine.warm_up()
    assert not len(engine.device.runner.programs)


@pytest.mark.parametrize("total_rank", [0, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_never_copies_the_pool(dtype, total_rank):
    config = ModelConfig(64, 32, 48, 3, 4, 2, 8)
    shape = BatchShape(8, 4, 3, total_rank, total_rank, (0, 1) if total_rank else (), False, total_rank)
    model = Llama(config, jnp.dtype(dtype), "reference")
    pool = jax.ShapeDtypeStruct((3, 2, 16 * 4096, config.kv_size), dtype)

    def step(params, packed, pool):
        return model.apply({"params": params}, shape.unpack(packed, jnp.zeros(4, jnp.int32)), pool)

    packed = jax.ShapeDtypeStruct((shape.packed_size,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=2).lower(abstract_params(config, dtype), packed, pool)
    assert lowered.as_text().count("call @_apply_block") == 3, "layers are calls of one function"
    compiled = lowered.compile(FAST_TO_COMPILE)
    text = compiled.as_text()
    dims = f"[{','.join(map(str, pool.shape))}]"
    copies = [line for line in text.splitlines() if dims in line.partition("=")[2][:60] and " copy(" in line]
    assert not copies
    memory, nbytes = compiled.memory_analysis(), int(np.prod(pool.shape)) * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == nbytes
    assert memory.temp_size_in_bytes < nbytes / 4


def test_programs_of_steps_with_other_bounds_are_not_taken_from_disk(tmp_path, monkeypatch):
    case = FIXTURES / "llama3_gqa"
    monkeypatch.setattr("slora_jax.engine.build.program_folder", lambda config: tmp_path)

    def tokens(most: int):
        engine = make_engine(case / "model", scheduler={"max_batch_tokens": most, "max_sequences": 4})
        return run(engine, engine.submit(greedy((1, 2, 3), None, 6)))[0].completions[0].token_ids

    assert tokens(64) == tokens(256)
