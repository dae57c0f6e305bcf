"""The page allocator: ownership, eviction order, and what misuse does."""

import random

import pytest

from slora_jax.errors import PoolMisuse
from slora_jax.memory.pages import TRASH_PAGE, PageAllocator
from tests.helpers.memory import num_reachable


def test_all_pages_but_the_trash_page_can_be_handed_out_once():
    allocator = PageAllocator(9)
    pages = allocator.allocate(8)
    assert sorted(pages) == list(range(1, 9))
    assert TRASH_PAGE not in pages
    assert allocator.allocate(1) is None
    allocator.check_integrity()


def test_shortage_returns_none_and_evicts_nothing():
    allocator = PageAllocator(5)
    allocator.publish("block", allocator.allocate(2))
    allocator.release_block("block")
    assert allocator.allocate(5) is None
    assert allocator.lookup("block") is not None
    assert allocator.num_evictions == 0


def test_cached_blocks_are_evicted_coldest_first_whatever_they_hold():
    allocator = PageAllocator(7)
    for key, count in (("kv page", 1), (("adapter", "a"), 3), ("kv page 2", 1)):
        allocator.publish(key, allocator.allocate(count))
        allocator.release_block(key)
    allocator.acquire("kv page")
    allocator.release_block("kv page")
    assert len(allocator.allocate(2)) == 2
    assert allocator.lookup(("adapter", "a")) is None, "the block unused for longest goes first"
    assert allocator.lookup("kv page") and allocator.lookup("kv page 2")
    allocator.check_integrity()


def test_what_is_cheap_to_bring_back_goes_first():
    allocator = PageAllocator(8)
    for key, count, cost in (("dear", 1, 5.0), ("cheap", 3, 1.0), ("cheap, used later", 3, 1.0)):
        allocator.publish(key, allocator.allocate(count))
        allocator.release_block(key, cost)
    allocator.allocate(1)
    assert [allocator.lookup(k) is None for k in ("dear", "cheap", "cheap, used later")] == [False, True, False]
    allocator.allocate(4)
    assert allocator.lookup("dear"), "whose pages cost five times as much"
    allocator.check_integrity()


def test_what_is_dear_goes_when_nobody_wanted_it_for_long():
    allocator = PageAllocator(4)
    allocator.publish("dear", allocator.allocate(1))
    allocator.release_block("dear", 5.0)
    passed = 0
    while allocator.lookup("dear"):
        passed += 1
        allocator.publish(passed, allocator.allocate(1))
        allocator.release_block(passed, 1.0)
    # The clock goes up by one each time that the two other pages were renewed.
    assert passed == pytest.approx(2 * 5, abs=2)
    allocator.check_integrity()


def test_a_block_released_again_and_again_leaves_little_garbage():
    allocator = PageAllocator(10)
    for key in range(5):
        allocator.publish(key, allocator.allocate(1))
        allocator.release_block(key, 1.0)
    for i in range(10_000):
        allocator.acquire(i % 5)
        allocator.release_block(i % 5)
    assert num_reachable(allocator) < 500
    allocator.allocate(5)
    assert allocator.allocate(1) and allocator.lookup(0) is None, "the one unused for longest"


def test_a_block_that_nobody_will_want_is_dropped_at_once():
    allocator = PageAllocator(9)
    for key in ("a", "b"):
        assert allocator.publish(key, allocator.allocate(3))
    with pytest.raises(PoolMisuse, match="not cached"):
        allocator.drop("a")
    for key in ("a", "b"):
        allocator.release_block(key)
    allocator.drop("a")
    assert (allocator.num_free, allocator.num_cached, allocator.num_evictions) == (5, 3, 0)
    allocator.check_integrity()
    with pytest.raises(PoolMisuse, match="not cached"):
        allocator.drop("a")
    assert allocator.allocate(8) and allocator.num_evictions == 1
    allocator.check_integrity()


def test_owned_blocks_are_never_evicted():
    allocator = PageAllocator(4)
    allocator.publish("shared", allocator.allocate(2))
    allocator.acquire("shared")
    allocator.release_block("shared")
    assert allocator.allocate(2) is None
    allocator.release_block("shared")
    assert len(allocator.allocate(3)) == 3


def test_a_key_is_published_once():
    allocator = PageAllocator(4)
    first, second = allocator.allocate(1), allocator.allocate(1)
    assert allocator.publish("key", first)
    assert not allocator.publish("key", second)
    allocator.release(second)
    allocator.check_integrity()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda a, pages: a.release([*pages, pages[0]]),
        lambda a, pages: a.release([7]),
        lambda a, pages: a.release([TRASH_PAGE]),
        lambda a, pages: a.publish("k", [7]),
        lambda a, pages: a.publish("k", []),
        lambda a, pages: a.release_block("unknown"),
        lambda a, pages: (a.publish("k", pages), a.release_block("k"), a.release_block("k")),
        lambda a, pages: (a.publish("k", pages), a.release(pages)),
        lambda a, pages: a.allocate(-1),
    ],
)
def test_misuse_raises(misuse):
    allocator = PageAllocator(8)
    pages = allocator.allocate(2)
    with pytest.raises(PoolMisuse):
        misuse(allocator, pages)


def test_random_traffic_keeps_the_invariants():
    rng = random.Random(0)
    allocator = PageAllocator(40)
    private: list[list[int]] = []
    owned: list[str] = []
    names = [f"block {i}" for i in range(12)]
    for _ in range(5000):
        match rng.randrange(5):
            case 0:
                count = rng.randrange(1, 9)
                room = allocator.num_available
                pages = allocator.allocate(count)
                assert (pages is None) == (count > room)
                private += [pages] if pages else []
            case 1 if private:
                allocator.release(private.pop(rng.randrange(len(private))))
            case 2 if private:
                name, pages = rng.choice(names), private[-1]
                if allocator.publish(name, pages):
                    private.pop()
                    owned.append(name)
            case 3:
                name = rng.choice(names)
                if allocator.acquire(name) is not None:
                    owned.append(name)
            case 4 if owned:
                allocator.release_block(owned.pop(rng.randrange(len(owned))), rng.choice([None, 0.5, 2.0]))
        allocator.check_integrity()
        held = {page for pages in private for page in pages}
        assert allocator.num_used >= len(held)
