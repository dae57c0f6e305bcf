"""Who may import whom, read from the source, and which parts load without JAX, seen in a fresh process."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# A package may import itself, the leaves, and what is listed.
LEAVES = {"errors", "config", "request", "shapes", "gpu_memory", "histogram", "process"}
ALLOWED = {
    "text": {"errors"},
    "memory": {"model.config", "model.modules", "model.shards"},
    "scheduler": {"memory.budget", "memory.costs", "memory.layout", "memory.pages"},
    "adapters": {"memory.layout", "model.config", "model.modules"},
    "model": set(),
    "engine": {"scheduler", "adapters", "model", "memory", "text"},
    "api": {"engine.engine", "engine.generation", "engine.observation", "text", "demo", ""},
    "fleet": {"api", "engine.engine", "demo"},
    "bench": {"api", "text", "fleet", "engine", "demo", "model", "scheduler", "memory", "adapters", ""},
    "demo": set(),
}
# What the README says that a package may not do, as what it then does not import.
CLAIMS = {
    "know the rest": ("slora_jax",),
    "know the engine": ("slora_jax.engine", "slora_jax.scheduler"),
    "import JAX": ("jax", "jaxlib", "flax", "pallas_kernels"),
    "know HTTP": ("flask", "werkzeug", "waitress", "http", "slora_jax.api"),
    "reach below the engine": ("slora_jax.memory", "slora_jax.scheduler", "slora_jax.adapters", "slora_jax.model"),
    "": (),
}
NO_JAX = (
    "slora_jax",
    "slora_jax.config",
    "slora_jax.request",
    "slora_jax.memory.budget",
    "slora_jax.memory.costs",
    "slora_jax.memory.layout",
    "slora_jax.memory.pages",
    "slora_jax.model.shards",
    "slora_jax.scheduler.scheduler",
    "slora_jax.engine.core",
    "slora_jax.bench.simulate",
    "slora_jax.adapters.store",
    "slora_jax.text.tokenizer",
    "slora_jax.demo",
    "slora_jax.fleet.routing",
)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def claims_of_readme() -> dict[str, str]:
    """What each package may not do, from the README's table of packages."""
    table = (ROOT / "README.md").read_text().partition("| package | is | may not |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    return {package: claim for packages, _, claim in rows for package in re.findall(r"`([\w/]+)/`", packages)}


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def test_the_readme_has_every_package():
    assert set(claims_of_readme()) == {"pallas_kernels", *(f"slora_jax/{package}" for package in ALLOWED)}


@pytest.mark.parametrize(("package", "claim"), claims_of_readme().items())
def test_what_the_readme_says_of_a_package(package, claim):
    paths = sorted((ROOT / package).rglob("*.py"))
    for path in paths:
        assert not {name for name in imports_of(path) if is_within(name, CLAIMS[claim])}, f"{path} may not {claim}"
    if claim == "import JAX":
        names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in paths]
        assert_loads_without_jax(*(name.removesuffix(".__init__") for name in names))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_downward_only(package):
    allowed = ALLOWED[package] | LEAVES | {package}
    for path in (ROOT / "slora_jax" / package).rglob("*.py"):
        for name in imports_of(path):
            if name.split(".")[0] != "slora_jax":
                continue
            inner = name.removeprefix("slora_jax").removeprefix(".")
            assert any(inner == a or (a and inner.startswith(a + ".")) for a in allowed), f"{path} imports {name}"


def test_every_package_has_a_rule():
    packages = {p.parent.name for p in (ROOT / "slora_jax").glob("*/__init__.py")}
    assert packages == set(ALLOWED)


def test_only_the_model_and_the_runner_use_kernels():
    users = {
        str(path.relative_to(ROOT / "slora_jax"))
        for path in (ROOT / "slora_jax").rglob("*.py")
        if any(name.split(".")[0] == "pallas_kernels" for name in imports_of(path))
    }
    assert users == {
        "model/llama.py",
        "model/mesh.py",
        "model/projection.py",
        "model/weights.py",
        "engine/batch.py",
        "engine/build.py",
        "engine/runner.py",
        "bench/baselines.py",
        "bench/collectives.py",
        "bench/kernels.py",
    }


@pytest.mark.parametrize("module", NO_JAX)
def test_host_modules_load_without_jax(module):
    assert_loads_without_jax(module)


def assert_loads_without_jax(*modules: str) -> None:
    code = f"import sys, {', '.join(modules)}; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_page_size_is_the_same_everywhere():
    from pallas_kernels import PAGE_SIZE
    from slora_jax import config

    assert config.PAGE_SIZE == PAGE_SIZE
