"""For the files that ``test_devices.py`` runs in a process with eight CPU devices."""

import pytest

from tests.helpers.engine_cases import compiled_fast


@pytest.fixture(scope="session", autouse=True)
def _fast_to_compile():
    with compiled_fast():
        yield
