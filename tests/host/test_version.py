import subprocess
import sys
import tomllib
from pathlib import Path

import slora_jax

_ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_installed_package():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    assert slora_jax.__version__ == project["version"]


def test_a_checkout_that_is_not_installed_has_a_version_that_says_so():
    # Without site-packages: only the standard library and the checkout.
    code = "import slora_jax; print(slora_jax.__version__)"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "0+unknown"
