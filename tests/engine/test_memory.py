"""How much of a device's memory is taken: JAX's share of a GPU, the pool's share of that, and what is said of it."""

import logging
import math
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from slora_jax import gpu_memory
from slora_jax.config import EngineConfig, PoolConfig, read_yaml
from slora_jax.engine import build, runner
from slora_jax.engine.batch import BatchShape
from slora_jax.engine.build import DeviceMemory, free_for_compiling, host_adapter_bytes, num_pages_of
from slora_jax.engine.sampling import SamplerShape
from slora_jax.engine.scoring import ScorerShape
from slora_jax.engine.tuning import head_bytes, layers_bytes
from slora_jax.errors import InvalidRequest
from slora_jax.model.config import ModelConfig
from slora_jax.model.shards import Shards
from slora_jax.shapes import shape_file
from tests.helpers.engine_cases import FIXTURES, make_engine

GIB = 2**30
VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


@pytest.fixture
def environment(monkeypatch):
    """Without any of the variables; what is set meanwhile goes afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("share", "devices", "expected"), [(None, 1, "0.92"), (None, 4, "0.88"), (0.5, 1, "0.5"), (0.5, 4, "0.5")]
)
def test_jax_is_given_its_share(environment, caplog, share, devices, expected):
    gpu_memory.set_share(share, devices)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == expected
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    gpu_memory.set_share(share, devices)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", VARIABLES[:2])
def test_an_existing_variable_wins_and_is_logged(environment, caplog, name):
    environment.setenv(name, "0.3")
    with caplog.at_level(logging.INFO):
        gpu_memory.set_share(None)
        gpu_memory.set_share(0.5)
    assert {v: os.environ[v] for v in VARIABLES if v in os.environ} == {name: "0.3"}
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert all(f"{name}=0.3" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("name", "value", "at_once"),
    [
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", False),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "true", True),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform", False),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "bfc", True),
    ],
)
def test_how_jax_takes_its_share_is_left_alone(environment, caplog, name, value, at_once):
    environment.setenv(name, value)
    with caplog.at_level(logging.INFO):
        gpu_memory.set_share(None)
    assert (os.environ[name], os.environ["XLA_CLIENT_MEM_FRACTION"]) == (value, "0.92")
    assert f"{name}={value}" in caplog.text
    assert gpu_memory.is_reserved_at_once() == at_once


def test_jax_itself_reads_what_is_set():
    """The options that JAX makes of the environment for a GPU, in a process whose JAX has not started."""
    code = textwrap.dedent("""
        import jax
        from jaxlib.xla_client import generate_pjrt_gpu_plugin_options
        from slora_jax.gpu_memory import set_share
        set_share(None)
        print(generate_pjrt_gpu_plugin_options()["memory_fraction"])
    """)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "0.92\n"


def test_jax_that_started_before_is_told_about(environment, caplog):
    jax.devices()
    environment.setattr(jax, "default_backend", lambda: "gpu")
    gpu_memory.set_share(None)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "set XLA_CLIENT_MEM_FRACTION=0.92 before Python starts" in record.getMessage()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ


class Gpu:
    platform = "gpu"

    def __init__(self, **stats: float):
        self.stats = {name: int(value * GIB) for name, value in stats.items()}

    def memory_stats(self) -> dict[str, int]:
        return self.stats


def gpus(monkeypatch, *devices: Gpu) -> DeviceMemory | None:
    monkeypatch.setattr(jax, "local_devices", lambda: [*devices])
    return DeviceMemory.now(len(devices))


def test_the_pool_takes_its_share_of_the_fullest_gpu(environment):
    memory = gpus(
        environment,
        Gpu(bytes_limit=70, bytes_in_use=10, pool_bytes=70),
        Gpu(bytes_limit=70, bytes_in_use=20, pool_bytes=70),
    )
    assert memory.free == 50 * GIB
    assert num_pages_of(PoolConfig(), 2**20, memory) == int(0.9 * 50 * 1024)
    assert num_pages_of(PoolConfig(gigabytes=50), 2**20, memory) == 50 * 1024
    assert num_pages_of(PoolConfig(pages=77), 2**20, memory) == 77


@pytest.mark.parametrize("pool", [PoolConfig(gigabytes=50.1), PoolConfig(pages=10**12)])
def test_a_pool_larger_than_the_memory_is_refused(environment, pool):
    memory = gpus(environment, Gpu(bytes_limit=70, bytes_in_use=20, pool_bytes=70))
    with pytest.raises(
        InvalidRequest, match=r"^pool\.(gigabytes|pages) asks for .* where 50 GiB are free .*; lower it"
    ):
        num_pages_of(pool, 2**20, memory)


def test_memory_that_another_process_has_is_told(environment):
    memory = gpus(environment, Gpu(bytes_limit=70, bytes_in_use=20, pool_bytes=30))
    assert memory.free == 10 * GIB
    assert "JAX wanted 70 GiB of the GPU, but other processes hold memory there" in memory.source
    # Reserved as it is needed, it says nothing about others.
    environment.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert gpus(environment, Gpu(bytes_limit=70, bytes_in_use=20, pool_bytes=30)).free == 50 * GIB


def test_a_gpu_too_full_for_any_pool(environment):
    memory = gpus(environment, Gpu(bytes_limit=70, bytes_in_use=70, pool_bytes=70))
    with pytest.raises(InvalidRequest, match=r"hold 0 pages .* at least 2 are needed; .*70 of JAX's 70 GiB"):
        num_pages_of(PoolConfig(), 2**20, memory)


def test_an_allocator_that_keeps_no_count(environment):
    memory = gpus(environment, Gpu())
    assert memory is None
    assert num_pages_of(PoolConfig(gigabytes=1), 2**20, memory) == 1024
    with pytest.raises(InvalidRequest, match=r"set pool\.gigabytes"):
        num_pages_of(PoolConfig(), 2**20, memory)


def test_more_host_memory_than_there_is_is_refused():
    assert host_adapter_bytes(EngineConfig(host_adapter_gigabytes=0.5)) == GIB // 2
    with pytest.raises(InvalidRequest, match="this machine has"):
        host_adapter_bytes(EngineConfig(host_adapter_gigabytes=1e6))


def test_a_context_longer_than_the_models_is_told(caplog):
    engine = make_engine(FIXTURES / "llama3_gqa" / "model", max_model_len=10**6)
    assert engine.max_model_len == engine.model_config.max_position_embeddings
    assert any("max_model_len is 1000000, but the model takes" in record.getMessage() for record in caplog.records)


def test_what_trying_products_takes():
    """Both operands and two results, of the largest product: by hand, for Llama-3.1-8B in bfloat16."""
    model = ModelConfig.from_hf(read_yaml(shape_file("llama-3.1-8b")))
    beside = 128 * 2**20
    # The head: 4,096 by 128,256; its results are float32.
    weights = 4096 * 128256 * 2
    for rows in (2, 512):
        assert head_bytes(model, rows, 2) == weights + rows * 4096 * 2 + 2 * rows * 128256 * 4 + beside
    # The layers: [gate | up] has 4,096 by 28,672, and is the largest in operands and results alike.
    assert layers_bytes(model, 2048, 2) == 4096 * 28672 * 2 + 2048 * 4096 * 2 + 2 * 2048 * 28672 * 2 + beside
    # One of 8 devices has 16,032 columns of the head, and 3,584 of [gate | up]; [q | k | v] has fewer.
    local = Shards(model, 8).local
    assert head_bytes(local, 2, 2) == 4096 * 16032 * 2 + 2 * 4096 * 2 + 2 * 2 * 16032 * 4 + beside
    assert layers_bytes(local, 2, 2) == 4096 * 3584 * 2 + 2 * 4096 * 2 + 2 * 2 * 3584 * 2 + beside
    # On one H200 the pool left 12 GB: enough to compile 6 samplers of 512 sequences at a time, not one on each core.
    assert 12 * 10**9 // head_bytes(model, 512, 2) == 6


def test_compilers_share_what_the_pool_leaves(environment):
    gpus(environment, Gpu(bytes_limit=70, bytes_in_use=60, pool_bytes=70), Gpu(bytes_limit=70, bytes_in_use=50))
    assert free_for_compiling(2) == 10 * GIB
    gpus(environment, Gpu())
    assert free_for_compiling(1) == math.inf, "the allocator keeps no count"
    environment.undo()
    assert free_for_compiling(1) == math.inf, "a CPU's programs are not tried"


def test_programs_know_what_compiling_them_takes(monkeypatch):
    given = []

    class Spied(runner.Programs):
        def __init__(self, *arguments):
            given.extend(arguments[-2:])
            super().__init__(*arguments)

    monkeypatch.setattr(runner, "Programs", Spied)
    monkeypatch.setattr(build, "free_for_compiling", lambda num_devices: 12345 * num_devices)
    engine = make_engine(FIXTURES / "llama3_gqa" / "model")
    needs, free = given
    assert free == 12345
    sampler = SamplerShape(48, random=True, filtered=False, history=0, logprobs=False)
    assert needs(sampler) == head_bytes(engine.model_config, 48, 4)
    assert needs(ScorerShape(128, 1)) == head_bytes(engine.model_config, 128, 4)
    batch = BatchShape(256, 48, 4, 0, 0, (), False, 0)
    for key in (batch, runner.Part("layers", batch)):
        assert needs(key) == layers_bytes(engine.model_config, 256, 4)
