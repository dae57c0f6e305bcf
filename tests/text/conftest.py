import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ask_transformers(tmp_path_factory):
    """Asks transformers the questions of ``ask_transformers.py``, in a Python that has it."""
    python = os.environ.get("SLORA_TORCH_PYTHON")
    if python is None and importlib.util.find_spec("transformers"):
        python = sys.executable
    if python is None:
        pytest.skip("needs transformers: set SLORA_TORCH_PYTHON to a Python that has it")

    def ask(questions: list[dict]) -> list[dict]:
        folder = tmp_path_factory.mktemp("questions")
        (folder / "questions.json").write_text(json.dumps(questions))
        # It must not see this interpreter's packages.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        script = Path(__file__).parent / "ask_transformers.py"
        arguments = [python, str(script), str(folder / "questions.json"), str(folder / "answers.json")]
        subprocess.run(
            arguments, check=True, env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        )
        return json.loads((folder / "answers.json").read_text())

    return ask
