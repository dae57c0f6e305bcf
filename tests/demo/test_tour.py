"""The notebook of the demo: what it stores, and that it runs."""

import json
import re
from pathlib import Path

import pytest

import slora_jax.demo

TOUR = Path(slora_jax.demo.__file__).with_name("tour.ipynb")
FRANCE = ("base model: The capital of France is Paris.", "pirate: Arr! The capital o' France be Paris, matey!")


def printed(cells) -> str:
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "\n".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def pictures(cells) -> list[str]:
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def check(cells) -> None:
    """Of cells that were run."""
    text = printed(cells)
    for said in (*FRANCE, 'write sampling={"temperature": 0}', "prompts[2]: ", "interrupted", "0 requests run"):
        assert said in text, text
    assert len(re.findall(r"^pirate-[01]\.5-", text, re.MULTILINE)) == 2, text
    assert len(pictures(cells)) == 1
    assert not any(output["output_type"] == "error" for cell in cells for output in cell.get("outputs", ()))


def test_what_the_notebook_stores_is_small_and_of_no_machine():
    text = TOUR.read_text()
    cells = json.loads(text)["cells"]
    check(cells)
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)
    numbers = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1)), "run all of it, once, in order"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient, of the group dev")
    from nbclient import NotebookClient

    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    check(notebook.cells)
