"""The rules by which a fleet chooses who answers, as pure functions."""

from collections import Counter

import pytest

from slora_jax.fleet.routing import RULES, AffinityWithSpill, create_routing

REPLICAS = ("a", "b", "c", "d")
ADAPTERS = [f"adapter-{i}" for i in range(400)]
IDLE = dict.fromkeys(REPLICAS, 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_every_rule_orders_all_replicas(rule, adapter):
    order = create_routing(rule, spill_at=4, seed=0).order(adapter, {"a": 3, "b": 0, "c": 9, "d": 1})
    assert sorted(order) == sorted(REPLICAS)


@pytest.mark.parametrize("rule", ["affinity", "affinity_with_spill"])
def test_an_adapter_has_one_home_wherever_it_is_asked(rule):
    one, other = create_routing(rule, 4, seed=0), create_routing(rule, 4, seed=1)
    backwards = dict(reversed(IDLE.items()))
    homes = [one.order(adapter, IDLE)[0] for adapter in ADAPTERS]
    assert homes == [other.order(adapter, backwards)[0] for adapter in ADAPTERS]
    # 100 each on average; five standard deviations of a fair draw are 43.
    assert all(57 < count < 143 for count in Counter(homes).values())


def test_a_replica_that_goes_moves_its_own_adapters_only():
    routing = create_routing("affinity", 4)
    left = {"a": 0, "b": 0, "d": 0}
    for adapter in ADAPTERS:
        before, after = routing.order(adapter, IDLE)[0], routing.order(adapter, left)[0]
        assert before == after or before == "c"


def test_the_base_model_goes_where_least_is_to_do():
    for rule in ("affinity", "affinity_with_spill", "least_queue"):
        assert create_routing(rule, 4).order(None, {"a": 3, "b": 1, "c": 0, "d": 2}) == ["c", "b", "d", "a"]


def test_a_hot_adapter_spills_to_its_next_homes_and_others_stay():
    routing = AffinityWithSpill(spill_at=4)
    load = dict(IDLE)
    homes = routing.order("hot", IDLE)
    went = Counter()
    for _ in range(40):
        went[first := routing.order("hot", load)[0]] += 1
        load[first] += 1
    # Nobody has more than 1.25 times the mean of 10, and the order of the homes is kept.
    assert max(went.values()) <= 13 and [went[home] for home in homes] == sorted(went.values(), reverse=True)


def test_an_idle_fleet_does_not_spill():
    routing = AffinityWithSpill(spill_at=4)
    home, second = routing.order("pirate", IDLE)[:2]
    assert routing.order("pirate", IDLE | {home: 3})[0] == home
    assert routing.order("pirate", IDLE | {home: 4})[0] == second


def test_where_all_are_equally_busy_the_home_is_not():
    routing = AffinityWithSpill(spill_at=4)
    busy = dict.fromkeys(REPLICAS, 100)
    assert routing.order("pirate", busy)[0] == routing.order("pirate", IDLE)[0]
