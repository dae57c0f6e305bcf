"""For the files that ``test_devices.py`` runs in a process with eight CPU devices."""

import pytest
from engine_cases import FAST_TO_COMPILE

from slora_jax.engine import runner


@pytest.fixture(scope="session", autouse=True)
def _fast_to_compile():
    options = runner.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "compiler_options", lambda num_rows: options(num_rows) | FAST_TO_COMPILE)
        yield
