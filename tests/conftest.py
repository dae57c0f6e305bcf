"""Tests marked ``gpu`` are skipped where JAX finds no GPU."""

import pytest


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import jax

        if jax.default_backend() != "gpu":
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
