"""What a fleet is told, and the metrics of its replicas in one text."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.config import read_yaml
from slora_jax.errors import InvalidRequest
from slora_jax.fleet.config import FleetConfig, read_settings
from slora_jax.fleet.metrics import merged

EXAMPLE = Path(__file__).parents[2] / "configs" / "fleet" / "ray.yaml"


def test_the_fields_of_a_server_and_a_section_of_its_own():
    engine, server, fleet = read_settings(
        {"model": "demo", "max_model_len": 512, "server": {"max_streams": 7}, "fleet": {"replicas": 3}}, {}
    )
    assert engine.max_model_len == 512 and server.max_streams == 7 and fleet.replicas == 3
    assert fleet.routing == "affinity_with_spill"


def test_the_example_has_every_field_of_a_fleet():
    (application,) = read_yaml(EXAMPLE)["applications"]
    assert read_settings(application["args"], {}).fleet == FleetConfig(replicas=2)
    assert set(application["args"]["fleet"]) == set(FleetConfig.model_fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modle": "demo"}, "modle: there is no such field"),
        ({"fleet": {"replica": 2}}, "fleet.replica: there is no such field"),
        ({"fleet": 3}, "fleet: must be a mapping"),
        ({"fleet": {"replicas": 4, "max_replicas": 2}}, "max_replicas is 2, fewer than replicas, 4"),
        ({"fleet": {"routing": "sideways"}}, "fleet.routing"),
        ({"fleet": {"gpus": -1}}, "fleet.gpus"),
        ({"mesh": {"tp": 2, "num_hosts": 2, "coordinator": "h:1"}}, "mesh.num_hosts: must be 1"),
        ({"server": {"port": "x"}, "fleet": {"cpus": "y"}}, "fleet.cpus"),
        # Strangers reach a fleet unless it is said where Ray listens.
        ({"server": {"allow_adapter_loading": True}}, "needs an admin_key"),
    ],
)
def test_what_is_wrong_is_named(fields, said):
    with pytest.raises(InvalidRequest) as refusal:
        read_settings(fields, {})
    assert said in str(refusal.value)


def test_keys_come_from_the_environment():
    environment = {"SLORA_ADMIN_KEY": "sk-the-admin", "SLORA_API_KEY": "sk-first-key sk-second-key"}
    server = read_settings({}, environment).server
    assert server.admin_key.get_secret_value() == "sk-the-admin"
    assert [key.get_secret_value() for key in server.api_keys] == ["sk-first-key", "sk-second-key"]
    said = read_settings({"server": {"admin_key": "sk-another"}}, environment).server
    assert said.admin_key.get_secret_value() == "sk-another"


ONE = b"""# HELP slora:steps_total Steps.
# TYPE slora:steps_total counter
slora:steps_total %d
# HELP slora:queue_seconds Waiting.
# TYPE slora:queue_seconds histogram
slora:queue_seconds_bucket{le="1.0"} 2
slora:queue_seconds_bucket{le="+Inf"} 3
slora:queue_seconds_sum 4.0
slora:queue_seconds_count 3
# HELP slora:adapters Adapters.
# TYPE slora:adapters gauge
slora:adapters{tier="pool"} %d
"""


def test_metrics_of_replicas_stay_apart():
    text = merged({"a": ONE % (5, 6), "b": ONE % (7, 8)}).decode()
    samples = {
        (sample.name, sample.labels.pop("replica"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["slora:steps_total", "a"] == 5 and samples["slora:steps_total", "b"] == 7
    assert samples["slora:adapters", "b", "pool"] == 8
    assert samples["slora:queue_seconds_bucket", "a", "+Inf"] == 3
    assert text.count("# TYPE slora:steps_total counter") == 1
