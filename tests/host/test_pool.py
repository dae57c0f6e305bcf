"""Adapters' way into the device array: staged once for each buffer, and written to their pages and no others."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import PoolLayout
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.config import ModelConfig

LAYERS, WIDTH, NUM_PAGES = 2, 8, 12
MODEL = ModelConfig(64, 16, 16, LAYERS, 2, 2, WIDTH // 2)


@pytest.fixture
def pool():
    pool = UnifiedPool(PoolLayout.for_model(MODEL), NUM_PAGES, jnp.dtype(jnp.float32))
    pool.array = jnp.ones_like(pool.array)
    return pool


def make_packed(num_pages, seed=0):
    return np.random.default_rng(seed).random((LAYERS, 2, num_pages * PAGE_SIZE, WIDTH), np.float32)


def rows_of(pages):
    return (np.array(pages)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)


@pytest.mark.parametrize("pages", [(3,), (7, 2), (9, 1, 4), (11, 3, 5, 7, 2)])
def test_weights_arrive_in_their_pages_and_no_others(pool, pages):
    packed = make_packed(len(pages))
    copy = pool.start_copy(pool.stage(packed), pages)
    assert (np.asarray(pool.array) == 1).all(), "nothing is written before the copy is finished"
    copy.wait()
    assert copy.is_ready
    pool.finish_copy(copy)
    array = np.asarray(pool.array)
    np.testing.assert_array_equal(array[:, :, rows_of(pages)], packed)
    # Page 0 is the trash page: padding goes there.
    others = sorted(set(range(1, NUM_PAGES)) - set(pages))
    assert (array[:, :, rows_of(others)] == 1).all()


def test_a_buffer_is_staged_once_while_it_lives(pool):
    packed = make_packed(2)
    staged = pool.stage(packed)
    assert staged.nbytes == packed.nbytes
    assert pool.stage(packed) is staged
    assert pool.stage(packed.copy()) is not staged
    seen = weakref.ref(staged)
    del staged
    gc.collect()
    assert seen() is None, "the pool keeps no adapter in memory"
    again = pool.stage(packed)
    del packed
    gc.collect()
    assert pool.stage(make_packed(2, seed=1)) is not again


@pytest.mark.parametrize(
    "packed",
    [
        np.zeros((LAYERS, 2, PAGE_SIZE, WIDTH), np.float16),
        np.zeros((LAYERS + 1, 2, PAGE_SIZE, WIDTH), np.float32),
        np.zeros((LAYERS, 2, PAGE_SIZE + 1, WIDTH), np.float32),
        np.zeros((LAYERS, 2, 0, WIDTH), np.float32),
        np.zeros(3, np.float32),
    ],
)
def test_what_does_not_fit_the_pool_is_refused(pool, packed):
    with pytest.raises(ValueError, match="packed must be float32"):
        pool.stage(packed)


def test_the_number_of_pages_must_match(pool):
    with pytest.raises(ValueError, match="has 2 pages"):
        pool.start_copy(pool.stage(make_packed(2)), (1, 2, 3))


@pytest.mark.parametrize("num_pages", [1, 2, 3, 5])
def test_staged_bytes_are_those_of_the_array(pool, num_pages):
    assert pool.staged_bytes(num_pages) == pool.stage(make_packed(num_pages)).array.nbytes
