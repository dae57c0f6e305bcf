"""The oracle's cases as fixtures; steps compiled fast rather than to fast code."""

import pytest

from tests.helpers.engine_cases import CASES, FIXTURES, Case, compiled_fast


@pytest.fixture(scope="module", autouse=True)
def _fast_to_compile():
    with compiled_fast():
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(FIXTURES / request.param)


@pytest.fixture(scope="module")
def tiny_case() -> Case:
    """The case with a tokenizer."""
    return Case(FIXTURES / "smollm_gqa3")
