"""The shapes of well-known base models, as YAML files: ``configs/shapes`` in a checkout, and within a wheel."""

from pathlib import Path

from slora_jax.errors import InvalidRequest

_PACKAGE = Path(__file__).parent


def shapes_folder() -> Path:
    """Where the files are. A wheel has them inside of the package, a checkout beside it."""
    inside = _PACKAGE / "configs" / "shapes"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs" / "shapes"


def shape_file(name: str) -> Path:
    """The file of a shape by its name, such as ``llama-7b``.

    Raises:
      InvalidRequest: there is none; the message lists those that there are.
    """
    file = shapes_folder() / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in shapes_folder().glob("*.yaml")))
        raise InvalidRequest(f"no such shape: {name}; known are {known}, or give a YAML file")
    return file
