"""The bounded host memory's accounting."""

import random

import pytest

from slora_jax.adapters.host_cache import HostCache


def test_the_longest_idle_leave_and_only_as_many_as_must():
    cache = HostCache(10)
    for key in "abc":
        assert cache.add(key, 3) == []
    for key in "bca":
        cache.let_go(key)
    assert cache.add("d", 4) == ["b"]
    assert cache.used == 10 and "b" not in cache and "c" in cache


def test_shortage_returns_none_and_nothing_leaves():
    cache = HostCache(10)
    cache.add("held", 6)
    cache.add("idle", 4)
    cache.let_go("idle")
    assert cache.add("large", 5) is None
    assert "idle" in cache and "large" not in cache
    cache.let_go("held")
    assert cache.add("large", 5) == ["idle", "held"]


def test_a_negative_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        HostCache(-1)


def test_random_traffic_adds_up():
    rng = random.Random(0)
    cache = HostCache(50)
    sizes, held = {}, set()
    for step in range(5000):
        key = rng.randrange(20)
        match rng.randrange(4):
            case 0 if key not in sizes:
                size = rng.randrange(1, 15)
                left = cache.add(key, size)
                assert (left is None) == (sum(sizes[k] for k in held) + size > 50), step
                if left is not None:
                    assert not held & set(left)
                    sizes = {k: s for k, s in sizes.items() if k not in left} | {key: size}
                    held.add(key)
            case 1 if key in sizes:
                cache.hold(key)
                held.add(key)
            case 2 if key in sizes:
                cache.let_go(key)
                held.discard(key)
            case 3 if rng.random() < 0.2:
                cache.remove(key)
                sizes.pop(key, None)
                held.discard(key)
        assert cache.used == sum(sizes.values()) <= 50
