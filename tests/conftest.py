"""Tests marked ``gpu`` are skipped where JAX finds no GPU; generated tests draw the same examples in every run."""

import logging

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    # Examples of one test may share its ``tmp_path``: each writes all that it reads.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import jax

        if jax.default_backend() != "gpu":
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def log_levels_stay():
    """A test that sets up the log of a server changes nothing for those behind it."""
    names = (None, "pallas_kernels", "slora_jax", "slora_jax.start", "slora_jax.events")  # None: the root
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate
