"""Names that an adapter cannot have, because clients write them for something else."""

import shutil

import pytest

from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.errors import BadAdapter
from tests.helpers.engine_cases import make_engine


@pytest.fixture(scope="module")
def engine(tiny_case):
    engine = make_engine(tiny_case.model)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["model", "model:", "model:qv-r8", "model:model"])
def test_the_base_models_name_and_what_begins_with_it_and_a_colon(engine, tiny_case, name):
    with pytest.raises(BadAdapter, match="base model"):
        engine.register_adapter(name, str(tiny_case.adapters / "qv-r8"))
    packed = synthetic_weights(4, ("q",), engine.pool_layout, engine.dtype, seed=1)
    with pytest.raises(BadAdapter, match="base model"):
        engine.register_loaded_adapter(name, {"q": 4}, packed)
    assert not engine.adapters()


def test_folders_of_such_names_are_left_out_and_the_others_registered(engine, tiny_case, tmp_path, caplog):
    for name in ("model", "model:pirate", "models", "mod"):
        shutil.copytree(tiny_case.adapters / "qv-r8", tmp_path / name)
    engine.register_adapter_dir(str(tmp_path))
    assert set(engine.adapters()) == {"models", "mod"}
    assert [word in caplog.text for word in ("model refused", "model:pirate refused")] == [True, True]
