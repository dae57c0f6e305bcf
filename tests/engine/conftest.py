"""The oracle's cases as fixtures; steps compiled fast rather than to fast code."""

import pytest
from engine_cases import CASES, FAST_TO_COMPILE, FIXTURES, Case

from slora_jax.engine import runner


@pytest.fixture(scope="module", autouse=True)
def _fast_to_compile():
    options = runner.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "compiler_options", lambda num_rows: options(num_rows) | FAST_TO_COMPILE)
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(FIXTURES / request.param)


@pytest.fixture(scope="module")
def tiny_case() -> Case:
    """The case with a tokenizer."""
    return Case(FIXTURES / "smollm_gqa3")
