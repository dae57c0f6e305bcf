import pytest

from slora_jax.api.app import create_app
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def engine(tmp_path):
    engine = FakeEngine(tmp_path / "model")
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def client(engine):
    return create_app(engine).test_client()
