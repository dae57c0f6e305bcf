"""The oracle's cases as fixtures."""

import pytest
from engine_cases import Case

CASES = ("llama1_mha", "llama3_gqa", "smollm_gqa3")


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def tiny_case() -> Case:
    """The case with a tokenizer."""
    return Case("smollm_gqa3")
