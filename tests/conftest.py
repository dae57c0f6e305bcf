"""Tests marked ``gpu`` are skipped where JAX finds no GPU; generated tests draw the same examples in every run."""

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
