"""The command ``slora-jax``: ``serve.py``, which lies beside the package in a checkout and within it in a wheel."""

import runpy
from pathlib import Path

_PACKAGE = Path(__file__).parent


def main() -> None:
    """Runs ``serve.py`` with this process's arguments."""
    inside = _PACKAGE / "serve.py"
    runpy.run_path(str(inside if inside.is_file() else _PACKAGE.parent / "serve.py"), run_name="__main__")
