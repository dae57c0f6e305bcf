"""The oracle's cases as fixtures."""

import pytest
from engine_cases import CASES, FIXTURES, Case


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(FIXTURES / request.param)


@pytest.fixture(scope="module")
def tiny_case() -> Case:
    """The case with a tokenizer."""
    return Case(FIXTURES / "smollm_gqa3")
